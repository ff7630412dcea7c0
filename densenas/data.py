"""Images: from a data set to uint8 tensors in train, val and test, and from these to batches on the device."""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from densenas.config import DATA, Dataset, atomic
from densenas.run import Run, progress

TEST_FRACTION = 0.2  # where a data set brings no test split of its own
MIRRORED = ("cifar10", "imagenette", "folder")  # sets in which a mirror image keeps its class


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, 3, size, size) with labels (N,) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A prepared data set: `train` and `val` share the training images, `test` is seen by no search and no training."""

    dataset: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    mean: list[float]  # of the training images per channel, in [0, 1]
    std: list[float]
    digest: str  # of all images, labels and splits

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def train_and_val(self) -> Split:
        """All training images: what a derived network is trained on."""
        return Split(torch.cat([self.train.images, self.val.images]), torch.cat([self.train.labels, self.val.labels]))


def prepare(
    run: Run,
    dataset: Dataset = "digits",
    source: str | None = None,
    num_classes: int | list[str] | None = None,
    val_fraction: float = 0.2,
    image_size: int = 32,
    seed: int = 0,
) -> ImageData:
    """Reads a data set, splits it and keeps it in the run's work folder; `load` gives it back.

    `num_classes` keeps the first n classes in sorted order, or those named. Raises ValueError or FileNotFoundError
    with one sentence where the set cannot be had or split.
    """
    if dataset not in get_args(Dataset):
        raise ValueError(f"unknown data set '{dataset}', known are {', '.join(get_args(Dataset))}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected a share between 0 and 1")
    if image_size < 8:
        raise ValueError(f"image_size is {image_size} pixels, at least 8 are needed")
    items = _SOURCES[dataset](source)
    classes = _classes(sorted({item.label for item in items}), num_classes)
    items = [item for item in items if item.label in classes]
    split = _assign(items, val_fraction, seed)
    for name in ("train", "val", "test"):
        missing = set(classes) - {item.label for item in items if split[item.key] == name}
        if missing:
            raise ValueError(f"class '{min(missing)}' has no image left for {name}: more images a class are needed")
    resize = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    parts = {}
    digest = hashlib.sha256()
    with progress(len(items), f"reading {dataset}") as bar:
        for name in ("train", "val", "test"):
            chosen = [item for item in items if split[item.key] == name]
            images = torch.empty(len(chosen), 3, image_size, image_size, dtype=torch.uint8)
            for index, item in enumerate(chosen):
                images[index] = resize(item.read())
                bar.update()
            labels = torch.tensor([classes.index(item.label) for item in chosen])
            parts[name] = Split(images, labels)
            digest.update(images.numpy())
            digest.update(labels.numpy())
    mean, std = _statistics([parts["train"].images, parts["val"].images])
    data = ImageData(dataset, classes, **parts, mean=mean, std=std, digest=digest.hexdigest())
    _write_manifest(run.work / "manifest.csv", items, split, classes)
    _save(run.work / "data.pt", data)
    return data


def load(run: Run) -> ImageData:
    """What `prepare` kept for this run."""
    state = torch.load(run.need(run.work / "data.pt", "01-data"), weights_only=True)
    splits = {name: Split(**state.pop(name)) for name in ("train", "val", "test")}
    return ImageData(**splits, **state)


def _save(path: Path, data: ImageData) -> None:
    state: dict[str, Any] = {key: getattr(data, key) for key in ("dataset", "classes", "mean", "std", "digest")}
    with atomic(path) as partial:
        torch.save(state | {name: vars(split) for name, split in data.splits.items()}, partial)


@dataclass(frozen=True)
class Item:
    """One image before it is decoded: a file or an array, its class, a key that names it on every machine."""

    key: str
    label: str
    test: bool | None  # None: the set brings no test split of its own
    content: Path | Tensor

    def read(self) -> Tensor:
        """uint8 (3, H, W)."""
        if isinstance(self.content, Tensor):
            return self.content.expand(3, -1, -1)
        try:
            image = decode_image(str(self.content), mode=ImageReadMode.RGB)
            return image if image.ndim == 3 else image[0]  # an animation: its first picture
        except RuntimeError as error:
            raise ValueError(f"{self.content} cannot be decoded as an image: {str(error).splitlines()[0]}") from None


def _digits(source: str | None) -> list[Item]:
    """Scikit-learn's digits: 64 grey values from 0 to 16 and the digit on each line, enlarged from 8×8 to 32×32."""
    with gzip.open(DATA / "digits.csv.gz", "rt", encoding="ascii") as file:
        rows = torch.tensor([[int(value) for value in row] for row in csv.reader(file)])
    pixels = (rows[:, :64].reshape(-1, 1, 8, 8) * 255 // 16).to(torch.uint8)
    # Integer arithmetic only (each pixel becomes a 4×4 square): the same bytes on every machine.
    pixels = pixels.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    labels = [str(digit) for digit in rows[:, 64].tolist()]
    return [Item(f"{i:04d}", label, None, image) for i, (label, image) in enumerate(zip(labels, pixels, strict=True))]


def _torchvision(dataset: str, source: str | None) -> list[Item]:
    """CIFAR-10, Fashion-MNIST or Imagenette out of `source`, downloaded into it where they are missing."""
    root = Path(source or f"runs/downloads/{dataset}")
    make = {
        "cifar10": lambda train: torchvision.datasets.CIFAR10(root, train=train, download=True),
        "fashion_mnist": lambda train: torchvision.datasets.FashionMNIST(root, train=train, download=True),
        "imagenette": lambda train: torchvision.datasets.Imagenette(
            root, "train" if train else "val", size="320px", download=not (root / "imagenette2-320").exists()
        ),
    }[dataset]
    items = []
    for train in (True, False):
        try:
            part = make(train)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"{dataset} is not in '{root}' and could not be downloaded ({reason}); put it there or set source"
            ) from None
        where = "train" if train else "test"
        if dataset == "imagenette":
            entries = [(path, label, Path(path)) for path, label in part._samples]
            names = [" ".join(name) if isinstance(name, tuple) else name for name in part.classes]
        else:
            arrays = torch.as_tensor(part.data)
            arrays = arrays.permute(0, 3, 1, 2) if arrays.ndim == 4 else arrays[:, None]
            labels = torch.as_tensor(part.targets).tolist()
            entries = [(f"{i:05d}", label, array) for i, (label, array) in enumerate(zip(labels, arrays, strict=True))]
            names = part.classes
        items += [Item(f"{where}/{Path(key).name}", names[label], not train, image) for key, label, image in entries]
    return items


