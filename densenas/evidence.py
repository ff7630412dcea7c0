"""Is the search worth it? Its networks beside random and hand-made ones of equal cost, trained by the same recipe.

`python -m densenas.evidence CONFIGURATION RUN STEP JOB` does one step (search, train) of one job of a run's study.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor, nn

from densenas.architecture import Architecture, Block
from densenas.config import override, refuse, write_text
from densenas.cost import CostTable
from densenas.data import ImageData, load
from densenas.derivation import Lattice
from densenas.loading import seed_of
from densenas.run import Run, RunConfig
from densenas.search import load_search, search
from densenas.space import SearchSpace
from densenas.supernet import SuperNet
from densenas.train import evaluate, retrain

METHODS = SEARCHED, RANDOM, HAND_MADE = "DenseNAS", "random", "hand-made"
WITHIN = 0.05  # of the target, as a share: what a random network may cost
# Layers of each stage; widths and strides of the stages are those of the original networks.
DESIGNS = {
    "mbconv_k3_t6": {"MobileNetV2": (1, 2, 3, 4, 3, 3, 1), "MobileNetV2, one layer a stage": (1,) * 7},
    "basic_block": {"ResNet-18": (2, 2, 2, 2), "ResNet-34": (3, 4, 6, 3)},
    "bottleneck": {"ResNet-50": (3, 4, 6, 3)},
}


def _usual_op(space: SearchSpace) -> str:
    """What hand-made networks of the space's family are made of."""
    return "mbconv_k3_t6" if space.net_type == "mbv2" else space.head_ops[0]


def hand_made(space: SearchSpace, target: float, input_size: int, num_classes: int) -> dict[str, Architecture]:
    """MobileNetV2 (Sandler et al., 2018) or ResNets (He et al., 2016), of the one width that costs nearest to `target`.

    `target` is in millions of Mult-Adds. Widths are multiples of 4. As usual for small images, the first strides are
    left out where the space halves the map less often; the last 1×1 convolution is the space's own.
    """
    halvings = round(math.log2(space.fm_sizes[0] / space.fm_sizes[-1]))
    mobile = space.net_type == "mbv2"
    op = _usual_op(space)
    stem, widths = (32, (16, 24, 32, 64, 96, 160, 320)) if mobile else (64, (64, 128, 256, 512))
    halving = [s for s in range(len(widths)) if not mobile or s in (1, 2, 3, 5)]
    halving = halving[len(halving) - halvings :] if halvings else []

    def scaled(layers: tuple[int, ...], factor: float) -> Architecture:
        first, *wide = (max(4, 4 * round(width * factor / 4)) for width in (stem, *widths))
        blocks = []
        for stage, (count, before, width) in enumerate(zip(layers, (first, *wide), wide, strict=False)):
            head = "mbconv_k3_t1" if mobile and not stage else op
            blocks.append(Block(before, width, head, (op,) * (count - 1), 2 if stage in halving else 1))
        return Architecture(tuple(blocks), space.last_dim if mobile else None)

    def distance(arch: Architecture) -> float:
        return abs(math.log(arch.mult_adds(input_size, num_classes) / target))

    factors = [1.02**k for k in range(-200, 100)]
    return {
        name: min((scaled(layers, factor) for factor in factors), key=distance) for name, layers in DESIGNS[op].items()
    }


