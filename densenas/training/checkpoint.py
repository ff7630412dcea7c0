"""Checkpoints of a training: written whole, believed only when whole and finite, the one before kept beside each."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from densenas.files import atomic
from densenas.ranks import rank_and_world
from densenas.runs.run import Run
from densenas.weights import read_saved

CHECKPOINT_SECONDS = 120.0  # so much work is lost at most, however long an epoch

Row = dict[str, Any]  # of a history: column → number


class Part(Protocol):
    """What a checkpoint holds: a network, an optimiser, and whatever else keeps and takes back its state like these."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class Position:
    """Where a training stands: finished epochs, then finished passes of the next one, then steps of its next pass."""

    history: list[Row] = field(default_factory=list)
    row: Row = field(default_factory=dict)  # of the epoch that is not finished
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

    def add(self, loss: float, top1: float, seconds: float) -> None:
        self.steps += 1
        self.loss += loss
        self.top1 += top1
        self.row["seconds"] = self.row.get("seconds", 0.0) + seconds

    def means(self) -> dict[str, float]:
        return {"loss": self.loss / self.steps, "top1": self.top1 / self.steps}

    def end_pass(self, name: str) -> None:
        for key, mean in self.means().items():
            self.row[f"{name}_{key}"] = mean
        self.passes += 1
        self.steps, self.loss, self.top1 = 0, 0.0, 0.0

    def end_epoch(self, columns: Row) -> None:
        self.history.append(self.row | columns)
        self.row, self.passes = {}, 0

    def is_best(self) -> bool:
        """Whether no epoch was more accurate than the last one, on val or as long as there is no such pass on train."""
        column = "val_top1" if "val_top1" in self.history[-1] else "train_top1"
        return self.history[-1][column] >= max(row.get(column, 0.0) for row in self.history)


class Checkpoint:
    """What a training goes on from: its position and the state of its parts, in runs/<run>/<stage>.pt.

    The first of several processes writes it, all of them read it. `configuration` is all that decides the outcome.
    """

    def __init__(
        self, run: Run, stage: str, configuration: Mapping[str, Any], parts: Mapping[str, Part]
    ) -> None:
        self.stage = stage
        self.configuration = configuration
        self.position = Position()
        self.parts: dict[str, Part] = {"position": self.position, **parts}
        self.path = run.work / f"{stage}.pt"
        self.previous = self.path.with_suffix(".previous.pt")
        self.rank, self.world = rank_and_world()
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Puts position and parts to where the last checkpoint was written, if it serves.

        Raises RuntimeError where the processes would do different things.
        """
        configuration = json.dumps(self.configuration, sort_keys=True)
        self._agree(configuration, "processes have other data, costs or recipes")
        if self.rank > 0:
            dist.barrier()  # the first process alone decides whether the checkpoint serves
        self._load()
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        position = json.dumps(vars(self.position))
        self._agree(position, "processes would go on from different steps")

    def _agree(self, value: str, sentence: str) -> None:
        """Raises RuntimeError on every process where one of them has another value."""
        if self.world == 1:
            return
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            same = "every machine needs the same runs/ and reports/ folders"
            raise RuntimeError(f"{self.stage}: {sentence}, {same}")

    def _load(self) -> None:
        """Puts the last checkpoint of this configuration into the parts; without one they stay as they are.

        A damaged one is set aside as .damaged and the one before takes its place; one of another configuration is set
        aside as .old. Either is said, with what happens now. Raises ValueError where a folder is in the way.
        """
        path = self.path
        if path.is_dir():
            raise ValueError(f"{path} is a folder, a checkpoint belongs there: move it away")
        if not path.exists():
            # Whoever deleted a checkpoint wanted to start anew.
            self.previous.unlink(missing_ok=True)
            return
        fresh = copy.deepcopy(self._state())
        while path.exists():
            try:
                checkpoint = read_checkpoint(path)
                if changed := _differences(checkpoint["configuration"], self.configuration):
                    print(
                        f"{path.name} is of another configuration ({', '.join(changed)} differ):"
                        " starting anew, it is kept as .old"
                    )
                    path.replace(path.with_suffix(".old"))
                    self.previous.unlink(missing_ok=True)
                    break
                restore(self.parts, checkpoint, path)
                return
            except ValueError as error:
                path.replace(path.with_suffix(".damaged"))
                onward = "starting anew"
                if self.previous.exists():
                    self.previous.replace(path)
                    onward = "going on from the checkpoint before it"
                print(f"{error}, it is kept as {path.with_suffix('.damaged').name}: {onward}")
        restore(self.parts, fresh, path)

    def check_finite(self) -> None:
        """Raises FloatingPointError with the name of what a step has spoilt; such a state must not be kept."""
        if name := first_not_finite(self._state()):
            raise FloatingPointError(name)

    def not_finite(self, what: str) -> FloatingPointError:
        """What to raise where `what` is not finite."""
        epoch, step = len(self.position.history), self.position.steps
        before = f"{self.path.name} is from before it"
        kept = before if self.path.exists() else "there is no checkpoint yet"
        return FloatingPointError(
            f"{self.stage}, epoch {epoch}: {what} is not finite at step {step} ({kept}); lower lr and rerun"
        )

    def _state(self) -> dict[str, dict[str, Any]]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def is_due(self) -> bool:
        return time.monotonic() - self.saved > CHECKPOINT_SECONDS

    def save(self) -> None:
        """Writes it; that of the best epoch first: a kill between the two repeats the epoch.

        A kill or a full disk leaves the old one or the new one; OSError with one sentence where it cannot be written.
        """
        if self.rank == 0:
            configuration = json.dumps(self.configuration, sort_keys=True)
            content = {"configuration": configuration, **self._state()}
            at_epochs_end = self.position.history and not self.position.row
            if at_epochs_end and self.position.is_best():
                with atomic(self.path.with_suffix(".best.pt")) as partial:
                    torch.save(content, partial)
            self._keep_previous()
            with atomic(self.path) as partial:
                torch.save(content, partial)
        self.saved = time.monotonic()

    def _keep_previous(self) -> None:
        """Keeps the one that is about to be replaced, if there is one; at no moment is `path` missing."""
        if not self.path.exists():
            return
        with atomic(self.previous) as partial:
            try:
                os.link(self.path, partial)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.path, partial)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A whole checkpoint, on the CPU, `configuration` as a mapping.

    Raises ValueError with one sentence where it is damaged or holds values that are not finite.
    """
    checkpoint = read_saved(path)
    checkpoint["configuration"] = _configuration(checkpoint, path)
    if name := first_not_finite(checkpoint):
        raise ValueError(f"{path} holds values that are not finite ({name})")
    return checkpoint


