"""A run's folders. reports/<run>/ is kept in git, runs/<run>/ is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from densenas import files
from densenas.files import atomic, write_text
from densenas.runs.locks import locked, locked_once
from densenas.runs.provenance import environment

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure

OVERVIEW = "index.html"  # in reports/, beside the runs


class Run:
    """Where a run keeps what: `reports` (small, for readers) and `work` (checkpoints and data, for machines).

    Both lie in the folder `root`, which is `files.root()` unless given. ValueError where `name` cannot be a folder's.
    """

    def __init__(self, name: str, root: Path | None = None) -> None:
        if not isinstance(name, str):
            how = "papermill takes it as text with -r, as a number with -p"
            raise ValueError(f"run name {name!r} is no text: {how}")
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name == OVERVIEW:
            raise ValueError(
                f"run name {name[:120]!r} is not usable as a folder name:"
                " use at most 100 letters, digits, '.', '_', '-', none of '.' and '-' first"
            )
        self.name = name
        self.root = files.root() if root is None else root
        self.reports = self.root / "reports" / name
        self.work = self.root / "runs" / name

    def part(self, name: str) -> Run:
        """A place of its own in this run's work folder, for one of many trainings that make one report."""
        part = Run(self.name, self.root)
        part.work = part.reports = self.work / name
        return part

    def budget(self, cost: float) -> Run:
        """A place of its own, budgets/<cost>/ in both folders, for the network that the search found at a cost."""
        budget = Run(self.name, self.root)
        budget.work = self.work / "budgets" / f"{cost:g}"
        budget.reports = self.reports / "budgets" / f"{cost:g}"
        return budget

    def need(self, path: Path, stage: str) -> Path:
        """The path, if it is there; FileNotFoundError says which stage makes it."""
        if not path.exists():
            raise FileNotFoundError(f"run '{self.name}' has no {path.name} yet: run {stage} first")
        return path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time works on a run: a second one says so and waits until the first has ended.

        The lock is the kernel's and goes with its process, however that ends. Inside, the same
        process may enter again. Several that train together take it once, by their first. Raises
        OSError with one sentence where the run's folder cannot be written.
        """

        def say(holder: str) -> None:
            at_work = f"run '{self.name}' is at work in process {holder or '?'}"
            print(f"{at_work}: waiting for it", flush=True)

        with locked_once(self.work / ".lock", say):
            yield

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the report folder; empty where there is none yet, ValueError where it is damaged."""
        path = self.reports / name
        if not path.exists():
            return {}
        return files.read_json(path, f"delete it and run the stages of run '{self.name}' again")

    def update_json(self, name: str, section: str, value: Any) -> None:
        """Replaces one section of a JSON file of the report folder, atomically."""
        with self._updating():
            content = {**self.read_json(name), section: value}
            write_text(self.reports / name, json.dumps(content, indent=1, sort_keys=True) + "\n")

    def record_provenance(self, stage: str, **parameters: Any) -> None:
        """Adds to provenance.json what this stage runs with: its parameters, code, packages, hardware.

        Before it draws: a figure that an earlier run of the stage left may not be drawn this time.
        """
        self.update_json("provenance.json", stage, {"parameters": parameters, **environment()})
        self._remove_figures(stage[: len("01-")])

    def _remove_figures(self, prefix: str) -> None:
        folder = self.reports / "figures"
        with self._updating():
            captions = self.read_json("figures/captions.json")
            kept = {name: text for name, text in captions.items() if not name.startswith(prefix)}
            if len(kept) < len(captions):
                write_text(
                    folder / "captions.json", json.dumps(kept, indent=1, sort_keys=True) + "\n"
                )
        for path in folder.glob(f"{prefix}*"):
            path.unlink(missing_ok=True)

    def history(self, stage: str | None = None) -> pd.DataFrame:
        """history.csv, or the rows of one stage with only the columns that it fills.

        ValueError where it is damaged.
        """
        path = self.reports / "history.csv"
        if not path.exists():
            return pd.DataFrame()
        try:
            history = pd.read_csv(path)
            sound = bool(history[["stage", "epoch"]].notna().all(axis=None))
            history["epoch"] = history["epoch"].astype(int)
        except (ValueError, KeyError):
            sound = False
        if not sound:
            raise ValueError(
                f"{path} is damaged: delete it and run 03-search and 05-retrain of run '{self.name}' again,"
                " they go on from their checkpoints and write it anew"
            )
        if stage is None or not len(history):
            return history
        return history[history["stage"] == stage].dropna(axis=1, how="all").reset_index(drop=True)

    def write_history(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """Replaces the rows of one stage in history.csv; a damaged file is written anew, and says so."""
        with self._updating():
            try:
                kept = [row for row in self.history().to_dict("records") if row["stage"] != stage]
            except ValueError:
                kept = []
                others = "rows of other stages come back when these run again"
                print(f"history.csv was damaged and is written anew: {others}", flush=True)
            history = pd.DataFrame(kept + [{"stage": stage, **row} for row in rows])
            # Search before retraining, whichever was run last.
            history = history.sort_values(["stage", "epoch"], ascending=[False, True])
            write_text(self.reports / "history.csv", history.to_csv(index=False))

    def save_figure(self, figure: Figure, name: str, caption: str) -> Figure:
        """Writes figures/<name>.svg and .png with its caption, and returns the figure, so that a notebook shows it."""
        folder = self.reports / "figures"
        with atomic(folder / f"{name}.svg") as partial:
            # Without a date the same data give the same bytes.
            figure.savefig(partial, format="svg", bbox_inches="tight", metadata={"Date": None})
        with atomic(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", bbox_inches="tight", dpi=150)
        self.update_json("figures/captions.json", name, caption)
        return figure

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Two stages that end at once must not lose each other's entries."""
        with locked(self.work / ".entries.lock"):
            yield
