"""Images: from a data set to a verified pack with train, val and test, and from that to what training reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from densenas.files import Strict, read_json, write_text
from densenas.images.folders import named
from densenas.images.loading import transform
from densenas.images.pack import Item, Packed, read_manifest, verify, write_pack
from densenas.images.sources import CLASSES, read_source, root_of
from densenas.images.store import sha256
from densenas.runs.run import Run
from densenas.settings import Augment, Dataset, DataSettings

TEST_FRACTION = 0.2  # where a data set brings no test split of its own
SPLITS = ("train", "val", "test")
RESIDENT_BYTES = 1 << 30  # decoded, up to which a data set is held in memory
SAMPLE = (
    2000  # images that stand for a set too large to be held, in its mean and standard deviation
)
IMAGENET = (
    [0.485, 0.456, 0.406],
    [0.229, 0.224, 0.225],
)  # mean and standard deviation, as every published model has


@dataclass(frozen=True)
class Split:
    """Images in memory as uint8 (N, 3, size, size) with labels (N,) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

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
    resident: bool = (
        True  # held in memory at image_size, or else read from the pack again in every epoch
    )

    @property
    def splits(self) -> dict[str, Split | Packed]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def image_size(self) -> int:
        return self.train.image_size


def prepare(
    run: Run,
    dataset: Dataset = "digits",
    source: str | None = None,
    num_classes: int | list[str] | None = None,
    val_fraction: float = 0.2,
    image_size: int = 32,
    pack: Literal["original"] | int | None = None,
    quality: int = 90,
    augment: Augment | None = None,
    skip_broken: bool = False,
    seed: int = 0,
) -> ImageData:
    """Splits and packs a data set in the run's work folder and verifies the pack; `load` gives it back.

    `num_classes` keeps the first n classes in sorted order, or those named. `pack`: None keeps original bytes, and
    decodes small sets into memory; "original" reads them from the pack again in every epoch; a number also resizes
    them once to that shorter side (JPEG of `quality`). `augment` None: weak in memory, otherwise random_sized.
    Raises ValueError or FileNotFoundError with one sentence where the set cannot be had, split or packed.
    """
    settings = {
        "dataset": dataset,
        "source": source,
        "num_classes": num_classes,
        "val_fraction": val_fraction,
        "image_size": image_size,
        "pack": pack,
        "quality": quality,
        "augment": augment,
        "skip_broken": skip_broken,
        "seed": seed,
    }
    DataSettings.of(settings)
    folder = run.work / "data"
    if dataset == "folder" and source:
        _refuse_nesting(root_of(source), folder)
    items, notes = read_source(dataset, source)
    if notes:
        print(f"source '{source or dataset}': {'; '.join(notes)}")
    parts = _split(items, dataset, num_classes, val_fraction, seed)
    classes = sorted({item.label for item in parts["train"]})
    with run.alone():
        write_pack(folder, parts, pack if isinstance(pack, int) else None, quality, skip_broken)
        verify(folder)
        return _keep(run, dataset, classes, image_size, pack, augment, quality)


def _keep(
    run: Run,
    dataset: str,
    classes: list[str],
    image_size: int,
    pack: Literal["original"] | int | None,
    augment: Augment | None,
    quality: int,
) -> ImageData:
    """Writes data.json, with which `load` finds what the pack holds."""
    folder = run.work / "data"
    manifest = read_manifest(folder)
    _refuse_missing(classes, manifest.groupby("split")["class"].agg(set).to_dict())
    small = 3 * len(manifest) * image_size**2 <= RESIDENT_BYTES
    resident = small and pack is None and augment in (None, "weak")
    kept = {
        "dataset": dataset,
        "classes": classes,
        "image_size": image_size,
        "pack": pack,
        "resident": resident,
        "augment": augment or ("weak" if resident else "random_sized"),
    }
    rows = manifest.drop(columns="class").to_numpy().tolist()
    kept["digest"] = hashlib.sha256(json.dumps([kept, quality, rows]).encode()).hexdigest()
    data = _data(folder, **kept, mean=[0.0], std=[1.0])
    kept["mean"], kept["std"] = _statistics(data)
    kept["manifest"] = sha256(folder / "manifest.csv")
    write_text(run.work / "data.json", json.dumps(kept, indent=1))
    return replace(data, mean=kept["mean"], std=kept["std"])


def listing(
    dataset: Dataset,
    source: str | None,
    num_classes: int | list[str] | None,
    val_fraction: float,
    seed: int,
    download: bool = True,
) -> dict[str, list[Item]] | None:
    """What `prepare` would pack, by split, with all that it would refuse; no image file is opened.

    Without `download` it is None where a set of torchvision's is not there yet; of that only
    `num_classes` is checked.
    """
    found = read_source(dataset, source, download)
    if found is None:
        _classes(sorted(CLASSES[dataset]), num_classes)
        return None
    return _split(found[0], dataset, num_classes, val_fraction, seed)


def load(run: Run) -> ImageData:
    """What `prepare` kept for this run; ValueError where that is damaged or its pack is another."""
    path, folder = run.work / "data.json", run.work / "data"
    remedy = f"run 01-data of run '{run.name}' again"
    content = read_json(run.need(path, "01-data"), remedy)
    try:
        kept = _Kept.model_validate(content)
    except ValidationError:
        raise ValueError(f"{path} is damaged or of another version: {remedy}") from None
    if sha256(run.need(folder / "manifest.csv", "01-data")) != kept.manifest:
        raise ValueError(f"the pack '{folder}' is not the one that {path} describes: {remedy}")
    return _data(folder, **kept.model_dump(exclude={"manifest"}))


