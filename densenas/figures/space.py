"""The search space as a graph, and what a search found in it: probabilities and costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from torch import Tensor

from densenas.method import ops
from densenas.method.probabilities import visit_probabilities
from densenas.method.space import SearchSpace

from .style import (
    COLOURS,
    GREY,
    INK,
    RED,
    SMALL,
    WIDTH,
    Colour,
    Look,
    bare,
    canvas,
    heat_map,
    legend_below,
    tint,
)

HALF = 0.3  # half a block's height, blocks being 1 apart
Table = Tensor | list[list[float]]
BEND = 0.6  # an arrow's height over half its length


def stage_colours(space: SearchSpace) -> dict[int, Colour]:
    """The colour of each stage, the stem's first."""
    stages = sorted({*space.stage[:-1]})
    return {stage: COLOURS[k % len(COLOURS)] for k, stage in enumerate(stages)}


def stage_handles(space: SearchSpace) -> list[Patch]:
    """The legend's entries for the stages, the stem's first."""
    handles = []
    for stage, colour in stage_colours(space).items():
        stem = " (stem)" if stage == space.stage[0] else ""
        handles.append(
            Patch(facecolor=tint(colour), edgecolor=colour, label=f"stage {stage}{stem}")
        )
    return handles


def edge_look(share: float, chosen: bool = False) -> Look:
    """An edge of probability `share`: thick where probable, red where `chosen` for the derived path."""
    width = 0.4 + 3 * share
    if chosen:
        return {"color": RED, "linewidth": max(2, width), "alpha": 1, "zorder": 3}
    return {"color": INK, "linewidth": width, "alpha": 0.1 + 0.9 * share}


def search_space(space: SearchSpace, p: Tensor | None = None, path: Sequence[int] = ()) -> Figure:
    """The blocks of a space in order, their width inside and stages as colours, with all edges as arrows.

    Arrows above the blocks keep the map (stride 1), those below halve it (stride 2); the bands are maps of one size,
    with the side in pixels. `p` (blocks, nodes) makes edges thin and faint that are improbable once their block is
    reached, and blocks pale that a path rarely visits; the nodes of `path`, from 0 to the final node, and the edges
    between them are red. In an SVG they are called edge-i-j and node-i.
    """
    nodes = space.num_blocks + 1
    pitch = min(0.9, (WIDTH - 0.9) / nodes)  # inches from block to block
    longest = {1: 0, 2: 0}  # blocks that an arrow of this stride spans
    for i, j in space.edges:
        stride = space.stride(i, j)
        longest[stride] = max(longest[stride], j - i)
    top = HALF + BEND * longest[1] / 2 + 0.15
    bottom = -HALF - BEND * longest[2] / 2 - 0.15
    floor = bottom - 0.3 / pitch
    figure, (axes,) = canvas(max(4.5, pitch * nodes + 0.9), pitch * (top - floor) + 1.1)
    axes.set(xlim=(-0.5, nodes - 0.5), ylim=(floor, top), aspect="equal", xlabel="block")
    _draw_maps(axes, space, (floor + bottom) / 2)
    _draw_edges(axes, space, p, path)
    visits = torch.ones(nodes) if p is None else visit_probabilities(p)
    _draw_nodes(axes, space, visits, path, 10 if pitch > 0.6 else SMALL)
    rows = {"stride 1": (HALF + top) / 2, "width\n(channels)": 0, "map (px)": (floor + bottom) / 2}
    if longest[2]:
        rows["stride 2"] = (bottom - HALF) / 2
    axes.set_yticks([*rows.values()], [*rows])
    axes.set_xticks(range(nodes), [*range(nodes - 1), "final"])
    bare(axes)
    handles: list[Patch | Line2D] = [*stage_handles(space)]
    if p is not None:
        for share in (0.1, 0.5, 1):
            handles.append(Line2D([], [], **edge_look(share), label=f"p = {share:g}"))
    if path:
        handles.append(Line2D([], [], color=RED, linewidth=2, label="derived path"))
    legend_below(figure, handles)
    return figure


