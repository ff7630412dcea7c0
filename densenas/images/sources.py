"""Sources: a data set's images as items, from this repository, torchvision, or class folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
import torch
from torchvision import datasets

from densenas.files import DATA, one_line
from densenas.images.folders import quoted, read_folder
from densenas.images.items import Item, Source
from densenas.runs.run import Run

IMAGENETTE = {"n01440764", "n02102040", "n02979186", "n03000684", "n03028079"}
IMAGENETTE |= {"n03394916", "n03417042", "n03425413", "n03445777", "n03888257"}
CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
# Of the sets that may have to be downloaded first.
CLASSES = {
    "cifar10": CIFAR10,
    "fashion_mnist": {*datasets.FashionMNIST.classes},
    "imagenette": IMAGENETTE,
}
IMAGENETTE_IMAGES = {"train": 9469, "val": 3925}


class NotDownloadedError(FileNotFoundError):
    """A set of torchvision's that is not there, and must not be downloaded now."""


def read_source(dataset: str, source: str | None, download: bool = True) -> Source:
    """The items of a data set, and notes for the user on how it was read; no image file is opened.

    Raises ValueError or FileNotFoundError with one sentence where it cannot be had, or what its
    folders hold is unclear; `NotDownloadedError` where it would have to be downloaded first and must not be.
    """
    if dataset == "digits":
        if source:
            raise ValueError("data set 'digits' has no source: leave it out or set dataset: folder")
        return Source(_digits(), [])
    if dataset == "folder":
        if not source:
            needed = "source, the folder that holds the class folders"
            raise ValueError(f"data set 'folder' needs {needed}")
        return read_folder(root_of(source))
    root = root_of(source) if source else Run("downloads").work / dataset
    if os.path.lexists(root) and not os.path.isdir(root):
        raise FileNotFoundError(f"source {str(root)!r} is not a folder")
    if dataset == "imagenette":
        return _imagenette(root, download)
    return Source(_published(dataset, root, download), [])


def root_of(source: str) -> Path:
    """The folder that source means; a relative one lies in the working directory."""
    return Path(os.path.expanduser(source))


def _digits() -> list[Item]:
    """Scikit-learn's digits: 64 grey values from 0 to 16 and the digit on each line, then 32×32."""
    rows = torch.tensor(pd.read_csv(DATA / "digits.csv.gz", header=None).to_numpy())
    pixels = (rows[:, :64].reshape(-1, 1, 8, 8) * 255 // 16).to(torch.uint8)
    # Integer arithmetic only (each pixel becomes a 4×4 square): the same bytes on every machine.
    pixels = pixels.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    labels = [str(digit) for digit in rows[:, 64].tolist()]
    return [Item(f"{k:04d}", labels[k], None, pixels[k]) for k in range(len(labels))]


def _published(dataset: str, root: Path, download: bool) -> list[Item]:
    """CIFAR-10 or Fashion-MNIST out of `root`, downloaded into it where missing or damaged."""
    try:
        return _arrays(dataset, root, download=False)
    # What a damaged file raises depends on where it is cut; downloading again may mend it.
    except Exception:
        if not download:
            raise NotDownloadedError(f"{dataset} is not in '{root}'") from None
    try:
        # Two processes must not download into each other's files.
        with Run("downloads").alone():
            return _arrays(dataset, root, download=True)
    # Network, disk, archive and pickle have an error each.
    except Exception as error:
        raise _absent(dataset, root, error) from None


def _arrays(dataset: str, root: Path, download: bool) -> list[Item]:
    kind = datasets.CIFAR10 if dataset == "cifar10" else datasets.FashionMNIST
    items = []
    for split in ("train", "test"):
        part = kind(root, train=split == "train", download=download)
        arrays = torch.as_tensor(part.data)
        arrays = arrays.movedim(3, 1) if arrays.ndim == 4 else arrays[:, None]
        for index, (label, array) in enumerate(zip(part.targets, arrays, strict=True)):
            items.append(Item(f"{split}/{index:05d}", part.classes[label], split, array))
    return items


def _imagenette(root: Path, download: bool) -> Source:
    """Imagenette in ImageNet's layout out of `root`, downloaded into it where it is missing."""
    folder = root / "imagenette2-320"
    if not os.path.isdir(folder):
        if not download:
            raise NotDownloadedError(f"imagenette is not in '{root}'")
        _download_imagenette(folder)
    again = "delete the folder, and the whole set will be downloaded"
    try:
        source = read_folder(folder)
    except ValueError as error:
        raise ValueError(f"imagenette in '{folder}' is incomplete, {error}; {again}") from None
    for split, count in IMAGENETTE_IMAGES.items():
        part = [item for item in source.items if (item.part == "test") == (split == "val")]
        classes = {item.label for item in part}
        missing = sorted(IMAGENETTE - classes)
        if missing:
            lacks = f"{split} lacks {quoted(missing)}"
            raise ValueError(f"imagenette in '{folder}' is incomplete, {lacks}: {again}")
        foreign = sorted(classes - IMAGENETTE)
        if foreign:
            raise ValueError(f"{quoted(foreign)} in '{folder}' is no class of imagenette: {again}")
        if len(part) != count:
            source.notes.append(
                f"imagenette has {count:,} images in {split}, here are {len(part):,}"
            )
    return source


def _download_imagenette(folder: Path) -> None:
    unpacking = folder.parent / "unpacking"
    try:
        with Run("downloads").alone():
            if folder.is_dir():
                return
            # torchvision takes half a folder for the set, so it gets its name when it is whole.
            shutil.rmtree(unpacking / folder.name, ignore_errors=True)
            datasets.Imagenette(unpacking, size="320px", download=True)
            (unpacking / folder.name).rename(folder)
            shutil.rmtree(unpacking)
    # Network, disk and archive have an error each.
    except Exception as error:
        raise _absent("imagenette", folder.parent, error) from None


def _absent(dataset: str, root: Path, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{dataset} is not in '{root}' and could not be downloaded ({one_line(error)});"
        f" put it there or set source, and delete what is only half there"
    )
