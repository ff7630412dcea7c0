"""Several processes that train together: `launch` starts them on this machine, torchrun on many; and their signals."""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]  # no stub
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessException,
    ProcessExitedException,
    start_processes,
)

from densenas.files import one_line
from densenas.ranks import rank_and_world
from densenas.runs.progress import epoch_may_have_ended
from densenas.threads import cores
from densenas.training.device import pick_device

GRACE_SECONDS = 10.0  # for the others to end by themselves once one process is lost
GOES_ON = "goes on from the last checkpoint, with any number of devices"
STOPPED = f"stopped; the same command {GOES_ON}"
# Errors that say themselves what to do; to call again would not mend them.
SENTENCES = ("ValueError", "FileNotFoundError", "FloatingPointError", "OSError")


def check_devices(device: str, devices: int) -> None:
    """Raises ValueError with one sentence where this machine has no such device, or not one for each process."""
    _check_one_each(device, devices)
    most, what = cores(), "processor cores"
    if pick_device(device).type == "cuda":
        most, what = torch.cuda.device_count(), "GPUs"
    if not 1 <= devices <= most:
        expected = f"expected at least 1 and at most {most}, the {what} of this machine"
        raise ValueError(f"devices is {devices}, {expected}")


def _check_one_each(device: str, world: int) -> None:
    if world > 1 and ":" in device:
        alone = f"device '{device}' is one alone: expected auto or cuda"
        raise ValueError(f"devices is {world}, but {alone}")


def launch(function: Callable[..., Any], devices: int, device: str, *arguments: Any) -> None:
    """Calls the function here or, for `devices` > 1, in as many processes that train together on this machine.

    `device` is what kind they compute on, as the function's arguments say it, too. Raises what a process raised where
    that says what to do (ValueError and the like), RuntimeError with one sentence where one is lost; a checkpoint
    serves any number of devices.
    """
    check_devices(device, devices)
    if devices == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory(prefix="densenas-") as folder:
        call = (devices, device, folder, function, arguments)
        context = start_processes(_member, call, devices, join=False)
        try:
            while not context.join(timeout=1, grace_period=GRACE_SECONDS):
                epoch_may_have_ended()
        except KeyboardInterrupt:
            _end(context)
            raise
        except ProcessException as error:
            raise _failure(error, devices, Path(folder)) from None


def _end(context: ProcessContext) -> None:
    """Ends all processes, with time for the first to keep a checkpoint."""
    for process in context.processes:
        process.terminate()
    for process in context.processes:
        process.join(GRACE_SECONDS)
        process.kill()


def _failure(error: ProcessException, devices: int, folder: Path) -> Exception:
    """What to raise for processes of which at least one has failed: the first failure, the others follow from it."""
    failures = [_Failure(**json.loads(path.read_text())) for path in folder.glob("failed-*")]
    lost = isinstance(error, ProcessExitedException) and error.exit_code < 0
    if lost or not failures:
        ended = str(error).strip().splitlines()[-1]
        return RuntimeError(
            f"process {error.error_index} of {devices} ended ({ended}); the same call {GOES_ON}"
        )
    first = min(failures, key=lambda failure: failure.moment)
    if first.kind in SENTENCES:
        return getattr(builtins, first.kind)(first.sentence)
    return RuntimeError(
        f"process {first.rank} of {devices} ended ({first.kind}: {first.sentence});"
        f" the same call {GOES_ON}"
    )


@dataclass(frozen=True)
class _Failure:
    """What a process of `launch` raised."""

    moment: float  # in seconds, by a clock that all processes share
    rank: int
    kind: str
    sentence: str


def _member(
    rank: int,
    world: int,
    device: str,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """The function as one of the processes that `launch` started; what it raises is kept in `folder`."""
    # Not to outlive whoever launched it; a shell may have told it to ignore SIGINT, which PyTorch would send.
    _prctl_pr_set_pdeathsig(signal.SIGTERM)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
    # They meet over a file and the loopback device. Torchrun's way would ask a name server for this machine's own name,
    # which in a container nobody may know, and wait for the answer again and again.
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    try:
        meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": world}
        with _group(device, **meeting):
            function(*arguments)
    except Exception as error:
        failure = _Failure(time.monotonic(), rank, type(error).__name__, one_line(error))
        Path(folder, f"failed-{rank}").write_text(json.dumps(vars(failure)), encoding="utf-8")
        raise


@contextmanager
def exiting() -> Iterator[None]:
    """Around what a command line does: an error or Ctrl-C ends the process with one sentence."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(STOPPED)


@record
def join(function: Callable[..., Any], device: str, *arguments: Any) -> None:
    """The function as one of the processes that torchrun started; where it fails, the last line says what to do."""
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        _check_one_each(device, int(world))
        check_devices(device, int(os.environ["LOCAL_WORLD_SIZE"]))
        with _group(device):
            function(*arguments)
    except Exception as error:
        kind = type(error).__name__
        if kind in SENTENCES:
            # Torchrun adds many lines of its own, the sentence shall be found among them.
            sys.tracebacklimit = 0
            raise
        ended = f"process {rank} of {world} ended ({kind}: {one_line(error)})"
        raise RuntimeError(f"{ended}; the same command {GOES_ON}") from error


@contextmanager
def _group(device: str, **meeting: Any) -> Iterator[None]:
    """This process as one of several; `meeting` is where they meet, torchrun's environment where nothing is given."""
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **meeting)
    # More threads than cores would make a small network many times slower.
    torch.set_num_threads(max(1, cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    yield
    dist.destroy_process_group()  # not after a failure: it could wait for the others for ever


class Interruption:
    """Ctrl-C and a polite kill during a training: noted, and obeyed by the first process between two steps.

    So nothing is lost. The other processes wait for the first to be gone; the same signal once more acts at once.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.asked: signal.Signals | None = None
        self._owner = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        if os.getpid() != self._owner:
            # A decoding worker, forked off: Ctrl-C is for the training, which still needs it.
            if number != signal.SIGINT:
                os._exit(128 + number)
        elif self.asked == number:
            self._obey(number)
        else:
            self.asked = signal.Signals(number)

    def _obey(self, number: int) -> None:
        self.asked = None
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def obey(self, kept: Path) -> None:
        """Lets the noted signal act, now that a checkpoint is kept."""
        if self.asked is None:
            return
        goes_on = "the same call goes on from this step"
        print(f"{self.what} was interrupted, {kept.name} is written: {goes_on}", flush=True)
        self._obey(self.asked)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._restore()
        if self.asked and kind is None:  # behind the last step; whoever called may have more to do
            signal.raise_signal(self.asked)
        if self.asked and kind is not None and issubclass(kind, Exception):
            # What an interrupted step, worker or peer raises is no news.
            rank, world = rank_and_world()
            end = f"{self.what} was interrupted; the same call goes on from the last checkpoint"
            if world > 1:
                why = "because another one did or on demand"
                end = f"process {rank} of {world} was ended, {why}; the same call {GOES_ON}"
            print(f"\n{end}", file=sys.stderr, flush=True)
            signal.raise_signal(self.asked)
