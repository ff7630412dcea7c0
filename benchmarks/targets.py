"""Is a target cost hit? Whole searches on the digits, at the space's 10th, 50th and 90th percentile, for several seeds.

    python benchmarks/targets.py                        # both kinds of cost, 5 seeds
    python benchmarks/targets.py --seeds 1 --epochs 4

Prints one line for each search as it ends, then how far from their targets the derived networks were: by their entries
in the table, and measured: Mult-Adds by PyTorch's counter, milliseconds of all networks as a whole, in shuffled rounds.
The latency table is first brought to whole networks by the one factor of `agreement`. Everything goes to
benchmarks/results/targets-cpu.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

import densenas.run
from densenas import Architecture, CostTable, SearchSpace, data, latency
from densenas.config import override
from densenas.derivation import Lattice
from densenas.run import Run, environment
from densenas.search import search

SHARES = (0.1, 0.5, 0.9)


def counted(architecture: Architecture, size: int, classes: int) -> float:
    """Millions of Mult-Adds that PyTorch counts while the network runs; it counts a multiply-add twice."""
    with FlopCounterMode(display=False) as counter:
        architecture.build(classes).eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2e6


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
        milliseconds = latency.measure(space, size, classes, Path(folder) / "latency.jsonl", device="cpu")
        agreement = latency.agreement(latency.judge(milliseconds, device="cpu"))
        for table in (CostTable.mult_adds(space, size, classes), milliseconds.scaled(agreement["factor"])):
            found = []
            for share in SHARES:
                target = Lattice(table).quantile(share)
                for seed in range(options.seeds):
                    run = Run(f"{table.kind}-{share}-{seed}")
                    result = search(run, images, table, recipe, target, seed, device="cpu")
                    row = {"kind": table.kind, "percentile": 100 * share, "seed": seed, "target": target}
                    row |= {"expected": result.history[-1]["expected_cost"], "derived": result.best.cost}
                    found.append(result.best.architecture)
                    rows.append(row)
                    print(row, flush=True)
            if table.kind == "latency":
                measured = latency.whole(found, table.conditions, "cpu", rounds=12, seed=0)
            else:
                measured = [counted(architecture, size, classes) for architecture in found]
            for row, value in zip(rows[-len(found) :], measured, strict=True):
                row["measured"] = value
    frame = pd.DataFrame(rows)
    for column in ("expected", "derived", "measured"):
        frame[column] = 100 * (frame[column] / frame["target"] - 1).abs()
    gaps = frame.groupby(["kind", "percentile"])[["expected", "derived", "measured"]].agg(["mean", "max"])
    result = {"recipe": recipe.model_dump(), "latency_table": agreement, "searches": rows, **environment()}
    path = Path(__file__).parent / "results" / "targets-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Distance from the target in %, {options.seeds} seeds\n{gaps.round(2)}")


if __name__ == "__main__":
    main()
