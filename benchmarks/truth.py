"""Truth for rankings: the networks of a study, and random ones of any depth and of theirs, each trained alone for long.

    python benchmarks/truth.py cifar10                           # 20 epochs each
    python benchmarks/truth.py cifar10 --worker 0 --of 2         # and --worker 1 --of 2, side by side on two cores
    python benchmarks/truth.py cifar10 --epochs 40 --first 4     # four of each kind: does the order stay?
    python benchmarks/truth.py cifar10 --latency                 # trains nothing; wants a quiet machine

RUN is a run with prepared images and costs (01, 02), and with a study in reports/RUN/evidence.csv, from where its
targets, its searched and its hand-made networks come. For each target there are 12 random networks, uniform over
architectures, and 12 uniform over those that have as many layers as the searched ones; two more seeds of one network of
each kind say how much of a difference is the seed's. All train on one thread, 128 images a step, from a rate of 0.1.

Every network is a row of reports/RUN/truth.csv (`densenas.truth`) as soon as it is finished, with its accuracy on test
after some epochs, and is never trained again; one that is stopped goes on from its last checkpoint.
"""

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import NamedTuple

import pandas as pd

from densenas import Architecture, CostTable
from densenas.baselines import AS_DEEP as MATCHED
from densenas.baselines import as_deep_in_turn, draw
from densenas.costs import read_costs
from densenas.files import read_json, write_text
from densenas.images.data import load
from densenas.latency import whole
from densenas.method.derivation import Lattice
from densenas.recipes import override
from densenas.runs.locks import locked
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.settings import Computing
from densenas.train import train_alone
from densenas.truth import Conditions, Truth
from densenas.verdict import HAND_MADE, RANDOM

FOUND = "DenseNAS"  # what the published way of searching found
NETWORKS = 12  # random ones of either kind for each target
BEFORE_SEEDS = 3  # of each kind and target, before any is trained with other seeds
ROUNDS = 30  # timings of each network, of which the least counts


class Job(NamedTuple):
    """A network to train; the `number`-th of its group."""

    group: str
    target: float  # million Mult-Adds
    number: int
    seed: int
    net_config: str


def jobs(study: pd.DataFrame, table: CostTable, truth: Truth) -> list[Job]:
    """Every network in the order of training: a bit of each group and target first, then the other seeds.

    Random ones that `truth` has are the first of their kind.
    """
    lattice = Lattice(table)
    queue = []
    for target, rows in study.groupby("target"):
        searched = rows.loc[rows["design"] == FOUND, "net_config"].tolist()
        hand_made = rows.loc[rows["method"] == HAND_MADE, "net_config"].unique().tolist()
        depths = [Architecture.parse(text).num_layers for text in searched]
        known = rows.loc[rows["method"] == RANDOM, "net_config"].tolist()
        drawn = [str(arch) for arch in draw(lattice, target, 2 * NETWORKS, "truth", target)]
        deep = [Architecture.parse(text) for text in truth.networks(MATCHED, target).values()]
        matched = [
            as_deep_in_turn(lattice, target, depths, deep, number) for number in range(NETWORKS)
        ]
        groups = {
            FOUND: searched,
            RANDOM: [*dict.fromkeys(known + drawn)][:NETWORKS],
            MATCHED: [str(arch) for arch in matched if arch is not None],
            HAND_MADE: hand_made,
        }
        for group, networks in groups.items():
            for number, text in enumerate(networks):
                queue.append(Job(group, target, number, 0, text))
    first = [job for job in queue if job.number == 0 and job.group != HAND_MADE]
    queue.sort(key=lambda job: job.number)
    start = [job for job in queue if job.number < BEFORE_SEEDS]
    again = [job._replace(seed=seed) for seed in (1, 2) for job in first]
    return start + again + queue[len(start) :]


def alone(rows: pd.DataFrame) -> pd.DataFrame:
    """The networks of such a table, hand-made ones left out, each with its `accuracy` on test when trained alone.

    That is the first training (seed 0), for as many epochs as most.
    """
    epochs = rows["epochs"].mode().max()
    same = (rows["seed"] == 0) & (rows["epochs"] == epochs) & (rows["group"] != HAND_MADE)
    found = rows[same].drop_duplicates("net_config")
    return found.assign(accuracy=found[f"top1_{epochs}"])


def time_all(truth: Truth, table: CostTable) -> None:
    """Fills latency_ms: milliseconds of one image on this machine."""
    texts = [*truth.rows()["net_config"].unique()]
    times = whole([Architecture.parse(text) for text in texts], table, "cpu", ROUNDS)
    how = {"rounds": ROUNDS, "batch_size": table.conditions["batch_size"], **environment()}
    with locked(truth.lock):
        rows = truth.rows()
        rows["latency_ms"] = rows["net_config"].map(dict(zip(texts, times, strict=True)))
        write_text(truth.table, rows.to_csv(index=False))
        content = {**read_json(truth.about, "write it anew"), "latency": how}
        write_text(truth.about, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="name of the run")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--worker", type=int, default=0, help="number of this process, from 0")
    parser.add_argument("--of", type=int, default=1, help="processes that share the networks")
    parser.add_argument("--first", type=int, default=NETWORKS, help="networks of each kind")
    parser.add_argument("--latency", action="store_true", help="measure latency of all rows")
    options = parser.parse_args()
    run = Run(options.run)
    data, table = load(run), read_costs(run)
    truth = Truth(run)
    if options.latency:
        time_all(truth, table)
        return
    how = {"epochs": options.epochs, "batch_size": 128, "lr": 0.1}
    recipe = override(table.space.retrain, **how)
    conditions = Conditions.of(data, recipe, Computing().precision)
    if truth.conditions is not None and not truth.serves(conditions):
        raise SystemExit("one table holds trainings of one kind: move it away first")
    queue = jobs(pd.read_csv(run.reports / "evidence.csv"), table, truth)
    for number, job in enumerate(queue):
        if number % options.of != options.worker or job.number >= options.first:
            continue
        if truth.find(job.net_config, options.epochs, job.seed):
            continue
        arch = Architecture.parse(job.net_config)
        place = run.part(f"truth/{options.epochs}-{number}")
        trained = train_alone(place, data, arch, recipe, Computing(seed=job.seed))
        truth.add({**job._asdict(), **trained}, conditions)
        print(f"{number + 1} of {len(queue)}: {job.group}, {job.target:g} M, {trained}", flush=True)


if __name__ == "__main__":
    main()
