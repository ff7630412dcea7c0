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
from densenas.supernet import SuperNet, derive


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
        net.to(where, memory_format=torch.channels_last)
        weights, arch = net.weight_parameters(), net.arch_parameters()
        share = dict(zip(("rank", "world"), rank_and_world(), strict=True))
        train, val = (Batches(data, name, recipe.batch_size, where, seed, **share) for name in ("train", "val"))
        sgd = torch.optim.SGD(weights, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        adam = torch.optim.Adam(arch, recipe.arch_lr, recipe.arch_betas, weight_decay=recipe.arch_weight_decay)
        schedule = cosine(sgd, recipe.epochs * len(train), recipe.lr_min)
        trace = Trace([Probabilities.of(net)])

        def weight_step(images: Tensor, labels: Tensor) -> Tensor:
            choice = net.sample(1)
            with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = net(images, choice)
                loss = F.cross_entropy(logits, labels)
            sgd.zero_grad()
            outcome = descend(loss, logits, labels, weights)
            sgd.step()
            schedule.step()
            return outcome

        def arch_step(images: Tensor, labels: Tensor) -> Tensor:
            choice = net.sample(2)
            with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = net(images, choice)
                loss = F.cross_entropy(logits, labels)
            penalty = recipe.sub_loss_factor * net.cost(table, choice).log() / math.log(recipe.log_base)
            adam.zero_grad()
            outcome = descend(loss, logits, labels, arch, penalty)
            with net.keeping_mass(choice):
                adam.step()
            return outcome

        def passes(epoch: int) -> list[Pass]:
            both = [Pass("val", val, arch_step, arch, weights), Pass("train", train, weight_step, weights, arch)]
            return both if epoch >= recipe.arch_start_epoch else both[1:]

        @torch.no_grad()
        def finish() -> dict[str, Any]:
            trace.append(Probabilities.of(net))
            return {
                "lr": schedule.get_last_lr()[0],
                "expected_cost": float(net.cost(table)),
                "derived_cost": table.total(net.derive()),
            }

        net.train()
        parts = {"net": net, "sgd": sgd, "adam": adam, "schedule": schedule, "trace": trace}
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
