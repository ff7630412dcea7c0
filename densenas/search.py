"""The search: weights on train, alpha and beta on val, under the chained cost (paper, section 3.3)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenas import ops
from densenas.architecture import save_published
from densenas.config import SearchRecipe, override, write_text
from densenas.cost import CostTable
from densenas.data import ImageData, load
from densenas.derivation import Candidate, Lattice, visit_probabilities
from densenas.engine import Pass, computing_on, cosine, descend, fit, fused_sgd, rank_and_world
from densenas.loading import Batches
from densenas.run import Run
from densenas.space import SearchSpace
from densenas.supernet import Choice, SuperNet


@dataclass
class Search:
    """A finished search: the supernet, its most probable architecture, and what happened in every epoch."""

    net: SuperNet
    table: CostTable
    target_cost: float | None
    history: list[dict[str, Any]]
    trace: list[Probabilities]  # before the first epoch and after every one

    @property
    def best(self) -> Candidate:
        """What the search found."""
        return self.trace[-1].derive(self.table, self.target_cost)

    def derived(self) -> list[Candidate]:
        """What would be derived at every moment of the trace, the last one being the result."""
        return [moment.derive(self.table, self.target_cost) for moment in self.trace]


@dataclass(frozen=True)
class Probabilities:
    """p (blocks, nodes), head (edges into blocks, head ops), stack (layers, stack ops) after one epoch."""

    p: Tensor
    head: Tensor
    stack: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, net: SuperNet) -> Probabilities:
        head, stack = (torch.cat([*alphas]).softmax(dim=1).cpu() for alphas in (net.alpha_head, net.alpha_stack))
        return cls(net.path_probabilities().cpu(), head, stack)

    def derive(self, table: CostTable, target_cost: float | None) -> Candidate:
        """The most probable architecture, or the most probable one at the target (see `Lattice.at`)."""
        lattice = Lattice(table, self.p, self.head, self.stack)
        return lattice.best()[0] if target_cost is None else lattice.at(target_cost)

    def health(self, space: SearchSpace) -> dict[str, float]:
        """How decided a search is, and for what; every value but expected_layers is a share from 0 to 1.

        Entropies are means over layers (alpha) and blocks (beta), 1 for a uniform choice. Expectations are over paths:
        layers of a network, and on its path the probability of a skip and of the cheapest op, a skip included.
        """

        def entropy(*parts: Tensor) -> float:
            choices = [(rows > 0).sum(dim=1) for rows in parts]
            shares = [torch.special.entr(rows).sum(dim=1) / n.log() for rows, n in zip(parts, choices, strict=True)]
            open_ones = torch.cat(shares)[torch.cat(choices) > 1]
            return float(open_ones.mean()) if len(open_ones) else 0.0

        visits = visit_probabilities(self.p)[:-1]
        head_weight = (visits[:, None] * self.p)[tuple(torch.tensor(space.head_edges).T)]
        stack_weight = visits.repeat_interleave(torch.tensor(space.num_layers))
        layers = torch.cat([head_weight, stack_weight])
        skips = [index for index, op in enumerate(space.stack_ops) if op == ops.SKIP]
        skipped = (stack_weight * self.stack[:, skips].sum(dim=1)).sum()
        both = (self.head, space.head_ops), (self.stack, space.stack_ops)
        cheap = torch.cat([shares[:, ops.cheapest(names)].sum(dim=1) for shares, names in both])
        return {
            "alpha_entropy": entropy(self.head, self.stack),
            "beta_entropy": entropy(self.p),
            "expected_layers": float(layers.sum() - skipped),
            "skip_share": float(skipped / stack_weight.sum()) if len(self.stack) else 0.0,
            "cheapest_share": float((layers * cheap).sum() / layers.sum()),
        }


class Trace(list[Probabilities]):
    """Probabilities before the first epoch and after every one, as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"entries": [vars(entry) for entry in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self[:] = [Probabilities(**entry) for entry in state["entries"]]


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
        self.adam = torch.optim.Adam(self.arch, recipe.arch_lr, recipe.arch_betas, weight_decay=decay, fused=True)
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
) -> Search:
    """Trains the supernet of `table.space` on `data` and learns its architecture parameters.

    Without `target_cost` (in the table's unit) the architecture step has the paper's loss; with it the expected cost
    is brought there, and what is derived costs that much within 3 %. Raises ValueError where the space has no such
    network. Until `arch_start_epoch` weights alone are trained; from then on each epoch is a pass over val that updates
    alpha and beta, then a pass over train that updates weights. A killed search goes on when called again (`fit`).
    """
    with computing_on(device, precision, deterministic) as where:
        configuration = {
            "space": table.space.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"),
            "cost": table.nested(), "target_cost": target_cost, "data": data.digest, "seed": seed,
            "precision": precision, "device": where.type,
        }  # fmt: skip
        if target_cost is not None:
            Lattice(table).at(target_cost)  # refuses what cannot be reached
        torch.manual_seed(seed)
        net = SuperNet(table.space, len(data.classes))
        net.temperature = recipe.softmax_temp
        net.to(where, memory_format=torch.channels_last).train()
        train, val = (Batches(data, name, recipe.batch_size, where, seed) for name in ("train", "val"))
        trainer = SearchTrainer(net, table, recipe, recipe.epochs * len(train), precision, target_cost)
        trace = Trace([Probabilities.of(net)])

        def passes(epoch: int) -> list[Pass]:
            both = [
                Pass("val", val, trainer.arch_step, trainer.arch, trainer.weights),
                Pass("train", train, trainer.weight_step, trainer.weights, trainer.arch),
            ]
            return both if epoch >= recipe.arch_start_epoch else both[1:]

        @torch.no_grad()
        def finish() -> dict[str, Any]:
            trace.append(Probabilities.of(net))
            row = {"lr": trainer.schedule.get_last_lr()[0], "expected_cost": float(net.cost(table))}
            row["derived_cost"] = trace[-1].derive(table, target_cost).cost
            if target_cost is not None:
                gap = row["derived_cost"] / target_cost - 1
                row |= {"target_cost": target_cost, "gap": gap, "multiplier": float(trainer.target.multiplier)}
            return row | trace[-1].health(table.space)

        parts = {"net": net, "trace": trace} | {name: getattr(trainer, name) for name in ("sgd", "adam", "schedule")}
        if trainer.target:
            parts["target"] = trainer.target
        history = fit(run, "search", configuration, parts, recipe.epochs, passes, finish)
    return Search(net, table, target_cost, history, trace)