def _folder(source: str | None) -> list[Item]:
    """Class folders, flat or below train/ and test/ (or val/, as ImageNet calls what a network is tested on)."""
    if source is None:
        raise ValueError("data set 'folder' needs source, the folder that holds the class folders")
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"source '{source}' is not a folder")
    if not (root / "train").is_dir():
        return _class_folders(root, root, test=None)
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    train = _class_folders(root, root / "train", test=None if held_out is None else False)
    return train + (_class_folders(root, held_out, test=True) if held_out else [])


def _class_folders(root: Path, folder: Path, test: bool | None) -> list[Item]:
    endings = {".jpg", ".jpeg", ".png", ".gif", ".webp"}
    files = sorted(path for path in folder.glob("*/**/*") if path.suffix.lower() in endings)
    if not files:
        raise ValueError(f"'{folder}' holds no class folders with images ({', '.join(sorted(endings))})")
    return [Item(path.relative_to(root).as_posix(), path.relative_to(folder).parts[0], test, path) for path in files]


_SOURCES = {
    "digits": _digits,
    "cifar10": lambda source: _torchvision("cifar10", source),
    "fashion_mnist": lambda source: _torchvision("fashion_mnist", source),
    "imagenette": lambda source: _torchvision("imagenette", source),
    "folder": _folder,
}


