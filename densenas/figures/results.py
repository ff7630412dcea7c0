"""Histories, accuracies, images: what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox
from torch import Tensor

from .style import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    ORANGE,
    RED,
    SMALL,
    WIDTH,
    canvas,
    heat_map,
    integers,
    legend_below,
    tint,
)

MANY = 20  # classes, beyond which they are neither all named nor numbered


def _short_names(names: Sequence[str], longest: int = 16) -> list[str]:
    """Names of at most so many characters, cut in the middle: many differ only at their end."""
    end = (longest - 1) // 2
    begin = longest - 1 - end
    return [name if len(name) <= longest else f"{name[:begin]}…{name[-end:]}" for name in names]


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, handlelength=1.5
    )


def _curves(
    axes: Axes, history: pd.DataFrame, columns: Mapping[str, str], label: str, scale: float = 1
) -> None:
    """The columns (name: legend) of a history over its epochs, with few epochs also their points."""
    lines = scale * history.set_index("epoch").reindex(columns=[*columns]).rename(columns=columns)
    style = {
        "style": ["-", "--"],
        "color": [BLUE, ORANGE],
        "marker": "o" if len(lines) < 25 else None,
        "markersize": 3,
    }
    lines.plot(ax=axes, xlabel="epoch", ylabel=label, legend=False, **style)
    integers(axes.xaxis)
    if len(columns) > 1:
        _legend_above(axes)


def search_history(history: pd.DataFrame, unit: str) -> Figure:
    """Accuracy, loss and cost over the epochs of a search; columns epoch, train_loss, val_loss, train_top1, val_top1
    (shares of 1), expected_cost and derived_cost (in `unit`), perhaps target_cost. Where val_* begin, alpha and beta
    are trained too.
    """
    figure, panels = canvas(WIDTH, 3.1, (range(3),))
    _curves(
        panels[0], history, {"train_top1": "train", "val_top1": "val"}, "top-1 accuracy (%)", 100
    )
    _curves(panels[1], history, {"train_loss": "train", "val_loss": "val"}, "cross-entropy (nats)")
    _curves(
        panels[2],
        history,
        {"expected_cost": "expected", "derived_cost": "derived"},
        f"cost ({unit})",
    )
    if "target_cost" in history:
        panels[2].axhline(
            history["target_cost"].iloc[-1], color=RED, linewidth=1, zorder=1, label="target"
        )
        _legend_above(panels[2])
    updated = (
        history.loc[history["val_loss"].notna(), "epoch"] if "val_loss" in history else history[:0]
    )
    if len(updated):
        label = f"from epoch {updated.iloc[0]} on alpha and beta are trained too"
        lines = [
            axes.axvline(updated.iloc[0], color=GREY, linestyle=":", zorder=1, label=label)
            for axes in panels
        ]
        legend_below(figure, lines[:1])
    return figure


def search_health(history: pd.DataFrame) -> Figure:
    """How decided a search is and for what, over its epochs; columns as `Probabilities.health` gives them."""
    figure, panels = canvas(WIDTH, 2.9, (range(3),))
    _curves(
        panels[0],
        history,
        {"alpha_entropy": "alpha", "beta_entropy": "beta"},
        "entropy (1: undecided)",
    )
    _curves(
        panels[1],
        history,
        {"cheapest_share": "cheapest op", "skip_share": "skip"},
        "expected share on a path (%)",
        100,
    )
    _curves(panels[2], history, {"expected_layers": ""}, "expected depth (layers)")
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    return figure


def predicted_latency(frame: pd.DataFrame) -> Figure:
    """Measured latency of whole networks against the sum of their ops; columns predicted, corrected, measured (ms)."""
    figure, (axes,) = canvas(4.6, 4.2)
    axes.plot(
        frame["predicted"],
        frame["measured"],
        "o",
        color=BLUE,
        markersize=8,
        fillstyle="none",
        label="sum of the ops",
    )
    axes.plot(
        frame["corrected"],
        frame["measured"],
        "s",
        color=ORANGE,
        markersize=4,
        label="times one factor",
    )
    both = 0, 1.05 * frame.to_numpy().max()
    axes.plot(both, both, color=GREY, linewidth=0.9, zorder=1)
    axes.set(xlabel="predicted (ms)", ylabel="measured (ms)", xlim=both, ylim=both, aspect="equal")
    _legend_above(axes)
    return figure


def training_history(history: pd.DataFrame) -> Figure:
    """Accuracy, loss and learning rate of a retraining; columns epoch, train_top1 (share of 1), train_loss, lr."""
    figure, panels = canvas(WIDTH, 2.7, (range(3),))
    _curves(panels[0], history, {"train_top1": "train"}, "top-1 accuracy on train (%)", 100)
    _curves(panels[1], history, {"train_loss": "train"}, "cross-entropy on train (nats)")
    _curves(panels[2], history, {"lr": "learning rate"}, "learning rate")
    return figure


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other beats in `cost` and `top1`, cheapest first."""
    ordered = points.sort_values(["cost", "top1"], ascending=[True, False], kind="stable")
    return ordered[ordered["top1"] > ordered["top1"].cummax().shift(fill_value=-math.inf)]


