"""How well a score orders networks: rank correlations with their accuracy, how sure they are, what noise allows."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

RESAMPLES = 1000  # of a bootstrap
FEWEST = 10  # networks whose bootstrap tells an interval: of fewer it is too narrow
CEILING = "noise ceiling"
MEASURES = ("spearman", "kendall", "spearman_at_equal_cost", "kendall_at_equal_cost")


def correlations(score: np.ndarray, accuracy: np.ndarray, target: np.ndarray) -> list[float]:
    """`MEASURES` of how a score orders networks (n,); nan of fewer than 3, and where one of both does not vary.

    Spearman's is the correlation of ranks; at equal cost of ranks among networks of the same target, each less the mean
    of its target's. Kendall's tau-b is the share of pairs that both order alike less that of those ordered differently;
    at equal cost, of pairs of the same target.
    """
    # For each pair -1, 0 or 1; a row's sum is twice a rank, less the mean one.
    by_score = np.sign(score[:, None] - score[None, :])
    by_accuracy = np.sign(accuracy[:, None] - accuracy[None, :])
    same = target[:, None] == target[None, :]
    found = []
    for left, right in ((by_score, by_accuracy), (by_score * same, by_accuracy * same)):
        found.append(_cosine(left.sum(axis=1), right.sum(axis=1)))
        found.append(_cosine(left, right))
    return found


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    length = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / length if len(left) > 2 and length else float("nan")


def resampled(target: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """The numbers of networks drawn anew, as many of each target as there are."""
    groups = [np.flatnonzero(target == one) for one in np.unique(target)]
    return np.concatenate([dice.choice(group, len(group)) for group in groups])


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of what a bootstrap gave; nan where it gave nothing."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def rankings(networks: pd.DataFrame) -> pd.DataFrame:
    """A row for each score: `correlations` with accuracy, over the n networks that have the score.

    Each has its 95 % interval (`_low`, `_high`), by drawing the networks of each target anew (percentile bootstrap);
    nan of fewer than `FEWEST`.
    `networks` has a row for each network, with `target`, `accuracy` and the scores, which are all other columns.
    """
    rows = []
    for name in networks.columns.drop(["target", "accuracy"]):
        columns = networks[[name, "accuracy", "target"]].dropna().to_numpy(float)
        row: dict[str, object] = {"score": name, "n": len(columns)}
        row |= zip(MEASURES, correlations(*columns.T), strict=True)
        dice = np.random.default_rng(0)
        values = np.full((RESAMPLES, len(MEASURES)), np.nan)
        if len(columns) >= FEWEST:
            for drawn in values:
                drawn[:] = correlations(*columns[resampled(columns[:, 2], dice)].T)
        for measure, drawn in zip(MEASURES, values.T, strict=True):
            row[f"{measure}_low"], row[f"{measure}_high"] = percentiles(drawn)
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
            row[f"{measure}_low"], row[f"{measure}_high"] = percentiles(np.array(values))
    return pd.DataFrame([row]).set_index("score")


def in_words(row: pd.Series, measure: str) -> str:
    """A correlation of `rankings`, in brackets its interval where there is one."""
    value, low, high = row[measure], row[f"{measure}_low"], row[f"{measure}_high"]
    interval = "" if pd.isna(low) else f" ({low:.2f} to {high:.2f})"
    return "none" if pd.isna(value) else f"{value:.2f}{interval}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """What `rankings` gave as text: each correlation with its interval."""
    shown = table[["n"]].copy()
    for measure in MEASURES:
        if measure in table:
            name = measure.replace("_", " ").capitalize()
            shown[name] = [in_words(row, measure) for _, row in table.iterrows()]
    return shown


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials (Wilson 1927)."""
    z = 1.96
    scale = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
