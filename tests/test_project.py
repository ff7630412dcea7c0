"""Versions in one place, notebooks that explain themselves, a pipeline that goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from helpers import REPOSITORY as ROOT
from helpers import refused
from packaging.requirements import Requirement
from papermill import inspect_notebook
from torchvision.io import write_png

from densenas import Architecture, pipeline, report
from densenas.files import PACKAGE
from densenas.pipeline import STOPPED, last_words
from densenas.preflight import check_machine, checked, identify
from densenas.published import save_published
from densenas.runs.run import Run
from densenas.settings import RunConfig

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIGS = sorted((ROOT / "data/configs").glob("*.yml"))


def test_the_lock_pins_what_the_project_asks_for():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {lock.name: lock for lock in locked if lock.marker is None or lock.marker.evaluate()}
    for wanted in REQUIREMENTS:
        (pin,) = pinned[wanted.name].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), (
            f"{wanted}, but locked {pin}: make lock"
        )


def test_conda_gets_the_same_versions_as_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip", "make", "git"}


def test_the_package_grows_no_further():
    """What users do to files, disks and names has outgrown the aim of 2,500 lines: shrink that, then this."""
    lengths = {path: sum(map(bool, map(str.strip, path.open()))) for path in PACKAGE.rglob("*.py")}
    assert sum(lengths.values()) < 7900 and max(lengths.values()) <= 420, lengths


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
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
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
        ("space: digits", "space: digit", r"run\.yml: no search space 'digit'.*mbv2"),
        ("space: digits", "spcae: digits", r"no setting 'spcae'"),
        ("dataset: digits", "datset: digits", r"no setting 'data\.datset'"),
        ("dataset: digits", "dataset: digts", r"data\.dataset.*'digits'.*digts"),
        ("val_fraction: 0.2", "val_fraction: 1.5", r"val_fraction.*less than 1.*1\.5"),
        ("seed: 0", "seed: 0\nimage_size: 4", r"image_size.*8"),
        ("target_cost: 1.0", "epochs: 0", r"search\.epochs.*1"),
        (
            "target_cost: 1.0",
            "epochs: 16",
            r"run.yml: search: .*arch_start_epoch is 16, .*16 epochs",
        ),
        ("seed: 0", "seed: [", r"not valid YAML"),
        (
            "target_cost: 1.0",
            "target_cost: 0.01",
            r"search\.target_cost is 0\.01 million.*networks of space digits.*have",
        ),
        (
            "target_cost: 1.0",
            "target_cost: 400",
            r"search\.target_cost is 400 million.*at 32 pixels have",
        ),
        ("networks: 30", "networks: 1", r"cost\.networks: .*at least 2 networks"),
        ("networks: 30", "kind: joules", r"cost\.kind.*mult_adds.*latency.*joules"),
        ("seed: 0", "seed: true", r"seed: .*integer.*True"),
        ("seed: 0", "device: gpu", r"device: expected auto, cpu, cuda or one GPU.*gpu"),
        ("seed: 0", "device: meta", r"device: expected auto, cpu, cuda or one GPU.*meta"),
        ("target_cost: 1.0", "target_cost: .inf", r"search\.target_cost.*finite.*inf"),
        ("target_cost: 1.0", "epochs: '20'", r"search\.epochs.*integer.*'20'"),
        (
            "dataset: digits",
            "dataset: digits\n  num_classes: [1, 2]",
            r"num_classes: 1 is not read as text.*in quotes",
        ),
        (
            "dataset: digits",
            "dataset: digits\n  pack: 16",
            r"data\.pack is 16, but training sees images of 32 pixels",
        ),
        (
            "seed: 0",
            "evidence: {targets: [1.0, 1.0000001]}",
            r"evidence\.targets: 1\.0 and 1\.0000001 are within 5% of each other",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(tmp_path, line, wrong, sentence):
    path = tmp_path / "run.yml"
    path.write_text((ROOT / "data/configs/digits.yml").read_text().replace(line, wrong))
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        RunConfig.load(path)
    assert re.search(sentence, str(refused.value)) and "\n" not in str(refused.value)


def test_a_run_is_named_by_its_file_unless_by_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yml", "a b.yml", "007.yml"):
        Path(name).touch()
    assert identify("", "mine.yml") == ("mine", Path("mine.yml"))
    assert identify("", "007.yml")[0] == "007"
    assert identify("1_0", "a b.yml") == ("1_0", Path("a b.yml"))
    assert identify("cifar10") == ("cifar10", ROOT / "data/configs/cifar10.yml")
    assert identify(usual="evidence-digits")[0] == "evidence-digits"
    with refused(
        ValueError, r"'a b' is not usable as a folder name: .*name the run yourself with RUN="
    ):
        identify("", "a b.yml")
    with refused(
        FileNotFoundError, r"for run 'x': write data/configs/x\.yml, or name its file with CONFIG="
    ):
        identify("x")
    with refused(FileNotFoundError, r"there is no configuration 'nowhere\.yml'"):
        identify("x", "nowhere.yml")


def test_an_installed_package_says_that_it_is_no_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SNAKEFILE", tmp_path / "Snakefile")
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    with pytest.raises(
        SystemExit, match="Snakefile is not there, an installed package is no pipeline: clone"
    ):
        pipeline.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("place", [".snakemake", "runs", "reports", "reports/mine"])
def test_a_place_that_cannot_be_written_is_refused_beforehand(place, tmp_path):
    pipeline.check_writable(tmp_path / "not there yet", "mine")
    pipeline.check_writable(tmp_path, "mine")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    with refused(PermissionError, rf"{tmp_path}/{place} cannot be written, results belong there"):
        pipeline.check_writable(tmp_path, "mine")


def test_make_never_reads_a_name_as_a_command(tmp_path):
    flag = tmp_path / "flag"
    name = f"x; touch {flag}; $(shell touch {flag}) `touch {flag}`"
    command = ["make", "-o", ".venv/installed", "reproduce", f"RUN={name}", f"CONFIG={name}"]
    made = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert made.returncode != 0 and not flag.exists()
    sentence, farewell = made.stderr.splitlines()
    assert repr(name)[:100] in sentence and "not usable as a folder name" in sentence
    assert re.match(r"make(\[1\])?: \*\*\*", farewell)


@pytest.fixture
def folder_run(tmp_path):
    """The configuration of a run on twelve images a class, in a space and with a network of the user's own."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = torch.full((3, 32, 32), number, dtype=torch.uint8)
            write_png(pixels, str(tmp_path / "images" / name / f"{number}.png"))
    shutil.copy(PACKAGE / "spaces/digits.yml", tmp_path / "space.yml")
    config = tmp_path / "run.yml"
    config.write_text(
        f"space: {tmp_path}/space.yml\ndata: {{dataset: folder, source: {tmp_path}/images}}\n"
        "search: {epochs: 2, arch_start_epoch: 1, batch_size: 8}\nretrain: {epochs: 1, batch_size: 8}\n"
    )
    return config


