"""The training engine: passes over data that repeat exactly, survive a kill at any step, and run on many processes.

All random numbers of a step are a function of (seed, epoch, pass, step), and so are its images: what a checkpoint
needs besides weights is only where it was written, and a run that goes on from one ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from densenas.files import writing
from densenas.images.loading import Batches, rank_and_world, seed_of
from densenas.recipes import RetrainRecipe, SearchRecipe
from densenas.runs.progress import progress
from densenas.runs.run import Run
from densenas.training.checkpoint import (
    first_not_finite,
    keep_previous,
    load_checkpoint,
    save_checkpoint,
)
from densenas.training.device import keep_freed_memory, warn_of_long_spins
from densenas.training.processes import Interruption

CHECKPOINT_SECONDS = 120.0  # so much work is lost at most, however long an epoch
SHARED = "every machine needs the same runs/ and reports/ folders"


@dataclass(frozen=True)
class Pass:
    """A pass over `batches` that moves `trained` and leaves `fixed` alone; `name` (train, val) heads its columns.

    `step(images, labels)` does one step and returns what `descend` gave it.
    """

    name: str
    batches: Batches
    step: Callable[[Tensor, Tensor], Tensor]
    trained: list[nn.Parameter]
    fixed: list[nn.Parameter] = field(default_factory=list)

    def prepare(self) -> None:
        """Fixed parameters leave the graph: their gradients, half of a step's work, are never computed."""
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for parameter in self.fixed:
            parameter.requires_grad_(False)


@dataclass
class Position:
    """Where training stands: finished epochs, then finished passes of the next one, then steps of its next pass."""

    history: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    steps: int = 0
    loss: float = 0.0  # summed over the steps
    top1: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position = Position(**state)
        if not isinstance(position.history, list) or not isinstance(position.row, dict):
            raise TypeError
        vars(self).update(vars(position))

    def add(self, loss: float, top1: float) -> None:
        self.steps, self.loss, self.top1 = self.steps + 1, self.loss + loss, self.top1 + top1

    def means(self) -> dict[str, float]:
        return {"loss": self.loss / self.steps, "top1": self.top1 / self.steps}

    def end_pass(self, name: str) -> None:
        self.row |= {f"{name}_{key}": mean for key, mean in self.means().items()}
        self.passes, self.steps, self.loss, self.top1 = self.passes + 1, 0, 0.0, 0.0

    def end_epoch(self, columns: dict[str, Any]) -> None:
        self.history.append(self.row | columns)
        self.row, self.passes = {}, 0

    def is_best(self) -> bool:
        """Whether no epoch was more accurate than the last one, on val or as long as there is no such pass on train."""
        column = "val_top1" if "val_top1" in self.history[-1] else "train_top1"
        return self.history[-1][column] >= max(row.get(column, 0.0) for row in self.history)


