"""Is a target cost hit? Whole searches on the digits, at the space's 10th, 50th and 90th percentile, for several seeds.

    python benchmarks/targets.py                        # both kinds of cost, 5 seeds
    python benchmarks/targets.py --seeds 1 --epochs 4

Prints one line for each search as it ends, then how far from their targets the derived networks were: by their entries
in the table, and measured: Mult-Adds by PyTorch's counter, milliseconds of all networks as a whole, in shuffled rounds.
The latency table is first brought to whole networks by the one factor of `agreement`, and latencies are measured in
fresh processes, as notebooks 02 and 06 are. `steady` is what was measured over how much slower the networks that gave
the factor ran in the same rounds: the error that a machine of steady speed would leave. Everything goes to
benchmarks/results/targets-cpu.json.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

import pandas as pd

from densenas import CostTable, SearchSpace, latency, train
from densenas.images.prepare import prepare
from densenas.method.derivation import Lattice
from densenas.recipes import override
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import Computing, DataSettings

T = TypeVar("T")
COLUMNS = ["expected", "derived", "measured", "steady"]
SHARES = (0.1, 0.5, 0.9)


def fresh(function: Callable[..., T], *arguments: object) -> T:
    """The function in a process of its own: one that has trained runs networks up to 1.5 times slower from then on."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    space = SearchSpace.load("digits")
    recipe = override(
        space.search, epochs=options.epochs, arch_start_epoch=0, batch_size=options.batch_size
    )
    rows, where = [], environment()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DENSENAS_ROOT"] = str(Path(folder))
        images = prepare(Run("data"), DataSettings())
        size, classes = images.image_size, len(images.classes)
        milliseconds = fresh(
            latency.measure, space, size, classes, Path(folder) / "latency.jsonl", 1, "cpu"
        )
        agreement = latency.agreement(fresh(latency.judge, milliseconds, 30, "cpu"))
        for table in (
            CostTable.mult_adds(space, size, classes),
            milliseconds.scaled(agreement["factor"]),
        ):
            found = []
            for share in SHARES:
                target = Lattice(table).quantile(share)
                for seed in range(options.seeds):
                    run = Run(f"{table.kind}-{share}-{seed}")
                    result = search(
                        run, images, table, recipe, target, Computing(seed=seed, device="cpu")
                    )
                    row = {
                        "kind": table.kind,
                        "percentile": 100 * share,
                        "seed": seed,
                        "target": target,
                    }
                    row |= {
                        "expected": result.history[-1]["expected_cost"],
                        "derived": result.best.cost,
                    }
                    found.append(result.best.architecture)
                    rows.append(row)
                    print(row, flush=True)
            slower = 1.0
            if table.kind == "latency":
                known = Lattice(table).sample(30, 0, even=True)  # what `judge` looked at
                networks = found + [one.architecture for one in known]
                measured = fresh(latency.whole, networks, table, "cpu", 12)
                slower = median(
                    now / one.cost for now, one in zip(measured[len(found) :], known, strict=True)
                )
            else:
                measured = [
                    train.size(architecture.build(classes), size)["mult_adds_m"]
                    for architecture in found
                ]
            for row, value in zip(rows[-len(found) :], measured, strict=False):
                row |= {"measured": value, "steady": value / slower}
    frame = pd.DataFrame(rows)
    for column in COLUMNS:
        frame[column] = 100 * (frame[column] / frame["target"] - 1).abs()
    gaps = frame.groupby(["kind", "percentile"])[COLUMNS].agg(["mean", "max"])
    result = {"recipe": recipe.model_dump(), "latency_table": agreement, "searches": rows, **where}
    path = Path(__file__).parent / "results" / "targets-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Distance from the target in %, {options.seeds} seeds\n{gaps.round(2)}")


if __name__ == "__main__":
    main()
