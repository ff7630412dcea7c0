"""Is the search worth it? Its networks beside random and hand-made ones of equal cost, trained by the same recipe.

`python -m densenas.evidence CONFIGURATION RUN STEP JOB` does one step (search, train) of one job of a run's study.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor, nn

from densenas.baselines import designs, hand_made
from densenas.files import read_json, write_text
from densenas.images.data import ImageData, load
from densenas.images.loading import seed_of
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import SearchSpace
from densenas.method.supernet import SuperNet
from densenas.pricing import RECIPES, priced_space, read_costs
from densenas.recipes import RetrainRecipe, SearchRecipe, override
from densenas.runs.run import Run
from densenas.search import Search, load_search, search
from densenas.settings import WITHIN, RunConfig, StudySettings
from densenas.train import evaluate, retrain
from densenas.training.checkpoint import digest
from densenas.training.processes import STOPPED

METHODS = SEARCHED, RANDOM, HAND_MADE = "DenseNAS", "random", "hand-made"


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
            layers.append(
                routing.heads[space.incoming(j).index(i)][space.head_ops.index(block.head)]
            )
            # Which of its layers a shorter stack skipped does not show in an architecture: the last ones.
            layers += [
                ops[space.stack_ops.index(op)]
                for ops, op in zip(routing.stack, block.stack, strict=False)
            ]
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

    `space` None is that of the run's costs. `search` and `retrain` override the space's recipes; None is the recipe
    itself. Each step keeps its result in runs/<run>/evidence/, goes on from its own checkpoint after a kill, and
    depends on nothing but its job. Raises ValueError with one sentence where there can be no such study.
    """

    run: str
    space: str | None
    targets: Sequence[float]
    seeds: int = 3
    networks: int = 8
    search: dict[str, Any] | None = None
    retrain: dict[str, Any] | None = None
    precision: str = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        asked = {"targets": self.targets, "seeds": self.seeds, "networks": self.networks}
        StudySettings.of(asked)

    @cached_property
    def table(self) -> CostTable:
        table = read_costs(Run(self.run))
        if table.kind != "mult_adds":
            raise ValueError(
                f"run '{self.run}' counts {table.unit}, a study compares at equal Mult-Adds"
            )
        return table

    @cached_property
    def recipes(self) -> SearchSpace:
        """The table's space with the recipes of the file or preset that was asked for."""
        return priced_space(self.table, self.space)

    @cached_property
    def lattice(self) -> Lattice:
        return Lattice(self.table)

    @cached_property
    def data(self) -> ImageData:
        return load(Run(self.run))

    def jobs(self) -> list[Job]:
        """Every network to train. Hand-made ones are trained with as many seeds as there are searches.

        Known before there are data: a design that no width brings to a target has its jobs, and they say so.
        """
        space = self.table.space if self.space is None else SearchSpace.load(self.space)
        counts = {
            SEARCHED: self.seeds,
            RANDOM: self.networks,
            HAND_MADE: len(designs(space)) * self.seeds,
        }
        each = [
            (method, target, k)
            for target in self.targets
            for method in METHODS
            for k in range(counts[method])
        ]
        return [
            Job.parse(str(Job(*one))) for one in each
        ]  # as the command line has them, however targets are written

    def folder(self, job: Job) -> Run:
        """Where a job keeps its checkpoints and its result."""
        return Run(self.run).part(f"evidence/{job}")

    def random(self, job: Job) -> Architecture:
        """A random network, the same in every process and whatever else is compared."""
        spread = (1 - WITHIN) * job.target, (1 + WITHIN) * job.target
        return self.lattice.sample(1, seed_of(str(job)), *spread)[0].architecture

    def hand_made(self, target: float) -> dict[str, Architecture]:
        """The hand-made designs that some width brings to the target."""
        return hand_made(self.table.space, target, self.data.image_size, len(self.data.classes))

    def left_out(self) -> str:
        """In words, which hand-made designs are not compared at which target; empty where all are."""
        words = []
        for target in self.targets:
            for design in designs(self.table.space):
                if design not in self.hand_made(target):
                    words.append(_without(design, target))
        return " ".join(words)

    @cached_property
    def search_recipe(self) -> SearchRecipe:
        return override(self.recipes.search, **self.search or {})

    @cached_property
    def retrain_recipe(self) -> RetrainRecipe:
        return override(self.recipes.retrain, **self.retrain or {})

    def _search(self, job: Job) -> Search:
        how = {"seed": job.number, "precision": self.precision, "device": self.device}
        return search(
            self.folder(job), self.data, self.table, self.search_recipe, job.target, **how
        )

    def searched(self, job: Job) -> None:
        """Searches for the target and keeps what was derived."""
        result = self._search(job)
        seconds = sum(row["seconds"] for row in result.history)
        found = {
            "settings": self._search_settings(job),
            "net_config": str(result.best.architecture),
            "seconds": seconds,
        }
        write_text(self.folder(job).work / "searched.json", json.dumps(found))

    def _search_settings(self, job: Job) -> str:
        """A digest of what decides a search."""
        costs = self.table.nested(), self.table.space.model_dump(exclude={*RECIPES})
        recipe = self.search_recipe.model_dump()
        return digest([costs, recipe, job.target, job.number, self.precision, self.data.digest])

    def _found(self, job: Job) -> dict[str, Any] | None:
        """What the search of a job has found, if it is done."""
        return _kept(self.folder(job).work / "searched.json", self._search_settings(job))

    def network(self, job: Job) -> tuple[str, Architecture | None, int, float | None]:
        """A job's design by name, its architecture (None: left out), its training's seed, and seconds of search."""
        if job.method == SEARCHED:
            path = Run(self.run).need(
                self.folder(job).work / "searched.json", f"the search of {job}"
            )
            found = self._found(job)
            if found is None:
                raise ValueError(f"{path} does not serve: run the search of {job} again")
            return SEARCHED, Architecture.parse(found["net_config"]), job.number, found["seconds"]
        if job.method == RANDOM:
            return RANDOM, self.random(job), job.number, None
        names = designs(self.table.space)
        design = names[job.number % len(names)]
        return design, self.hand_made(job.target).get(design), job.number // len(names), None

    def _training_settings(self, arch: Architecture | None, seed: int) -> str:
        """A digest of what decides a training and its result."""
        recipe = self.retrain_recipe.model_dump()
        return digest([str(arch), recipe, seed, self.precision, self.data.digest])

    def trained(self, job: Job) -> None:
        """Trains a network from scratch on train and val, tests it once, and keeps the result."""
        design, arch, seed, seconds = self.network(job)
        result = {"settings": self._training_settings(arch, seed)}
        if arch is None:
            result["left_out"] = _without(design, job.target)
            print(result["left_out"])
        else:
            how = {"seed": seed, "precision": self.precision, "device": self.device}
            net, history = retrain(self.folder(job), self.data, arch, self.retrain_recipe, **how)
            tested = evaluate(net, self.data, device=self.device)
            size, classes = self.data.image_size, len(self.data.classes)
            result |= {
                "method": job.method,
                "target": job.target,
                "number": job.number,
                "design": design,
                "seed": seed,
                "top1": tested["top1"],
                "loss": tested["loss"],
                "images": tested["images"],
                "mult_adds_m": arch.mult_adds(size, classes),
                "params_m": arch.params(classes),
                "blocks": len(arch.routing_blocks),
                "layers": arch.num_layers,
                "search_seconds": seconds,
                "train_seconds": sum(row["seconds"] for row in history),
                "net_config": str(arch),
            }
        write_text(self.folder(job).work / "result.json", json.dumps(result, indent=1))

    def _result(self, job: Job) -> dict[str, Any] | None:
        """What a job has found out, if it is done, whole, and of the data and recipes of today."""
        path = self.folder(job).work / "result.json"
        if not path.exists() or (job.method == SEARCHED and self._found(job) is None):
            return None
        _, arch, seed, _ = self.network(job)
        return _kept(path, self._training_settings(arch, seed))

    def results(self) -> pd.DataFrame:
        """A row for each job that is done and not left out; top1 is a share of the test images."""
        rows = []
        for job in self.jobs():
            result = self._result(job)
            if result and "left_out" not in result:
                rows.append({name: value for name, value in result.items() if name != "settings"})
        return pd.DataFrame(rows)

    def ranking(self, results: pd.DataFrame) -> pd.DataFrame:
        """The trained random networks by `one_shot`, the accuracy on val of their path in the supernet of the middle
        target's first search, and `retrained`, the accuracy on test after training alone.
        """
        job = Job(SEARCHED, sorted(self.targets)[len(self.targets) // 2], 0)
        try:
            net = load_search(self.folder(job), self.table, len(self.data.classes)).net
        except ValueError:  # its checkpoint is damaged or of other costs
            net = self._search(job).net
        drawn = results[results["method"] == RANDOM]
        paths = [PathOf(net, Architecture.parse(text)) for text in drawn["net_config"]]
        one_shot = [evaluate(path, self.data, "val", device=self.device)["top1"] for path in paths]
        return pd.DataFrame(
            {"target": drawn["target"], "one_shot": one_shot, "retrained": drawn["top1"]}
        )

    def complete(self) -> pd.DataFrame:
        """Does here and now what is still to do of all jobs; returns `results`."""
        for job in self.jobs():
            if self._result(job) is None:
                if job.method == SEARCHED and self._found(job) is None:
                    self.searched(job)
                self.trained(job)
        return self.results()


def _without(design: str, target: float) -> str:
    return f"{design} is left out at {target:g} M Mult-Adds: no width of it costs that within {WITHIN:.0%}."


def _kept(path: Path, settings: str) -> dict[str, Any] | None:
    """What a step kept, if it is whole and of these settings; says so where it is not."""
    if not path.exists():
        return None
    try:
        content = read_json(path, "it does not count and is made anew")
    except ValueError as error:
        print(error)
        return None
    if content.get("settings") == settings:
        return content
    print(f"{path} is of other data, costs or recipes: it does not count and is made anew")
    return None


def compared(results: pd.DataFrame) -> pd.DataFrame:
    """Per target and design: n, mean Mult-Adds (millions), and mean, standard deviation and best of top-1 (%)."""
    shares = results.assign(top1=100 * results["top1"])
    return shares.groupby(["target", "design"]).agg(
        n=("top1", "size"),
        mult_adds_m=("mult_adds_m", "mean"),
        mean=("top1", "mean"),
        std=("top1", "std"),
        best=("top1", "max"),
    )


def verdict(results: pd.DataFrame) -> str:
    """In one sentence, by how many points of accuracy the searched networks beat the others at each target."""
    table, said = compared(results), []
    for target, rows in table.groupby(level="target"):
        rows = rows.droplevel("target")
        ours, random, hand = (
            rows.loc[SEARCHED],
            rows.loc[RANDOM],
            rows.drop([SEARCHED, RANDOM])["mean"],
        )
        words = (
            f"at {target:g} M Mult-Adds the mean of {ours['n']:.0f} searches is {ours['mean'] - random['mean']:+.1f}"
            f" points from the mean of {random['n']:.0f} random networks, {ours['mean'] - random['best']:+.1f} from the"
            f" best of them"
        )
        if not len(hand):
            said.append(f"{words} (no hand-made design costs that)")
            continue
        which = (
            "the better hand-made design"
            if len(hand) > 1
            else f"the only hand-made design, {hand.index[0]}"
        )
        said.append(f"{words} and {ours['mean'] - hand.max():+.1f} from {which}")
    return ";\n".join(said) + "."


def repeats(results: pd.DataFrame) -> str:
    """In words, where several searches or draws came to the same network: each was trained alone, with another seed."""
    words = []
    for (target, method), rows in results[results["method"] != HAND_MADE].groupby(
        ["target", "method"]
    ):
        different = rows["net_config"].nunique()
        if different < len(rows):
            words.append(
                f"At {target:g} M Mult-Adds {len(rows)} {method} networks are {different} different ones."
            )
    return " ".join(words)


def main() -> None:
    """One step of one job of a study, as Snakemake and a cluster start it."""
    parser = argparse.ArgumentParser(
        "python -m densenas.evidence", description="One step of a study's job."
    )
    parser.add_argument("configuration", help="the run's YAML file, with an evidence section")
    parser.add_argument("run", help="name of the run")
    parser.add_argument("step", choices=["search", "train"])
    parser.add_argument(
        "job", help="method, target and number, like DenseNAS_1_0, random_1_3 or hand-made_1_0"
    )
    asked = parser.parse_args()
    try:
        config = RunConfig.load(asked.configuration)
        input_size = SearchSpace.load(config.space).input_size
        parameters = config.parameters(asked.run, input_size)
        if "09-evidence" not in parameters:
            raise ValueError(f"{asked.configuration} has no evidence section, so there is no study")
        study = Study(**parameters["09-evidence"])
        jobs = {str(job): job for job in study.jobs()}
        job = jobs.get(asked.job)
        if job is None or (asked.step == "search" and job.method != SEARCHED):
            some = ", ".join(
                name
                for name, one in jobs.items()
                if asked.step == "train" or one.method == SEARCHED
            )
            raise ValueError(
                f"the study of run '{asked.run}' has no job '{asked.job}' to {asked.step}, it has {some}"
            )
        if asked.step == "search":
            study.searched(job)
        else:
            study.trained(job)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
