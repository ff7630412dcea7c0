"""The training engine: passes over data that repeat exactly, survive a kill at any step, and run on many processes.

All random numbers of a step are a function of (seed, epoch, pass, step), and so are its images: what a checkpoint
needs besides weights is only where it was written, and a run that goes on from one ends with the same bytes.
`torchrun … -m densenas.engine RUN STAGE` runs a stage on several machines, `launch` on several devices of this one.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pkgutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim.lr_scheduler import LambdaLR

import densenas
from densenas.config import RetrainRecipe, SearchRecipe, atomic, refuse
from densenas.loading import Batches, rank_and_world, seed_of
from densenas.run import Run, RunConfig, pick_device, progress

PRECISIONS = ("fp32", "tf32", "bf16")
CHECKPOINT_SECONDS = 120.0  # so much work is lost at most, however long an epoch
SHARED = "every machine needs the same runs/ and reports/ folders"
STAGES = {"03-search": "densenas.search:search_run", "05-retrain": "densenas.train:retrain_run"}


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


@dataclass
class Position:
    """Where training stands: finished epochs, then finished passes of the next one, then steps of its next pass."""

    history: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    steps: int = 0
    loss: float = 0.0  # summed over the steps
    top1: float = 0.0

    def add(self, loss: float, top1: float) -> None:
        self.steps, self.loss, self.top1 = self.steps + 1, self.loss + loss, self.top1 + top1

    def means(self) -> dict[str, float]:
        return {"loss": self.loss / self.steps, "top1": self.top1 / self.steps}


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
    after every epoch, and every two minutes within one; the same call goes on from there. <stage>.best.pt is that of
    the epoch with the highest accuracy on val, or on train as long as there is no pass over val. `configuration` holds
    the seed and all that decides the outcome. Raises FloatingPointError, naming the step, where a loss is not finite.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    keep_freed_memory()
    warn_of_long_spins()
    path, (rank, world) = run.work / f"{stage}.pt", rank_and_world()
    position, saved = Position(), time.monotonic()

    def agree(value: Any, sentence: str) -> None:
        """Refuses on every process where one of them has another value."""
        values: list[Any] = [None] * world
        if world > 1:
            dist.all_gather_object(values, value)
            refuse(any(other != values[0] for other in values), f"{stage}: {sentence}")

    agree(json.dumps(configuration, sort_keys=True), f"processes have other data, costs or recipes, {SHARED}")
    if rank > 0:
        dist.barrier()  # the first process alone decides whether the checkpoint serves
    if checkpoint := load_checkpoint(path, configuration):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        position = Position(**checkpoint["position"])
    if world > 1 and rank == 0:
        dist.barrier()
    agree(json.dumps(vars(position)), f"processes would go on from different steps, {SHARED}")

    def save(where: Path) -> None:
        nonlocal saved
        saved = time.monotonic()
        if rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(where, configuration, position=vars(position), **state)

    start = len(position.history)
    lengths = [[len(one.batches) for one in passes(epoch)] for epoch in range(epochs)]
    behind = sum(map(sum, lengths[:start])) + sum(sum(n[: position.passes]) for n in lengths[start : start + 1])
    bar = progress(sum(map(sum, lengths)), stage, initial=behind + position.steps, disable=rank > 0)
    board = SummaryWriter(run.work / "tensorboard" / stage, purge_step=start) if rank == 0 else None
    if board and position.history:
        run.write_history(stage, position.history)  # a kill may have come between the checkpoint and this
    for epoch in range(start, epochs):
        position.row.setdefault("epoch", epoch)
        last = position.history[-1] if position.history else {}
        cost = {"cost": last["expected_cost"]} if "expected_cost" in last else {}
        for number, one in enumerate(passes(epoch)):
            if number < position.passes:
                continue
            # Fixed parameters are outside the graph: their gradients, half of a step's work, are never computed.
            for parameters, wanted in ((one.trained, True), (one.fixed, False)):
                for parameter in parameters:
                    parameter.requires_grad_(wanted)
            clock = time.perf_counter()
            for images, labels in one.batches.epoch(epoch, start=position.steps):
                torch.manual_seed(seed_of(configuration["seed"], stage, epoch, number, position.steps))
                # Where the host waits for the device; a search draws its candidates from alpha right behind it.
                loss, top1 = one.step(images, labels).tolist()
                if not math.isfinite(loss):
                    where = f"{stage}, epoch {epoch}: the {one.name} loss is not finite at step {position.steps}"
                    kept = f"{path.name} is from before it" if path.exists() else "there is no checkpoint yet"
                    raise FloatingPointError(f"{where} ({kept}); lower lr and rerun")
                position.add(loss, top1)
                position.row["seconds"] = position.row.get("seconds", 0.0) + time.perf_counter() - clock
                clock = time.perf_counter()
                bar.set_postfix(position.means() | cost, refresh=False)
                bar.update()
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save(path)
            position.row |= {f"{one.name}_{key}": mean for key, mean in position.means().items()}
            position.passes, position.steps, position.loss, position.top1 = position.passes + 1, 0, 0.0, 0.0
        position.history.append(position.row | finish())
        position.row, position.passes = {}, 0
        column = "val_top1" if "val_top1" in position.history[-1] else "train_top1"
        if position.history[-1][column] >= max(row.get(column, 0.0) for row in position.history):
            save(path.with_suffix(".best.pt"))  # before the other: a kill between the two repeats the epoch
        save(path)
        if board:
            run.write_history(stage, position.history)
            for name, value in position.history[-1].items():
                board.add_scalar(name, value, epoch)
    bar.close()
    return position.history


def descend(
    loss: Tensor, logits: Tensor, labels: Tensor, parameters: list[nn.Parameter], penalty: Tensor | float = 0.0
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
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])
    return outcome


def fused_sgd(parameters: list[nn.Parameter], recipe: SearchRecipe | RetrainRecipe) -> torch.optim.SGD:
    """SGD as one kernel over the parameters that have a gradient.

    Momentum starts at zero everywhere, which is the same as without: the kernel refuses parameters with and without
    momentum side by side, and a sampled step leaves most without a gradient.
    """
    rates = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(parameters, **rates, fused=True)
    for parameter in parameters if recipe.momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(optimizer: torch.optim.Optimizer, steps: int, lr_min: float, warmup: int = 0) -> LambdaLR:
    """Per step: linear from `lr_min` over `warmup` steps, then half a cosine down to `lr_min` at `steps`."""
    floor = lr_min / optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return floor + (1 - floor) * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)


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
def computing_on(device: str, precision: str, deterministic: bool = False) -> Iterator[torch.device]:
    """The device to compute on; inside, PyTorch's generators, TF32 and determinism are as a repeatable result needs."""
    refuse(precision not in PRECISIONS, f"precision '{precision}' is unknown, known are {', '.join(PRECISIONS)}")
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


