"""How fast photographs become training batches: images per second on one core, against the usual way and the limit.

    python benchmarks/loading.py FOLDER      # class folders of photographs, as torchvision's ImageFolder reads them

RandomResizedCrop to 224, mirrored, normalised, in batches of 32: by ImageFolder with PIL, by `Batches` from a pack of
the original bytes and from one resized to a shorter side of 256. The limits are torchvision's decoder alone on both
kinds of bytes. Every round passes five times over all images in each way; one process, one thread, files in the page
cache. Packing is timed beside `cp -r`. The result goes to benchmarks/results/loading-cpu.json.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median, stdev

import PIL
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from densenas.images.data import ImageData
from densenas.images.items import Item
from densenas.images.loading import Batches
from densenas.images.pack import CORES, Packed, read_manifest
from densenas.images.packing import write_pack
from densenas.images.prepare import IMAGENET
from densenas.runs.provenance import environment

BATCH, SIZE, PASSES = 32, 224, 5
PAIRS = {
    "original bytes over ImageFolder": ("ours, original bytes", "ImageFolder with PIL"),
    "pack of 256 over ImageFolder": ("ours, pack of 256", "ImageFolder with PIL"),
    "original bytes over the decoder": ("ours, original bytes", "decoder, original bytes"),
    "pack of 256 over the decoder": ("ours, pack of 256", "decoder, pack of 256"),
}


def usual(folder: Path) -> DataLoader:
    """The input pipeline of PyTorch's own ImageNet example."""
    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    return DataLoader(ImageFolder(folder, transforms.Compose(steps)), BATCH, shuffle=True)


def ours(pack: Path, classes: list[str]) -> tuple[Packed, Batches]:
    split = Packed(pack, read_manifest(pack), SIZE)
    about = {"augment": "random_sized", "resident": False}
    data = ImageData("folder", classes, split, split, split, *IMAGENET, "benchmark", **about)
    return split, Batches(data, "train", BATCH, torch.device("cpu"), seed=0, workers=0)


def decoder(split: Packed) -> Callable[[int], Iterable]:
    """The limit: every image is decoded, and nothing else is done."""
    return lambda epoch: (split.read(index) for index in range(len(split)))


def seconds(work: Callable[..., object], *arguments: object, **settings: object) -> float:
    start = time.perf_counter()
    work(*arguments, **settings)
    return time.perf_counter() - start


def read(way: Callable[[int], Iterable], epochs: range) -> None:
    for epoch in epochs:
        deque(way(epoch), maxlen=0)


def summary(values: list[float]) -> dict[str, float]:
    return {about.__name__: about(values) for about in (median, mean, stdev, min, max)}


def time_packing(
    folder: Path, items: list[Item], work: Path
) -> tuple[dict[str, Path], dict[str, float]]:
    """Packs of both kinds in `work`, and the median seconds of packing and of `cp -r`, each three times."""
    packs = {"original": work / "original-0", "256": work / "256-0"}
    times: dict[str, list[float]] = {"original": [], "256": [], "cp": []}
    for number in range(3):
        copy = ["cp", "-r", folder, work / f"copy{number}"]
        times["cp"].append(seconds(subprocess.run, copy, check=True))
        for name, shorter in (("original", None), ("256", 256)):
            place = work / f"{name}-{number}"
            times[name].append(seconds(write_pack, place, {"train": items}, shorter))
    return packs, {name: median(values) for name, values in times.items()}


def measure(folder: Path, packs: dict[str, Path], names: list[str], rounds: int) -> dict[str, list]:
    """Images per second of every way in every round."""
    loader = usual(folder)
    ways = {"ImageFolder with PIL": (len(loader.dataset), lambda epoch: loader)}
    for name, pack in packs.items():
        what = "original bytes" if name == "original" else f"pack of {name}"
        split, batches = ours(pack, names)
        # An incomplete last batch is left out in training: an image counts where it was delivered.
        ways[f"ours, {what}"] = (len(batches) * batches.batch_size, batches.epoch)
        ways[f"decoder, {what}"] = (len(split), decoder(split))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (count, way) in ways.items():
            epochs = range(PASSES * number, PASSES * (number + 1))
            rates[name].append(PASSES * count / seconds(read, way, epochs))
    return {name: values[1:] for name, values in rates.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photographs = ImageFolder(options.folder)
    names = photographs.classes
    items = [
        Item(Path(path).relative_to(options.folder).as_posix(), names[label], "train", Path(path))
        for path, label in photographs.samples
    ]
    megabytes = sum(item.content.stat().st_size for item in items) / 1e6
    with tempfile.TemporaryDirectory() as work:
        packs, times = time_packing(options.folder, items, Path(work))
        rates = measure(options.folder, packs, names, options.rounds)
    ratios = {}
    for name, (above, below) in PAIRS.items():
        rounds = range(options.rounds)
        ratios[name] = summary([rates[above][k] / rates[below][k] for k in rounds])
    result = {
        "images": len(items),
        "megabytes": megabytes,
        "rounds": options.rounds,
        "passes_a_round": PASSES,
        "batch_size": BATCH,
        "images_per_second_and_core": {name: summary(values) for name, values in rates.items()},
        "ratios": ratios,
        "packing_mb_per_second": {name: megabytes / times[name] for name in packs},
        "packing_threads": CORES,
        "cp_mb_per_second": megabytes / times["cp"],
        "pillow": PIL.__version__,
        **environment(),
    }
    path = Path(__file__).parent / "results" / "loading-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in result["images_per_second_and_core"].items():
        spread = f"({values['min']:.1f} to {values['max']:.1f})"
        print(f"{name:<26}{values['median']:>8.1f} images/s {spread}")
    for name, values in ratios.items():
        print(f"{name:<33}{values['median']:>6.2f} ({values['min']:.2f} to {values['max']:.2f})")
    speeds = {**result["packing_mb_per_second"], "cp -r": result["cp_mb_per_second"]}
    print("MB/s: " + ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items()))


if __name__ == "__main__":
    main()
