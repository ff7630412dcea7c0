"""Truth for rankings: the networks of a study, and random ones of any depth and of theirs, each trained alone for long.

    python benchmarks/truth.py cifar10                     # 20 epochs each
    python benchmarks/truth.py cifar10 --worker 0 --of 2   # and --worker 1 --of 2, side by side on two cores

RUN is a run with prepared images and costs (01, 02), and with a study in reports/RUN/evidence.csv, from where its
targets, its searched and its hand-made networks come. For each target there are 12 random networks, uniform over
architectures, and 12 uniform over those that have as many layers as the searched ones; two more seeds of one network of
each kind say how much of a difference is the seed's. All train on one thread, 128 images a step, from a rate of 0.1.

Every network is a row of reports/RUN/truth.csv as soon as it is finished, with its accuracy on test after some epochs,
and is never trained again; one that is stopped goes on from its last checkpoint.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from densenas import Architecture, CostTable
from densenas.costs import read_costs
from densenas.files import write_text
from densenas.images.data import ImageData, load
from densenas.images.loading import Batches
from densenas.method.derivation import Lattice
from densenas.recipes import RetrainRecipe, override
from densenas.runs.locks import locked
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.settings import WITHIN, Computing
from densenas.train import Trainer
from densenas.training.device import computing_on
from densenas.training.engine import resumable
from densenas.verdict import HAND_MADE, RANDOM, SEARCHED

MATCHED = "random, as deep as searched"
NETWORKS = 12  # random ones of either kind for each target
BEFORE_SEEDS = 3  # of each kind and target, before any is trained with other seeds
SHARES = (
    0.05,
    0.1,
    0.15,
    0.25,
    0.35,
    0.5,
    0.65,
    0.8,
    0.9,
    1.0,
)  # of the epochs, when to look at test


class Job(NamedTuple):
    """A network to train; the `number`-th of its group."""

    group: str
    target: float  # million Mult-Adds
    number: int
    seed: int
    net_config: str


def draw(lattice: Lattice, target: float, seed: int, depths: list[int] | None = None) -> list[str]:
    """Different random networks within 5 % of the target, with these numbers of layers in turn where they are given."""
    low, high = (1 - WITHIN) * target, (1 + WITHIN) * target
    networks: list[str] = []
    while len(networks) < NETWORKS:
        wanted = None if depths is None else depths[len(networks) % len(depths)]
        for candidate in lattice.sample(200, seed, low, high):
            arch = candidate.architecture
            if str(arch) not in networks and wanted in (None, arch.num_layers):
                networks.append(str(arch))
                break
        seed += 1
    return networks


def jobs(study: pd.DataFrame, table: CostTable) -> list[Job]:
    """Every network in the order of training: a bit of each group and target first, then the other seeds."""
    lattice = Lattice(table)
    queue = []
    for target, rows in study.groupby("target"):
        searched = rows.loc[rows["method"] == SEARCHED, "net_config"].tolist()
        hand_made = rows.loc[rows["method"] == HAND_MADE, "net_config"].unique().tolist()
        depths = [Architecture.parse(text).num_layers for text in searched]
        known = rows.loc[rows["method"] == RANDOM, "net_config"].tolist()
        drawn = [text for text in draw(lattice, target, 1000) if text not in known]
        groups = {
            SEARCHED: searched,
            RANDOM: (known + drawn)[:NETWORKS],
            MATCHED: draw(lattice, target, 5000, depths),
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


class Accuracies:
    """Accuracy on test by epoch, as a part of a checkpoint."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, float] = {}

    def state_dict(self) -> dict[str, dict[int, float]]:
        return {"by_epoch": dict(self.by_epoch)}

    def load_state_dict(self, state: dict[str, dict[int, float]]) -> None:
        self.by_epoch = dict(state["by_epoch"])


@torch.no_grad()
def accuracy(net: nn.Module, data: ImageData, device: torch.device) -> float:
    net.eval()
    hits = 0
    for images, labels in Batches(data, "test", 500, device).epoch(0):
        hits += int((net(images).argmax(dim=1) == labels).sum())
    net.train()
    return hits / len(data.test)


def train(run: Run, data: ImageData, job: Job, recipe: RetrainRecipe) -> dict[str, object]:
    """A row of truth.csv."""
    with computing_on(Computing(seed=job.seed)) as device:
        torch.manual_seed(job.seed)
        arch = Architecture.parse(job.net_config)
        net = arch.build(len(data.classes)).to(device).to(memory_format=torch.channels_last)
        batches = Batches(data, ("train", "val"), recipe.batch_size, device, job.seed)
        trainer = Trainer(net.train(), recipe, len(batches), "fp32")
        accuracies = Accuracies()
        moments = {round(share * recipe.epochs) for share in SHARES}
        configuration = {
            **job._asdict(),
            "recipe": recipe.model_dump(mode="json"),
            "data": data.digest,
        }
        parts = trainer.parts() | {"accuracies": accuracies}
        steps = [len(batches)] * recipe.epochs
        with resumable(run, "truth", configuration, parts, steps) as training:
            for epoch in training.epochs():
                for images, labels in training.batches("train", batches):
                    training.record(trainer.step(images, labels))
                if epoch + 1 in moments:
                    accuracies.by_epoch[epoch + 1] = accuracy(net, data, device)
                training.end_epoch({})
    size, classes = data.image_size, len(data.classes)
    row: dict[str, object] = {**job._asdict(), "epochs": recipe.epochs}
    row |= {"layers": arch.num_layers, "blocks": len(arch.routing_blocks)}
    row |= {"mult_adds_m": arch.mult_adds(size, classes), "params_m": arch.params(classes)}
    row |= {f"top1_{epoch}": top1 for epoch, top1 in accuracies.by_epoch.items()}
    row["seconds"] = sum(float(one["seconds"]) for one in training.history)
    return row | {"revision": environment()["git"]["revision"]}


def finished(run: Run, job: Job, epochs: int) -> bool:
    path = run.reports / "truth.csv"
    if not path.exists():
        return False
    rows = pd.read_csv(path)
    same = (rows["net_config"] == job.net_config) & (rows["seed"] == job.seed)
    return bool((same & (rows["epochs"] == epochs)).any())


def keep(path: Path, lock: Path, row: dict[str, object]) -> None:
    with locked(lock):
        rows = pd.read_csv(path) if path.exists() else pd.DataFrame()
        rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
        write_text(path, rows.to_csv(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="name of the run")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--worker", type=int, default=0, help="number of this process, from 0")
    parser.add_argument("--of", type=int, default=1, help="processes that share the networks")
    options = parser.parse_args()
    run = Run(options.run)
    data, table = load(run), read_costs(run)
    how = {"epochs": options.epochs, "batch_size": 128, "lr": 0.1}
    recipe = override(table.space.retrain, **how)
    queue = jobs(pd.read_csv(run.reports / "evidence.csv"), table)
    for number, job in enumerate(queue):
        if number % options.of != options.worker or finished(run, job, options.epochs):
            continue
        place = run.part(f"truth/{options.epochs}-{number}")
        row = train(place, data, job, recipe)
        keep(run.reports / "truth.csv", run.work / ".truth.lock", row)
        print(f"{number + 1} of {len(queue)}: {job.group}, {job.target:g} M, {row}", flush=True)


if __name__ == "__main__":
    main()
