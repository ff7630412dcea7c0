"""The search: weights on train, alpha and beta on val, under the chained cost (paper, section 3.3)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densenas.architecture import Architecture, save_published
from densenas.config import SearchRecipe, override, write_text
from densenas.cost import CostTable
from densenas.data import Batches, ImageData, load
from densenas.engine import Pass, cosine, descend, fit, rank_and_world, training_on
from densenas.run import Run
from densenas.space import SearchSpace
from densenas.supernet import Choice, SuperNet, derive


@dataclass
class Search:
    """A finished search: the supernet, its most probable architecture, and what happened in every epoch."""

    net: SuperNet
    architecture: Architecture
    history: list[dict[str, Any]]
    trace: list[Probabilities]  # before the first epoch and after every one

    def derived(self) -> list[Architecture]:
        """The most probable architecture at every moment of the trace."""
        return [derive(self.net.space, moment.p, moment.head, moment.stack) for moment in self.trace]


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


class Trace(list[Probabilities]):
    """Probabilities before the first epoch and after every one, as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"entries": [vars(entry) for entry in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self[:] = [Probabilities(**entry) for entry in state["entries"]]


class SearchTrainer:
    """A supernet with its two optimisers, and the two kinds of step of a search (section 3.3).

    `steps` weight steps bring the learning rate down; `precision` is fp32, tf32 or bf16 (autocast).
    """

    def __init__(self, net: SuperNet, table: CostTable, recipe: SearchRecipe, steps: int, precision: str) -> None:
        self.net, self.table, self.recipe, self.precision = net, table, recipe, precision
        self.weights, self.arch = net.weight_parameters(), net.arch_parameters()
        self.sgd = torch.optim.SGD(self.weights, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        self.adam = torch.optim.Adam(
            self.arch, recipe.arch_lr, recipe.arch_betas, weight_decay=recipe.arch_weight_decay
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
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
    deterministic: bool = False,
) -> Search:
    """Trains the supernet of `table.space` on `data` and learns its architecture parameters.

    Until `arch_start_epoch` weights alone are trained; from then on each epoch is a pass over val that updates
    alpha and beta, then a pass over train that updates weights. A killed search goes on when called again (`fit`).
    """
    with training_on(device, precision, deterministic) as where:
        configuration = {
            "space": table.space.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"),
            "cost": table.nested(), "data": data.digest, "seed": seed, "precision": precision, "device": where.type,
        }  # fmt: skip
        torch.manual_seed(seed)
        net = SuperNet(table.space, len(data.classes))
        net.temperature = recipe.softmax_temp
        net.to(where, memory_format=torch.channels_last).train()
        rank, world = rank_and_world()
        share = {"rank": rank, "world": world}
        train, val = (Batches(data, name, recipe.batch_size, where, seed, **share) for name in ("train", "val"))
        trainer = SearchTrainer(net, table, recipe, recipe.epochs * len(train), precision)
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
            lr, cost = trainer.schedule.get_last_lr()[0], float(net.cost(table))
            return {"lr": lr, "expected_cost": cost, "derived_cost": table.total(net.derive())}

        parts = {"net": net, "trace": trace} | {name: getattr(trainer, name) for name in ("sgd", "adam", "schedule")}
        history = fit(run, "search", configuration, parts, recipe.epochs, passes, finish)
    return Search(net, net.derive(), history, trace)


def search_run(
    name: str,
    space: str,
    epochs: int | None = None,
    arch_start_epoch: int | None = None,
    batch_size: int | None = None,
    **how: Any,
) -> None:
    """`search` as notebook 03 and torchrun call it: on the run's data and costs; None is the space's own recipe."""
    shortened = {"epochs": epochs, "arch_start_epoch": arch_start_epoch, "batch_size": batch_size}
    recipe = override(SearchSpace.load(space).search, **shortened)
    run = Run(name)
    table = CostTable.read(run.need(run.reports / "cost.json", "02-cost"))
    rank, world = rank_and_world()
    if rank == 0:
        asked = {"space": space, **shortened, "devices": world, **how}
        run.record_provenance("03-search", **asked, recipe=recipe.model_dump(mode="json"))
    search(run, load(run), table, recipe, **how)


def load_search(run: Run, table: CostTable, num_classes: int) -> Search:
    """The search that a run's checkpoint holds, finished or not; on the CPU."""
    path = run.need(run.work / "search.pt", "03-search")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    net = SuperNet(table.space, num_classes)
    net.load_state_dict(checkpoint["net"])
    net.temperature = json.loads(checkpoint["configuration"])["recipe"]["softmax_temp"]
    trace = Trace()
    trace.load_state_dict(checkpoint["trace"])
    return Search(net, net.derive(), checkpoint["position"]["history"], trace)


def write_architecture(run: Run, arch: Architecture, table: CostTable, num_classes: int) -> dict[str, Any]:
    """Keeps a derived architecture as architecture.json and net_config; returns what the former holds."""
    size = table.conditions["input_size"]
    search_parameters = run.read_json("provenance.json").get("03-search", {}).get("parameters", {})
    record = {
        "net_config": str(arch),
        "mult_adds_m": arch.mult_adds(size, num_classes),
        "params_m": arch.params(num_classes),
        "cost": table.total(arch),
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
