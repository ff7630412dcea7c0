"""Baselines that cost what they should, a study whose jobs stand alone, and the sweep on a stand-in cluster."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from helpers import LATENCY, SKIP, SMALL, make_space, random_table, refused
from helpers import REPOSITORY as ROOT
from torchvision.io import write_png

from densenas import Architecture, CostTable, SearchSpace, SuperNet, figures, report
from densenas.baselines import DESIGNS, as_deep, hand_made
from densenas.evidence import Job, Study, main
from densenas.images.prepare import prepare
from densenas.method.derivation import Lattice
from densenas.method.supernet import Choice
from densenas.orders import orders as orders_of
from densenas.preflight import checked
from densenas.recipes import override
from densenas.runs.run import Run
from densenas.settings import HAND_MADE, WITHIN, DataSettings, StudySettings
from densenas.truth import COLUMNS, Conditions, Truth, by_epoch
from densenas.verdict import MATCHED, RANDOM, SEARCHED, leads, summary, trainings, verdict

TARGET = 0.02  # million Mult-Adds
EPOCH = {"epochs": 1, "batch_size": 8}


@pytest.mark.parametrize(
    ("space", "size", "target", "designs"),
    [
        ("mbv2", 224, 300, ["MobileNetV2", "MobileNetV2, one layer a stage"]),
        ("cifar_mbv2", 32, 80, ["MobileNetV2", "MobileNetV2, one layer a stage"]),
        ("resnet", 224, 2500, ["ResNet-18", "ResNet-34"]),
        ("bottleneck", 224, 3000, ["ResNet-50"]),
        ("cifar_resnet", 32, 60, ["ResNet-18", "ResNet-34"]),
    ],
)
def test_hand_made_networks_cost_the_target_and_see_the_spaces_maps(space, size, target, designs):
    space = SearchSpace.load(space)
    networks = hand_made(space, target, size, 10)
    assert [*networks] == designs
    for arch in networks.values():
        assert arch.mult_adds(size, 10) == pytest.approx(target, rel=0.05)
        halvings = sum(block.stride == 2 for block in arch.blocks)
        assert space.fm_sizes[0] == space.fm_sizes[-1] * 2**halvings
        assert arch.net_type == space.net_type


def test_hand_made_networks_halve_a_map_as_often_as_they_can():
    """Of a space with more halvings than MobileNetV2 has behind its stem, none is left out."""
    fm_sizes = (128, 64, 32, 16, 8, 4)
    settings = {
        "chs": (16, 16, 24, 40, 80, 160),
        "fm_sizes": fm_sizes,
        "stage": (0, 1, 2, 3, 4, 5, 6),
    }
    settings |= {"init_dim": 16, "head_ops": ("mbconv_k3_t3",), "stack_ops": ("mbconv_k3_t3",)}
    space = make_space(input_size=256, num_layers=(0, 1, 1, 1, 1, 1), last_dim=320, **settings)
    for arch in hand_made(space, 400, 256, 10).values():
        assert sum(block.stride == 2 for block in arch.blocks) == 4


@pytest.mark.parametrize(
    ("size", "targets"), [(16, (0.2, 0.4, 0.6, 0.8, 1.0)), (32, (0.6, 0.8, 1.0, 1.6, 2.9))]
)
def test_hand_made_networks_of_small_costs_have_finer_widths(size, targets):
    for target in targets:
        networks = hand_made(SearchSpace.load("digits"), target, size, 10)
        assert len(networks) == 2
        for arch in networks.values():
            assert arch.mult_adds(size, 10) == pytest.approx(target, rel=0.05)


def test_a_design_that_no_width_brings_to_the_target_is_left_out():
    assert hand_made(SearchSpace.load("digits"), 0.001, 32, 10) == {}


@pytest.mark.parametrize(
    ("space", "design", "widths", "mult_adds"),
    [
        ("mbv2", "MobileNetV2", [16, 24, 32, 64, 96, 160, 320], 312.5),
        ("resnet", "ResNet-34", [64, 128, 256, 512], 3600),
        ("bottleneck", "ResNet-50", [64, 128, 256, 512], 4030),
    ],
)
def test_at_the_cost_of_the_original_the_widths_are_the_originals(space, design, widths, mult_adds):
    network = hand_made(SearchSpace.load(space), mult_adds, 224, 1000)[design]
    assert [block.out_ch for block in network.blocks] == widths


def test_a_path_of_the_supernet_gives_what_the_supernet_gives_where_there_is_one_path():
    ops = ["mbconv_k3_t3", "mbconv_k5_t6"]
    space = make_space(
        input_size=16,
        init_dim=4,
        chs=[4, 6, 8],
        fm_sizes=[8, 8, 4],
        stage=[0, 1, 2, 3],
        num_layers=[0, 1, 2],
        max_connections=1,
        head_ops=ops,
        stack_ops=[*ops, "skip_connect"],
    )
    net = SuperNet(space, 3)
    (candidate,) = Lattice(CostTable.mult_adds(space, 16, 3)).sample(1, seed=3)
    blocks = candidate.architecture.routing_blocks
    # Where a stack is shorter than the block's layers, the last ones are skipped.
    stack = [
        [
            [space.stack_ops.index(op)]
            for op in (*block.stack, *["skip_connect"] * (layers - len(block.stack)))
        ]
        for block, layers in zip(blocks, space.num_layers[1:], strict=True)
    ]
    choice = Choice([[[ops.index(block.head)]] for block in blocks], stack)
    images = torch.randn(4, 3, 16, 16)
    alone = net(images, Choice.of(space, candidate.architecture))
    torch.testing.assert_close(alone, net(images, choice))


def settings(targets=(TARGET, 2 * TARGET), **others):
    return StudySettings(**{"targets": targets, "seeds": 1, "networks": 2, **others})


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders of noise whose brightness is the class: 42 images of three classes to train on, 9 to test."""
    source = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in {"train": 14, "test": 3}.items():
        for brightness, name in enumerate(("dark", "grey", "light")):
            folder = source / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 60, (3, 16, 16), generator=generator)
                write_png((noise + 90 * brightness).byte(), str(folder / f"{number}.png"))
    return source


