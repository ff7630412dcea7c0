"""Does a supernet know its own networks? {all, sampled} paths × {own, shared} weights.

    python benchmarks/paths.py digits --seeds 3 --target 1    # three searches of each way
    python benchmarks/paths.py cifar10 --seeds 2 --epochs 4 --target 0.6
    python benchmarks/paths.py --table                        # the README's table, from the results

RUN is a run with images and costs (01, 02). Each search is a process of its own, on one thread, two at a time, by the
rates that served its kind of paths, towards the target (by default the median cost of the space). What it leaves is
judged on val: the derived network and 24 random ones of the space, by the supernet's weights, and how these accuracies
order random networks whose own accuracies are known, those of any depth (`any_…`) and those as deep as searched ones
(`deep_…`). They are of reports/RUN/truth.csv (seed 0) where there is such a table; else 24 random networks of the
target's cost are trained here, alone, by the space's recipe.

Results are added to benchmarks/results/paths-cpu.json, a row for each search; a search that is there is not repeated.
"""

import argparse
import json
import math
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from memory import peak_gib
from tqdm import tqdm
from truth import alone

from densenas import Architecture
from densenas.baselines import draw
from densenas.correlations import rankings
from densenas.costs import read_costs
from densenas.files import write_text
from densenas.images.data import load
from densenas.judge import Judge
from densenas.method.architecture import Candidate
from densenas.method.derivation import Lattice
from densenas.method.supernet import Choice
from densenas.recipes import override
from densenas.runs.progress import quiet
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import Computing
from densenas.train import train_alone
from densenas.truth import Truth
from densenas.verdict import RANDOM

RESULTS = Path(__file__).parent / "results" / "paths-cpu.json"
RANKED = ("n", "spearman_at_equal_cost")  # of `rankings`
# Each by the rates that served it: those of the space are what served sampled paths.
RATES = {"all": {"lr": 0.2, "arch_lr": 0.02}, "sampled": {}}
WAYS = list(product(RATES, ("own", "shared")))
NETWORKS = 24  # random ones, where none are known


def known(name: str, target: float) -> pd.DataFrame:
    """Random networks by net_config, with the accuracy each reaches trained alone, its target and its group."""
    run = Run(name)
    truth = Truth(run).rows()
    if len(truth):
        networks = alone(truth)
        drawn = networks[networks["group"].str.startswith(RANDOM)]
        return drawn[["net_config", "target", "accuracy", "group"]]
    kept = RESULTS.parent / f"paths-{name}-networks.csv"
    if kept.exists():
        return pd.read_csv(kept).assign(group=RANDOM)
    data, table = load(run), read_costs(run)
    trained = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for number, arch in enumerate(draw(Lattice(table), target, NETWORKS, name)):
            here = Run(f"alone-{number}", Path(folder))
            recipe, how = table.space.retrain, Computing(device="cpu")
            row = train_alone(here, data, arch, recipe, how)
            top1 = row[f"top1_{recipe.epochs}"]
            trained.append({"net_config": str(arch), "target": target, "accuracy": top1})
    networks = pd.DataFrame(trained)
    write_text(kept, networks.to_csv(index=False))
    return networks.assign(group=RANDOM)


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

    def top1(network: Architecture | Candidate) -> float:
        return judge.top1(result.net, Choice.of(result.net.space, network))

    drawn = Lattice(table).sample(NETWORKS, 1)
    paths = [top1(candidate) for candidate in drawn]
    networks = known(name, target)
    texts = networks.pop("net_config")
    networks["path"] = [top1(Architecture.parse(text)) for text in texts]
    group = networks.pop("group")
    orders = {"any": rankings(networks[group == RANDOM]).loc["path"]}
    if (group != RANDOM).any():
        orders["deep"] = rankings(networks[group != RANDOM]).loc["path"]
    last = result.history[-1]
    return {
        "seed": seed,
        "target": target,
        **settings,
        "net_config": str(result.best.architecture),
        "derived_cost": result.best.cost,
        "val_top1": last["val_top1"],
        "path_top1": top1(result.best),
        "random_path_top1": sum(paths) / len(paths),
        **{f"{kind}_{name}": order[name] for kind, order in orders.items() for name in RANKED},
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
    shortened = {"epochs": options.epochs, "arch_start_epoch": 1} if options.epochs else {}
    # A process for each search, which alone knows how much memory that one took.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        searches = []
        for seed, (paths, weights) in product(range(options.seeds), WAYS):
            settings = {"paths": paths, "weights": weights, **RATES[paths], **shortened}
            wanted = {"run": options.run, "seed": seed, "target": target, **settings}
            if not any(wanted.items() <= row.items() for row in results["searches"]):
                searches.append(pool.submit(judged, options.run, settings, seed, target))
        for done in tqdm(as_completed(searches), "searches", len(searches)):
            results["searches"].append({"run": options.run, **done.result()})
            results["searches"].sort(key=itemgetter("run", "paths", "weights", "seed"))
            results["environment"] = environment()
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")


def table(rows: pd.DataFrame) -> str:
    """Means over seeds, with least and most of what is derived, as README shows them."""
    head = "| Run | n | Paths | Weights | Derived, % | Order, any depth | as deep | s | GiB |"
    lines = [head, "|---|---:|---|---" + "|---:" * 5 + "|"]
    for (run, paths, weights), group in rows.groupby(["run", "paths", "weights"], sort=False):
        mean = group.mean(numeric_only=True)
        derived = 100 * group["path_top1"]
        spread = f"{derived.mean():.0f} ({derived.min():.0f}–{derived.max():.0f})"
        cells = [run, str(len(group)), paths, weights, spread]
        for kind in ("any", "deep"):
            found = mean[f"{kind}_spearman_at_equal_cost"]
            cells.append("" if math.isnan(found) else f"{found:.2f}")
        cells += [f"{mean['seconds']:.0f}", f"{mean['memory_gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
