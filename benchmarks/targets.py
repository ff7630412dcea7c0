"""Is a target cost hit? Whole searches on the digits, at the space's 10th, 50th and 90th percentile, for several seeds.

    python benchmarks/targets.py                        # both kinds of cost, 5 seeds
    python benchmarks/targets.py --seeds 1 --epochs 4

Prints one line for each search as it ends, then how far from their targets the derived networks were: by their entries
in the table, and in milliseconds also measured as whole networks.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

import densenas.run
from densenas import CostTable, SearchSpace, data
from densenas.config import override
from densenas.derivation import Lattice
from densenas.latency import measure, milliseconds
from densenas.run import Run
from densenas.search import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    space = SearchSpace.load("digits")
    recipe = override(space.search, epochs=options.epochs, arch_start_epoch=0, batch_size=options.batch_size)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        densenas.run.ROOT = Path(folder)
        images = data.prepare(Run("data"), "digits")
        size, classes = images.image_size, len(images.classes)
        for table in (
            CostTable.mult_adds(space, size, classes),
            measure(space, size, classes, Path(folder) / "latency.jsonl", device="cpu"),
        ):
            for share in (0.1, 0.5, 0.9):
                target = Lattice(table).quantile(share)
                for seed in range(options.seeds):
                    run = Run(f"{table.kind}-{share}-{seed}")
                    result = search(run, images, table, recipe, target, seed, device="cpu")
                    arch = result.best.architecture
                    row = {"kind": table.kind, "percentile": share, "seed": seed, "target": target}
                    row |= {"expected": result.history[-1]["expected_cost"], "derived": result.best.cost}
                    if table.kind == "mult_adds":
                        row["measured"] = arch.mult_adds(size, classes)
                    else:
                        net = arch.build(classes).eval().to(memory_format=torch.channels_last)
                        x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
                        row["measured"] = sorted(milliseconds(net, x) for _ in range(5))[2]
                    rows.append(row)
                    print(row, flush=True)
    frame = pd.DataFrame(rows)
    for column in ("expected", "derived", "measured"):
        frame[column] = 100 * (frame[column] / frame["target"] - 1).abs()
    gaps = frame.groupby(["kind", "percentile"])[["expected", "derived", "measured"]].agg(["mean", "max"])
    print(f"Distance from the target in %, {options.seeds} seeds\n{gaps.round(2)}")


if __name__ == "__main__":
    main()