def _draw_maps(axes: Axes, space: SearchSpace, height: float) -> None:
    """Bands behind blocks on maps of one size, which they name at this height."""
    start = 0
    for number, (side, members) in enumerate(groupby((*space.fm_sizes, space.fm_sizes[-1]))):
        end = start + len(list(members))
        axes.axvspan(start - 0.5, end - 0.5, color="0.94" if number % 2 else "white", zorder=0)
        axes.text((start + end - 1) / 2, height, f"{side}²", ha="center", va="center")
        start = end


def _draw_edges(axes: Axes, space: SearchSpace, p: Tensor | None, path: Sequence[int]) -> None:
    chosen = set(pairwise(path))
    for i, j in space.edges:
        look = edge_look(0 if p is None else float(p[i, j]), (i, j) in chosen)
        if p is None and (i, j) not in chosen:
            look = {"color": INK, "linewidth": 1.1, "alpha": 0.5}
        side = 1 if space.stride(i, j) == 1 else -1
        arrow = FancyArrowPatch(
            (i + 0.15, side * HALF),
            (j - 0.15, side * HALF),
            connectionstyle=f"arc3,rad={-side * BEND}",
            arrowstyle="-|>",
            mutation_scale=6,
            shrinkA=0,
            shrinkB=0,
            gid=f"edge-{i}-{j}",
            **look,
        )
        axes.add_patch(arrow)


def _draw_nodes(
    axes: Axes, space: SearchSpace, visits: Tensor, path: Sequence[int], size: int
) -> None:
    """Boxes with widths inside, in text of this size; the rarer the `visits`, the paler."""
    colours = [stage_colours(space)[stage] for stage in space.stage[:-1]] + [GREY]
    for node, width in enumerate((*space.chs, space.last_dim)):
        box = FancyBboxPatch(
            (node - 0.34, 0.08 - HALF),
            0.68,
            2 * HALF - 0.16,
            boxstyle="round,pad=0.08",
            facecolor=(*tint(colours[node]), min(1.0, float(visits[node]))),
            edgecolor=RED if node in path else colours[node],
            linewidth=2 if node in path else 1,
            gid=f"node-{node}",
            zorder=4,
        )
        axes.add_patch(box)
        style: Look = {"ha": "center", "va": "center", "color": INK, "size": size, "zorder": 5}
        axes.text(node, 0, str(width), **style)


def restyled(space: SearchSpace, p: Tensor, path: Sequence[int]) -> str:
    """CSS that shows other p (blocks, nodes) and another path in an SVG of `search_space`, which is drawn but once."""
    rules, chosen = [], set(pairwise(path))
    for i, j in space.edges:
        look = edge_look(float(p[i, j]), (i, j) in chosen)
        colour = to_hex(look["color"])
        line = f"stroke-width:{look['linewidth']:.2f};opacity:{look['alpha']:.2f}"
        rules.append(f"#edge-{i}-{j} path{{stroke:{colour};{line}}}")
        rules.append(f"#edge-{i}-{j} path+path{{fill:{colour}}}")
    for node, share in enumerate(visit_probabilities(p).tolist()):
        red = f";stroke:{RED};stroke-width:2" if node in path else ""
        rules.append(f"#node-{node} path{{fill-opacity:{share:.2f}{red}}}")
    return "\n".join(rules).replace(";", "!important;").replace("}", "!important}")


