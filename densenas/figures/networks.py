"""The networks that came out: layer by layer, and their block counts and widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from densenas.method.architecture import Architecture, Candidate
from densenas.method.probabilities import visit_probabilities
from densenas.method.space import SearchSpace

from .space import op_name, stage_colours, stage_handles
from .style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    SMALL,
    TAN,
    WIDTH,
    Colour,
    Look,
    bare,
    canvas,
    legend_below,
    palette,
    tint,
    whole_numbers,
)

KINDS = {
    "k3": ("kernel 3×3", SKY),
    "k5": ("kernel 5×5", ORANGE),
    "k7": ("kernel 7×7", GREEN),
    "basic": ("BasicBlock", SKY),
    "bottleneck": ("Bottleneck", PINK),
    "conv1_1": ("1×1 convolution", "0.75"),
}
OWN = (PINK, TAN, BLUE)  # of ops of one's own, in the order in which they appear
HEIGHTS = {"1": 0.28, "3": 0.42, "6": 0.84}  # of bars by expansion, rows being 1 apart
NARROW, WIDE = 0.25, 0.75  # gaps before a block, in bars: the second where the map halves


class _Bars(NamedTuple):
    """The layers of one block: where they start (in bars from the left), their ops and their width."""

    start: float
    ops: tuple[str, ...]
    width: int

    @property
    def end(self) -> float:
        return self.start + len(self.ops)


def _row(arch: Architecture) -> list[_Bars]:
    row, x = [], -WIDE if arch.blocks[0].stride == 2 else -NARROW
    for block in arch.blocks:
        x += WIDE if block.stride == 2 else NARROW
        row.append(_Bars(x, (block.head, *block.stack), block.out_ch))
        x = row[-1].end
    if arch.last_dim:
        row.append(_Bars(x + NARROW, ("conv1_1",), arch.last_dim))
    return row


def architectures(named: Mapping[str, Architecture]) -> Figure:
    """Each architecture as a row of bars, one per layer from input to output, its width (channels) written inside.

    Colours are kernels (or kinds of ResNet block), heights expansions; a frame holds the layers of one block, wide gaps
    are where the map halves. Stem and last 1×1 convolution are drawn, but count as neither block nor layer.
    """
    rows = [_row(arch) for arch in named.values()]
    extent = max(row[-1].end for row in rows)
    bar = min(0.45, (WIDTH - 1.5) / extent)  # inches
    figure, (axes,) = canvas(max(6.4, bar * extent + 1.5), 0.85 * len(named) + 0.9)
    blocks = [block for row in rows for block in row]
    names = [op_name(op).partition(" e") for block in blocks for op in block.ops]
    kinds, expansions = {kind for kind, _, _ in names}, {expansion for _, _, expansion in names}
    looks = _looks([kind for kind, _, _ in names])
    for y, row in enumerate(rows):
        for block in row:
            _draw_block(axes, y, block, bar, looks)
    labels = []
    for name, arch in named.items():
        labels.append(f"{name}\nblocks: {len(arch.routing_blocks)}, layers: {arch.num_layers}")
    axes.set_yticks(range(len(named)), labels)
    axes.set(xlim=(-0.2, extent + 0.2), ylim=(len(named) - 0.45, -0.55), xticks=[])
    axes.set_xlabel("layers, from input to output (inside: width in channels; wide gaps: stride 2)")
    bare(axes)
    handles: list[Patch | Line2D] = []
    for kind, (meaning, colour) in looks.items():
        if kind in kinds:
            handles.append(Patch(color=tint(colour, 0.75), label=meaning))
    for expansion, height in HEIGHTS.items():
        if expansion in expansions:
            look: Look = {"linestyle": "", "marker": "|", "markeredgewidth": 6, "color": GREY}
            label = f"expansion {expansion}"
            handles.append(Line2D([], [], markersize=14 * height, label=label, **look))
    legend_below(figure, handles)
    return figure


def _looks(kinds: Sequence[str]) -> dict[str, tuple[str, Colour]]:
    """What each kind of op is called and its colour, one's own at the end."""
    looks: dict[str, tuple[str, Colour]] = dict(KINDS)
    strange = [kind for kind in dict.fromkeys(kinds) if kind not in KINDS]
    for number, kind in enumerate(strange):
        looks[kind] = kind, OWN[number % len(OWN)]
    return looks


def _draw_block(
    axes: Axes, y: int, block: _Bars, bar: float, looks: Mapping[str, tuple[str, Colour]]
) -> None:
    """A block's frame and its bars, each of `bar` inches, with the width inside where it fits."""
    count = len(block.ops)
    frame = (block.start - 0.06, y - 0.46), count + 0.12, 0.92
    axes.add_patch(Rectangle(*frame, facecolor="0.96", edgecolor=GREY))
    for k, op in enumerate(block.ops):
        kind, _, expansion = op_name(op).partition(" e")
        height, colour = HEIGHTS.get(expansion, 0.84), tint(looks[kind][1], 0.75)
        corner = (block.start + k + 0.05, y - height / 2)
        axes.add_patch(Rectangle(corner, 0.9, height, facecolor=colour, linewidth=0, zorder=2))
    if bar > 0.14:
        centres = [block.start + k + 0.5 for k in range(count)]
    else:
        centres = [block.start + count / 2] if count * bar > 0.14 else []
    for centre in centres:
        room = bar * count / len(centres)  # inches
        style: Look = {"size": SMALL, "ha": "center", "va": "center", "color": INK}
        axes.text(centre, y, str(block.width), rotation=0 if room > 0.3 else 90, **style)


