"""Packing: from the items of each split to a pack, which a kill, a full disk or a broken image does not spoil."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import lmdb
from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from densenas.files import atomic, write_text
from densenas.images.decoding import decode
from densenas.images.items import Item
from densenas.images.pack import CHUNK, COLUMNS, CORES, EXAMPLES, with_reasons
from densenas.images.store import (
    TABLES,
    Entry,
    Row,
    commit,
    find,
    find_row,
    is_intact,
    name_of,
    open_lmdb,
    opened,
    reason_of,
    resume,
    write_sums,
)
from densenas.images.transforms import middle
from densenas.runs.progress import progress

CHANGED = "changed while it was packed"


def write_pack(
    folder: Path,
    splits: dict[str, list[Item]],
    shorter: int | None = None,
    quality: int = 90,
    skip_broken: bool = False,
) -> None:
    """Packs every image as it is or, given `shorter`, once resized to that side as JPEG of `quality`.

    Works in `<folder>.partial`, which takes the place of `folder` once it is whole. What a killed
    run left there and what an intact `folder` holds is taken over, image by image, where the source
    is still the same. Raises ValueError with one sentence: without `skip_broken` at the end, naming
    the broken images (the others stay packed for the rerun); where the source changes meanwhile;
    where `folder` cannot be written, as on a full disk (what is packed stays).
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        _write(folder, partial, splits, Encoder(shorter, quality), skip_broken)
    except (OSError, lmdb.Error) as error:
        reason = reason_of(error)
        filename = getattr(error, "filename", None)
        if partial.is_dir() and shutil.disk_usage(partial).free < 1e6:
            reason = "No space left on device"  # LMDB may call that an input/output error
        elif filename:
            reason += f" ('{filename}')"
        sentence = f"the pack '{folder}' cannot be written: {reason}"
        if partial.is_dir():
            sentence += f"; what is packed stays in '{partial}', the same call goes on from there"
        raise ValueError(sentence) from None


@dataclass(frozen=True)
class Unreadable:
    reason: str


@dataclass(frozen=True)
class Encoder:
    """How an image is kept: as it is, or resized to a shorter side as JPEG of this quality."""

    shorter: int | None
    quality: int

    def origin(self, item: Item) -> str:
        """What tells an item, kept in this way, from others."""
        return f"{item.origin()}/{self.shorter}/{self.quality if self.shorter else None}"

    def can_read(self, item: Item, origins: dict[str, str]) -> bool:
        return isinstance(self.encode(item, origins[item.key]), Entry)

    def encode(self, item: Item, origin: str) -> Entry | Unreadable:
        """What is kept of an item that had this origin when packing began."""
        try:
            original = item.read()
            image = middle(decode(original.encoded))
        except (OSError, MemoryError) as error:
            return Unreadable(reason_of(error))
        except ValueError as error:
            return Unreadable(str(error) if self.origin(item) == origin else CHANGED)
        if isinstance(item.content, Path) and self.origin(item) != origin:
            return Unreadable(CHANGED)
        encoded = original.encoded
        if self.shorter and min(image.shape[1:]) > self.shorter:
            image = TF.resize(image, [self.shorter], antialias=True)
            encoded = encode_jpeg(image, self.quality).numpy().tobytes()
        digest = hashlib.sha256(encoded).hexdigest()
        return Entry(encoded, Row(original.size, original.digest, digest, origin))


@dataclass(frozen=True)
class Packer:
    """From an item to what is kept of it: out of a pack that has it, or else out of its source."""

    encoder: Encoder
    origins: dict[str, str]  # by key, when packing began
    packed: list[lmdb.Environment]  # of the finished pack that this one will replace

    def entry(self, item: Item) -> Entry | Unreadable:
        origin = self.origins[item.key]
        for env in self.packed:
            entry = find(env, item.key)
            if entry and entry.row.origin == origin:
                return entry
        return self.encoder.encode(item, origin)


