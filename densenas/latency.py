"""Latency on the user's own machine: of every op of a space, and of whole networks to judge their sum by."""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from densenas import ops
from densenas.architecture import Architecture
from densenas.cost import CostTable
from densenas.derivation import Lattice
from densenas.run import environment, pick_device, progress
from densenas.space import SearchSpace

SECONDS = 0.01  # of each timing

Key = tuple[str, int, int, int, int]  # op, input channels, width, side of the input map, stride


def build(key: Key, space: SearchSpace, num_classes: int) -> nn.Module:
    """The module behind a key, as it stands in a derived network."""
    op, in_channels, width, _, stride = key
    norm = ops.Norm(affine=True, eps=space.bn_eps)
    if op == "stem":
        stem = ops.conv_norm(3, space.init_dim, norm(space.init_dim), nn.ReLU6(inplace=True), kernel_size=3, stride=2)
        if space.net_type == "mbv2":
            stem.append(ops.build_op("mbconv_k3_t1", space.init_dim, width, 1, norm))
        return stem
    if op == "conv1_1":
        return ops.conv_norm(in_channels, width, norm(width), nn.ReLU6(inplace=True))
    if op == "classifier":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
    return ops.build_op(op, in_channels, width, stride, norm)


def milliseconds(module: Callable[[Tensor], Any], x: Tensor) -> float:
    """Milliseconds of a call without gradients, after a warm-up; waits for the device once, behind the last call."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA toolkit without a GPU is no matter
    from torch.utils.benchmark import Timer

    timer = Timer("module(x)", globals={"module": module, "x": x}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        return timer.timeit(max(3, int(SECONDS / timer.timeit(3).mean))).mean * 1e3


def measure(
    space: SearchSpace,
    input_size: int,
    num_classes: int,
    log: Path,
    batch_size: int = 1,
    device: str = "auto",
    rounds: int = 12,
    seed: int = 0,
) -> CostTable:
    """Times every distinct op of a space (fp32, evaluation mode, channels last); gives a table in milliseconds.

    An op is one entry however often the space uses it: the fastest of `rounds` timings, since what else a machine does
    only adds. Each round has another order, so that a drift favours none. Each timing is appended to `log` as a JSON
    line; a killed measurement goes on behind the last whole line of the same conditions. A skip costs nothing, a
    derived network drops it; with `skip_reg` it is charged a tenth of its layer's first op, as in Mult-Adds.
    """
    where, sizes = pick_device(device), space.maps(input_size)
    conditions: dict[str, Any] = {
        "input_size": input_size, "num_classes": num_classes, "batch_size": batch_size, "dtype": "float32",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else environment()["hardware"]["cpu"],
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    real = [space.real_channels(block) for block in range(space.num_blocks)]
    last, mobile = space.num_blocks, space.net_type == "mbv2"

    def layer(op: str, in_channels: int, block: int, size: int, stride: int) -> Key:
        return (op, in_channels, space.chs[block], size, stride)

    head = [
        [[layer(op, real[i], j, sizes[i], space.stride(i, j)) for op in space.head_ops] for i in space.incoming(j)]
        for j in range(1, last)
    ]
    stack = [
        [[layer(op, real[j], j, sizes[j], 1) for op in space.stack_ops]] * space.num_layers[j] for j in range(1, last)
    ]
    ends = [("conv1_1" if mobile else "classifier", real[i], space.last_dim, sizes[i], 1) for i in space.incoming(last)]
    stem = ("stem", 3, space.chs[0], input_size, 2)
    classifier = ("classifier", space.last_dim, num_classes, sizes[-1], 1)
    nested = [row for part in (head, stack) for block in part for layers in block for row in layers]
    keys = sorted({key for key in (*nested, *ends, stem, *[classifier] * mobile) if key[0] != ops.SKIP})

    times = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if entry["conditions"] == conditions:
            times[tuple(entry["key"])].append(entry["ms"])
    dice = random.Random(seed)
    bar = progress(rounds * len(keys), "latency", sum(min(rounds, len(values)) for values in times.values()))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write("\n")
        for number in range(rounds):
            for key in dice.sample(keys, len(keys)):
                if len(times[key]) <= number:
                    module = build(key, space, num_classes).eval().to(where, memory_format=torch.channels_last)
                    x = torch.randn(batch_size, key[1], key[3], key[3], device=where)
                    times[key].append(milliseconds(module, x.contiguous(memory_format=torch.channels_last)))
                    file.write(json.dumps({"key": key, "ms": times[key][-1], "conditions": conditions}) + "\n")
                    file.flush()
                    bar.update()
    bar.close()
    # A skip is the one op that is not timed.
    ms = defaultdict(float, {key: min(times[key]) for key in keys})

    def cost(key: Key, row: list[Key]) -> float:
        return ms[row[0]] / 10 if space.skip_reg and key[0] == ops.SKIP else ms[key]

    def costs(rows: list[list[Key]]) -> list[list[float]]:
        return [[cost(key, row) for key in row] for row in rows]

    names = ("op", "in_channels", "width", "map", "stride")
    entries = [
        {**dict(zip(names, key, strict=True)), "ms": ms[key], "median": median(times[key]), "max": max(times[key])}
        for key in keys
    ]
    return CostTable(
        space, "latency", ms[stem], [costs(rows) for rows in head], [costs(rows) for rows in stack],
        [ms[key] for key in ends], ms[classifier] if mobile else 0.0,
        conditions | {"rounds": rounds, "entries": entries},
    )  # fmt: skip


def judge(table: CostTable, n: int = 30, device: str = "auto", rounds: int = 12, seed: int = 0) -> pd.DataFrame:
    """Predicted and measured latency (ms) of n random architectures, over all latencies of the space alike.

    Columns predicted, measured, and corrected: the prediction times one factor, the median of measured / predicted. An
    op timed by itself finds its data in the cache, so what the sum lacks grows with it; one fixed overhead fits worse.
    """
    candidates = Lattice(table).sample(n, seed, even=True)
    measured = whole([one.architecture for one in candidates], table.conditions, device, rounds, seed)
    frame = pd.DataFrame({"predicted": [one.cost for one in candidates], "measured": measured})
    frame["corrected"] = frame["predicted"] * (frame["measured"] / frame["predicted"]).median()
    return frame


def whole(
    architectures: Sequence[Architecture], conditions: Mapping[str, Any], device: str, rounds: int, seed: int
) -> list[float]:
    """Milliseconds of each network as a whole, under a table's conditions: the least of so many shuffled rounds."""
    where = pick_device(device)
    times: list[list[float]] = [[] for _ in architectures]
    shape = (conditions["batch_size"], 3, conditions["input_size"], conditions["input_size"])
    x = torch.randn(shape, device=where).contiguous(memory_format=torch.channels_last)
    nets = [architecture.build(conditions["num_classes"]).eval() for architecture in architectures]
    bar, dice = progress(rounds * len(nets), "networks"), random.Random(seed)
    for _ in range(rounds):
        for index in dice.sample(range(len(nets)), len(nets)):
            net = nets[index].to(where, memory_format=torch.channels_last)
            times[index].append(milliseconds(net, x))
            bar.update()
    bar.close()
    return [min(values) for values in times]


def agreement(frame: pd.DataFrame) -> dict[str, float]:
    """Spearman's rank correlation, the factor, and the mean absolute percentage errors of what `judge` gave."""
    error = {
        name: float(100 * ((frame[name] - frame["measured"]).abs() / frame["measured"]).mean())
        for name in ("predicted", "corrected")
    }
    rank = float(frame["predicted"].rank().corr(frame["measured"].rank()))
    return {
        "networks": len(frame),
        "spearman": rank,
        "factor": float((frame["corrected"] / frame["predicted"]).median()),
        "error": error["predicted"],
        "error_corrected": error["corrected"],
    }
