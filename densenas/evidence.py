"""Is the search worth it? Its networks beside random and hand-made ones of equal cost, trained by the same recipe.

`python -m densenas.evidence CONFIGURATION RUN STEP JOB` does one step (search, train) of one job of a run's study.
"""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from densenas import own
from densenas.baselines import AS_DEEP, as_deep_in_turn, designs, draw, hand_made
from densenas.costs import priced_space, read_costs
from densenas.files import read_kept, write_text
from densenas.images.data import ImageData, load
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import RECIPES, SearchSpace
from densenas.orders import ranked
from densenas.outcome import Search, load_search
from densenas.recipes import RetrainRecipe, SearchRecipe, override
from densenas.runs.progress import progress, quiet
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import WITHIN, Computing, RunConfig, StudySettings
from densenas.train import train_alone
from densenas.training.checkpoint import digest
from densenas.training.processes import exiting
from densenas.truth import DESCRIPTION, Conditions, Truth, by_epoch
from densenas.verdict import (
    HAND_MADE,
    MATCHED,
    RANDOM,
    SEARCHED,
    Job,
    Result,
    as_records,
    summary,
    trainings,
)


class Network(NamedTuple):
    """What a job trains."""

    design: str  # the way of searching, random, or the name of a hand-made design
    architecture: Architecture | None  # None: there is none at the target
    seed: int  # of the training
    search_seconds: float | None = None


