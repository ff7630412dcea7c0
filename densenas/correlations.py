"""How well a score orders networks: rank correlations with their accuracy, and how sure these are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

RESAMPLES = 1000  # of a bootstrap


def spearman(networks: pd.DataFrame) -> float:
    """The correlation of the ranks of `score` and `accuracy`; nan where one of both does not vary."""
    return networks["score"].rank().corr(networks["accuracy"].rank())


def spearman_at_equal_cost(networks: pd.DataFrame) -> float:
    """The correlation of ranks among networks of the same `target`, each rank less the mean of its target's."""
    targets = networks["target"]
    ranks = networks.groupby(targets)[["score", "accuracy"]].rank()
    deviations = ranks - ranks.groupby(targets).transform("mean")
    return float(deviations.corr().iloc[0, 1])


def kendall(networks: pd.DataFrame) -> float:
    """tau-b: the pairs that score and accuracy order alike less those that they order differently, as a share."""
    by_score = _order(networks["score"].to_numpy())
    by_accuracy = _order(networks["accuracy"].to_numpy())
    untied = np.abs(by_score).sum() * np.abs(by_accuracy).sum()
    return float((by_score * by_accuracy).sum() / np.sqrt(untied)) if untied else float("nan")


def _order(values: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 for each pair."""
    pairs = np.triu_indices(len(values), 1)
    return np.sign(values[:, None] - values[None, :])[pairs]


def interval(
    networks: pd.DataFrame, correlation: Callable[[pd.DataFrame], float], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a correlation, by drawing the networks of each target anew (percentile bootstrap)."""
    dice = np.random.default_rng(seed)
    groups = list(networks.groupby("target").indices.values())
    values = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([dice.choice(group, len(group)) for group in groups])
        values.append(correlation(networks.iloc[rows].reset_index(drop=True)))
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def rankings(networks: pd.DataFrame, scores: list[str]) -> pd.DataFrame:
    """A row for each score: Spearman's and Kendall's correlation over all networks and Spearman's at equal cost, each
    with its 95 % interval (`_low`, `_high`); nan of fewer than three networks, which are always in some order.

    `networks` has a row for each network, with `target`, `accuracy` and the columns `scores`.
    """
    rows = []
    for name in scores:
        scored = networks[["target", "accuracy"]].assign(score=networks[name])
        row: dict[str, object] = {"score": name, "n": len(scored)}
        for correlation in (spearman, kendall, spearman_at_equal_cost):
            measure = correlation.__name__
            found = [float("nan")] * 3
            if len(scored) > 2:
                found = [correlation(scored), *interval(scored, correlation)]
            row[measure], row[f"{measure}_low"], row[f"{measure}_high"] = found
        rows.append(row)
    return pd.DataFrame(rows).set_index("score")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """What `rankings` gave as text: each correlation with its interval in brackets."""
    shown = table[["n"]].copy()
    for measure in ("spearman", "kendall", "spearman_at_equal_cost"):
        columns = table[[measure, f"{measure}_low", f"{measure}_high"]]
        cells = []
        for value, low, high in columns.itertuples(index=False):
            known = f"{value:.2f} ({low:.2f} to {high:.2f})"
            cells.append("none" if pd.isna(value) else known)
        shown[measure.replace("_", " ").capitalize()] = cells
    return shown


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials (Wilson 1927)."""
    z = 1.96
    scale = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
