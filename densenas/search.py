"""The search: weights on train, alpha and beta on val, under the chained cost (paper, section 3.3)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenas.files import write_text
from densenas.images.data import ImageData, load
from densenas.images.loading import Batches, rank_and_world
from densenas.method.cost import CostTable
from densenas.method.derivation import Candidate, Lattice
from densenas.method.probabilities import Probabilities
from densenas.method.supernet import Choice, SuperNet
from densenas.pricing import RECIPES, priced_space, read_costs
from densenas.published import save_published
from densenas.recipes import SearchRecipe, override
from densenas.runs.run import Run
from densenas.training.checkpoint import digest, read_checkpoint, restore
from densenas.training.device import computing_on
from densenas.training.engine import (
    Pass,
    Position,
    alone,
    check_training,
    cosine,
    descend,
    fit,
    fused_sgd,
)


@dataclass
class Search:
    """A search: the supernet, its most probable architecture, what happened in every epoch, and what was asked for.

    `configuration` is what its checkpoint holds, never what a run was last asked for: space, recipe, cost (the nested
    table), target_cost, data (a digest), seed, precision, device.
    """

    net: SuperNet
    table: CostTable
    configuration: Mapping[str, Any]
    history: list[dict[str, Any]]
    trace: list[Probabilities]  # before the first epoch and after every one

    @property
    def target_cost(self) -> float | None:
        return self.configuration["target_cost"]

    @property
    def epochs(self) -> int:
        """How many the search has when it is finished."""
        return self.configuration["recipe"]["epochs"]

    @property
    def digest(self) -> str:
        """Tells one search from every other: two with the same digest end with the same network."""
        return digest(self.configuration)

    @property
    def best(self) -> Candidate:
        """What the search found."""
        return Lattice(self.table, self.trace[-1]).derive(self.target_cost)

    def derived(self) -> list[Candidate]:
        """What would be derived at every moment of the trace, the last one being the result."""
        return [Lattice(self.table, moment).derive(self.target_cost) for moment in self.trace]


class Trace(list[Probabilities]):
    """Probabilities before the first epoch and after every one, as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"entries": [vars(entry) for entry in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        entries = [Probabilities(**entry) for entry in state["entries"]]
        shapes = [[part.shape for part in vars(entry).values()] for entry in (self[0], *entries)]
        if not entries or any(shape != shapes[0] for shape in shapes):
            raise ValueError("probabilities of another space")
        self[:] = entries


class Target(nn.Module):
    """A penalty that brings the expected cost to a target from either side, without a factor to tune.

    With g = log(cost / target) the loss gains multiplier · g + g² / 2, and after every step the multiplier grows by
    RATE · g: it settles where the pull of accuracy is balanced at g = 0 (the method of multipliers).
    """

    RATE = 0.05

    def __init__(self, cost: float) -> None:
        super().__init__()
        self.cost = cost
        self.register_buffer("multiplier", torch.zeros(()))

    def forward(self, cost: Tensor) -> Tensor:
        gap = (cost / self.cost).log()
        penalty = self.multiplier * gap + gap.square() / 2
        self.multiplier = self.multiplier + self.RATE * gap.detach()
        return penalty


class SearchTrainer:
    """A supernet with its two optimisers, and the two kinds of step of a search (section 3.3).

    `steps` weight steps bring the learning rate down; `precision` is fp32, tf32 or bf16 (autocast).
    """

    def __init__(
        self,
        net: SuperNet,
        table: CostTable,
        recipe: SearchRecipe,
        steps: int,
        precision: str,
        target_cost: float | None = None,
    ) -> None:
        self.net, self.table, self.recipe, self.precision = net, table, recipe, precision
        self.target = None if target_cost is None else Target(target_cost).to(net.beta[0].device)
        self.weights, self.arch = net.weight_parameters(), net.arch_parameters()
        self.sgd = fused_sgd(self.weights, recipe)
        decay = recipe.arch_weight_decay
        self.adam = torch.optim.Adam(
            self.arch, recipe.arch_lr, recipe.arch_betas, weight_decay=decay, fused=True
        )
        self.schedule = cosine(self.sgd, steps, recipe.lr_min)

    def _classify(self, images: Tensor, labels: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.net(images, choice)
            return F.cross_entropy(logits, labels), logits

    def weight_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One candidate a mixed layer; moves the weights that took part."""
        loss, logits = self._classify(images, labels, self.net.sample(1))
        self.sgd.zero_grad()
        outcome = descend(loss, logits, labels, self.weights)
        self.sgd.step()
        self.schedule.step()
        return outcome

    def arch_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Two candidates a mixed layer, cross-entropy and the chained cost; moves alpha and beta."""
        choice = self.net.sample(2)
        loss, logits = self._classify(images, labels, choice)
        cost = self.net.cost(self.table, choice)
        if self.target:
            penalty = self.target(cost)
        else:
            penalty = self.recipe.sub_loss_factor * cost.log() / math.log(self.recipe.log_base)
        self.adam.zero_grad()
        outcome = descend(loss, logits, labels, self.arch, penalty)
        with self.net.keeping_mass(choice):
            self.adam.step()
        return outcome


def search(
    run: Run,
    data: ImageData,
    table: CostTable,
    recipe: SearchRecipe,
    target_cost: float | None = None,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
    deterministic: bool = False,
    started: Callable[[], None] = lambda: None,
) -> Search:
    """Trains the supernet of `table.space` on `data` and learns its architecture parameters.

    Without `target_cost` (in the table's unit) the architecture step has the paper's loss; with it the expected cost
    is brought there, and what is derived costs that much within 3 %. Until `arch_start_epoch` weights alone are
    trained; from then on each epoch is a pass over val that updates alpha and beta, then a pass over train that updates
    weights. A killed search goes on when called again (`fit`). `started` is called when nothing was refused, before the
    first step. Raises ValueError where there can be no such search, see `check_search`.
    """
    with computing_on(device, precision, deterministic) as where:
        check_search(data, table, recipe, target_cost, seed)
        configuration = {
            "space": table.space.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "cost": table.nested(),
            "target_cost": target_cost,
            "data": data.digest,
            "seed": seed,
            "precision": precision,
            "device": where.type,
        }
        torch.manual_seed(seed)
        net = SuperNet(table.space, len(data.classes))
        net.temperature = recipe.softmax_temp
        net.to(where, memory_format=torch.channels_last).train()
        train, val = (
            Batches(data, name, recipe.batch_size, where, seed) for name in ("train", "val")
        )
        trainer = SearchTrainer(
            net, table, recipe, recipe.epochs * len(train), precision, target_cost
        )
        trace = Trace([net.probabilities()])

        def passes(epoch: int) -> list[Pass]:
            both = [
                Pass("val", val, trainer.arch_step, trainer.arch, trainer.weights),
                Pass("train", train, trainer.weight_step, trainer.weights, trainer.arch),
            ]
            return both if epoch >= recipe.arch_start_epoch else both[1:]

        @torch.no_grad()
        def finish() -> dict[str, Any]:
            trace.append(net.probabilities())
            row = {"lr": trainer.schedule.get_last_lr()[0], "expected_cost": float(net.cost(table))}
            row["derived_cost"] = Lattice(table, trace[-1]).derive(target_cost).cost
            if target_cost is not None:
                gap = row["derived_cost"] / target_cost - 1
                row |= {
                    "target_cost": target_cost,
                    "gap": gap,
                    "multiplier": float(trainer.target.multiplier),
                }
            return row | trace[-1].health(table.space)

        parts = {"net": net, "trace": trace} | {
            name: getattr(trainer, name) for name in ("sgd", "adam", "schedule")
        }
        if trainer.target:
            parts["target"] = trainer.target
        started()
        history = fit(run, "search", configuration, parts, recipe.epochs, passes, finish)
    return Search(net, table, json.loads(json.dumps(configuration)), history, trace)


def check_search(
    data: ImageData,
    table: CostTable,
    recipe: SearchRecipe,
    target_cost: float | None = None,
    seed: int = 0,
) -> None:
    """Raises ValueError with one sentence where there can be no such search.

    That is where the costs are of images of another size or of another number of classes, where no network of the
    space costs the target, and where a batch is larger than a split or too small to be shared.
    """
    for name, found in (("input_size", data.image_size), ("num_classes", len(data.classes))):
        priced = table.conditions.get(name, found)
        if priced != found:
            raise ValueError(
                f"the costs are for {name} {priced}, the images have {found}: run 02-cost again"
            )
    if target_cost is not None:
        number = isinstance(target_cost, int | float) and not isinstance(target_cost, bool)
        if not number or not math.isfinite(target_cost) or target_cost <= 0:
            expected = f"a positive number of {table.unit}, or None for the paper's loss"
            raise ValueError(f"target_cost is {target_cost!r}, expected {expected}")
        Lattice(table).at(target_cost)  # refuses what cannot be reached
    check_training(
        seed, recipe.batch_size, {name: len(data.splits[name]) for name in ("val", "train")}
    )


def search_run(
    name: str,
    space: str | None = None,
    epochs: int | None = None,
    arch_start_epoch: int | None = None,
    batch_size: int | None = None,
    target_cost: float | None = None,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
    deterministic: bool = False,
) -> None:
    """`search` as notebook 03 and torchrun call it: on the run's data and costs.

    `space` None is that of the costs; None elsewhere is the recipe of the space. What is recorded has passed every
    check; what is refused leaves the run as it was.
    """
    run = Run(name)
    shortened = {"epochs": epochs, "arch_start_epoch": arch_start_epoch, "batch_size": batch_size}
    how = {"seed": seed, "precision": precision, "device": device, "deterministic": deterministic}
    with alone(run):
        table, data = read_costs(run), load(run)
        recipe = override(priced_space(table, space).search, **shortened)

        def started() -> None:
            rank, world = rank_and_world()
            if rank == 0:
                asked = {
                    "space": space or table.space.name,
                    **shortened,
                    "target_cost": target_cost,
                    "devices": world,
                }
                run.record_provenance(
                    "03-search", **asked, **how, recipe=recipe.model_dump(mode="json")
                )

        search(run, data, table, recipe, target_cost, **how, started=started)


def load_search(run: Run, table: CostTable, num_classes: int) -> Search:
    """The search that a run's checkpoint holds, finished or not; on the CPU.

    Raises FileNotFoundError or ValueError with one sentence where there is none, where it is damaged, and where `table`
    is not the one it was searched with.
    """
    path = run.need(run.work / "search.pt", "03-search")
    again = "run 03-search again"
    net = SuperNet(table.space, num_classes)
    trace, position = Trace([net.probabilities()]), Position()
    try:
        checkpoint = read_checkpoint(path)
        other = _changed(checkpoint, table, num_classes)
        if other is None:
            restore({"net": net, "trace": trace, "position": position}, checkpoint, path)
            net.temperature = checkpoint["configuration"]["recipe"]["softmax_temp"]
    except ValueError as error:
        raise ValueError(f"{error}: {again}, it goes on from the checkpoint before") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} does not hold a search of space {table.space.name}: {again}"
        ) from None
    if other is not None:
        raise ValueError(f"run '{run.name}' has {other} now than it was searched with: {again}")
    return Search(net, table, checkpoint["configuration"], position.history, trace)