def launch(function: Callable[..., Any], devices: int, *arguments: Any, **settings: Any) -> None:
    """Calls the function here or, for `devices` > 1, in as many processes that train together on this machine.

    Raises RuntimeError with one sentence where a process is lost; a checkpoint serves any number of devices.
    """
    _refuse_one_alone(settings.get("device", "auto"), devices)
    most = torch.cuda.device_count() if torch.cuda.is_available() else devices
    expected = "at least 1" + f" and at most {most}" * (devices > most)
    refuse(not 1 <= devices <= most, f"devices is {devices}, expected {expected}")
    if devices == 1:
        function(*arguments, **settings)
        return
    plan = LaunchConfig(
        1, 1, devices, run_id=f"densenas-{time.time_ns()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="spawn",
    )  # fmt: skip
    try:
        elastic_launch(plan, together)(function, arguments, settings)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reason = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        raise RuntimeError(
            f"process {rank} of {devices} ended ({reason.strip().splitlines()[-1]});"
            " the same call goes on from the last checkpoint, with any number of devices"
        ) from None


def _refuse_one_alone(device: str, devices: int) -> None:
    wrong = f"devices is {devices}, but device '{device}' is one alone: expected auto or cuda"
    refuse(devices > 1 and ":" in device, wrong)


@record
def together(function: Callable[..., Any], arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
    """The function as one of the processes that torchrun or `launch` started."""
    device = settings.get("device", "auto")
    _refuse_one_alone(device, int(os.environ["WORLD_SIZE"]))
    if gpu := torch.cuda.is_available() and device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    # More threads than cores would make a small network many times slower.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        function(*arguments, **settings)
    finally:
        dist.destroy_process_group()


def save_checkpoint(path: Path, configuration: Mapping[str, Any], **state: Any) -> None:
    """Writes atomically: a kill or a full disk leaves the old checkpoint or the new one."""
    with atomic(path) as partial:
        torch.save({"configuration": json.dumps(configuration, sort_keys=True), **state}, partial)


def load_checkpoint(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint, if there is one of this configuration. One of another is refused, with what differs, and kept."""
    if not path.exists():
        return None
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    before, now = json.loads(checkpoint["configuration"]), json.loads(json.dumps(configuration))
    if before == now:
        return checkpoint
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    print(f"{path.name} is of another configuration ({', '.join(changed)} differ): starting anew, it is kept as .old")
    path.replace(path.with_suffix(".old"))
    return None


if __name__ == "__main__":
    name, stage = sys.argv[1:3]
    parameters = RunConfig.load(*sys.argv[3:] or [f"data/configs/{name}.yml"]).parameters(name)[stage]
    del parameters["devices"]  # torchrun decides
    together(pkgutil.resolve_name(STAGES[stage]), (parameters.pop("run"),), parameters)