def _scatter(axes: Axes, points: pd.DataFrame, groups: Sequence[str], x_label: str) -> None:
    """The points by group, with the Pareto front as steps."""
    front = pareto(points)[["cost", "top1"]].to_numpy().repeat(2, axis=0)
    axes.plot(
        front[1:, 0], front[:-1, 1], color=GREY, linewidth=0.9, zorder=1, label="Pareto front"
    )
    colours = cycle(COLOURS)
    for group, marker in zip(
        sorted(groups, key="DenseNAS".__ne__), "osD^vP*X" * len(groups), strict=False
    ):
        members = points[points["group"] == group].sort_values("cost", kind="stable")
        style = (
            {"color": RED, "linestyle": "-"}
            if group == "DenseNAS"
            else {"color": next(colours), "linestyle": "none"}
        )
        style |= {
            "marker": marker,
            "markersize": 6,
            "zorder": 3,
            "label": group,
            "elinewidth": 1.2,
            "capsize": 3,
        }
        axes.errorbar(members["cost"], members["top1"], members.get("std"), **style)
    axes.margins(x=0.18, y=0.12)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.set(xlabel=x_label, ylabel="top-1 accuracy (%)")


def _label(axes: Axes, points: pd.DataFrame) -> None:
    """Writes each name near its point: of a fixed list of places the nearest that covers no point, line or name."""
    axes.figure.draw_without_rendering()  # settles the layout, on which distances depend
    lines = [
        line.get_xydata()
        for line in axes.lines
        if line.get_linestyle() != "None" and len(line.get_xydata()) > 1
    ]
    along = [Path(line).interpolated(30).vertices for line in lines]
    places = points[["cost", "top1"]].to_numpy()
    dots, point = (
        axes.transData.transform(np.concatenate([*along, *[places] * 10])),
        axes.figure.dpi / 72,
    )
    ruler, names = axes.text(0, 0, "", size=SMALL), []
    arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    for name, xy, centre in zip(
        points["name"], places, axes.transData.transform(places), strict=True
    ):
        ruler.set_text(name)
        size, options = np.array(ruler.get_window_extent().size), []
        for distance, angle in product((5, 9, 14, 20, 28, 38), np.arange(16) * np.pi / 8):
            offset = np.array([math.cos(angle), math.sin(angle)]) * (size / 2 + distance * point)
            box = Bbox.from_bounds(*(centre + offset - size / 2), *size).padded(2 * point)
            covered = 20 * box.count_contains(dots) + 200 * box.count_overlaps(names)
            outside = 4 - axes.bbox.count_contains(box.corners())
            options.append((5 * distance + covered + 1000 * outside, distance, offset / point, box))
        _, distance, offset, box = min(options, key=lambda option: option[0])
        names += [box] * bool(name)
        style = {"size": SMALL, "ha": "center", "va": "center", "color": INK, "zorder": 4}
        style["arrowprops"] = arrow if distance > 9 else None
        axes.annotate(name, xy, offset, textcoords="offset points", **style).set_in_layout(False)
    ruler.remove()


def accuracy_against_cost(points: pd.DataFrame, x_label: str) -> Figure:
    """Top-1 accuracy in percent against cost, a named point per row: columns name, group, cost, top1 and perhaps std
    (of top1, as a bar). A line joins the group DenseNAS, steps mark the Pareto front; `x_label` names cost and unit.
    """
    figure, (axes,) = canvas(7, 4.6)
    _scatter(axes, points, points["group"].unique(), x_label)
    _legend_above(axes)
    _label(axes, points)
    return figure