class PathOf(nn.Module):
    """An architecture as a path of a supernet, by the supernet's own weights: images (B, 3, H, W) → logits.

    Its batch norm knows no averages, so that logits depend on the batch: its images must be of mixed classes.
    """

    def __init__(self, net: SuperNet, arch: Architecture) -> None:
        super().__init__()
        space, path = net.space, net.space.path_of(arch)
        layers = [net.stem]
        for (i, j), block in zip(pairwise(path[:-1]), arch.routing_blocks, strict=True):
            routing = net.blocks[j - 1]
            layers.append(routing.heads[space.incoming(j).index(i)][space.head_ops.index(block.head)])
            # Which of its layers a shorter stack skipped does not show in an architecture: the last ones.
            layers += [ops[space.stack_ops.index(op)] for ops, op in zip(routing.stack, block.stack, strict=False)]
        layers.append(net.final[space.incoming(path[-1]).index(path[-2])])
        self.features, self.classifier = nn.Sequential(*layers), net.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class Job(NamedTuple):
    """One network to train: the search's with seed `number`, or the random or hand-made one of that number."""

    method: str
    target: float  # million Mult-Adds
    number: int

    @classmethod
    def parse(cls, name: str) -> Job:
        method, target, number = name.rsplit("_", 2)
        return cls(method, float(target), int(number))

    def __str__(self) -> str:
        return f"{self.method}_{self.target:g}_{self.number}"