@pytest.fixture
def study(run, images):
    prepare(run, DataSettings(dataset="folder", source=str(images), image_size=16))
    CostTable.mult_adds(SMALL, 16, 3).write(run.reports / "cost.json")
    space = run.reports / "space.yml"
    space.write_text(SMALL.model_dump_json())
    short = {"search": {**EPOCH, "arch_start_epoch": 0}, "retrain": EPOCH}
    return Study(run, settings(space=str(space), **short))


def changed(study, **others):
    """The same study with other settings."""
    return replace(study, settings=study.settings.model_copy(update=others))


def test_hand_made_networks_are_trained_as_often_as_asked(study):
    def seeds(trainings):
        jobs = changed(study, seeds=3, trainings=trainings).jobs()
        drawn = [study.network(job) for job in jobs if job.method == "hand-made"]
        return {network.seed for network in drawn}

    assert (seeds(None), seeds(2)) == ({0, 1, 2}, {0, 1})


def test_networks_of_the_searched_depths_are_as_many_as_asked(study):
    def count(**asked):
        jobs = changed(study, networks=5, searches={"a": {}, "b": {}}, **asked).jobs()
        return [sum(job.method == method for job in jobs) for method in ("random", "matched")]

    assert (count(), count(matched=2)) == ([10, 20], [10, 8]), "at two targets"


def test_random_networks_cost_the_target_and_are_the_same_in_every_process_and_study(study):
    jobs = [Job("random", 2 * TARGET, number) for number in range(4)]
    drawn = [study.random(job) for job in jobs]
    assert all(arch.mult_adds(16, 3) == pytest.approx(2 * TARGET, rel=0.051) for arch in drawn)
    assert len({*map(str, drawn)}) > 1
    larger = changed(study, targets=(TARGET, 3 * TARGET, 2 * TARGET), networks=9)
    assert [larger.random(Job.parse(str(job))) for job in jobs] == drawn


