"""A prepared data set: three splits of images, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import Field, ValidationError
from torch import Tensor

from densenas.files import Strict, read_json
from densenas.images.pack import Packed, read_manifest
from densenas.images.splits import SPLITS
from densenas.images.store import sha256
from densenas.runs.run import Run
from densenas.settings import Augment, Dataset


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


class Reading(Strict):
    """How the images of a pack are read, as it stands in data.json."""

    dataset: Dataset
    classes: list[str]
    image_size: int
    pack: Literal["original"] | int | None
    resident: bool
    augment: Augment
    mirror: bool | None = Field(None, exclude_if=lambda mirror: mirror is None)


class Description(Reading):
    """data.json: what `ImageData` has beside the pack, and the SHA-256 of the pack's manifest."""

    digest: str
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    manifest: str


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
    mirror: bool | None = None  # in training, every other image; None: as the set's classes allow

    @property
    def splits(self) -> dict[str, Split | Packed]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def image_size(self) -> int:
        return self.train.image_size


def load(run: Run) -> ImageData:
    """What `prepare` kept for this run; ValueError where that is damaged or its pack is another."""
    description = _read_description(run)
    folder = run.work / "data"
    if sha256(run.need(folder / "manifest.csv", "01-data")) != description.manifest:
        other = f"is not the one that {run.work / 'data.json'} describes"
        raise ValueError(f"the pack '{folder}' {other}: run 01-data of run '{run.name}' again")
    parts = parts_of(folder, read_manifest(folder), description.image_size)
    return described(description, parts)


def prepared(run: Run, image_size: int | None = None) -> tuple[int, int]:
    """Side in pixels and number of classes of the run's images; the pack is not opened.

    ValueError where another side is asked for, FileNotFoundError before 01-data has run.
    """
    description = _read_description(run)
    side = description.image_size
    if image_size not in (None, side):
        are = f"the images of run '{run.name}' were prepared with {side} pixels"
        again = "leave it out, or run 01-data again"
        raise ValueError(f"image_size is {image_size}, but {are}: {again}")
    return side, len(description.classes)


def _read_description(run: Run) -> Description:
    path = run.need(run.work / "data.json", "01-data")
    remedy = f"run 01-data of run '{run.name}' again"
    content = read_json(path, remedy)
    try:
        return Description.model_validate(content)
    except ValidationError:
        raise ValueError(f"{path} is damaged or of another version: {remedy}") from None


def described(description: Description, parts: dict[str, Packed]) -> ImageData:
    about = description.model_dump(exclude={"pack", "image_size", "manifest"})
    return ImageData(train=parts["train"], val=parts["val"], test=parts["test"], **about)


def parts_of(folder: Path, manifest: pd.DataFrame, image_size: int) -> dict[str, Packed]:
    """The splits of the pack in `folder`, by name."""
    return {
        split: Packed(folder, manifest[manifest["split"] == split], image_size) for split in SPLITS
    }