class _Kept(Strict):
    """data.json: what `ImageData` has beside the pack, and the SHA-256 of the pack's manifest."""

    dataset: Dataset
    classes: list[str]
    image_size: int
    pack: Literal["original"] | int | None
    resident: bool
    augment: Augment
    digest: str
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    manifest: str


def _refuse_nesting(source: Path, folder: Path) -> None:
    if not os.path.isdir(source):
        return  # which reading it will say
    outer, inner = source.resolve(), folder.resolve()
    if outer in inner.parents or inner in (outer, *outer.parents):
        raise ValueError(
            f"source '{source}' and the pack '{folder}' lie in one another, move one of them"
        )


def _split(
    items: list[Item],
    dataset: str,
    num_classes: int | list[str] | None,
    val_fraction: float,
    seed: int,
) -> dict[str, list[Item]]:
    """The items of the wanted classes by split; every class has one in each."""
    classes = set(_classes(sorted({item.label for item in items}), num_classes))
    items = [item for item in items if item.label in classes]
    split = _assign(items, val_fraction, seed, grows=dataset == "folder")
    parts = {name: [item for item in items if split[item.key] == name] for name in SPLITS}
    present = {name: {item.label for item in part} for name, part in parts.items()}
    _refuse_missing(sorted(classes), present)
    return parts


def _classes(found: list[str], wanted: int | list[str] | None) -> list[str]:
    """The classes to keep, in sorted order."""
    if isinstance(wanted, int):
        if not 2 <= wanted <= len(found):
            expected = f"expected 2 to {len(found)}, the classes of the data set"
            raise ValueError(f"num_classes is {wanted}, {expected}")
        return found[:wanted]
    classes = found
    if wanted is not None:
        classes = sorted(unicodedata.normalize("NFC", name) for name in wanted)
    if len(set(classes)) < len(classes):
        raise ValueError("num_classes names a class twice")
    foreign = [name for name in classes if name not in found]
    if foreign:
        raise ValueError(
            f"num_classes names {named(foreign)}, which is not a class of the data set"
        )
    if len(classes) < 2:
        have = (
            f"only the class '{classes[0]}' is there" if classes else "num_classes names no class"
        )
        raise ValueError(f"{have}, at least 2 are needed")
    return classes


def _assign(
    items: list[Item], val_fraction: float, seed: int, grows: bool = True
) -> dict[str, str]:
    """train, val or test for every key: what the source says, and what it leaves open by a hash of the key.

    A test split drawn here has no seed in its hash: another seed must not leak test images into training.
    """
    split = {item.key: item.part or "train" for item in items}
    own = {item.part for item in items}
    by_class = defaultdict(list)
    for item in items:
        by_class[item.label].append(item.key)
    for keys in by_class.values():
        if None in own:
            split |= dict.fromkeys(_draw(keys, TEST_FRACTION, "test", grows), "test")
        if "val" not in own:
            train = [key for key in keys if split[key] == "train"]
            split |= dict.fromkeys(_draw(train, val_fraction, f"val {seed}", grows), "val")
    return split


def _draw(keys: list[str], fraction: float, salt: str, grows: bool) -> list[str]:
    """The keys whose hash, a number in [0, 1), is below `fraction`; of a set that never grows exactly that share.

    In a folder each key stands for itself, so that images added later move no other; of n images f·n ± 2·√(f·(1 - f)·n)
    are drawn in 19 of 20 classes. Only a class that would get none, or give all, sends or keeps the image nearest to
    the threshold: the alternative would be to refuse small classes.
    """

    def share(key: str) -> float:
        return (
            int.from_bytes(
                hashlib.sha256(f"{salt}:{key}".encode("utf-8", "surrogateescape")).digest()[:8]
            )
            / 2**64
        )

    ordered = sorted(keys, key=share)
    below = sum(share(key) < fraction for key in keys) if grows else round(fraction * len(keys))
    return ordered[: max(1, min(below, len(keys) - 1))] if len(keys) > 1 else []


def _refuse_missing(classes: list[str], present: dict[str, set[str]]) -> None:
    for split in SPLITS:
        missing = [name for name in classes if name not in present.get(split, set())]
        if missing:
            which = "class" if len(missing) == 1 else f"{len(missing)} classes:"
            verb = "has" if len(missing) == 1 else "have"
            raise ValueError(
                f"{which} {named(missing)} {verb} no image left for {split}:"
                f" every class needs images in each split"
            )


def _data(folder: Path, image_size: int, pack: object, **settings: Any) -> ImageData:
    rows_of = read_manifest(folder).groupby("split")
    parts = {name: Packed(folder, rows, image_size) for name, rows in rows_of}
    return ImageData(**settings, **parts)


def _statistics(data: ImageData) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1] of the training images, from exact integer histograms.

    Those of a set that is read from its pack come from 2,000 images evenly spaced, as validation sees them. ImageNet,
    known by its class folders' names (n01440764), and its part Imagenette have the usual constants.
    """
    if data.dataset == "imagenette" or all(re.fullmatch(r"n\d{8}", name) for name in data.classes):
        return IMAGENET
    if data.resident:
        parts = [data.train.images, data.val.images]
    else:
        steps, every = (
            transform(None, data.image_size),
            max(1, (len(data.train) + len(data.val)) // SAMPLE),
        )
        parts = [
            steps(part.read(k))[None]
            for part in (data.train, data.val)
            for k in range(0, len(part), every)
        ]
    counts = sum(
        torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
        )
        for images in parts
    )
    share, values = counts.double() / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(dim=1, keepdim=True)
    std = (share * (values - mean) ** 2).sum(dim=1).sqrt()
    return mean.flatten().tolist(), [deviation or 1.0 for deviation in std.tolist()]
