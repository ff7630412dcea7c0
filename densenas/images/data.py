"""Images: from a data set to a verified pack with train, val and test, and from that to what training reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from densenas.files import Strict, read_json, write_text
from densenas.images.items import Item
from densenas.images.pack import Packed, read_manifest, verify
from densenas.images.packing import write_pack
from densenas.images.sources import CLASSES, NotDownloadedError, read_source, root_of
from densenas.images.splits import SPLITS, choose_classes, refuse_missing, split_items
from densenas.images.store import sha256
from densenas.images.transforms import transform
from densenas.runs.run import Run
from densenas.settings import Augment, Dataset, DataSettings

RESIDENT_BYTES = 1 << 30  # decoded, up to which a data set is held in memory
SAMPLE = 2000  # images that stand for a larger set in its mean and standard deviation
# Mean and standard deviation, as every published model has them.
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Split:
    """Images in memory as uint8 (N, 3, size, size) with labels (N,) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]


@dataclass(frozen=True)
class ImageData:
    """A prepared data set: `train` and `val` share the training images, `test` is seen by no search and no training."""

    dataset: str
    classes: list[str]
    train: Split | Packed
    val: Split | Packed
    test: Split | Packed
    mean: list[float]  # of the training images per channel, in [0, 1]
    std: list[float]
    digest: str  # of all images, labels and splits, and of how they are read
    augment: Augment = "weak"  # what training does to an image
    resident: bool = True  # held in memory at image_size, or read from the pack in every epoch

    @property
    def splits(self) -> dict[str, Split | Packed]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def image_size(self) -> int:
        return self.train.image_size


class Reading(Strict):
    """How the images of a pack are read, as it stands in data.json."""

    dataset: Dataset
    classes: list[str]
    image_size: int
    pack: Literal["original"] | int | None
    resident: bool
    augment: Augment


class Description(Reading):
    """data.json: what `ImageData` has beside the pack, and the SHA-256 of the pack's manifest."""

    digest: str
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    manifest: str


def prepare(run: Run, settings: DataSettings) -> ImageData:
    """Stage 01: splits and packs a data set in the run's work folder and verifies the pack.

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
        manifest = verify(folder)
        data = _describe(run, settings, classes, manifest)
        _record(run, settings, data)
    return data


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


def load(run: Run) -> ImageData:
    """What `prepare` kept for this run; ValueError where that is damaged or its pack is another."""
    description, folder = _read_description(run), run.work / "data"
    if sha256(run.need(folder / "manifest.csv", "01-data")) != description.manifest:
        other = f"is not the one that {run.work / 'data.json'} describes"
        raise ValueError(f"the pack '{folder}' {other}: run 01-data of run '{run.name}' again")
    parts = _parts(folder, read_manifest(folder), description.image_size)
    return _image_data(description, parts)


def prepared(run: Run, image_size: int | None = None) -> tuple[int, int]:
    """Side in pixels and number of classes of the run's images; the pack is not opened.

    ValueError where another side is asked for, FileNotFoundError before 01-data has run.
    """
    description = _read_description(run)
    side = description.image_size
    if image_size not in (None, side):
        are = f"the images of run '{run.name}' were prepared with {side} pixels"
        raise ValueError(
            f"image_size is {image_size}, but {are}: leave it out, or run 01-data again"
        )
    return side, len(description.classes)


def _read_description(run: Run) -> Description:
    path = run.need(run.work / "data.json", "01-data")
    remedy = f"run 01-data of run '{run.name}' again"
    content = read_json(path, remedy)
    try:
        return Description.model_validate(content)
    except ValidationError:
        raise ValueError(f"{path} is damaged or of another version: {remedy}") from None


def _refuse_nesting(settings: DataSettings, folder: Path) -> None:
    """ValueError where the images would be packed into their own source, or the reverse."""
    if settings.dataset != "folder" or not settings.source:
        return
    source = root_of(settings.source)
    if not os.path.isdir(source):
        return  # which reading it will say
    outer, inner = source.resolve(), folder.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(
            f"source '{source}' and the pack '{folder}' lie in one another, move one of them"
        )


def _split(items: list[Item], settings: DataSettings) -> dict[str, list[Item]]:
    grows = settings.dataset == "folder"
    return split_items(items, settings.num_classes, settings.val_fraction, settings.seed, grows)


def _describe(
    run: Run, settings: DataSettings, classes: list[str], manifest: pd.DataFrame
) -> ImageData:
    """Writes data.json, with which `load` finds what the pack holds."""
    folder = run.work / "data"
    for split in SPLITS:
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
    )
    rows = manifest.drop(columns="class").to_numpy().tolist()
    identity = json.dumps([reading.model_dump(), settings.quality, rows])
    parts = _parts(folder, manifest, settings.image_size)
    mean, std = _statistics(reading, parts)
    description = Description(
        **reading.model_dump(),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        mean=mean,
        std=std,
        manifest=sha256(folder / "manifest.csv"),
    )
    write_text(run.work / "data.json", json.dumps(description.model_dump(), indent=1))
    return _image_data(description, parts)


def _record(run: Run, settings: DataSettings, data: ImageData) -> None:
    metrics = {
        "dataset": data.dataset,
        "classes": len(data.classes),
        "image_size": data.image_size,
        "digest": data.digest,
        **{name: len(split) for name, split in data.splits.items()},
    }
    run.update_json("metrics.json", "data", metrics)
    run.record_provenance("01-data", **settings.model_dump())


def _parts(folder: Path, manifest: pd.DataFrame, image_size: int) -> dict[str, Packed]:
    return {
        split: Packed(folder, manifest[manifest["split"] == split], image_size) for split in SPLITS
    }


def _image_data(description: Description, parts: dict[str, Packed]) -> ImageData:
    about = description.model_dump(exclude={"pack", "image_size", "manifest"})
    return ImageData(train=parts["train"], val=parts["val"], test=parts["test"], **about)


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
