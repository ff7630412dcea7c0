"""The search space, what a search found in it, and the networks that came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import LogLocator
from torch import Tensor

from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.derivation import Candidate
from densenas.method.probabilities import visit_probabilities
from densenas.method.space import SearchSpace

from .style import (
    COLOURS,
    GREY,
    INK,
    KINDS,
    RED,
    SMALL,
    WIDTH,
    bare,
    canvas,
    heat_map,
    integers,
    legend_below,
    tint,
)


def _stages(space: SearchSpace) -> tuple[dict[int, Any], list[Patch]]:
    """The colour of each stage, and the legend's entries for them."""
    colours = {
        stage: COLOURS[k % len(COLOURS)] for k, stage in enumerate(sorted({*space.stage[:-1]}))
    }
    names = {stage: f"stage {stage}" + " (stem)" * (stage == space.stage[0]) for stage in colours}
    return colours, [
        Patch(facecolor=tint(colour), edgecolor=colour, label=names[s])
        for s, colour in colours.items()
    ]


def edge_look(share: float, chosen: bool = False) -> dict[str, Any]:
    """An edge of probability `share` in a graph: thick where probable, red where `chosen` for the derived path."""
    width = 0.4 + 3 * share
    if chosen:
        return {"color": RED, "linewidth": max(2, width), "alpha": 1, "zorder": 3}
    return {"color": INK, "linewidth": width, "alpha": 0.1 + 0.9 * share}


def search_space(
    space: SearchSpace, p: Tensor | None = None, path: list[int] | None = None
) -> Figure:
    """The blocks of a space in order, their width inside and stages as colours, with all edges as arrows.

    Arrows above the blocks keep the map (stride 1), those below halve it (stride 2); the bands are maps of one size,
    with the side in pixels. `p` (blocks, nodes) makes improbable edges thin and faint; the nodes of `path`, from 0 to
    the final node, and the edges between them are red. In an SVG they are called edge-i-j and node-i.
    """
    (colours, handles), nodes = _stages(space), space.num_blocks + 1
    pitch = min(0.9, (WIDTH - 0.9) / nodes)  # inches from block to block
    half, bend = 0.3, 0.6  # half a block's height; an arrow's height over half its length
    reach = {
        s: max([bend * (j - i) / 2 for i, j in space.edges if space.stride(i, j) == s], default=0)
        for s in (1, 2)
    }
    top, bottom = half + reach[1] + 0.15, -half - reach[2] - 0.15
    floor = bottom - 0.3 / pitch
    figure, (axes,) = canvas(max(4.5, pitch * nodes + 0.9), pitch * (top - floor) + 1.1)
    axes.set(xlim=(-0.5, nodes - 0.5), ylim=(floor, top), aspect="equal", xlabel="block")
    start = 0
    for number, (side, members) in enumerate(groupby((*space.fm_sizes, space.fm_sizes[-1]))):
        end = start + len([*members])
        axes.axvspan(start - 0.5, end - 0.5, color="0.94" if number % 2 else "white", zorder=0)
        axes.text((start + end - 1) / 2, (floor + bottom) / 2, f"{side}²", ha="center", va="center")
        start = end

    chosen = set(pairwise(path or ()))
    for i, j in space.edges:
        side = 1 if space.stride(i, j) == 1 else -1
        style = {"color": INK, "linewidth": 1.1, "alpha": 0.5}
        if p is not None or (i, j) in chosen:
            style = edge_look(0 if p is None else float(p[i, j]), (i, j) in chosen)
        line = {
            "connectionstyle": f"arc3,rad={-side * bend}",
            "arrowstyle": "-|>",
            "mutation_scale": 6,
        }
        ends = (i + 0.15, side * half), (j - 0.15, side * half)
        axes.add_patch(
            FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, gid=f"edge-{i}-{j}", **line, **style)
        )
    for node, width in enumerate((*space.chs, space.last_dim)):
        colour = colours[space.stage[node]] if node < nodes - 1 else GREY
        style = (
            {"edgecolor": RED, "linewidth": 2}
            if node in (path or ())
            else {"edgecolor": colour, "linewidth": 1}
        )
        box = FancyBboxPatch(
            (node - 0.34, 0.08 - half), 0.68, 2 * half - 0.16, boxstyle="round,pad=0.08", zorder=4
        )
        axes.add_patch(box).set(facecolor=tint(colour), gid=f"node-{node}", **style)
        axes.text(
            node,
            0,
            width,
            ha="center",
            va="center",
            size=10 if pitch > 0.6 else SMALL,
            color=INK,
            zorder=5,
        )
    heights = [(half + top) / 2, 0, (floor + bottom) / 2, (bottom - half) / 2]
    names = ["stride 1", "width\n(channels)", "map (px)", "stride 2"]
    axes.set_yticks(heights[: 4 if reach[2] else 3], names[: 4 if reach[2] else 3])
    axes.set_xticks(range(nodes), [*range(nodes - 1), "final"])
    bare(axes)
    if p is not None:
        handles += [
            Line2D([], [], **edge_look(share), label=f"p = {share:g}") for share in (0.1, 0.5, 1)
        ]
    if path:
        handles.append(Line2D([], [], color=RED, linewidth=2, label="derived path"))
    legend_below(figure, handles)
    return figure


