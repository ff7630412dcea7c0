"""Stage 01: from a data set to a verified pack with train, val and test."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from densenas.files import write_text
from densenas.images.data import Description, ImageData, Reading, described, parts_of
from densenas.images.items import Item
from densenas.images.pack import Packed, verify
from densenas.images.packing import write_pack
from densenas.images.sources import CLASSES, NotDownloadedError, read_source, root_of
from densenas.images.splits import SPLITS, choose_classes, refuse_missing, split_items
from densenas.images.store import sha256
from densenas.images.transforms import transform
from densenas.runs.run import Run
from densenas.settings import DataSettings

RESIDENT_BYTES = 1 << 30  # decoded, up to which a data set is held in memory
SAMPLE = 2000  # images that stand for a larger set in its mean and standard deviation
# Mean and standard deviation, as every published model has them.
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def prepare(run: Run, settings: DataSettings) -> ImageData:
    """Splits and packs a data set in the run's work folder and verifies the pack.

    `load` gives it back. Counts and digest go to metrics.json, the settings to provenance.json.
    Raises ValueError or FileNotFoundError with one sentence where the set cannot be had, split or packed.
    """
    folder = run.work / "data"
    _refuse_nesting(settings, folder)
    source = read_source(settings.dataset, settings.source)
    if source.notes:
        print(f"source '{settings.source or settings.dataset}': {'; '.join(source.notes)}")
    parts = _split(source.items, settings)
    classes = sorted({item.label for item in parts["train"]})
    shorter = settings.pack if isinstance(settings.pack, int) else None
    with run.alone():
        write_pack(folder, parts, shorter, settings.quality, settings.skip_broken)
        data = _describe(run, settings, classes, verify(folder))
        metrics = {
            "dataset": data.dataset,
            "classes": len(data.classes),
            "image_size": data.image_size,
            "digest": data.digest,
            "test_digest": _digest_of(parts["test"]),
            **{name: len(split) for name, split in data.splits.items()},
        }
        run.update_json("metrics.json", "data", metrics)
        run.record_provenance("01-data", **settings.model_dump())
    return data


def _digest_of(items: list[Item]) -> str:
    """Of names and classes, which tells the test images of runs apart, wherever their files lie."""
    names = sorted([item.key, item.label] for item in items)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def listing(settings: DataSettings, download: bool = True) -> dict[str, list[Item]] | None:
    """What `prepare` would pack, by split, with all that it would refuse; no image file is opened.

    Without `download` it is None where a set of torchvision's is not there yet; of that only
    `num_classes` is checked.
    """
    try:
        source = read_source(settings.dataset, settings.source, download)
    except NotDownloadedError:
        choose_classes(CLASSES[settings.dataset], settings.num_classes)
        return None
    return _split(source.items, settings)


def _refuse_nesting(settings: DataSettings, folder: Path) -> None:
    """ValueError where the images would be packed into their own source, or the reverse."""
    if settings.dataset != "folder" or not settings.source:
        return
    source = root_of(settings.source)
    if not os.path.isdir(source):
        return  # which reading it will say
    outer, inner = source.resolve(), folder.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        both = f"source '{source}' and the pack '{folder}'"
        raise ValueError(f"{both} lie in one another, move one of them")


def _split(items: list[Item], settings: DataSettings) -> dict[str, list[Item]]:
    grows = settings.dataset == "folder"
    return split_items(items, settings.num_classes, settings.val_fraction, settings.seed, grows)


def _describe(
    run: Run, settings: DataSettings, classes: list[str], manifest: pd.DataFrame
) -> ImageData:
    """Writes data.json, with which `load` finds what the pack holds."""
    folder = run.work / "data"
    for split in SPLITS:  # broken images are no longer there
        present = manifest["class"][manifest["split"] == split]
        refuse_missing(split, classes, {*present})
    small = 3 * len(manifest) * settings.image_size**2 <= RESIDENT_BYTES
    resident = small and settings.pack is None and settings.augment in (None, "weak")
    reading = Reading(
        dataset=settings.dataset,
        classes=classes,
        image_size=settings.image_size,
        pack=settings.pack,
        resident=resident,
        augment=settings.augment or ("weak" if resident else "random_sized"),
        mirror=settings.mirror,
    )
    rows = manifest.drop(columns="class").to_numpy().tolist()
    identity = json.dumps([reading.model_dump(), settings.quality, rows])
    parts = parts_of(folder, manifest, settings.image_size)
    mean, std = _statistics(reading, parts)
    description = Description(
        **reading.model_dump(),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        mean=mean,
        std=std,
        manifest=sha256(folder / "manifest.csv"),
    )
    write_text(run.work / "data.json", json.dumps(description.model_dump(), indent=1))
    return described(description, parts)


def _statistics(reading: Reading, parts: dict[str, Packed]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1] of the training images, from exact integer histograms.

    ImageNet, known by its class folders' names (n01440764), and its part Imagenette have the usual constants.
    """
    of_imagenet = all(re.fullmatch(r"n\d{8}", name) for name in reading.classes)
    if reading.dataset == "imagenette" or of_imagenet:
        return IMAGENET
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for images in _training_images(reading, parts["train"], parts["val"]):
        for channel in range(3):
            counts[channel] += torch.bincount(images[:, channel].flatten(), minlength=256)
    share = counts.double() / counts[0].sum()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(dim=1, keepdim=True)
    std = (share * (values - mean) ** 2).sum(dim=1).sqrt()
    return mean.flatten().tolist(), [deviation or 1.0 for deviation in std.tolist()]


def _training_images(reading: Reading, train: Packed, val: Packed) -> Iterator[Tensor]:
    """uint8 (n, 3, size, size); of a set that is not held in memory `SAMPLE` evenly spaced, as validation sees them."""
    if reading.resident:
        yield train.images
        yield val.images
        return
    steps = transform(None, reading.image_size)
    every = max(1, (len(train) + len(val)) // SAMPLE)
    for part in (train, val):
        for index in range(0, len(part), every):
            yield steps(part.read(index))[None]