def test_networks_of_a_depth_are_all_those_of_the_space():
    few = {"head_ops": ["mbconv_k3_t1", "mbconv_k3_t3"], "stack_ops": ["mbconv_k3_t1", SKIP]}
    lattice = Lattice(CostTable.mult_adds(SearchSpace(**SMALL.model_dump() | few), 16, 3))
    every = {one.architecture: one.cost for one in lattice.sample(20_000)}
    target = lattice.quantile(0.5)
    near = [arch for arch, cost in every.items() if abs(cost / target - 1) <= WITHIN]
    depths = {arch.num_layers for arch in every}
    assert len(near) > 9 and len({arch.num_layers for arch in near}) > 1
    for depth in (*depths, max(depths) + 1):
        expected = [arch for arch in near if arch.num_layers == depth]
        found = [as_deep(lattice, target, depth, (), number) for number in range(len(expected) + 1)]
        assert {*found[:-1]} == {*expected} and found[-1] is None


def test_a_study_trains_every_job_once_and_a_job_stands_alone(study, capsys):
    alone = Job("random", 2 * TARGET, 1)
    study.run_training(alone)
    (first,) = study.results().to_dict("records")
    assert "retrain: " in capsys.readouterr().out
    results = study.complete()
    out = capsys.readouterr().out
    assert "study: " in out and "retrain: " not in out, "many trainings have one bar"
    assert "MobileNetV2, one layer a stage is left out at 0.02 M Mult-Adds: no width" in out
    assert len(study.jobs()) == 2 * (1 + 2 + 2 + 2)
    # Three of the four hand-made networks cannot be so small, and there is one network as deep as the cheap one found.
    assert results.groupby("target").size().to_dict() == {TARGET: 4, 2 * TARGET: 6}
    assert len(study.left_out()) == 4 and all("is left out" in text for text in study.left_out())
    assert {*results["method"]} == {SEARCHED, MATCHED, RANDOM, "hand-made"}
    for row in results.itertuples():
        arch = Architecture.parse(row.net_config)
        assert row.mult_adds_m == arch.mult_adds(16, 3)
        assert row.mult_adds_m == pytest.approx(row.target, rel=0.051)
        assert row.top1 == row.top1_1 and row.epochs == 1
    for _, rows in results.groupby("target"):
        layers = {method: {*group["layers"]} for method, group in rows.groupby("method")}
        assert layers["matched"] == layers["searched"]
        assert rows.loc[rows["method"] == "matched", "net_config"].is_unique
    same = results.query("method == 'random' and number == 1 and target == @alone.target").iloc[0]
    assert same["top1"] == first["top1"]
    assert study.complete().equals(results) and not capsys.readouterr().out
    ranking = study.ranked(results)  # two draws at the cheap target are the same network
    drawn = results[results["method"].isin(["random", "matched"])]["net_config"].nunique()
    assert (
        len(ranking) == drawn > 3 and ranking["path in the supernet of default"].between(0, 1).all()
    )
    # Looked at where there is no such device, a search is read and not made anew.
    kept = study.folder(study.jobs()[0]).work / "search.pt"
    content = torch.load(kept)
    configuration = json.loads(content["configuration"]) | {"device": "another"}
    torch.save(content | {"configuration": json.dumps(configuration)}, kept)
    with mock.patch("densenas.evidence.search", side_effect=AssertionError):
        assert study.ranked(results).equals(ranking)
    orders = orders_of(ranking, study.trainings(results))
    assert orders.loc[("of both kinds", "layers"), "n"] == drawn and len(orders) == 3 * 6
    study.record(results, ranking, orders)
    recorded = study.run.read_json("metrics.json")
    assert [(row["networks"], row["score"]) for row in recorded["rankings"]] == [*orders.index]
    ahead = leads(results, study.trainings(results))
    assert recorded["evidence"]["verdict"] == verdict(results, ahead, orders)
    assert "no hand-made design costs that" in recorded["evidence"]["verdict"]
    assert pd.read_csv(study.run.reports / "evidence.csv")["top1"].equals(results["top1"])
    provenance = study.run.read_json("provenance.json")["09-evidence"]["parameters"]
    assert provenance == study.settings.model_dump(mode="json") | {"space": study.settings.space}