def evidence(results: pd.DataFrame) -> Figure:
    """Test accuracy of networks trained alike, against their Mult-Adds; columns design, target, mult_adds_m (millions)
    and top1 (share of 1). Faint points are networks, strong ones a design's mean at a target with standard deviation.
    """
    figure, (axes,) = canvas(7, 4.4)
    look = zip(
        ["DenseNAS", *sorted({*results["design"]} - {"DenseNAS"})],
        [RED, *COLOURS],
        "oDs^v",
        strict=False,
    )
    for design, colour, marker in look:
        rows = results[results["design"] == design].assign(top1=100 * results["top1"])
        axes.plot(
            rows["mult_adds_m"],
            rows["top1"],
            marker,
            color=colour,
            alpha=0.3,
            markersize=4,
            markeredgewidth=0,
        )
        groups = rows.groupby("target")
        means, deviation = groups[["mult_adds_m", "top1"]].mean(), groups["top1"].std()
        label = f"{design} (n = {groups.size().min()} a target)"
        style = {
            "color": colour,
            "marker": marker,
            "markersize": 6,
            "capsize": 3,
            "linewidth": 1.2,
            "label": label,
        }
        axes.errorbar(
            means["mult_adds_m"],
            means["top1"],
            deviation,
            zorder=4 if design == "DenseNAS" else 3,
            **style,
        )
    axes.set(xlabel="Mult-Adds (millions)", ylabel="top-1 accuracy on test (%)")
    legend_below(figure, [*axes.get_legend_handles_labels()[0]])
    return figure


def one_shot_ranking(ranking: pd.DataFrame) -> Figure:
    """Accuracy of networks trained alone against that of their paths in a trained supernet; columns target (million
    Mult-Adds), one_shot and retrained (shares of 1).
    """
    figure, (axes,) = canvas(4.8, 4)
    for (target, rows), colour, marker in zip(
        ranking.groupby("target"), COLOURS, "osD^vP*", strict=False
    ):
        label = f"{target:g} M Mult-Adds"
        axes.plot(
            100 * rows["one_shot"],
            100 * rows["retrained"],
            marker,
            color=colour,
            markersize=5,
            label=label,
        )
    axes.set(
        xlabel="path in the supernet, top-1 on val (%)", ylabel="trained alone, top-1 on test (%)"
    )
    legend_below(figure, axes.get_legend_handles_labels()[0])
    return figure


def published_accuracy(
    paper: Mapping[str, Any], against: Literal["mult_adds", "latency"]
) -> Figure:
    """ImageNet top-1 accuracy of published networks against their Mult-Adds or latency, in both of the paper's spaces.

    `paper` is what data/paper.json holds. Networks without the wanted number are left out, the unnamed points of the
    paper's curves are drawn without a label.
    """
    published, families = paper["published"], {"DenseNAS": "DenseNAS", "Random": "random search"}
    families |= dict.fromkeys(("MobileNet", "ResNet"), "designed by hand") | {"": "other search"}
    extra = {
        "mobilenetv2": ("model", "FLOPs", "latency_ms", "top1"),
        "resnet": ("model", "FLOPs", "top1"),
    }
    x_label = {"mult_adds": "Mult-Adds (millions)", "latency": "latency (ms, TITAN XP, batch 32)"}[
        against
    ]
    figure, panels = canvas(WIDTH, 4.6, (range(2),), width_ratios=(1.4, 1))
    drawn = []
    for axes, space, title in zip(
        panels, extra, ("MobileNetV2 space", "ResNet space"), strict=True
    ):
        named, curve = published[f"{space}_space"], published[f"{space}_curve_extra"]
        rows = [dict(zip(published[f"{space}_space_columns"], row, strict=True)) for row in named]
        points = pd.DataFrame(rows + [dict(zip(extra[space], row, strict=True)) for row in curve])
        points["name"] = points["model"].where(points.index < len(named), "")
        points["group"] = [
            next(group for key, group in families.items() if key in name)
            for name in points["model"]
        ]
        flops = points["FLOPs"].str[:-1].astype(float) * points["FLOPs"].str[-1].map(
            {"M": 1, "B": 1000}
        )
        points["cost"] = flops if against == "mult_adds" else points["latency_ms"]
        points = points.dropna(subset="cost")
        axes.set_title(title)
        _scatter(axes, points, [*dict.fromkeys(families.values())], x_label)
        drawn.append((axes, points))
    legend_below(figure, panels[0].get_legend_handles_labels()[0])
    for axes, points in drawn:
        _label(axes, points)
    return figure