def _changed(checkpoint: Mapping[str, Any], table: CostTable, num_classes: int) -> str | None:
    """What the run has another of since its search, in words; None where it has the same."""
    configuration = checkpoint["configuration"]
    space = {name: value for name, value in configuration["space"].items() if name not in RECIPES}
    present = table.space.model_dump(mode="json", exclude={*RECIPES})
    if [space, configuration["cost"]] != [present, json.loads(json.dumps(table.nested()))]:
        return "other costs"
    if len(checkpoint["net"]["classifier.weight"]) != num_classes:
        return "another number of classes"
    return None


def finished_search(run: Run) -> Search:
    """The run's search, for what is made of it.

    Raises ValueError with one sentence where it is unfinished, or where the run's data or costs are no longer those
    that it was searched with.
    """
    data = load(run)
    result = load_search(run, read_costs(run), len(data.classes))
    if result.configuration["data"] != data.digest:
        raise ValueError(
            f"run '{run.name}' has other images now than it was searched on: run 03-search again"
        )
    done = len(result.history)
    if done < result.epochs:
        unfinished = f"the search of run '{run.name}' has done {done} of {result.epochs} epochs"
        raise ValueError(f"{unfinished}: run 03-search again, it goes on from there")
    return result


def collapsed(history: list[dict[str, Any]]) -> str | None:
    """A warning in words where a search ended at the cheapest ops for the cost's sake, with what to change."""
    first, last = history[0], history[-1]
    if last["cheapest_share"] < 0.8 or last["cheapest_share"] < 1.5 * first["cheapest_share"]:
        return None
    return (
        f"The search has collapsed: {last['cheapest_share']:.0%} of the choices on a path fall on the cheapest op"
        f" ({first['cheapest_share']:.0%} at its start), {last['skip_share']:.0%} of the stacked layers are skipped."
        " Cost outweighs accuracy. Give a target_cost, or lower sub_loss_factor; a later arch_start_epoch lets the"
        " weights tell candidates apart before these are judged."
    )


def write_architecture(run: Run, result: Search) -> dict[str, Any]:
    """Keeps what a search found as architecture.json and net_config; returns what the former holds.

    `search` is the digest of the search that it is from, `data` that of the images.
    """
    found, table = result.best, result.table
    arch, size, num_classes = (
        found.architecture,
        table.input_size,
        result.net.classifier.out_features,
    )
    record = {
        "net_config": str(arch),
        "mult_adds_m": arch.mult_adds(size, num_classes),
        "params_m": arch.params(num_classes),
        "cost": found.cost,
        "target_cost": result.target_cost,
        "cost_unit": table.unit,
        "blocks": len(arch.routing_blocks),
        "layers": arch.num_layers,
        "input_size": size,
        "num_classes": num_classes,
        "space": table.space.name,
        "seed": result.configuration["seed"],
        "search": result.digest,
        "data": result.configuration["data"],
    }
    save_published(run.reports, arch)
    write_text(run.reports / "architecture.json", json.dumps(record, indent=1) + "\n")
    return record