def test_ways_of_searching_have_recipes_jobs_and_rows_of_their_own(study):
    ways = {"published": {}, "hasty": {"arch_lr": 0.5}}
    two = changed(study, searches=ways, targets=(2 * TARGET,), networks=2)
    names = [str(job) for job in two.jobs()]
    assert {"published_0.04_0", "hasty_0.04_0", "matched-hasty_0.04_1"} < {*names}
    assert [Job.parse(name) for name in names] == two.jobs()
    assert two.search_recipe("hasty").arch_lr == 0.5
    assert two.search_recipe("published") == study.search_recipe("default")
    results = two.complete()
    searched = results[results["method"] == SEARCHED]
    assert [*searched["way"]] == [*ways] and (searched["search_seconds"] > 0).all()
    ahead = leads(results, two.trainings(results))
    assert {"published", "hasty"} == {*ahead["way"]}
    columns = two.ranked(results).columns
    assert {"path in the supernet of published", "path in the supernet of hasty"} < {*columns}


@pytest.mark.parametrize("name", ["random", "hand-made", "matched-x", "a/b", "", "two words"])
def test_a_way_of_searching_has_a_name_for_files(name):
    with refused(ValueError, r"searches: a way of searching is called .*, expected a word"):
        StudySettings.of({"targets": (1.0,), "searches": {name: {}}})


def tabulated(study, top1=0.5):
    """The study with a table that knows its first random network, by another name and accuracy."""
    truth = Truth(study.run)
    row = {"group": "random", "target": 2 * TARGET, "number": 0, "seconds": 7.0, "layers": 2}
    row |= {"seed": 0, "epochs": 1, "blocks": 2, "mult_adds_m": 0.04, "params_m": 0.001}
    arch = study.random(Job("random", 2 * TARGET, 5))
    truth.add({**row, "net_config": str(arch), "top1_1": top1}, study._conditions)
    return replace(study), arch


def test_a_study_takes_from_the_table_what_that_knows_and_adds_the_rest(study):
    study, arch = tabulated(study)
    known, new = Job("random", 2 * TARGET, 0), Job("random", 2 * TARGET, 1)
    assert study.random(known) == arch, "the table's own networks are those of the study"
    study.run_training(known)
    study.run_training(new)
    first, second = study.results().to_dict("records")
    assert first["top1"] == 0.5 and first["train_seconds"] == 7
    assert not (study.folder(known).work / "retrain.pt").exists()
    rows = Truth(study.run).rows()
    assert len(rows) == 2 and rows.loc[1, "top1_1"] == second["top1"]
    study.folder(new).work.joinpath("result.json").unlink()
    study.run_training(new)
    assert study.results().to_dict("records")[1] == pytest.approx(second)
    assert len(Truth(study.run).rows()) == 2


@pytest.mark.parametrize(
    "other", [{"retrain": {**EPOCH, "lr": 0.2}}, {"precision": "bf16"}, {"images": True}]
)
def test_a_table_of_other_images_or_another_recipe_is_left_alone(study, other, capsys, images):
    study, arch = tabulated(study)
    if other.pop("images", False):
        part = DataSettings(dataset="folder", source=str(images), image_size=16, seed=1)
        prepare(study.run, part)
    study = changed(study, **other)
    job = Job("random", 2 * TARGET, 0)
    assert study.random(job) != arch
    study.run_training(job)
    assert "truth.csv is of another" in capsys.readouterr().out
    assert len(Truth(study.run).rows()) == 1


def test_a_training_that_two_jobs_did_at_once_is_one_row(study):
    study, _ = tabulated(study, top1=0.5)
    truth = Truth(study.run)
    (row,) = truth.rows().to_dict("records")
    truth.add({**row, "top1_1": 0.6}, study._conditions)
    truth.add({**row, "seed": 1}, study._conditions)
    assert [*truth.rows()["top1_1"]] == [0.5, 0.5] and [*truth.rows()["seed"]] == [0, 1]


def test_more_epochs_are_another_training(study):
    study, arch = tabulated(study)
    longer = changed(study, retrain={**EPOCH, "epochs": 2})
    job = Job("random", 2 * TARGET, 0)
    longer.run_training(job)
    rows = Truth(study.run).rows()
    assert [*rows["epochs"]] == [1, 2] and {*rows["net_config"]} == {str(arch)}
    (result,) = longer.results().to_dict("records")
    assert result["top1"] == rows.loc[1, "top1_2"] == result["top1_2"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("truth.csv", "group,target\nrandom,1\n", r"truth\.csv is damaged: a row lacks one of"),
        ("truth.csv", "", r"truth\.csv is damaged"),
        ("truth.json", "{", r"truth\.json"),
        ("truth.json", '{"data": "x"}', r"truth\.json: .*image_size"),
    ],
)
def test_a_damaged_table_is_refused(study, name, content, sentence):
    study, _ = tabulated(study)
    (study.run.reports / name).write_text(content)
    with refused(ValueError, sentence):
        study.random(Job("random", 2 * TARGET, 0))


