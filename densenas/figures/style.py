"""How figures look: colours, sizes, and the few shapes that several of them share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 9.0  # inches, of the widest figures
SMALL = 8  # points, the smallest text
INK, GREY, RED = "0.15", "0.6", "#d40020"  # red: what was derived, and DenseNAS among others
BLUE, ORANGE, GREEN, _, PINK, TAN, _, _, _, SKY = sns.color_palette(
    "colorblind"
)  # without what resembles red
COLOURS = [BLUE, ORANGE, GREEN, PINK, "#d4c000", SKY, TAN]
KINDS = {"k3": SKY, "k5": ORANGE, "k7": GREEN, "basic": SKY, "bottleneck": PINK, "conv1_1": "0.75"}
HEAT = ListedColormap(sns.color_palette("mako_r", as_cmap=True)(np.linspace(0, 0.85, 256)))

# The style of all figures; SVG files hold text as text and are the same bytes for the same data.
sizes = dict.fromkeys(("font.size", "axes.labelsize"), 9) | {"axes.titlesize": 9.5}
sizes |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5)
lines = {
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "patch.linewidth": 0.8,
}
fonts = {"font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}  # the first comes with matplotlib
files = {"svg.fonttype": "none", "svg.hashsalt": "densenas", "figure.dpi": 100}
rc = {"legend.frameon": False, "legend.columnspacing": 1.4, "axes.titleweight": "bold"}
rc |= {"text.parse_math": False}  # names come from outside, a $ in them begins no formula
rc |= sizes | lines | fonts | files
sns.set_theme(style="whitegrid", context="notebook", palette="colorblind", rc=rc)
# A name in a script that the font lacks shows boxes in a PNG; the SVG holds it as text.
warnings.filterwarnings("ignore", "Glyph .* missing from font")


def canvas(
    width: float, height: float, mosaic: Sequence[Sequence[int]] = ((0,),), **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its axes in the order of the mosaic's numbers."""
    mosaic = [[*row] for row in mosaic]
    figure, axes = plt.subplot_mosaic(
        mosaic, figsize=(width, height), layout="constrained", **options
    )
    plt.close(figure)  # it lives on as an object; left open, a notebook would show it twice
    return figure, list(axes.values())


def tint(colour: Any, strength: float = 0.55) -> tuple[float, ...]:
    """The colour mixed with white, so that dark text on it is legible."""
    return tuple(strength * part + 1 - strength for part in to_rgb(colour))


def legend_below(figure: Figure, handles: list[Any]) -> None:
    inches = sum(0.55 + 0.065 * len(handle.get_label()) for handle in handles)
    rows = math.ceil(inches / figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / rows))


def bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0, pad=2)
    sns.despine(ax=axes, left=True, bottom=True)


def heat_map(axes: Axes, matrix: np.ndarray, norm: Normalize, formatted: str = "") -> Any:
    """A matrix with row 0 on top; masked cells stay white. `formatted` is how values are written into the cells."""
    lines = {"rasterized": True} if matrix.size > 2000 else {"edgecolor": "white", "linewidth": 0.5}
    mesh = axes.pcolormesh(matrix, cmap=HEAT, norm=norm, **lines)
    axes.set_ylim(len(matrix), 0)
    bare(axes)
    for (row, column), value in np.ma.ndenumerate(matrix) if formatted else ():
        style = {
            "color": "white" if norm(value) > 0.4 else INK,
            "size": SMALL,
            "ha": "center",
            "va": "center",
        }
        axes.text(column + 0.5, row + 0.5, format(value, formatted), **style)
    return mesh


def integers(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
