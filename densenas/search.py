"""The search: weights on train, alpha and beta on val, under the chained cost (paper, section 3.3)."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from densenas import own
from densenas.costs import priced_space, read_costs
from densenas.images.data import ImageData, load
from densenas.images.loading import Batches
from densenas.judge import Judge
from densenas.method.architecture import Candidate
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.probabilities import Probabilities
from densenas.method.supernet import Choice, SuperNet
from densenas.outcome import Search, Trace
from densenas.ranks import rank_and_world
from densenas.recipes import SearchRecipe, override
from densenas.runs.run import Run
from densenas.settings import Computing, Precision, SearchSettings
from densenas.training.checkpoint import Part, Row
from densenas.training.device import computing_on
from densenas.training.engine import alone, resumable
from densenas.training.steps import (
    check_batches,
    check_loss,
    cosine,
    descend,
    frozen,
    fused_sgd,
    loss_of,
)

COMPARED = 4  # whole networks of an architecture step


def search(
    run: Run,
    data: ImageData,
    table: CostTable,
    recipe: SearchRecipe,
    target_cost: float | None = None,
    how: Computing = Computing(),
) -> Search:
    """Trains the supernet of `table.space` on `data` and learns its architecture parameters.

    Without `target_cost` (in the table's unit) the architecture step has the paper's loss; with it the expected cost
    is brought there, and what is derived costs that much within 3 %. A killed search goes on when called again
    (`resumable`). Raises ValueError where there can be no such search, see `check_search`.
    """
    with computing_on(how) as device:
        check_search(data, table, recipe, target_cost)
        torch.manual_seed(how.seed)
        net = SuperNet(table.space, len(data.classes), recipe.weights)
        net.temperature = recipe.softmax_temp
        net.to(device).to(memory_format=torch.channels_last).train()
        train = Batches(data, "train", recipe.batch_size, device, how.seed)
        val = Batches(data, "val", recipe.batch_size, device, how.seed)
        judge = Judge(data, recipe.batch_size, device)
        weight_steps = recipe.epochs * len(train)
        trainer = SearchTrainer(net, table, recipe, weight_steps, how.precision, target_cost)
        trace = Trace([net.probabilities()])
        configuration = {
            "space": table.space.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "cost": table.nested(),
            "target_cost": target_cost,
            "data": data.digest,
            **how.decisive(device.type),
        }
        if code := own.codes([*table.space.own_ops, recipe.loss]):
            configuration["code"] = code
        parts = trainer.parts() | {"trace": trace}
        # Of each epoch, for the time that is left.
        steps = [len(train)] * recipe.arch_start_epoch
        steps += [len(val) + len(train)] * (recipe.epochs - recipe.arch_start_epoch)
        with resumable(run, "search", configuration, parts, steps) as training:
            for epoch in training.epochs():
                # Weights alone first, so that they are worth judging when the judging starts.
                if epoch >= recipe.arch_start_epoch:
                    for images, labels in training.batches("val", val):
                        training.record(trainer.arch_step(images, labels))
                for images, labels in training.batches("train", train):
                    training.record(trainer.weight_step(images, labels))
                trace.append(net.probabilities())
                derived = Lattice(table, trace[-1]).derive(target_cost)
                path_top1 = judge.top1(net, Choice.of(net.space, derived))
                training.end_epoch(trainer.measures(trace[-1], derived) | {"path_top1": path_top1})
    return Search(net, table, json.loads(json.dumps(configuration)), training.history, trace)


class SearchTrainer:
    """A supernet with its two optimisers, and the two kinds of step of a search (section 3.3).

    So many weight `steps` bring the learning rate down. A step takes images (B, 3, H, W) and labels (B,), and returns
    what `descend` does.
    """

    def __init__(
        self,
        net: SuperNet,
        table: CostTable,
        recipe: SearchRecipe,
        steps: int,
        precision: Precision,
        target_cost: float | None = None,
    ) -> None:
        self.net = net
        self.table = table
        self.recipe = recipe
        self.precision = precision
        self.target: Target | None = None
        if target_cost is not None:
            self.target = Target(target_cost).to(net.beta[0].device)
        self.loss = loss_of(recipe)
        self.weights = net.weight_parameters()
        self.arch = net.arch_parameters()
        self.sgd = fused_sgd(self.weights, recipe)
        self.schedule = cosine(self.sgd, steps, recipe.lr_min)
        self.adam = torch.optim.Adam(
            self.arch,
            recipe.arch_lr,
            recipe.arch_betas,
            weight_decay=recipe.arch_weight_decay,
            fused=True,
        )

    def weight_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One candidate a mixed layer, over all paths or along a sampled one; moves the weights that took part."""
        choice = self.net.draw() if self.recipe.paths == "sampled" else self.net.sample(1)
        with frozen(self.arch):
            loss, logits = self._classify(images, labels, choice)
        self.sgd.zero_grad()
        outcome = descend(loss, logits, labels, self.weights)
        self.sgd.step()
        self.schedule.step()
        return outcome

    def arch_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Moves alpha and beta."""
        if self.recipe.paths == "sampled":
            return self._compare_networks(images, labels)
        return self._compare_candidates(images, labels)

    def _compare_candidates(self, images: Tensor, labels: Tensor) -> Tensor:
        """Two candidates a mixed layer, the loss and the chained cost (section 3.3)."""
        choice = self.net.sample(2)
        with frozen(self.weights):
            loss, logits = self._classify(images, labels, choice)
        cost = self.net.cost(self.table, choice)
        self.adam.zero_grad()
        outcome = descend(loss, logits, labels, self.arch, self._penalty(cost))
        with self.net.keeping_mass(choice):
            self.adam.step()
        if self.target:
            self.target.update(cost)
        return outcome

    def _compare_networks(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whole networks drawn by p and alpha, forward passes alone, and the chained cost of all of them.

        What a network's loss is above or below the mean of those drawn with it weighs the gradient of its probability:
        the score-function estimate of the gradient of the expected loss (Williams, 1992).
        """
        networks = [self.net.draw() for _ in range(COMPARED)]
        with torch.no_grad():
            outcomes = [self._classify(images, labels, network) for network in networks]
        losses = torch.stack([loss for loss, _ in outcomes])
        logits = torch.cat([logits for _, logits in outcomes])
        above = (losses - losses.mean()) / (COMPARED - 1)
        score = above @ self.net.log_probabilities(networks)
        cost = self.net.cost(self.table)
        self.adam.zero_grad()
        penalty = score + self._penalty(cost)
        outcome = descend(losses.mean(), logits, labels.repeat(COMPARED), self.arch, penalty)
        self.adam.step()
        if self.target:
            self.target.update(cost)
        return outcome

    def _classify(self, images: Tensor, labels: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """The loss, 0-d, and logits (B, num_classes)."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.net(images, choice)
            return self.loss(logits, labels), logits

    def _penalty(self, cost: Tensor) -> Tensor:
        """What the expected cost adds to the loss: with a target its own, else the paper's (section 3.3)."""
        if self.target:
            return self.target(cost)
        return self.recipe.sub_loss_factor * cost.log() / math.log(self.recipe.log_base)

    def parts(self) -> dict[str, Part]:
        """All that the steps change, for a checkpoint."""
        parts: dict[str, Part] = {"net": self.net, "sgd": self.sgd, "adam": self.adam}
        parts["schedule"] = self.schedule
        if self.target:
            parts["target"] = self.target
        return parts

    @torch.no_grad()
    def measures(self, probabilities: Probabilities, derived: Candidate) -> Row:
        """What the history says of an epoch besides accuracy and loss: of the probabilities at its end, and of the
        network that would be derived from them.
        """
        row = {
            "lr": self.schedule.get_last_lr()[0],
            "expected_cost": float(self.net.cost(self.table)),
            "derived_cost": derived.cost,
        }
        if self.target:
            row["target_cost"] = self.target.cost
            row["gap"] = derived.cost / self.target.cost - 1
            row["multiplier"] = float(self.target.multiplier)
        return row | probabilities.health(self.table.space)


class Target(nn.Module):
    """A penalty that brings the expected cost to a target from either side, without a factor to tune.

    With g = log(cost / target) the loss gains multiplier · g + g² / 2, and after every step the multiplier grows by
    RATE · g: it settles where the pull of accuracy is balanced at g = 0 (the method of multipliers).
    """

    RATE = 0.05
    multiplier: Tensor

    def __init__(self, cost: float) -> None:
        super().__init__()
        self.cost = cost
        self.register_buffer("multiplier", torch.zeros(()))

    def _gap(self, cost: Tensor) -> Tensor:
        return (cost / self.cost).log()

    def forward(self, cost: Tensor) -> Tensor:
        gap = self._gap(cost)
        return self.multiplier * gap + gap.square() / 2

    @torch.no_grad()
    def update(self, cost: Tensor) -> None:
        self.multiplier = self.multiplier + self.RATE * self._gap(cost)


def check_search(
    data: ImageData, table: CostTable, recipe: SearchRecipe, target_cost: float | None = None
) -> None:
    """Raises ValueError with one sentence where there can be no such search.

    That is where the costs are of images of another size or of another number of classes, where no network of the
    space costs the target, and where a batch is larger than a split or too small to be shared.
    """
    images = {"input_size": data.image_size, "num_classes": len(data.classes)}
    for name, found in images.items():
        priced = table.conditions.get(name, found)
        if priced != found:
            costs = f"the costs are for {name} {priced}"
            raise ValueError(f"{costs}, the images have {found}: run 02-cost again")
    if target_cost is not None:
        if not math.isfinite(target_cost) or target_cost <= 0:
            expected = f"a positive number of {table.unit}, or None for the paper's loss"
            raise ValueError(f"target_cost is {target_cost!r}, expected {expected}")
        Lattice(table).at(target_cost)  # refuses what cannot be reached
    check_batches(recipe.batch_size, {"val": len(data.val), "train": len(data.train)})
    check_loss(recipe, len(data.classes))


def search_run(name: str, settings: SearchSettings) -> None:
    """`search` as notebook 03 and torchrun call it: on the run's data and costs.

    What provenance.json holds has passed every check; what is refused leaves the run as it was.
    """
    run = Run(name)
    how = settings.computing()
    with alone(run), computing_on(how):
        table = read_costs(run)
        data = load(run)
        recipe = override(priced_space(table, settings.space).search, **settings.overrides())
        check_search(data, table, recipe, settings.target_cost)
        rank, world = rank_and_world()
        if rank == 0:
            parameters: dict[str, Any] = settings.model_dump(mode="json")
            parameters["space"] = settings.space or table.space.name
            parameters["devices"] = world
            parameters["recipe"] = recipe.model_dump(mode="json")
            run.record_provenance("03-search", **parameters)
        search(run, data, table, recipe, settings.target_cost, how)
