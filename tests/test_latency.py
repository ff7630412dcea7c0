"""Measured tables: every distinct op once, resumed op by op, convertible; and judged by whole networks."""

import json
from dataclasses import replace
from unittest import mock

import pytest
from helpers import DESCRIPTION, SKIP, SMALL, full_disk, refused

from densenas import CostTable, SearchSpace, latency
from densenas.costs import read_costs
from densenas.latency import agreement, judge, measure
from densenas.method.derivation import Lattice
from densenas.method.space import Layer
from densenas.pricing import price
from densenas.settings import CostSettings
from densenas.training import device

RES = SearchSpace.load("cifar_resnet")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(device, "SECONDS", 0.0)


def entries(table):
    names = Layer._fields
    return {tuple(entry[name] for name in names): entry for entry in table.conditions["entries"]}


def test_every_distinct_op_is_measured_once_and_stands_where_it_is_used(quick, tmp_path):
    table = measure(SMALL, 16, 3, tmp_path / "log.jsonl", rounds=2)
    known = entries(table)
    assert len(known) == len(table.conditions["entries"])
    sizes = SMALL.maps(16)
    for j, (head, stack) in enumerate(table.nested()[1], start=1):
        for i, row in zip(SMALL.incoming(j), head, strict=True):
            for op, ms in zip(SMALL.head_ops, row, strict=True):
                assert (
                    ms
                    == known[op, SMALL.chs[i], SMALL.chs[j], sizes[i], SMALL.stride(i, j)]["ms"]
                    > 0
                )
        for row in stack:
            for op, ms in zip(SMALL.stack_ops, row, strict=True):
                assert ms == (
                    0 if op == SKIP else known[op, SMALL.chs[j], SMALL.chs[j], sizes[j], 1]["ms"]
                )
    assert all(entry["ms"] <= entry["median"] <= entry["max"] for entry in known.values())
    assert (
        table.unit == "ms"
        and {"device", "threads", "torch", "batch_size", "dtype", "cpu", "instructions"}
        <= table.conditions.keys()
    )


def test_a_regularised_skip_costs_a_tenth_of_the_first_op(quick, tmp_path):
    table = measure(RES, RES.input_size, 3, tmp_path / "log.jsonl", rounds=1)
    skip = RES.stack_ops.index(SKIP)
    assert table.stack and all(row[skip] == row[0] / 10 > 0 for row in table.stack)


def test_a_killed_measurement_goes_on_behind_its_last_line(quick, tmp_path):
    log = tmp_path / "log.jsonl"
    whole = measure(SMALL, 16, 3, log, rounds=2)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[-1][:20])
    with mock.patch.object(latency, "milliseconds", wraps=latency.milliseconds) as timed:
        again = measure(SMALL, 16, 3, log, rounds=2)
        assert 0 < timed.call_count < 2 * len(entries(whole))
        before = timed.call_count
        assert measure(SMALL, 16, 3, log, rounds=2) == again
        assert timed.call_count == before
        measure(SMALL, 16, 3, log, batch_size=2, rounds=1)  # other conditions are measured anew
        assert timed.call_count == before + len(entries(whole))


def test_a_table_is_written_read_and_turned_into_the_published_literal(quick, tmp_path):
    table = measure(SMALL, 16, 3, tmp_path / "log.jsonl", rounds=1)
    table.write(tmp_path / "cost.json")
    assert CostTable.read(tmp_path / "cost.json") == table
    assert json.loads((tmp_path / "cost.json").read_text())["unit"] == "ms"
    (tmp_path / "lat_list").write_text(str(table.nested()))
    assert CostTable.read(tmp_path / "lat_list", SMALL).nested() == table.nested()


@pytest.mark.parametrize(
    "change",
    [
        {"host": "another"},
        {"cpu": "another"},
        {"threads": 99},
        {"torch": "1.0"},
        {"device": "another"},
        {"dtype": "half"},
    ],
    ids=str,
)
def test_timings_of_another_machine_are_never_used(change, quick, tmp_path):
    log = tmp_path / "log.jsonl"
    table = measure(SMALL, 16, 3, log, rounds=1)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line]
    for line in lines:
        line["conditions"] |= change
        line["ms"] = 1e-9
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    again = measure(SMALL, 16, 3, log, rounds=1)
    assert (
        len(entries(again)) == len(entries(table))
        and min(row["ms"] for row in again.conditions["entries"]) > 1e-6
    )


def test_lines_that_are_no_timings_are_passed_over(quick, tmp_path):
    log = tmp_path / "log.jsonl"
    whole = measure(SMALL, 16, 3, log, rounds=1)
    good = log.read_text().splitlines()[-1]
    bad = [
        "5",
        "null",
        "{}",
        "[]",
        '"ms"',
        "[" * 10_000,
        good.replace("conditions", "condition"),
        good[:-20],
    ]
    bad += [
        json.dumps(json.loads(good) | {"ms": ms})
        for ms in (None, -1.0, 0, float("nan"), float("inf"), "1", True)
    ]
    bad += [
        json.dumps(json.loads(good) | {"key": key})
        for key in (None, [], ["op", 1, 2], ["op", 1, 2, "3", 4], {"a": 1})
    ]
    log.write_bytes(
        "\n".join(bad).encode() + b"\n\xff\xfe\n" + b"\0" * 50 + b"\n" + log.read_bytes()
    )
    with mock.patch.object(latency, "milliseconds", wraps=latency.milliseconds) as timed:
        assert measure(SMALL, 16, 3, log, rounds=1) == whole
        assert timed.call_count == 0