@dataclass(frozen=True)
class Study:
    """A comparison at equal cost on a run's data and space, as its settings have it.

    For each target there are so many searches of each way, random networks within 5 % of the target, uniform over
    architectures, others as deep as what each way found, and hand-made ones. All are trained alike, with seed 0; only
    what is trained again takes the next. Each step keeps its result in runs/<run>/evidence/, goes on after a kill and
    depends on its job's `searches` alone. What the run's `truth` knows is not trained again, what it does not know is
    added. ValueError with one sentence where there can be no such study.
    """

    run: Run
    settings: StudySettings

    def jobs(self) -> list[Job]:
        """Every network to train. Hand-made ones are trained with several seeds.

        Known before there are data: a design that no width brings to a target has its jobs, and they say so.
        """
        named = self.settings.space
        space = self.table.space if named is None else SearchSpace.load(named)
        ways = [*self.settings.searches]
        kinds = [(SEARCHED, way, self.settings.seeds) for way in ways]
        kinds += [(MATCHED, way, self.settings.matched or self.settings.networks) for way in ways]
        kinds.append((RANDOM, "", self.settings.networks))
        trainings = self.settings.trainings or self.settings.seeds
        kinds.append((HAND_MADE, "", len(designs(space)) * trainings))
        jobs = []
        for target in self.settings.targets:
            for method, way, count in kinds:
                jobs += [Job(method, target, number, way) for number in range(count)]
        return jobs

    def searches(self, job: Job) -> list[Job]:
        """The searches that must be done before the job's network is known."""
        if job.method not in (SEARCHED, MATCHED):
            return []
        count = job.number + 1 if job.method == SEARCHED else self.settings.seeds
        return [job._replace(method=SEARCHED, number=seed) for seed in range(count)]

    def folder(self, job: Job) -> Run:
        """Where a job keeps its checkpoints and its result."""
        return self.run.part(f"evidence/{job}")

    def complete(self) -> pd.DataFrame:
        """Does here and now what is still to do of all jobs; returns `results`."""
        missing = [job for job in self.jobs() if self._result(job) is None]
        with progress(len(missing), "study", disable=not missing) as bar:
            for job in missing:
                bar.set_postfix_str(str(job), refresh=False)
                with quiet():
                    for wanted in self.searches(job):
                        if self._found(wanted) is None:
                            self.run_search(wanted)
                    self.run_training(job)
                bar.update()
        parameters = self.settings.model_dump(mode="json")
        parameters["space"] = self.settings.space or self.table.space.name
        self.run.record_provenance("09-evidence", **parameters)
        return self.results()

    def results(self) -> pd.DataFrame:
        """A `Result` for each job that is done and not left out, with its accuracies by epoch."""
        rows = []
        for result in map(self._result, self.jobs()):
            if result is not None and "left_out" not in result:
                del result["settings"]
                rows.append(result)
        return pd.DataFrame(rows)

    def left_out(self) -> list[str]:
        """In words, which networks are not compared at which target."""
        found = [self._result(job) or {} for job in self.jobs()]
        return sorted({result["left_out"] for result in found if "left_out" in result})

    # What is compared.

    @cached_property
    def table(self) -> CostTable:
        table = read_costs(self.run)
        if table.kind != "mult_adds":
            counts = f"run '{self.run.name}' counts {table.unit}"
            raise ValueError(f"{counts}, a study compares at equal Mult-Adds")
        return table

    @cached_property
    def data(self) -> ImageData:
        return load(self.run)

    @cached_property
    def _lattice(self) -> Lattice:
        return Lattice(self.table)

    @cached_property
    def truth(self) -> Truth | None:
        """The run's table of trainings, where it is of these images and this recipe."""
        truth = Truth(self.run)
        return truth if truth.serves(self._conditions) else None

    @property
    def _conditions(self) -> Conditions:
        return Conditions.of(self.data, self.retrain_recipe, self.settings.precision)

    def random(self, job: Job) -> Architecture:
        """A random network, the same in every process and whatever else is compared: the table's, or drawn."""
        known = self.truth.networks(RANDOM, job.target) if self.truth else {}
        if job.number in known:
            return Architecture.parse(known[job.number])
        return draw(self._lattice, job.target, 1, str(job))[0]

    def matched(self, job: Job) -> Architecture | None:
        """A random network as deep as what its way found, each of the searches in turn; None where none is drawn."""
        found = [self._need(one)["net_config"] for one in self.searches(job)]
        depths = [Architecture.parse(text).num_layers for text in found]
        texts = self.truth.networks(AS_DEEP, job.target).values() if self.truth else ()
        known = [Architecture.parse(text) for text in texts]
        return as_deep_in_turn(self._lattice, job.target, depths, known, job.number)

    def network(self, job: Job) -> Network:
        """The network of a job; FileNotFoundError or ValueError where its search is not done, or of other settings."""
        if job.method == SEARCHED:
            *before, found = map(self._need, self.searches(job))
            text = found["net_config"]
            seed = [one["net_config"] for one in before].count(text)
            return Network(job.way, Architecture.parse(text), seed, found["seconds"])
        if job.method == MATCHED:
            return Network(f"random, as deep as {job.way}", self.matched(job), 0)
        if job.method == RANDOM:
            return Network(RANDOM, self.random(job), 0)
        space, classes = self.table.space, len(self.data.classes)
        family = designs(space)
        design = family[job.number % len(family)]
        drawn = hand_made(space, job.target, self.data.image_size, classes)
        return Network(design, drawn.get(design), job.number // len(family))

    # The two steps of a job.

    def search_recipe(self, way: str) -> SearchRecipe:
        space = priced_space(self.table, self.settings.space)
        changed = {**(self.settings.search or {}), **self.settings.searches[way]}
        return override(space.search, **changed)

    @cached_property
    def retrain_recipe(self) -> RetrainRecipe:
        space = priced_space(self.table, self.settings.space)
        return override(space.retrain, **(self.settings.retrain or {}))

    def _computing(self, seed: int) -> Computing:
        return Computing(seed=seed, **self.settings.model_dump(include={*Computing.model_fields}))

    def run_search(self, job: Job) -> None:
        """Searches for the target and keeps what was derived."""
        result = self._search(job)
        found = {
            "settings": self._search_settings(job),
            "net_config": str(result.best.architecture),
            "seconds": sum(row["seconds"] for row in result.history),
        }
        write_text(self._searched(job), json.dumps(found))

    def _search(self, job: Job) -> Search:
        """The search of a job, gone on with or, where it is done, read."""
        recipe, how = self.search_recipe(job.way), self._computing(job.number)
        return search(self.folder(job), self.data, self.table, recipe, job.target, how)

    def _kept_search(self, job: Job) -> Search:
        """The finished search of a job, on whatever device it was made; without one what `_search` gives."""
        found, recipe = self._found(job), self.search_recipe(job.way)
        with suppress(FileNotFoundError, ValueError):
            kept = load_search(self.folder(job), self.table, len(self.data.classes))
            # Else a search by other settings has begun there since.
            now = {"recipe": recipe.model_dump(mode="json"), "data": self.data.digest}
            same = now.items() <= kept.configuration.items()
            if found and same and len(kept.history) == recipe.epochs:
                return kept
        return self._search(job)

    def run_training(self, job: Job) -> None:
        """Trains a network from scratch on train and val, unless the table knows it, and keeps what test says."""
        network = self.network(job)
        result: dict[str, Any] = {"settings": self._training_settings(network)}
        if network.architecture is None:
            result["left_out"] = _left_out(job, network)
            tqdm.write(result["left_out"])
        else:
            row = self._known(network) or self._train(job, network, network.architecture)
            result |= self._described(job, network, row)
        write_text(self._trained(job), json.dumps(result, indent=1))

    def _known(self, network: Network) -> dict[str, Any] | None:
        text, epochs = str(network.architecture), self.retrain_recipe.epochs
        return self.truth.find(text, epochs, network.seed) if self.truth else None

    def _train(self, job: Job, network: Network, arch: Architecture) -> dict[str, Any]:
        """A row of truth, which is added where the run has such a table."""
        how = self._computing(network.seed)
        recipe = self.retrain_recipe
        group = HAND_MADE if job.method == HAND_MADE else network.design
        row: dict[str, Any] = {"group": group, "target": job.target, "number": job.number}
        row |= train_alone(self.folder(job), self.data, arch, recipe, how)
        if self.truth and not arch.own_ops:  # whose code may change
            self.truth.add(row, self._conditions)
        return row

    def _described(self, job: Job, network: Network, row: dict[str, Any]) -> dict[str, Any]:
        accuracies = by_epoch(row)
        result = Result(
            method=job.method,
            way=job.way,
            target=job.target,
            number=job.number,
            design=network.design,
            top1=accuracies[row["epochs"]],
            images=len(self.data.test),
            search_seconds=network.search_seconds,
            train_seconds=row["seconds"],
            **{name: row[name] for name in DESCRIPTION},
        )
        return asdict(result) | {f"top1_{epoch}": top1 for epoch, top1 in accuracies.items()}

    # What the steps have kept, each with a digest of all that decides it.

    def _searched(self, job: Job) -> Path:
        return self.folder(job).work / "searched.json"

    def _trained(self, job: Job) -> Path:
        return self.folder(job).work / "result.json"

    @property
    def _how(self) -> list[str]:
        """What was kept before there was `deterministic` serves where that is not asked for."""
        return [self.settings.precision] + ["deterministic"] * self.settings.deterministic

    def _search_settings(self, job: Job) -> str:
        costs = [self.table.nested(), self.table.space.model_dump(exclude={*RECIPES})]
        recipe = self.search_recipe(job.way)
        decisive: list[Any] = [costs, recipe.model_dump(), job.target, job.number]
        decisive += [*self._how, self.data.digest]
        return digest(decisive + _code([*self.table.space.own_ops, recipe.loss]))

    def _training_settings(self, network: Network) -> str:
        arch = str(network.architecture)
        recipe = self.retrain_recipe.model_dump()
        decisive = [arch, recipe, network.seed, *self._how, self.data.digest]
        ops = network.architecture.own_ops if network.architecture else []
        return digest(decisive + _code([*ops, self.retrain_recipe.loss]))

    def _found(self, job: Job) -> dict[str, Any] | None:
        """What the search of a job has found, if it is done."""
        return read_kept(self._searched(job), self._search_settings(job))

    def _need(self, job: Job) -> dict[str, Any]:
        path = self.run.need(self._searched(job), f"the search of {job}")
        found = self._found(job)
        if found is None:
            raise ValueError(f"{path} does not serve: run the search of {job} again")
        return found

    def _result(self, job: Job) -> dict[str, Any] | None:
        """What a job has found out, if it is done, whole, and of the data and recipes of today."""
        if any(self._found(wanted) is None for wanted in self.searches(job)):
            return None
        return read_kept(self._trained(job), self._training_settings(self.network(job)))

    # What is said of all of them.

    def ranked(self, results: pd.DataFrame) -> pd.DataFrame:
        """The random networks with their accuracy and all that may order them (see `orders.ranked`), by the supernet
        of each way's first search for the middle target.
        """
        targets, searches = sorted(self.settings.targets), {}
        for way in self.settings.searches:
            job = Job(SEARCHED, targets[len(targets) // 2], 0, way)
            with quiet():
                searches[way] = self._kept_search(job)
        return ranked(searches, results, self.data, self.settings.device)

    def trainings(self, results: pd.DataFrame) -> pd.DataFrame:
        """Those of `results` and all others that the table knows (see `verdict.trainings`)."""
        return trainings(results, self.truth.rows() if self.truth else None)

    def record(self, results: pd.DataFrame, ranking: pd.DataFrame, orders: pd.DataFrame) -> None:
        """Keeps `results` and what was `ranked` in the run's reports, with what they and the `rankings` say."""
        write_text(self.run.reports / "evidence.csv", results.to_csv(index=False))
        write_text(self.run.reports / "ranking.csv", ranking.to_csv(index=False))
        found = summary(results, self.trainings(results), orders, self.left_out())
        how = self._conditions.model_dump(mode="json")
        self.run.update_json("metrics.json", "evidence", {**found, "how": how})
        self.run.update_json("metrics.json", "rankings", as_records(orders.reset_index()))


def _code(names: list[str | None]) -> list[dict[str, str]]:
    """Digests of the code of one's own that a step runs, where it runs some."""
    codes = own.codes(names)
    return [codes] if codes else []


def _left_out(job: Job, network: Network) -> str:
    why = f"no width of it costs that within {WITHIN:.0%}"
    if job.method == MATCHED:
        why = "no other network of that depth was found"
    return f"{network.design} is left out at {job.target:g} M Mult-Adds: {why}."


def configured(configuration: str, run: str) -> Study:
    """The study of a run's file."""
    config = RunConfig.load(configuration)
    stages = config.stages(SearchSpace.load(config.space).input_size)
    settings = stages.get("09-evidence")
    if not isinstance(settings, StudySettings):
        raise ValueError(f"{configuration} has no evidence section, so there is no study")
    return Study(Run(run), settings)


def _do(study: Study, step: str, name: str) -> None:
    """One step of the job of that name."""
    names = [str(job) for job in study.jobs() if step == "train" or job.method == SEARCHED]
    if name not in names:
        lacks = f"the study of run '{study.run.name}' has no job '{name}' to {step}"
        raise ValueError(f"{lacks}, it has {', '.join(names)}")
    run = study.run_search if step == "search" else study.run_training
    run(Job.parse(name))


def main() -> None:
    """One step of one job of a study, as Snakemake and a cluster start it."""
    parser = argparse.ArgumentParser(
        "python -m densenas.evidence", description="One step of a study's job."
    )
    parser.add_argument("configuration", help="the run's YAML file, with an evidence section")
    parser.add_argument("run", help="name of the run")
    parser.add_argument("step", choices=["search", "train"])
    parser.add_argument("job", help="method, target and number, like DenseNAS_1_0 or random_1_3")
    asked = parser.parse_args()
    with exiting():
        _do(configured(asked.configuration, asked.run), asked.step, asked.job)


if __name__ == "__main__":
    main()