@pytest.mark.parametrize(
    ("line", "wrong", "kind", "sentence"),
    [
        ("/images", "/nowhere", FileNotFoundError, r"run\.yml: data: .*nowhere' is not a folder"),
        ("/images", "/images/cat", ValueError, r"run\.yml: data: "),
        (
            "epochs: 2,",
            "target_cost: 1.0e-9, epochs: 2,",
            ValueError,
            r"run\.yml: search\.target_cost is 1e-09 million",
        ),
        (
            "epochs: 1,",
            "net_config: garbage, epochs: 1,",
            ValueError,
            r"run\.yml: retrain\.net_config: .*garbage",
        ),
        (
            "retrain:",
            "evaluate: {model: nowhere}\nretrain:",
            FileNotFoundError,
            r"evaluate\.model: 'nowhere' is not a",
        ),
        (
            "size: 8}\nretrain",
            "size: 99}\nretrain",
            ValueError,
            r"search\.batch_size is 99, but there are only \d+ ima",
        ),
        (
            "1, batch_size: 8}\nretrain",
            "1}\nretrain",
            ValueError,
            r"search\.batch_size is 32 \(of space space\), but",
        ),
        (
            "epochs: 1,",
            "devices: 3, epochs: 1,",
            ValueError,
            r"retrain\.batch_size is 8, but 3 devices share it: .* 6",
        ),
        (
            "epochs: 1,",
            "devices: 8, epochs: 1,",
            ValueError,
            r"retrain\.batch_size is 8, but 8 devices share it: .* 16",
        ),
    ],
)
def test_what_can_be_known_is_refused_before_anything_runs(folder_run, line, wrong, kind, sentence):
    checked(folder_run)
    text = folder_run.read_text()
    assert line in text
    folder_run.write_text(text.replace(line, wrong))
    with refused(kind, sentence):
        checked(folder_run)


def test_devices_that_are_not_there_are_refused(folder_run):
    folder_run.write_text(folder_run.read_text().replace("epochs: 2,", "devices: 64, epochs: 2,"))
    with refused(ValueError, r"search: devices is 64"):
        check_machine(RunConfig.load(folder_run))


