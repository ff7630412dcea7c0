"""Exploring a space: what its path probabilities mean, as values, and under sliders in JupyterLab."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pandas as pd
import torch
from ipywidgets import (
    HTML,
    Box,
    Button,
    DOMWidget,
    Dropdown,
    FloatSlider,
    HBox,
    IntSlider,
    Layout,
    VBox,
)
from matplotlib.figure import Figure

from densenas import figures
from densenas.costs import read_costs
from densenas.files import root
from densenas.method.architecture import Candidate
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.probabilities import Probabilities, best_paths, visit_probabilities
from densenas.method.space import PRESETS, SearchSpace
from densenas.method.supernet import expected_cost
from densenas.outcome import Search, load_search
from densenas.runs.progress import looked_at
from densenas.runs.run import Run

NO_RUN = "none, only sliders"
SPACE, CLASSES = "digits", 10  # where nothing else is said
STRONGEST = 15.0  # logit under a slider; e to this power is as good as all
NO_TEMPERATURE = """<small>The temperature changes nothing yet: it divides β, and
before a search all β of a block are equal.<br>Move one, or choose a run.</small>"""
# On a narrow page the picture shrinks, or goes below the controls, which do not shrink.
PAGE = """
.controls {flex: 0 0 auto; max-width: 310px}
.controls .widget-html-content {white-space: normal; line-height: 1.4}
.picture {position: relative; min-width: 0; max-width: max-content; align-self: flex-start; overflow: visible}
.picture .widget-html {margin: 0; max-width: 100%}
.picture svg {display: block; max-width: 100%; height: auto}
.picture .widget-button {position: absolute; margin: 0; padding: 0; background: none; box-shadow: none}
"""


def priced(space: str | None, num_classes: int | None, run: str | None = None) -> CostTable:
    """What a space costs in Mult-Adds: for a run's images and of the run's space, as far as nothing else is given.

    Raises ValueError where a run has another space or number of classes, FileNotFoundError before its 02-cost.
    """
    if run is None:
        chosen = SearchSpace.load(space or SPACE)
        return _mult_adds(chosen, num_classes)
    table = read_costs(Run(run))
    if space is not None:
        _check_space(run, table, SearchSpace.load(space))
    if num_classes not in (None, table.num_classes):
        has = f"run '{run}' tells {table.num_classes} classes apart"
        raise ValueError(f"num_classes is {num_classes}, but {has}: leave it out")
    return CostTable.mult_adds(table.space, table.input_size, table.num_classes)


def _mult_adds(space: SearchSpace, num_classes: int | None) -> CostTable:
    """Of a space without a run."""
    return CostTable.mult_adds(
        space, space.input_size, CLASSES if num_classes is None else num_classes
    )


def _check_space(run: str, table: CostTable, space: SearchSpace) -> None:
    if table.space == space:
        return
    other = f"space {table.space.name}, not {space.name}"
    if table.space.name == space.name:
        other = f"another version of space {space.name}"
    raise ValueError(f"run '{run}' is of {other}: choose another run or space")


def undecided(table: CostTable) -> Probabilities:
    """Of a space before its search: every edge of a block and every candidate of a layer is equally probable."""
    space = table.space
    beta = torch.full((space.num_blocks, space.num_blocks + 1), -torch.inf)
    for edge in space.edges:
        beta[edge] = 0
    head = torch.zeros(len(table.head), len(space.head_ops))
    stack = torch.zeros(len(table.stack), len(space.stack_ops))
    return Probabilities(beta.softmax(1), head.softmax(1), stack.softmax(1))


def finished(name: str, space: SearchSpace) -> Search:
    """A run's search; FileNotFoundError before 03-search has run, ValueError where it searched another space."""
    run = Run(name)
    table = read_costs(run)
    _check_space(name, table, space)
    return load_search(run, table, table.num_classes)