def path_probabilities(space: SearchSpace, trace: list[Tensor]) -> Figure:
    """Above, p_ij from block to node at the start of a trace, after its first change, halfway on and at its end (white:
    no edge). Below, the probability that a path visits a block, before the search and after every epoch.
    """
    last = len(trace) - 1
    first = 0
    while first < last and torch.equal(trace[first], trace[0]):
        first += 1
    moments = sorted({0, first, (first + last + 1) // 2, last})
    absent = np.ones(trace[0].shape, bool)
    for edge in space.edges:
        absent[edge] = False
    figure = plt.figure(figsize=(WIDTH, 5.4), layout="constrained")
    plt.close(figure)  # see `canvas`
    blocks = math.ceil(space.num_blocks / 8)  # from label to label
    epochs = math.ceil(len(trace) / 20)
    look: Look = {"norm": Normalize(0, 1), "cbar": False}
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.2))
    for column, epoch in enumerate(moments):
        axes = figure.add_subplot(grid[0, column])
        ticks = {"xticklabels": blocks, "yticklabels": blocks}
        heat_map(axes, trace[epoch], mask=absent, square=True, **ticks, **look)
        title = f"after {epoch} epoch{'s' if epoch > 1 else ''}" if epoch else "start"
        axes.set(title=title, xlabel="to node", ylabel="" if column else "from block")
    below = figure.add_subplot(grid[1, :])
    visits = torch.stack([visit_probabilities(p)[:-1] for p in trace], dim=1)
    heat_map(below, visits, xticklabels=epochs, yticklabels=blocks, **look)
    title = "probability that a path visits the block"
    below.set(title=title, xlabel="epochs searched", ylabel="block")
    bar = figure.colorbar(below.collections[0], ax=figure.axes, label="probability", aspect=40)
    bar.outline.set_visible(False)
    return figure


def op_name(op: str) -> str:
    """k5 e6 for mbconv_k5_t6 (kernel 5, expansion 6), else skip, basic, bottleneck or the function of one's own op."""
    if match := ops.MBCONV.fullmatch(op):
        return "k{} e{}".format(*match.groups())
    return op.rpartition(":")[2].removesuffix("_connect").removesuffix("_block")


def candidates(
    space: SearchSpace, head: Table, stack: Table, label: str, logarithmic: bool = False
) -> Figure:
    """A value of every candidate, in numbers and colours: shares from 0 to 1, or on a logarithmic scale whatever is
    positive, where what is 0 stays white; `label` names it.

    `head` (edges into blocks, head ops) and `stack` (layers, stack ops) are in the space's order; k5 e6 is an MBConv
    of kernel 5 and expansion 6.
    """
    head, stack = torch.as_tensor(head), torch.as_tensor(stack)
    norm, text = Normalize(0, 1), ".2f"
    if logarithmic:
        norm, text = LogNorm(), ".3g"
        norm.autoscale_None(torch.cat([values[values > 0] for values in (head, stack)]))
    edges = [(j, f"{i}→{j}") for i, j in space.head_edges]
    layers = [(block, f"block {block}, layer {k + 1}") for block, k in space.stack_layers]
    tables = [("shape alignment", edges, space.head_ops, head)]
    if layers:
        tables.append(("stacked layers", layers, space.stack_ops, stack))
    longest = max(len(rows) for _, rows, _, _ in tables)
    widths = [len(names) for _, _, names, _ in tables]
    size = max(4, min(WIDTH, 2 + 0.5 * sum(widths))), 1.2 + 0.16 * longest
    figure, panels = canvas(*size, len(tables), width_ratios=widths)
    for axes, (title, rows, names, values) in zip(panels, tables, strict=True):
        short = [re.sub("[ _]", "\n", op_name(op)) for op in names]
        table = pd.DataFrame(values.numpy(), [row for _, row in rows], short)
        numbers = {"annot": True, "fmt": text, "annot_kws": {"size": SMALL}}
        heat_map(axes, table, norm=norm, mask=(table == 0) & logarithmic, cbar=False, **numbers)
        borders = [k for k in range(1, len(rows)) if rows[k][0] != rows[k - 1][0]]
        axes.hlines(borders, 0, len(names), color=INK, linewidth=0.8)
        axes.set_ylim(longest, 0)
        axes.tick_params(labelsize=SMALL, labeltop=True, labelbottom=False)
        axes.set_title(title, loc="left")
    figure.supxlabel(label, size=9)
    return figure
