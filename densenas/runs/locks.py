"""Locks of the kernel on files: one process at a time, and none that outlives its process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from densenas.files import HOST, writing

_HELD: dict[Path, int] = {}  # what `locked_once` holds, and the files' descriptors


def _leave_to_parent() -> None:
    """A fork shares its parent's locks: a decoding worker would keep those of a killed parent."""
    for lock in _HELD.values():
        os.close(lock)
    _HELD.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def locked(path: Path, say: Callable[[str], None] | None = None) -> Iterator[int]:
    """Holds the lock on a file, after waiting for whoever has it; gives the file's descriptor.

    `say` is called before a wait with what the file holds. Raises OSError with one sentence where
    the file cannot be made.
    """
    with writing(path):
        lock = _wait(path, say)
    owner = os.getpid()
    try:
        yield lock
    finally:
        if os.getpid() == owner:  # a fork must not free its parent's
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


@contextmanager
def locked_once(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """As `locked`, which the same process may enter again; the file names the process that holds it."""
    if path in _HELD:
        yield
        return
    with locked(path, say) as lock:
        with suppress(OSError):  # a full disk keeps the name out, not the lock
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} on {HOST}".encode(), 0)
        _HELD[path] = lock
        try:
            yield
        finally:
            _HELD.pop(path, None)


def _wait(path: Path, say: Callable[[str], None] | None) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say:
                say(os.pread(lock, 100, 0).decode(errors="replace"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        # While this waited, the folder may have been deleted, and another process made a new one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)
