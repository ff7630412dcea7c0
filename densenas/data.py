"""Images: from a data set to a verified pack with train, val and test, and from that to what training reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from torchvision import datasets

from densenas.config import DATA, Augment, Dataset, refuse, write_text
from densenas.loading import transform
from densenas.pack import Item, Packed, read_manifest, verify, write_pack
from densenas.run import Run

TEST_FRACTION = 0.2  # where a data set brings no test split of its own
SPLITS = ("train", "val", "test")
RESIDENT_BYTES = 1 << 30  # decoded, up to which a data set is held in memory
SAMPLE = 2000  # images that stand for a set too large to be held, in its mean and standard deviation
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and standard deviation, as every published model has
ENDINGS = {".jpg", ".jpeg", ".png", ".gif", ".webp"}


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
    resident: bool = True  # held in memory at image_size, or else read from the pack again in every epoch

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
    resized, sets, augments = isinstance(pack, int), get_args(Dataset), get_args(Augment)
    shorter = f"expected 'original' or a shorter side of at least {image_size} pixels"
    refuse(dataset not in sets, f"unknown data set '{dataset}', known are {', '.join(sets)}")
    refuse(not 0 < val_fraction < 1, f"val_fraction is {val_fraction}, expected a share between 0 and 1")
    refuse(image_size < 8, f"image_size is {image_size} pixels, at least 8 are needed")
    refuse(pack < image_size if resized else pack not in (None, "original"), f"pack is {pack!r}, {shorter}")
    refuse(augment not in (None, *augments), f"unknown augment '{augment}', known are {', '.join(augments)}")
    folder = run.work / "data"
    if dataset == "folder" and source is not None:
        places = [Path(source).expanduser().resolve(), folder.resolve()]
        nested = places[0] in places[1].parents or places[1] in (places[0], *places[0].parents)
        refuse(nested, f"source '{source}' and the pack '{folder}' lie in one another, move one of them")
    items = {"digits": _digits, "folder": _folder}.get(dataset, partial(_torchvision, dataset))(source)
    classes = _classes(sorted({item.label for item in items}), num_classes)
    items = [item for item in items if item.label in classes]
    split = _assign(items, val_fraction, seed, grows=dataset == "folder")
    parts = {name: [item for item in items if split[item.key] == name] for name in SPLITS}
    _refuse_missing(classes, {name: {item.label for item in part} for name, part in parts.items()})
    write_pack(folder, parts, pack if resized else None, quality, skip_broken)
    count = verify(folder)
    small = 3 * count * image_size**2 <= RESIDENT_BYTES
    resident = small and pack is None and augment in (None, "weak")
    settings = {
        "dataset": dataset, "classes": classes, "image_size": image_size, "pack": pack, "resident": resident,
        "augment": augment or ("weak" if resident else "random_sized"),
    }  # fmt: skip
    manifest = read_manifest(folder)
    _refuse_missing(classes, manifest.groupby("split")["class"].agg(set).to_dict())
    text = json.dumps([settings, quality, manifest.drop(columns="class").to_numpy().tolist()])
    settings["digest"] = hashlib.sha256(text.encode()).hexdigest()
    data = _data(folder, **settings, mean=[0.0], std=[1.0])
    settings["mean"], settings["std"] = _statistics(data)
    write_text(run.work / "data.json", json.dumps(settings, indent=1))
    return _data(folder, **settings)


def load(run: Run) -> ImageData:
    """What `prepare` kept for this run."""
    return _data(run.work / "data", **json.loads(run.need(run.work / "data.json", "01-data").read_text("utf-8")))


def _digits(source: str | None) -> list[Item]:
    """Scikit-learn's digits: 64 grey values from 0 to 16 and the digit on each line, enlarged from 8×8 to 32×32."""
    rows = torch.tensor(pd.read_csv(DATA / "digits.csv.gz", header=None).to_numpy())
    pixels = (rows[:, :64].reshape(-1, 1, 8, 8) * 255 // 16).to(torch.uint8)
    # Integer arithmetic only (each pixel becomes a 4×4 square): the same bytes on every machine.
    pixels = pixels.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    labels = [str(digit) for digit in rows[:, 64].tolist()]
    return [Item(f"{i:04d}", label, None, image) for i, (label, image) in enumerate(zip(labels, pixels, strict=True))]


def _torchvision(dataset: str, source: str | None) -> list[Item]:
    """CIFAR-10, Fashion-MNIST or Imagenette out of `source`, downloaded into it where they are missing."""
    root = Path(source or f"runs/downloads/{dataset}")
    folder = root / "imagenette2-320"
    try:
        if dataset != "imagenette":
            kind = {"cifar10": datasets.CIFAR10, "fashion_mnist": datasets.FashionMNIST}[dataset]
            parts = {name: kind(root, train=name == "train", download=True) for name in ("train", "test")}
        elif not folder.is_dir():
            datasets.Imagenette(root, size="320px", download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{dataset} is not in '{root}' and could not be downloaded ({reason}); put it there or set source"
        ) from None
    if dataset == "imagenette":
        return _folder(str(folder))
    items = []
    for name, part in parts.items():
        arrays = torch.as_tensor(part.data)
        arrays = arrays.movedim(3, 1) if arrays.ndim == 4 else arrays[:, None]
        for index, (label, array) in enumerate(zip(part.targets, arrays, strict=True)):
            items.append(Item(f"{name}/{index:05d}", part.classes[label], name, array))
    return items


def _folder(source: str | None) -> list[Item]:
    """Class folders, flat or below train/, val/ and test/; a val/ without test/ is ImageNet's, to be tested on."""
    refuse(source is None, "data set 'folder' needs source, the folder that holds the class folders")
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"source '{source}' is not a folder")
    own = [name for name in SPLITS if (root / name).is_dir()]
    if "train" not in own:
        return _class_folders(root, root, None)
    parts = {"train": "train" if own[1:] else None, "val": "val" if "test" in own else "test", "test": "test"}
    return [item for name in own for item in _class_folders(root, root / name, parts[name])]


