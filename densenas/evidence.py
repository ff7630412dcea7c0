"""Is the search worth it? Its networks beside random and hand-made ones of equal cost, trained by the same recipe.

`python -m densenas.evidence CONFIGURATION RUN STEP JOB` does one step (search, train) of one job of a run's study.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from densenas import own
from densenas.baselines import designs, hand_made
from densenas.correlations import rankings
from densenas.costs import RECIPES, priced_space, read_costs
from densenas.files import read_json, write_text
from densenas.images.data import ImageData, load
from densenas.images.loading import seed_of
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import SearchSpace
from densenas.outcome import Search, load_search
from densenas.ranking import PathOf, synaptic_flow
from densenas.recipes import RetrainRecipe, SearchRecipe, override
from densenas.runs.progress import progress, quiet
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import WITHIN, Computing, RunConfig, StudySettings
from densenas.train import evaluate, retrain
from densenas.training.checkpoint import digest
from densenas.training.processes import exiting
from densenas.verdict import HAND_MADE, METHODS, RANDOM, SEARCHED, Result, summary


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
class Network:
    """What a job trains."""

    design: str  # DenseNAS, random, or the name of a hand-made design
    architecture: Architecture | None  # None: no width of the design costs the target
    seed: int  # of the training
    search_seconds: float | None = None


@dataclass(frozen=True)
class Study:
    """A comparison at equal cost on a run's data and space, as its settings have it.

    For each target there are so many searches, random networks within 5 % of the target, uniform over architectures,
    and the hand-made ones. Each step keeps its result in runs/<run>/evidence/, goes on from its own checkpoint after a
    kill, and depends on nothing but its job. Raises ValueError with one sentence where there can be no such study.
    """

    run: Run
    settings: StudySettings

    def jobs(self) -> list[Job]:
        """Every network to train. Hand-made ones are trained with as many seeds as there are searches.

        Known before there are data: a design that no width brings to a target has its jobs, and they say so.
        """
        named = self.settings.space
        space = self.table.space if named is None else SearchSpace.load(named)
        counts = {
            SEARCHED: self.settings.seeds,
            RANDOM: self.settings.networks,
            HAND_MADE: len(designs(space)) * self.settings.seeds,
        }
        jobs = []
        for target in self.settings.targets:
            for method in METHODS:
                for number in range(counts[method]):
                    # The target as the job's name has it, however many digits were written.
                    jobs.append(Job.parse(str(Job(method, target, number))))
        return jobs

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
                    if job.method == SEARCHED and self._found(job) is None:
                        self.run_search(job)
                    self.run_training(job)
                bar.update()
        parameters = self.settings.model_dump(mode="json")
        parameters["space"] = self.settings.space or self.table.space.name
        self.run.record_provenance("09-evidence", **parameters)
        return self.results()

    def results(self) -> pd.DataFrame:
        """A `Result` for each job that is done and not left out."""
        rows = []
        for job in self.jobs():
            result = self._result(job)
            if result is not None and "left_out" not in result:
                del result["settings"]
                rows.append(result)
        return pd.DataFrame(rows)

    # What is compared.

    @cached_property
    def table(self) -> CostTable:
        table = read_costs(self.run)
        if table.kind != "mult_adds":
            raise ValueError(
                f"run '{self.run.name}' counts {table.unit}, a study compares at equal Mult-Adds"
            )
        return table

    @cached_property
    def data(self) -> ImageData:
        return load(self.run)

    @cached_property
    def _lattice(self) -> Lattice:
        return Lattice(self.table)

    def random(self, job: Job) -> Architecture:
        """A random network, the same in every process and whatever else is compared."""
        low = (1 - WITHIN) * job.target
        high = (1 + WITHIN) * job.target
        (candidate,) = self._lattice.sample(1, seed_of(str(job)), low, high)
        return candidate.architecture

    def hand_made(self, target: float) -> dict[str, Architecture]:
        """The hand-made designs that some width brings to the target."""
        return hand_made(self.table.space, target, self.data.image_size, len(self.data.classes))

    def left_out(self) -> str:
        """In words, which hand-made designs are not compared at which target; empty where all are."""
        sentences = []
        for target in self.settings.targets:
            affordable = self.hand_made(target)
            for design in designs(self.table.space):
                if design not in affordable:
                    sentences.append(_left_out(design, target))
        return " ".join(sentences)

    def network(self, job: Job) -> Network:
        """The network of a job; FileNotFoundError or ValueError where its search is not done, or of other settings."""
        if job.method == SEARCHED:
            path = self.run.need(self._searched(job), f"the search of {job}")
            found = self._found(job)
            if found is None:
                raise ValueError(f"{path} does not serve: run the search of {job} again")
            arch = Architecture.parse(found["net_config"])
            return Network(SEARCHED, arch, job.number, found["seconds"])
        if job.method == RANDOM:
            return Network(RANDOM, self.random(job), job.number)
        family = designs(self.table.space)
        design = family[job.number % len(family)]
        return Network(design, self.hand_made(job.target).get(design), job.number // len(family))

    # The two steps of a job.

    @cached_property
    def search_recipe(self) -> SearchRecipe:
        space = priced_space(self.table, self.settings.space)
        return override(space.search, **(self.settings.search or {}))

    @cached_property
    def retrain_recipe(self) -> RetrainRecipe:
        space = priced_space(self.table, self.settings.space)
        return override(space.retrain, **(self.settings.retrain or {}))

    def _computing(self, seed: int) -> Computing:
        return Computing(seed=seed, precision=self.settings.precision, device=self.settings.device)

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
        how = self._computing(job.number)
        return search(self.folder(job), self.data, self.table, self.search_recipe, job.target, how)

    def run_training(self, job: Job) -> None:
        """Trains a network from scratch on train and val, tests it once, and keeps the result."""
        network = self.network(job)
        result: dict[str, Any] = {"settings": self._training_settings(network)}
        if network.architecture is None:
            result["left_out"] = _left_out(network.design, job.target)
            tqdm.write(result["left_out"])
        else:
            result |= asdict(self._train(job, network, network.architecture))
        write_text(self._trained(job), json.dumps(result, indent=1))

    def _train(self, job: Job, network: Network, arch: Architecture) -> Result:
        how = self._computing(network.seed)
        net, history = retrain(self.folder(job), self.data, arch, self.retrain_recipe, how)
        test = evaluate(net, self.data, device=self.settings.device)
        classes = len(self.data.classes)
        return Result(
            method=job.method,
            target=job.target,
            number=job.number,
            design=network.design,
            seed=network.seed,
            top1=test["top1"],
            loss=test["loss"],
            images=test["images"],
            mult_adds_m=arch.mult_adds(self.data.image_size, classes),
            params_m=arch.params(classes),
            blocks=len(arch.routing_blocks),
            layers=arch.num_layers,
            search_seconds=network.search_seconds,
            train_seconds=sum(row["seconds"] for row in history),
            net_config=str(arch),
        )

    # What the steps have kept, each with a digest of all that decides it.

    def _searched(self, job: Job) -> Path:
        return self.folder(job).work / "searched.json"

    def _trained(self, job: Job) -> Path:
        return self.folder(job).work / "result.json"

    def _search_settings(self, job: Job) -> str:
        costs = [self.table.nested(), self.table.space.model_dump(exclude={*RECIPES})]
        recipe = self.search_recipe.model_dump()
        precision = self.settings.precision
        decisive = [costs, recipe, job.target, job.number, precision, self.data.digest]
        return digest(decisive + _code([*self.table.space.own_ops, self.search_recipe.loss]))

    def _training_settings(self, network: Network) -> str:
        arch = str(network.architecture)
        recipe = self.retrain_recipe.model_dump()
        decisive = [arch, recipe, network.seed, self.settings.precision, self.data.digest]
        ops = network.architecture.own_ops if network.architecture else []
        return digest(decisive + _code([*ops, self.retrain_recipe.loss]))

    def _found(self, job: Job) -> dict[str, Any] | None:
        """What the search of a job has found, if it is done."""
        return _kept(self._searched(job), self._search_settings(job))

    def _result(self, job: Job) -> dict[str, Any] | None:
        """What a job has found out, if it is done, whole, and of the data and recipes of today."""
        path = self._trained(job)
        if not path.exists():
            return None
        if job.method == SEARCHED and self._found(job) is None:
            return None
        return _kept(path, self._training_settings(self.network(job)))

    # Whether the supernet ranks networks as training does.

    def ranking(self, results: pd.DataFrame) -> pd.DataFrame:
        """The trained random networks by `one_shot`, the accuracy on val of their path in the supernet of the middle
        target's first search, and `retrained`, the accuracy on test after training alone.
        """
        targets = sorted(self.settings.targets)
        job = Job(SEARCHED, targets[len(targets) // 2], 0)
        try:
            net = load_search(self.folder(job), self.table, len(self.data.classes)).net
        except ValueError:  # its checkpoint is damaged or of other costs
            net = self._search(job).net
        drawn = results[results["method"] == RANDOM]
        shares = []
        with quiet():
            for text in drawn["net_config"]:
                path = PathOf(net, Architecture.parse(text))
                shares.append(evaluate(path, self.data, "val", device=self.settings.device)["top1"])
        return pd.DataFrame(
            {"target": drawn["target"], "one_shot": shares, "retrained": drawn["top1"]}
        )

    def rankings(self, results: pd.DataFrame, ranking: pd.DataFrame) -> pd.DataFrame:
        """How well the supernet orders the random networks, beside scores that need no search (see `rankings`)."""
        drawn = results[results["method"] == RANDOM]
        size, classes = self.data.image_size, len(self.data.classes)
        flows = [
            synaptic_flow(Architecture.parse(text), size, classes) for text in drawn["net_config"]
        ]
        scores: dict[str, Any] = {
            "path in the supernet": ranking["one_shot"].to_numpy(),
            "layers": drawn["layers"].to_numpy(),
            "Mult-Adds": drawn["mult_adds_m"].to_numpy(),
            "parameters": drawn["params_m"].to_numpy(),
            "synaptic flow": flows,
        }
        networks = pd.DataFrame(scores)
        networks["target"] = drawn["target"].to_numpy()
        networks["accuracy"] = drawn["top1"].to_numpy()
        return rankings(networks, [*scores])

    def record(self, results: pd.DataFrame, ranking: pd.DataFrame, orders: pd.DataFrame) -> None:
        """Keeps `results` and `ranking` in the run's reports, with what they and the `rankings` say."""
        write_text(self.run.reports / "evidence.csv", results.to_csv(index=False))
        write_text(self.run.reports / "ranking.csv", ranking.to_csv(index=False))
        found = summary(results, ranking) | {"left_out": self.left_out()}
        self.run.update_json("metrics.json", "evidence", found)
        kept = json.loads(
            orders.reset_index().to_json(orient="records")
        )  # null where there is none
        self.run.update_json("metrics.json", "rankings", kept)


def _code(names: list[str | None]) -> list[dict[str, str]]:
    """Digests of the code of one's own that a step runs, where it runs some."""
    codes = own.codes(names)
    return [codes] if codes else []


def _left_out(design: str, target: float) -> str:
    why = f"no width of it costs that within {WITHIN:.0%}"
    return f"{design} is left out at {target:g} M Mult-Adds: {why}."


def _kept(path: Path, settings: str) -> dict[str, Any] | None:
    """What a step kept, if it is whole and of these settings; says so where it is not."""
    if not path.exists():
        return None
    try:
        content = read_json(path, "it does not count and is made anew")
    except ValueError as error:
        print(error)
        return None
    if content.get("settings") != settings:
        print(f"{path} is of other data, costs or recipes: it does not count and is made anew")
        return None
    return content


def _configured(configuration: str, run: str) -> Study:
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
    parser.add_argument(
        "job", help="method, target and number, like DenseNAS_1_0, random_1_3 or hand-made_1_0"
    )
    asked = parser.parse_args()
    with exiting():
        _do(_configured(asked.configuration, asked.run), asked.step, asked.job)


if __name__ == "__main__":
    main()
