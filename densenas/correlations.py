"""How well a score orders networks: rank correlations with their accuracy, how sure they are, what noise allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

RESAMPLES = 1000  # of a bootstrap
CEILING = "noise ceiling"

Correlation = Callable[[np.ndarray, np.ndarray, np.ndarray], float]  # of score, accuracy and target


def spearman(score: np.ndarray, accuracy: np.ndarray) -> float:
    """The correlation of ranks; nan of fewer than 3 networks, and where score or accuracy does not vary."""
    return spearman_at_equal_cost(score, accuracy, np.zeros(len(score)))


def kendall(score: np.ndarray, accuracy: np.ndarray) -> float:
    """tau-b: the pairs that score and accuracy order alike less those that they order differently, as a share."""
    return kendall_at_equal_cost(score, accuracy, np.zeros(len(score)))


def spearman_at_equal_cost(score: np.ndarray, accuracy: np.ndarray, target: np.ndarray) -> float:
    """The correlation of ranks among networks of the same target, each rank less the mean of its target's."""
    # How many of its target a network is above, less how many it is below: twice such a rank.
    return _cosine(_orders(score, target).sum(axis=1), _orders(accuracy, target).sum(axis=1))


def kendall_at_equal_cost(score: np.ndarray, accuracy: np.ndarray, target: np.ndarray) -> float:
    """tau-b over the pairs of networks of the same target."""
    return _cosine(_orders(score, target), _orders(accuracy, target))


def _orders(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For each pair -1, 0 or 1; 0 where they are of different targets."""
    same = target[:, None] == target[None, :]
    return np.sign(values[:, None] - values[None, :]) * same


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    length = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / length if len(left) > 2 and length else float("nan")


MEASURES: dict[str, Correlation] = {
    "spearman": lambda score, accuracy, _: spearman(score, accuracy),
    "kendall": lambda score, accuracy, _: kendall(score, accuracy),
    "spearman_at_equal_cost": spearman_at_equal_cost,
    "kendall_at_equal_cost": kendall_at_equal_cost,
}


def resampled(target: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """The numbers of networks drawn anew, as many of each target as there are."""
    groups = [np.flatnonzero(target == one) for one in np.unique(target)]
    return np.concatenate([dice.choice(group, len(group)) for group in groups])


def percentiles(values: list[float]) -> tuple[float, float]:
    """The middle 95 % of what a bootstrap gave."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def interval(networks: pd.DataFrame, correlation: Correlation) -> tuple[float, float]:
    """The 95 % interval of a correlation, by drawing the networks of each target anew (percentile bootstrap)."""
    score, accuracy, target = networks[["score", "accuracy", "target"]].to_numpy(float).T
    dice = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        rows = resampled(target, dice)
        values.append(correlation(score[rows], accuracy[rows], target[rows]))
    return percentiles(values)


def rankings(networks: pd.DataFrame) -> pd.DataFrame:
    """A row for each score: Spearman's and Kendall's correlation, over all networks and at equal cost (`MEASURES`).

    Each has its 95 % interval (`_low`, `_high`), and is over the n networks that have the score.
    `networks` has a row for each network, with `target`, `accuracy` and the scores, which are all other columns.
    """
    rows = []
    for name in networks.columns.drop(["target", "accuracy"]):
        scored = networks[["target", "accuracy"]].assign(score=networks[name]).dropna()
        score, accuracy, target = scored[["score", "accuracy", "target"]].to_numpy(float).T
        row: dict[str, object] = {"score": name, "n": len(scored)}
        for measure, correlation in MEASURES.items():
            row[measure] = correlation(score, accuracy, target)
            row[f"{measure}_low"], row[f"{measure}_high"] = interval(scored, correlation)
        rows.append(row)
    return pd.DataFrame(rows).set_index("score")


def seed_noise(trainings: pd.DataFrame) -> tuple[float, int]:
    """The variance of `top1` between trainings of the same network with other seeds, and its degrees of freedom.

    nan and 0 where no network was trained twice.
    """
    groups = trainings.groupby("net_config")["top1"]
    freedom = int((groups.size() - 1).sum())
    squares = float(((trainings["top1"] - groups.transform("mean")) ** 2).sum())
    return (squares / freedom if freedom else float("nan")), freedom


def seed_correlation(trainings: pd.DataFrame) -> float:
    """How two trainings of the same networks correlate: ICC(1) of those that were trained with several seeds.

    nan of fewer than two such networks.
    """
    repeated = trainings[trainings.duplicated("net_config", keep=False)]
    sizes = repeated.groupby("net_config").size()
    if len(sizes) < 2:
        return float("nan")
    means = repeated.groupby("net_config")["top1"].mean()
    within, _ = seed_noise(repeated)
    squares = (sizes * (means - repeated["top1"].mean()) ** 2).sum()
    between = squares / (len(sizes) - 1)
    seeds = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(sizes) - 1)  # a mean, of sorts
    varying = between + (seeds - 1) * within
    return float(max(0.0, (between - within) / varying)) if varying else float("nan")


def reliability(accuracy: np.ndarray, target: np.ndarray, noise: float) -> float:
    """The share of the variance of accuracies among networks of the same target that is not the seeds'.

    `noise` is the variance of a training. Another training of these networks would correlate by as much.
    """
    squares, freedom = 0.0, 0
    for one in np.unique(target):
        group = accuracy[target == one]
        squares += float(((group - group.mean()) ** 2).sum())
        freedom += len(group) - 1
    return max(0.0, 1 - noise * freedom / squares) if squares else float("nan")


def noise_ceiling(networks: pd.DataFrame, trainings: pd.DataFrame) -> pd.DataFrame:
    """As a row of `rankings`, by how much even a perfect score correlates with the accuracy of one training.

    That is the root of the reliability: a training is the network's worth and the noise of its seed. `networks` are
    those that are ranked, `trainings` tell the noise (`seed_noise`); the bootstrap draws both anew.
    """
    accuracy, target = networks[["accuracy", "target"]].to_numpy(float).T
    repeated = trainings[trainings.duplicated("net_config", keep=False)]
    groups = [rows["top1"].to_numpy() for _, rows in repeated.groupby("net_config")]
    row: dict[str, object] = {"score": CEILING, "n": len(networks)}
    if groups:
        squares = np.array([((group - group.mean()) ** 2).sum() for group in groups])
        freedom = np.array([len(group) - 1 for group in groups])
        dice = np.random.default_rng(0)
        for measure in ("spearman", "spearman_at_equal_cost"):
            kinds = np.zeros(len(target)) if measure == "spearman" else target
            noise = squares.sum() / freedom.sum()
            row[measure] = reliability(accuracy, kinds, noise) ** 0.5
            values = []
            for _ in range(RESAMPLES):
                some, rows = dice.integers(0, len(groups), len(groups)), resampled(target, dice)
                noise = squares[some].sum() / freedom[some].sum()
                values.append(reliability(accuracy[rows], kinds[rows], noise) ** 0.5)
            row[f"{measure}_low"], row[f"{measure}_high"] = percentiles(values)
    return pd.DataFrame([row]).set_index("score")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """What `rankings` gave as text: each correlation with its interval in brackets."""
    shown = table[["n"]].copy()
    for measure in MEASURES:
        if measure not in table:
            continue
        cells = []
        for value, low, high in zip(
            table[measure], table[f"{measure}_low"], table[f"{measure}_high"], strict=True
        ):
            known = f"{value:.2f} ({low:.2f} to {high:.2f})"
            cells.append("none" if pd.isna(value) else known)
        shown[measure.replace("_", " ").capitalize()] = cells
    return shown
