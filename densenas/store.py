"""The files of a pack: LMDBs, opened so that none can end the process, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from threading import Lock

import lmdb

SUMS = "SHA256SUMS"  # as sha256sum writes and checks it
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


def intact_files(folder: Path) -> set[str]:
    """The names of a finished pack's files that are as they were written."""
    return {
        name
        for name, digest in read_sums(folder).items()
        if (folder / name).is_file() and sha256(folder / name) == digest
    }


def open_lmdb(path: Path, readonly: bool = True) -> lmdb.Environment:
    """Raises lmdb.Error where this is no LMDB, or shorter than its head says.

    Reading past the end of a file in memory would kill the process.
    """
    # Nobody writes to a finished pack, so it needs no lock and may lie on a read-only medium.
    options = {"subdir": False, "lock": False, "readahead": False}
    env = lmdb.open(str(path), readonly=readonly, map_size=1 << 26, **options)
    if path.stat().st_size < _extent(env):
        env.close()
        raise lmdb.CorruptedError("is cut short")
    return env


def _extent(env: lmdb.Environment) -> int:
    """Bytes of the file up to the last page in use."""
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"]


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


@lru_cache(maxsize=12)
def _open_once(path: Path, inode: int) -> tuple[lmdb.Environment, int]:
    env = open_lmdb(path)
    return env, _extent(env)


_OPENING = Lock()
os.register_at_fork(after_in_child=_open_once.cache_clear)  # a child must not use its parent's


def environment(path: Path) -> lmdb.Environment:
    """Opened on first use and once in each process: LMDB refuses a second time.

    Raises ValueError with one sentence where the file is not there or damaged.
    """
    try:
        with _OPENING:
            status = path.stat()
            env, extent = _open_once(path, status.st_ino)
        if status.st_size < extent:
            raise lmdb.CorruptedError("is cut short")  # since it was opened
    except (OSError, lmdb.Error) as error:
        raise ValueError(f"'{path}' cannot be read ({reason_of(error)}): {MEND}") from None
    return env


def forget() -> None:
    """Closes what is open: a removed file keeps its place on the disk until then."""
    _open_once.cache_clear()