def test_what_a_stage_reads_from_outside_is_known_by_its_content(folder_run, tmp_path, monkeypatch):
    def changed(before):
        after = checked(folder_run)[1]
        return {stage for stage in after if after[stage] != before[stage]}

    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "own_network.py"
    code.write_text(
        "from torchvision.models import mobilenet_v2\n\n"
        "def net(num_classes):\n    return mobilenet_v2(num_classes=num_classes)\n"
    )
    arch = Architecture.named("DenseNAS-A")
    (tmp_path / "model").mkdir()
    save_published(tmp_path / "model", arch)
    torch.save(arch.build(2).state_dict(), tmp_path / "model" / "weights.pt")
    own = f"evaluate: {{model: {tmp_path}/model}}\nretrain: {{net_config: 'own_network:net', "
    folder_run.write_text(folder_run.read_text().replace("retrain: {", own))
    before = checked(folder_run)[1]

    space, image = tmp_path / "space.yml", tmp_path / "images/cat/0.png"
    when = space.stat()
    for path in (space, folder_run):
        path.write_text(path.read_text() + "# a comment\n")
    assert changed(before) == set()
    space.write_text(space.read_text().replace("48, 64]", "48, 72]"))
    os.utime(space, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert changed(before) == {"02-cost"}

    before = checked(folder_run)[1]
    os.utime(image, ns=(1, 1))
    assert changed(before) == {"01-data"}
    before = checked(folder_run)[1]
    image.unlink()
    assert changed(before) == {"01-data"}

    before = checked(folder_run)[1]
    (tmp_path / "model" / "model.onnx").touch()
    assert changed(before) == set()
    torch.save(arch.build(2).state_dict(), tmp_path / "model" / "weights.pt")
    assert changed(before) == {"06-evaluate"}
    before = checked(folder_run)[1]
    code.write_text(code.read_text() + "# another\n")
    monkeypatch.delitem(sys.modules, "own_network")  # as in the next process
    monkeypatch.setattr("densenas.networks.CODE_SEEN", {})
    assert changed(before) == {"05-retrain", "06-evaluate"}


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("ValueError: the sentence: with colons\n\n", "03-search: the sentence: with colons"),
        ("KeyboardInterrupt\n", STOPPED),
        (
            "nbclient.exceptions.DeadKernelError: Kernel died\n",
            "03-search: the notebook's process died.*goes on",
        ),
        ("OSError: [Errno 28] No space left on device\n", "03-search: the disk is full.*goes on"),
        ("KeyError: 'x'\n", r"03-search: KeyError: 'x' \(where: .*03-search\.log\)"),
    ],
)
def test_a_failed_stage_leaves_one_sentence(tmp_path, log, sentence):
    (tmp_path / "02-cost.log").write_text("a warning\n")
    (tmp_path / "03-search.log").write_text(f"Traceback (most recent call last):\n  File …\n{log}")
    (said,) = last_words(tmp_path)
    assert re.match(sentence, said)
    (tmp_path / "03-search.log").unlink()
    assert "ended from outside" in last_words(tmp_path)[0]


