"""The report of a run: reports/<run>/index.html, one file that needs no network. `python -m densenas.report RUN`"""

from __future__ import annotations

import argparse
import base64
import math
import re
import sys
from typing import Any

import jinja2
import pandas as pd
import yaml
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from densenas.files import PACKAGE, read_text, root, write_text
from densenas.identity import credit, derived
from densenas.runs.run import Run

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PACKAGE / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials (Wilson 1927)."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


OVERVIEW = (
    "name",
    "dataset",
    "network",
    "group",
    "top1",
    "low",
    "high",
    "images",
    "cost",
    "target",
    "params",
    "ms",
    "blocks",
    "layers",
    "seconds",
    "seed",
)


def all_runs() -> pd.DataFrame:
    """Every evaluated run, and the network it tested: top1 and interval in %, cost in M Mult-Adds.

    `group` is the space it was derived from, or the network's own name. What only a search has
    (target, in the cost's own unit, seconds, seed) is missing where the tested network is not the
    one that the run derived.
    """
    rows = []
    for path in sorted((root() / "reports").glob("*/metrics.json")):
        try:
            rows += _evaluated(Run(path.parent.name))
        except (ValueError, KeyError, TypeError) as error:  # must not stop another run's report
            print(f"left out of the overview: {error}")
    return pd.DataFrame(rows, columns=OVERVIEW)


def _evaluated(run: Run) -> list[dict[str, Any]]:
    """The run's row of the overview, none before it is evaluated."""
    metrics, found = run.read_json("metrics.json"), run.read_json("architecture.json")
    if "evaluate" not in metrics:
        return []
    test, told = metrics["evaluate"], credit(metrics, found)
    low, high = wilson(test["top1"], test["images"])
    row = {
        "name": run.name,
        "dataset": metrics["data"]["dataset"],
        "network": told["network"],
        "group": told["network"],
        "top1": 100 * test["top1"],
        "low": 100 * low,
        "high": 100 * high,
        "images": test["images"],
        "cost": test["mult_adds_m"],
        "params": 1000 * test["params_m"],
        "ms": test.get("ms", {}).get("PyTorch"),
        "blocks": test.get("blocks"),
        "layers": test.get("layers"),
    }
    if told["derived"]:
        target, unit = found["target_cost"], found["cost_unit"].replace("million", "M")
        row |= {
            "group": found["space"],
            "target": f"{target} {unit}" if target else "none",
            "seconds": metrics["search"]["seconds"],
            "seed": found["seed"],
        }
    return [row]


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


def evaluation(run: Run) -> dict[str, Any]:
    """What a report says of an evaluated run: metrics.json, what was derived, and what was tested.

    Raises FileNotFoundError or ValueError with one sentence where a stage is missing, or was not
    run again.
    """
    stages = {"data": "01-data", "search": "03-search", "evaluate": "06-evaluate"}
    metrics = _sections(run, "metrics.json", stages)
    found, test = derived(run), metrics["evaluate"]
    return {
        **metrics,
        "retrain": metrics.get("retrain"),
        "run": run.name,
        "arch": found,
        "tested": credit(metrics, found),
        "interval": wilson(test["top1"], test["images"]),
    }


def write_report(run: Run) -> str:
    """Writes index.html from the run's files; returns its path relative to the repository."""
    content = evaluation(run)
    captions, folder = run.read_json("figures/captions.json"), run.reports / "figures"
    provenance = _sections(run, "provenance.json", {"03-search": "03-search"})
    sources = {
        name: base64.b64encode((folder / f"{name}.svg").read_bytes()).decode() for name in captions
    }
    content |= {
        "captions": captions,
        "sources": sources,
        "parameters": {
            stage: yaml.safe_dump(entry["parameters"]) for stage, entry in provenance.items()
        },
        "environment": provenance["03-search"],
        "notebooks": sorted(path.name for path in run.reports.glob("*.ipynb")),
    }
    write_text(run.reports / "index.html", TEMPLATES.get_template("report.html.j2").render(content))
    return f"reports/{run.name}/index.html"


def in_words(run: Run, path: str, overview: str) -> str:
    """The result of an evaluated run for the terminal, and where it and all runs are reported."""
    template = TEMPLATES.get_template("report.txt.j2")
    return template.render(evaluation(run), path=path, overview=overview)


def write_study(run: Run) -> str:
    """Writes evidence.html, notebook 09 as it ran, without code; returns its path relative to the repository."""
    clean = TagRemovePreprocessor(remove_all_outputs_tags={"work"})
    exporter = HTMLExporter(template_name="basic", exclude_input=True, preprocessors=[clean])
    body, _ = exporter.from_filename(str(run.reports / "09-evidence.ipynb"))
    made = _sections(run, "provenance.json", {"09-evidence": "09-evidence"})["09-evidence"]
    metrics = _sections(run, "metrics.json", {"data": "01-data"})
    content = {
        "run": run.name,
        "data": metrics["data"],
        "body": body,
        "parameters": yaml.safe_dump(made["parameters"]),
        "environment": made,
    }
    page = TEMPLATES.get_template("study.html.j2").render(content)
    write_text(run.reports / "evidence.html", page)
    # Where the README has a place for this study, its figure and result stand there.
    quoted = TEMPLATES.get_template("study.md.j2").render(metrics, run=run.name, made=made)
    readme = root() / "README.md"
    place = rf"(<!-- {re.escape(run.name)} -->).*?(?=<!-- end -->)"
    if readme.is_file():  # not where DENSENAS_ROOT keeps runs apart
        text = re.sub(
            place, lambda match: f"{match[1]}\n{quoted}\n", read_text(readme), flags=re.DOTALL
        )
        write_text(readme, text)
    return f"reports/{run.name}/evidence.html"


def tell(run: Run) -> None:
    """Writes the run's pages and prints their summary.

    Raises FileNotFoundError or ValueError with one sentence where there is nothing to report.
    """
    metrics = run.read_json("metrics.json")
    if not {"evidence", "evaluate"} & set(metrics):
        have = (
            "is not there"
            if not run.reports.is_dir()
            else "holds no result of 06-evaluate or 09-evidence yet"
        )
        raise FileNotFoundError(
            f"run '{run.name}' has nothing to report: reports/{run.name} {have}"
        )
    print(f"\nRun '{run.name}'")
    try:
        if "evidence" in metrics:
            _tell_study(run, metrics)
        if "evaluate" in metrics:
            print(in_words(run, write_report(run), write_overview()))
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        what = f"the files of reports/{run.name} are incomplete or of another version ({error})"
        raise ValueError(f"{what}: run the stages of '{run.name}' again") from None


def _tell_study(run: Run, metrics: dict[str, Any]) -> None:
    path, found = write_study(run), metrics["evidence"]["verdict"]
    print(f"{found}\n  {'report':<16} {path}, beside all runs in {write_overview()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m densenas.report", description=__doc__.partition(" `")[0]
    )
    parser.add_argument(
        "run", metavar="RUN", help="name of a run whose stages are done, a folder in reports/"
    )
    try:
        tell(Run(parser.parse_args().run))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