def searched() -> dict[str, CostTable]:
    """The runs that have been searched, the last one first, with their costs; none whose costs cannot be read."""
    tables = {}
    paths = root().glob("runs/*/search.pt")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(ValueError, FileNotFoundError):
            tables[path.parent.name] = read_costs(Run(path.parent.name))
    return tables


def view(
    space: str | None, num_classes: int | None, run: str | None, sliders: bool | None
) -> Explorer | Figure:
    """What notebook 00 ends with: an `Explorer`, or the graph as a picture where nobody could move its sliders."""
    if sliders or (sliders is None and looked_at()):
        return Explorer(space, num_classes, run)
    table = priced(space, num_classes, run)
    if run is None:
        moment = undecided(table)
        return figures.search_space(table.space, moment.p, Lattice(table, moment).derive().path)
    search = finished(run, table.space)
    return figures.search_space(table.space, search.trace[-1].p, search.best.path)


def candidates(table: CostTable, moment: Probabilities, block: int) -> pd.DataFrame:
    """Of a block: columns layer, op, probability, cost (in the table's unit); no rows for block 0, the stem."""
    space = table.space
    parts = []
    for row, (i, j) in enumerate(space.head_edges):
        if j == block:
            shares, costs = moment.head[row].tolist(), table.head[row]
            layer = {"layer": f"{i}→{j}", "op": space.head_ops}
            parts.append(pd.DataFrame({**layer, "probability": shares, "cost": costs}))
    for row, (owner, number) in enumerate(space.stack_layers):
        if owner == block:
            shares, costs = moment.stack[row].tolist(), table.stack[row]
            layer = {"layer": f"layer {number + 1}", "op": space.stack_ops}
            parts.append(pd.DataFrame({**layer, "probability": shares, "cost": costs}))
    none = pd.DataFrame(columns=["layer", "op", "probability", "cost"])
    return pd.concat(parts, ignore_index=True) if parts else none


def block_places(svg: str, blocks: int) -> dict[int, str]:
    """Where a picture of `search_space` has its blocks, as CSS in percent of the picture."""
    width, height = re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0]
    places = {}
    for block in range(blocks):
        outline = re.findall(rf'<g id="node-{block}">\s*<path d="([^"]+)"', svg)[0]
        numbers = [float(number) for number in re.findall(r"[\d.]+", outline)]
        xs = [100 * x / float(width) for x in numbers[::2]]
        ys = [100 * y / float(height) for y in numbers[1::2]]
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        size = f"width: {right - left:.2f}%; height: {bottom - top:.2f}%"
        places[block] = f"left: {left:.2f}%; top: {top:.2f}%; {size}"
    return places


