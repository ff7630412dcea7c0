"""The search: weights on train, alpha and beta on val, under the chained cost (paper, section 3.3)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenas.architecture import Architecture, save_published
from densenas.config import SearchRecipe, write_text
from densenas.cost import CostTable
from densenas.data import ImageData
from densenas.loading import Batches
from densenas.run import Run, load_checkpoint, pick_device, progress, save_checkpoint
from densenas.supernet import SuperNet, derive
from densenas.train import Meter, autocast, cosine


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


def search(
    run: Run,
    data: ImageData,
    table: CostTable,
    recipe: SearchRecipe,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
) -> Search:
    """Trains the supernet of `table.space` on `data` and learns its architecture parameters.

    Until `arch_start_epoch` weights alone are trained; from then on each epoch is a pass over val that updates
    alpha and beta, then a pass over train that updates weights. After every epoch a checkpoint is written; a rerun
    with the same configuration goes on behind it.
    """
    where = pick_device(device)
    configuration = {
        "space": table.space.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"), "cost": table.nested(),
        "data": data.digest, "seed": seed, "precision": precision, "device": where.type,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SuperNet(table.space, len(data.classes))
    net.temperature = recipe.softmax_temp
    net.to(where, memory_format=torch.channels_last)
    train = Batches(data, "train", recipe.batch_size, where, seed)
    val = Batches(data, "val", recipe.batch_size, where, seed)
    sgd = torch.optim.SGD(
        net.weight_parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    adam = torch.optim.Adam(
        net.arch_parameters(), recipe.arch_lr, betas=recipe.arch_betas, weight_decay=recipe.arch_weight_decay
    )
    schedule = cosine(sgd, recipe.epochs * len(train), recipe.lr_min)
    state = {"net": net, "sgd": sgd, "adam": adam, "schedule": schedule}

    def weight_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        choice = net.sample(1, generator)
        with autocast(where, precision):
            logits = net(images, choice)
            loss = F.cross_entropy(logits, labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        schedule.step()
        return loss, logits

    def arch_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        choice = net.sample(2, generator)
        with autocast(where, precision):
            logits = net(images, choice)
            loss = F.cross_entropy(logits, labels)
        cost = net.cost(table, choice)
        adam.zero_grad()
        (loss + recipe.sub_loss_factor * cost.log() / math.log(recipe.log_base)).backward()
        with net.keeping_mass(choice):
            adam.step()
        return loss, logits

    path = run.work / "search.pt"
    history: list[dict[str, Any]] = []
    trace = [Probabilities.of(net)]
    if checkpoint := load_checkpoint(path, configuration):
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        generator.set_state(checkpoint["generator"])
        history, trace = checkpoint["history"], [Probabilities(**entry) for entry in checkpoint["trace"]]
    steps = [len(train) + (len(val) if epoch >= recipe.arch_start_epoch else 0) for epoch in range(recipe.epochs)]
    bar = progress(sum(steps), "search", initial=sum(steps[: len(history)]))

    def one_pass(batches: Batches, step: Callable, trained: list[nn.Parameter], fixed: list[nn.Parameter]) -> Meter:
        # Fixed parameters are outside the graph: their gradients, half of a step's work, are never computed.
        for parameters, wanted in ((trained, True), (fixed, False)):
            for parameter in parameters:
                parameter.requires_grad_(wanted)
        meter = Meter(f"search, epoch {len(history)}", bar)
        for images, labels in batches.epoch(len(history)):
            meter.add(*step(images, labels), labels)
        return meter

    weights, arch = net.weight_parameters(), net.arch_parameters()
    net.train()
    for epoch in range(len(history), recipe.epochs):
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, "lr": schedule.get_last_lr()[0]}
        if epoch >= recipe.arch_start_epoch:
            meter = one_pass(val, arch_step, trained=arch, fixed=weights)
            row |= {"val_loss": meter.loss, "val_top1": meter.top1}
        meter = one_pass(train, weight_step, trained=weights, fixed=arch)
        row |= {"train_loss": meter.loss, "train_top1": meter.top1}
        with torch.no_grad():
            row["expected_cost"] = float(net.cost(table))
        row["derived_cost"] = table.total(net.derive())
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        trace.append(Probabilities.of(net))
        save_checkpoint(
            path, configuration, generator=generator.get_state(), history=history,
            trace=[vars(entry) for entry in trace], **{name: part.state_dict() for name, part in state.items()},
        )  # fmt: skip
    bar.close()
    run.write_history("search", history)
    return Search(net, net.derive(), history, trace)


def load_search(run: Run, table: CostTable, num_classes: int) -> Search:
    """The search that a run's checkpoint holds, finished or not; on the CPU."""
    path = run.need(run.work / "search.pt", "03-search")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    net = SuperNet(table.space, num_classes)
    net.load_state_dict(checkpoint["net"])
    net.temperature = json.loads(checkpoint["configuration"])["recipe"]["softmax_temp"]
    return Search(net, net.derive(), checkpoint["history"], [Probabilities(**entry) for entry in checkpoint["trace"]])


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
        "blocks": len(arch.blocks),
        "layers": sum(1 + len(block.stack) for block in arch.blocks),
        "input_size": size,
        "num_classes": num_classes,
        "space": table.space.name,
        "seed": search_parameters.get("seed"),
    }
    save_published(run.reports, arch)
    write_text(run.reports / "architecture.json", json.dumps(record, indent=1) + "\n")
    return record
