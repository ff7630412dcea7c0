"""Rank correlations against counting by hand, and a score that needs no training."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL
from hypothesis import given
from hypothesis import strategies as st

from densenas import CostTable
from densenas.correlations import (
    CEILING,
    MEASURES,
    correlations,
    noise_ceiling,
    percentiles,
    rankings,
    readable,
    seed_correlation,
    seed_noise,
)
from densenas.method.derivation import Lattice
from densenas.orders import synaptic_flow

NUMBERS = st.lists(st.integers(0, 5), min_size=3, max_size=9)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_rank_correlations_are_those_of_the_definitions(score, dice):
    accuracy = [dice.randint(0, 5) for _ in score]
    target = np.array([dice.randint(0, 1) for _ in score])
    score, accuracy = np.array(score), np.array(accuracy)
    found = dict(zip(MEASURES, correlations(score, accuracy, target), strict=True))
    frame = pd.DataFrame({"score": score, "accuracy": accuracy})
    ranks = frame.rank()
    within = frame.groupby(target).rank()
    within -= within.groupby(target).transform("mean")
    for name, deviations in {"spearman": ranks, "spearman_at_equal_cost": within}.items():
        flat = (deviations.std() < 1e-9).any()
        expected = np.nan if flat else deviations.corr().iloc[0, 1]
        assert found[name] == pytest.approx(expected, nan_ok=True)
    for name, targets in {"kendall": 0 * target, "kendall_at_equal_cost": target}.items():
        alike = untied_score = untied_accuracy = 0
        for i, j in itertools.combinations(range(len(score)), 2):
            if targets[i] == targets[j]:
                alike += np.sign(score[i] - score[j]) * np.sign(accuracy[i] - accuracy[j])
                untied_score += score[i] != score[j]
                untied_accuracy += accuracy[i] != accuracy[j]
        untied = untied_score * untied_accuracy
        expected = alike / math.sqrt(untied) if untied else math.nan
        assert found[name] == pytest.approx(expected, nan_ok=True)


def test_at_equal_cost_a_score_that_knows_the_cost_alone_knows_nothing():
    dice = np.random.default_rng(0)
    target = np.repeat([1.0, 2.0, 3.0], 20)
    accuracy, score = target + 0.1 * dice.random(60), target + 0.1 * dice.random(60)
    spearman, kendall, *at_equal_cost = correlations(score, accuracy, target)
    assert spearman > 0.8 and kendall > 0.6
    assert max(map(abs, at_equal_cost)) < 0.3
    assert correlations(-accuracy, accuracy, target) == pytest.approx([-1] * 4)


def test_two_networks_have_no_rank_correlation():
    two = np.array([1.0, 2.0])
    assert np.isnan(correlations(two, two, np.ones(2))).all()


def test_an_interval_holds_the_truth_and_narrows_with_more_networks():
    dice = np.random.default_rng(1)
    widths = []
    for n in (20, 200):
        accuracy = dice.normal(size=n)
        score = accuracy + dice.normal(size=n)
        networks = pd.DataFrame({"target": 1.0, "accuracy": accuracy, "score": score})
        row = rankings(networks).loc["score"]
        widths.append(row["spearman_high"] - row["spearman_low"])
    expected = 6 / math.pi * math.asin(math.sqrt(0.5) / 2)
    assert row["spearman_low"] < expected < row["spearman_high"]
    assert widths[1] < widths[0]


def test_every_score_has_its_row_of_the_networks_that_have_it():
    accuracy = [0.1, 0.2, 0.3, 0.4]
    networks = pd.DataFrame({"target": [1.0, 1.0, 2.0, 2.0], "accuracy": accuracy})
    networks["layers"] = [4, 3, 2, 1]
    networks["path"] = [0.1, 0.3, 0.4, 0.2]
    networks["longer"] = [0.1, 0.3, 0.4, None]
    networks["same"] = 1
    table = rankings(networks)
    assert table.loc["layers", ["n", "spearman", "kendall"]].tolist() == [4, -1, -1]
    assert table.loc["path", "spearman_at_equal_cost"] == 0
    assert table.loc["longer", ["n", "spearman"]].tolist() == [3, 1]
    assert table["spearman_low"].isna().all(), "an interval of so few would be too narrow"
    shown = readable(table)
    assert [*shown.columns][:3] == ["n", "Spearman", "Kendall"] and len(shown.columns) == 5
    assert shown.loc["layers", "Kendall"] == "-1.00"
    assert shown.loc["same", "Spearman"] == "none"


def trained(networks, seeds, noise, dice):
    """Accuracies of `networks` worths with so many seeds each."""
    rows = []
    for number, worth in enumerate(networks):
        for seed in range(seeds):
            rows.append(
                {"net_config": str(number), "seed": seed, "top1": worth + noise * dice.normal()}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("noise", [0.02, 0.5, 1.0])
def test_what_noise_allows_is_what_the_worth_of_networks_reaches(noise):
    dice = np.random.default_rng(2)
    worth = dice.normal(size=2000)
    repeats = trained(worth, 3, noise, dice)
    assert seed_noise(repeats) == (pytest.approx(noise**2, rel=0.05), 4000)
    share = 1 / (1 + noise**2)  # of the variance that is the networks'
    assert seed_correlation(repeats) == pytest.approx(share, abs=0.03)
    target = np.repeat([0.0, 100.0], 1000)
    accuracy = worth + target + noise * dice.normal(size=2000)
    networks = pd.DataFrame({"target": target, "accuracy": accuracy}).iloc[::20]
    ceiling = noise_ceiling(networks, repeats.iloc[:300]).loc[CEILING]
    assert ceiling["spearman"] == pytest.approx(1, abs=0.01), "costs make all the difference"
    reached = np.corrcoef(worth, accuracy - target)[0, 1]
    assert ceiling["spearman_at_equal_cost"] == pytest.approx(reached, abs=0.08)
    assert (
        ceiling["spearman_at_equal_cost_low"]
        < reached
        < ceiling["spearman_at_equal_cost_high"] + 0.01
    )


def test_without_other_seeds_nobody_knows_what_noise_allows():
    dice = np.random.default_rng(0)
    once = trained([1.0, 2.0, 3.0], 1, 0.1, dice)
    assert math.isnan(seed_noise(once)[0]) and math.isnan(seed_correlation(once))
    networks = pd.DataFrame({"target": 1.0, "accuracy": once["top1"], "score": [1, 2, 3]})
    table = pd.concat([rankings(networks), noise_ceiling(networks, once)])
    assert readable(table).loc[CEILING, "Spearman"] == "none"


def test_an_interval_holds_the_middle_95_percent():
    assert percentiles(np.arange(1001.0)) == (25, 975)
    assert all(math.isnan(end) for end in percentiles(np.array([math.nan])))


def test_synaptic_flow_is_a_function_of_the_network_alone():
    networks = Lattice(CostTable.mult_adds(SMALL, 16, 3)).sample(4, seed=1)
    flows = [synaptic_flow(one.architecture, 16, 3) for one in networks]
    again = [synaptic_flow(one.architecture, 16, 3) for one in networks]
    assert flows == again and all(math.isfinite(flow) for flow in flows)
    assert len({*flows}) > 1


def test_two_networks_are_always_in_some_order_which_says_nothing():
    two = pd.DataFrame({"target": 1.0, "accuracy": [0.5, 0.6], "layers": [3, 4]})
    table = rankings(two)
    assert table.drop(columns="n").isna().all(axis=None)
    assert readable(table).loc["layers", "Spearman"] == "none"
