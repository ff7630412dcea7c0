"""The files of a pack: LMDBs, opened so that none can end the process, and their checksums.

An LMDB holds two values an image: under its name the encoded bytes, under "row:" and its name a `Row`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Self

import lmdb

from densenas.files import write_text

SUMS = "SHA256SUMS"  # as sha256sum writes and checks it
TABLES = {"about.json", "manifest.csv"}  # beside the LMDBs
MEND = "run 01-data again, it packs anew what is missing"


@dataclass(frozen=True)
class Row:
    """What is known of a packed image beside its bytes."""

    size: int  # of the source, in bytes
    source: str  # SHA-256 of the source
    digest: str  # SHA-256 of the bytes that are kept
    origin: str  # tells the source and how it was packed from others

    @classmethod
    def parse(cls, row: bytes) -> Self:
        """Early packs have no origin, and of a damaged row something is wrong or missing: both equal no other."""
        fields = row.decode(errors="replace").split()
        size, source, digest, origin = (*fields, "", "", "", "")[:4]
        return cls(int(size) if size.isdecimal() else 0, source, digest, origin)

    def __bytes__(self) -> bytes:
        return f"{self.size} {self.source} {self.digest} {self.origin}".encode()


@dataclass(frozen=True)
class Entry:
    """One image as an LMDB holds it."""

    encoded: bytes
    row: Row


def name_of(key: str) -> bytes:
    """What an image is called in the LMDB, whose keys are at most 511 bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32].encode()


def reason_of(error: Exception) -> str:
    """Why something cannot be read or written, without the path that LMDB puts before it."""
    reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
    return reason or type(error).__name__


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, names: Collection[str]) -> None:
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_text(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of a finished pack's files when they were written; of an early pack none."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    return sums


def is_intact(folder: Path) -> bool:
    """Whether this is a finished pack whose files are all as they were written."""
    sums = read_sums(folder)
    if not sums.keys() >= TABLES:
        return False
    return all((folder / name).is_file() and sha256(folder / name) == sums[name] for name in sums)


def open_lmdb(path: Path, readonly: bool = True) -> lmdb.Environment:
    """Raises lmdb.Error where this is no LMDB, or shorter than its head says.

    Reading past the end of a file in memory would kill the process.
    """
    # Nobody writes to a finished pack, so it needs no lock and may lie on a read-only medium.
    env = lmdb.open(
        str(path), subdir=False, readonly=readonly, lock=False, readahead=False, map_size=1 << 26
    )
    extent = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if path.stat().st_size < extent:
        env.close()
        raise lmdb.CorruptedError("is cut short")
    return env


def resume(path: Path, origins: dict[bytes, str]) -> tuple[lmdb.Environment, set[bytes]]:
    """An LMDB to be written, and the names of the images of these origins that it holds.

    `origins` are by name. Images of other origins are removed.
    """
    try:
        env = open_lmdb(path, readonly=False)
    except lmdb.Error:
        path.unlink(missing_ok=True)  # half-written when the power was cut
        env = open_lmdb(path, readonly=False)
    same, stale = set(), set()
    with env.begin() as reader, reader.cursor() as cursor:
        cursor.set_range(b"row:")
        for key, row in cursor:
            name = key.removeprefix(b"row:")
            if origins.get(name) == Row.parse(row).origin:
                same.add(name)
            else:
                stale.add(name)
    if stale and not same:  # a new file is smaller than one that was emptied
        env.close()
        path.unlink()
        env = open_lmdb(path, readonly=False)
    else:
        commit(env, {}, stale)
    return env, same


def commit(
    env: lmdb.Environment, entries: dict[bytes, Entry], stale: Collection[bytes] = ()
) -> None:
    """Writes entries by name, and removes stale names, in one transaction; the map doubles until it fits."""
    while True:
        try:
            with env.begin(write=True) as writer:
                for name in stale:
                    writer.delete(name)
                    writer.delete(b"row:" + name)
                for name, entry in entries.items():
                    writer.put(name, entry.encoded)
                    writer.put(b"row:" + name, bytes(entry.row))
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def find_row(env: lmdb.Environment, key: str) -> Row | None:
    """What an LMDB knows of an image, without its bytes; None where it lacks it."""
    with env.begin() as reader:
        row = reader.get(b"row:" + name_of(key))
    return None if row is None else Row.parse(row)


def find(env: lmdb.Environment, key: str) -> Entry | None:
    """What an LMDB holds of an image; None where it lacks it."""
    row = find_row(env, key)
    with env.begin() as reader:
        encoded = reader.get(name_of(key))
    return None if row is None or encoded is None else Entry(encoded, row)


@dataclass(frozen=True)
class Opened:
    """An LMDB, and the version (inode, size, time) of its file when it was opened."""

    version: tuple[int, int, int]
    env: lmdb.Environment


_OPENED: dict[Path, Opened] = {}
_OPENING = Lock()


def _close_all() -> None:
    """Closed and not only forgotten: a traceback that somebody keeps may still refer to one."""
    while _OPENED:
        _, known = _OPENED.popitem()
        known.env.close()


os.register_at_fork(after_in_child=_close_all)  # a child must not use its parent's


def opened(path: Path) -> Opened:
    """On first use and once in each process: LMDB refuses a second time.

    Raises ValueError with one sentence where the file is not there or damaged, also since then.
    """
    try:
        with _OPENING:
            status = path.stat()
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            known = _OPENED.get(path)
            if known and known.version != version:
                _OPENED.pop(path).env.close()
                known = None
            if known is None:
                known = _OPENED[path] = Opened(version, open_lmdb(path))
            return known
    except (OSError, lmdb.Error) as error:
        raise ValueError(f"'{path}' cannot be read ({reason_of(error)}): {MEND}") from None
