"""A run: one process at a time, files that survive kills, full disks and damage, and where its results come from."""

import contextlib
import fcntl
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from helpers import DESCRIPTION, SMALL, full_disk, random_table, refused
from matplotlib.figure import Figure

from densenas import CostTable, SearchSpace, files, threads
from densenas.costs import read_costs
from densenas.files import HOST, atomic, write_text
from densenas.images.data import prepared
from densenas.runs import provenance
from densenas.runs.run import Run
from densenas.training.device import pick_device
from densenas.training.engine import resumable

# ---------------------------------------------------------------- one process at a time


def held(run):
    with (run.work / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def work_alone(root, name, pipe, fork=False):
    """In a process of its own: sends what is said while it waits, then that it is in, and stays until it is told."""

    os.environ["DENSENAS_ROOT"] = str(root)
    said = io.StringIO()
    said.flush = lambda: said.getvalue() and pipe.send(said.getvalue())
    with contextlib.redirect_stdout(said), Run(name).alone():
        child = os.fork() if fork else None
        if child == 0:
            pipe.close()
            time.sleep(100)
        pipe.send(child or "in")
        pipe.recv()


@pytest.fixture
def others(processes, run, root):
    """Starts processes that work on the run alone; gives each with a pipe to it."""
    started = []

    def start(**how):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=work_alone, args=(root, run.name, theirs), kwargs=how)
        process.start()
        theirs.close()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_process_says_so_and_waits_for_the_first_even_if_that_is_killed(run, others):
    first, of_first = others()
    assert of_first.recv() == "in"
    _, of_second = others()
    assert f"run 'made-up' is at work in process {first.pid} on {HOST}: waiting" in of_second.recv()
    assert not of_second.poll(0.3) and held(run)
    first.kill()
    assert of_second.recv() == "in"
    of_second.send("leave")
    wait_until(lambda: not held(run))


def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_run(run, others):
    parent, pipe = others(fork=True)
    worker = pipe.recv()
    try:
        assert held(run)
        parent.kill()
        wait_until(lambda: not held(run))
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_process_enters_again_and_holds_the_run_until_it_leaves_for_good(run):
    with run.alone():
        with run.alone():
            assert held(run)
        assert held(run)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(RuntimeError), run.alone():
                os._exit(0 if held(run) else 1)  # it waits for its parent
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert os.waitpid(child, 0)[1] == 0
    assert not held(run)


def test_a_run_that_is_deleted_while_one_waits_is_still_worked_on_by_one_alone(run, others):
    first, of_first = others()
    of_first.recv()
    _, of_second = others()
    of_second.recv()
    shutil.rmtree(run.work)
    with run.alone():
        first.kill()
        assert "waiting" in of_second.recv()  # now for this process
        assert not of_second.poll(0.2)
    assert of_second.recv() == "in"


def test_a_place_that_cannot_be_locked_is_named(run):
    run.work.parent.mkdir(parents=True)
    run.work.touch()
    with refused(FileExistsError, r"cannot be written \(File exists\).*made-up"), run.alone():
        pass
    with refused(FileExistsError, r"cannot be written \(File exists\).*made-up"):
        run.update_json("metrics.json", "data", {})


# ---------------------------------------------------------------- whole files or none


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")
    with full_disk():
        with refused(
            OSError, r"cannot be written \(File too large\); .*the same call goes on: .*state'"
        ):
            write_text(path, "x" * (1 << 20))
        # PyTorch itself would say "unexpected pos".
        with (
            refused(
                OSError, r"cannot be written \(File too large\); .*the same call goes on: .*state'"
            ),
            atomic(path) as partial,
        ):
            torch.save({"weights": torch.zeros(1 << 20)}, partial)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_that_is_not_the_disks_is_passed_on(tmp_path):
    for error in (
        RuntimeError("of the network"),
        FileNotFoundError(2, "No such file", str(tmp_path / "another")),
    ):
        with pytest.raises(type(error)) as caught, atomic(tmp_path / "state"):
            raise error
        assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_a_folder_where_the_file_belongs_is_named(tmp_path):
    (tmp_path / "state").mkdir()
    with refused(IsADirectoryError, r"cannot be written \(Is a directory\).*state'"):
        write_text(tmp_path / "state", "new")
    assert [*tmp_path.iterdir()] == [tmp_path / "state"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic(tmp_path / "state") as first, atomic(tmp_path / "state") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "state").read_text() == "first"  # which ended last
    assert [*tmp_path.iterdir()] == [tmp_path / "state"]


