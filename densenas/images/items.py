"""Items: the images of a source, named and classed, before any of them is packed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.io import encode_png

BYTES = 1 << 29  # of one image file; 100 million pixels of 16 bits, not compressed, have as many


@dataclass(frozen=True)
class Original:
    """What an item holds: the bytes to keep, and size and SHA-256 of the file or of an array's pixels."""

    encoded: bytes
    size: int
    digest: str


@dataclass(frozen=True)
class Item:
    """One image of a source: a key that names it on every machine, its class, a file or an array.

    An array is uint8 (C, H, W).
    """

    key: str
    label: str
    part: str | None  # train, val or test as the source itself has it; None: to be drawn
    content: Path | Tensor

    def read(self) -> Original:
        """Raises OSError or ValueError where a file cannot be read.

        Waits for no pipe, and takes at most `BYTES`.
        """
        if isinstance(self.content, Path):
            encoded = _read_file(self.content)
            source = encoded
        else:
            # A PNG's bytes depend on the library that wrote it, its pixels do not.
            encoded = encode_png(self.content).numpy().tobytes()
            source = self.content.numpy().tobytes()
        return Original(encoded, len(source), hashlib.sha256(source).hexdigest())

    def origin(self) -> str:
        """What tells this source from others: a file's path, size and times, an array's pixels.

        The time of the last change of status is among them: nobody can set it back, as `cp -p`
        and `tar` do with that of the content.
        """
        if isinstance(self.content, Path):
            try:
                status = self.content.stat()
                about = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            except (OSError, ValueError) as error:
                about = str(error)
            identity = os.fsencode(f"{self.content.absolute()} {about}")
        else:
            shape = str(tuple(self.content.shape)).encode()
            identity = shape + self.content.numpy().tobytes()
        return hashlib.sha256(identity).hexdigest()[:32]


@dataclass(frozen=True)
class Source:
    """The images of a data set, and notes for the user on how it was read."""

    items: list[Item]
    notes: list[str]


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
