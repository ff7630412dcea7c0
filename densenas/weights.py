"""Tensors in files: read only where a file is whole, and given to a network only where they fit it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_saved(path: Path, mapped: bool = False) -> Any:
    """What torch.save wrote, on the CPU; ValueError with one sentence where it is damaged or holds code.

    `mapped` leaves tensors in the file until they are used, and does not look whether they are damaged.
    """
    damaged = ValueError(f"{path} is damaged or holds more than weights, it was not read")
    try:
        if not mapped and zipfile.is_zipfile(path):  # not before PyTorch 1.6
            with zipfile.ZipFile(path) as archive:
                # PyTorch itself would read flipped bits as weights.
                if archive.testzip():
                    raise damaged
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (MemoryError, PermissionError):
        raise
    except Exception:  # a damaged or foreign file makes the unpickler raise nearly anything
        raise damaged from None


def read_state(path: Path) -> Mapping[str, Tensor]:
    """A stored state dict, on the CPU; FileNotFoundError or ValueError with one sentence for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}, the weights of its network")
    state = read_saved(path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict, found a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str):
            found = f"{key!r} is not the name of an entry"
            raise ValueError(f"{path}: expected a state dict, but {found}")
        if not isinstance(value, Tensor):
            found = f"found a {type(value).__name__} as {key[:80]!r}"
            raise ValueError(f"{path}: expected a state dict with nothing but tensors, {found}")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            other = "is no plain tensor, but sparse, quantized or empty"
            raise ValueError(f"{path}: {key[:80]!r} {other}")
    return state


def fill(net: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Gives a network the weights read from `path`, in any floating-point precision.

    Raises ValueError naming the entry where they do not fit `what` the network was built from, or are not finite.
    """
    expected = net.state_dict()
    absent = [key for key in expected if key not in state]
    # Weights of PyTorch before 0.4.1 count no batches.
    missing = [key for key in absent if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    if missing:
        raise ValueError(f"{path} does not fit {what}: it lacks {_some(missing)}")
    if unexpected:
        raise ValueError(f"{path} does not fit {what}: there is no place for {_some(unexpected)}")
    for key, value in state.items():
        wanted = expected[key]
        if value.shape != wanted.shape:
            shapes = f"the shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
            raise ValueError(f"{path} does not fit {what}: {key!r} has {shapes}")
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            kinds = f"{value.dtype}, expected {wanted.dtype}"
            raise ValueError(f"{path} does not fit {what}: {key!r} holds {kinds}")
        if not value.to(wanted.dtype).isfinite().all():
            raise ValueError(f"{path}: {key!r} holds numbers that are not finite")
    net.load_state_dict(state)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0][:80]!r}{more}"
