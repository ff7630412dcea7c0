"""Progress of what takes long."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_quiet = False
_watchers: list[Callable[[], None]] = []


def progress(total: int, what: str, over: Iterable[Any] | None = None, **how: Any) -> tqdm:
    """A progress bar with time left: plain text, which reads the same in a terminal, Jupyter and papermill's log."""
    if _quiet:
        how["disable"] = True
    return tqdm(over, total=total, desc=what, file=sys.stdout, mininterval=2.0, ncols=100, **how)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, `progress` shows nothing: many small trainings have one bar around them."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def spare(bar: tqdm) -> None:
    """Lets a long bar print less and less often where nobody looks: an executed notebook keeps each of its lines."""
    if not bar.disable and not looked_at():
        seconds = min(60.0, max(2.0, (bar.last_print_t - bar.start_t) / 30))
        bar.mininterval = bar.maxinterval = seconds


def looked_at() -> bool:
    """Whether a Jupyter server runs this, so that somebody looks while it runs."""
    return "JPY_SESSION_NAME" in os.environ


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Inside, `look` is called after every epoch, and now and then while other processes train for this one."""
    _watchers.append(look)
    try:
        yield
    finally:
        _watchers.remove(look)


def epoch_may_have_ended() -> None:
    for look in _watchers:
        look()