def block_counts_and_widths(
    space: SearchSpace, trace: list[Tensor], derived: list[Candidate]
) -> Figure:
    """Left, how many blocks of each stage a path visits on average, over the epochs of a trace of p (blocks, nodes),
    and how many the derived architectures have (one for each of the trace's last entries), without the stem.
    Right, the channels of the last one's layers, and as thin lines the widths that its stages offer.
    """
    figure, (left, right) = canvas(WIDTH, 3.6, 2)
    colours = stage_colours(space)
    visits = torch.stack([visit_probabilities(p) for p in trace]).numpy()
    counts, tints = [], []
    for stage, colour in colours.items():
        members = [block for block in range(1, space.num_blocks) if space.stage[block] == stage]
        counts.append(visits[:, members].sum(axis=1))
        tints.append(tint(colour, 0.7))
    left.stackplot(range(len(trace)), counts, colors=tints, linewidth=0)
    found = [len(one.architecture.routing_blocks) for one in derived]
    left.step(range(len(trace) - len(derived), len(trace)), found, where="mid", color=RED)
    highest = 1.05 * max(*found, *sum(counts))
    left.set(xlabel="epochs searched", xlim=(0, max(1, len(trace) - 1)))
    left.set(ylabel="blocks (expected, stacked by stage)", ylim=(0, highest))
    _draw_widths(right, space, derived[-1])
    whole_numbers(left.xaxis, left.yaxis, right.xaxis)
    handles = stage_handles(space)[1:]  # without the stem
    legend_below(figure, [*handles, Line2D([], [], color=RED, label="derived architecture")])
    return figure


def _draw_widths(axes: Axes, space: SearchSpace, derived: Candidate) -> None:
    """The derived widths along the depth, among those that each block's stage offers."""
    start = 0
    for block, number in zip(derived.architecture.routing_blocks, derived.path[1:-1], strict=True):
        stage = space.stage[number]
        offered = [space.chs[k] for k in range(space.num_blocks) if space.stage[k] == stage]
        colour, end = stage_colours(space)[stage], start + 1 + len(block.stack)
        area = (start, 0), end - start, block.out_ch
        axes.add_patch(Rectangle(*area, facecolor=tint(colour, 0.4), linewidth=0))
        axes.hlines(offered, start, end, color=colour, linewidth=1)
        axes.hlines(block.out_ch, start, end, color=RED, linewidth=2.5)
        axes.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
        start = end
    axes.set(xlabel="depth (layers; dotted: block borders)", xlim=(0, max(1, start)))
    axes.set(ylabel="width (channels)", ylim=(0, 1.05 * max(space.chs)))
    axes.grid(False)


def shapes(groups: Mapping[str, Sequence[Architecture]]) -> Figure:
    """Block counts and widths of many architectures by group: mean over the members, bars and bands hold 80 % of them.

    Left the routing blocks on each map, after so many halvings behind the stem; right the channels of each layer.
    """
    counts, widths = [], []
    for group, members in groups.items():
        for arch in members:
            halvings = list(accumulate(block.stride // 2 for block in arch.routing_blocks))
            counts += [(group, halving, halvings.count(halving)) for halving in {*halvings}]
            layer = 0
            for block in arch.routing_blocks:
                for _ in (block.head, *block.stack):
                    layer += 1
                    widths.append((group, layer, block.out_ch))
    figure, (left, right) = canvas(WIDTH, 3.6, 2)
    colours = palette(groups)
    style = {"hue": "group", "palette": colours, "errorbar": ("pi", 80), "legend": False}
    dodge = 0.2 if len(groups) > 1 else False
    blocks = pd.DataFrame(counts, columns=["group", "halvings", "blocks"])
    points = {"dodge": dodge, "linestyle": "none", "capsize": 0.05}
    sns.pointplot(blocks, x="halvings", y="blocks", ax=left, **points, **style)
    layers = pd.DataFrame(widths, columns=["group", "layer", "width"])
    sns.lineplot(layers, x="layer", y="width", marker="o", ax=right, **style)
    left.set(xlabel="halvings of the map", ylabel="routing blocks", ylim=(0, None))
    right.set(xlabel="layer", ylabel="width (channels)", ylim=(0, None))
    whole_numbers(right.xaxis, left.yaxis)
    handles = []
    for group, members in groups.items():
        handles.append(Patch(color=colours[group], label=f"{group} (n = {len(members)})"))
    legend_below(figure, handles)
    return figure
