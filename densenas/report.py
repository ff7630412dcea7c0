"""The report of a run: reports/<run>/index.html, one file that needs no network. `python -m densenas.report RUN`"""

from __future__ import annotations

import argparse
import base64
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from densenas import card
from densenas.correlations import wilson
from densenas.files import read_text, root, write_text
from densenas.identity import check_images, credit, derived
from densenas.runs.run import Run
from densenas.settings import WITHIN
from densenas.training.processes import exiting
from densenas.verdict import RANDOM, SEARCHED

TEMPLATES = card.TEMPLATES.overlay(autoescape=True)


# Columns of `all_runs`: what every evaluated run has, what only some have, what only a derived network has.
OVERVIEW = (
    "name",
    "dataset",
    "network",  # tested, in words
    "group",  # the space it was derived from, or the network's own name
    "top1",  # %
    "low",  # of its 95 % interval, %
    "high",
    "images",
    "test",  # a digest of these, missing where 01-data is of an earlier version
    "cost",  # million Mult-Adds
    "target",  # in the cost's own unit
    "params",  # thousands
    "ms",
    "blocks",
    "layers",
    "seconds",  # of the search
    "seed",
)


def all_runs() -> pd.DataFrame:
    """Every evaluated run, and the network it tested; a column is missing a value where a run has none."""
    rows = []
    for path in sorted((root() / "reports").glob("*/metrics.json")):
        try:
            run = Run(path.parent.name)
            metrics = run.read_json("metrics.json")
            if "evaluate" in metrics:
                rows.append(_overview_row(run, metrics))
        except (ValueError, KeyError, TypeError) as error:  # must not stop another run's report
            print(f"left out of the overview: {error}")
    return pd.DataFrame(rows, columns=OVERVIEW)


