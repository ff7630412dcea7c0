"""How figures look: colours, sizes, and the few shapes that several of them share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

Look = dict[str, Any]  # keywords of matplotlib, whose values have no common type
Colour = tuple[float, float, float] | str

WIDTH = 9.0  # inches, of the widest figures
SMALL = 8  # points, the smallest text
MANY = 20  # classes, beyond which they are neither all named nor numbered
INK, GREY = "0.15", "0.6"
RED = "#d40020"  # what was derived, and DenseNAS among others; the palette is without what resembles it
BLUE, ORANGE, GREEN, _, PINK, TAN, _, _, _, SKY = sns.color_palette("colorblind")
COLOURS: list[Colour] = [BLUE, ORANGE, GREEN, PINK, "#d4c000", SKY, TAN]

LAYOUT = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "legend.frameon": False,
    "legend.columnspacing": 1.4,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "patch.linewidth": 0.8,
    "figure.dpi": 100,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first comes with matplotlib
    "text.parse_math": False,  # names come from outside, a $ in them begins no formula
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "densenas",  # the same bytes for the same data
}
sns.set_theme(style="whitegrid", context="notebook", palette="colorblind", rc=LAYOUT)
# A name in a script that the font lacks shows boxes in a PNG; the SVG holds it as text.
warnings.filterwarnings("ignore", "Glyph .* missing from font")


def canvas(
    width: float, height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its axes row by row."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    plt.close(figure)  # it lives on as an object; left open, a notebook would show it twice
    return figure, axes.ravel().tolist()


def tint(colour: Colour, strength: float = 0.55) -> Colour:
    """The colour mixed with white, so that dark text on it is legible."""
    red, green, blue = (strength * part + 1 - strength for part in to_rgb(colour))
    return red, green, blue


def palette(names: Iterable[str]) -> dict[str, Colour]:
    """A colour for each name: red for the first, which is DenseNAS where it is compared."""
    colours = cycle([RED, *COLOURS])
    return {name: next(colours) for name in names}


def short_names(names: Sequence[str], longest: int = 16) -> list[str]:
    """Names of at most so many characters, cut in the middle: many differ only at their end."""
    end = (longest - 1) // 2
    begin = longest - 1 - end
    return [name if len(name) <= longest else f"{name[:begin]}…{name[-end:]}" for name in names]


def legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, handlelength=1.5
    )


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend for all axes, in as few rows as fit the figure's width."""
    inches = sum(0.55 + 0.065 * len(str(handle.get_label())) for handle in handles)
    rows = math.ceil(inches / figure.get_figwidth())
    columns = math.ceil(len(handles) / rows)
    figure.legend(handles=[*handles], loc="outside lower center", ncols=columns)


def bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0, pad=2)
    sns.despine(ax=axes, left=True, bottom=True)


def heat_map(axes: Axes, table: Tensor | pd.DataFrame, **options: Any) -> None:
    """seaborn's, in our colours, without lines between so many cells that these would be hidden."""
    many = table.shape[0] * table.shape[1] > 1000
    options |= {"rasterized": True} if many else {"linewidths": 0.5}
    sns.heatmap(table, ax=axes, cmap="YlGnBu", **options)
    axes.tick_params(axis="y", rotation=0)
    bare(axes)


def whole_numbers(*axes: Any) -> None:
    """Ticks at whole numbers only, of an axis of epochs, layers or blocks."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
