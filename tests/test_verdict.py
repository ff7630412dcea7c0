"""What a study says of made-up results: yes, no, by how much, and what random search would have reached."""

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers import study_results

from densenas import figures
from densenas.correlations import FEWEST, in_words
from densenas.orders import longer, orders
from densenas.verdict import (
    ANY_DEPTH,
    SEARCHED_DEPTH,
    Mean,
    compared,
    leads,
    not_compared,
    overall,
    path_in,
    random_search,
    student,
    summary,
    trainings,
    verdict,
)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(2, 4.303), (5, 2.571), (12, 2.179), (1000, 1.962)]
)
def test_students_t_is_that_of_the_tables(freedom, expected):
    assert student(freedom) == pytest.approx(expected, abs=0.005)


def test_the_interval_of_a_difference_holds_it_as_often_as_it_says():
    dice = np.random.default_rng(0)
    held = []
    for _ in range(400):
        few, many = dice.normal(1, 2, 3), dice.normal(0, 1, 12)
        lead = Mean(few.mean(), few.var(ddof=1) / 3, 2).above(
            Mean(many.mean(), many.var(ddof=1) / 12, 11)
        )
        held.append(lead.low < 1 < lead.high)
    assert 0.92 < np.mean(held) < 0.98


def test_the_lead_over_all_targets_is_held_at_least_as_often_as_it_says():
    held, wide = [], []
    for seed in range(30):
        results = study_results(lead=0.0, noise=0.02, seed=seed)
        found = leads(results, trainings(results))
        row = overall(found).set_index("rival").loc["matched"]
        held.append(row.low < 0 < row.high)
        one = found[found["rival"] == "matched"]
        assert row.points == pytest.approx(one["points"].mean())
        wide.append((row.high - row.low) / (one["high"] - one["low"]).mean())
    assert np.mean(held) > 0.9 and np.mean(wide) < 0.75


def test_a_target_without_a_rival_has_no_lead_over_all():
    results = study_results()
    gone = (results["method"] == "matched") & (results["target"] == results["target"].max())
    found = overall(leads(results[~gone], trainings(results)))
    assert [*found["rival"]] == ["random", "hand-made", "random search"]


def orders_of(results, skill):
    """Rankings of the random networks by paths that know their accuracies more (1) or less (0)."""
    dice = np.random.default_rng(1)
    drawn = results[results["method"].isin(["random", "matched"])]
    ranked = drawn[["method", "target", "top1"]].set_axis(["kind", "target", "accuracy"], axis=1)
    for way in results.loc[results["method"] == "searched", "way"].unique():
        chance = 0.01 * dice.normal(size=len(drawn))
        ranked[path_in(way)] = skill * drawn["top1"] + (1 - skill) * chance
    return orders(ranked, trainings(results))


def said(results, skill):
    return verdict(results, leads(results, trainings(results)), orders_of(results, skill))


def test_a_search_that_is_worth_it_is_said_to_be():
    text = said(study_results(lead=0.06), skill=0.9)
    assert text.startswith("**Shown** that DenseNAS is worth its search")
    assert "reached at 3 of 3" in text and "allows; reached: of any depth by" in text
    assert text.count("M Mult-Adds") == 3 and "Over all 3 targets: +" in text


@pytest.mark.parametrize(
    ("lead", "skill", "sentence"),
    [
        (0.0, 0.9, "reached at 0 of 3"),  # no better than what is as deep
        (0.005, 0.9, "reached at 0 of 3"),  # less than a point
        (0.06, 0.0, "allows; not reached: of any depth by"),  # its supernet knows nothing
    ],
)
def test_a_search_that_is_not_worth_it_is_said_not_to_be(lead, skill, sentence):
    text = said(study_results(lead, noise=0.001), skill)
    assert text.startswith("**Not shown** that DenseNAS is worth its search") and sentence in text


def test_telling_deep_from_shallow_is_no_order_of_networks():
    """Of both kinds together a score does well that only knows which of them is the better kind."""
    results = study_results(lead=0.06, noise=0.001)
    drawn = results["method"] == "random"
    results.loc[drawn, "top1"] -= 0.05
    networks = results[results["method"].isin(["random", "matched"])]
    ranked = networks[["method", "target", "top1"]].set_axis(["kind", "target", "accuracy"], axis=1)
    dice = np.random.default_rng(1)
    ranked[path_in("DenseNAS")] = (ranked["kind"] == "matched") + 0.1 * dice.normal(
        size=len(ranked)
    )
    table = orders(ranked, trainings(results))["spearman_at_equal_cost"].unstack(0)
    path = table.loc[path_in("DenseNAS")]
    assert path["of both kinds"] > table.loc["noise ceiling", "of both kinds"] / 2
    for kind in (ANY_DEPTH, SEARCHED_DEPTH):
        assert path[kind] < table.loc["noise ceiling", kind] / 2
    found = leads(results, trainings(results))
    text = verdict(results, found, orders(ranked, trainings(results)))
    assert text.startswith("**Not shown**") and "reached at 3 of 3" in text


def test_a_bootstrap_of_few_networks_tells_no_interval():
    truth = study_results(noise=0.02).query("method == 'random'").assign(epochs=20, seed=0)
    again = truth.head(FEWEST - 1).assign(epochs=40, top1_40=truth["top1"])
    known = longer(pd.concat([truth, again]), 20)
    last = known.loc["after 20 of 20 epochs"]
    assert last["n"] == FEWEST - 1 and last["spearman"] == pytest.approx(1)
    assert in_words(last, "spearman") == "1.00"
    more = longer(pd.concat([truth, truth.assign(epochs=40, top1_40=truth["top1"])]), 20)
    assert in_words(more.loc["after 20 of 20 epochs"], "spearman") == "1.00 (1.00 to 1.00)"


