"""Networks of other sizes from one search, a run that goes by its file's name, and a checkout that stays as it was."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from helpers import DATA, SEARCH, SMALL, TABLE, refused
from helpers import REPOSITORY as ROOT

from densenas import Architecture, CostTable, SearchSpace, pipeline
from densenas.budgets import train_budget
from densenas.method.derivation import Lattice
from densenas.networks import as_model, load_network
from densenas.outcome import finished_search, write_architecture
from densenas.preflight import checked
from densenas.report import curve, wilson
from densenas.runs.run import Run
from densenas.search import search_run
from densenas.settings import DeriveSettings, EvaluateSettings, RetrainSettings, SearchSettings
from densenas.train import evaluate_run, retrain_run

SHORT = RetrainSettings(epochs=1, batch_size=8, device="cpu")
CHEAP, DEAR = (float(f"{Lattice(TABLE).quantile(share):g}") for share in (0.2, 0.8))


@pytest.fixture
def searched(run, monkeypatch):
    """A finished search of seconds, without a target; two budgets are kept."""
    for module in ("search", "outcome", "train", "budgets"):
        monkeypatch.setattr(f"densenas.{module}.load", lambda _: DATA)
    table = CostTable.mult_adds(SMALL.model_copy(update={"search": SEARCH}), 16, 3)
    run.reports.mkdir(parents=True)
    table.write(run.reports / "cost.json")
    search_run(run.name, SearchSettings(device="cpu"))
    write_architecture(run, finished_search(run), (CHEAP, DEAR))
    return run


def file_of(run, budget):
    return run.reports / "budgets" / f"{budget:g}" / "net_config"


def test_each_budget_is_the_supernets_network_there_kept_as_a_file(searched):
    result = finished_search(searched)
    record = searched.read_json("architecture.json")
    assert record["net_config"] == str(result.best.architecture), "the run's own is what it was"
    assert [entry["budget"] for entry in record["budgets"]] == [CHEAP, DEAR]
    for entry in record["budgets"]:
        found = Lattice(result.table, result.trace[-1]).at(entry["budget"])
        assert entry["net_config"] == str(found.architecture)
        assert entry["cost"] == pytest.approx(entry["budget"], rel=0.03)
        assert entry["params_m"] == found.architecture.params(3)
        assert as_model(str(file_of(searched, entry["budget"]))) == entry["net_config"]


def test_a_budget_that_no_network_has_leaves_the_files_as_they_were(searched):
    before = (searched.reports / "architecture.json").read_bytes()
    with refused(ValueError, r"no architecture of 970 to 1030 .*it reaches from"):
        write_architecture(searched, finished_search(searched), (CHEAP, 1000.0))
    assert (searched.reports / "architecture.json").read_bytes() == before


def test_a_file_is_trained_as_the_network_that_it_holds(searched):
    path = file_of(searched, CHEAP)
    retrain_run(searched.name, SHORT.model_copy(update={"net_config": str(path)}))
    trained = searched.read_json("metrics.json")["retrain"]
    assert Architecture.parse(trained["net_config"]) == Architecture.parse(as_model(str(path)))
    path.write_text("[[4, 4], 'mbconv_k3_t1'")
    with refused(ValueError, r"budgets/.*/net_config: "):
        retrain_run(searched.name, SHORT.model_copy(update={"net_config": str(path)}))
    path.unlink()
    with refused(ValueError, r"no network .*, expected .* a net_config or a file"):
        retrain_run(searched.name, SHORT.model_copy(update={"net_config": str(path)}))


def test_a_budgets_training_leaves_the_runs_own_alone(searched):
    retrain_run(searched.name, SHORT)
    evaluate_run(searched, EvaluateSettings(device="cpu"))
    own = searched.read_json("metrics.json"), (searched.work / "model/weights.pt").read_bytes()
    train_budget(searched, SHORT, CHEAP)
    assert (
        searched.read_json("metrics.json"),
        (searched.work / "model/weights.pt").read_bytes(),
    ) == own
    place = searched.budget(CHEAP)
    metrics, entry = (
        place.read_json("metrics.json"),
        searched.read_json("architecture.json")["budgets"][0],
    )
    assert (
        metrics["evaluate"]["net_config"] == metrics["retrain"]["net_config"] == entry["net_config"]
    )
    assert 0 <= metrics["supernet"]["path_top1"] <= 1
    assert str(load_network(place.work / "model", 3).arch) == entry["net_config"]
    recorded = place.read_json("provenance.json")["05-retrain"]["parameters"]
    assert recorded["recipe"]["epochs"] == 1
    with refused(
        FileNotFoundError, r"has no network at 99: run 04-derive with that among its budgets"
    ):
        train_budget(searched, SHORT, 99.0)


def test_the_curve_holds_what_was_tested_and_no_earlier_searchs_networks(searched):
    assert curve(searched).empty
    retrain_run(searched.name, SHORT)
    evaluate_run(searched, EvaluateSettings(device="cpu"))
    for budget in (CHEAP, DEAR):
        train_budget(searched, SHORT, budget)
    points = curve(searched)
    assert len(points) == 3 and points["cost"].is_monotonic_increasing
    cheap = points[points["budget"] == CHEAP].iloc[0]
    test = searched.budget(CHEAP).read_json("metrics.json")["evaluate"]
    assert cheap["top1"] == 100 * test["top1"]
    assert (cheap["low"], cheap["high"]) == tuple(100 * end for end in wilson(test["top1"], 10))
    of_dear = searched.budget(DEAR).read_json("metrics.json")["evaluate"]
    searched.budget(CHEAP).update_json("metrics.json", "evaluate", {**of_dear, "top1": 1.0})
    assert CHEAP not in [*curve(searched)["budget"]], "another network's accuracy"


def test_a_budget_in_milliseconds_is_checked_where_a_table_has_them(tmp_path, monkeypatch):
    """Before the search, which takes hours, not behind it."""
    table = replace(CostTable.mult_adds(SearchSpace.load("digits"), 32, 10), kind="latency")
    monkeypatch.setattr("densenas.preflight.read_times", lambda *_: table)
    path = tmp_path / "run.yml"
    cost = "cost: {kind: latency, table: times.json}"
    path.write_text(
        f"space: digits\ndata: {{dataset: digits}}\n{cost}\nderive: {{budgets: [400]}}\n"
    )
    with refused(ValueError, r"derive\.budgets: space digits has no architecture of 388 to 412 ms"):
        checked(path)


@pytest.mark.parametrize(
    ("budgets", "sentence"),
    [
        ("[0.6, 400]", r"derive\.budgets: space digits has no architecture of 388 to 412 million"),
        ("[0.6, 0.6000000001]", r"derive\.budgets: 0\.6 is there twice"),
        ("[0]", r"derive\.budgets\.0: .*greater than 0"),
        ("0.6", r"derive\.budgets: Input should be a list \(got 0\.6\)"),
        ("'[0.6]'", r"derive\.budgets: Input should be a list; papermill takes one by -y, not by"),
    ],
)
def test_budgets_that_cannot_be_are_refused_before_anything_runs(budgets, sentence, tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(f"space: digits\ndata: {{dataset: digits}}\nderive: {{budgets: {budgets}}}\n")
    with refused(ValueError, sentence):
        checked(path)
    assert DeriveSettings(budgets=[1.23456789]).budgets == (1.23457,), "as its folder is called"


# The pipeline as a user starts it.

CONFIG = {
    "space": "digits",
    "data": {"dataset": "digits"},
    "search": {"epochs": 1, "arch_start_epoch": 0, "batch_size": 256},
    "derive": {"budgets": [0.6]},
    "retrain": {"epochs": 1, "batch_size": 256},
}


def make(root, configuration, *arguments):
    """As a user types it: `make test` hands its own flags down, by which an inner make says more."""
    terminal = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", "-o", ".venv/installed", *arguments, f"CONFIG={configuration}"],
        cwd=ROOT,
        env={**terminal, "DENSENAS_ROOT": str(root)},
        text=True,
        capture_output=True,
    )


def test_make_trains_the_budgets_of_a_run_that_goes_by_its_files_name(root):
    path = root / "my.yml"
    path.write_text(yaml.safe_dump(CONFIG))
    first = make(root, path, "reproduce")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    run = Run("my")
    assert [folder.name for folder in (root / "reports").iterdir() if folder.is_dir()] == ["my"]
    assert (root / "runs/my/budgets/0.6.done").exists()
    assert len(curve(run)) == 2 and "07-budgets" in run.read_json("figures/captions.json")
    assert re.search(r"Run 'my'\n.*\n  at 0\.6 +\d+\.\d\d% ", first.stdout, flags=re.DOTALL)
    page = (run.reports / "index.html").read_text()
    assert "The same search at other costs" in page and 'id="07-accuracy"' not in page

    path.write_text(yaml.safe_dump({**CONFIG, "derive": {"budgets": [0.6, 1.6]}}))
    snakemake = shutil.which("snakemake", path=os.path.dirname(sys.executable))
    plan = [snakemake, "--nolock", "--dry-run", "--cores", "2", "--config", "run=my"]
    planned = subprocess.run(
        [*plan, f"configuration={path}"], cwd=ROOT, text=True, capture_output=True
    ).stdout
    jobs = dict(re.findall(r"^(\S+) +(\d+)$", planned, flags=re.MULTILINE))
    assert jobs["04-derive"] == "1" and jobs["budget"] == "2" and "03-search" not in jobs


@pytest.mark.parametrize(("target", "command"), [([], "reproduce"), (["evidence"], "evidence")])
def test_a_run_of_ones_own_goes_by_its_files_name(target, command, root, monkeypatch):
    started, told = [], []
    monkeypatch.setattr(pipeline, "run_snakemake", lambda *what: started.append(what))
    monkeypatch.setattr("densenas.report.tell", told.append)
    monkeypatch.setattr(pipeline, "_handle", lambda handler: None)
    path = root / "mine.yml"
    path.write_text(yaml.safe_dump({**CONFIG, "evidence": {"targets": [1.0]}}))
    monkeypatch.setenv("CONFIG", str(path))
    monkeypatch.setenv("RUN", "")
    monkeypatch.setattr(sys, "argv", ["pipeline", *target])
    pipeline.main()
    assert started == [(root, "mine", path, target)]
    assert [run.name for run in told] == ["mine"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"dataset": "folder"}, "data: data set 'folder' needs source"),
        ({"dataset": "folder", "source": "nowhere"}, "data: source 'nowhere' is not a folder"),
        ({"dataset": "folder", "source": "{one}"}, "data: only the class 'cat' is there"),
    ],
)
def test_a_mistake_in_the_data_is_all_that_make_says(data, sentence, root):
    (root / "images/cat").mkdir(parents=True)
    for name in "abcd":
        shutil.copy(
            next((ROOT / "reports/examples").rglob("*.png")), root / f"images/cat/{name}.png"
        )
    if "source" in data:
        data = {**data, "source": data["source"].format(one=root / "images")}
    path = root / "my.yml"
    path.write_text(yaml.safe_dump({**CONFIG, "data": data}))
    made = make(root, path, "reproduce")
    said = (made.stdout + made.stderr).strip().splitlines()
    assert made.returncode != 0 and len(said) == 2, said
    assert said[0].startswith(f"{path}: {sentence}") and re.match(r"make(\[1\])?: \*\*\*", said[1])


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_what_a_run_leaves_is_no_change_of_the_checkout():
    places = ["reports/digits/index.html", "reports/my/figures/04-path.svg", "reports/index.html"]
    places += ["runs/digits/search.pt", ".snakemake/log", "reports/evidence-digits/evidence.csv"]
    ignored = git("check-ignore", "--no-index", *places)
    assert ignored.stdout.split() == places, ignored.stderr
    kept = {line.split("/")[1] for line in git("ls-files", "reports").stdout.splitlines()}
    assert kept == {"README.md", "examples", "cifar10"}
