"""The device to compute on, and how PyTorch computes there."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import densenas

PRECISIONS = ("fp32", "tf32", "bf16")


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is a CUDA device, or else the CPU; raises ValueError for a device that is not there."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        # One for each process of `launch` and torchrun.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = "cpu" if device == "auto" else device
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device '{device}' cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    if where.type == "meta":
        raise ValueError("device 'meta' computes nothing: expected auto, cpu, cuda, cuda:1, …")
    return where


def keep_freed_memory() -> None:
    """glibc would give the activations of every step back to the system, and get them again page by page."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def warn_of_long_spins() -> None:
    """Where PyTorch was imported before this package, its threads wait in the slow way."""
    if densenas.SPINS_FOR_LONG and torch.get_num_threads() > 1:
        warnings.warn(
            "torch was imported before densenas: beside other busy processes this can be many"
            " times slower; import densenas first, or set GOMP_SPINCOUNT=5000",
            stacklevel=3,
        )


@contextmanager
def computing_on(
    device: str, precision: str, deterministic: bool = False
) -> Iterator[torch.device]:
    """The device to compute on; inside, PyTorch's generators, TF32 and determinism are as a repeatable result needs."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is unknown, known are {', '.join(PRECISIONS)}")
    where = pick_device(device)
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    forbidden = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            torch.use_deterministic_algorithms(deterministic or forbidden)
            yield where
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
            torch.use_deterministic_algorithms(forbidden)
