"""Latency of another device: ops that leave as ONNX are timed without PyTorch, and come back as a table."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import DESCRIPTION, SKIP, make_space, refused

from densenas import CostTable, SearchSpace
from densenas.costs import read_costs
from densenas.latency import build
from densenas.method.derivation import Lattice
from densenas.method.space import Layer
from densenas.onnx_ops import TIMER, write_ops
from densenas.pricing import price
from densenas.settings import CostSettings
from densenas.timings import distinct, read_times

SKELETON = {
    "input_size": 16,
    "init_dim": 4,
    "chs": [4, 6, 8],
    "fm_sizes": [8, 8, 4],
    "stage": [0, 1, 1, 2],
    "num_layers": [0, 1, 1],
}
MOBILE = make_space(
    **SKELETON, head_ops=["mbconv_k3_t3", "mbconv_k5_t6"], stack_ops=["mbconv_k3_t3", SKIP]
)
RES = make_space(
    **SKELETON, head_ops=["basic_block"], stack_ops=["basic_block", SKIP], skip_reg=True
)
# A machine that has neither PyTorch nor this package.
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "densenas", "onnx"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def time_ops(folder, *options, succeeds=True):
    command = [sys.executable, "-c", ALONE, str(folder / TIMER), *options]
    timed = subprocess.run(command, cwd=folder.parent, text=True, capture_output=True)
    assert (timed.returncode == 0) == succeeds, timed.stderr
    return timed


@pytest.fixture(scope="module", params=[MOBILE, RES], ids=["mbv2", "res"])
def timed(request, tmp_path_factory):
    """A space, and the folder of its ops after two rounds of timing."""
    folder = tmp_path_factory.mktemp("device")
    write_ops(request.param, folder, 16, 3, batch_size=2)
    time_ops(folder, "--device", "a board", "--rounds", "2")
    return request.param, folder


def test_each_op_computes_what_its_module_does_in_the_network(timed):
    space, folder = timed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [tuple(op["key"]) for op in manifest["ops"]] == distinct(space, 16, 3).timed
    for op in manifest["ops"]:
        session = onnxruntime.InferenceSession(
            folder / op["file"], providers=["CPUExecutionProvider"]
        )
        images = np.random.rand(*op["input"]).astype("float32")
        (result,) = session.run(None, {session.get_inputs()[0].name: images})
        module = build(Layer(*op["key"]), space).eval()
        assert list(result.shape) == op["output"] == [*module(torch.tensor(images)).shape]
        assert op["ms"] == [] and op["input"][0] == 2


def test_the_table_holds_the_least_of_the_rounds_and_says_where(timed):
    space, folder = timed
    table = read_times(folder / "times.json", space, 16, 3)
    ops = {
        Layer(*op["key"]): op["ms"] for op in json.loads((folder / "times.json").read_text())["ops"]
    }
    found = distinct(space, 16, 3)
    assert table.stem == min(ops[found.stem])
    assert table.head == [[min(ops[layer]) for layer in row] for row in found.layers.head]
    assert table.classifier == (min(ops[found.classifier]) if space is MOBILE else 0)
    skips = [row[-1] for row in table.stack]
    assert skips == ([row[0] / 10 for row in table.stack] if space is RES else [0] * len(skips))
    said = table.conditions
    assert (said["device"], said["threads"], said["rounds"], said["batch_size"]) == (
        "a board",
        1,
        2,
        2,
    )
    assert said["onnxruntime"] == onnxruntime.__version__ and table.unit == "ms"
    for entry in said["entries"]:
        assert 0 < entry["ms"] <= entry["median"] <= entry["max"]


def test_a_run_takes_the_table_of_another_device(timed, run):
    space, folder = timed
    run.work.mkdir(parents=True)
    (run.work / "data.json").write_text(json.dumps(DESCRIPTION | {"image_size": 16}))
    path = run.work / "space.yml"
    path.write_text(space.model_dump_json())
    settings = CostSettings(space=str(path), kind="latency", table=str(folder / "times.json"))
    prices = price(run, settings)
    assert read_costs(run) == prices.table == prices.measured
    assert CostTable.read(run.reports / "latency.json").conditions["device"] == "a board"
    cheapest = Lattice(prices.table).sample(3)
    assert all(one.cost > 0 for one in cheapest)


def test_ops_of_ones_own_can_be_timed_elsewhere_and_searched_here(run, tmp_path):
    """Costs say which code of theirs they are of, wherever they were measured."""
    space = make_space(
        **SKELETON, head_ops=["notebooks.own_ops:se_k3"], stack_ops=["mbconv_k3_t3", SKIP]
    )
    write_ops(space, tmp_path, 16, 3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    ops = [{**op, "ms": [1.0, 2.0]} for op in manifest["ops"]]
    device = {"device": "a board", "threads": 1, "provider": "CPU", "onnxruntime": "1"}
    (tmp_path / "times.json").write_text(json.dumps({**manifest, **device, "ops": ops}))
    table = read_times(tmp_path / "times.json", space, 16, 3)
    table.write(run.reports / "cost.json")
    assert read_costs(run) == table and table.conditions["code"] == space.code()["code"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input_size": 32}, r"times space made up at 32 pixels in 3 classes, not .* at 16 pixels"),
        ({"num_classes": 4}, r"times space made up at 16 pixels in 4 classes, not .* 3 classes"),
        ({"space": "other"}, r"times space other at .*, not space made up at"),
        ({"digest": "0"}, r"times another version of space made up: write its ops with python -m"),
        ({"ops": []}, r"lacks the times of \d+ ops of space made up"),
        ({"threads": 0}, r"threads: .*greater than or equal to 1"),
        ({"device": None}, r"device: .*string"),
    ],
    ids=str,
)
def test_times_of_something_else_are_refused(timed, change, sentence, tmp_path):
    space, folder = timed
    times = json.loads((folder / "times.json").read_text())
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times | change))
    with refused(ValueError, r"times\.json: " + sentence):
        read_times(path, space, 16, 3)


def test_what_was_not_timed_is_refused(timed):
    space, folder = timed
    with refused(ValueError, r"manifest\.json: the setting 'device' is missing"):
        read_times(folder / "manifest.json", space, 16, 3)
    with refused(FileNotFoundError, r"there is no file"):
        read_times(folder / "nowhere.json", space, 16, 3)
    said = time_ops(folder, "--provider", "AbacusExecutionProvider", succeeds=False).stderr
    assert "provider is AbacusExecutionProvider, not of ['" in said


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"table": "times.json"}, r"table holds milliseconds, but kind is mult_adds"),
        (
            {"table": "times.json", "kind": "latency", "networks": 3},
            r"networks are timed on this machine, .* another device: set networks to 0",
        ),
    ],
)
def test_a_table_goes_with_a_search_for_its_latency_alone(settings, sentence):
    with refused(ValueError, sentence):
        CostSettings.of(settings)


def test_a_latency_says_its_software(tmp_path):
    table = CostTable.mult_adds(SearchSpace.load("digits"), 32, 10)
    said = {**table.conditions, "device": "a board", "threads": 1}
    with refused(ValueError, r"the version of torch or onnxruntime is missing"):
        CostTable.from_nested(table.space, "latency", table.nested(), said).write(tmp_path / "t")