def _overview_row(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    found = run.read_json("architecture.json")
    test = metrics["evaluate"]
    check_images(run, test.get("data"), metrics["data"]["digest"], "06-evaluate")
    tested = credit(metrics, found)
    low, high = wilson(test["top1"], test["images"])
    row = {
        "name": run.name,
        "dataset": _images(run, metrics["data"]),
        "network": tested.network,
        "group": tested.network,
        "top1": 100 * test["top1"],
        "low": 100 * low,
        "high": 100 * high,
        "images": test["images"],
        "test": metrics["data"].get("test_digest"),
        "cost": test["mult_adds_m"],
        "params": 1000 * test["params_m"],
        "ms": test.get("ms", {}).get("PyTorch"),
        "blocks": test.get("blocks"),
        "layers": test.get("layers"),
    }
    if tested.derived:
        target = found["target_cost"]
        unit = found["cost_unit"].replace("million", "M")
        row["group"] = found["space"]
        row["target"] = f"{target} {unit}" if target else "none"
        row["seconds"] = metrics["search"]["seconds"]
        row["seed"] = found["seed"]
    return row


def _images(run: Run, data: dict[str, Any]) -> str:
    """What tells a run's images from those of others: the data set, or the name of the folder that they came from."""
    if data["dataset"] != "folder":
        return str(data["dataset"])
    source = run.read_json("provenance.json")["01-data"]["parameters"]["source"]
    return f"folder {Path(source).name}"


def curve(run: Run) -> pd.DataFrame:
    """What one search gives at several costs: the networks that were trained alone and tested, cheapest first.

    The run's own and those at its budgets; `cost` is in the table's unit, top1, its 95 % interval (low, high) and
    path_top1 (on val, as a path of the supernet; missing where it was not measured) in %, params in thousands.
    """
    found = derived(run)
    own = run.read_json("metrics.json")
    images = own.get("data", {}).get("digest")
    trained = [(found, own)]
    for entry in found.get("budgets", []):
        trained.append((entry, run.budget(entry["budget"]).read_json("metrics.json")))
    rows = []
    for network, metrics in trained:
        test = metrics.get("evaluate", {})
        if test.get("net_config") != network["net_config"]:
            continue  # not tested yet, or another one was
        if images not in (None, test.get("data", images)):
            continue  # it was tested on others
        low, high = wilson(test["top1"], test["images"])
        path = metrics.get("supernet", metrics.get("search", {})).get("path_top1")
        row = {
            "budget": network.get("budget") or found["target_cost"] or math.nan,
            "cost": network["cost"],
            "params": 1000 * network["params_m"],
            "blocks": network["blocks"],
            "layers": network["layers"],
            "top1": 100 * test["top1"],
            "low": 100 * low,
            "high": 100 * high,
            "path_top1": math.nan if path is None else 100 * path,
        }
        rows.append(row)
    return pd.DataFrame(rows).sort_values("cost", ignore_index=True) if rows else pd.DataFrame()


def write_overview() -> str:
    """Writes reports/index.html, all runs in one table that sorts; returns its path relative to the repository."""
    studies = sorted(path.parent.name for path in (root() / "reports").glob("*/evidence.html"))
    runs = all_runs().astype(object)
    rows = runs.where(runs.notna(), None).to_dict("records")
    page = TEMPLATES.get_template("overview.html.j2").render(runs=rows, studies=studies)
    write_text(root() / "reports" / "index.html", page)
    return "reports/index.html"


def _sections(run: Run, name: str, stages: dict[str, str]) -> dict[str, Any]:
    """A file of the report folder; FileNotFoundError where a stage has not written its section."""
    content = run.read_json(name)
    for section, stage in stages.items():
        if section not in content:
            lacks = f"has no '{section}' in {name} yet"
            raise FileNotFoundError(f"run '{run.name}' {lacks}: run {stage} first")
    return content


# Of a search's entropies, up to which it has decided how far; 1 is a uniform choice.
SURE = ((0.1, "certain"), (0.5, "fairly sure"), (0.9, "unsure"), (1.0, "undecided"))


def _decision(search: dict[str, Any], found: dict[str, Any], data: dict[str, Any]) -> str:
    """In words, how sure the search was at its end, and by what rule its network was taken from it."""
    said: dict[str, list[str]] = {}
    for name, what in (("beta_entropy", "paths"), ("alpha_entropy", "operations")):
        entropy = search[name]
        sure = next(words for most, words in SURE if entropy <= most or most == 1)
        said.setdefault(sure, []).append(f"{what} (entropy {entropy:.2f})")
    how = [f"{sure} about {' and '.join(of)}" for sure, of in said.items()]
    rule = "the most probable path with its most probable operations"
    if found["target_cost"]:
        rule = f"the most probable one within 3 % of {found['target_cost']} {found['cost_unit']}"
    end = f"At its end the search was {' and '.join(how)}, 1 being a uniform choice"
    return f"{end}; its network is {rule}.{_path(search, data)}"


def _path(search: dict[str, Any], data: dict[str, Any]) -> str:
    """In words, whether the supernet knew the network that was taken from it."""
    alone, steps = search.get("path_top1"), search["val_top1"]
    if alone is None:
        return ""
    words = "its weights fit that network"
    if wilson(alone, data["val"])[0] <= 1 / data["classes"]:
        words = "no better than chance"
    elif alone <= steps - 0.05:
        words = "its weights hardly fit that network"
    of = "of its val images by the supernet's weights, the last epoch's steps"
    return f" Alone, that network got {alone:.0%} {of} {steps:.0%}: {words}."


def _baseline(run: Run, test: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any] | None:
    """What the run's study says of networks without a search that cost as much as the tested one, `trained` alike.

    The random ones where there are some, else the best hand-made design. None without a study, or where its networks
    cost something else or were trained or tested otherwise.
    """
    path = run.reports / "evidence.csv"
    if not path.is_file():
        return None
    how = run.read_json("metrics.json")["evidence"].get("how")
    rows = pd.read_csv(path)
    apart = (rows["mult_adds_m"] / test["mult_adds_m"] - 1).abs()
    rows = rows[(apart <= WITHIN) & (rows["epochs"] == trained.get("epochs"))]
    rows = rows[rows["method"] != SEARCHED]
    if rows.empty or how is None or how != trained.get("how"):
        return None
    means = rows.groupby("design")["top1"].agg(["mean", "min", "max", "size"])
    design = RANDOM if RANDOM in means.index else means["mean"].idxmax()
    return {"design": design, **means.loc[design].to_dict()}


def evaluation(run: Run) -> dict[str, Any]:
    """What a report says of an evaluated run: metrics.json, what was derived (`arch`), and what was tested (`tested`).

    Raises FileNotFoundError or ValueError with one sentence where a stage is missing, or was not run again.
    """
    stages = {"data": "01-data", "search": "03-search", "evaluate": "06-evaluate"}
    metrics = _sections(run, "metrics.json", stages)
    found = derived(run)
    test = metrics["evaluate"]
    check_images(run, test.get("data"), metrics["data"]["digest"], "06-evaluate")
    return {
        **metrics,
        "retrain": metrics.get("retrain"),
        "run": run.name,
        "arch": found,
        "device": run.read_json("cost.json")["conditions"].get("device"),
        "tested": credit(metrics, found),
        "interval": wilson(test["top1"], test["images"]),
        "curve": curve(run).to_dict("records"),
    }


def write_report(run: Run) -> str:
    """Writes index.html from the run's files; returns its path relative to the repository."""
    content = evaluation(run)
    captions = run.read_json("figures/captions.json")
    provenance = _sections(run, "provenance.json", {"03-search": "03-search"})
    sources = {}
    for name in captions:
        figure = (run.reports / "figures" / f"{name}.svg").read_bytes()
        sources[name] = base64.b64encode(figure).decode()
    parameters = {}
    for stage, entry in provenance.items():
        parameters[stage] = yaml.safe_dump(entry["parameters"])
    content["baseline"] = _baseline(run, content["evaluate"], content["retrain"] or {})
    content["decision"] = _decision(content["search"], content["arch"], content["data"])
    content["captions"] = captions
    content["sources"] = sources
    content["parameters"] = parameters
    content["environment"] = provenance["03-search"]
    content["notebooks"] = sorted(path.name for path in run.reports.glob("*.ipynb"))
    page = TEMPLATES.get_template("report.html.j2").render(content)
    write_text(run.reports / "index.html", page)
    return f"reports/{run.name}/index.html"


def in_words(run: Run, path: str, overview: str) -> str:
    """The result of an evaluated run for the terminal, and where it and all runs are reported."""
    template = TEMPLATES.get_template("report.txt.j2")
    return template.render(evaluation(run), path=path, overview=overview)


def write_study(run: Run) -> str:
    """Writes evidence.html, notebook 09 as it ran, without code; returns its path relative to the repository.

    Where README.md has a place for this study, its figure and result are written there.
    """
    tags = TagRemovePreprocessor(remove_all_outputs_tags={"work"}, remove_cell_tags={"demo"})
    exporter = HTMLExporter(template_name="basic", exclude_input=True, preprocessors=[tags])
    body, _ = exporter.from_filename(str(run.reports / "09-evidence.ipynb"))
    provenance = _sections(run, "provenance.json", {"09-evidence": "09-evidence"})["09-evidence"]
    metrics = _sections(run, "metrics.json", {"data": "01-data", "evidence": "09-evidence"})
    then = metrics["evidence"].get("how", {}).get("data")
    check_images(run, then, metrics["data"]["digest"], "09-evidence")
    body = re.sub("<h1.*?</h1>", "<h2>How this was asked</h2>", body, count=1, flags=re.DOTALL)
    page = TEMPLATES.get_template("study.html.j2").render(
        run=run.name,
        data=metrics["data"],
        evidence=metrics["evidence"],
        body=body,
        parameters=yaml.safe_dump(provenance["parameters"]),
        environment=provenance,
    )
    write_text(run.reports / "evidence.html", page)
    quote = TEMPLATES.get_template("study.md.j2").render(
        metrics, run=run.name, provenance=provenance, ways=[*provenance["parameters"]["searches"]]
    )
    readme = root() / "README.md"
    if readme.is_file():  # not where DENSENAS_ROOT keeps runs apart
        # Between the comments <!-- name --> and <!-- end -->, if it has these.
        start = f"<!-- {run.name} -->"
        place = rf"{re.escape(start)}.*?(?=<!-- end -->)"
        text = re.sub(place, lambda _: f"{start}\n{quote}\n", read_text(readme), flags=re.DOTALL)
        write_text(readme, text)
    return f"reports/{run.name}/evidence.html"


def tell(run: Run) -> None:
    """Writes the run's pages and prints their summary.

    Raises FileNotFoundError or ValueError with one sentence where there is nothing to report.
    """
    metrics = run.read_json("metrics.json")
    if "evidence" not in metrics and "evaluate" not in metrics:
        lacks = "is not there"
        if run.reports.is_dir():
            lacks = "holds no result of 06-evaluate or 09-evidence yet"
        nothing = f"run '{run.name}' has nothing to report"
        raise FileNotFoundError(f"{nothing}: reports/{run.name} {lacks}")
    print(f"\nRun '{run.name}'")
    try:
        if "evidence" in metrics:
            path = write_study(run)
            print(metrics["evidence"]["verdict"])
            print(f"  report           {path}, beside all runs in {write_overview()}\n")
        if "evaluate" in metrics:
            path = write_report(run)
            print(in_words(run, path, write_overview()))
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        other = f"the files of reports/{run.name} are incomplete or of another version ({error})"
        raise ValueError(f"{other}: run the stages of '{run.name}' again") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m densenas.report", description=__doc__.partition(" `")[0]
    )
    parser.add_argument(
        "run", metavar="RUN", help="name of a run whose stages are done, a folder in reports/"
    )
    with exiting():
        tell(Run(parser.parse_args().run))


if __name__ == "__main__":
    main()
