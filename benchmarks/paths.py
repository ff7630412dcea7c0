"""Does a supernet know its own networks? {all, sampled} paths × {own, shared} weights, all else equal.

    python benchmarks/paths.py digits               # a search of each way; --seeds 3 for three
    python benchmarks/paths.py cifar10 --epochs 4 --target 0.6
    python benchmarks/paths.py --table              # the README's table, from the results

RUN is a run with images and costs (01, 02). Each search is a process of its own, on one thread, towards the target (by
default the median cost of the space). What it leaves is judged on val: the derived network and 24 random ones of the
space, by the supernet's weights, and how these accuracies order networks whose own accuracies are known. These are the
random ones of reports/RUN/truth.csv (seed 0, random ones of either kind and searched ones) where there is such a table;
else 24 random networks of the target's cost are trained here, alone, by the space's recipe.

Results are added to benchmarks/results/paths-cpu.json, a row for each search; a search that is there is not repeated.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from memory import peak_gib
from truth import alone

from densenas import Architecture
from densenas.baselines import draw
from densenas.correlations import rankings
from densenas.costs import read_costs
from densenas.files import write_text
from densenas.images.data import load
from densenas.method.derivation import Lattice
from densenas.recipes import override
from densenas.runs.progress import quiet
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.search import Judge, search
from densenas.settings import Computing
from densenas.train import train_alone
from densenas.truth import Truth

RESULTS = Path(__file__).parent / "results" / "paths-cpu.json"
WAYS = [(paths, weights) for paths in ("all", "sampled") for weights in ("own", "shared")]
RANDOM = 24  # networks


def known(name: str, target: float) -> pd.DataFrame:
    """Networks by net_config, with the accuracy each reaches trained alone and its target."""
    run = Run(name)
    truth = Truth(run).rows()
    if len(truth):
        return alone(truth)[["net_config", "target", "accuracy"]]
    kept = RESULTS.parent / f"paths-{name}-networks.csv"
    if kept.exists():
        return pd.read_csv(kept)
    data, table = load(run), read_costs(run)
    trained = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for number, arch in enumerate(draw(Lattice(table), target, RANDOM, name)):
            here = Run(f"alone-{number}", Path(folder))
            recipe, how = table.space.retrain, Computing(device="cpu")
            row = train_alone(here, data, arch, recipe, how)
            top1 = row[f"top1_{recipe.epochs}"]
            trained.append({"net_config": str(arch), "target": target, "accuracy": top1})
    networks = pd.DataFrame(trained)
    write_text(kept, networks.to_csv(index=False))
    return networks


def judged(name: str, settings: dict[str, Any], seed: int, target: float) -> dict[str, Any]:
    """One search, and what its supernet knows."""
    run = Run(name)
    data, table = load(run), read_costs(run)
    recipe = override(table.space.search, **settings)
    with tempfile.TemporaryDirectory() as folder, quiet():
        how = Computing(seed=seed, device="cpu")
        result = search(Run("search", Path(folder)), data, table, recipe, target, how)
    memory = peak_gib()
    judge = Judge(data, 256, torch.device("cpu"))
    drawn = Lattice(table).sample(RANDOM, 1)
    alone = [judge.top1(result.net, candidate.architecture) for candidate in drawn]
    networks = known(name, target)
    texts = networks.pop("net_config")
    networks["path"] = [judge.top1(result.net, Architecture.parse(text)) for text in texts]
    order = rankings(networks).loc["path"].dropna()
    last = result.history[-1]
    return {
        "seed": seed,
        "target": target,
        **settings,
        "net_config": str(result.best.architecture),
        "derived_cost": result.best.cost,
        "val_top1": last["val_top1"],
        "path_top1": judge.top1(result.net, result.best.architecture),
        "random_path_top1": sum(alone) / len(alone),
        **{name: order[name] for name in order.index},
        "alpha_entropy": last["alpha_entropy"],
        "beta_entropy": last["beta_entropy"],
        "seconds": sum(float(row["seconds"]) for row in result.history),
        "memory_gib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--target", type=float, help="million Mult-Adds")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"searches": []}
    if options.table:
        print(table(pd.DataFrame(results["searches"])))
        return
    target = options.target or Lattice(read_costs(Run(options.run))).quantile(0.5)
    known(options.run, target)
    for seed in range(options.seeds):
        for paths, weights in WAYS:
            settings: dict[str, Any] = {"paths": paths, "weights": weights}
            if options.epochs:
                settings |= {"epochs": options.epochs, "arch_start_epoch": 1}
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(judged, options.run, settings, seed, target).result()
            results["searches"].append({"run": options.run, **row})
            results["environment"] = environment()
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")
            print(row, flush=True)


def table(rows: pd.DataFrame) -> str:
    """Means over seeds, as README shows them."""
    head = "| Run | n | Paths | Weights | Derived, % | Ranking | s | GiB |"
    lines = [head, "|---|---:|---|---" + "|---:" * 4 + "|"]
    for (run, paths, weights), group in rows.groupby(["run", "paths", "weights"], sort=False):
        mean = group.mean(numeric_only=True)
        cells = [run, str(len(group)), paths, weights, f"{100 * mean['path_top1']:.0f}"]
        cells += [f"{mean['spearman_at_equal_cost']:.2f}"]
        cells += [f"{mean['seconds']:.0f}", f"{mean['memory_gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
