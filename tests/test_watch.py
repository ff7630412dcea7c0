"""A training is watched while it runs: figures that follow it, and an interrupted cell that goes on."""

import time

import pytest
from helpers import DATA, SEARCH, TABLE, checkpoint, identical, stopping_before_step

from densenas import watch
from densenas.method.derivation import Lattice
from densenas.runs.progress import epoch_may_have_ended, progress, spare, watched
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import Computing
from densenas.training.processes import launch

CPU = Computing(device="cpu")


class Place:
    """What stands in for the output of a cell."""

    def __init__(self):
        self.shown = []

    def update(self, html):
        self.shown.append(html.data)


@pytest.fixture
def place(monkeypatch):
    place = Place()
    monkeypatch.setattr(watch, "display", lambda _, display_id: place)
    monkeypatch.setattr(watch, "SHARE", 1e9)  # always time enough
    monkeypatch.setenv("JPY_SESSION_NAME", "03-search.ipynb")
    return place


@pytest.fixture
def priced(run):
    TABLE.write(run.reports / "cost.json")
    return run


@pytest.mark.parametrize("target", [None, 0.04])
def test_figures_follow_a_search_and_change_nothing_of_it(priced, place, target, tmp_path):
    with watch.watching(priced.name, watch.draw_search):
        result = search(priced, DATA, TABLE, SEARCH, target, CPU)
    assert len(place.shown) == SEARCH.epochs + 1  # and once more at the end
    assert len({*place.shown}) == SEARCH.epochs  # which shows what the last epoch showed
    assert place.shown[0].count("<img") == 2
    curves, _ = watch.draw_search(priced)
    costs = [line.get_label() for line in curves.axes[2].lines]
    assert ("target" in costs) == (target is not None)
    unwatched = search(Run("other", tmp_path / "other"), DATA, TABLE, SEARCH, target, CPU)
    assert identical(unwatched.net.state_dict(), result.net.state_dict())
    assert identical(unwatched.history, result.history)


def test_the_graph_has_the_path_that_would_be_derived(priced, place, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        watch.figures, "search_space", lambda space, p, path: drawn.append((p, path))
    )
    monkeypatch.setattr(watch.View, "show", lambda view: view.draw(view.run))
    with watch.watching(priced.name, watch.draw_search):
        result = search(priced, DATA, TABLE, SEARCH, 0.04, CPU)
    found = [Lattice(TABLE, moment).derive(0.04).path for moment in result.trace[1:]]
    assert [path for _, path in drawn[:-1]] == found and drawn[-1][1] == found[-1]
    assert [
        identical(p, moment.p) for (p, _), moment in zip(drawn[:-1], result.trace[1:], strict=True)
    ]


def test_drawing_takes_a_few_per_cent_of_the_time(priced, place, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch, "SHARE", 0.04)
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    view = watch.View(priced, lambda _: [])
    drawn = []

    def show():
        drawn.append(now[0])
        now[0] += 1

    monkeypatch.setattr(view, "show", show)
    for second in range(100):
        now[0] = max(now[0], second)
        priced.write_history("search", [{"epoch": second}])
        view.look()
    assert drawn == [0, 1, 27, 53, 79], "the first one loads what draws and tells nothing"
    for now[0] in (200.0, 400.0):
        view.look()
    assert drawn[5:] == [200], "at 400 no epoch had ended since"


def test_an_interrupted_cell_shows_its_last_epoch(priced, place, monkeypatch):
    monkeypatch.setattr(watch, "SHARE", 1e-9)  # after the second drawing never again
    with pytest.raises(KeyboardInterrupt), watch.watching(priced.name, lambda _: []):
        for epoch in range(9):
            priced.write_history("search", [{"epoch": epoch}])
            epoch_may_have_ended()
        raise KeyboardInterrupt
    assert len(place.shown) == 3


def test_a_figure_that_fails_does_not_end_a_search(priced, place, capsys):
    calls = []

    def draw(run):
        calls.append(run)
        if len(calls) == 1:
            raise ValueError("no such colour")
        return []

    with watch.watching(priced.name, draw):
        result = search(priced, DATA, TABLE, SEARCH, how=CPU)
    assert len(result.history) == SEARCH.epochs and len(calls) == 2
    assert "no more figures until the end: no such colour" in capsys.readouterr().out


def test_papermill_executes_no_figures_that_follow(priced, place, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME")
    with watch.watching(priced.name, watch.draw_search):
        search(priced, DATA, TABLE, SEARCH, how=CPU)
    assert place.shown == []


def test_whoever_waits_for_other_processes_looks_too():
    looks = []
    with watched(lambda: looks.append(1)):
        launch(time.sleep, 2, "cpu", 3)
    assert looks


@pytest.mark.parametrize(("looked_at", "least", "most"), [(True, 5000, 11_000), (False, 50, 500)])
def test_a_long_bar_leaves_few_lines_in_an_executed_notebook(
    monkeypatch, capsys, looked_at, least, most
):
    if looked_at:
        monkeypatch.setenv("JPY_SESSION_NAME", "03-search.ipynb")
    else:
        monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    seconds, bar = 20_000, progress(20_000, "search")
    now = bar.start_t
    bar._time = lambda: now
    for _ in range(seconds):
        now += 1
        spare(bar)
        bar.update()
    assert least < capsys.readouterr().out.count("\r") < most
    bar.close()


@pytest.mark.parametrize("looked_at", [True, False])
def test_an_interrupted_cell_goes_on(priced, place, monkeypatch, looked_at, tmp_path):
    if not looked_at:
        monkeypatch.delenv("JPY_SESSION_NAME")
    with (
        pytest.raises(KeyboardInterrupt) as stopped,
        stopping_before_step(7),
        watch.watching(priced.name, watch.draw_search),
    ):
        search(priced, DATA, TABLE, SEARCH, how=CPU)
    assert stopped.value._render_traceback_() == [watch.GOES_ON] and "\n" not in watch.GOES_ON
    with watch.watching(priced.name, watch.draw_search):
        search(priced, DATA, TABLE, SEARCH, how=CPU)
    other = Run("other", tmp_path / "other")
    search(other, DATA, TABLE, SEARCH, how=CPU)
    assert identical(checkpoint(priced, "search"), checkpoint(other, "search"))
