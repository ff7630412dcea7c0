"""What training survives: kill -9 at any step, lost processes; and that many processes do what one does."""

import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    ARCH,
    DATA,
    RETRAIN,
    SEARCH,
    TABLE,
    before_each_step,
    checkpoint,
    full_disk,
    identical,
    refused,
)
from helpers import REPOSITORY as ROOT
from torch import nn

from densenas import CostTable, SearchSpace, SuperNet, stage
from densenas.images.prepare import prepare
from densenas.method.architecture import DerivedNet
from densenas.ranks import rank_and_world
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import DataSettings
from densenas.train import retrain
from densenas.training.processes import Interruption, check_devices, launch
from densenas.training.steps import fused_sgd

two_devices = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="takes two GPUs, or a machine without one"
)

RECIPES = {"search": SEARCH, "retrain": RETRAIN}


def train(root, stage, epochs=6, hasty=True, die_at=None, pause=0.0):
    """One stage on made-up images, that pauses before each optimiser's step.

    Hasty: a clock on which two minutes are over at every look, so that each step has its checkpoint. With `die_at` =
    (rank, step) that process kills itself.
    """
    recipe, steps = RECIPES[stage].model_copy(update={"epochs": epochs}), []

    def disturb(*_):
        steps.append(1)
        if die_at == (rank_and_world()[0], len(steps)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)

    clock = itertools.count(step=121.0).__next__ if hasty else time.monotonic
    with (
        mock.patch.dict(os.environ, DENSENAS_ROOT=str(Path(root))),
        mock.patch("time.monotonic", clock),
        before_each_step(disturb),
    ):
        run = Run("made-up")
        if stage == "search":
            search(run, DATA, TABLE, recipe)
        else:
            retrain(run, DATA, ARCH, recipe)


@pytest.mark.parametrize("stage", RECIPES)
def test_twenty_times_killed_it_ends_as_if_undisturbed(stage, processes, root):
    (root / "undisturbed").mkdir()
    train(root / "undisturbed", stage, epochs=40, hasty=False)
    dice, path, within = random.Random(0), root / "runs/made-up" / f"{stage}.pt", 0
    for kill in range(21):
        process = processes.Process(target=train, args=(root, stage, 40, True, None, 0.01))
        before = path.stat().st_mtime_ns if kill else None
        process.start()
        if kill == 20:
            process.join()
            break
        while not path.exists() or path.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (
            "it ended before the last kill: more epochs are needed"
        )
        within += torch.load(path, weights_only=True)["position"]["steps"] > 0
    assert process.exitcode == 0 and within > 5
    for kept in (f"{stage}.best", stage):
        with mock.patch.dict(os.environ, DENSENAS_ROOT=str(root)):
            ours = checkpoint(Run("made-up"), kept)
        with mock.patch.dict(os.environ, DENSENAS_ROOT=str(root / "undisturbed")):
            theirs = checkpoint(Run("made-up"), kept)
        assert identical(ours, theirs)


@pytest.mark.parametrize(("stage", "column"), [("search", "val_top1"), ("retrain", "train_top1")])
def test_the_best_checkpoint_stays_beside_the_last(stage, column, root):
    train(root, stage, epochs=12)
    with mock.patch.dict(os.environ, DENSENAS_ROOT=str(root)):
        last, best = (
            checkpoint(Run("made-up"), name)["position"]["history"]
            for name in (stage, f"{stage}.best")
        )
    reached = [row.get(column, 0.0) for row in last]
    assert len(reached) == 12 and best[-1][column] == max(reached)
    assert reached.index(max(reached)) < len(best) <= 12 and identical(best, last[: len(best)])


def in_shares(forward):
    """The forward pass of a network as two processes do it: each share of the batch has its own batch statistics."""

    def wrapper(net, images, *choice):
        return torch.cat([forward(net, part, *choice) for part in images.tensor_split(2)])

    return wrapper


@two_devices
@pytest.mark.parametrize(("stage", "net"), [("search", SuperNet), ("retrain", DerivedNet)])
def test_two_processes_do_what_one_does(stage, net, root):
    (root / "one").mkdir()
    with mock.patch.object(net, "forward", in_shares(net.forward)):
        train(root / "one", stage, epochs=2)  # rounding grows with every step
    launch(train, 2, "auto", str(root), stage, 2)
    ours, theirs = (
        torch.load(folder / f"runs/made-up/{stage}.pt") for folder in (root, root / "one")
    )
    for key, value in theirs["net"].items():
        if not re.search("running|tracked", key):  # those are of the first process alone
            torch.testing.assert_close(ours["net"][key], value, rtol=1e-5, atol=1e-5)
    for row, expected in zip(
        ours["position"]["history"], theirs["position"]["history"], strict=True
    ):
        assert {**row, "seconds": 0} == pytest.approx(
            {**expected, "seconds": 0}, rel=1e-4, abs=1e-5
        )