@pytest.fixture
def tiny_run(tmp_path):
    """A run of seconds whose name looks like a number, and its commands; its folders are removed afterwards."""
    name = f"0{os.getpid()}"
    config = tmp_path / "{a} tïny$HOME's.yml"
    space = tmp_path / "space.yml"
    shutil.copy(PACKAGE / "spaces/digits.yml", space)
    config.write_text(
        f"space: {space}\ndata: {{dataset: digits}}\nsearch: {{epochs: 3, arch_start_epoch: 1, batch_size: 128}}\n"
        "retrain: {epochs: 2, batch_size: 128}\n"
    )
    run = Run(name)
    bare = [
        str(Path(sys.executable).with_name("snakemake")),
        "--nolock",
        "--rerun-incomplete",
        "--cores",
        "2",
    ]
    bare += ["--config", f"run={name}", f"configuration={config}"]
    commands = {"snakemake": bare, "make": ["make", "-o", ".venv/installed", "reproduce"]}

    def start(command, *options):
        return subprocess.Popen(
            [*commands[command], *options],
            cwd=ROOT,
            env={**os.environ, "RUN": name, "CONFIG": str(config)},
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    yield run, config, space, start
    for folder in (run.reports, run.work):
        shutil.rmtree(folder, ignore_errors=True)
    report.write_overview()


def output_of(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def test_a_stopped_pipeline_goes_on_and_reruns_what_changed(tiny_run):
    run, config, space, start = tiny_run
    first = start("snakemake")
    while not (run.work / "search.pt").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    first.kill()  # Snakemake alone: its stage must not live on beside the next one
    first.wait()
    deadline = time.monotonic() + 30
    while (
        subprocess.run(["pgrep", "-f", f"papermill.*/{run.name}/"], capture_output=True).returncode
        == 0
    ):
        assert time.monotonic() < deadline, "papermill outlived the pipeline"
        time.sleep(0.2)

    second = start("make")
    while not (run.work / "retrain.pt").exists():
        assert second.poll() is None, second.stdout.read()
        time.sleep(0.2)
    os.killpg(second.pid, signal.SIGINT)  # Ctrl-C in a terminal
    output, _ = second.communicate()
    sentence, farewell = output.splitlines()[-2:]
    assert (
        second.returncode != 0
        and sentence == STOPPED
        and re.match(r"make(\[1\])?: \*\*\*", farewell)
    ), output
    assert "Traceback" not in output

    output = output_of(start("make"))
    assert "starting anew" not in output
    assert f"Run '{run.name}'\n  test accuracy" in output
    assert len(run.history("search")) == 3 and len(run.history("retrain")) == 2
    assert {"search", "retrain", "evaluate"} <= set(run.read_json("metrics.json"))
    assert json.loads((run.reports / "cost.json").read_text())["unit"] == "million Mult-Adds"
    page = (run.reports / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page), (
        "the report must read without a network"
    )

    config.write_text(config.read_text() + "# a comment\n")
    assert "Nothing to be done" in output_of(start("snakemake"))
    text = space.read_text()
    space.write_text(text.replace("48, 64]", "48, 72]"))
    output = output_of(start("snakemake", "--dry-run"))
    assert re.search(r"params have changed since last execution:\n\s+02-cost\n", output), output
    space.write_text(text)

    config.write_text(config.read_text().replace("retrain: {epochs: 2", "retrain: {epochs: 1"))
    before = {
        stage: (run.work / f"{stage}.done").stat().st_mtime_ns
        for stage in ("03-search", "05-retrain")
    }
    output_of(start("snakemake"))
    after = {stage: (run.work / f"{stage}.done").stat().st_mtime_ns for stage in before}
    assert after["03-search"] == before["03-search"] and after["05-retrain"] > before["05-retrain"]
    assert len(run.history("retrain")) == 1


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """The committed run of the digits, where it can be damaged."""
    monkeypatch.setenv("DENSENAS_ROOT", str(tmp_path))
    shutil.copytree(ROOT / "reports" / "digits", tmp_path / "reports" / "digits")
    return Run("digits")


def test_a_report_of_nothing_is_an_error(reported, monkeypatch, capsys):
    with refused(FileNotFoundError, r"run 'nope' has nothing to report: reports/nope is not there"):
        report.tell(Run("nope"))
    endings = {"": "required: RUN", "nope": "is not there", "a/b": "not usable as a folder name"}
    for arguments, ending in endings.items():
        monkeypatch.setattr(sys, "argv", ["report", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            report.main()
        assert ended.value.code not in (None, 0)
        assert ending in capsys.readouterr().err + str(ended.value.code)


@pytest.mark.parametrize(
    ("name", "content", "kind", "sentence"),
    [
        (
            "architecture.json",
            None,
            FileNotFoundError,
            r"no architecture\.json yet: run 04-derive first",
        ),
        ("provenance.json", None, FileNotFoundError, r"no '03-search' in provenance\.json yet"),
        (
            "metrics.json",
            "{}",
            FileNotFoundError,
            r"holds no result of 06-evaluate or 09-evidence yet",
        ),
        (
            "metrics.json",
            '{"data": {}, "search": {}, "evaluate": {}}',
            ValueError,
            r"reports/digits are incomplete.*run the stages of",
        ),
        ("metrics.json", '{"evalu', ValueError, r"metrics\.json is damaged: delete it"),
        ("figures/03-history.svg", None, FileNotFoundError, r"03-history\.svg"),
    ],
)
def test_half_a_run_is_reported_in_one_sentence(reported, name, content, kind, sentence):
    path = reported.reports / name
    path.unlink() if content is None else path.write_text(content)
    with refused(kind, sentence):
        report.tell(reported)


def test_a_damaged_run_does_not_stop_the_report_of_another(reported, capsys):
    for name in ("second", "my copy"):
        shutil.copytree(reported.reports, reported.reports.parent / name)
    (reported.reports.parent / "second/metrics.json").write_text("{")
    report.tell(reported)
    said = capsys.readouterr().out
    assert re.search(r"left out of the overview: .*second/metrics\.json is damaged", said)
    assert re.search(r"left out of the overview: run name 'my copy'", said)


def test_the_overview_lists_every_evaluated_run(reported, tmp_path):
    shutil.copytree(ROOT / "reports" / "digits", tmp_path / "reports" / "second")
    unfinished = tmp_path / "reports" / "unfinished"
    unfinished.mkdir()
    shutil.copy(ROOT / "reports" / "digits" / "architecture.json", unfinished)
    (unfinished / "evidence.html").touch()
    page = (tmp_path / report.write_overview()).read_text()
    pages = ["digits/index.html", "second/index.html", "unfinished/evidence.html"]
    assert re.findall(r'href="(.*?)"', page) == pages
    top1 = json.loads((ROOT / "reports" / "digits" / "metrics.json").read_text())["evaluate"][
        "top1"
    ]
    assert page.count(f">{100 * top1:.2f}</td>") == 2
    assert not re.search("https?://", page), "it must read without a network"
