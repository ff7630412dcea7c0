"""What a study says: its results in tables, in prose, and what a reader should know beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from densenas.correlations import (
    CEILING,
    RESAMPLES,
    in_words,
    reliability,
    seed_correlation,
    seed_noise,
)
from densenas.truth import by_epoch

SEARCHED = "searched"
MATCHED = "matched"  # random ones with as many layers as the searched ones
RANDOM = "random"
HAND_MADE = "hand-made"
RANDOM_SEARCH = "random search"
RIVALS = {
    MATCHED: "random networks of their depths",
    RANDOM: "random networks of any depth",
    HAND_MADE: "the best hand-made design",
    RANDOM_SEARCH: "what random search reaches in as many seconds",
}
# Random networks that a supernet is asked to order: each kind apart, since of both together a score does well that only
# tells deep from shallow.
ANY_DEPTH = "of any depth"
SEARCHED_DEPTH = "as deep as searched"
POINTS = 1.0  # of accuracy, by which a search that is worth it is ahead


class Job(NamedTuple):
    """One network to train, the `number`-th of its method for a target; a searched one is of the search with that seed.

    Its name is that of its folder: DenseNAS_0.6_0 is of the way of searching called DenseNAS, matched-DenseNAS_0.6_0 a
    random network as deep as what that way found.
    """

    method: str
    target: float  # million Mult-Adds
    number: int
    way: str = ""  # of searching

    @classmethod
    def parse(cls, name: str) -> Job:
        group, target, number = name.rsplit("_", 2)
        if group in (RANDOM, HAND_MADE):
            return cls(group, float(target), int(number))
        way = group.removeprefix(f"{MATCHED}-")
        return cls(SEARCHED if way == group else MATCHED, float(target), int(number), way)

    def __str__(self) -> str:
        groups = {SEARCHED: self.way, MATCHED: f"{MATCHED}-{self.way}"}
        return f"{groups.get(self.method, self.method)}_{self.target:g}_{self.number}"


@dataclass(frozen=True)
class Result:
    """A trained network: a row of a study's results, whose columns these are, and `top1_<epoch>` (see `by_epoch`)."""

    method: str  # SEARCHED, MATCHED, RANDOM or HAND_MADE
    way: str  # of searching; empty where no search has to do with it
    target: float  # million Mult-Adds
    number: int  # of the network, among those of its method, way and target
    design: str  # what it is called in tables: the way, a kind of random, or the name of the hand-made design
    seed: int  # of the training
    epochs: int
    top1: float  # share of the test images
    images: int  # of test
    mult_adds_m: float  # millions
    params_m: float  # millions
    blocks: int
    layers: int
    search_seconds: float | None  # None without a search
    train_seconds: float
    net_config: str


class Lead(NamedTuple):
    """By how many points of accuracy one mean is above another, with its 95 % interval; nan where there is none."""

    points: float
    low: float
    high: float
    freedom: float  # degrees of it behind the interval

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.points:+.1f}"
        return f"{self.points:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


class Mean(NamedTuple):
    """Of an accuracy in percent, with the variance of this mean and the degrees of freedom behind that."""

    value: float
    variance: float
    freedom: float

    def above(self, other: Mean) -> Lead:
        """Welch's interval of a difference."""
        points = self.value - other.value
        variances = np.array([self.variance, other.variance])
        if not variances.sum() > 0:
            return Lead(points, np.nan, np.nan, np.nan)
        variance, freedom = pooled(variances, np.array([self.freedom, other.freedom]))
        half = student(freedom) * variance**0.5
        return Lead(points, points - half, points + half, freedom)


def pooled(variances: np.ndarray, freedom: np.ndarray) -> tuple[float, float]:
    """The variance of a sum and the degrees of freedom behind it (Satterthwaite, 1946)."""
    variance = variances.sum()
    return variance, variance**2 / (variances**2 / freedom).sum()


