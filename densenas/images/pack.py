"""A pack: a data set as one folder, with an LMDB of encoded images a split and its manifest; here it is read."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from densenas.images.decoding import decode
from densenas.images.store import MEND, find, name_of, opened, read_sums, sha256
from densenas.images.transforms import resized
from densenas.runs.progress import progress
from densenas.threads import cores

CORES = cores()
CHUNK = 64  # images that wait at once for a thread; packing commits as many, which is what a kill can cost
COLUMNS = ["split", "class", "label", "key", "bytes", "digest"]
EXAMPLES = 10  # images that an error names one by one


def read_manifest(folder: Path) -> pd.DataFrame:
    """The rows of a pack: split, class, label, key, and size and SHA-256 of the source.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    path = folder / "manifest.csv"
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' is no pack, it has no {path.name}: {MEND}")
    damaged = f"'{path}' is damaged: {MEND}"
    if read_sums(folder).get(path.name) not in (None, sha256(path)):
        raise ValueError(damaged)
    types = {"class": str, "key": str, "digest": str, "label": int, "bytes": int}
    try:
        manifest = pd.read_csv(
            path, dtype=types, keep_default_na=False, encoding_errors="surrogateescape"
        )
    except ValueError:
        raise ValueError(damaged) from None
    if [*manifest.columns] != COLUMNS or manifest.empty:
        raise ValueError(damaged)
    return manifest


def verify(folder: Path) -> pd.DataFrame:
    """Proves that every image of the manifest is there as packed and decodes; returns the manifest.

    Raises ValueError that names the images for which this fails, or a file that is damaged.
    """
    manifest = read_manifest(folder)
    for split in sorted(set(manifest["split"])):
        opened(folder / f"{split}.lmdb")  # a damaged file is named here, not image by image
    damaged: dict[str, str] = {}
    with progress(len(manifest), "verifying") as bar, ThreadPoolExecutor(CORES) as pool:
        for start in range(0, len(manifest), CHUNK):
            futures = {}
            for row in manifest.iloc[start : start + CHUNK].itertuples():
                path = folder / f"{row.split}.lmdb"
                futures[row.key] = pool.submit(_damage, path, row.key, row.bytes, row.digest)
            for key, future in futures.items():
                reason = future.result()
                if reason:
                    damaged[key] = reason
            bar.update(len(futures))
    if damaged:
        many = f"{len(damaged)} of {len(manifest)} images of the pack '{folder}' are damaged"
        raise ValueError(f"{many}: {with_reasons(damaged)}; remove the folder and pack anew")
    return manifest


def _damage(path: Path, key: str, size: int, source: str) -> str | None:
    """What is wrong with an image whose source had this size and SHA-256; None where nothing is."""
    try:
        entry = find(opened(path).env, key)
        if entry is None:
            return "is missing"
        digest = hashlib.sha256(entry.encoded).hexdigest()
        row = entry.row
        if (row.size, row.source, row.digest) != (size, source, digest):
            return "has other bytes than were packed"
        decode(entry.encoded)
    except (ValueError, lmdb.Error) as error:
        return str(error)
    return None


def with_reasons(reasons: dict[str, str]) -> str:
    """The first of some images, each with its reason, in one line whatever the files are called."""
    listed = [f"{repr(key)[1:-1]} ({reasons[key]})" for key in sorted(reasons)[:EXAMPLES]]
    if len(reasons) > EXAMPLES:
        listed.append(f"and {len(reasons) - EXAMPLES} more")
    return "; ".join(listed)


class Packed:
    """One split of a pack, read image by image: `labels` (N,) int64, `names` in the LMDB."""

    def __init__(self, folder: Path, rows: pd.DataFrame, image_size: int) -> None:
        """`rows` are those of the manifest that are of this split."""
        self.path = folder / f"{rows['split'].iloc[0]}.lmdb"
        self.image_size = image_size
        self.version = opened(self.path).version  # a damaged file is refused here, not in a worker
        self.labels = torch.tensor(rows["label"].to_numpy())
        self.names = np.array([name_of(key) for key in rows["key"]])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W), as large as it was packed; ValueError where it is damaged."""
        pack = opened(self.path)
        if pack.version != self.version:
            raise ValueError(
                f"'{self.path}' was packed anew while it was read: load the data again"
            )
        try:
            with pack.env.begin(buffers=True) as reader:
                encoded = reader.get(self.names[index])
                if encoded is None:
                    raise ValueError("is missing")
                return decode(encoded)
        except (ValueError, lmdb.Error) as error:
            sentence = f"image {index} of '{self.path}' cannot be read ({error}): {MEND}"
            raise ValueError(sentence) from None

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """Width and height of about that many images, evenly spaced."""
        sizes = []
        for index in range(0, len(self), max(1, len(self) // count)):
            _, height, width = self.read(index).shape
            sizes.append((width, height))
        return sizes

    @cached_property
    def images(self) -> Tensor:
        """All images as uint8 (N, 3, image_size, image_size): resized, the centre cropped."""
        size = self.image_size
        resize = resized(size)
        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = resize(self.read(index))

        with ThreadPoolExecutor(CORES) as pool:
            for _ in pool.map(fill, range(len(self))):
                pass  # raises what `fill` raised
        return images