def test_a_full_disk_while_measuring_is_one_sentence_and_the_same_call_goes_on(quick, tmp_path):
    log = tmp_path / "log.jsonl"
    with (
        full_disk(2000),
        refused(
            OSError, r"cannot be written \(File too large\); .*same call goes on: .*log\.jsonl"
        ),
    ):
        measure(SMALL, 16, 3, log, rounds=2)
    with mock.patch.object(latency, "milliseconds", wraps=latency.milliseconds) as timed:
        table = measure(SMALL, 16, 3, log, rounds=2)
        assert 0 < timed.call_count < 2 * len(entries(table))


def test_a_table_times_nothing_is_none(quick, tmp_path):
    table = measure(SMALL, 16, 3, tmp_path / "log.jsonl", rounds=1)
    with refused(ValueError, "cannot be scaled by nan"):
        table.scaled(float("nan"))


@pytest.mark.parametrize("space", [SMALL, RES], ids=["mbv2", "res"])
def test_whole_networks_judge_the_table(quick, space, tmp_path):
    table = measure(space, space.input_size, 3, tmp_path / "log.jsonl", rounds=1)
    frame = judge(table, 6, rounds=1)
    assert len(frame) == 6 and (frame > 0).all(axis=None)
    assert agreement(frame)["spearman"] == pytest.approx(
        frame.corr("spearman").loc["predicted", "measured"]
    )
    assert agreement(frame.head(2))["spearman"] is None
    assert agreement(frame.assign(measured=frame["predicted"]))["error"] == 0
    scaled = table.scaled(1.5)
    archs = [one.architecture for one in Lattice(table).sample(5)]
    assert [scaled.total(arch) for arch in archs] == pytest.approx(
        [1.5 * table.total(arch) for arch in archs]
    )


@pytest.mark.parametrize(
    ("kind", "networks"), [("mult_adds", 0), ("mult_adds", 3), ("latency", 0), ("latency", 3)]
)
def test_a_run_is_priced_in_one_call(kind, networks, quick, run):
    run.work.mkdir(parents=True)
    (run.work / "data.json").write_text(json.dumps(DESCRIPTION | {"image_size": 16}))
    path = run.work / "space.yml"
    path.write_text(SMALL.model_dump_json())
    settings = CostSettings(space=str(path), kind=kind, networks=networks, rounds=1)
    prices = price(run, settings)
    assert read_costs(run) == prices.table and prices.table.kind == kind
    assert prices.mult_adds == CostTable.mult_adds(SMALL, 16, 3)
    parameters = run.read_json("provenance.json")["02-cost"]["parameters"]
    assert parameters == settings.model_dump() | {"image_size": 16}
    assert (prices.measured is None) == (not networks and kind == "mult_adds")
    assert bool(run.read_json("metrics.json")["latency"]) == bool(networks)
    if networks:
        assert len(prices.networks) == networks
        assert run.read_json("metrics.json")["latency"]["factor"] == prices.agreement["factor"]
        assert CostTable.read(run.reports / "latency.json") == prices.measured
    if networks and kind == "latency":
        factor = prices.agreement["factor"]
        assert prices.table.stem == pytest.approx(factor * prices.measured.stem)
    # Priced anew without a clock: nothing is left of what was measured.
    price(run, CostSettings(space=str(path), networks=0))
    assert not (run.reports / "latency.json").exists()
    assert run.read_json("metrics.json")["latency"] is None


def test_a_network_takes_what_its_quickest_round_took():
    """What else a machine does makes a round slower, never quicker."""
    table = CostTable.mult_adds(SMALL, 16, 3)
    conditions = {**table.conditions, "batch_size": 1}
    table = replace(table, conditions=conditions)
    arch = Lattice(table).sample(1)[0].architecture
    with mock.patch.object(latency, "milliseconds", side_effect=[3.0, 1.0, 2.0]):
        assert latency.whole([arch], table, "cpu", 3) == [1.0]


def test_a_stem_of_another_space_is_measured_anew(quick, tmp_path):
    log = tmp_path / "log.jsonl"
    measure(SMALL, 16, 3, log, rounds=2)
    with mock.patch.object(latency, "milliseconds", wraps=latency.milliseconds) as timed:
        first = measure(SMALL, 16, 3, log, rounds=1)
        assert timed.call_count == 0
        measure(SMALL.model_copy(update={"init_dim": 24}), 16, 3, log, rounds=1)
        assert timed.call_count
    assert all(row["ms"] == row["max"] for row in first.conditions["entries"])  # of one round