def confusion(matrix: list[list[int]], classes: list[str]) -> Figure:
    """Counts of test images, truth (rows) by prediction (columns), on a logarithmic scale with zeros white; beside it
    the accuracy of each class in percent, and their mean as a dotted line. Up to 20 classes are all named and numbered.
    """
    counts, many = np.array(matrix), len(classes) > MANY
    side = min(6.2, 2.6 + 0.4 * len(classes))
    figure, (left, right) = canvas(side + 1.8, side, ((0, 1),), width_ratios=(4.5, 1))
    mesh = heat_map(
        left, np.ma.masked_equal(counts, 0), LogNorm(1, max(2, counts.max())), "" if many else "d"
    )
    names, ticks = _short_names(classes), np.arange(0, len(classes), math.ceil(len(classes) / MANY))
    rotation = 90 if max(map(len, names)) * min(len(names), MANY) > 60 else 0
    left.set_xticks(ticks + 0.5, [names[k] for k in ticks], rotation=rotation)
    left.set_yticks(ticks + 0.5, [names[k] for k in ticks])
    left.set(xlabel="prediction" if many else "prediction (numbers: images)", ylabel="truth")
    with np.errstate(invalid="ignore"):
        accuracy = 100 * counts.diagonal() / counts.sum(axis=1)
    right.barh(
        np.arange(len(classes)) + 0.5,
        accuracy,
        height=1 if many else 0.7,
        color=tint(BLUE, 0.7),
        linewidth=0,
    )
    right.axvline(np.nanmean(accuracy), color=INK, linestyle=":")
    right.set(xlabel="accuracy (%)", xlim=(0, 100), ylim=(len(classes), 0), yticks=[])
    right.set_title(f"mean {np.nanmean(accuracy):.1f} %", weight="normal")
    if many:
        ticks = LogLocator(subs=(1, 2, 5))
        bar = figure.colorbar(mesh, ax=right, label="images", format="{x:g}", ticks=ticks)
        bar.minorticks_off()  # their labels would be formulas
        bar.outline.set_visible(False)
    return figure


def image_grid(images: Tensor, labels: list[str]) -> Figure:
    """Images (N, 3, S, S), uint8 or floats in [0, 1], in rows of up to ten with their labels above."""
    columns = min(10, len(labels))
    rows = math.ceil(len(labels) / columns)
    cells = np.arange(rows * columns).reshape(rows, columns).tolist()
    figure, grid = canvas(max(3, 0.88 * columns), 1.05 * rows, cells)
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label in zip(grid, images.numpy(), _short_names(labels, 12), strict=False):
        axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
        axes.set_title(label, size=SMALL, weight="normal", pad=2)
    return figure


def class_counts(counts: Mapping[str, list[int]], classes: list[str]) -> Figure:
    """Images per class and split: bars, or for more than 20 classes their sorted numbers, largest class first."""
    figure, (axes,) = canvas(WIDTH if len(classes) > 6 else 6, 3.2)
    if len(classes) > MANY:
        for split, numbers in counts.items():
            axes.step(
                range(1, len(classes) + 1), sorted(numbers, reverse=True), where="mid", label=split
            )
        axes.set(xlabel="classes, largest first (each split by itself)", ylim=(0, None))
    else:
        names = _short_names(classes)
        rotation = 90 if max(map(len, names)) * len(names) > 100 else 0
        pd.DataFrame(counts, index=names).plot.bar(
            ax=axes, width=0.8, color=COLOURS, linewidth=0, rot=rotation
        )
        axes.grid(False, axis="x")
        axes.set(xlabel="class")
    axes.set_ylabel("images")
    _legend_above(axes)
    return figure


def image_sizes(sizes: list[tuple[int, int]]) -> Figure:
    """Width and height in pixels of each image (width, height), a point each: the darker, the more images; beside it
    how many have which shorter side.
    """
    widths, heights = np.array(sizes).T
    figure, (left, right) = canvas(WIDTH, 3.4, ((0, 1),))
    left.scatter(widths, heights, s=14, color=BLUE, alpha=0.35, linewidth=0)
    limit = 1.1 * max(widths.max(), heights.max())
    left.axline((0, 0), (1, 1), color=GREY, linestyle=":")
    left.set(
        xlabel="width (pixels)",
        ylabel="height (pixels)",
        xlim=(0, limit),
        ylim=(0, limit),
        aspect="equal",
    )
    right.hist(np.minimum(widths, heights), bins=40, range=(0, limit), color=BLUE, linewidth=0)
    right.set(xlabel="shorter side (pixels)", ylabel="images", xlim=(0, limit))
    return figure