@dataclass(frozen=True)
class Study:
    """A comparison at equal cost on a run's data and space: for each of `targets` (million Mult-Adds) `seeds` searches,
    `networks` random networks within 5 % of the target, uniform over architectures, and the hand-made ones.

    `search` and `retrain` override the space's recipes; None is the recipe itself. Each step keeps its result in
    runs/<run>/evidence/, goes on from its own checkpoint after a kill, and depends on nothing but its job.
    """

    run: str
    space: str
    targets: Sequence[float]
    seeds: int = 3
    networks: int = 8
    search: dict[str, Any] | None = None
    retrain: dict[str, Any] | None = None
    precision: str = "fp32"
    device: str = "auto"

    @cached_property
    def table(self) -> CostTable:
        table = Run(self.run).costs()
        unequal = f"run '{self.run}' counts {table.unit}, a study compares at equal Mult-Adds"
        refuse(table.kind != "mult_adds", unequal)
        return table

    @cached_property
    def data(self) -> ImageData:
        return load(Run(self.run))

    def jobs(self) -> list[Job]:
        """Every network to train. Hand-made ones are trained with as many seeds as there are searches."""
        hand = len(DESIGNS[_usual_op(SearchSpace.load(self.space))]) * self.seeds
        counts = {SEARCHED: self.seeds, RANDOM: self.networks, HAND_MADE: hand}
        each = [(method, target, k) for target in self.targets for method in METHODS for k in range(counts[method])]
        return [Job.parse(str(Job(*one))) for one in each]  # as the command line has them, however targets are written

    def folder(self, job: Job) -> Run:
        """Where a job keeps its checkpoints and its result."""
        return Run(self.run).part(f"evidence/{job}")

    def random(self, job: Job) -> Architecture:
        """A random network, the same in every process and whatever else is compared."""
        spread = (1 - WITHIN) * job.target, (1 + WITHIN) * job.target
        return Lattice(self.table).sample(1, seed_of(str(job)), *spread)[0].architecture

    def searched(self, job: Job) -> None:
        """Searches for the target and keeps what was derived."""
        folder, recipe = self.folder(job), override(self.table.space.search, **self.search or {})
        how = {"seed": job.number, "precision": self.precision, "device": self.device}
        result = search(folder, self.data, self.table, recipe, job.target, **how)
        seconds = sum(row["seconds"] for row in result.history)
        found = {"net_config": str(result.best.architecture), "seconds": seconds}
        write_text(folder.work / "searched.json", json.dumps(found))

    def network(self, job: Job) -> tuple[str, Architecture, int, float | None]:
        """A job's design by name, its architecture, the seed that it is trained with, and seconds of search."""
        if job.method == SEARCHED:
            path = Run(self.run).need(self.folder(job).work / "searched.json", f"the search of {job}")
            found = json.loads(path.read_text(encoding="utf-8"))
            return SEARCHED, Architecture.parse(found["net_config"]), job.number, found["seconds"]
        if job.method == RANDOM:
            return RANDOM, self.random(job), job.number, None
        size, classes = self.data.image_size, len(self.data.classes)
        designs = [*hand_made(self.table.space, job.target, size, classes).items()]
        return *designs[job.number % len(designs)], job.number // len(designs), None

    def trained(self, job: Job) -> None:
        """Trains a network from scratch on train and val, tests it once, and keeps the result."""
        design, arch, seed, seconds = self.network(job)
        recipe = override(self.table.space.retrain, **self.retrain or {})
        net, history = retrain(self.folder(job), self.data, arch, recipe, seed, self.precision, self.device)
        tested = evaluate(net, self.data, device=self.device)
        size, classes = self.data.image_size, len(self.data.classes)
        result = {
            "method": job.method, "target": job.target, "number": job.number, "design": design, "seed": seed,
            "top1": tested["top1"], "loss": tested["loss"], "images": tested["images"],
            "mult_adds_m": arch.mult_adds(size, classes), "params_m": arch.params(classes),
            "blocks": len(arch.routing_blocks), "layers": arch.num_layers, "search_seconds": seconds,
            "train_seconds": sum(row["seconds"] for row in history), "net_config": str(arch),
        }  # fmt: skip
        write_text(self.folder(job).work / "result.json", json.dumps(result, indent=1))

    def results(self) -> pd.DataFrame:
        """A row for each job that is done; top1 is a share of the test images."""
        paths = [self.folder(job).work / "result.json" for job in self.jobs()]
        return pd.DataFrame([json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()])

    def ranking(self, results: pd.DataFrame) -> pd.DataFrame:
        """The trained random networks by `one_shot`, the accuracy on val of their path in the supernet of the middle
        target's first search, and `retrained`, the accuracy on test after training alone.
        """
        job = Job(SEARCHED, sorted(self.targets)[len(self.targets) // 2], 0)
        net = load_search(self.folder(job), self.table, len(self.data.classes)).net
        drawn = results[results["method"] == RANDOM]
        paths = [PathOf(net, Architecture.parse(text)) for text in drawn["net_config"]]
        one_shot = [evaluate(path, self.data, "val", device=self.device)["top1"] for path in paths]
        return pd.DataFrame({"target": drawn["target"], "one_shot": one_shot, "retrained": drawn["top1"]})

    def complete(self) -> pd.DataFrame:
        """Does here and now what is still to do of all jobs; returns `results`."""
        for job in self.jobs():
            if not (self.folder(job).work / "result.json").exists():
                if job.method == SEARCHED:
                    self.searched(job)
                self.trained(job)
        return self.results()


def compared(results: pd.DataFrame) -> pd.DataFrame:
    """Per target and design: n, mean Mult-Adds (millions), and mean, standard deviation and best of top-1 (%)."""
    shares = results.assign(top1=100 * results["top1"])
    return shares.groupby(["target", "design"]).agg(
        n=("top1", "size"), mult_adds_m=("mult_adds_m", "mean"), mean=("top1", "mean"), std=("top1", "std"),
        best=("top1", "max"),
    )  # fmt: skip


def verdict(results: pd.DataFrame) -> str:
    """In one sentence, by how many points of accuracy the searched networks beat the others at each target."""
    table, said = compared(results), []
    for target, rows in table.groupby(level="target"):
        rows = rows.droplevel("target")
        ours, random = rows.loc[SEARCHED], rows.loc[RANDOM]
        hand = rows.drop([SEARCHED, RANDOM])["mean"].max()
        said.append(
            f"at {target:g} M Mult-Adds the mean of {ours['n']:.0f} searches is {ours['mean'] - random['mean']:+.1f}"
            f" points from the mean of {random['n']:.0f} random networks, {ours['mean'] - random['best']:+.1f} from the"
            f" best of them and {ours['mean'] - hand:+.1f} from the better hand-made design"
        )
    return ";\n".join(said) + "."


if __name__ == "__main__":
    configuration, name, step, job = sys.argv[1:]
    study = Study(**RunConfig.load(configuration).parameters(name)["09-evidence"])
    getattr(study, {"search": "searched", "train": "trained"}[step])(Job.parse(job))