def search_run(
    name: str,
    space: str,
    epochs: int | None = None,
    arch_start_epoch: int | None = None,
    batch_size: int | None = None,
    target_cost: float | None = None,
    **how: Any,
) -> None:
    """`search` as notebook 03 and torchrun call it: on the run's data and costs; None is the space's own recipe."""
    shortened = {"epochs": epochs, "arch_start_epoch": arch_start_epoch, "batch_size": batch_size}
    recipe = override(SearchSpace.load(space).search, **shortened)
    run = Run(name)
    table = run.costs()
    rank, world = rank_and_world()
    if rank == 0:
        asked = {"space": space, **shortened, "target_cost": target_cost, "devices": world, **how}
        run.record_provenance("03-search", **asked, recipe=recipe.model_dump(mode="json"))
    search(run, load(run), table, recipe, target_cost, **how)


def load_search(run: Run, table: CostTable, num_classes: int) -> Search:
    """The search that a run's checkpoint holds, finished or not; on the CPU."""
    path = run.need(run.work / "search.pt", "03-search")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    net = SuperNet(table.space, num_classes)
    net.load_state_dict(checkpoint["net"])
    configuration = json.loads(checkpoint["configuration"])
    net.temperature = configuration["recipe"]["softmax_temp"]
    trace = Trace()
    trace.load_state_dict(checkpoint["trace"])
    return Search(net, table, configuration["target_cost"], checkpoint["position"]["history"], trace)


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


def write_architecture(run: Run, candidate: Candidate, table: CostTable, num_classes: int) -> dict[str, Any]:
    """Keeps a derived architecture as architecture.json and net_config; returns what the former holds."""
    arch = candidate.architecture
    size = table.conditions["input_size"]
    search_parameters = run.read_json("provenance.json").get("03-search", {}).get("parameters", {})
    record = {
        "net_config": str(arch),
        "mult_adds_m": arch.mult_adds(size, num_classes),
        "params_m": arch.params(num_classes),
        "cost": candidate.cost,
        "target_cost": search_parameters.get("target_cost"),
        "cost_unit": table.unit,
        "blocks": len(arch.routing_blocks),
        "layers": arch.num_layers,
        "input_size": size,
        "num_classes": num_classes,
        "space": table.space.name,
        "seed": search_parameters.get("seed"),
    }
    save_published(run.reports, arch)
    write_text(run.reports / "architecture.json", json.dumps(record, indent=1) + "\n")
    return record