def _write(
    folder: Path, partial: Path, splits: dict[str, list[Item]], encoder: Encoder, skip_broken: bool
) -> None:
    items = [item for part in splits.values() for item in part]
    origins = {item.key: encoder.origin(item) for item in items}
    if len(origins) < len(items):
        twice, _ = Counter(item.key for item in items).most_common(1)[0]
        raise ValueError(f"two images have the same name '{twice}'")
    rows = [(split, item.label, item.key) for split, part in splits.items() for item in part]
    plan = hashlib.sha256(json.dumps([rows, [*origins.values()]]).encode()).hexdigest()
    packed: list[lmdb.Environment] = []
    if is_intact(folder):
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        again = [item for item in items if item.key in about["broken"]]
        if about["plan"] == plan and not any(encoder.can_read(item, origins) for item in again):
            _report(about["broken"], len(items), skip_broken, folder)
            return
        packed = [opened(path).env for path in sorted(folder.glob("*.lmdb"))]
    elif folder.exists():
        print(f"the pack '{folder}' is damaged or of an earlier version: it is packed anew")
    partial.mkdir(parents=True, exist_ok=True)
    packer = Packer(encoder, origins, packed)
    broken: dict[str, str] = {}
    with progress(len(items), "packing") as bar:
        for split, part in splits.items():
            broken |= _write_split(partial / f"{split}.lmdb", part, packer, bar)
    about = {"plan": plan, "shorter": encoder.shorter, "quality": encoder.quality, "broken": broken}
    write_text(partial / "about.json", json.dumps(about))
    _report(broken, len(items), skip_broken, folder if skip_broken else partial)
    _write_manifest(partial, splits, broken)
    write_sums(partial, {*TABLES, *(f"{split}.lmdb" for split in splits)})
    if folder.exists():
        shutil.rmtree(folder)  # a kill here costs nothing, all of it is in the other one
    partial.rename(folder)


def _report(broken: dict[str, str], count: int, skip_broken: bool, place: Path) -> None:
    """Prints which images are not in the pack; raises ValueError unless these may be left out."""
    changed = {key: reason for key, reason in broken.items() if reason == CHANGED}
    if changed:
        many = f"{len(changed)} of {count} images changed while they were packed"
        raise ValueError(f"{many}: {with_reasons(changed)}; the same call packs them anew")
    if not broken:
        return
    listed = f", all listed in '{place / 'about.json'}'" if len(broken) > EXAMPLES else ""
    sentence = f"{len(broken)} of {count} images cannot be read: {with_reasons(broken)}{listed}"
    if not skip_broken:
        raise ValueError(f"{sentence}; mend or remove them, or set skip_broken")
    print(f"{sentence}; they are left out")


def _write_split(path: Path, items: list[Item], packer: Packer, bar: tqdm) -> dict[str, str]:
    """Adds what is missing to one LMDB; returns the reason for each key that cannot be read."""
    broken = {}
    env, names = resume(path, {name_of(item.key): packer.origins[item.key] for item in items})
    with closing(env), ThreadPoolExecutor(CORES) as pool:
        todo = [item for item in items if name_of(item.key) not in names]
        bar.update(len(items) - len(todo))
        for start in range(0, len(todo), CHUNK):
            futures = {}
            for item in todo[start : start + CHUNK]:
                futures[item.key] = pool.submit(packer.entry, item)
            entries = {}
            for key, future in futures.items():
                entry = future.result()
                if isinstance(entry, Unreadable):
                    broken[key] = entry.reason
                else:
                    entries[name_of(key)] = entry
            commit(env, entries)
            bar.update(len(futures))
    return broken


def _write_manifest(folder: Path, splits: dict[str, list[Item]], broken: dict[str, str]) -> None:
    """One row an image, in the order of the items."""
    parts = {
        split: [item for item in items if item.key not in broken] for split, items in splits.items()
    }
    classes = sorted({item.label for items in parts.values() for item in items})
    label_of = {name: label for label, name in enumerate(classes)}
    with (
        atomic(folder / "manifest.csv") as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for split, items in parts.items():
            with closing(open_lmdb(folder / f"{split}.lmdb")) as env:
                for item in items:
                    row = find_row(env, item.key)
                    if row is None:
                        raise lmdb.CorruptedError(f"'{item.key}' is missing")
                    label = label_of[item.label]
                    writer.writerow([split, item.label, label, item.key, row.size, row.source])