def test_a_job_needs_its_search(study):
    with refused(
        FileNotFoundError, r"no searched\.json yet: run the search of default_0\.02_0 first"
    ):
        study.run_training(Job.parse(f"default_{TARGET}_0"))


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ((1.0, 1.0), r"targets: 1\.0 and 1\.0 are within 5% of each other .*, leave one out"),
        ((0.6, 1.0, 1.05), r"targets: 1\.0 and 1\.05 are within 5%"),
        *(((cost,), r"targets\.0: ") for cost in (float("nan"), float("inf"), 0, -1, True, "1.0")),
    ],
)
def test_targets_that_compare_nothing_are_refused(targets, sentence):
    with refused(ValueError, sentence):
        StudySettings.of({"targets": targets})


def test_a_result_of_other_settings_does_not_count(study, capsys):
    job = Job("random", TARGET, 0)
    study.run_training(job)
    assert len(study.results()) == 1
    longer = changed(study, retrain={**EPOCH, "epochs": 2})
    assert not len(longer.results())
    assert (
        "random_0.02_0/result.json is of other data, costs or recipes: it does not count"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("content", ["{", '{"top1": 1.0}'])
def test_a_damaged_result_is_made_anew(study, content):
    job = Job.parse(f"default_{TARGET}_0")
    study.run_search(job)
    study.run_training(job)
    before = study.results()
    for name in ("result.json", "searched.json"):
        path = study.folder(job).work / name
        path.write_text(content)
        assert not len(study.results())
        with (
            refused(ValueError, "searched.json does not serve")
            if name == "searched.json"
            else nullcontext()
        ):
            study.run_training(job)
        study.run_search(job)
        study.run_training(job)
        assert study.results().equals(before)


def test_a_study_without_a_space_is_of_the_runs_costs(study):
    assert changed(study, space=None).jobs() == study.jobs()
    with refused(ValueError, r"space 'digits' is not the one that the run's costs are of"):
        changed(study, space="digits").run_search(Job.parse(f"default_{TARGET}_0"))


def test_a_network_that_is_found_again_is_trained_with_another_seed(study):
    """So that each search is a draw of its own, and none counts for nothing."""
    often = changed(study, seeds=3)
    jobs = [Job.parse(f"default_{2 * TARGET}_{number}") for number in range(3)]
    for job in jobs:
        often.run_search(job)
    path = often.folder(jobs[2]).work / "searched.json"
    first, last = (
        json.loads((often.folder(job).work / "searched.json").read_text()) for job in jobs[::2]
    )
    path.write_text(json.dumps({**last, "net_config": first["net_config"]}))
    networks = [often.network(job) for job in jobs]
    again = 1 + (networks[1].architecture == networks[0].architecture)
    assert networks[2].architecture == networks[0].architecture
    assert (networks[0].seed, networks[2].seed) == (0, again)
    for job in (jobs[0], jobs[2]):
        often.run_training(job)
    first, last = often.results().to_dict("records")
    assert first["net_config"] == last["net_config"] and first["top1"] != last["top1"]
    for job in jobs[:1]:
        (often.folder(job).work / "searched.json").unlink()
    assert not len(often.results()), "without the earlier searches nobody knows the seed"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required"),
        (["{}", "made-up", "foo", "random_1_0"], "argument step: invalid choice: 'foo'"),
        (
            ["{}", "made-up", "train", "foo"],
            "run 'made-up' has no job 'foo' to train, it has default_1_0,",
        ),
        (
            ["{}", "made-up", "search", "random_1_0"],
            "no job 'random_1_0' to search, it has default_1_0",
        ),
        (["nowhere.yml", "made-up", "train", "random_1_0"], "no run configuration 'nowhere.yml'"),
        (["{}", "made-up", "train", "random_1_0"], "run 'made-up' has no "),
    ],
)
def test_a_command_line_that_cannot_be_says_what_can(
    arguments, sentence, tmp_path, root, monkeypatch, capsys
):
    path = tmp_path / "run.yml"
    path.write_text(CONFIG)
    monkeypatch.setattr(
        sys, "argv", ["evidence", *(argument.format(path) for argument in arguments)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err + str(ended.value)
    assert sentence in message and ended.value.code not in (0, None)


def test_a_study_compares_mult_adds_alone(study):
    random_table(SMALL, 0, conditions=LATENCY).write(study.run.reports / "cost.json")
    with refused(ValueError, r"run 'made-up' counts ms, a study compares at equal Mult-Adds"):
        study.random(Job("random", TARGET, 0))


def test_a_studys_jobs_are_what_their_names_say(run):
    study = Study(run, settings((1, 0.123456789), space="digits"))
    assert [Job.parse(str(job)) for job in study.jobs()] == study.jobs()
    assert Job.parse("hand-made_0.65_12") == ("hand-made", 0.65, 12, "")
    assert Job.parse("DenseNAS_0.65_2") == ("searched", 0.65, 2, "DenseNAS")
    assert Job.parse("matched-a_b_1_0") == ("matched", 1.0, 0, "a_b")


@pytest.mark.filterwarnings("error")
def test_shapes_count_the_blocks_of_each_map():
    text = "[[8, 8], 'mbconv_k3_t1', [], 0, 1]|[[8, 16], 'mbconv_k3_t3', [], 0, 2]|[[16, 16], 'mbconv_k3_t3', [], 0, 1]"
    arch = Architecture.parse(
        f"{text}|[[16, 24], 'mbconv_k5_t3', ['mbconv_k5_t3'], 1, 2]|[[24, 7], 'conv1_1']"
    )
    for groups in ({"one": [arch]}, {"DenseNAS": [arch] * 8, "random": [arch, arch]}):
        left, right = figures.shapes(groups).axes
        drawn = [line.get_ydata() for line in left.lines]
        assert any(list(heights) == [2, 1] for heights in drawn), (
            "two blocks after one halving, one after two"
        )
        assert any(list(line.get_ydata()) == [16, 16, 24, 24] for line in right.lines)
        assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2"]


CONFIG = """
space: digits
data: {dataset: digits}
search: {epochs: 1, arch_start_epoch: 0, batch_size: 256}
retrain: {epochs: 1, batch_size: 256}
evidence: {targets: [1.0], seeds: 1, networks: 2}
"""


@pytest.mark.parametrize(
    ("line", "wrong", "sentence"),
    [
        (
            "retrain:",
            "cost: {kind: latency}\nretrain:",
            r"evidence compares at equal Mult-Adds, but cost\.kind is latency",
        ),
        (
            "[1.0]",
            "[1.0, 400]",
            r"evidence\.targets: space digits has no architecture of 388 to 412 million",
        ),
        ("[1.0]", "[]", r"evidence\.targets"),
        ("networks: 2", "networks: 1", r"evidence\.networks.*2"),
        (
            "networks: 2",
            "networks: 2, searches: {MobileNetV2: {}}",
            r"searches.*'MobileNetV2', expected a word .* that names no other network",
        ),
        (
            "networks: 2",
            "networks: 2, searches: {x: {loss: 'nowhere:loss'}}",
            r"evidence\.searches\.x: loss 'nowhere:loss' cannot be imported",
        ),
        (
            "networks: 2",
            "networks: 2, searches: {x: {batch_size: 900000}}",
            r"evidence\.searches\.x\.batch_size is 900,000, but val has 287 images",
        ),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path, line, wrong, sentence):
    path = tmp_path / "run.yml"
    path.write_text(CONFIG.replace(line, wrong))
    with refused(ValueError, sentence):
        checked(path)


def test_no_way_is_called_like_a_design():
    assert {*HAND_MADE} == {name for names in DESIGNS.values() for name in names if "," not in name}


def rounded(content):
    """With numbers of nine digits: the last ones of a sum are another processor's, or NumPy's."""
    return json.loads(json.dumps(content), parse_float=lambda number: f"{float(number):.9g}")


def test_the_committed_study_is_what_its_files_say(root):
    shutil.copytree(ROOT / "reports/cifar10", root / "reports/cifar10")
    shutil.copy(ROOT / "README.md", root)
    run = Run("cifar10")
    page = (root / report.write_study(run)).read_text()
    results = pd.read_csv(run.reports / "evidence.csv")
    ranking = pd.read_csv(run.reports / "ranking.csv")
    known = trainings(results, Truth(run).rows())
    orders = orders_of(ranking, known)
    recorded = run.read_json("metrics.json")["evidence"]
    again = summary(results, known, orders, [recorded["left_out"]])
    conditions = Truth(run).conditions.model_dump(mode="json", exclude={"latency"})
    again["how"] = {**conditions, "latency": None}
    assert conditions["data"] == run.read_json("metrics.json")["data"]["digest"]
    assert rounded(recorded) == rounded(again)
    first, *others = recorded["verdict"].splitlines()
    assert all(line.replace("**", "") in page for line in (first, *others))
    assert first in (ROOT / "README.md").read_text()
    assert (root / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert not re.search(r"""(src|href|import\()=?["'](https?:)?//""", page), (
        "it must read without a network"
    )


def test_the_committed_table_says_what_it_is_of():
    truth = Truth(Run("cifar10", ROOT))
    study = json.loads((ROOT / "reports/cifar10/metrics.json").read_text())["data"]
    about = truth.conditions
    assert about.data == study["digest"] and about.image_size == study["image_size"]
    for row in truth.rows().to_dict("records"):
        arch = Architecture.parse(row["net_config"])
        assert arch.mult_adds(16, 10) == pytest.approx(row["mult_adds_m"])
        assert max(by_epoch(row)) == row["epochs"]
    recipe = override(SearchSpace.load("digits").retrain, batch_size=128, lr=0.1)
    assert about.recipe == recipe.model_dump(mode="json", exclude={"epochs"})


def test_a_table_is_of_one_loss_and_of_no_ops_that_may_change(root, study, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    Path("my_loss.py").write_text("from torch.nn.functional import cross_entropy as mine\n")
    recipe = override(study.retrain_recipe, loss="my_loss:mine")
    before = Conditions.of(study.data, recipe, "fp32")
    Path("my_loss.py").write_text("def mine(logits, labels):\n    return logits.sum()\n")
    after = Conditions.of(study.data, recipe, "fp32")
    truth = Truth(study.run)
    truth.add({name: 1 for name in COLUMNS}, before)
    assert truth.serves(before) and not truth.serves(after)


def test_a_cluster_trains_any_part_of_a_study(root):
    """Snakemake hands every job to a submit command; this stand-in starts it here."""
    config = root / "study.yml"
    config.write_text(CONFIG)
    submit = root / "submit"
    submit.write_text(
        '#!/bin/sh\nnohup sh "$1" > "$1.log" 2>&1 &\necho $!\necho "$1" >> "$(dirname "$0")/submitted"\n'
    )
    submit.chmod(0o755)
    tools = os.path.dirname(sys.executable)
    results = [f"runs/part/evidence/{job}/result.json" for job in ("default_1_0", "random_1_1")]
    cluster = f"--executor cluster-generic --cluster-generic-submit-cmd {submit} --jobs 2 --cores 2"
    patience = "--nolock --latency-wait 20 --seconds-between-status-checks 1"
    study = f"--config run=part configuration={config} --"
    command = [f"{tools}/snakemake", *f"{cluster} {patience} {study}".split(), *results]
    env = {**os.environ, "PATH": os.pathsep.join([tools, os.environ["PATH"]])}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # data, cost, one search and two networks
    assert len((root / "submitted").read_text().splitlines()) == 5
    assert all((root / result).exists() for result in results)


def test_ctrl_c_on_a_job_of_a_study_is_one_sentence(root, monkeypatch):
    def stopped(study, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "run_search", stopped)
    configuration = str(ROOT / "data/configs/evidence-digits.yml")
    monkeypatch.setattr(
        sys, "argv", ["evidence", configuration, "made-up", "search", "DenseNAS_1_0"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value).startswith("stopped; the same command goes on from the last checkpoint")