@two_devices
def test_a_lost_process_ends_the_run_and_any_number_goes_on(root):
    with refused(
        RuntimeError,
        r"process 1 of 2 ended .*goes on from the last checkpoint, with any number of devices",
    ):
        launch(train, 2, "auto", str(root), "search", 6, True, (1, 5))
    with mock.patch.dict(os.environ, DENSENAS_ROOT=str(root)):
        assert 0 < len(checkpoint(Run("made-up"), "search")["position"]["history"]) < 6
        train(root, "search")
        assert len(checkpoint(Run("made-up"), "search")["position"]["history"]) == 6


@two_devices
def test_a_mistake_in_a_process_is_told_as_it_is(root):
    with refused(RuntimeError, r"process \d of 2 ended \(.*KeyError: 'nonsense'.*\)"):
        launch(train, 2, "auto", str(root), "nonsense")


def train_apart(roots, stage):
    """Each process on a machine with a disk of its own."""
    train(roots[rank_and_world()[0]], stage)


def train_unlike(root):
    """Each process with a recipe of its own, as machines would have that measured costs of their own."""
    train(root, "search", epochs=6 + rank_and_world()[0])


@two_devices
def test_machines_that_do_not_share_their_checkpoints_are_told(tmp_path):
    roots = [str(tmp_path / name) for name in ("first", "second")]
    for root in roots:
        Path(root).mkdir()
    train(roots[0], "search")
    with refused(
        RuntimeError,
        r"processes would go on from different steps, every machine needs the same runs/",
    ):
        launch(train_apart, 2, "auto", roots, "search")
    with refused(
        RuntimeError,
        r"search: processes have other data, costs or recipes, every machine needs the same",
    ):
        launch(train_unlike, 2, "auto", roots[0])
    assert not [*Path(roots[0]).rglob("*.old")], "the checkpoint stays where it is"


def test_a_history_that_a_kill_left_behind_is_written_again(root):
    train(root, "search", epochs=2)
    path = root / "reports/made-up/history.csv"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train(root, "search", epochs=2)
    assert path.read_text() == whole


def test_several_devices_are_not_one_by_name():
    with refused(
        ValueError, r"devices is 2, but device 'cpu:0' is one alone: expected auto or cuda"
    ):
        launch(print, 2, "cpu:0")


@pytest.mark.parametrize("devices", [0, -1])
def test_a_number_of_devices_that_cannot_be(devices):
    with refused(ValueError, rf"devices is {devices}, expected at least 1"):
        launch(print, devices, "auto")


@two_devices
def test_two_machines_train_one_search(tmp_path):
    """torchrun on two rendezvous endpoints, as a user starts it on two machines."""
    name, config = f"test-{os.getpid()}", tmp_path / "tiny.yml"
    config.write_text(
        "space: digits\ndata: {dataset: digits}\nsearch: {epochs: 2, arch_start_epoch: 1, batch_size: 256}\n"
        "retrain: {epochs: 1, batch_size: 64}\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    run = Run(name)
    try:
        prepare(run, DataSettings())
        CostTable.mult_adds(SearchSpace.load("digits"), 32, 10).write(run.reports / "cost.json")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
        ]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=densenas"]
        command += ["-m", "densenas.stage", name, "03-search", str(config)]
        machines = [
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for _ in range(2)
        ]
        outputs = [machine.communicate(timeout=240)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], outputs
        assert sum("search, epoch 2 of 2: 100%" in output for output in outputs) == 1, (
            "one process alone shows progress"
        )
        assert len(run.history("search")) == 2
        assert (
            run.read_json("provenance.json")["03-search"]["parameters"]["recipe"]["batch_size"]
            == 256
        )
    finally:
        for folder in (run.reports, run.work):
            shutil.rmtree(folder, ignore_errors=True)


