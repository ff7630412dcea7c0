"""Versions in one place, notebooks that explain themselves, a pipeline that goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from papermill import inspect_notebook

from densenas import report
from densenas.config import PACKAGE, ROOT
from densenas.run import Run, RunConfig

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIGS = sorted((ROOT / "data/configs").glob("*.yml"))


def test_the_lock_pins_what_the_project_asks_for():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {lock.name: lock for lock in locked if lock.marker is None or lock.marker.evaluate()}
    for wanted in REQUIREMENTS:
        (pin,) = pinned[wanted.name].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), f"{wanted}, but locked {pin}: make lock"


def test_conda_gets_the_same_versions_as_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip", "make", "git"}


def test_the_package_grows_no_further():
    """The aim is 2,500 lines, which data, training, studies and exploration have outgrown: shrink them, then this."""
    lengths = {path.name: sum(map(bool, map(str.strip, path.open()))) for path in PACKAGE.rglob("*.py")}
    assert sum(lengths.values()) < 3872 and max(lengths.values()) <= 400, lengths


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_explains_its_knobs_and_shows_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == (0 if path.stem == "08-paper" else 1)
    for line in "\n".join(cell.source for cell in tagged).splitlines():
        assert line.startswith("#") or re.fullmatch(r"\w+: \w+ = .+?  # .{10,}", line), line
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert all(cell.execution_count for cell in code)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_sets_parameters_that_the_notebooks_have(path):
    for stage, parameters in RunConfig.load(path).parameters("any").items():
        known = inspect_notebook(str(ROOT / f"notebooks/{stage}.ipynb"))
        assert set(parameters) == set(known)
        assert all(entry["help"] for entry in known.values())


@pytest.mark.parametrize(
    ("line", "wrong", "sentence"),
    [
        ("space: digits", "space: digit", r"no search space 'digit'.*mbv2"),
        ("space: digits", "spcae: digits", r"no setting 'spcae'"),
        ("dataset: digits", "datset: digits", r"no setting 'data\.datset'"),
        ("dataset: digits", "dataset: digts", r"data\.dataset.*'digits'.*digts"),
        ("val_fraction: 0.2", "val_fraction: 1.5", r"val_fraction.*less than 1.*1\.5"),
        ("seed: 0", "seed: 0\nimage_size: 4", r"image_size.*8"),
        ("target_cost: 1.0", "epochs: 0", r"search\.epochs.*1"),
        ("target_cost: 1.0", "epochs: 16", r"run.yml: search: .*arch_start_epoch is 16, .*16 epochs"),
        ("seed: 0", "seed: [", r"not valid YAML"),
        (
            "target_cost: 1.0",
            "target_cost: 0.01",
            r"search\.target_cost is 0\.01 million.*networks of space digits.*have",
        ),
        ("target_cost: 1.0", "target_cost: 400", r"search\.target_cost is 400 million.*at 32 pixels have"),
        ("networks: 30", "kind: joules", r"cost\.kind.*mult_adds.*latency.*joules"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(tmp_path, line, wrong, sentence):
    path = tmp_path / "run.yml"
    path.write_text((ROOT / "data/configs/digits.yml").read_text().replace(line, wrong))
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        RunConfig.load(path)
    assert re.search(sentence, str(refused.value)) and "\n" not in str(refused.value)


def test_a_run_name_cannot_leave_its_folder():
    for name in ("../elsewhere", "", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="not usable as a folder name"):
            Run(name)


@pytest.fixture
def tiny_run(tmp_path):
    """A run of seconds, with its command; its folders are removed afterwards."""
    name = f"test-{os.getpid()}"
    config = tmp_path / "tiny.yml"
    config.write_text(
        "space: digits\ndata: {dataset: digits}\nsearch: {epochs: 3, arch_start_epoch: 1, batch_size: 128}\n"
        "retrain: {epochs: 2, batch_size: 128}\n"
    )
    run = Run(name)
    command = [str(Path(sys.executable).with_name("snakemake")), "--nolock", "--rerun-incomplete", "--cores", "2"]
    command += ["--config", f"run={name}", f"configuration={config}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PATH": path}, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    yield run, config, start
    for folder in (run.reports, run.work):
        shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_pipeline_goes_on_and_finishes(tiny_run):
    run, config, start = tiny_run
    first = start()
    while not (run.work / "search.pt").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    first.kill()  # Snakemake alone: its stage must not live on beside the next one
    first.wait()
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-f", f"papermill.*{run.name}"], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "papermill outlived the pipeline"
        time.sleep(0.2)

    second = start()
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert "starting anew" not in output
    assert len(run.history("search")) == 3 and len(run.history("retrain")) == 2
    assert {"search", "retrain", "evaluate"} <= set(run.read_json("metrics.json"))
    assert json.loads((run.reports / "cost.json").read_text())["unit"] == "million Mult-Adds"
    page = (run.reports / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page), "the report must read without a network"

    third = start()
    output, _ = third.communicate()
    assert third.returncode == 0 and "Nothing to be done" in output, output

    config.write_text(config.read_text().replace("retrain: {epochs: 2", "retrain: {epochs: 1"))
    before = {stage: (run.work / f"{stage}.done").stat().st_mtime_ns for stage in ("03-search", "05-retrain")}
    fourth = start()
    output, _ = fourth.communicate()
    assert fourth.returncode == 0, output
    after = {stage: (run.work / f"{stage}.done").stat().st_mtime_ns for stage in before}
    assert after["03-search"] == before["03-search"] and after["05-retrain"] > before["05-retrain"]
    assert len(run.history("retrain")) == 1


def test_the_overview_lists_every_evaluated_run(tmp_path, monkeypatch):
    for module in ("run", "report"):
        monkeypatch.setattr(f"densenas.{module}.ROOT", tmp_path)
    shutil.copytree(ROOT / "reports" / "digits", tmp_path / "reports" / "digits")
    shutil.copytree(ROOT / "reports" / "digits", tmp_path / "reports" / "second")
    unfinished = tmp_path / "reports" / "unfinished"
    unfinished.mkdir()
    shutil.copy(ROOT / "reports" / "digits" / "architecture.json", unfinished)
    (unfinished / "evidence.html").touch()
    page = (tmp_path / report.write_overview()).read_text()
    pages = ["digits/index.html", "second/index.html", "unfinished/evidence.html"]
    assert re.findall(r'href="(.*?)"', page) == pages
    top1 = json.loads((ROOT / "reports" / "digits" / "metrics.json").read_text())["evaluate"]["top1"]
    assert page.count(f">{100 * top1:.2f}</td>") == 2
    assert not re.search("https?://", page), "it must read without a network"
