"""Baselines that cost what they should, a study whose jobs stand alone, and the sweep on a stand-in cluster."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import LATENCY, SMALL, make_space, refused
from helpers import REPOSITORY as ROOT
from test_search import DATA, SEARCH, TABLE

from densenas import Architecture, CostTable, SearchSpace, SuperNet, figures, report
from densenas.evidence import (
    METHODS,
    Job,
    PathOf,
    Study,
    compared,
    hand_made,
    main,
    repeats,
    verdict,
)
from densenas.method.derivation import Lattice
from densenas.method.supernet import Choice
from densenas.runs.run import Run
from densenas.settings import RunConfig

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
    made = hand_made(space, target, size, 10)
    assert [*made] == designs
    for arch in made.values():
        assert arch.mult_adds(size, 10) == pytest.approx(target, rel=0.05)
        halvings = sum(block.stride == 2 for block in arch.blocks)
        assert space.fm_sizes[0] == space.fm_sizes[-1] * 2**halvings
        assert arch.net_type == space.net_type


@pytest.mark.parametrize(
    ("size", "targets"), [(16, (0.2, 0.4, 0.6, 0.8, 1.0)), (32, (0.6, 0.8, 1.0, 1.6, 2.9))]
)
def test_hand_made_networks_of_small_costs_have_finer_widths(size, targets):
    for target in targets:
        made = hand_made(SearchSpace.load("digits"), target, size, 10)
        assert len(made) == 2
        for arch in made.values():
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
    made = hand_made(SearchSpace.load(space), mult_adds, 224, 1000)[design]
    assert [block.out_ch for block in made.blocks] == widths


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
    torch.testing.assert_close(PathOf(net, candidate.architecture)(images), net(images, choice))


@pytest.fixture
def study(run, monkeypatch):
    (run.reports).mkdir(parents=True)
    table = CostTable.mult_adds(SMALL.model_copy(update={"search": SEARCH}), 16, 3)
    table.write(run.reports / "cost.json")
    monkeypatch.setattr("densenas.evidence.load", lambda _: DATA)
    space = run.reports / "space.yml"
    space.write_text(SMALL.model_dump_json())
    return Study(
        run.name, str(space), (TARGET, 2 * TARGET), 1, 2, {**EPOCH, "arch_start_epoch": 0}, EPOCH
    )


def test_random_networks_cost_the_target_and_are_the_same_in_every_process_and_study(study):
    jobs = [Job("random", 2 * TARGET, number) for number in range(4)]
    drawn = [study.random(job) for job in jobs]
    assert all(arch.mult_adds(16, 3) == pytest.approx(2 * TARGET, rel=0.051) for arch in drawn)
    assert len({*map(str, drawn)}) > 1
    larger = Study(study.run, study.space, (TARGET, 3 * TARGET, 2 * TARGET), 1, 9)
    assert [larger.random(Job.parse(str(job))) for job in jobs] == drawn


def test_a_study_trains_every_job_once_and_a_job_stands_alone(study, capsys):
    alone = Job("random", 2 * TARGET, 1)
    study.trained(alone)
    (first,) = study.results().to_dict("records")
    results = study.complete()
    assert len(study.jobs()) == 2 * (1 + 2 + 2)
    # Three of the four hand-made networks cannot be so small.
    assert results.groupby("target").size().to_dict() == {TARGET: 3, 2 * TARGET: 4}
    assert (
        "MobileNetV2, one layer a stage is left out at 0.02 M Mult-Adds: no width"
        in study.left_out()
    )
    assert study.left_out().count("is left out") == 3
    said = verdict(results)
    assert "random networks" in said and "(no hand-made design costs that)" in said
    assert "from the only hand-made design, MobileNetV2, one layer a stage" in said
    assert set(results["method"]) == set(METHODS)
    for row in results.itertuples():
        arch = Architecture.parse(row.net_config)
        assert row.mult_adds_m == arch.mult_adds(16, 3)
        assert row.mult_adds_m == pytest.approx(row.target, rel=0.051)
    same = results.query("method == 'random' and number == 1 and target == @alone.target").iloc[0]
    assert same["top1"] == first["top1"] and same["loss"] == first["loss"]
    capsys.readouterr()
    assert study.complete().equals(results) and not capsys.readouterr().out
    ranking = study.ranking(results)
    assert len(ranking) == 4 and ranking["one_shot"].between(0, 1).all()


def test_a_job_needs_its_search(study):
    with refused(
        FileNotFoundError, r"no searched\.json yet: run the search of DenseNAS_0\.02_0 first"
    ):
        study.trained(Job("DenseNAS", TARGET, 0))


@pytest.mark.parametrize("targets", [(1.0, 1.0), (1.0, 1.0000001), (0.6, 1.0, 1.05)])
def test_targets_that_compare_the_same_networks_are_refused(targets):
    with refused(
        ValueError, r"study: targets: 1\.0 and 1\.\d+ are within 5% of each other .*, leave one out"
    ):
        Study("made-up", "digits", targets)


@pytest.mark.parametrize("target", [float("nan"), float("inf"), 0, -1, True, "1.0"])
def test_targets_that_are_no_costs_are_refused(target):
    with refused(ValueError, r"study: targets\.0: "):
        Study("made-up", "digits", (target,))


def test_a_result_of_other_settings_does_not_count(study, capsys):
    job = Job("random", TARGET, 0)
    study.trained(job)
    assert len(study.results()) == 1
    longer = replace(study, retrain={**EPOCH, "epochs": 2})
    assert not len(longer.results())
    assert (
        "random_0.02_0/result.json is of other data, costs or recipes: it does not count"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"top1": 1.0}'])
def test_a_damaged_result_is_made_anew(study, content):
    job = Job("DenseNAS", TARGET, 0)
    study.searched(job)
    study.trained(job)
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
            study.trained(job)
        study.searched(job)
        study.trained(job)
        assert study.results().equals(before)


def test_a_study_without_a_space_is_of_the_runs_costs(study):
    assert replace(study, space=None).jobs() == study.jobs()
    with refused(ValueError, r"space 'digits' is not the one that the run's costs are of"):
        replace(study, space="digits").searched(Job("DenseNAS", TARGET, 0))


def test_networks_that_came_twice_are_told():
    rows = [
        ("DenseNAS", "a"),
        ("DenseNAS", "a"),
        ("DenseNAS", "b"),
        ("random", "c"),
        ("hand-made", "d"),
    ]
    results = pd.DataFrame(
        [{"target": 1.0, "method": method, "net_config": text} for method, text in rows]
    )
    assert repeats(results) == "At 1 M Mult-Adds 3 DenseNAS networks are 2 different ones."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required"),
        (["{}", "made-up", "foo", "random_1_0"], "argument step: invalid choice: 'foo'"),
        (
            ["{}", "made-up", "train", "foo"],
            "run 'made-up' has no job 'foo' to train, it has DenseNAS_1_0,",
        ),
        (
            ["{}", "made-up", "search", "random_1_0"],
            "no job 'random_1_0' to search, it has DenseNAS_1_0",
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
    said = capsys.readouterr().err + str(ended.value)
    assert sentence in said and ended.value.code not in (0, None)


def test_a_study_compares_mult_adds_alone(study):
    conditions = {**LATENCY, **TABLE.conditions}
    table = CostTable(
        TABLE.space, "latency", 1.0, TABLE.head, TABLE.stack, TABLE.final, 0.1, conditions
    )
    table.write(Run(study.run).reports / "cost.json")
    with refused(ValueError, r"run 'made-up' counts ms, a study compares at equal Mult-Adds"):
        study.random(Job("random", TARGET, 0))


def test_a_studys_jobs_are_what_their_names_say():
    study = Study("made-up", "digits", (1, 0.123456789), 1, 2)
    assert [Job.parse(str(job)) for job in study.jobs()] == study.jobs()


def test_a_job_comes_back_from_its_name():
    for job in (Job("DenseNAS", 1.0, 0), Job("hand-made", 0.65, 12)):
        assert Job.parse(str(job)) == job


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


def test_the_verdict_is_a_difference_of_means():
    accuracies = {
        "DenseNAS": (0.8, 0.9),
        "random": (0.6, 0.7, 0.83),
        "wide": (0.5,),
        "deep": (0.82,),
    }
    rows = [
        {"target": 1.0, "design": design, "top1": top1, "mult_adds_m": 1.0}
        for design, values in accuracies.items()
        for top1 in values
    ]
    table = compared(pd.DataFrame(rows)).loc[1.0]
    assert table.loc["random", "mean"] == pytest.approx(71) and table.loc["random", "n"] == 3
    said = verdict(pd.DataFrame(rows))
    assert "at 1 M Mult-Adds" in said
    assert "+14.0 points from the mean of 3 random" in said and "+2.0 from the best" in said
    assert "+3.0 from the better hand-made" in said


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
        ("[1.0]", "[1.0, 400]", r"evidence\.targets is 400 million.*have"),
        ("[1.0]", "[]", r"evidence\.targets"),
        ("networks: 2", "networks: 1", r"evidence\.networks.*2"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path, line, wrong, sentence):
    path = tmp_path / "run.yml"
    path.write_text(CONFIG.replace(line, wrong))
    with refused(ValueError, sentence):
        RunConfig.load(path)


def test_the_committed_study_is_what_its_files_say(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSENAS_ROOT", str(tmp_path))
    shutil.copytree(ROOT / "reports/cifar10", tmp_path / "reports/cifar10")
    shutil.copy(ROOT / "README.md", tmp_path)
    run = Run("cifar10")
    page = (tmp_path / report.write_study(run)).read_text()
    said = verdict(pd.read_csv(run.reports / "evidence.csv"))
    assert said in page and said in (ROOT / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert not re.search(r"""(src|href|import\()=?["'](https?:)?//""", page), (
        "it must read without a network"
    )


def test_a_cluster_trains_any_part_of_a_study(tmp_path):
    """Snakemake hands every job to a submit command; this stand-in starts it here."""
    name, config, submit = (
        f"test-cluster-{os.getpid()}",
        tmp_path / "study.yml",
        tmp_path / "submit",
    )
    config.write_text(CONFIG)
    submit.write_text(
        '#!/bin/sh\nnohup sh "$1" > "$1.log" 2>&1 &\necho $!\necho "$1" >> "$(dirname "$0")/submitted"\n'
    )
    submit.chmod(0o755)
    run, tools = Run(name), os.path.dirname(sys.executable)
    results = [f"runs/{name}/evidence/{job}/result.json" for job in ("DenseNAS_1_0", "random_1_1")]
    command = [
        f"{tools}/snakemake",
        "--executor",
        "cluster-generic",
        "--cluster-generic-submit-cmd",
        str(submit),
        "--jobs",
        "2",
        "--cores",
        "2",
        "--nolock",
        "--latency-wait",
        "20",
        "--seconds-between-status-checks",
        "1",
        "--config",
        f"run={name}",
        f"configuration={config}",
        "--",
        *results,
    ]
    env = {**os.environ, "PATH": os.pathsep.join([tools, os.environ["PATH"]])}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
        # data, cost, one search and two networks
        assert len((tmp_path / "submitted").read_text().splitlines()) == 5
        assert all((ROOT / result).exists() for result in results)
    finally:
        for folder in (run.reports, run.work):
            shutil.rmtree(folder, ignore_errors=True)


def test_ctrl_c_on_a_job_of_a_study_is_one_sentence(tmp_path, monkeypatch):
    def stopped(study, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "searched", stopped)
    configuration = str(ROOT / "data/configs/evidence-digits.yml")
    monkeypatch.setattr(
        sys, "argv", ["evidence", configuration, "made-up", "search", "DenseNAS_1_0"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value).startswith("stopped; the same command goes on from the last checkpoint")
