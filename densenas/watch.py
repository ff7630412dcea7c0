"""Watching a training in JupyterLab: figures that follow it, and a sentence where its cell is interrupted."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from IPython.display import HTML, display
from matplotlib.figure import Figure

from densenas import figures
from densenas.costs import read_costs
from densenas.files import one_line
from densenas.method.derivation import Lattice
from densenas.outcome import last_moment
from densenas.runs.progress import looked_at, watched
from densenas.runs.run import Run

SHARE = 0.1  # of the time, which drawing takes at most
GOES_ON = "Interrupted: run this cell again, it goes on from the last checkpoint."


def draw_search(run: Run) -> list[Figure]:
    """A search so far: its curves, and its space with the path of the network that would be derived now."""
    table, moment, history = read_costs(run), last_moment(run), run.history("search")
    target_cost = history["target_cost"].iloc[-1] if "target_cost" in history else None
    found = Lattice(table, moment).derive(target_cost)
    curves = figures.search_history(history, table.unit)
    return [curves, figures.search_space(table.space, moment.p, found.path)]


def draw_retraining(run: Run) -> list[Figure]:
    return [figures.training_history(run.history("retrain"))]


@contextmanager
def watching(name: str, draw: Callable[[Run], list[Figure]]) -> Iterator[None]:
    """Inside, the figures that `draw` makes of the run follow its training, where somebody looks.

    They are drawn anew after every epoch, or seldomer where that would take more than a tenth of the time. Under
    papermill there are none: the cells below draw the same when all is done. An interrupted cell says how it goes on.
    """
    view = View(Run(name), draw) if looked_at() else None
    try:
        with watched(view.look) if view else nullcontext():
            yield
        if view:
            view.show()
    except KeyboardInterrupt as interrupt:
        if view:
            view.due = 0.0  # an epoch may have ended too soon after a drawing
            view.look()
        # What IPython shows of it; else that would be a page of this package's code.
        interrupt._render_traceback_ = lambda: [GOES_ON]  # type: ignore[attr-defined]
        raise


class View:
    """A place in a cell's output, above what is printed later, whose figures change."""

    def __init__(self, run: Run, draw: Callable[[Run], list[Figure]]) -> None:
        self.run = run
        self.draw = draw
        self.seen = self._written()
        self.drawn = False
        self.due = 0.0  # in seconds of the monotonic clock
        self.place = display(HTML(), display_id=True)

    def _written(self) -> int:
        """When the history was written, in nanoseconds; 0 before that."""
        path = self.run.reports / "history.csv"
        return path.stat().st_mtime_ns if path.exists() else 0

    def look(self) -> None:
        """Shows what an epoch has added, where it has and there is time."""
        written, start = self._written(), time.monotonic()
        if written == self.seen or start < self.due:
            return
        self.seen = written
        try:
            self.show()
        except Exception as error:  # a training is worth more than its pictures
            print(f"\nno more figures until the end: {one_line(error)}", flush=True)
            self.due = math.inf
            return
        end = time.monotonic()
        if self.drawn:  # not by the first one, which also loads what draws
            self.due = end + (end - start) / SHARE
        self.drawn = True

    def show(self) -> None:
        pictures = []
        for figure in self.draw(self.run):
            png = io.BytesIO()
            figure.savefig(png, format="png", bbox_inches="tight")
            data = base64.b64encode(png.getvalue()).decode()
            pictures.append(f'<img src="data:image/png;base64,{data}">')
        self.place.update(HTML("<br>".join(pictures)))
