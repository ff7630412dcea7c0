"""Exploring a space: what its path probabilities mean, as values, and under sliders in JupyterLab."""

from __future__ import annotations

import io
from contextlib import suppress

import pandas as pd
import torch
from ipywidgets import HTML, Dropdown, FloatSlider, HBox, IntSlider, VBox

from densenas import figures
from densenas.files import root
from densenas.method.cost import CostTable
from densenas.method.derivation import best_paths, derive
from densenas.method.probabilities import Probabilities, expected_cost, visit_probabilities
from densenas.method.space import PRESETS, SearchSpace
from densenas.outcome import Search, load_search
from densenas.pricing import read_costs
from densenas.runs.run import Run

NO_RUN = "none, only sliders"


def undecided(table: CostTable) -> Probabilities:
    """Of a space before its search: every edge of a block and every candidate of a layer is equally probable."""
    beta = torch.full((table.space.num_blocks, table.space.num_blocks + 1), -torch.inf)
    beta[tuple(torch.tensor(table.space.edges).T)] = 0
    return Probabilities(
        beta.softmax(1), *(torch.zeros_like(costs).softmax(1) for costs in table.tensors(beta)[:2])
    )


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
    space, rows = table.space, []
    layers = [(f"{i}→{j}", j, space.head_ops) for i, j in space.head_edges]
    layers += [
        (f"layer {n + 1}", j, space.stack_ops)
        for j, count in enumerate(space.num_layers)
        for n in range(count)
    ]
    head, stack, *_ = table.tensors(like=moment.p)
    values = ((*a.tolist(), *b.tolist()) for a, b in ((moment.head, moment.stack), (head, stack)))
    for (name, owner, ops), *shares_and_costs in zip(layers, *values, strict=True):
        rows += [(name, *row) for row in zip(ops, *shares_and_costs, strict=True) if owner == block]
    return pd.DataFrame(rows, columns=["layer", "op", "probability", "cost"])


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
        self.beta, self.graph, self.style, self.numbers, self.ops = (
            VBox(),
            *(HTML() for _ in range(4)),
        )
        for step, widget in enumerate(
            (self.space, self.run, self.epoch, self.block, self.temperature)
        ):
            widget.observe(lambda _, step=step: self.follow(step), "value")
        controls = VBox([self.space, self.run, self.epoch, self.temperature, self.block, self.beta])
        super().__init__([HBox([controls, self.graph]), self.style, self.numbers, self.ops])
        self.add_class(f"of-{self.model_id}")
        self.follow(0)
        if run and finished(run, self.table.space):
            self.run.value = run

    def follow(self, first: int) -> None:
        """After a change of space (0), run (1), epoch (2), block (3), temperature or beta (4)."""
        if not self.following:  # else it is itself what changed a widget
            self.following = True
            try:
                for step in (self._space, self._run, self._epoch, self._block, self._show)[first:]:
                    step()
            finally:
                self.following = False

    def _space(self) -> None:
        space, svg = SearchSpace.load(self.space.value), io.StringIO()
        self.table = CostTable.mult_adds(space, space.input_size, self.num_classes)
        # Drawn once: from then on a style sheet changes it, in milliseconds.
        figures.search_space(space, undecided(self.table).p, [0]).savefig(
            svg, format="svg", bbox_inches="tight"
        )
        self.graph.value = svg.getvalue()[svg.getvalue().index("<svg") :]
        self.run.options = [NO_RUN, *searched(space)]
        self.block.options = [(f"{i} ({width} channels)", i) for i, width in enumerate(space.chs)]
        self.run.value, self.block.value = NO_RUN, 0

    def _run(self) -> None:
        space, self.trace = self.table.space, [undecided(self.table)]
        self.temperature.value = space.search.softmax_temp
        if self.run.value != NO_RUN:
            search = finished(self.run.value, space)
            size, classes = search.table.input_size, search.table.num_classes
            self.table, self.trace = CostTable.mult_adds(space, size, classes), search.trace
            self.temperature.value = search.net.temperature
        self.epoch.max = self.epoch.value = len(self.trace) - 1

    def _epoch(self) -> None:
        log_p = self.trace[self.epoch.value].p.log()
        self.logits = self.temperature.value * (log_p - log_p.amax(dim=1, keepdim=True))

    def _block(self) -> None:
        i = self.block.value
        edges = {f"β {i}→{j}": float(self.logits[i, j]) for j in self.table.space.outgoing(i)}
        self.beta.children = [
            FloatSlider(x, min=-15, max=15, description=name) for name, x in edges.items()
        ]
        for slider in self.beta.children:
            slider.observe(lambda _: self.follow(4), "value")
        frame = candidates(self.table, self.trace[self.epoch.value], i)
        frame["text"] = frame["probability"].map("{:.0%}: ".format) + frame["cost"].map(
            "{:.3g} M".format
        )
        table = frame.set_index(["layer", "op"])["text"].unstack(sort=False, fill_value="")
        self.ops.value = table.to_html() if i else ""

    def _show(self) -> None:
        space, i, moment = self.table.space, self.block.value, self.trace[self.epoch.value]
        self.logits[i, space.outgoing(i)] = torch.tensor(
            [slider.value for slider in self.beta.children]
        )
        p = (self.logits / self.temperature.value).softmax(dim=1)
        best, arch = best_paths(space, p, 5), derive(space, p, moment.head, moment.stack)
        self.style.value = (
            f"<style>.of-{self.model_id} {{{figures.restyled(space, p, best[0][1])}}}</style>"
        )
        paths = [(share, "→".join(map(str, path))) for share, path in best]
        mult_adds = arch.mult_adds(self.table.input_size, self.table.num_classes)
        self.numbers.value = (
            f"<p>expected cost <b>{expected_cost(self.table, Probabilities(p, moment.head, moment.stack)):.4g}</b>,"
            f" derived network <b>{mult_adds:.4g}</b> million Mult-Adds</p>"
            + pd.DataFrame(paths, columns=["probability", "most probable paths"])
            .round(4)
            .to_html(index=False)
            + pd.DataFrame({"visited": visit_probabilities(p).tolist()}).T.round(2).to_html()
        )
