"""What happens around the steps: the wait before the first of them, and for an architecture at the end.

    python benchmarks/startup.py

Imports in fresh processes, torch alone and densenas taking turns; the rest in this one. Median, least and most seconds
of each go to benchmarks/results/startup-cpu.json, beside what is wanted.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from densenas import CostTable, SearchSpace, SuperNet
from densenas.method.derivation import Lattice
from densenas.runs.provenance import environment

ROUNDS = 7


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def importing(module: str) -> float:
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.check_output([sys.executable, "-c", code], text=True))


def main() -> None:
    space = SearchSpace.load("mbv2")
    table, net = CostTable.mult_adds(space), SuperNet(space, 100)
    importing("densenas")  # once, for the disk's sake
    rows = []
    for what, wanted, seconds in (
        ("import densenas, beyond torch", 2.0, lambda: importing("densenas") - importing("torch")),
        (
            "Mult-Adds table of mbv2",
            0.5,
            lambda: timed(lambda: CostTable.mult_adds(SearchSpace.load("mbv2"))),
        ),
        ("building the mbv2 supernet", 3.0, lambda: timed(lambda: SuperNet(space, 100))),
        ("derive", 0.05, lambda: timed(net.derive)),
        ("derive at 300 M Mult-Adds", 1.0, lambda: timed(lambda: Lattice(table).at(300))),
    ):
        measured = [seconds() for _ in range(ROUNDS)]
        row = {"what": what, "wanted_s": wanted, "n": ROUNDS, "median_s": median(measured)}
        rows.append(row | {"min_s": min(measured), "max_s": max(measured)})
        print(f"{what:<32}{row['median_s']:>8.3f} s, wanted under {wanted}")
    path = Path(__file__).parent / "results" / "startup-cpu.json"
    path.write_text(json.dumps({"rows": rows, **environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
