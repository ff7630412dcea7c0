"""Real search steps of the paper's spaces at 224×224: images per second, peak memory, and hours for the whole search.

    python benchmarks/full_size.py                      # on a GPU the paper's batch sizes, on a CPU 8 images
    python benchmarks/full_size.py --batch 64 --precision bf16

Each space and step runs in a process of its own, so that its peak memory is its own. Results go to benchmarks/results/.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from statistics import median

import torch

from densenas import CostTable, SearchSpace, SuperNet
from densenas.engine import computing_on
from densenas.run import environment
from densenas.search import SearchTrainer

IMAGES = 1281167 // 10  # the paper's search set: 100 of ImageNet's 1000 classes, 80 % for weights, 20 % for alpha, beta


def measure(pipe, name: str, kind: str, batch: int | None, precision: str, steps: int) -> None:
    space = SearchSpace.load(name)
    with computing_on("auto", precision) as device:
        gpu = device.type == "cuda"
        size = batch or (space.search.batch_size if gpu else 8)
        net = SuperNet(space, num_classes=100).to(device, memory_format=torch.channels_last)
        table = CostTable.mult_adds(space, 224, 100)
        trainer = SearchTrainer(net, table, space.search, steps=1000, precision=precision)
        step, fixed = {
            "weight": (trainer.weight_step, trainer.arch),
            "architecture": (trainer.arch_step, trainer.weights),
        }[kind]
        for parameter in fixed:
            parameter.requires_grad_(False)
        images = torch.randn(size, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(100, (size,), device=device)
        seconds, losses = [], []
        for _ in range(steps + 2):
            start = time.perf_counter()
            losses.append(step(images, labels)[0].item())  # waits for the device
            seconds.append(time.perf_counter() - start)
        used = (
            torch.cuda.max_memory_allocated() / 2**30
            if gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )
    timed = sorted(seconds[2:])
    pipe.send({
        "space": name, "step": kind, "batch_size": size, "precision": precision, "n": steps,
        "images_per_second": size / median(timed), "seconds_min": timed[0], "seconds_median": median(timed),
        "seconds_max": timed[-1], "peak_memory_gib": used, "first_loss": losses[0], "last_loss": losses[-1],
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="images a step; default: the paper's on a GPU, 8 on a CPU")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that are not")
    options = parser.parse_args()
    context, rows, hours = multiprocessing.get_context("spawn"), [], {}
    for name in ("mbv2", "resnet"):
        for kind in ("weight", "architecture"):
            receiver, sender = context.Pipe()
            arguments = (sender, name, kind, options.batch, options.precision, options.steps)
            process = context.Process(target=measure, args=arguments)
            process.start()
            sender.close()
            rows.append(receiver.recv())
            process.join()
            row = rows[-1]
            speed = f"{row['images_per_second']:>8.2f} images/s, {row['peak_memory_gib']:.2f} GiB"
            print(f"{name:<7}{kind:<13}batch {row['batch_size']:<4}{speed}")
        recipe, (weight, arch) = SearchSpace.load(name).search, [row["images_per_second"] for row in rows[-2:]]
        architecture_epochs = recipe.epochs - recipe.arch_start_epoch
        hours[name] = IMAGES * (0.8 * recipe.epochs / weight + 0.2 * architecture_epochs / arch) / 3600
        print(f"{name}: the whole search of {recipe.epochs} epochs would take {hours[name]:.0f} hours (published: 64)")
    result = {"rows": rows, "whole_search_hours": hours, "published_gpu_hours": 64, **environment()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(__file__).parent / "results" / f"full_size-{device}-{options.precision}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