def _classes(found: list[str], wanted: int | list[str] | None) -> list[str]:
    """The classes to keep, in sorted order."""
    if isinstance(wanted, list) and len(set(wanted)) < len(wanted):
        raise ValueError("num_classes names a class twice")
    if isinstance(wanted, int):
        if not 2 <= wanted <= len(found):
            raise ValueError(f"num_classes is {wanted}, expected 2 to {len(found)}, the classes of the data set")
        return found[:wanted]
    if wanted is not None and (unknown := sorted(set(wanted) - set(found))):
        raise ValueError(f"num_classes names '{unknown[0]}', which is not a class of the data set")
    classes = sorted(wanted) if wanted is not None else found
    if len(classes) < 2:
        have = f"only the class '{classes[0]}' is there" if classes else "num_classes names no class"
        raise ValueError(f"{have}, at least 2 are needed")
    return classes


def _assign(items: list[Item], val_fraction: float, seed: int) -> dict[str, str]:
    """train, val or test for every key: per class, the first ones in the order of a hash of key and seed.

    A test split drawn here has no seed in its hash: another seed must not leak test images into training.
    """
    split = {item.key: "test" if item.test else "train" for item in items}
    by_class = defaultdict(list)
    for item in items:
        by_class[item.label].append(item)
    for members in by_class.values():
        if members[0].test is None:
            for key in _first(members, TEST_FRACTION, "test"):
                split[key] = "test"
        for key in _first([item for item in members if split[item.key] == "train"], val_fraction, f"val {seed}"):
            split[key] = "val"
    return split


def _first(items: list[Item], fraction: float, salt: str) -> list[str]:
    ordered = sorted((hashlib.sha256(f"{salt}:{item.key}".encode()).digest(), item.key) for item in items)
    return [key for _, key in ordered[: round(fraction * len(items))]]


def _write_manifest(path: Path, items: list[Item], split: dict[str, str], classes: list[str]) -> None:
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "class", "label", "key"])
        writer.writerows([split[item.key], item.label, classes.index(item.label), item.key] for item in items)


def _statistics(parts: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], from exact integer histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = sum(torch.bincount(images[:, channel].flatten(), minlength=256) for images in parts)
        share = counts.double() / counts.sum()
        centre = float((share * values).sum())
        mean.append(centre)
        std.append(float((share * (values - centre) ** 2).sum().sqrt()) or 1.0)
    return mean, std


def seed_of(*parts: object) -> int:
    """A seed for everything that these parts name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


class Batches:
    """Normalised batches (B, 3, S, S) with labels (B,), on the device. TO BE REPLACED BY THE DATA BRANCH."""

    def __init__(self, data, splits, batch_size, device, seed=None, *, workers=0, rank=0, world=1):
        names = (splits,) if isinstance(splits, str) else splits
        self.images = torch.cat([data.splits[name].images for name in names]).to(device)
        self.labels = torch.cat([data.splits[name].labels for name in names]).to(device)
        self.batch_size = min(batch_size, len(self.labels))
        self.seed, self.rank, self.world = seed, rank, world
        self.flip = data.dataset in MIRRORED
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(data.std, device=device).view(1, 3, 1, 1)

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.seed is not None or not rest else full + 1

    def epoch(self, epoch, start=0):
        count = len(self.labels)
        training = self.seed is not None
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(count, generator=generator) if training else torch.arange(count)
        for step in range(start, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = self.images[chosen]
            if training:
                images = self._augment(images, torch.Generator().manual_seed(seed_of(self.seed, epoch, step)))
            images, labels = images[self.rank :: self.world], self.labels[chosen][self.rank :: self.world]
            yield (images.float() / 255 - self.mean) / self.std, labels

    def _augment(self, images, generator):
        count, _, size, _ = images.shape
        reach = size // 8
        offset = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
        mirror = torch.rand(count, generator=generator) < (0.5 if self.flip else 0)
        rows = offset[0][:, None] + torch.arange(size)
        columns = offset[1][:, None] + torch.arange(size)
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
        padded = F.pad(images, (reach,) * 4)
        picture = torch.arange(count)[:, None, None]
        return padded.movedim(1, 3)[picture, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
