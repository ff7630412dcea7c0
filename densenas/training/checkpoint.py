"""Checkpoints of a training: written whole, believed only when whole and finite, the one before kept beside each."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densenas.files import atomic
from densenas.weights import read_saved


def previous_of(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_suffix(".previous.pt")


def save_checkpoint(path: Path, configuration: Mapping[str, Any], **state: Any) -> None:
    """Writes atomically: a kill or a full disk leaves the old checkpoint or the new one.

    Raises OSError with one sentence where it cannot be written.
    """
    content = {"configuration": json.dumps(configuration, sort_keys=True), **state}
    with atomic(path) as partial:
        torch.save(content, partial)


def keep_previous(path: Path) -> None:
    """Keeps the checkpoint that is about to be replaced, if there is one; at no moment is `path` missing."""
    if not path.exists():
        return
    with atomic(previous_of(path)) as partial:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A whole checkpoint, on the CPU, `configuration` as a mapping.

    Raises ValueError with one sentence where it is damaged or holds values that are not finite.
    """
    checkpoint = read_saved(path)
    try:
        checkpoint["configuration"] = dict(json.loads(checkpoint["configuration"]))
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{path} is damaged or no checkpoint of a training") from None
    if name := first_not_finite(checkpoint):
        raise ValueError(f"{path} holds values that are not finite ({name})")
    return checkpoint


def digest(configuration: Any) -> str:
    """Tells one training from every other: two with the same digest end with the same bytes."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def load_checkpoint(
    path: Path, configuration: Mapping[str, Any], parts: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Puts the last checkpoint of this configuration into `parts` and returns it; None where there is none.

    A damaged one is set aside as .damaged and the one before takes its place; one of another configuration is set
    aside as .old. Either is said, with what happens now. Raises ValueError where a folder is in the way.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, a checkpoint belongs there: move it away")
    previous = previous_of(path)
    if not path.exists():
        previous.unlink(missing_ok=True)  # whoever deleted a checkpoint wanted to start anew
        return None
    fresh = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    while path.exists():
        try:
            checkpoint = read_checkpoint(path)
            if changed := _differences(checkpoint["configuration"], configuration):
                differ = f"({', '.join(changed)} differ): starting anew, it is kept as .old"
                print(f"{path.name} is of another configuration {differ}")
                path.replace(path.with_suffix(".old"))
                previous.unlink(missing_ok=True)
                break
            restore(parts, checkpoint, path)
            return checkpoint
        except ValueError as error:
            path.replace(path.with_suffix(".damaged"))
            onward = "starting anew"
            if previous.exists():
                previous.replace(path)
                onward = "going on from the checkpoint before it"
            print(f"{error}, it is kept as {path.with_suffix('.damaged').name}: {onward}")
    restore(parts, fresh, path)
    return None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two configurations differ."""
    now = json.loads(json.dumps(now))
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def restore(parts: Mapping[str, Any], checkpoint: Mapping[str, Any], path: Path) -> None:
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
