"""Versions in one place, notebooks that explain themselves, a pipeline that goes on."""

import ast
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
from types import NoneType
from typing import get_args

import measures
import nbformat
import pytest
import torch
import yaml
from helpers import REPOSITORY as ROOT
from helpers import refused
from packaging.requirements import Requirement
from papermill import inspect_notebook
from torchvision.io import write_png

from densenas import Architecture, SearchSpace, pipeline, report
from densenas.files import PACKAGE
from densenas.pipeline import STOPPED, last_words
from densenas.preflight import COMMITTED, check_machine, checked, identify
from densenas.published import save_published
from densenas.recipes import RetrainRecipe, SearchRecipe, override
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.settings import (
    CostSettings,
    DataSettings,
    DeriveSettings,
    EvaluateSettings,
    RetrainSettings,
    RunConfig,
    SearchSettings,
    StudySettings,
)

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


def test_changelog_and_citation_are_of_the_projects_version():
    latest = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert latest[1] == citation["version"] == PROJECT["version"]
    assert latest[2] == str(citation["date-released"])
    assert citation["preferred-citation"]["year"] == 2020 and citation["license"] == "Apache-2.0"
    assert environment()["packages"]["densenas"] == PROJECT["version"]


# Of the package, as benchmarks/measures.py counts them: what may shrink, and not grow.
LIMITS = {
    "lines": 10_245,
    "lines of a file": 400,
    "lines of a function": 60,
    "percent of lines over 100 characters": 6,
    "zip, iter, next, map, chain in 100 lines": 1,
    "floors of imports": 9,
}


def test_the_package_grows_no_further():
    chain, circles = measures.floors(measures.imports())
    found = {
        "lines": measures.lines_of_all(),
        "lines of a file": measures.longest_file()[0],
        "lines of a function": measures.longest_function()[0],
        "percent of lines over 100 characters": measures.long_lines(),
        "zip, iter, next, map, chain in 100 lines": measures.folded_calls(),
        "floors of imports": len(chain),
    }
    assert not {name: found[name] for name in LIMITS if found[name] > LIMITS[name]}
    assert circles == []


def test_circles_and_floors_are_found():
    imported = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert measures.floors(imported) == (["a", "b", "c", "d"], [])
    imported["d"] = {"b"}
    assert measures.floors(imported)[1] == ["b", "c", "d"]


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
    for stage, parameters in RunConfig.load(path).parameters("any", 32).items():
        known = inspect_notebook(str(ROOT / f"notebooks/{stage}.ipynb"))
        assert set(parameters) == set(known)
        assert all(entry["help"] for entry in known.values())