def student(freedom: float) -> float:
    """Within how many standard errors of 0 lies 95 % of Student's t, of so many degrees of freedom."""
    angle = np.linspace(0, np.pi / 2, 100_001)[:-1]  # t is its tangent, so that the tail is short
    mass = np.cumsum(
        (1 + np.tan(angle) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(angle) ** 2
    )
    return float(np.tan(np.interp(0.95, mass / mass[-1], angle)))


def mean_of(rows: pd.DataFrame, noise: tuple[float, int]) -> Mean:
    """The mean accuracy of networks (%); of one network alone what is known of the noise of a seed is its spread."""
    top1 = 100 * rows["top1"]
    if rows["net_config"].nunique() > 1:
        return Mean(top1.mean(), top1.var() / len(top1), len(top1) - 1)
    variance, freedom = noise
    return Mean(top1.mean(), 1e4 * variance / len(top1), freedom)


def distinct(results: pd.DataFrame) -> pd.DataFrame:
    """Each training of a design once: two searches that found the same network tell no more than one."""
    return results.drop_duplicates(["target", "design", "net_config", "seed"])


def compared(results: pd.DataFrame, trainings: pd.DataFrame) -> pd.DataFrame:
    """Per target and design: n trainings of so many `different` networks, mean Mult-Adds (millions) and layers, mean
    top-1 (%) with its 95 % interval, its deviation and best, mean seconds of a search and median ones of a training.
    """
    noise = seed_noise(trainings)
    seconds = results.groupby(["target", "design"])["search_seconds"].mean()
    percent = distinct(results).assign(top1=lambda rows: 100 * rows["top1"])
    groups = percent.groupby(["target", "design"])
    table = groups.agg(
        n=("top1", "size"),
        different=("net_config", "nunique"),
        mult_adds_m=("mult_adds_m", "mean"),
        layers=("layers", "mean"),
        mean=("top1", "mean"),
        std=("top1", "std"),
        best=("top1", "max"),
        train_seconds=("train_seconds", "median"),
    )
    for key, rows in distinct(results).groupby(["target", "design"]):
        found = mean_of(rows, noise).above(Mean(0.0, 0.0, 1.0))
        table.loc[key, ["low", "high"]] = found.low, found.high
    order = ["n", "different", "mult_adds_m", "layers", "mean", "low", "high", "std", "best"]
    order += ["search_seconds", "train_seconds"]
    return table.assign(search_seconds=seconds.astype(float))[order]


def not_compared(results: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Per target and group of the table n networks, trained as `results` with seed 0, that are not among these, like
    those of earlier searches; their mean layers and mean top-1 (%).
    """
    epochs = results["epochs"].max()
    rows = truth[(truth["epochs"] == epochs) & (truth["seed"] == 0)]
    rows = rows[~rows["net_config"].isin(results["net_config"])].drop_duplicates("net_config")
    top1 = rows.get(f"top1_{epochs}", pd.Series(dtype=float))  # of none there is no column
    groups = rows.assign(top1=100 * top1).groupby(["target", "group"])
    return groups.agg(n=("top1", "size"), layers=("layers", "mean"), mean=("top1", "mean"))


def random_search(networks: pd.DataFrame, seconds: float, noise: float) -> pd.DataFrame:
    """What random search reaches in so many seconds before its network is trained to the end, as a search does.

    `networks` are different random ones of one target. A row for each epoch after which it may choose: how many
    networks the seconds train until then, beside the one that goes on, and the expected final accuracy (%) of the best
    of so many drawn from `networks`. With the last epoch it has trained all to the end and chosen by the very accuracy
    that counts, of which a new training would confirm only what is not the seed's (`noise` is the variance of a seed).
    """
    final = networks["top1"].to_numpy(float)
    epochs = int(networks["epochs"].iloc[0])
    seconds_an_epoch = networks["train_seconds"].median() / epochs
    rows = []
    for epoch in by_epoch(networks.iloc[0].to_dict()):
        seen = networks[f"top1_{epoch}"].to_numpy(float)
        n = 1 + int(seconds / (seconds_an_epoch * epoch))
        top1 = _best_of(n, seen, final, noise if epoch == epochs else 0.0)
        rows.append({"epoch": epoch, "n": n, "top1": 100 * top1})
    return pd.DataFrame(rows, columns=["epoch", "n", "top1"])


def _best_of(n: int, seen: np.ndarray, final: np.ndarray, noise: float) -> float:
    """The expected `final` of the best by `seen` of n networks drawn with replacement.

    Of its lead over the mean only what is not `noise` is counted, which is the variance that both have in common.
    """
    ranks = np.arange(len(seen) + 1) / len(seen)
    # The best of n draws is among the k worst with probability (k / all)^n.
    expected = float((np.diff(ranks**n) * final[np.argsort(seen, kind="stable")]).sum())
    share = reliability(final, np.zeros(len(final)), noise) if noise > 0 else 1.0
    return float(final.mean() + share * (expected - final.mean()))


def at_equal_seconds(networks: pd.DataFrame, seconds: float, noise: float) -> Mean | None:
    """The best that `random_search` can do, choosing behind the epoch that serves it best, which flatters it."""
    found = random_search(networks, seconds, noise)
    if found.empty:
        return None
    best = found.loc[found["top1"].idxmax()]
    seen, final = networks[[f"top1_{best['epoch']:.0f}", "top1"]].to_numpy(float).T
    common = noise if best["epoch"] == networks["epochs"].iloc[0] else 0.0
    dice = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        rows = dice.integers(0, len(networks), len(networks))
        drawn.append(100 * _best_of(int(best["n"]), seen[rows], final[rows], common))
    return Mean(best["top1"], float(np.var(drawn)), len(networks) - 1)


def leads(results: pd.DataFrame, trainings: pd.DataFrame) -> pd.DataFrame:
    """Per target, way and rival how many points the searched networks are ahead, with the 95 % interval of that.

    Rivals are the random networks of their depths (`matched`), all random ones, the best hand-made design, and random
    search that has as many seconds. `trainings` are all of as many epochs that are known, and tell the noise of a seed.
    """
    noise = seed_noise(trainings)
    rows = []
    found = distinct(results[results["method"] == SEARCHED])
    for (target, way), searched in found.groupby(["target", "way"]):
        ours = mean_of(searched, noise)
        others = distinct(results[results["target"] == target])
        matched = others[(others["method"] == MATCHED) & (others["way"] == way)]
        drawn = others[others["method"] == RANDOM].drop_duplicates("net_config")
        rivals: dict[str, Mean | None] = {}
        for method, group in {MATCHED: matched, RANDOM: drawn}.items():
            rivals[method] = mean_of(group, noise) if len(group) else None
        designs = others[others["method"] == HAND_MADE].groupby("design")
        means = [mean_of(group, noise) for _, group in designs]
        rivals[HAND_MADE] = max(means, default=None)
        if len(drawn) > 1:
            seconds = searched["search_seconds"].mean()
            rivals[RANDOM_SEARCH] = at_equal_seconds(drawn, seconds, noise[0])
        for rival, mean in rivals.items():
            if mean is not None:
                row = {"target": target, "way": way, "rival": rival, "top1": mean.value}
                rows.append({**row, **ours.above(mean)._asdict()})
    return pd.DataFrame(rows, columns=["target", "way", "rival", "top1", *Lead._fields])


def overall(leads: pd.DataFrame) -> pd.DataFrame:
    """The mean lead over the targets for each way and rival that every target has, with its 95 % interval: as the
    targets' own, by the sum of their variances (Welch, Satterthwaite).
    """
    targets = leads["target"].nunique()
    rows = []
    for (way, rival), group in leads.groupby(["way", "rival"], sort=False):
        if len(group) == targets:
            freedom = group["freedom"].to_numpy(float)
            errors = (group["high"] - group["points"]) / [student(one) for one in freedom]
            variances = (errors / targets) ** 2
            of_mean = Mean(group["points"].mean(), *pooled(variances.to_numpy(), freedom))
            rows.append((way, rival, *of_mean.above(Mean(0.0, 0.0, 1.0))))
    return pd.DataFrame(rows, columns=["way", "rival", *Lead._fields])


def trainings(results: pd.DataFrame, truth: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every training as long as those of `results` that these and the rows of `truth` know: net_config, seed, top1."""
    known = results[["net_config", "seed", "top1"]]
    if truth is not None:
        epochs = results["epochs"].max()
        rows = truth[truth["epochs"] == epochs]
        if len(rows):
            rows = rows.assign(top1=rows[f"top1_{epochs}"])
            known = pd.concat([known, rows[["net_config", "seed", "top1"]]])
    return known.drop_duplicates(["net_config", "seed"])


def best_way(results: pd.DataFrame) -> str:
    """The way of searching whose networks have the highest mean accuracy over the targets."""
    searched = results[results["method"] == SEARCHED]
    return str(searched.groupby(["way", "target"])["top1"].mean().groupby("way").mean().idxmax())


def path_in(way: str) -> str:
    """What the score of a path in the supernet of that way is called."""
    return f"path in the supernet of {way}"


def verdict(results: pd.DataFrame, leads: pd.DataFrame, orders: pd.DataFrame) -> str:
    """Whether the best way of searching is worth it, in a paragraph, and by how much, in a line for each target.

    It is where, at every target, its mean is at least one point above random networks of its depths and above the best
    hand-made design, both clear of zero, and where its supernet orders networks of equal cost, of any depth and those
    as deep, each at least half as well as the noise of training allows. `leads` are what that function gives, `orders`
    `rankings` with their `noise_ceiling`.
    """
    way = best_way(results)
    table = leads[leads["way"] == way]
    won, sentences = [], []
    for target, rows in table.groupby("target"):
        known = rows.set_index("rival")[[*Lead._fields]].itertuples()
        found = {rival: Lead(*lead) for rival, *lead in known}
        wanted = [found.get(MATCHED), found.get(HAND_MADE)]
        won.append(all(one is not None and one.points >= POINTS and one.low > 0 for one in wanted))
        sentences.append(_at(target, way, results, found))
    if len(won) > 1:
        means = overall(table).itertuples(index=False)
        parts = [f"{Lead(*lead)} above {RIVALS[rival]}" for _, rival, *lead in means]
        sentences.append(f"Over all {len(won)} targets: {', '.join(parts)}.")
    ranks, ranked = _ranking(way, orders)
    ways = results.loc[results["method"] == SEARCHED, "way"].nunique()
    which = f"{way}, the best of {ways} ways of searching," if ways > 1 else way
    head = "**Shown**" if all(won) and ranked else "**Not shown**"
    asked = (
        f"{head} that {which} is worth its search. Wanted at every target: a mean at least {POINTS:g} point above"
        f" random networks of the same depth and above the best hand-made design, both clear of zero; reached at"
        f" {sum(won)} of {len(won)}. Wanted of its supernet: to order random networks of equal cost (rank correlation)"
        f" at least half as well as the noise of training allows; {ranks}."
    )
    return "\n".join([asked, *sentences])


def _at(target: float, way: str, results: pd.DataFrame, found: dict[str, Lead]) -> str:
    """The sentence of one target."""
    rows = distinct(results[results["target"] == target])
    count = rows.groupby("method").size().to_dict()
    ours = rows[(rows["method"] == SEARCHED) & (rows["way"] == way)]
    top1 = 100 * ours["top1"].mean()
    matched = ((rows["method"] == MATCHED) & (rows["way"] == way)).sum()
    numbers = {MATCHED: f" (n = {matched})", RANDOM: f" (n = {count.get(RANDOM, 0)})"}
    rivals = [rival for rival in RIVALS if rival in found]
    parts = [f"{found[one]} above {RIVALS[one]}{numbers.get(one, '')}" for one in rivals]
    if MATCHED not in found:
        parts.append("random networks of their depths were not trained")
    if HAND_MADE not in found:
        parts.append("no hand-made design costs that")
    reach = "networks found reach" if len(ours) > 1 else "network reaches"
    return f"At {target:g} M Mult-Adds the {len(ours)} {reach} {top1:.1f} %: {', '.join(parts)}."


def _ranking(way: str, orders: pd.DataFrame) -> tuple[str, bool]:
    """How well its supernet orders networks of equal cost, in words, and whether that is half of what noise allows."""
    measure = "spearman_at_equal_cost"
    words, met = [], True
    for kind in (ANY_DEPTH, SEARCHED_DEPTH):
        if (kind, CEILING) not in orders.index:
            return "there are too few to tell", False
        ranks, most = orders.loc[(kind, path_in(way))], orders.loc[(kind, CEILING)]
        if pd.isna(ranks[measure]):
            return "there are too few to tell", False
        allowed = f"where {in_words(most, measure)} would be perfect"
        if pd.isna(most[measure]):
            allowed = "and how much noise allows is not known"
        words.append(f"{kind} by {in_words(ranks, measure)}, {allowed}")
        met = met and most[measure] > 0 and ranks[measure] >= most[measure] / 2
    return f"{'reached' if met else 'not reached'}: {'; '.join(words)}", bool(met)


def summary(
    results: pd.DataFrame, trainings: pd.DataFrame, orders: pd.DataFrame, left_out: Sequence[str]
) -> dict[str, Any]:
    """The study in numbers, as metrics.json holds it."""
    noise, freedom = seed_noise(trainings)
    table = leads(results, trainings)
    correlation = seed_correlation(trainings)
    once = results.drop_duplicates(["net_config", "seed"])
    return {
        "verdict": verdict(results, table, orders),
        "left_out": " ".join(left_out),
        "trainings": len(once),
        "epochs": int(results["epochs"].max()),
        "seed_std": 100 * noise**0.5 if freedom else None,
        "seed_freedom": freedom,
        "seed_correlation": correlation if pd.notna(correlation) else None,
        "search_seconds": results["search_seconds"].sum(),
        "train_seconds": once["train_seconds"].sum(),
        "compared": as_records(compared(results, trainings).reset_index()),
        "leads": as_records(table),
        "overall": as_records(overall(table)),
    }


def as_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON knows them: null where there is no number."""
    return json.loads(table.to_json(orient="records"))
