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
    interval,
    kendall,
    rankings,
    readable,
    spearman,
    spearman_at_equal_cost,
)
from densenas.method.derivation import Lattice
from densenas.ranking import synaptic_flow

NUMBERS = st.lists(st.integers(0, 5), min_size=3, max_size=9)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_kendall_counts_the_pairs(score, dice):
    accuracy = [dice.randint(0, 5) for _ in score]
    frame = pd.DataFrame({"score": score, "accuracy": accuracy, "target": 1.0})
    alike = ties_score = ties_accuracy = 0
    pairs = list(itertools.combinations(range(len(score)), 2))
    for i, j in pairs:
        alike += np.sign(score[i] - score[j]) * np.sign(accuracy[i] - accuracy[j])
        ties_score += score[i] == score[j]
        ties_accuracy += accuracy[i] == accuracy[j]
    untied = (len(pairs) - ties_score) * (len(pairs) - ties_accuracy)
    if untied:
        assert kendall(frame) == pytest.approx(alike / math.sqrt(untied))
    else:
        assert math.isnan(kendall(frame))


def test_at_equal_cost_a_score_that_knows_the_cost_alone_knows_nothing():
    dice = np.random.default_rng(0)
    target = np.repeat([1.0, 2.0, 3.0], 20)
    frame = pd.DataFrame({"target": target, "accuracy": target + 0.1 * dice.random(60)})
    frame["score"] = target + 0.1 * dice.random(60)
    assert spearman(frame) > 0.8
    assert abs(spearman_at_equal_cost(frame)) < 0.3
    frame["score"] = -frame["accuracy"]
    assert spearman_at_equal_cost(frame) == pytest.approx(-1)


def test_an_interval_holds_the_truth_and_narrows_with_more_networks():
    dice = np.random.default_rng(1)

    def drawn(n):
        accuracy = dice.normal(size=n)
        score = accuracy + dice.normal(size=n)
        return pd.DataFrame({"target": 1.0, "accuracy": accuracy, "score": score})

    few, many = interval(drawn(20), spearman), interval(drawn(200), spearman)
    expected = 6 / math.pi * math.asin(math.sqrt(0.5) / 2)
    assert many[0] < expected < many[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_every_score_has_its_row():
    accuracy = [0.1, 0.2, 0.3, 0.4]
    networks = pd.DataFrame({"target": [1.0, 1.0, 2.0, 2.0], "accuracy": accuracy})
    networks["layers"] = [4, 3, 2, 1]
    networks["path"] = [0.1, 0.3, 0.4, 0.2]
    table = rankings(networks, ["layers", "path"])
    assert table.loc["layers", ["n", "spearman", "kendall"]].tolist() == [4, -1, -1]
    assert table.loc["path", "spearman_at_equal_cost"] == 0
    assert (table["spearman_low"] <= table["spearman"]).all()
    shown = readable(table)
    assert [*shown.columns] == ["n", "Spearman", "Kendall", "Spearman at equal cost"]
    assert shown.loc["layers", "Kendall"].startswith("-1.00 (")
    assert (
        readable(rankings(networks.assign(layers=1), ["layers"])).loc["layers", "Spearman"]
        == "none"
    )


def test_synaptic_flow_is_a_function_of_the_network_alone():
    networks = Lattice(CostTable.mult_adds(SMALL, 16, 3)).sample(4, seed=1)
    flows = [synaptic_flow(one.architecture, 16, 3) for one in networks]
    again = [synaptic_flow(one.architecture, 16, 3) for one in networks]
    assert flows == again and all(math.isfinite(flow) for flow in flows)
    assert len({*flows}) > 1


def test_two_networks_are_always_in_some_order_which_says_nothing():
    two = pd.DataFrame({"target": 1.0, "accuracy": [0.5, 0.6], "layers": [3, 4]})
    table = rankings(two, ["layers"])
    assert table.drop(columns="n").isna().all(axis=None)
    assert readable(table).loc["layers", "Spearman"] == "none"