def restyled(space: SearchSpace, p: Tensor, path: Sequence[int]) -> str:
    """CSS that shows other p (blocks, nodes) and another path in an SVG of `search_space`, which is drawn but once.

    There blocks are the paler, the rarer a path visits them.
    """
    rules, chosen = [], set(pairwise(path))
    for i, j in space.edges:
        style = edge_look(float(p[i, j]), (i, j) in chosen)
        colour, line = (
            to_hex(style["color"]),
            f"stroke-width:{style['linewidth']:.2f};opacity:{style['alpha']:.2f}",
        )
        rules += [
            f"#edge-{i}-{j} path{{stroke:{colour};{line}}}",
            f"#edge-{i}-{j} path+path{{fill:{colour}}}",
        ]
    for node, share in enumerate(visit_probabilities(p).tolist()):
        red = f";stroke:{RED};stroke-width:2" if node in path else ""
        rules.append(f"#node-{node} path{{fill-opacity:{share:.2f}{red}}}")
    return "\n".join(rules).replace(";", "!important;").replace("}", "!important}")


def _number_cells(axis: Any, count: int, at_most: int) -> None:
    numbers = np.arange(0, count, math.ceil(count / at_most))
    axis.set_ticks(numbers + 0.5, numbers)


def path_probabilities(space: SearchSpace, trace: list[Tensor]) -> Figure:
    """Above, p_ij from block to node at the start of a trace, after its first change, halfway on and at its end (white:
    no edge). Below, the probability that a path visits a block, before the search and after every epoch.
    """
    last, edges = len(trace) - 1, np.zeros(trace[0].shape, bool)
    edges[tuple(zip(*space.edges, strict=True))] = True
    first = next((k for k, p in enumerate(trace) if not torch.equal(p, trace[0])), last)
    moments = sorted({0, first, (first + last + 1) // 2, last})
    mosaic = [range(4), [4] * 4]
    figure, (*above, below) = canvas(WIDTH, 5.4, mosaic, height_ratios=(1, 1.2))
    for axes in above[len(moments) :]:
        axes.set_axis_off()
    for axes, k in zip(above, moments, strict=False):
        mesh = heat_map(axes, np.ma.array(trace[k], mask=~edges), Normalize(0, 1))
        axes.set(
            title=f"after {k} epoch{'s' * (k > 1)}" if k else "start",
            xlabel="to node",
            aspect="equal",
        )
        _number_cells(axes.xaxis, edges.shape[1], 8)
        _number_cells(axes.yaxis, edges.shape[0], 8)
    above[0].set_ylabel("from block")
    visits = torch.stack([visit_probabilities(p)[:-1] for p in trace], dim=1).numpy()
    heat_map(below, visits, Normalize(0, 1))
    below.set(
        title="probability that a path visits the block", xlabel="epochs searched", ylabel="block"
    )
    _number_cells(below.xaxis, len(trace), 21)
    _number_cells(below.yaxis, len(visits), 12)
    figure.colorbar(mesh, ax=[*above, below], label="probability", aspect=40).outline.set_visible(
        False
    )
    return figure


def _op_name(op: str) -> str:
    """k5 e6 for mbconv_k5_t6 (kernel 5, expansion 6), else skip, basic or bottleneck."""
    if match := ops.MBCONV.fullmatch(op):
        return "k{} e{}".format(*match.groups())
    return op.removesuffix("_connect").removesuffix("_block")


def _op_tables(
    space: SearchSpace, tables: Sequence[np.ndarray], norm: Normalize, formatted: str, **bar: Any
) -> Figure:
    """Heat maps of a value per candidate: a row for each edge and for each stacked layer, long tables in pieces.

    `tables` are (edges into blocks, head ops) and (layers, stack ops).
    """
    edges = [(j, f"{i}→{j}") for i, j in space.head_edges]
    stacked = [
        (j, f"block {j}, layer {k + 1}")
        for j, count in enumerate(space.num_layers)
        for k in range(count)
    ]
    parts = [
        ("shape alignment", 0.6, edges, space.head_ops),
        ("stacked layers", 1.1, stacked, space.stack_ops),
    ]
    for rows_at_most in (30, 40, 58):  # as low as fits the width
        panels, width = [], 0.2
        for (title, margin, rows, names), table in zip(parts, tables, strict=True):
            pieces = math.ceil(len(table) / rows_at_most)
            for k in range(pieces):
                piece = slice(k * len(table) // pieces, (k + 1) * len(table) // pieces)
                panels.append(("" if k else title, rows[piece], table[piece], names))
            width += pieces * (margin + 0.5 * len(names))
        if width <= WIDTH:
            break
    longest, columns = (
        max(2, *(len(table) for _, _, table, _ in panels)),
        [len(names) for *_, names in panels],
    )
    width, height = min(max(width, 4), WIDTH), 1.4 + 0.14 * longest
    figure, all_axes = canvas(width, height, [range(len(panels))], width_ratios=columns)
    for axes, (title, rows, table, names) in zip(all_axes, panels, strict=True):
        mesh = heat_map(axes, table, norm, formatted if longest <= 30 else "")
        borders = [k for k in range(1, len(rows)) if rows[k][0] != rows[k - 1][0]]
        axes.hlines(borders, 0, len(names), color=INK, linewidth=0.8)
        axes.set_ylim(longest, 0)
        axes.set_xticks(
            np.arange(len(names)) + 0.5, [_op_name(op).replace(" ", "\n") for op in names]
        )
        axes.set_yticks(np.arange(len(rows)) + 0.5, [text for _, text in rows])
        axes.tick_params(labelsize=SMALL, labeltop=True, labelbottom=False)
        axes.set_title(title, loc="left")
    bar = {"location": "bottom", "aspect": 50, "shrink": 0.6, "pad": 0.15 / height, **bar}
    figure.colorbar(mesh, ax=all_axes, **bar).outline.set_visible(False)
    return figure


def operation_probabilities(space: SearchSpace, head: Tensor, stack: Tensor) -> Figure:
    """softmax(alpha) of every candidate: `head` (edges into blocks, head ops), `stack` (layers, stack ops).

    k5 e6 is an MBConv of kernel 5 and expansion 6. Where edges have but one candidate, only the layers are drawn.
    """
    rows = head[: len(head) if head.shape[1] > 1 or not len(stack) else 0]
    tables, label = (rows.numpy(), stack.numpy()), "probability of the candidate"
    return _op_tables(space, tables, Normalize(0, 1), ".2f", label=label)


def cost_table(table: CostTable) -> Figure:
    """The cost of every candidate in the table's unit, in colours on a logarithmic scale; white costs nothing."""
    tables = [
        np.ma.masked_equal(part.numpy(), 0)
        for part in table.tensors(torch.zeros((), dtype=torch.float64))[:2]
    ]
    values = np.ma.concatenate([table.ravel() for table in tables]).compressed()
    low, high = (values.min(), values.max()) if len(values) else (1, 1)
    norm, decimals = (
        LogNorm(low, max(high, 2 * low)),
        min(3, max(0, 2 - math.floor(math.log10(high)))),
    )
    ticks = LogLocator(subs=(1, 2, 5) if high > 30 * low else (1, 2, 3, 5, 7))
    ticks = (
        ticks if high >= 2 * low else sorted({low, high})
    )  # within one octave the locator's labels overlap
    bar = {
        "label": f"cost of the candidate ({table.unit}; white: 0)",
        "format": "{x:.4g}",
        "ticks": ticks,
    }
    figure = _op_tables(table.space, tables, norm, f".{decimals}f", **bar)
    figure.axes[-1].minorticks_off()
    return figure


def block_counts_and_widths(
    space: SearchSpace, trace: list[Tensor], derived: list[Candidate]
) -> Figure:
    """Left, how many blocks of each stage a path visits on average, over the epochs of a trace of p (blocks, nodes),
    and how many the derived architectures have (one for each of the trace's last entries), without the stem.
    Right, the channels of the last one's layers, and as thin lines the widths that its stages offer.
    """
    colours, handles = _stages(space)
    figure, (left, right) = canvas(WIDTH, 3.6, ((0, 1),))
    visits = torch.stack([visit_probabilities(p) for p in trace]).numpy()
    members = {
        s: [block for block in range(1, space.num_blocks) if space.stage[block] == s]
        for s in colours
    }
    counts = [visits[:, blocks].sum(axis=1) for blocks in members.values()]
    left.stackplot(
        range(len(trace)), counts, colors=[tint(c, 0.7) for c in colours.values()], linewidth=0
    )
    searched = [len(one.architecture.routing_blocks) for one in derived]
    left.step(range(len(trace) - len(derived), len(trace)), searched, where="mid", color=RED)
    left.set(xlabel="epochs searched", xlim=(0, max(1, len(trace) - 1)))
    left.set(
        ylabel="blocks (expected, stacked by stage)", ylim=(0, 1.05 * max(*searched, *sum(counts)))
    )
    integers(left.xaxis, left.yaxis, right.xaxis)
    depth = 0
    for block, number in zip(
        derived[-1].architecture.routing_blocks, derived[-1].path[1:-1], strict=True
    ):
        end, colour = depth + 1 + len(block.stack), colours[space.stage[number]]
        right.add_patch(
            Rectangle(
                (depth, 0), end - depth, block.out_ch, facecolor=tint(colour, 0.4), linewidth=0
            )
        )
        offered = [
            width
            for width, stage in zip(space.chs, space.stage, strict=False)
            if stage == space.stage[number]
        ]
        right.hlines(offered, depth, end, color=colour, linewidth=1)
        right.hlines(block.out_ch, depth, end, color=RED, linewidth=2.5)
        right.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
        depth = end
    right.set(xlabel="depth (layers; dotted: block borders)", xlim=(0, max(1, depth)))
    right.set(ylabel="width (channels)", ylim=(0, 1.05 * max(space.chs)))
    right.grid(False)
    legend_below(figure, [*handles[1:], Line2D([], [], color=RED, label="derived architecture")])
    return figure


def architectures(named: Mapping[str, Architecture]) -> Figure:
    """Each architecture as a row of bars, one per layer from input to output, its width (channels) written inside.

    Colours are kernels (or kinds of ResNet block), heights expansions; a frame holds the layers of one block, wide gaps
    are where the map halves. Stem and last 1×1 convolution are drawn, but count as neither block nor layer.
    """
    rows = []  # per architecture, per block: where it starts (in bars), its ops, its width
    for arch in named.values():
        blocks = [((block.head, *block.stack), block.out_ch, block.stride) for block in arch.blocks]
        x, row = -0.75 if arch.blocks[0].stride == 2 else -0.25, []
        for operations, width, stride in blocks + [(("conv1_1",), arch.last_dim, 1)] * bool(
            arch.last_dim
        ):
            x += 0.75 if stride == 2 else 0.25
            row.append((x, operations, width))
            x += len(operations)
        rows.append(row)
    extent = max(row[-1][0] + len(row[-1][1]) for row in rows)
    bar = min(0.45, (WIDTH - 1.5) / extent)  # inches
    figure, (axes,) = canvas(max(6.4, bar * extent + 1.5), 0.85 * len(named) + 0.9)
    text = {"size": SMALL, "ha": "center", "va": "center", "color": INK}
    kinds, expansions = set(), set()
    for y, (x, operations, width) in ((y, block) for y, row in enumerate(rows) for block in row):
        axes.add_patch(
            Rectangle(
                (x - 0.06, y - 0.46), len(operations) + 0.12, 0.92, facecolor="0.96", edgecolor=GREY
            )
        )
        for centre, op in enumerate(operations, start=1):
            name, _, expansion = _op_name(op).partition(" e")
            height, colour = {"1": 0.28, "3": 0.42}.get(expansion, 0.84), tint(KINDS[name], 0.75)
            axes.bar(
                x + centre - 0.5, height, 0.9, y - height / 2, color=colour, linewidth=0, zorder=2
            )
            kinds.add(name)
            expansions |= {(height, expansion)} if expansion else set()
        count = len(operations)
        centres = (
            np.arange(count) + 0.5 if bar > 0.14 else [count / 2] * (count * bar > 0.14)
        )  # where numbers fit
        for centre in centres:
            axes.text(
                x + centre, y, width, rotation=0 if bar * count / len(centres) > 0.3 else 90, **text
            )
    counts = [(len(arch.routing_blocks), arch.num_layers) for arch in named.values()]
    labels = [
        f"{name}\nblocks: {b}, layers: {n}" for name, (b, n) in zip(named, counts, strict=True)
    ]
    axes.set_yticks(range(len(named)), labels)
    axes.set(xlim=(-0.2, extent + 0.2), ylim=(len(named) - 0.45, -0.55), xticks=[])
    axes.set_xlabel("layers, from input to output (inside: width in channels; wide gaps: stride 2)")
    bare(axes)
    meaning = {"basic": "BasicBlock", "bottleneck": "Bottleneck", "conv1_1": "1×1 convolution"}
    meaning |= {f"k{size}": f"kernel {size}×{size}" for size in (3, 5, 7)}
    handles = [
        Patch(color=tint(KINDS[kind], 0.75), label=meaning[kind]) for kind in KINDS if kind in kinds
    ]
    tall = {"linestyle": "", "marker": "|", "markeredgewidth": 6, "color": GREY}
    handles += [
        Line2D([], [], markersize=14 * h, label=f"expansion {e}", **tall)
        for h, e in sorted(expansions)
    ]
    legend_below(figure, handles)
    return figure


def shapes(groups: Mapping[str, Sequence[Architecture]]) -> Figure:
    """Block counts and widths of many architectures by group: mean over the members, bars and bands hold 80 % of them.

    Left the routing blocks on each map, after so many halvings behind the stem; right the channels of each layer.
    """
    counts, widths = [], []
    for group, members in groups.items():
        for arch in members:
            halvings = list(accumulate(block.stride // 2 for block in arch.routing_blocks))
            counts += [(group, k, halvings.count(k)) for k in {*halvings}]
            along = [
                block.out_ch for block in arch.routing_blocks for _ in (block.head, *block.stack)
            ]
            widths += [(group, layer, width) for layer, width in enumerate(along, start=1)]
    figure, (left, right) = canvas(WIDTH, 3.6, ((0, 1),))
    look = dict(zip(groups, [RED, *COLOURS], strict=False))
    blocks = pd.DataFrame(counts, columns=["group", "halvings", "blocks"])
    style = {"hue": "group", "palette": look, "errorbar": ("pi", 80), "legend": False}
    points = {"dodge": len(groups) > 1 and 0.2, "linestyle": "none", "capsize": 0.05}
    sns.pointplot(blocks, x="halvings", y="blocks", ax=left, **points, **style)
    layers = pd.DataFrame(widths, columns=["group", "layer", "width"])
    sns.lineplot(layers, x="layer", y="width", marker="o", ax=right, **style)
    left.set(xlabel="halvings of the map", ylabel="routing blocks", ylim=(0, None))
    right.set(xlabel="layer", ylabel="width (channels)", ylim=(0, None))
    integers(right.xaxis, left.yaxis)
    names = [f"{group} (n = {len(members)})" for group, members in groups.items()]
    handles = [
        Patch(color=look[group], label=name) for group, name in zip(groups, names, strict=True)
    ]
    legend_below(figure, handles)
    return figure
