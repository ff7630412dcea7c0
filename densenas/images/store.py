"""The files of a pack: LMDBs, opened so that none can end the process, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

import lmdb

SUMS = "SHA256SUMS"  # as sha256sum writes and checks it
TABLES = {"about.json", "manifest.csv"}  # beside the LMDBs
MEND = "run 01-data again, it packs anew what is missing"


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


def read_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of a finished pack's files when they were written; of an early pack none."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


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
    options = {"subdir": False, "lock": False, "readahead": False}
    env = lmdb.open(str(path), readonly=readonly, map_size=1 << 26, **options)
    extent = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if path.stat().st_size < extent:
        env.close()
        raise lmdb.CorruptedError("is cut short")
    return env


def resume(path: Path, origins: dict[bytes, bytes]) -> tuple[lmdb.Environment, set[bytes]]:
    """An LMDB to be written, and the names of the images of these origins that it holds."""
    if path.exists():
        try:
            env = open_lmdb(path, readonly=False)
        except lmdb.Error:
            path.unlink()  # half-written when the power was cut
            return resume(path, origins)
        with env.begin() as reader, reader.cursor() as cursor:
            cursor.set_range(b"row:")
            found = {key.removeprefix(b"row:"): row.split()[-1] for key, row in cursor}
        kept = {name for name, origin in found.items() if origins.get(name) == origin}
        if kept:
            commit(env, {}, found.keys() - kept)
            return env, kept
        env.close()
        path.unlink()  # of other images
    return open_lmdb(path, readonly=False), set()


def commit(
    env: lmdb.Environment, done: dict[bytes, tuple[bytes, bytes]], stale: Iterable[bytes] = ()
) -> None:
    """One transaction; the map doubles until it fits."""
    while True:
        try:
            with env.begin(write=True) as writer:
                for name in stale:
                    writer.delete(name)
                    writer.delete(b"row:" + name)
                for name, (encoded, row) in done.items():
                    writer.put(name, encoded)
                    writer.put(b"row:" + name, row)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


# The version (inode, size, time) of each file that is open, and its LMDB.
_OPENED: dict[Path, tuple[tuple[int, int, int], lmdb.Environment]] = {}
_OPENING = Lock()


def _close_all() -> None:
    """Closed and not only forgotten: a traceback that somebody keeps may still refer to one."""
    while _OPENED:
        _OPENED.popitem()[1][1].close()


os.register_at_fork(after_in_child=_close_all)  # a child must not use its parent's


def environment(path: Path) -> lmdb.Environment:
    """Opened on first use and once in each process: LMDB refuses a second time.

    Raises ValueError with one sentence where the file is not there or damaged, also since then.
    """
    try:
        with _OPENING:
            status = path.stat()
            version = status.st_ino, status.st_size, status.st_mtime_ns
            if path in _OPENED and _OPENED[path][0] != version:
                _OPENED.pop(path)[1].close()
            if path not in _OPENED:
                _OPENED[path] = version, open_lmdb(path)
            return _OPENED[path][1]
    except (OSError, lmdb.Error) as error:
        raise ValueError(f"'{path}' cannot be read ({reason_of(error)}): {MEND}") from None