class Explorer(VBox):
    """Sliders over a space: whatever value changes, by hand or in Python, the rest follows.

    It opens on `run`, else on the last run that was searched, of the space and the classes as far as these are given.
    Costs are in the run's unit, and what is derived is what notebook 04 derives: at the run's target if it has one. A
    click on a block chooses it: over each one in the picture lies a transparent button.
    """

    def __init__(
        self, space: str | None = None, num_classes: int | None = None, run: str | None = None
    ) -> None:
        self.num_classes, self.following = num_classes, False
        self.searched = searched()
        self.spaces = {name: SearchSpace.load(name) for name in PRESETS}
        opened = self._open(space, run)
        self.space = Dropdown(options=[*self.spaces], value=opened, description="space")
        self.run, self.block = Dropdown(description="run"), Dropdown(description="block")
        self.epoch = IntSlider(description="epoch")
        self.temperature = FloatSlider(min=0.1, max=5, step=0.01, description="temp. T")
        self.note, self.beta = HTML(), VBox()
        self.graph, self.picture = HTML(), Box()
        self.places, self.style, self.numbers, self.ops = HTML(), HTML(), HTML(), HTML()
        self._observe(self.space, self._change_space)
        self._observe(self.run, self._change_run)
        self._observe(self.epoch, self._change_epoch)
        self._observe(self.block, self._change_block)
        self._observe(self.temperature, self._show)
        knobs = [self.space, self.run, self.epoch, self.temperature, self.note]
        controls = VBox([*knobs, self.block, self.beta])
        top = HBox([controls, self.picture], layout=Layout(flex_flow="row wrap"))
        page = [top, self.places, self.style, self.numbers, self.ops]
        super().__init__(page)
        self.add_class(f"of-{self.model_id}")
        controls.add_class("controls")
        self.picture.add_class("picture")
        self._follow(self._change_space)
        if run is not None:
            self.run.value = run

    def _open(self, space: str | None, run: str | None) -> str:
        """The name of the space to begin with, after what contradicts a run is refused."""
        if run is not None:
            table = priced(space, self.num_classes, run)
            finished(run, table.space)
            return self._name(table.space, f"of run '{run}'")
        if space is not None:
            self.spaces[space] = SearchSpace.load(space)
            return space
        if runs := self._runs_of(None):
            return self._name(self.searched[runs[0]].space, f"of run '{runs[0]}'")
        return SPACE

    def _name(self, space: SearchSpace, otherwise: str) -> str:
        for name, known in self.spaces.items():
            if known == space:
                return name
        self.spaces[otherwise] = space
        return otherwise

    def _runs_of(self, space: SearchSpace | None) -> list[str]:
        """The runs that searched a space (None: any) and tell the given number of classes apart."""
        names = []
        for name, table in self.searched.items():
            of_classes = self.num_classes in (None, table.num_classes)
            if of_classes and space in (None, table.space):
                names.append(name)
        return names

    def _observe(self, widget: DOMWidget, change: Callable[[], None]) -> None:
        widget.observe(lambda _: self._follow(change), "value")

    def _follow(self, change: Callable[[], None]) -> None:
        """Answers a moved widget; a change sets the widgets below its own, which must not be answered again."""
        if self.following:
            return
        self.following = True
        try:
            change()
        finally:
            self.following = False

    def _change_space(self) -> None:
        space = self.spaces[self.space.value]
        self._draw(space)
        runs = self._runs_of(space)
        self.run.options = [NO_RUN, *runs]
        self.run.value = runs[0] if runs else NO_RUN
        self.block.options = [(f"{i} ({width} channels)", i) for i, width in enumerate(space.chs)]
        self.block.value = 0
        self._change_run()

    def _draw(self, space: SearchSpace) -> None:
        """The graph, drawn once: from then on a style sheet changes it, in milliseconds."""
        svg, path = io.StringIO(), [0, space.num_blocks]  # of any: the legend shall explain red
        moment = undecided(_mult_adds(space, self.num_classes))
        graph = figures.search_space(space, moment.p, path)
        graph.savefig(svg, format="svg", bbox_inches="tight")
        self.graph.value = svg.getvalue()[svg.getvalue().index("<svg") :]
        legible = f".picture {{flex: 1 1 {36 * (space.num_blocks + 1)}px}}"
        rules, buttons = [PAGE, legible], []
        for block, place in block_places(self.graph.value, space.num_blocks).items():
            button = Button(tooltip=f"block {block}, {space.chs[block]} channels")
            button.add_class(f"block-{block}")
            button.on_click(partial(self._choose, block))
            buttons.append(button)
            rules.append(f".block-{block} {{{place}}}")
        self.picture.children = [self.graph, *buttons]
        self.places.value = f"<style>.of-{self.model_id} {{{' '.join(rules)}}}</style>"

    def _choose(self, block: int, _: Button) -> None:
        self.block.value = block

    def _change_run(self) -> None:
        space, name = self.spaces[self.space.value], self.run.value
        temperature, self.target, self.refused = space.search.softmax_temp, None, ""
        self.table = _mult_adds(space, self.num_classes)
        self.trace = [undecided(self.table)]
        if name != NO_RUN:
            try:
                search = finished(name, space)
                self.table, self.trace, self.target = search.table, search.trace, search.target_cost
                temperature = search.net.temperature
            except (ValueError, FileNotFoundError) as error:
                self.run.value, self.refused = NO_RUN, f"<p>{html.escape(str(error))}</p>"
        self.temperature.max = max(5, temperature)
        self.temperature.min = min(0.1, temperature)
        self.temperature.value = self.searched_at = temperature
        self.epoch.max = self.epoch.value = len(self.trace) - 1
        self._change_epoch()

    def _change_epoch(self) -> None:
        log_p = self.trace[self.epoch.value].p.double().log()
        self.logits = self.searched_at * (log_p - log_p.amax(dim=1, keepdim=True))
        self._change_block()

    def _change_block(self) -> None:
        i, sliders = self.block.value, []
        for j in self.table.space.outgoing(i):
            bounds = {"min": -STRONGEST, "max": STRONGEST}
            slider = FloatSlider(self._shown(i, j), **bounds, description=f"β {i}→{j}")
            self._observe(slider, partial(self._move, i, j, slider))
            sliders.append(slider)
        self.beta.children = sliders
        frame = candidates(self.table, self.trace[self.epoch.value], i)
        shares = frame["probability"].map("{:.0%}".format)
        costs = frame["cost"].map("{:.3g}".format)
        frame["text"] = shares + ": " + costs + (" ms" if self.table.kind == "latency" else " M")
        table = frame.set_index(["layer", "op"])["text"].unstack(sort=False, fill_value="")
        self.ops.value = table.to_html() if i else ""
        self._show()

    def _shown(self, i: int, j: int) -> float:
        """The logit as a slider shows it, which moves by tenths."""
        return round(max(-STRONGEST, float(self.logits[i, j])), 1)

    def _move(self, i: int, j: int, slider: FloatSlider) -> None:
        # A browser answers a new slider with what it shows: only one that is moved may change a logit.
        if abs(slider.value - self._shown(i, j)) > 0.05:
            self.logits[i, j] = slider.value
            self._show()

    @property
    def moment(self) -> Probabilities:
        """What the sliders say."""
        shown = self.trace[self.epoch.value]
        p = (self.logits / self.temperature.value).softmax(dim=1)
        return Probabilities(p, shown.head.double(), shown.stack.double())

    def _show(self) -> None:
        table, moment = self.table, self.moment
        space, found = table.space, Lattice(table, moment).derive(self.target)
        rules = figures.restyled(space, moment.p, found.path)
        chosen = f".block-{self.block.value} {{outline: 2px dashed !important}}"
        self.style.value = f"<style>.of-{self.model_id} {{{rules} {chosen}}}</style>"
        equal = all(float(self.logits[edge]) == 0 for edge in space.edges)
        self.note.value = self.refused + (NO_TEMPERATURE if equal else "")
        paths = []
        for share, path in best_paths(space, moment.p, 5):
            paths.append((share, "→".join(str(node) for node in path)))
        ranking = pd.DataFrame(paths, columns=["probability", "most probable paths"])
        visits = pd.DataFrame({"visited": visit_probabilities(moment.p).tolist()}).T
        tables = ranking.round(4).to_html(index=False) + visits.round(2).to_html()
        self.numbers.value = f"<p>{self._costs(moment, found)}</p>{tables}"

    def _costs(self, moment: Probabilities, found: Candidate) -> str:
        """In words, and as precise as the report."""
        table, arch = self.table, found.architecture
        mult_adds = arch.mult_adds(table.input_size, table.num_classes)
        size = f"<b>{mult_adds:.3f} M</b> Mult-Adds"
        if table.kind == "latency":
            size = f"<b>{found.cost:.4g} ms</b>, {size}"
        thousands = 1000 * arch.params(table.num_classes)
        shape = f"{len(arch.routing_blocks)} routing blocks, {arch.num_layers} layers"
        target = f" at the target of {self.target:g} {table.unit}" if self.target else ""
        return (
            f"expected cost <b>{float(expected_cost(table, moment)):.4g}</b> {table.unit};"
            f" network derived{target} (red): {size}, {thousands:.1f} k parameters, {shape}"
        )