def test_half_written_files_go_once_nobody_can_be_writing_them(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = tmp_path / f".partial.{HOST}.{gone.pid}.0.state"
    living = tmp_path / f".partial.{HOST}.{os.getppid()}.0.state"
    elsewhere, forgotten = (tmp_path / f".partial.elsewhere.{number}.0.state" for number in (1, 2))
    anothers = tmp_path / f".partial.{HOST}.{gone.pid}.0.other"
    for path in (dead, living, elsewhere, forgotten, anothers):
        path.touch()
    os.utime(forgotten, (0, 0))
    write_text(tmp_path / "state", "new")
    assert {*tmp_path.iterdir()} == {tmp_path / "state", living, elsewhere, anothers}


# ---------------------------------------------------------------- damaged state

DAMAGED = [b"", b"{", b"[1]", b"\xff\xfe", b"\0" * 100, b'{"a":' * 100_000]


@pytest.mark.parametrize(
    "content", DAMAGED, ids=["empty", "cut", "list", "binary", "zeros", "deep"]
)
def test_a_damaged_file_is_named_with_the_way_out_and_kept(run, content):
    for name in ("metrics.json", "provenance.json", "architecture.json", "figures/captions.json"):
        path = run.reports / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        with refused(
            ValueError, rf"{name} is damaged: delete it and run the stages of run 'made-up' again"
        ):
            run.update_json(name, "section", 1)
        assert path.read_bytes() == content


HISTORIES = [
    b"",
    b"\n",
    b"a,b\n1,2\n",
    b"stage,epoch\nsearch,\n",
    b"stage,epoch\nsearch,x\n",
    b"\x89PNG\xff",
    b'"',
]


@pytest.mark.parametrize("content", HISTORIES)
def test_a_damaged_history_is_named_and_written_anew(run, content, capsys):
    path = run.reports / "history.csv"
    run.reports.mkdir(parents=True)
    path.write_bytes(content)
    with refused(ValueError, r"history.csv is damaged: delete it and run 03-search and 05-retrain"):
        run.history("search")
    run.write_history("search", [{"epoch": 0, "val_top1": 0.5}])
    assert "history.csv was damaged" in capsys.readouterr().out
    run.write_history("retrain", [{"epoch": 0, "lr": 0.1}])
    assert run.history("search").to_dict("records") == [
        {"stage": "search", "epoch": 0, "val_top1": 0.5}
    ]
    assert len(run.history()) == 2 and capsys.readouterr().out == ""


def test_no_history_is_none(run):
    pd.testing.assert_frame_equal(run.history("search"), pd.DataFrame())


# ---------------------------------------------------------------- costs of the run's own images


@pytest.fixture
def priced(run):
    """A run whose images have 48 pixels in 3 classes, and whose costs are right."""
    write_text(
        run.work / "data.json",
        json.dumps(DESCRIPTION),
    )
    CostTable.mult_adds(SMALL, 48, 3).write(run.reports / "cost.json")
    return run


def test_costs_are_those_of_the_prepared_images(priced):
    assert prepared(priced) == prepared(priced, 48) == (48, 3)
    assert read_costs(priced) == CostTable.mult_adds(SMALL, 48, 3)
    with refused(
        ValueError,
        r"image_size is 32, but the images of run 'made-up' were prepared with 48 pixels",
    ):
        prepared(priced, 32)
    for size, classes in ((32, 3), (48, 10)):
        CostTable.mult_adds(SMALL, size, classes).write(priced.reports / "cost.json")
        with refused(
            ValueError,
            rf"prices images of {size} pixels in {classes} classes.*48 in 3: run 02-cost",
        ):
            read_costs(priced)
    (priced.work / "data.json").unlink()
    assert read_costs(priced) == CostTable.mult_adds(
        SMALL, 48, 10
    )  # as in a report without the machine's files


def test_costs_are_those_of_the_space(priced):
    path = priced.reports / "cost.json"
    assert CostTable.read(path, SMALL).space == read_costs(priced).space == SMALL
    with refused(ValueError, r"cost\.json: it prices space made up, asked for was digits"):
        CostTable.read(path, SearchSpace.load("digits"))
    with refused(ValueError, r"cost\.json: it prices another version of space made up"):
        CostTable.read(path, SMALL.model_copy(update={"last_dim": 8}))


def test_costs_that_do_not_say_of_what_they_are_serve_no_run(priced):
    (priced.reports / "cost.json").write_text(
        repr(CostTable.mult_adds(SearchSpace.load("mbv2")).nested())
    )
    with refused(ValueError, r"cost\.json does not say for which images it holds: run 02-cost"):
        read_costs(priced)
    with refused(ValueError, r"cost\.json: conditions: the setting 'input_size' is missing"):
        random_table(SMALL, 0, conditions={}).write(priced.reports / "cost.json")


@pytest.mark.parametrize(
    "content", ["", "{", "5", "NaN", '{"image_size": 48}', json.dumps(DESCRIPTION | {"classes": 3})]
)
def test_a_damaged_data_json_is_named(priced, content):
    (priced.work / "data.json").write_text(content)
    with refused(
        ValueError,
        r"^(?!.*is damaged.*is damaged).*data\.json is damaged.*run 01-data of run 'made-up' again",
    ):
        read_costs(priced)
    with refused(FileNotFoundError, "run 'other' has no data.json yet: run 01-data first"):
        prepared(Run("other"))


# ---------------------------------------------------------------- names and places


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere",
        "",
        "a/b",
        ".hidden",
        "-x",
        "[a]",
        "a b",
        "x; touch f",
        "{x}",
        "x" * 101,
        "index.html",
        "x\n",
    ],
)
def test_a_run_name_cannot_leave_its_folder(name):
    with refused(ValueError, "not usable as a folder name"):
        Run(name)


