"""A pack: a data set as one folder, an LMDB of encoded images a split, with its manifest and classes inside."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from threading import Lock

import lmdb
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, encode_png
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from densenas.config import write_text
from densenas.run import progress

CORES = len(os.sched_getaffinity(0))
CHUNK = 64  # images a commit: what a kill can cost


@dataclass(frozen=True)
class Item:
    """One image of a source: a key that names it on every machine, its class, and a file or an array (C, H, W)."""

    key: str
    label: str
    part: str | None  # train, val or test as the source itself has it; None: to be drawn
    content: Path | Tensor

    def encoded(self) -> tuple[bytes, int, str]:
        """The bytes to keep, and size and SHA-256 of the source: of the file, or of an array's pixels."""
        if isinstance(self.content, Path):
            encoded = source = self.content.read_bytes()
        else:
            # A PNG's bytes depend on the library that wrote it, its pixels do not.
            encoded, source = encode_png(self.content).numpy().tobytes(), self.content.numpy().tobytes()
        return encoded, len(source), hashlib.sha256(source).hexdigest()


def decode(encoded: bytes | memoryview) -> Tensor:
    """uint8 (3, H, W) of a JPEG, PNG, GIF or WebP, upright as its EXIF says.

    Grey is repeated, CMYK and palettes are converted, alpha is dropped, 16 bits become 8, of an animation the first
    picture is taken. Raises ValueError where that fails.
    """
    try:
        buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        image = decode_image(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rsplit(".cpp:", 1)[-1].partition(", ")[2] if encoded else "is empty"
        raise ValueError(reason or "not an image") from None
    image = image if image.ndim == 3 else image[0]
    return image if image.dtype == torch.uint8 else TF.to_dtype(image, torch.uint8, scale=True)


def name_of(key: str) -> bytes:
    """What an image is called in the LMDB, whose keys are at most 511 bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32].encode()


def write_pack(
    folder: Path,
    splits: dict[str, list[Item]],
    shorter: int | None = None,
    quality: int = 90,
    skip_broken: bool = False,
) -> None:
    """Packs every image, as it is or, given `shorter`, once resized to that shorter side as JPEG of this quality.

    Works in `<folder>.partial`, goes on with what a killed run left there, and renames it at the end; a finished pack
    of the same images by name is not read again. Raises ValueError with one sentence: without `skip_broken` at the
    end, naming every broken image (the others stay packed for the rerun), or where `folder` cannot be written (then
    nothing is left behind).
    """
    rows = [(split, item.label, item.key) for split, items in splits.items() for item in items]
    plan = hashlib.sha256(json.dumps([shorter, quality, rows]).encode()).hexdigest()
    partial = folder.with_name(folder.name + ".partial")
    broken: dict[str, str] = {}
    try:
        if (about := _read_about(folder)).get("plan") == plan:
            if not about["broken"]:
                return
            shutil.rmtree(partial, ignore_errors=True)
            _open_once.cache_clear()  # LMDB refuses to open a file twice
            folder.rename(partial)  # to try again what was broken
        elif _read_about(partial).get("plan") != plan:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_text(partial / "about.json", json.dumps({"plan": plan}))
        with progress(len(rows), "packing") as bar:
            for split, items in splits.items():
                broken |= _write_split(partial / f"{split}.lmdb", items, shorter, quality, bar)
        if broken and not skip_broken:
            reasons = "; ".join(f"{key} ({reason})" for key, reason in sorted(broken.items()))
            many = f"{len(broken)} of {len(rows)} images cannot be read"
            raise ValueError(f"{many}: {reasons}; mend or remove them, or set skip_broken")
        _write_manifest(partial, [row for row in rows if row[2] not in broken])
        about = {"plan": plan, "shorter": shorter, "quality": quality, "broken": broken}
        write_text(partial / "about.json", json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, lmdb.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        raise ValueError(f"the pack '{folder}' cannot be written: {reason}") from None


def _write_manifest(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    labels = {name: label for label, name in enumerate(sorted({name for _, name, _ in rows}))}
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "class", "label", "key", "bytes", "digest"])
        for split, part in groupby(rows, key=lambda row: row[0]):
            with closing(_open(folder / f"{split}.lmdb")) as env, env.begin() as reader:
                for _, name, key in part:
                    size, digest, _ = reader.get(b"row:" + name_of(key)).decode().split()
                    writer.writerow([split, name, labels[name], key, size, digest])


def _read_about(folder: Path) -> dict:
    path = folder / "about.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _open(path: Path, **options: bool | int) -> lmdb.Environment:
    # Nobody writes to a finished pack, so it needs no lock and may lie on a read-only medium.
    return lmdb.open(str(path), **{"subdir": False, "readonly": True, "lock": False, "readahead": False, **options})


def _write_split(path: Path, items: list[Item], shorter: int | None, quality: int, bar: tqdm) -> dict[str, str]:
    """Adds what is missing to one LMDB; returns the reason for each key that cannot be read."""

    def work(item: Item) -> tuple[bytes, bytes] | str:
        try:
            encoded, size, digest = item.encoded()
            image = decode(encoded)
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)
        if shorter and min(image.shape[1:]) > shorter:
            encoded = encode_jpeg(TF.resize(image, [shorter], antialias=True), quality).numpy().tobytes()
        return encoded, f"{size} {digest} {hashlib.sha256(encoded).hexdigest()}".encode()

    broken = {}
    # A killed process loses no page that it wrote; only a power failure could, and `verify` would tell.
    options = {"readonly": False, "map_size": 1 << 26, "sync": False}
    with closing(_open(path, **options)) as env, ThreadPoolExecutor(CORES) as pool:
        with env.begin() as reader:
            todo = [item for item in items if reader.get(b"row:" + name_of(item.key)) is None]
        bar.update(len(items) - len(todo))
        for start in range(0, len(todo), CHUNK):
            keys = [item.key for item in todo[start : start + CHUNK]]
            done = dict(zip(keys, pool.map(work, todo[start : start + CHUNK]), strict=True))
            broken |= {key: result for key, result in done.items() if isinstance(result, str)}
            _commit(env, {name_of(key): result for key, result in done.items() if key not in broken})
            bar.update(len(keys))
        env.sync(True)
    return broken


def _commit(env: lmdb.Environment, done: dict[bytes, tuple[bytes, bytes]]) -> None:
    """One transaction; the map doubles until it fits."""
    while True:
        try:
            with env.begin(write=True) as writer:
                for name, (encoded, row) in done.items():
                    writer.put(name, encoded)
                    writer.put(b"row:" + name, row)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def verify(folder: Path) -> int:
    """Proves that every image of the manifest is there as it was packed and decodes; returns their number.

    Raises ValueError that names every image for which this fails.
    """

    def problem(row: tuple[str, str, int, str]) -> str | None:
        with _environment(folder / f"{row[0]}.lmdb").begin() as reader:
            encoded, entry = (reader.get(prefix + name_of(row[1])) for prefix in (b"", b"row:"))
        if encoded is None or entry is None:
            return "is missing"
        if entry.decode().split() != [str(row[2]), row[3], hashlib.sha256(encoded).hexdigest()]:
            return "has other bytes than were packed"
        try:
            decode(encoded)
        except ValueError as error:
            return str(error)
        return None

    rows = [*read_manifest(folder)[["split", "key", "bytes", "digest"]].itertuples(index=False, name=None)]
    with progress(len(rows), "verifying") as bar, ThreadPoolExecutor(CORES) as pool:
        wrong = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            found = zip(chunk, pool.map(problem, chunk), strict=True)
            wrong += [f"{row[1]} ({reason})" for row, reason in found if reason]
            bar.update(len(chunk))
    if wrong:
        many = f"{len(wrong)} of {len(rows)} images of the pack '{folder}' are damaged"
        raise ValueError(f"{many}: {'; '.join(wrong)}; remove the folder and pack anew")
    return len(rows)


def read_manifest(folder: Path) -> pd.DataFrame:
    """The rows of a pack: split, class, label, key, and size and SHA-256 of the source."""
    text = {"class": str, "key": str, "digest": str}
    return pd.read_csv(folder / "manifest.csv", dtype=text, keep_default_na=False, encoding_errors="surrogateescape")


@lru_cache(maxsize=12)
def _open_once(path: Path, inode: int) -> lmdb.Environment:
    return _open(path)


_OPENING = Lock()
os.register_at_fork(after_in_child=_open_once.cache_clear)  # a child must not use its parent's


def _environment(path: Path) -> lmdb.Environment:
    """Opened on first use and once in each process: LMDB refuses a second time, and none can be pickled."""
    with _OPENING:
        return _open_once(path, path.stat().st_ino)


class Packed:
    """One split of a pack, read image by image: `labels` (N,) int64, `names` in the LMDB."""

    def __init__(self, folder: Path, rows: pd.DataFrame, image_size: int) -> None:
        self.path, self.image_size = folder / f"{rows['split'].iloc[0]}.lmdb", image_size
        self.labels = torch.tensor(rows["label"].to_numpy())
        self.names = np.array([name_of(key) for key in rows["key"]])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W), as large as it was packed."""
        with _environment(self.path).begin(buffers=True) as reader:
            return decode(reader.get(self.names[index]))

    __getitem__ = read

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """Width and height of about that many images, evenly spaced."""
        return [(*self.read(k).shape[:0:-1],) for k in range(0, len(self), max(1, len(self) // count))]

    @cached_property
    def images(self) -> Tensor:
        """All images as uint8 (N, 3, image_size, image_size): the shorter side resized, the centre cropped."""
        resize = v2.Compose([v2.Resize(self.image_size, antialias=True), v2.CenterCrop(self.image_size)])
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = resize(self.read(index))

        with ThreadPoolExecutor(CORES) as pool:
            deque(pool.map(fill, range(len(self))), maxlen=0)
        return images