class Training:
    """What `fit` goes on from: a position and the parts' state, kept in runs/<run>/<stage>.pt."""

    def __init__(
        self, run: Run, stage: str, configuration: Mapping[str, Any], parts: Mapping[str, Any]
    ) -> None:
        self.stage, self.configuration, self.position = stage, configuration, Position()
        self.parts = {"position": self.position, **parts}
        self.path = run.work / f"{stage}.pt"
        self.rank, self.world = rank_and_world()
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Goes to where the last checkpoint was written, if it serves."""
        different = f"processes have other data, costs or recipes, {SHARED}"
        self._agree(json.dumps(self.configuration, sort_keys=True), different)
        if self.rank > 0:
            dist.barrier()  # the first process alone decides whether the checkpoint serves
        load_checkpoint(self.path, self.configuration, self.parts)
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        self._agree(
            json.dumps(vars(self.position)), f"processes would go on from different steps, {SHARED}"
        )

    def _agree(self, value: Any, sentence: str) -> None:
        """Raises RuntimeError on every process where one of them has another value."""
        if self.world == 1:
            return
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise RuntimeError(f"{self.stage}: {sentence}")

    def check_finite(self) -> None:
        """Raises FloatingPointError where a step has spoilt the state: what is saved can be gone on from."""
        if name := first_not_finite(self._state()):
            raise self.not_finite(name)

    def not_finite(self, what: str) -> FloatingPointError:
        where = f"{self.stage}, epoch {len(self.position.history)}: {what} is not finite at step {self.position.steps}"
        kept = (
            f"{self.path.name} is from before it"
            if self.path.exists()
            else "there is no checkpoint yet"
        )
        return FloatingPointError(f"{where} ({kept}); lower lr and rerun")

    def _state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def overdue(self) -> bool:
        return time.monotonic() - self.saved > CHECKPOINT_SECONDS

    def save(self) -> None:
        """Keeps a checkpoint; that of the best epoch first: a kill between the two repeats the epoch."""
        if self.rank == 0:
            state = self._state()
            if self.position.history and not self.position.row and self.position.is_best():
                save_checkpoint(self.path.with_suffix(".best.pt"), self.configuration, **state)
            keep_previous(self.path)
            save_checkpoint(self.path, self.configuration, **state)
        self.saved = time.monotonic()


class Display:
    """What a training shows of itself: a progress bar, TensorBoard, history.csv; nothing but on the first process."""

    def __init__(self, run: Run, stage: str, position: Position, lengths: list[list[int]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.run, self.stage, self.first = run, stage, rank_and_world()[0] == 0
        start = len(position.history)
        behind = sum(map(sum, lengths[:start])) + position.steps
        if start < len(lengths):
            behind += sum(lengths[start][: position.passes])
        self.bar = progress(sum(map(sum, lengths)), stage, initial=behind, disable=not self.first)
        self.board = None
        if self.first:
            with writing(run.work / "tensorboard"):
                self.board = SummaryWriter(run.work / "tensorboard" / stage, purge_step=start)
        if position.history:
            self._write_history(position)  # a kill may have come between the checkpoint and this

    def step(self, position: Position) -> None:
        values = position.means()
        if position.history and "expected_cost" in position.history[-1]:
            values["cost"] = position.history[-1]["expected_cost"]
        self.bar.set_postfix(values, refresh=False)
        self.bar.update()

    def epoch(self, position: Position) -> None:
        self._write_history(position)
        if self.board:
            with writing(self.run.work / "tensorboard"):
                for name, value in position.history[-1].items():
                    self.board.add_scalar(name, value, len(position.history) - 1)

    def _write_history(self, position: Position) -> None:
        if self.first:
            self.run.write_history(self.stage, position.history)

    def close(self) -> None:
        self.bar.close()
        if self.board:
            with writing(self.run.work / "tensorboard"):
                self.board.close()


def fit(
    run: Run,
    stage: str,
    configuration: Mapping[str, Any],
    parts: Mapping[str, Any],
    epochs: int,
    passes: Callable[[int], list[Pass]],
    finish: Callable[[], dict[str, Any]] = dict,
) -> list[dict[str, Any]]:
    """Runs the passes of every epoch; returns a history row for each, with the columns that `finish` adds at its end.

    `parts` (with state_dict and load_state_dict) are all that training changes. They are kept in runs/<run>/<stage>.pt
    after every epoch, every two minutes within one, and on Ctrl-C or SIGTERM; the same call goes on from there.
    <stage>.previous.pt is the checkpoint before, <stage>.best.pt that of the epoch with the highest accuracy on val, or
    on train as long as there is no pass over val. `configuration` holds the seed and all that decides the outcome.
    Raises FloatingPointError, naming the step, where a loss or a part's state is not finite: no checkpoint holds such.
    Raises OSError with one sentence where the disk is full.
    """
    keep_freed_memory()
    warn_of_long_spins()
    with alone(run), Interruption(stage) as interruption:
        training = Training(run, stage, configuration, parts)
        training.resume()
        position = training.position
        lengths = [[len(one.batches) for one in passes(epoch)] for epoch in range(epochs)]
        display = Display(run, stage, position, lengths)
        for epoch in range(len(position.history), epochs):
            position.row.setdefault("epoch", epoch)
            for number, one in enumerate(passes(epoch)):
                if number < position.passes:
                    continue
                one.prepare()
                clock = time.perf_counter()
                for images, labels in one.batches.epoch(epoch, start=position.steps):
                    torch.manual_seed(
                        seed_of(configuration["seed"], stage, epoch, number, position.steps)
                    )
                    try:
                        # Where the host waits for the device; a search draws its candidates from alpha right behind it.
                        loss, top1 = one.step(images, labels).tolist()
                    except FloatingPointError as error:
                        raise training.not_finite(str(error)) from None
                    if not math.isfinite(loss):
                        raise training.not_finite(f"the {one.name} loss")
                    position.add(loss, top1)
                    position.row["seconds"] = (
                        position.row.get("seconds", 0.0) + time.perf_counter() - clock
                    )
                    clock = time.perf_counter()
                    display.step(position)
                    stopping = interruption.asked and training.rank == 0
                    if stopping or training.overdue():
                        training.check_finite()
                        training.save()
                    if stopping:
                        interruption.obey(training.path)
                position.end_pass(one.name)
            training.check_finite()
            position.end_epoch(finish())
            training.save()
            display.epoch(position)
        display.close()
    return position.history


def alone(run: Run) -> AbstractContextManager[None]:
    """`Run.alone` for the first of several processes that train together; the others follow it."""
    return run.alone() if rank_and_world()[0] == 0 else nullcontext()


def check_training(seed: Any, batch_size: int, splits: Mapping[str, int]) -> None:
    """Raises ValueError with one sentence where there can be no training with this seed and batches.

    `splits` are the numbers of images by name. Batch norm learns nothing of a single image, so each
    of the processes that train needs two of every batch.
    """
    if type(seed) is not int:
        raise ValueError(f"seed is {seed!r}, expected a whole number")
    for split, images in splits.items():
        if batch_size > images:
            few = f"{split} has {images:,} images: set batch_size to at most that"
            raise ValueError(f"batch_size is {batch_size:,}, but {few}")
    world = rank_and_world()[1]
    devices = f"{world} devices" if world > 1 else "1 device"
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared equally by {devices}")
    if batch_size < 2 * world:
        few = "is less than the two images a process that batch norm needs"
        wrong = f"batch_size {batch_size} on {devices} {few}"
        raise ValueError(f"{wrong}: set batch_size to at least {2 * world} or lower devices")


def descend(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    parameters: list[nn.Parameter],
    penalty: Tensor | float = 0.0,
) -> Tensor:
    """Computes the gradients of loss + penalty; returns the loss and the share of correct predictions as one tensor.

    Over several processes, gradients and values are averaged by one all-reduce; parameters that took no part in the
    loss have no gradient and do not travel. Batch norm sees the images of its own process only.
    """
    (loss + penalty).backward()
    correct = logits.detach().argmax(dim=1) == labels
    outcome = torch.stack([loss.detach().float(), correct.float().mean()])
    if (world := rank_and_world()[1]) > 1:
        tensors = [*(p.grad for p in parameters if p.grad is not None), outcome]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / world).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(
            tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        )
    return outcome


def fused_sgd(
    parameters: list[nn.Parameter], recipe: SearchRecipe | RetrainRecipe
) -> torch.optim.SGD:
    """SGD as one kernel over the parameters that have a gradient.

    Momentum starts at zero everywhere, which is the same as without: the kernel refuses parameters with and without
    momentum side by side, and a sampled step leaves most without a gradient.
    """
    rates = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(parameters, **rates, fused=True)
    for parameter in parameters if recipe.momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, lr_min: float, warmup: int = 0
) -> LambdaLR:
    """Per step: linear from `lr_min` over `warmup` steps, then half a cosine down to `lr_min` at `steps`."""
    floor = lr_min / optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return floor + (1 - floor) * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)
