"""What a study says: its results in a table, in a sentence, and what a reader should know beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from densenas.correlations import spearman, spearman_at_equal_cost

SEARCHED = "DenseNAS"
RANDOM = "random"
HAND_MADE = "hand-made"
METHODS = (SEARCHED, RANDOM, HAND_MADE)


@dataclass(frozen=True)
class Result:
    """A trained network: a row of a study's results, whose columns these are."""

    method: str  # one of METHODS
    target: float  # million Mult-Adds
    number: int  # of the network, among those of its method and target
    design: str  # the method, or the name of the hand-made design
    seed: int  # of the training, and of the search before it
    top1: float  # share of the test images
    loss: float  # mean cross-entropy on test
    images: int  # of test
    mult_adds_m: float  # millions
    params_m: float  # millions
    blocks: int
    layers: int
    search_seconds: float | None  # None without a search
    train_seconds: float
    net_config: str


def compared(results: pd.DataFrame) -> pd.DataFrame:
    """Per target and design: n, mean Mult-Adds (millions), and mean, standard deviation and best of top-1 (%)."""
    percent = results.assign(top1=100 * results["top1"])
    return percent.groupby(["target", "design"]).agg(
        n=("top1", "size"),
        mult_adds_m=("mult_adds_m", "mean"),
        mean=("top1", "mean"),
        std=("top1", "std"),
        best=("top1", "max"),
    )


def verdict(results: pd.DataFrame) -> str:
    """In one sentence, by how many points of accuracy the searched networks beat the others at each target."""
    sentences = []
    for target, table in compared(results).groupby(level="target"):
        designs = table.droplevel("target")
        searched = designs.loc[SEARCHED]
        random = designs.loc[RANDOM]
        hand_made = designs["mean"].drop([SEARCHED, RANDOM])
        sentence = (
            f"at {target:g} M Mult-Adds the mean of {searched['n']:.0f} searches"
            f" is {searched['mean'] - random['mean']:+.1f} points"
            f" from the mean of {random['n']:.0f} random networks,"
            f" {searched['mean'] - random['best']:+.1f} from the best of them"
        )
        if hand_made.empty:
            sentence += " (no hand-made design costs that)"
        else:
            sentence += f" and {searched['mean'] - hand_made.max():+.1f} from "
            if len(hand_made) > 1:
                sentence += "the better hand-made design"
            else:
                sentence += f"the only hand-made design, {hand_made.index[0]}"
        sentences.append(sentence)
    return ";\n".join(sentences) + "."


def repeats(results: pd.DataFrame) -> str:
    """In words, where several searches or draws came to the same network: each was trained alone, with another seed."""
    sentences = []
    drawn = results[results["method"] != HAND_MADE]
    for (target, method), rows in drawn.groupby(["target", "method"]):
        different = rows["net_config"].nunique()
        if different < len(rows):
            networks = f"{len(rows)} {method} networks are {different} different ones"
            sentences.append(f"At {target:g} M Mult-Adds {networks}.")
    return " ".join(sentences)


def rank_correlations(ranking: pd.DataFrame) -> tuple[float | None, float | None]:
    """Spearman's, of `one_shot` and `retrained`: over all networks, and among those of equal cost.

    None where there is none: of fewer than 3 networks, or where all of them are equal.
    """
    if len(ranking) < 3:
        return None, None
    networks = ranking.rename(columns={"one_shot": "score", "retrained": "accuracy"})
    over_all = spearman(networks)
    of_equal_cost = spearman_at_equal_cost(networks)
    return (
        None if pd.isna(over_all) else float(over_all),
        None if pd.isna(of_equal_cost) else float(of_equal_cost),
    )


def agreement(ranking: pd.DataFrame) -> str:
    """In words, how far the supernet ranks networks as training alone does."""
    over_all, of_equal_cost = rank_correlations(ranking)
    if over_all is None:
        return f"no rank correlation of {len(ranking)} networks"
    words = f"rank correlation {over_all:.2f} over {len(ranking)} networks"
    if of_equal_cost is None:
        return words
    return f"{words}, {of_equal_cost:.2f} among those of equal cost"


def summary(results: pd.DataFrame, ranking: pd.DataFrame) -> dict[str, Any]:
    """The study in numbers, as metrics.json holds it."""
    spearman, spearman_equal_cost = rank_correlations(ranking)
    return {
        "verdict": verdict(results),
        "networks": len(results),
        "spearman": spearman,
        "spearman_equal_cost": spearman_equal_cost,
        "search_seconds": results["search_seconds"].sum(),
        "train_seconds": results["train_seconds"].sum(),
        "compared": compared(results).reset_index().to_dict("records"),
    }