def _class_folders(root: Path, folder: Path, part: str | None) -> list[Item]:
    """The images below each class folder; says what it passes over. Names that start with a dot are not looked at."""
    items, others = [], Counter()
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {parent.resolve() for parent in (Path(place), *Path(place).parents)}  # where a loop of links would lead
        folders[:] = (name for name in folders if name[0] != "." and Path(place, name).resolve() not in above)
        for name in (name for name in names if name[0] != "."):
            path = Path(place, name)
            if Path(place) == folder or path.suffix.lower() not in ENDINGS:
                others[path.suffix or name] += 1
                continue
            # Composed, or one and the same name would have another hash on a file system that decomposes it.
            key = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
            items.append(Item(key, unicodedata.normalize("NFC", path.relative_to(folder).parts[0]), part, path))
    refuse(not items, f"'{folder}' holds no class folders with images ({', '.join(sorted(ENDINGS))})")
    if others:
        found = ", ".join(f"{count} × {ending}" for ending, count in sorted(others.items()))
        print(f"passed over in '{folder}', because they are no images or in no class folder: {found}")
    return sorted(items, key=lambda item: item.key)


def _classes(found: list[str], wanted: int | list[str] | None) -> list[str]:
    """The classes to keep, in sorted order."""
    if isinstance(wanted, int):
        expected = f"expected 2 to {len(found)}, the classes of the data set"
        refuse(not 2 <= wanted <= len(found), f"num_classes is {wanted}, {expected}")
        return found[:wanted]
    classes = found if wanted is None else sorted(wanted)
    refuse(len(set(classes)) < len(classes), "num_classes names a class twice")
    for name in classes:
        refuse(name not in found, f"num_classes names '{name}', which is not a class of the data set")
    have = f"only the class '{classes[0]}' is there" if classes else "num_classes names no class"
    refuse(len(classes) < 2, f"{have}, at least 2 are needed")
    return classes


def _assign(items: list[Item], val_fraction: float, seed: int, grows: bool = True) -> dict[str, str]:
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
        return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64

    ordered = sorted(keys, key=share)
    below = sum(share(key) < fraction for key in keys) if grows else round(fraction * len(keys))
    return ordered[: max(1, min(below, len(keys) - 1))] if len(keys) > 1 else []


def _refuse_missing(classes: list[str], present: dict[str, set[str]]) -> None:
    for name in SPLITS:
        if missing := set(classes) - present.get(name, set()):
            raise ValueError(f"class '{min(missing)}' has no image left for {name}: more images a class are needed")


def _data(folder: Path, image_size: int, pack: object, **settings: Any) -> ImageData:
    parts = {name: Packed(folder, rows, image_size) for name, rows in read_manifest(folder).groupby("split")}
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
        steps, every = transform(None, data.image_size), max(1, (len(data.train) + len(data.val)) // SAMPLE)
        parts = [steps(part.read(k))[None] for part in (data.train, data.val) for k in range(0, len(part), every)]
    counts = sum(
        torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        for images in parts
    )
    share, values = counts.double() / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(dim=1, keepdim=True)
    std = (share * (values - mean) ** 2).sum(dim=1).sqrt()
    return mean.flatten().tolist(), [deviation or 1.0 for deviation in std.tolist()]