def test_a_stage_says_where_its_configuration_belongs():
    command = [sys.executable, "-m", "densenas.stage", "unknown", "03-search"]
    for file in (["nowhere.yml"], []):
        ended = subprocess.run([*command, *file], cwd=ROOT, text=True, capture_output=True)
        sentence = (
            r"error: run 'unknown' has no configuration '.*\.yml': name its file behind the stage\n"
        )
        assert ended.returncode == 1 and re.fullmatch(sentence, ended.stderr)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_does_what_sgd_does_when_parameters_take_turns(momentum):
    recipe = SEARCH.model_copy(update={"momentum": momentum, "weight_decay": 0.01})
    start = [torch.randn(3, dtype=torch.float64) for _ in range(3)]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    plain = torch.optim.SGD(
        theirs, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    fused = fused_sgd(ours, recipe)
    for active in ({0}, {0, 1}, {1}, {2, 0}, {2}):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = torch.randn(3, dtype=torch.float64) if index in active else None
            other.grad = None if one.grad is None else one.grad.clone()
        fused.step()
        plain.step()
    torch.testing.assert_close(ours, theirs)


@two_devices
def test_a_mistake_of_the_user_is_told_as_it_is_from_several_processes(root):
    with refused(
        ValueError,
        r"batch_size 8 on 2 devices|batch_size is 80, but val has 16 images: set batch_size to",
    ):
        launch(train_with_batches_of, 2, "auto", str(root), 80)
    with refused(
        ValueError,
        r"batch_size 2 on 2 devices is less than the two images a process .* at least 4 or lower",
    ):
        launch(train_with_batches_of, 2, "auto", str(root), 2)


def train_with_batches_of(root, batch_size):
    with mock.patch.dict(os.environ, DENSENAS_ROOT=str(Path(root))):
        search(Run("made-up"), DATA, TABLE, SEARCH.model_copy(update={"batch_size": batch_size}))


@pytest.mark.parametrize(
    ("device", "devices", "sentence"),
    [
        ("gpu", 1, r"device 'gpu' cannot be used here"),
        (
            "auto",
            4096,
            r"devices is 4096, expected at least 1 and at most \d+, the (processor cores|GPUs) of this",
        ),
        (
            "cpu",
            4096,
            r"devices is 4096, expected at least 1 and at most \d+, the processor cores of this machine",
        ),
        ("meta", 1, r"device 'meta' computes nothing"),
    ],
)
def test_devices_that_are_not_here_are_refused_before_anything_runs(device, devices, sentence):
    with refused(ValueError, sentence):
        check_devices(device, devices)


def meet(path):
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    Path(path, f"{rank_and_world()[0]}").write_text(str(total.item()))


@two_devices
def test_processes_meet_on_a_machine_whose_own_name_nobody_knows(tmp_path):
    """As in a container; PyTorch's own way never ends there."""
    alone = ["unshare", "--user", "--map-root-user", "--uts"]
    if subprocess.run([*alone, "hostname", "nobody-knows"], capture_output=True).returncode:
        pytest.skip("this system lets nobody change a name for one process")
    code = f"from densenas.training.processes import launch; from test_engine import meet; launch(meet, 2, 'auto', {str(tmp_path)!r})"
    script = tmp_path / "meeting.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = ["sh", "-c", 'hostname nobody-knows && exec "$0" "$1"', sys.executable, str(script)]
    done = subprocess.run([*alone, *command], env=env, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2.0", "2.0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_kill_loses_no_step(number, processes, root):
    process = processes.Process(target=train, args=(root, "search", 400, False, None, 0.01))
    process.start()
    path = root / "runs/made-up/search.pt"
    while not path.exists():
        time.sleep(0.01)
    epochs = len(torch.load(path, weights_only=True)["position"]["history"])
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode in (-number, 1), "Ctrl-C is Python's KeyboardInterrupt"
    position = torch.load(path, weights_only=True)["position"]
    assert len(position["history"]) >= epochs and position["steps"] > 0, (
        "kept between two steps, not at an epoch's end"
    )


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "a text": lambda path: path.write_text("not a checkpoint"),
    "another mapping": lambda path: torch.save({"a": 1}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "without weights": lambda path: resave(path, lambda content: content.pop("net")),
    "without a position": lambda path: resave(path, lambda content: content.pop("position")),
    "another shape": lambda path: resave(path, lambda content: reshape(content["net"])),
    "other momentum": lambda path: resave(
        path, lambda content: reshape(content["sgd"]["state"][0])
    ),
    "not finite": lambda path: resave(
        path, lambda content: content["net"]["classifier.bias"].fill_(torch.nan)
    ),
}


def flipped(content):
    content = bytearray(content)
    content[len(content) // 2] ^= 1
    return content


def resave(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def reshape(tensors):
    for key, value in tensors.items():
        if value.ndim:
            tensors[key] = value.new_zeros(*value.shape, 2)
            return


@pytest.mark.parametrize("left", ["the one before", "none"])
@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, left, root, capsys):
    train(root, "search", epochs=2)
    path, previous = (root / "runs/made-up" / name for name in ("search.pt", "search.previous.pt"))
    whole = torch.load(path, weights_only=True)
    BROKEN[damage](path)
    expected = "going on from the checkpoint before it"
    if left == "none":
        previous.unlink()
        expected = "starting anew"
    capsys.readouterr()
    train(root, "search", epochs=2)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "kept as" in line]
    assert re.search(
        rf"search\.pt (is damaged|does not hold|holds values).*kept as search\.damaged: {expected}$",
        said,
    )
    assert identical(torch.load(path, weights_only=True), whole)


def test_a_folder_in_the_place_of_a_checkpoint_is_named(root):
    (root / "runs/made-up/search.pt").mkdir(parents=True)
    with refused(ValueError, r"search\.pt is a folder, a checkpoint belongs there: move it away"):
        train(root, "search")


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(root):
    train(root, "search", epochs=2)
    path = root / "runs/made-up/search.pt"
    recipe = SEARCH.model_copy(update={"epochs": 2})
    resave(path, lambda content: content["position"]["history"].pop())
    before = path.read_bytes()
    sentence = r"cannot be written \(File too large\); .*the same call goes on: '.*search\S*\.pt'"
    with (
        mock.patch.dict(os.environ, DENSENAS_ROOT=str(root)),
        full_disk(len(before) // 2),
        refused(OSError, sentence),
    ):
        search(Run("made-up"), DATA, TABLE, recipe)
    assert path.read_bytes() == before and not list(path.parent.glob(".partial*"))


def test_memory_that_does_not_suffice_is_said_with_what_to_change(root):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    sentence = r"cpu has too little memory: lower batch_size, .* more devices \(CUDA out of memory"
    with before_each_step(run_out), refused(ValueError, sentence):
        train(root, "search", epochs=1)


def test_a_state_that_is_not_finite_is_never_saved(root):
    """The loss of the last step before a checkpoint is finite, what it did to the state is not."""
    calls = []

    def spoil(optimizer, *_):
        calls.append(1)
        if len(calls) == 8:  # 3 steps in the first epoch, 2 on val and 3 on train in the second
            weight = optimizer.param_groups[0]["params"][0]
            weight.grad = torch.full_like(weight, torch.inf)

    sentence = r"search, epoch 1: \S+ is not finite at step 3 \(search\.pt is from before it\); lower lr and rerun"
    with before_each_step(spoil), refused(FloatingPointError, sentence):
        train(root, "search", epochs=4)
    content = torch.load(root / "runs/made-up/search.pt", weights_only=True)
    assert all(value.isfinite().all() for value in content["net"].values())


def test_a_second_training_of_a_run_waits_and_finds_the_first_finished(processes, root):
    with mock.patch.dict(os.environ, DENSENAS_ROOT=str(root)):
        with Run("made-up").alone():
            process = processes.Process(target=train, args=(root, "search", 2))
            process.start()
            process.join(8)
            assert process.is_alive() and not (root / "runs/made-up/search.pt").exists()
        process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "the following arguments are required: run, stage"),
        (["digits", "99-nothing"], 2, "argument stage: invalid choice: '99-nothing'"),
        (["nowhere", "03-search"], 1, "run 'nowhere' has no configuration"),
    ],
)
def test_a_command_line_that_cannot_be_says_what_can(
    arguments, code, sentence, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["stage", *arguments])
    with pytest.raises(SystemExit) as ended:
        stage.main()
    said = capsys.readouterr().err + str(ended.value)
    assert sentence in said and (ended.value.code == code or code == 1)


def test_ctrl_c_on_the_command_line_is_one_sentence(monkeypatch):
    def stopped(name, settings):
        raise KeyboardInterrupt

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("densenas.stage.STAGES", {"03-search": stopped})
    monkeypatch.setattr(
        sys, "argv", ["stage", "digits", "03-search", str(ROOT / "data/configs/digits.yml")]
    )
    with pytest.raises(SystemExit) as ended:
        stage.main()
    assert str(ended.value).startswith("stopped; the same command goes on from the last checkpoint")


def test_a_signal_behind_the_last_step_is_obeyed():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), Interruption("search"):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