@pytest.mark.parametrize("name", [7, None])
def test_a_run_name_is_text(name):
    with refused(ValueError, f"run name {name} is no text: papermill takes it as text with -r"):
        Run(name)


def test_runs_lie_in_the_named_folder_or_the_checkout_or_where_one_works(tmp_path, monkeypatch):
    monkeypatch.delenv("DENSENAS_ROOT", raising=False)
    assert files.root() == files.PACKAGE.parent
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "site-packages" / "densenas")
    monkeypatch.chdir(tmp_path)
    assert files.root() == tmp_path
    monkeypatch.setenv("DENSENAS_ROOT", "elsewhere")
    assert files.root() == tmp_path / "elsewhere"


@pytest.mark.parametrize("device", ["gpu", "meta", "", None, "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with refused(ValueError, "device '?.*(cannot be used here|computes nothing)"):
        pick_device(device)


# ---------------------------------------------------------------- where a result comes from


def git(folder, *command):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of its own that holds the package."""
    package = tmp_path / "checkout" / "densenas"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "--message", "all")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return package.parent


def code():
    return provenance.environment()["git"]


UNKNOWN = {"revision": "unknown", "dirty": None}


def test_the_revision_is_that_of_the_checkout_whatever_git_is_told(checkout, tmp_path, monkeypatch):
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert code() == {"revision": head, "dirty": False}
    git(tmp_path, "init", "--quiet", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert code() == {"revision": head, "dirty": False}
    (checkout / "reports").mkdir()
    (checkout / "reports" / "cost.json").touch()
    assert not code()["dirty"]
    (checkout / "densenas" / "new.py").touch()
    assert code() == {"revision": head, "dirty": True}


def test_a_repository_around_the_package_is_not_its_own(checkout, monkeypatch):
    for unpacked in (checkout / "unpacked" / "densenas", checkout / "densenas2"):
        unpacked.mkdir(parents=True)
        (unpacked / "__init__.py").touch()
        monkeypatch.setattr(provenance, "PACKAGE", unpacked)
        assert code() == UNKNOWN


def fake_git(folder, script):
    path = folder / "git"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


def test_without_an_answer_of_git_the_revision_is_unknown(checkout, tmp_path, monkeypatch):
    usual, real = os.environ["PATH"], shutil.which("git")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code() == UNKNOWN  # not installed
    monkeypatch.setenv(
        "PATH", fake_git(tmp_path, "echo 'dubious ownership' >&2; exit 128") + os.pathsep + usual
    )
    assert code() == UNKNOWN
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.2)
    fake_git(tmp_path, "exec sleep 60")
    assert code() == UNKNOWN
    monkeypatch.setattr(provenance, "GIT_SECONDS", 20)
    fake_git(tmp_path, f'test "$3" != status && exec {real} "$@"')
    assert code() == {"revision": git(checkout, "rev-parse", "HEAD").strip(), "dirty": None}
    monkeypatch.setenv("PATH", usual)
    shutil.rmtree(checkout / ".git")
    (checkout / ".git").touch()
    assert code() == UNKNOWN


def test_a_package_that_is_not_installed_is_no_error(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package", "densenas"))
    (checkout / "pyproject.toml").write_text('[project]\nversion = "3.4"\n')
    versions = provenance.environment()["packages"]
    assert versions["no-such-package"] == "not installed" and versions["densenas"] == "3.4"
    assert torch.__version__.startswith(versions["torch"])


CPUS = {
    "processor : 0\nmodel name\t: AMD EPYC\n\nprocessor : 1\nmodel name\t: AMD EPYC\n": r"^AMD EPYC$",
    "CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n": r", implementer 0x41, part 0xd0c$",
    "CPU implementer\t: 0x41\nCPU part\t: 0xd05\n\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n": r"0xd05, 0xd0b$",
    "model name\t: \nstepping\t: 1\n": r"^[^:1]*\w[^:]*$",
    "model name\t: unknown\n": r"^(?!unknown)\w+",
    None: r"\w+",
}


def test_gpus_that_pytorch_cannot_use_are_no_error(monkeypatch):
    """As with a driver that is too old: they are counted, and asking for a name would raise."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provenance.environment()["hardware"]["gpus"] == []


@pytest.mark.parametrize("text", CPUS)
def test_a_cpu_has_a_name(text, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    name = provenance.processor()
    assert re.search(CPUS[text], name) and "stepping" not in name, name


# ---------------------------------------------------------------- what a process needs to be fast


@pytest.mark.parametrize("late", [False, True], ids=["first", "after torch"])
def test_threads_do_not_spin_for_long_however_a_process_was_started(late, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if not late:
        monkeypatch.delitem(sys.modules, "torch")
    package = runpy.run_path(threads.__file__)
    # Children get it from the environment, even where this process cannot have it any more.
    assert os.environ["GOMP_SPINCOUNT"] == "5000" and package["SPINS_FOR_LONG"] is late


def test_a_process_whose_threads_spin_says_so(run, monkeypatch):
    monkeypatch.setattr(threads, "SPINS_FOR_LONG", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with (
        pytest.warns(
            UserWarning, match="torch was imported before densenas: .*import densenas first"
        ),
        resumable(run, "search", {"seed": 0}, {}, []),
    ):
        pass


def test_a_stage_that_runs_again_takes_its_earlier_figures_away(run):
    figure = Figure()
    for name in ("01-classes", "01-sizes", "02-cost"):
        run.save_figure(figure, name, "of an earlier run")
    run.record_provenance("01-data")
    run.save_figure(figure, "01-classes", "of this run")
    assert run.read_json("figures/captions.json") == {
        "01-classes": "of this run",
        "02-cost": "of an earlier run",
    }
    drawn = {path.stem for path in (run.reports / "figures").glob("*.svg")}
    assert drawn == {"01-classes", "02-cost"}
