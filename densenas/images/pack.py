"""A pack: a data set as one folder, with an LMDB of encoded images a split and its manifest."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import stat
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import lmdb
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.io import encode_jpeg, encode_png
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from densenas.files import atomic, write_text
from densenas.images.decoding import decode, middle
from densenas.images.store import (
    MEND,
    SUMS,
    TABLES,
    commit,
    environment,
    is_intact,
    name_of,
    open_lmdb,
    read_sums,
    reason_of,
    resume,
    sha256,
)
from densenas.runs.run import progress
from densenas.settings import LARGEST_PACK

CORES = len(os.sched_getaffinity(0))
CHUNK = 64  # images a commit: what a kill can cost
BYTES = 1 << 29  # of one image file; 100 million pixels of 16 bits, not compressed, have as many
COLUMNS = ["split", "class", "label", "key", "bytes", "digest"]
NAMED = 10  # images that an error names one by one
CHANGED = "changed while it was packed"


@dataclass(frozen=True)
class Item:
    """One image of a source: a key that names it on every machine, its class, a file or an array.

    An array is uint8 (C, H, W).
    """

    key: str
    label: str
    part: str | None  # train, val or test as the source itself has it; None: to be drawn
    content: Path | Tensor

    def encoded(self) -> tuple[bytes, int, str]:
        """The bytes to keep, and size and SHA-256 of the file or of an array's pixels.

        Raises OSError or ValueError where a file cannot be read. Waits for no pipe, and takes at
        most `BYTES`.
        """
        if isinstance(self.content, Path):
            encoded = source = _read_file(self.content)
        else:
            # A PNG's bytes depend on the library that wrote it, its pixels do not.
            encoded = encode_png(self.content).numpy().tobytes()
            source = self.content.numpy().tobytes()
        return encoded, len(source), hashlib.sha256(source).hexdigest()

    def origin(self) -> str:
        """What tells this source from others: a file's path, size and times, an array's pixels.

        The time of the last change of status is among them: nobody can set it back, as `cp -p`
        and `tar` do with that of the content.
        """
        if isinstance(self.content, Tensor):
            shape = str(tuple(self.content.shape)).encode()
            return hashlib.sha256(shape + self.content.numpy().tobytes()).hexdigest()[:32]
        try:
            status = self.content.stat()
            about = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except (OSError, ValueError) as error:
            about = str(error)
        return hashlib.sha256(os.fsencode(f"{self.content.absolute()} {about}")).hexdigest()[:32]


def _read_file(path: Path) -> bytes:
    # Opened without waiting, a pipe that nobody writes to does not hold up everything.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        if status.st_size > BYTES:
            raise ValueError(f"has {status.st_size / 1e9:.1f} GB, more than {BYTES / 1e9:.1f} GB")
        return file.read(status.st_size + 1)


def fingerprint(items: Iterable[Item]) -> str:
    """SHA-256 over keys, classes, parts and origins: another one where a pack would be another.

    Of a file it reads no more than size and times.
    """
    entries = sorted([item.key, item.label, str(item.part), item.origin()] for item in items)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_pack(
    folder: Path,
    splits: dict[str, list[Item]],
    shorter: int | None = None,
    quality: int = 90,
    skip_broken: bool = False,
) -> None:
    """Packs every image as it is or, given `shorter`, once resized to that side as JPEG.

    Works in `<folder>.partial`, which takes the place of `folder` once it is whole. What a killed
    run left there and what an intact `folder` holds is taken over, image by image, where the source
    is still the same. Raises ValueError with one sentence: without `skip_broken` at the end, naming
    the broken images (the others stay packed for the rerun); where the source changes meanwhile;
    where `folder` cannot be written, as on a full disk (what is packed stays).
    """
    if shorter is not None and shorter > LARGEST_PACK:
        raise ValueError(f"pack is {shorter} pixels, at most {LARGEST_PACK} are possible")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}, expected 1 to 100")
    partial = folder.with_name(folder.name + ".partial")
    try:
        _write(folder, partial, splits, Encoder(shorter, quality), skip_broken)
    except (OSError, lmdb.Error) as error:
        reason = reason_of(error)
        if partial.is_dir() and shutil.disk_usage(partial).free < 1e6:
            reason = "No space left on device"  # LMDB may call that an input/output error
        elif getattr(error, "filename", None):
            reason += f" ('{error.filename}')"
        sentence = f"the pack '{folder}' cannot be written: {reason}"
        if partial.is_dir():
            sentence += f"; what is packed stays in '{partial}', the same call goes on from there"
        raise ValueError(sentence) from None


def _write(
    folder: Path, partial: Path, splits: dict[str, list[Item]], encoder: Encoder, skip_broken: bool
) -> None:
    rows = [(split, item.label, item.key) for split, items in splits.items() for item in items]
    origins = {item.key: encoder.origin(item) for items in splits.values() for item in items}
    if len(origins) < len(rows):
        twice = Counter(key for _, _, key in rows).most_common(1)[0][0]
        raise ValueError(f"two images have the same name '{twice}'")
    plan = hashlib.sha256(json.dumps([rows, [*origins.values()]]).encode()).hexdigest()
    if is_intact(folder):
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        again = [item for part in splits.values() for item in part if item.key in about["broken"]]
        if about["plan"] == plan and not any(encoder.can_read(item, origins) for item in again):
            _report(about["broken"], len(rows), skip_broken, folder)
            return
        encoder.packed = [environment(path) for path in sorted(folder.glob("*.lmdb"))]
    elif folder.exists():
        print(f"the pack '{folder}' is damaged or of an earlier version: it is packed anew")
    partial.mkdir(parents=True, exist_ok=True)
    broken: dict[str, str] = {}
    with progress(len(rows), "packing") as bar:
        for split, items in splits.items():
            broken |= _write_split(partial / f"{split}.lmdb", items, origins, encoder, bar)
    about = {"plan": plan, "shorter": encoder.shorter, "quality": encoder.quality, "broken": broken}
    write_text(partial / "about.json", json.dumps(about))
    _report(broken, len(rows), skip_broken, folder if skip_broken else partial)
    _write_manifest(partial, [row for row in rows if row[2] not in broken])
    names = sorted({*TABLES, *(f"{split}.lmdb" for split in splits)})
    write_text(partial / SUMS, "".join(f"{sha256(partial / name)}  {name}\n" for name in names))
    if folder.exists():
        shutil.rmtree(folder)  # a kill here costs nothing, all of it is in the other one
    partial.rename(folder)


def _report(broken: dict[str, str], count: int, skip_broken: bool, place: Path) -> None:
    """Says which images are not in the pack; raises ValueError unless that was asked for."""
    changed = {key: reason for key, reason in broken.items() if reason == CHANGED}
    if changed:
        many = f"{len(changed)} of {count} images changed while they were packed"
        raise ValueError(f"{many}: {_named(changed)}; the same call packs them anew")
    if not broken:
        return
    listed = f", all listed in '{place / 'about.json'}'" if len(broken) > NAMED else ""
    sentence = f"{len(broken)} of {count} images cannot be read: {_named(broken)}{listed}"
    if not skip_broken:
        raise ValueError(f"{sentence}; mend or remove them, or set skip_broken")
    print(f"{sentence}; they are left out")


def _named(reasons: dict[str, str]) -> str:
    """The first of some images, each with its reason, in one line whatever the files are called."""
    named = []
    for key, reason in sorted(reasons.items())[:NAMED]:
        named.append(f"{repr(key)[1:-1]} ({reason})")
    if len(reasons) > NAMED:
        named.append(f"and {len(reasons) - NAMED} more")
    return "; ".join(named)


@dataclass
class Encoder:
    """From an item to what is kept of it: out of a pack that has it, or else out of its source."""

    shorter: int | None
    quality: int
    packed: Sequence[lmdb.Environment] = ()

    def origin(self, item: Item) -> str:
        return f"{item.origin()}/{self.shorter}/{self.quality if self.shorter else None}"

    def can_read(self, item: Item, origins: dict[str, str]) -> bool:
        return not isinstance(self.entry(item, origins[item.key]), str)

    def entry(self, item: Item, origin: str) -> tuple[bytes, bytes] | str:
        """The bytes and the row of an image; or the reason, where it cannot be read."""
        name = name_of(item.key)
        for env in self.packed:
            with env.begin() as reader:
                row = reader.get(b"row:" + name)
                if row is not None and row.split()[-1] == origin.encode():
                    return reader.get(name), row
        try:
            encoded, size, digest = item.encoded()
            image = decode(encoded)
        except (OSError, MemoryError) as error:
            return reason_of(error)
        except ValueError as error:
            return str(error) if self.origin(item) == origin else CHANGED
        if isinstance(item.content, Path) and self.origin(item) != origin:
            return CHANGED
        image = middle(image)
        if self.shorter and min(image.shape[1:]) > self.shorter:
            image = TF.resize(image, [self.shorter], antialias=True)
            encoded = encode_jpeg(image, self.quality).numpy().tobytes()
        return encoded, f"{size} {digest} {hashlib.sha256(encoded).hexdigest()} {origin}".encode()


def _write_split(
    path: Path, items: list[Item], origins: dict[str, str], encoder: Encoder, bar: tqdm
) -> dict[str, str]:
    """Adds what is missing to one LMDB; returns the reason for each key that cannot be read."""
    broken = {}
    env, names = resume(path, {name_of(item.key): origins[item.key].encode() for item in items})
    with closing(env), ThreadPoolExecutor(CORES) as pool:
        todo = [item for item in items if name_of(item.key) not in names]
        bar.update(len(items) - len(todo))
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            entries = pool.map(lambda item: encoder.entry(item, origins[item.key]), chunk)
            done = {}
            for item, entry in zip(chunk, entries, strict=True):
                if isinstance(entry, str):
                    broken[item.key] = entry
                else:
                    done[name_of(item.key)] = entry
            commit(env, done)
            bar.update(len(chunk))
    return broken


def _write_manifest(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    labels = {name: label for label, name in enumerate(sorted({name for _, name, _ in rows}))}
    with (
        atomic(folder / "manifest.csv") as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for split, part in groupby(rows, key=lambda row: row[0]):
            with closing(open_lmdb(folder / f"{split}.lmdb")) as env, env.begin() as reader:
                for _, name, key in part:
                    size, digest, *_ = reader.get(b"row:" + name_of(key)).decode().split()
                    writer.writerow([split, name, labels[name], key, size, digest])


def verify(folder: Path) -> int:
    """Proves that every image of the manifest is there as packed and decodes; returns their number.

    Raises ValueError that names the images for which this fails, or a file that is damaged.
    """

    def problem(row: tuple[str, str, int, str]) -> str | None:
        split, key, size, digest = row
        try:
            with environment(folder / f"{split}.lmdb").begin() as reader:
                encoded, entry = reader.get(name_of(key)), reader.get(b"row:" + name_of(key))
            if encoded is None or entry is None:
                return "is missing"
            expected = f"{size} {digest} {hashlib.sha256(encoded).hexdigest()}"
            if entry.split()[:3] != expected.encode().split():
                return "has other bytes than were packed"
            decode(encoded)
        except (ValueError, lmdb.Error) as error:
            return str(error)
        return None

    manifest = read_manifest(folder)[["split", "key", "bytes", "digest"]]
    rows = [*manifest.itertuples(index=False, name=None)]
    for split in sorted({row[0] for row in rows}):
        environment(folder / f"{split}.lmdb")
    wrong = {}
    with progress(len(rows), "verifying") as bar, ThreadPoolExecutor(CORES) as pool:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            for row, reason in zip(chunk, pool.map(problem, chunk), strict=True):
                if reason:
                    wrong[row[1]] = reason
            bar.update(len(chunk))
    if wrong:
        many = f"{len(wrong)} of {len(rows)} images of the pack '{folder}' are damaged"
        raise ValueError(f"{many}: {_named(wrong)}; remove the folder and pack anew")
    return len(rows)


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
        rows = pd.read_csv(
            path, dtype=types, keep_default_na=False, encoding_errors="surrogateescape"
        )
    except ValueError:
        raise ValueError(damaged) from None
    if [*rows.columns] != COLUMNS or not len(rows):
        raise ValueError(damaged)
    return rows


class Packed:
    """One split of a pack, read image by image: `labels` (N,) int64, `names` in the LMDB."""

    def __init__(self, folder: Path, rows: pd.DataFrame, image_size: int) -> None:
        self.path, self.image_size = folder / f"{rows['split'].iloc[0]}.lmdb", image_size
        environment(self.path)  # a damaged file is refused here, and not in a worker
        self.labels = torch.tensor(rows["label"].to_numpy())
        self.names = np.array([name_of(key) for key in rows["key"]])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W), as large as it was packed; ValueError where it is damaged."""
        env = environment(self.path)
        try:
            with env.begin(buffers=True) as reader:
                encoded = reader.get(self.names[index])
                if encoded is None:
                    raise ValueError("is missing")
                return decode(encoded)
        except (ValueError, lmdb.Error) as error:
            sentence = f"image {index} of '{self.path}' cannot be read ({error}): {MEND}"
            raise ValueError(sentence) from None

    __getitem__ = read

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """Width and height of about that many images, evenly spaced."""
        every = max(1, len(self) // count)
        return [(*self.read(k).shape[:0:-1],) for k in range(0, len(self), every)]

    @cached_property
    def images(self) -> Tensor:
        """All images as uint8 (N, 3, image_size, image_size): resized, the centre cropped."""
        size = self.image_size
        steps = [middle, v2.Resize(size, antialias=True), v2.CenterCrop(size)]
        resize = v2.Compose(steps)
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = resize(self.read(index))

        with ThreadPoolExecutor(CORES) as pool:
            deque(pool.map(fill, range(len(self))), maxlen=0)
        return images
