"""A run's folders. reports/<run>/ is kept in git, runs/<run>/ is not."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import BaseModel, Field
from tqdm import tqdm

from densenas.files import HOST, atomic, naming, read_json, root, write_text, writing
from densenas.runs.provenance import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERVIEW = "index.html"  # in reports/, beside the runs
_HELD: dict[Path, int] = {}  # locks of runs that this process holds, and their files' descriptors


def _leave_to_parent() -> None:
    """A fork shares its parent's locks: a decoding worker would keep those of a killed parent."""
    for lock in _HELD.values():
        os.close(lock)
    _HELD.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class _Prepared(BaseModel):
    """What costs depend on of data.json, which 01-data keeps."""

    image_size: int = Field(ge=1, strict=True)
    classes: list[str] = Field(min_length=1)


class Run:
    """Where a run keeps what: `reports` (small, for readers) and `work` (checkpoints and data, for machines)."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        if not isinstance(name, str):
            how = "papermill takes it as text with -r, as a number with -p"
            raise ValueError(f"run name {name!r} is no text: {how}")
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name == OVERVIEW:
            usable = "at most 100 letters, digits, '.', '_', '-', none of '.' and '-' first"
            raise ValueError(f"run name {name[:120]!r} is not usable as a folder name: use {usable}")
        self.name = name
        self.root = root() if folder is None else folder
        self.reports = self.root / "reports" / name
        self.work = self.root / "runs" / name

    def part(self, name: str) -> Run:
        """A place of its own in this run's work folder, for one of many trainings that make one report."""
        part = Run(self.name, self.root)
        part.work = part.reports = self.work / name
        return part

    def need(self, path: Path, stage: str) -> Path:
        """The path, if it is there; FileNotFoundError says which stage makes it."""
        if not path.exists():
            raise FileNotFoundError(f"run '{self.name}' has no {path.name} yet: run {stage} first")
        return path

    def images(self, image_size: int | None = None) -> tuple[int, int]:
        """Side in pixels and number of classes of the prepared images.

        ValueError where another side is asked for, FileNotFoundError before 01-data has run.
        """
        path = self.need(self.work / "data.json", "01-data")
        again = "run 01-data again"
        content = read_json(path, again)
        with naming(f"{path} is damaged, {again}"):
            prepared = _Prepared.model_validate(content)
        if image_size not in (None, prepared.image_size):
            are = f"the images of run '{self.name}' were prepared with {prepared.image_size} pixels"
            raise ValueError(
                f"image_size is {image_size}, but {are}: leave it out, or {again}"
            )
        return prepared.image_size, len(prepared.classes)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time works on a run: a second one says so and waits until the first has ended.

        The lock is the kernel's and goes with its process, however that ends. Inside, the same
        process may enter again. Several that train together take it once, by their first. Raises
        OSError with one sentence where the run's folder cannot be written.
        """
        path = self.work / ".lock"
        if path in _HELD:
            yield
            return

        def say(holder: str) -> None:
            at_work = f"run '{self.name}' is at work in process {holder or '?'}"
            print(f"{at_work}: waiting for it", flush=True)

        with locked(path, say) as lock:
            with suppress(OSError):  # a full disk keeps the name out, not the lock
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()} on {HOST}".encode(), 0)
            _HELD[path] = lock
            try:
                yield
            finally:
                _HELD.pop(path, None)

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Two stages that end at once must not lose each other's entries."""
        with locked(self.work / ".entries.lock"):
            yield

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the report folder; empty where there is none yet, ValueError where it is damaged."""
        path = self.reports / name
        return read_json(path, f"delete it and run the stages of run '{self.name}' again") if path.exists() else {}

    def update_json(self, name: str, section: str, value: Any) -> None:
        """Replaces one section of a JSON file of the report folder, atomically."""
        with self._updating():
            content = {**self.read_json(name), section: value}
            write_text(self.reports / name, json.dumps(content, indent=1, sort_keys=True) + "\n")

    def write_history(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """Replaces the rows of one stage in history.csv; a damaged file is written anew, and says so."""
        with self._updating():
            try:
                kept = [row for row in self.history().to_dict("records") if row["stage"] != stage]
            except ValueError:
                others = "rows of other stages come back when these run again"
                print(f"history.csv was damaged and is written anew: {others}", flush=True)
                kept = []
            history = pd.DataFrame(kept + [{"stage": stage, **row} for row in rows])
            # Search before retraining, whichever was run last.
            history = history.sort_values(["stage", "epoch"], ascending=[False, True])
            write_text(self.reports / "history.csv", history.to_csv(index=False))

    def history(self, stage: str | None = None) -> pd.DataFrame:
        """history.csv, or the rows of one stage with only the columns that it fills.

        ValueError where it is damaged.
        """
        path = self.reports / "history.csv"
        if not path.exists():
            return pd.DataFrame()
        try:
            history = pd.read_csv(path)
            sound = history[["stage", "epoch"]].notna().all(axis=None)
            history["epoch"] = history["epoch"].astype(int)
        except (ValueError, KeyError):
            sound = False
        if not sound:
            again = f"delete it and run 03-search and 05-retrain of run '{self.name}' again"
            how = "they go on from their checkpoints and write it anew"
            raise ValueError(f"{path} is damaged: {again}, {how}")
        if stage is None or not len(history):
            return history
        return history[history["stage"] == stage].dropna(axis=1, how="all").reset_index(drop=True)

    def save_figure(self, figure: Figure, name: str, caption: str) -> Figure:
        """Writes figures/<name>.svg and .png with its caption, and returns the figure, so that a notebook shows it."""
        for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 150})):
            with atomic(self.reports / "figures" / f"{name}{suffix}") as partial:
                figure.savefig(partial, format=suffix[1:], bbox_inches="tight", **options)
        self.update_json("figures/captions.json", name, caption)
        return figure

    def record_provenance(self, stage: str, **parameters: Any) -> None:
        """Adds to provenance.json what this stage ran with: its parameters, code, packages, hardware."""
        self.update_json("provenance.json", stage, {"parameters": parameters, **environment()})


@contextmanager
def locked(path: Path, say: Callable[[str], None] | None = None) -> Iterator[int]:
    """Holds the kernel's lock on a file, after waiting for whoever has it, whom `say` is told; gives a descriptor.

    The lock goes with its process, however that ends.
    """
    with writing(path):
        lock = _lock(path, say)
    owner = os.getpid()
    try:
        yield lock
    finally:
        if os.getpid() == owner:  # a fork must not free its parent's
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _lock(path: Path, say: Callable[[str], None] | None) -> int:
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


_QUIET: list[bool] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, `progress` shows nothing: of many small trainings under one bar."""
    _QUIET.append(True)
    try:
        yield
    finally:
        _QUIET.pop()


def progress(total: int, what: str, over: Iterable[Any] | None = None, **how: Any) -> tqdm:
    """A progress bar with time left: plain text, which reads the same in a terminal, Jupyter and papermill's log."""
    if _QUIET:
        how["disable"] = True
    return tqdm(over, total=total, desc=what, file=sys.stdout, mininterval=2.0, ncols=110, **how)