def test_the_readmes_run_can_be_made(tmp_path, monkeypatch):
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for split, images in {"train": 700, "test": 10}.items():
        for label in ("cats", "dogs"):
            folder = tmp_path / "my-images" / split / label
            folder.mkdir(parents=True)
            for number in range(images):
                write_png(image, str(folder / f"{number}.png"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("mine.yml").write_text(text)
    config, _ = checked(Path("mine.yml"))
    assert config.search.target_cost and len(config.derive.budgets) == 2


@pytest.mark.parametrize(
    ("line", "wrong", "sentence"),
    [
        ("space: digits", "spcae: digits", r"no setting 'spcae'"),
        ("dataset: digits", "datset: digits", r"no setting 'data\.datset'"),
        ("dataset: digits", "dataset: digts", r"data\.dataset.*'digits'.*digts"),
        ("val_fraction: 0.2", "val_fraction: 1.5", r"val_fraction.*less than 1.*1\.5"),
        ("seed: 0", "seed: 0\nimage_size: 4", r"image_size.*8"),
        ("target_cost: 1.0", "epochs: 0", r"search\.epochs.*1"),
        (
            "target_cost: 1.0",
            "epochs: 2",
            r"run.yml: search: recipe: arch_start_epoch is 2, .*2 epochs",
        ),
        (
            "target_cost: 1.0",
            "recipe: {arch_lrr: 0.05}",
            r"run.yml: search: recipe: there is no setting 'arch_lrr', is it misspelled",
        ),
        (
            "target_cost: 1.0",
            "recipe: {momentum: 1.0}",
            r"search: recipe: momentum: .*less than 1",
        ),
        (
            "target_cost: 1.0",
            "recipe: {lr: 1e-1}",
            r"search: recipe: lr: .*number; YAML takes 1e-4 .*for text",
        ),
        ("target_cost: 1.0", "recipe: {seed: 1}", r"search: recipe: there is no setting 'seed'"),
        ("target_cost: 1.0", "recipe: [lr]", r"search\.recipe: .*dictionary"),
        (
            "target_cost: 1.0",
            "epochs: 20\n  recipe: {epochs: 30}",
            r"search: epochs is given twice, by itself and in recipe",
        ),
        ("target_cost: 1.0", "seed: 1", r"no setting 'search\.seed': it stands on top"),
        (
            "target_cost: 1.0",
            "target_cost: 1.0\nevidence: {targets: [1.0], search: {epochs: 2}}",
            r"no setting 'evidence\.search': it follows from the sections",
        ),
        ("seed: 0", "seed: [", r"not valid YAML"),
        (
            "target_cost: 1.0",
            "target_cost: 0.01",
            r"search\.target_cost: space digits has no architecture of 0\.0097 to 0\.0103 million",
        ),
        (
            "target_cost: 1.0",
            "target_cost: 400",
            r"search\.target_cost: .*no architecture of 388 to 412 million.*it reaches from .* to ",
        ),
        ("networks: 30", "networks: 1", r"cost\.networks: .*at least 3 networks"),
        ("networks: 30", "networks: 2", r"cost\.networks: .*at least 3 networks"),
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
            r"data: pack is 16, but training sees images of 32 pixels",
        ),
        (
            "dataset: digits",
            "dataset: digits\n  num_classes: all",
            r"data\.num_classes: expected a number of classes, or a list of their names.*'all'",
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
    with refused(ValueError, sentence):
        checked(path)


def test_the_file_of_a_run_decides_no_more_than_it_says(tmp_path):
    """Sizes and recipes that it leaves to the space are those of the space, of whatever size."""
    path = tmp_path / "run.yml"
    path.write_text("space: small\ndata: {pack: 20}\nsearch: {recipe: {arch_lr: 0.05}}\n")
    config = RunConfig.load(path)
    assert config.data_settings(16).image_size == 16
    with refused(ValueError, "data: pack is 20, but training sees images of 32 pixels"):
        config.data_settings(32)
    assert config.search.overrides() == {"arch_lr": 0.05}


@pytest.mark.parametrize("recipe", [SearchRecipe, RetrainRecipe])
def test_every_field_of_a_recipe_can_be_set_in_a_runs_file(tmp_path, recipe):
    section, base = "search", SearchSpace.load("digits").search
    if recipe is RetrainRecipe:
        section, base = "retrain", RetrainRecipe(grad_clip=1.0)
    other = {
        "epochs": 97,
        "arch_betas": [0.25, 0.75],
        "arch_start_epoch": 5,
        "batch_size": 34,
        "log_base": 3.5,
        "grad_clip": None,
        "loss": "my_losses:focal",
        "paths": "all",
        "weights": "own",
    }
    values = {name: other.get(name, 0.0625) for name in recipe.model_fields}
    path = tmp_path / "run.yml"
    config = {"space": "digits", "data": {}, section: {"recipe": values}}
    path.write_text(yaml.safe_dump(config))
    settings = getattr(RunConfig.load(path), section)
    assert override(base, **settings.overrides()).model_dump(mode="json") == values


def test_the_papers_two_resnets_are_one_number_apart():
    config, space = (
        RunConfig.load(ROOT / "data/configs/imagenet-resnet.yml"),
        SearchSpace.load("resnet"),
    )
    searched = override(space.search, **config.search.overrides())
    assert (space.search.log_base, searched.log_base) == (3500, 1700)  # DenseNAS-R2, DenseNAS-R1
    assert searched == override(space.search, log_base=1700.0)


STAGES = {
    "01-data": DataSettings,
    "02-cost": CostSettings,
    "03-search": SearchSettings,
    "04-derive": DeriveSettings,
    "05-retrain": RetrainSettings,
    "06-evaluate": EvaluateSettings,
    "09-evidence": StudySettings,
}


def parameters_of(stage):
    """What the notebook's parameter cell sets."""
    notebook = nbformat.read(ROOT / f"notebooks/{stage}.ipynb", as_version=4)
    (cell,) = [one for one in notebook.cells if "parameters" in one.metadata.get("tags", [])]
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebooks_parameters_are_its_stages_settings(stage):
    variables = parameters_of(stage)
    assert set(variables) == {"run", *STAGES[stage].model_fields}
    settings = STAGES[stage].of(variables)
    assert settings.model_dump(mode="json") == {
        name: variables[name] for name in settings.model_fields_set
    }


# As papermill reads `-p NAME VALUE`: no is a text, 1e2 a float.
MISREAD = {
    bool: ["no", "yes", "0", 0, 1, None],
    int: [100.0, "1e2", "7", True, "None"],
    float: ["0.5", "1e-1", True, float("nan"), float("inf")],
    str: [7, 1.5, True],
}


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        (stage, name, value)
        for stage, model in STAGES.items()
        for name, field in model.model_fields.items()
        for kind in MISREAD
        if kind in (field.annotation, *get_args(field.annotation)[:1])
        for value in MISREAD[kind]
        if value is not None or NoneType not in get_args(field.annotation)
    ],
)
def test_a_value_of_another_type_is_refused_before_anything_runs(stage, name, value):
    with refused(ValueError, rf"^parameters: {name}[.:]"):
        STAGES[stage].of({**parameters_of(stage), name: value})


def test_a_run_is_named_by_its_file_unless_by_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yml", "a b.yml", "007.yml"):
        Path(name).touch()
    assert identify("", "mine.yml") == ("mine", Path("mine.yml"))
    assert identify("", "007.yml")[0] == "007"
    assert identify("1_0", "a b.yml") == ("1_0", Path("a b.yml"))
    assert identify("cifar10-mbv2") == ("cifar10-mbv2", ROOT / "data/configs/cifar10-mbv2.yml")
    assert identify(usual="evidence-digits")[0] == "evidence-digits"
    assert identify("cifar10", "mine.yml")[0] == "cifar10", "whoever says so means it"
    for name in COMMITTED:
        assert (ROOT / "reports" / name).is_dir()
        Path(f"{name}.yml").touch()
        replaced = (
            rf"a run called '{name}' would replace the committed reports/{name}; name the run"
        )
        with refused(ValueError, replaced):
            identify("", f"{name}.yml")
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
    """The configuration of a run on forty images a class, in a space and with a network of the user's own."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(40):
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
        ("/space.yml", "/spce.yml", FileNotFoundError, r"run\.yml: no search space '.*spce\.yml'"),
        ("/images", "/images/cat", ValueError, r"run\.yml: data: "),
        (
            "epochs: 2,",
            "target_cost: 1.0e-9, epochs: 2,",
            ValueError,
            r"run\.yml: search\.target_cost: space space has no architecture of 9\.7e-10",
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
            r"search\.batch_size is 99, but val has \d+ images: set batch_size to at most that",
        ),
        (
            "1, batch_size: 8}\nretrain",
            "1}\nretrain",
            ValueError,
            r"search\.batch_size is 32, but val has \d+ images",
        ),
        (
            "epochs: 1,",
            "devices: 3, epochs: 1,",
            ValueError,
            r"retrain\.batch_size 8 cannot be shared equally by 3 devices",
        ),
        (
            "epochs: 1,",
            "devices: 8, epochs: 1,",
            ValueError,
            r"retrain\.batch_size 8 on 8 devices is less than .* at least 16",
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
    monkeypatch.setattr("densenas.own.SEEN", {})
    assert changed(before) == {"05-retrain", "06-evaluate"}


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("ValueError: the sentence: with colons\n\n", "03-search: the sentence: with colons"),
        ("KeyboardInterrupt\n", STOPPED),
        ("error: a job's own: sentence\n", "03-search: a job's own: sentence"),
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
    output = output_of(start("snakemake", "--dry-run"))
    planned = set(re.findall(r"^(0\d-\w+) +1$", output, flags=re.MULTILINE))
    assert planned == {"05-retrain", "06-evaluate", "07-figures"}, output
