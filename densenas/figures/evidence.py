"""What a study found: every network's accuracy, how it came about, and what ordered it beforehand."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .style import (
    GREY,
    INK,
    SMALL,
    WIDTH,
    Colour,
    Look,
    canvas,
    legend_below,
    palette,
    whole_numbers,
)

MARKERS = "os^DvP*Xp<>"  # more than there are colours: where these repeat, both together do not


def _looks(names: list[str]) -> dict[str, tuple[Colour, str]]:
    """A colour and a marker for each design, which tell it apart without the other."""
    colours = palette(names)
    return {name: (colours[name], MARKERS[k % len(MARKERS)]) for k, name in enumerate(names)}


def accuracies(results: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Top-1 accuracy against Mult-Adds: a panel for each target, in it a column of points for each design.

    `results` are rows of a study, `table` has by target and design n, mean (%), and the ends of its interval (low,
    high). Points stand where their Mult-Adds put them, left to right within their column.
    """
    designs = [*dict.fromkeys(results["design"])]
    looks = _looks(designs)
    targets = sorted(results["target"].unique())
    figure, panels = canvas(WIDTH, 4.2, len(targets), sharey=True)
    for axes, target in zip(panels, targets, strict=True):
        for place, design in enumerate(designs):
            rows = results[(results["target"] == target) & (results["design"] == design)]
            if rows.empty:
                continue
            colour, marker = looks[design]
            # Within 5 % of the target: the column's width.
            aside = (rows["mult_adds_m"] / target - 1) / 0.05 * 0.26
            style: Look = {"color": colour, "marker": marker, "s": 22, "alpha": 0.75}
            axes.scatter(place - 0.1 + aside, 100 * rows["top1"], zorder=3, linewidth=0, **style)
            mean = table.loc[(target, design)]
            if mean["low"] == mean["low"]:
                axes.vlines(place + 0.36, mean["low"], mean["high"], color=INK, linewidth=1.2)
            axes.hlines(mean["mean"], place + 0.26, place + 0.46, color=INK, linewidth=2)
        counts = table.loc[target, "n"].reindex(designs).map("{:.0f}".format, na_action="ignore")
        counts = counts.fillna("none")
        axes.set_xticks(range(len(designs)), counts, size=SMALL)
        axes.set(title=f"{target:g} M Mult-Adds ± 5 %", xlim=(-0.6, len(designs) - 0.4))
        axes.set_xlabel(
            "n of each column; within it, from left\nto right, 95 to 105 % of the target"
        )
        axes.grid(False, axis="x")
    panels[0].set_ylabel("top-1 accuracy on test (%)")
    low, high = 100 * results["top1"].min(), 100 * results["top1"].max()
    panels[0].set_ylim(low - 0.2 * (high - low) - 0.1, high + 0.2 * (high - low) + 0.1)
    handles = [_point(design, *looks[design]) for design in designs]
    handles.append(Line2D([], [], color=INK, linewidth=2, label="mean with its 95 % interval"))
    legend_below(figure, handles)
    return figure


def _point(name: str, colour: Colour, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=name)


def accuracy_by_epoch(results: pd.DataFrame) -> Figure:
    """Above, accuracy on test over the epochs: a thin line for each network, a thick one for the mean of its design.

    Below, by how many points each design's mean is above that of the random networks. Columns of `results` are
    target, design and `top1_<epoch>`; a panel for each target.
    """
    columns = {int(name[5:]): name for name in results if re.fullmatch(r"top1_\d+", name)}
    epochs = [epoch for epoch in sorted(columns) if results[columns[epoch]].notna().all()]
    designs = [*dict.fromkeys(results["design"])]
    looks = _looks(designs)
    targets = sorted(results["target"].unique())
    figure, panels = canvas(WIDTH, 5.2, len(targets), 2, sharex=True, sharey="row")
    above, below = panels[: len(targets)], panels[len(targets) :]
    for upper, lower, target in zip(above, below, targets, strict=True):
        means: dict[str, np.ndarray] = {}
        here = results[results["target"] == target]
        for design in designs:
            rows = here[here["design"] == design]
            if rows.empty:
                continue
            curves = 100 * rows[[columns[epoch] for epoch in epochs]].to_numpy(float)
            upper.plot(epochs, curves.T, color=looks[design][0], linewidth=0.6, alpha=0.45)
            means[design] = curves.mean(axis=0)
        for design, mean in means.items():
            colour, marker = looks[design]
            style: Look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6}
            upper.plot(epochs, mean, **style)
            lower.plot(epochs, mean - means.get("random", mean), **style)
        upper.set_title(f"{target:g} M Mult-Adds")
        lower.set_xlabel("epoch")
        whole_numbers(lower.xaxis)
    above[0].set_ylabel("top-1 accuracy on test (%)")
    below[0].set_ylabel("points above the mean\nof random")
    handles = []
    for design, (colour, marker) in looks.items():
        counts = results.loc[results["design"] == design].groupby("target").size()
        n = " to ".join(f"{count}" for count in sorted({counts.min(), counts.max()}))
        label = f"{design} (n = {n})"
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, label=label))
    handles.append(Line2D([], [], color=GREY, linewidth=0.6, label="one network (thick: means)"))
    legend_below(figure, handles)
    return figure


def rankings(networks: pd.DataFrame, notes: Mapping[str, str], chance: float) -> Figure:
    """Accuracy after training against a score of each network, a panel for each score of `notes`, which stand above it.

    Columns are kind, target, accuracy (a share) and the scores, which are accuracies, too; dotted, what chance gives.
    """
    targets = sorted(networks["target"].unique())
    looks = _looks([f"{target:g} M Mult-Adds" for target in targets])
    figure, panels = canvas(1.6 + 3.2 * len(notes), 4.2, len(notes), sharey=True)
    for axes, (score, note) in zip(panels, notes.items(), strict=True):
        for (kind, target), rows in networks.groupby(["kind", "target"]):
            colour, marker = looks[f"{target:g} M Mult-Adds"]
            face = colour if kind == "random" else "none"
            style: Look = {"edgecolor": colour, "facecolor": face, "marker": marker, "s": 24}
            axes.scatter(100 * rows[score], 100 * rows["accuracy"], **style)
        axes.axvline(100 * chance, color=GREY, linestyle=":", zorder=1)
        axes.set_xlabel(f"{score},\ntop-1 on val (%)")
        axes.set_title(note, size=SMALL, weight="normal", loc="left", color=INK)
    panels[0].set_ylabel("trained alone, top-1 on test (%)")
    handles = [_point(name, *look) for name, look in looks.items()]
    label = f"chance, {100 * chance:g} %"
    handles.append(Line2D([], [], color=GREY, linestyle=":", label=label))
    hollow: Look = {"color": INK, "marker": "o", "markerfacecolor": "none", "linestyle": "none"}
    handles.append(Line2D([], [], label="hollow: as deep as searched", **hollow))
    legend_below(figure, handles)
    return figure