def test_networks_that_are_not_compared_are_told():
    results = study_results()
    earlier = results.query("method == 'searched'").assign(group="DenseNAS", net_config="another")
    earlier["net_config"] += earlier["number"].astype(str) + earlier["target"].astype(str)
    second = earlier.assign(seed=1)
    truth = pd.concat([results.assign(group="random"), earlier, second])
    table = not_compared(results, truth)
    assert [*table.index] == [(target, "DenseNAS") for target in (0.4, 0.6, 0.8)]
    assert (table["n"] == 3).all()
    mean = 100 * earlier.groupby("target")["top1"].mean()
    assert table["mean"].to_numpy() == pytest.approx(mean.to_numpy())
    longer = truth.assign(epochs=240).drop(columns=f"top1_{results['epochs'].max()}")
    assert not_compared(results, longer).empty


def test_what_was_not_trained_shows_nothing():
    results = study_results(lead=0.06)
    text = said(results[results["method"] != "matched"], skill=0.9)
    assert (
        text.startswith("**Not shown**")
        and "random networks of their depths were not trained" in text
    )
    text = said(results[results["method"] != "hand-made"], skill=0.9)
    assert text.startswith("**Not shown**") and "no hand-made design costs that" in text
    assert "how much noise allows is not known" in text


def test_the_best_of_several_ways_is_judged():
    results = study_results(lead=0.06, ways=("slow", "quick"))
    worse = (results["way"] == "slow") & (results["method"] == "searched")
    columns = [name for name in results if name.startswith("top1")]
    results.loc[worse, columns] -= 0.05
    assert "that quick, the best of 2 ways of searching, is worth" in said(results, skill=0.9)


def test_a_network_that_was_found_twice_counts_once():
    results = study_results()
    searched = results[results["method"] == "searched"]
    doubled = pd.concat([results, searched.assign(number=searched["number"] + 3)])
    assert leads(doubled, trainings(doubled)).equals(leads(results, trainings(results)))
    table = compared(doubled, trainings(doubled))
    assert (table.xs("DenseNAS", level="design")["n"] == 3).all()
    again = searched.assign(number=searched["number"] + 3, seed=1)
    more = pd.concat([results, again])
    table = compared(more, trainings(more)).xs("DenseNAS", level="design")
    assert (table["n"] == 6).all() and (table["different"] == 3).all()


def test_random_search_reaches_what_drawing_shows():
    results = study_results(noise=0.02, targets=(0.6,))
    networks = results[results["method"] == "random"].head(4)
    found = random_search(networks, seconds=150.0, noise=0.0).set_index("epoch")
    # 150 seconds are ten epochs of training: so many more networks see one, two, five of them.
    assert found["n"].to_dict() == {1: 11, 2: 6, 5: 3, 10: 2, 20: 1}
    for epoch in (5, 10):
        finals = []
        for drawn in itertools.product(range(4), repeat=found.loc[epoch, "n"]):
            seen = networks[f"top1_{epoch}"].iloc[[*drawn]]
            finals.append(100 * networks["top1"].loc[seen.idxmax()])
        assert found.loc[epoch, "top1"] == pytest.approx(np.mean(finals))
    assert found.loc[20, "top1"] == pytest.approx(100 * networks["top1"].mean())


def test_of_a_choice_by_the_accuracy_itself_the_seeds_share_is_not_counted():
    networks = study_results(noise=0.02, targets=(0.6,)).query("method == 'random'")
    rich = 20 * 300.0
    spread = networks["top1"].var()
    by_noise = [
        random_search(networks, rich, share * spread).set_index("epoch").loc[20, "top1"]
        for share in (0.0, 0.5, 1.0)
    ]
    mean = 100 * networks["top1"].mean()
    assert by_noise[2] == pytest.approx(mean) and by_noise[0] > by_noise[1] > mean
    assert by_noise[1] - mean == pytest.approx((by_noise[0] - mean) / 2)


def test_a_table_of_trainings_tells_the_noise_of_seeds():
    results = study_results().query("method != 'hand-made'")
    truth = results.assign(seed=1).drop(columns="top1")
    truth["top1_20"] += 0.01
    other = truth.assign(epochs=40, top1_40=0.0)
    known = trainings(results, pd.concat([truth, other]))
    assert len(known) == 2 * len(results)
    found = summary(results, known, orders_of(results, 0.5), [])
    assert found["seed_std"] == pytest.approx(100 * 0.01 / 2**0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ways", [("DenseNAS",), ("a", "b", "c")])
def test_figures_show_every_network_with_its_n(ways):
    results = study_results(ways=ways)
    figure = figures.accuracies(results, compared(results, trainings(results)))
    for axes in figure.axes:
        points = sum(
            len(one.get_offsets()) for one in axes.collections if one.get_offsets().size > 2
        )
        assert points == len(results) / 3
        counts = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert sum(counts) == points
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "mean with its 95 % interval" in labels and len(labels) == len({*results["design"]}) + 1
    figure = figures.accuracy_by_epoch(results[results["method"] != "hand-made"])
    lines = figure.axes[0].lines
    assert (
        len(lines)
        == sum(results.query("target == 0.4")["method"] != "hand-made") + 2 * len(ways) + 1
    )
    assert any("random (n = 12)" in text.get_text() for text in figure.legends[0].get_texts())
