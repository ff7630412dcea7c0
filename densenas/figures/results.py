"""Histories and accuracies: what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from .style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    SMALL,
    WIDTH,
    Look,
    canvas,
    legend_above,
    legend_below,
    whole_numbers,
)

MARKERS = "osD^vP*X"


def curves(history: pd.DataFrame, panels: Mapping[str, Mapping[str, str]]) -> Figure:
    """Columns of a history over its epochs: for each panel, its y label, the columns and their names in the legend.

    A label that ends in (%) has shares of 1 in percent. A column called target_cost is a red line, and one that the
    history lacks is left out.
    """
    figure, all_axes = canvas(WIDTH, 3, len(panels))
    marker = "o" if len(history) < 25 else None  # few epochs are also points
    for axes, (label, columns) in zip(all_axes, panels.items(), strict=True):
        scale = 100 if label.endswith("(%)") else 1
        looks = cycle([(BLUE, "-"), (ORANGE, "--"), (GREEN, "-.")])
        for column, name in columns.items():
            if column not in history:
                continue
            colour, line = (RED, "-") if column == "target_cost" else next(looks)
            look: Look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 3}
            axes.plot(history["epoch"], scale * history[column], label=name, **look)
        axes.set(xlabel="epoch", ylabel=label)
        whole_numbers(axes.xaxis)
        if len(columns) > 1:
            legend_above(axes)
    return figure


def search_history(history: pd.DataFrame, unit: str) -> Figure:
    """A search so far: accuracy, loss, and costs in `unit`. A dotted line is where alpha and beta are trained too."""
    panels = {
        "top-1 accuracy (%)": {
            "train_top1": "train",
            "val_top1": "val",
            "path_top1": "derived alone",
        },
        "cross-entropy (nats)": {"train_loss": "train", "val_loss": "val"},
        f"cost ({unit})": {
            "expected_cost": "expected",
            "derived_cost": "derived",
            "target_cost": "target",
        },
    }
    figure = curves(history, panels)
    if "val_loss" in history:
        first = history.loc[history["val_loss"].first_valid_index(), "epoch"]
        label = f"from epoch {first} on alpha and beta are trained too"
        for axes in figure.axes:
            line = axes.axvline(first, color=GREY, linestyle=":", zorder=1, label=label)
        legend_below(figure, [line])
    return figure


def training_history(history: pd.DataFrame) -> Figure:
    """The training of one network so far; the learning rate is that at an epoch's end."""
    panels = {
        "top-1 accuracy on train (%)": {"train_top1": ""},
        "cross-entropy on train (nats)": {"train_loss": ""},
        "learning rate": {"lr": ""},
    }
    return curves(history, panels)


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other beats in `cost` and `top1`, cheapest first."""
    ordered = points.sort_values(["cost", "top1"], ascending=[True, False], kind="stable")
    return ordered[ordered["top1"] > ordered["top1"].cummax().shift(fill_value=-math.inf)]


def accuracy_against_cost(points: pd.DataFrame, x_label: str) -> Figure:
    """Top-1 accuracy in percent against cost, a named point per row; `x_label` names cost and unit.

    Columns are name, group, cost and top1, perhaps low and high (an interval of top1, as a bar) and panel (the title
    of the axes that show the row). A line joins the group DenseNAS, steps mark the Pareto front; a name stands above
    and to the left of a point on the front, where no other point can be, else below and to the right.
    """
    groups = sorted(points["group"].unique(), key=lambda group: group != "DenseNAS")
    others = cycle(COLOURS)
    looks: dict[str, Look] = {}
    for k, group in enumerate(groups):
        colour, line = (RED, "-") if group == "DenseNAS" else (next(others), "none")
        looks[group] = {"color": colour, "linestyle": line, "marker": MARKERS[k % len(MARKERS)]}
    points = points.dropna(subset="cost")
    titles = [*points["panel"].unique()] if "panel" in points else [""]
    figure, panels = canvas(WIDTH if len(titles) > 1 else 7, 4.6, len(titles))
    legend: dict[str, Artist] = {}
    for axes, title in zip(panels, titles, strict=True):
        members = points[points["panel"] == title] if title else points
        front = pareto(members)
        # A single line through all of them is front enough.
        if len(front) > 1 and {*members["group"]} != {"DenseNAS"}:
            steps: Look = {"drawstyle": "steps-post", "color": GREY, "linewidth": 0.9, "zorder": 1}
            axes.plot(front["cost"], front["top1"], **steps, label="Pareto front")
        for group, rows in members.groupby("group"):
            rows = rows.sort_values("cost", kind="stable")
            interval = None
            if "low" in rows:
                interval = [rows["top1"] - rows["low"], rows["high"] - rows["top1"]]
            style: Look = {"capsize": 3, "elinewidth": 1, "markersize": 6, "zorder": 3}
            axes.errorbar(
                rows["cost"], rows["top1"], interval, label=group, **style, **looks[group]
            )
        for row in members.itertuples():
            side: Look = {"xytext": (4, -3), "ha": "left", "va": "top"}
            if row.Index in front.index:
                side = {"xytext": (-4, 3), "ha": "right", "va": "bottom"}
            where: Look = {"xy": (row.cost, row.top1), "textcoords": "offset points"}
            axes.annotate(row.name, **where, **side, size=SMALL, color=INK, zorder=4)
        axes.margins(x=0.4, y=0.12)
        axes.set(title=title, xlabel=x_label, ylabel="top-1 accuracy (%)")
        axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            legend[str(label)] = handle
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=5)
    return figure
