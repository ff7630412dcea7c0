"""Latency on the user's own machine: of every op of a space, and of whole networks to judge their sum by."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from pydantic import Field, ValidationError
from torch import nn

from densenas.files import HOST, Strict, writing
from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import Layer, SearchSpace
from densenas.runs.progress import progress
from densenas.runs.provenance import processor
from densenas.timings import distinct, tabulate
from densenas.training.device import milliseconds, pick_device, warn_of_long_spins

T = TypeVar("T")


class Timing(Strict):
    """A line of latency.jsonl."""

    key: Layer
    ms: float = Field(gt=0)
    conditions: dict[str, Any]


def build(layer: Layer, space: SearchSpace) -> nn.Module:
    """The module of a layer as it stands in a derived network; a classifier's width is its number of classes."""
    op, in_channels, width, _, stride = layer
    norm = ops.batch_norm(affine=True, eps=space.bn_eps)
    if op == "stem":
        conv = ops.conv_norm(3, space.init_dim, norm, nn.ReLU6, kernel_size=3, stride=2)
        return conv.extend(
            ops.build_op(block.head, block.in_ch, block.out_ch, 1, norm) for block in space.stem
        )
    if op == "conv1_1":
        return ops.conv_norm(in_channels, width, norm, nn.ReLU6)
    if op == "classifier":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, width))
    return ops.build_op(op, in_channels, width, stride, norm)


def shuffled(items: Sequence[T], rounds: int, what: str) -> Iterator[tuple[int, T]]:
    """Each item once a round, with the round's number, in an order of its own, so that a drift favours none."""
    dice = random.Random(0)
    order = []
    for number in range(rounds):
        for item in dice.sample(items, len(items)):
            order.append((number, item))
    yield from progress(len(order), what, order)


def measure(
    space: SearchSpace,
    input_size: int,
    num_classes: int,
    log: Path,
    batch_size: int = 1,
    device: str = "auto",
    rounds: int = 12,
) -> CostTable:
    """Times every distinct op of a space (fp32, evaluation mode, channels last); gives a table in milliseconds.

    An op is one entry however often the space uses it: the fastest of `rounds` timings, since what else a machine does
    only adds. Each timing is appended to `log` as a JSON line; a killed measurement goes on behind the last whole line
    of the same conditions and host. A skip costs nothing, a derived network drops it; with `skip_reg` it is charged a
    tenth of its layer's first op, as in Mult-Adds. Raises ValueError or, where the log cannot be written, OSError with
    one sentence.
    """
    warn_of_long_spins()
    where = pick_device(device)
    conditions = {
        "input_size": input_size,
        "num_classes": num_classes,
        "batch_size": batch_size,
        **(_conditions(where) | space.code()),
    }
    found = distinct(space, input_size, num_classes)
    timed = found.timed
    # All machines of a kind say the same about themselves: what another host timed is never used.
    # Nor what another space's stem took, whose widths stand in no key.
    here = {**conditions, "host": HOST, "stem": [space.net_type, space.init_dim]}
    times = _logged(log, here)
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write("\n")  # behind what a kill left of the last line
            for number, layer in shuffled(timed, rounds, "latency"):
                if len(times[layer]) <= number:
                    ms = _timed(layer, space, batch_size, where)
                    times[layer].append(ms)
                    line = json.dumps({"key": layer, "ms": ms, "conditions": here})
                    file.write(f"{line}\n")
                    file.flush()

    conditions["rounds"] = rounds
    return tabulate(space, found, {layer: times[layer][:rounds] for layer in timed}, conditions)


def _timed(layer: Layer, space: SearchSpace, batch_size: int, where: torch.device) -> float:
    module = build(layer, space).eval().to(where).to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, layer.in_channels, layer.side, layer.side, device=where)
    return milliseconds(module, x.contiguous(memory_format=torch.channels_last))


def _conditions(where: torch.device) -> dict[str, Any]:
    """What a latency depends on besides network and input; on a GPU small ones wait for the CPU."""
    cpu = processor()
    return {
        "dtype": "float32, ieee",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else cpu,
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _logged(log: Path, conditions: dict[str, Any]) -> defaultdict[Layer, list[float]]:
    """Every layer's timings of these conditions; what a kill or a power cut left is passed over."""
    times: defaultdict[Layer, list[float]] = defaultdict(list)
    if not log.exists():
        return times
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                timing = Timing.model_validate_json(line)
            except ValidationError:
                continue
            if timing.conditions == conditions:
                times[timing.key].append(timing.ms)
    return times


def judge(table: CostTable, n: int = 30, device: str = "auto", rounds: int = 12) -> pd.DataFrame:
    """Predicted and measured latency (ms) of n random architectures, over all latencies of the space alike.

    Columns predicted, measured, and corrected: the prediction times one factor, the median of measured / predicted. An
    op timed by itself finds its data in the cache, so what the sum lacks grows with it; one fixed overhead fits worse.
    """
    candidates = Lattice(table).sample(n, even=True)
    measured = whole([one.architecture for one in candidates], table, device, rounds)
    predicted = [one.cost for one in candidates]
    frame = pd.DataFrame({"predicted": predicted, "measured": measured})
    frame["corrected"] = frame["predicted"] * (frame["measured"] / frame["predicted"]).median()
    return frame


def whole(
    architectures: Sequence[Architecture], table: CostTable, device: str, rounds: int
) -> list[float]:
    """Milliseconds of each network as a whole, under a table's conditions: the least of so many shuffled rounds."""
    where, size = pick_device(device), table.input_size
    x = torch.randn(table.conditions["batch_size"], 3, size, size, device=where)
    x = x.contiguous(memory_format=torch.channels_last)
    nets = [architecture.build(table.num_classes).eval() for architecture in architectures]
    times: list[list[float]] = [[] for _ in nets]
    for _, index in shuffled(range(len(nets)), rounds, "networks"):
        net = nets[index].to(where).to(memory_format=torch.channels_last)
        times[index].append(milliseconds(net, x))
    return [min(values) for values in times]


def agreement(frame: pd.DataFrame) -> dict[str, Any]:
    """Spearman's rank correlation, the factor, and the mean absolute percentage errors of what `judge` gave."""
    predictions = frame[["predicted", "corrected"]]
    order = frame.corr("spearman").loc["predicted", "measured"]
    error = 100 * predictions.div(frame["measured"], axis=0).sub(1).abs().mean()
    return {
        "networks": len(frame),
        "spearman": float(order) if len(frame) > 2 else None,  # two are always in some order
        "factor": float((frame["corrected"] / frame["predicted"]).median()),
        "error": float(error["predicted"]),
        "error_corrected": float(error["corrected"]),
    }
