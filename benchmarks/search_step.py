"""Search steps of ours beside the same ones written the obvious way (plain.py), and beside what the machine allows.

    python benchmarks/search_step.py                                  # all three spaces, both steps
    python benchmarks/search_step.py --spaces mbv2 --batch 8 --rounds 9
    python benchmarks/search_step.py --precision bf16                 # on a GPU also tf32
    python benchmarks/search_step.py --table                          # README's table, from the results kept

Ours and the plain steps run in a process each, so that each has a peak memory and settings of its own, and take turns:
in every round both do one step with the same candidates, ours first in every other round. Before that every candidate
has had its turn once, because kernels are compiled or looked up at their first use. On a machine that others use, up to
three times as many rounds are done and the quietest kept; `foreign_cores` is what others used in the loudest of these.

No step can be faster than the longer of two times. Arithmetic: its multiply-adds over the measured rate of a large
matrix product. They are those of the forward pass by PyTorch's counter, times three where weights are trained (forward,
gradient of the input, gradient of the weight) and times two where they are not. Memory: every convolution's output
written once and read once (norm and activation at no cost) and every weight in use read once, in a weight step also
written once, over the measured bandwidth of a copy. Results go to benchmarks/results/, a row for each space and step;
below the table stands how long the paper's whole searches would take at these speeds.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from memory import peak_gib
from plain import Plain
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from densenas import Choice, CostTable, SearchSpace, SuperNet
from densenas.recipes import override
from densenas.runs.provenance import environment
from densenas.search import SearchTrainer
from densenas.settings import Computing, Precision
from densenas.training.device import computing_on, keep_freed_memory

RESULTS = Path(__file__).parent / "results"
CLASSES = 100
SIZES = {"mbv2": 224, "resnet": 224, "cifar_mbv2": 32}
BATCHES = {
    "cpu": {"mbv2": 8, "resnet": 4, "cifar_mbv2": 64},
    "cuda": {"mbv2": 64, "resnet": 64, "cifar_mbv2": 512},  # both nets are on it at once
}
IMAGES = (
    1281167 // 10
)  # the paper's search set: 100 of ImageNet's 1000 classes, 80 % for weights, 20 % for alpha, beta
QUIET = 0.15  # cores that others may use in a round
SAMPLED = {"weight": 1, "architecture": 2}  # candidates of a mixed layer
COLUMNS = [
    "Space",
    "Step",
    "Batch",
    "Images/s",
    "Of plain",
    "n",
    "Peak memory, GiB",
    "plain",
]


def cover(space: SearchSpace, count: int) -> list[Choice]:
    """Choices in which every candidate of every mixed layer has its turn."""

    def rows(first: int, candidates: int) -> list[int]:
        return sorted({(first + k) % candidates for k in range(count)})

    return [
        Choice(
            [
                [rows(first, len(space.head_ops)) for _ in space.incoming(j)]
                for j in range(1, space.num_blocks)
            ],
            [[rows(first, len(space.stack_ops)) for _ in range(n)] for n in space.num_layers[1:]],
        )
        for first in range(0, max(len(space.head_ops), len(space.stack_ops)), count)
    ]


def foreign() -> float:
    """CPU seconds that other processes have used, up to a constant; 0 where the system does not tell."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def stepper(
    which: str, name: str, kind: str, batch: int, precision: str, device: torch.device
) -> Callable[[Choice], tuple[float, float]]:
    """A function that does one step with a choice; returns its seconds and the cores that others used meanwhile."""
    space = SearchSpace.load(name)
    size = SIZES[name]
    torch.manual_seed(0)
    net, table = SuperNet(space, CLASSES).to(device), CostTable.mult_adds(space, size, CLASSES)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    if which == "ours":
        keep_freed_memory()
        images = images.contiguous(memory_format=torch.channels_last)
        net = net.to(memory_format=torch.channels_last)
        recipe = override(space.search, paths="all", weights="own")
        trainer = SearchTrainer(net, table, recipe, 10**6, precision)
    else:
        # densenas has set it; the first convolution is yet to come
        del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
        trainer = Plain(net, table, space.search, precision)
        net = trainer.net
        fixed = net.arch_parameters() if kind == "weight" else net.weight_parameters()
        for parameter in fixed:
            parameter.requires_grad_(False)
    step = trainer.weight_step if kind == "weight" else trainer.arch_step

    def one(choice: Choice) -> tuple[float, float]:
        net.sample = lambda count: choice  # both do the same step
        before, start = foreign(), time.perf_counter()
        outcome = step(images, labels)
        if which == "ours":
            outcome.tolist()  # as the engine does; waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, (foreign() - before) / seconds

    return one


def serve(pipe: Connection, which: str, *arguments: Any) -> None:
    """In a process of its own: does the steps that are asked for; at the end of them, sends the peak memory in GiB."""
    with computing_on(Computing(precision=arguments[3])) as device:
        step = stepper(which, *arguments, device)
        while choice := pipe.recv():
            pipe.send(step(choice))
        on_gpu = device.type == "cuda"
        pipe.send(torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_gib())


def speeds(precision: str) -> tuple[float, float]:
    """Multiply-adds of a matrix product and bytes of a copy, both per second."""
    with computing_on(Computing(precision=precision)) as device:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        side = 2048 if device.type == "cpu" else 8192
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        source = torch.ones(2**26, device=device)  # 256 MiB
        target = torch.empty_like(source)

        def best(function: Callable[[], Any]) -> float:
            seconds = []
            for _ in range(12):
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            return min(seconds)

        return len(matrix) ** 3 / best(lambda: matrix @ matrix), 2 * 4 * len(source) / best(
            lambda: target.copy_(source)
        )


