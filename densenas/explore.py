"""Exploring a space: what its path probabilities mean, as values, and under sliders in JupyterLab."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import pandas as pd
import torch
from ipywidgets import HTML, DOMWidget, Dropdown, FloatSlider, HBox, IntSlider, VBox

from densenas import figures
from densenas.costs import read_costs
from densenas.files import root
from densenas.method.cost import CostTable
from densenas.method.derivation import best_paths, derive
from densenas.method.probabilities import Probabilities, visit_probabilities
from densenas.method.space import PRESETS, SearchSpace
from densenas.method.supernet import expected_cost
from densenas.outcome import Search, load_search
from densenas.runs.run import Run

NO_RUN = "none, only sliders"


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
    if table.space != space:
        other = f"space {table.space.name}, not {space.name}"
        if table.space.name == space.name:
            other = f"another version of space {space.name}"
        raise ValueError(f"run '{name}' is of {other}: choose another run or space")
    return load_search(run, table, table.num_classes)


def searched(space: SearchSpace) -> list[str]:
    """Names of the runs that searched this space; one whose costs cannot be read is none of them."""
    names = []
    for path in sorted(root().glob("runs/*/search.pt")):
        with suppress(ValueError, FileNotFoundError):
            if read_costs(Run(path.parent.name)).space == space:
                names.append(path.parent.name)
    return names


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


class Explorer(VBox):
    """Sliders over a space: whatever value changes, by hand or in Python, the rest follows; in million Mult-Adds."""

    def __init__(self, space: str, num_classes: int, run: str | None = None) -> None:
        self.num_classes, self.following = num_classes, False
        self.space = Dropdown(
            options=[*dict.fromkeys((*PRESETS, space))], value=space, description="space"
        )
        self.run, self.block = Dropdown(description="run"), Dropdown(description="block")
        self.epoch = IntSlider(description="epoch")
        self.temperature = FloatSlider(min=0.1, max=5, description="temp. T")
        self.beta, self.graph = VBox(), HTML()
        self.style, self.numbers, self.ops = HTML(), HTML(), HTML()
        self._observe(self.space, self._change_space)
        self._observe(self.run, self._change_run)
        self._observe(self.epoch, self._change_epoch)
        self._observe(self.block, self._change_block)
        self._observe(self.temperature, self._show)
        controls = VBox([self.space, self.run, self.epoch, self.temperature, self.block, self.beta])
        super().__init__([HBox([controls, self.graph]), self.style, self.numbers, self.ops])
        self.add_class(f"of-{self.model_id}")
        self._follow(self._change_space)
        if run and finished(run, self.table.space):
            self.run.value = run

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
        space, svg = SearchSpace.load(self.space.value), io.StringIO()
        self.table = CostTable.mult_adds(space, space.input_size, self.num_classes)
        # Drawn once: from then on a style sheet changes it, in milliseconds.
        graph = figures.search_space(space, undecided(self.table).p, [0])
        graph.savefig(svg, format="svg", bbox_inches="tight")
        self.graph.value = svg.getvalue()[svg.getvalue().index("<svg") :]
        self.run.options = [NO_RUN, *searched(space)]
        self.block.options = [(f"{i} ({width} channels)", i) for i, width in enumerate(space.chs)]
        self.run.value, self.block.value = NO_RUN, 0
        self._change_run()

    def _change_run(self) -> None:
        space, self.trace = self.table.space, [undecided(self.table)]
        self.temperature.value = space.search.softmax_temp
        if self.run.value != NO_RUN:
            search = finished(self.run.value, space)
            priced = search.table
            self.table = CostTable.mult_adds(space, priced.input_size, priced.num_classes)
            self.trace = search.trace
            self.temperature.value = search.net.temperature
        self.epoch.max = self.epoch.value = len(self.trace) - 1
        self._change_epoch()

    def _change_epoch(self) -> None:
        log_p = self.trace[self.epoch.value].p.log()
        self.logits = self.temperature.value * (log_p - log_p.amax(dim=1, keepdim=True))
        self._change_block()

    def _change_block(self) -> None:
        i = self.block.value
        self.beta.children = [
            FloatSlider(float(self.logits[i, j]), min=-15, max=15, description=f"β {i}→{j}")
            for j in self.table.space.outgoing(i)
        ]
        for slider in self.beta.children:
            self._observe(slider, self._show)
        frame = candidates(self.table, self.trace[self.epoch.value], i)
        shares = frame["probability"].map("{:.0%}".format)
        costs = frame["cost"].map("{:.3g}".format)
        frame["text"] = shares + ": " + costs + " M"
        table = frame.set_index(["layer", "op"])["text"].unstack(sort=False, fill_value="")
        self.ops.value = table.to_html() if i else ""
        self._show()

    def _show(self) -> None:
        space, i, moment = self.table.space, self.block.value, self.trace[self.epoch.value]
        logits = [slider.value for slider in self.beta.children]
        self.logits[i, space.outgoing(i)] = torch.tensor(logits)
        p = (self.logits / self.temperature.value).softmax(dim=1)
        best, arch = best_paths(space, p, 5), derive(space, p, moment.head, moment.stack)
        rules = figures.restyled(space, p, best[0][1])
        self.style.value = f"<style>.of-{self.model_id} {{{rules}}}</style>"
        paths = [(share, "→".join(str(node) for node in path)) for share, path in best]
        mult_adds = arch.mult_adds(self.table.input_size, self.table.num_classes)
        cost = expected_cost(self.table, Probabilities(p, moment.head, moment.stack))
        words = f"expected cost <b>{cost:.4g}</b>, derived network <b>{mult_adds:.4g}</b> million Mult-Adds"
        ranking = pd.DataFrame(paths, columns=["probability", "most probable paths"])
        visits = pd.DataFrame({"visited": visit_probabilities(p).tolist()}).T
        tables = ranking.round(4).to_html(index=False) + visits.round(2).to_html()
        self.numbers.value = f"<p>{words}</p>{tables}"