def read_configuration(path: Path) -> dict[str, Any]:
    """That of a checkpoint whose tensors are not read; ValueError with one sentence where there is none."""
    return _configuration(read_saved(path, mapped=True), path)


def _configuration(checkpoint: Any, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(checkpoint["configuration"]))
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{path} is damaged or no checkpoint of a training") from None


def digest(configuration: Any) -> str:
    """Tells one training from every other: two with the same digest end with the same bytes."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two configurations differ."""
    now = json.loads(json.dumps(now))
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def restore(parts: Mapping[str, Part], checkpoint: Mapping[str, Any], path: Path) -> None:
    """Gives every part its state; ValueError with one sentence where the state is not that of such parts."""
    for name, part in parts.items():
        try:
            state = checkpoint[name]
            if state.keys() != part.state_dict().keys():
                raise KeyError(name)
            part.load_state_dict(state)
            if isinstance(part, torch.optim.Optimizer):
                _check_shapes(part)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError):
            raise ValueError(
                f"{path} does not hold what such a training keeps as '{name}'"
            ) from None


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """PyTorch takes momentum of any shape, and fails at the next step."""
    for parameter, values in optimizer.state.items():
        for value in values.values():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of a tensor in a nested state that holds inf or nan; None where all are finite."""
    groups: dict[Any, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in _tensors(state):
        if tensor.is_floating_point() and tensor.numel():
            groups[tensor.device, tensor.dtype][name] = tensor
    for tensors in groups.values():
        # One wait for the device a group, not one a tensor.
        largest = torch.stack(torch._foreach_norm([*tensors.values()], math.inf))
        if not largest.isfinite().all():
            return [*tensors][largest.isfinite().tolist().index(False)]
    return None


def _tensors(state: Any, *way: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists, with the way there as its name."""
    if isinstance(state, Tensor):
        yield ".".join(map(str, way)), state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, *way, key)
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, *way, index)