def least(
    name: str, kind: str, batch: int, precision: str, choices: list[Choice]
) -> tuple[float, float]:
    """Multiply-adds and bytes of a step, means over the choices; nothing is computed, shapes suffice."""
    space = SearchSpace.load(name)
    elements = 0
    with torch.device("meta"):
        net, images = SuperNet(space, CLASSES), torch.empty(batch, 3, SIZES[name], SIZES[name])

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal elements
        elements += 2 * output.numel() + (2 if kind == "weight" else 1) * module.weight.numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for choice in choices:
            net(images, choice)
    passes = 3 if kind == "weight" else 2
    width = 2 if precision == "bf16" else 4
    return passes * counter.get_total_flops() / 2 / len(choices), width * elements / len(choices)


def loudest(one: dict[str, tuple[float, float]]) -> float:
    """The cores that others used in a round."""
    return max(cores for _, cores in one.values())


def compare(name: str, kind: str, batch: int, precision: str, rounds: int) -> dict[str, Any]:
    """The row of one space and step."""
    space, context = SearchSpace.load(name), multiprocessing.get_context("spawn")
    torch.manual_seed(1)
    net = SuperNet(space, CLASSES)
    choices = [net.sample(SAMPLED[kind]) for _ in range(3 * rounds)]
    pipes, processes = {}, []
    for which in ("ours", "plain"):
        pipes[which], end = context.Pipe()
        processes.append(
            context.Process(target=serve, args=(end, which, name, kind, batch, precision))
        )
        processes[-1].start()
        end.close()

    def step(which: str, choice: Choice | None) -> Any:
        pipes[which].send(choice)
        return pipes[which].recv()

    first = {which: step(which, choices[0])[0] for which in pipes}
    for choice in cover(space, SAMPLED[kind]):
        for which in pipes:
            step(which, choice)
    done: list[dict[str, tuple[float, float]]] = []
    for number, choice in enumerate(choices):
        order = ("ours", "plain") if number % 2 else ("plain", "ours")
        done.append({which: step(which, choice) for which in order})
        if sum(loudest(one) < QUIET for one in done) == rounds:
            break
    choices = choices[: len(done)]
    done = sorted(done, key=loudest)[:rounds]
    seconds = {which: [one[which][0] for one in done] for which in pipes}
    memory = {which: step(which, None) for which in pipes}
    for process in processes:
        process.join()
    ratios = [plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    mult_adds, moved = least(name, kind, batch, precision, choices)
    rate, bandwidth = speeds(precision)
    limit = max(mult_adds / rate, moved / bandwidth)
    row = {
        "space": name,
        "step": kind,
        "input_size": SIZES[name],
        "batch_size": batch,
        "precision": precision,
    }
    row |= {
        "n": rounds,
        "ratio_median": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    for which in pipes:
        row[which] = {
            "images_per_second": batch / median(seconds[which]),
            "seconds_median": median(seconds[which]),
            "seconds_min": min(seconds[which]),
            "seconds_max": max(seconds[which]),
            "first_step_seconds": first[which],
            "peak_memory_gib": memory[which],
        }
    return row | {
        "mult_adds": mult_adds,
        "least_bytes": moved,
        "mult_adds_per_second": rate,
        "bytes_per_second": bandwidth,
        "limit_seconds": limit,
        "share_of_limit": limit / median(seconds["ours"]),
        "foreign_cores": loudest(done[-1]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as README shows them."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * 2 + "|---:" * (len(COLUMNS) - 2) + "|"]
    for row in rows:
        ours, plain = row["ours"], row["plain"]
        ratio = f"**{row['ratio_median']:.2f}** ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        cells = [f"`{row['space']}` at {row['input_size']}", row["step"], str(row["batch_size"])]
        cells += [f"{ours['images_per_second']:.1f}", ratio, str(row["n"])]
        cells += [f"{side['peak_memory_gib']:.1f}" for side in (ours, plain)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def projected(name: str, weight: dict[str, Any], architecture: dict[str, Any]) -> str:
    """How long the paper's whole search of a space takes at the speed of its two rows."""
    recipe = SearchSpace.load(name).search
    passes = (
        (weight, 0.8 * recipe.epochs),
        (architecture, 0.2 * (recipe.epochs - recipe.arch_start_epoch)),
    )
    hours = sum(IMAGES * share / row["ours"]["images_per_second"] for row, share in passes) / 3600
    return f"{name}: the whole search of {recipe.epochs} epochs would take {hours:.0f} hours (published: 64 GPU hours)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spaces", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--steps", nargs="+", choices=SAMPLED, default=[*SAMPLED])
    parser.add_argument("--batch", type=int, help="images a step; default: by space and device")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision))
    parser.add_argument(
        "--table", action="store_true", help="print the table of the results on this device and end"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"search_step-{device}-{options.precision}.json"
    rows = (
        {(r["space"], r["step"]): r for r in json.loads(path.read_text())["rows"]}
        if path.exists()
        else {}
    )
    for name in [] if options.table else options.spaces:
        for kind in options.steps:
            batch = options.batch or BATCHES[device][name]
            rows[name, kind] = compare(name, kind, batch, options.precision, options.rounds)
            kept = [rows[key] for key in ((n, k) for n in SIZES for k in SAMPLED) if key in rows]
            path.write_text(json.dumps({"rows": kept, **environment()}, indent=1) + "\n")
    print(table([*rows.values()]))
    for name in ("mbv2", "resnet"):
        if all((name, kind) in rows for kind in SAMPLED):
            print(projected(name, *(rows[name, kind] for kind in SAMPLED)))


if __name__ == "__main__":
    main()
