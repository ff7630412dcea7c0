"""The device to compute on, how PyTorch computes there, and how long it takes."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from densenas import threads
from densenas.files import one_line
from densenas.settings import Computing

SECONDS = 0.01  # of each timing


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
        raise ValueError(f"device '{device}' cannot be used here: {one_line(error)}") from None
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
    if threads.SPINS_FOR_LONG and torch.get_num_threads() > 1:
        warnings.warn(
            "torch was imported before densenas: beside other busy processes this can be many"
            " times slower; import densenas first, or set GOMP_SPINCOUNT=5000",
            stacklevel=3,
        )


@contextmanager
def computing_on(how: Computing) -> Iterator[torch.device]:
    """The device to compute on; inside, PyTorch's generators, TF32 and determinism are as a repeatable result needs."""
    device = pick_device(how.device)
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # PyTorch declares it by a string
    products = torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            precision = "tf32" if how.precision == "tf32" else "ieee"
            convolutions.fp32_precision = precision
            products.fp32_precision = precision
            torch.use_deterministic_algorithms(how.deterministic or deterministic)
            # Timers wait for the current device, and memory is pinned for it.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                yield device
        except torch.OutOfMemoryError as error:
            lower = "lower batch_size, or train on more devices"
            raise ValueError(
                f"{device} has too little memory: {lower} ({one_line(error)})"
            ) from None
        finally:
            convolutions.fp32_precision, products.fp32_precision = before
            torch.use_deterministic_algorithms(deterministic)


def milliseconds(module: Callable[[Tensor], Any], x: Tensor) -> float:
    """Milliseconds of a call without gradients, after a warm-up; waits for the device once, behind the last call."""
    # Imported behind this, or it warns of a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    names = {"module": module, "x": x}
    timer = Timer("module(x)", globals=names, num_threads=torch.get_num_threads())
    with torch.inference_mode(), computing_on(Computing(device=str(x.device))):
        return timer.timeit(max(3, int(SECONDS / timer.timeit(3).mean))).mean * 1e3
