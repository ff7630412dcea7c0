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

from densenas.config import PACKAGE, ROOT, read_text, write_text
from densenas.run import Run

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PACKAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)  # fmt: skip


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials (Wilson 1927)."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _derived() -> list[Run]:
    """Runs with an architecture. One that cannot be read is left out with a word: it must not stop another's report."""
    runs = []
    for path in sorted((ROOT / "reports").glob("*/architecture.json")):
        try:
            run = Run(path.parent.name)
            run.read_json("architecture.json")
            run.read_json("metrics.json")
        except ValueError as error:
            print(f"left out of the overview: {error}")
        else:
            runs.append(run)
    return runs


def all_runs() -> pd.DataFrame:
    """Every evaluated run: top1 and its interval in %, the target in the cost's own unit."""
    rows = []
    for run in _derived():
        metrics, arch = run.read_json("metrics.json"), run.read_json("architecture.json")
        if "evaluate" not in metrics:
            continue
        test, target = metrics["evaluate"], arch["target_cost"]
        low, high = wilson(test["top1"], test["images"])
        unit = arch["cost_unit"].replace("million", "M")
        rows.append({
            "name": run.name, "dataset": metrics["data"]["dataset"], "group": arch["space"],
            "top1": 100 * test["top1"], "low": 100 * low, "high": 100 * high, "images": test["images"],
            "cost": arch["mult_adds_m"], "target": f"{target} {unit}" if target else "none",
            "params": 1000 * arch["params_m"], "ms": test["ms"]["PyTorch"], "blocks": arch["blocks"],
            "layers": arch["layers"], "seconds": metrics["search"]["seconds"], "seed": arch["seed"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def write_overview() -> str:
    """Writes reports/index.html, all runs in one table that sorts; returns its path relative to the repository."""
    studies = sorted(path.parent.name for path in (ROOT / "reports").glob("*/evidence.html"))
    page = TEMPLATES.get_template("overview.html.j2").render(runs=all_runs().to_dict("records"), studies=studies)
    write_text(ROOT / "reports" / "index.html", page)
    return "reports/index.html"


def write_report(run: Run) -> str:
    """Writes index.html from the run's files; returns its path relative to the repository."""
    captions, folder = run.read_json("figures/captions.json"), run.reports / "figures"
    sources = {name: base64.b64encode((folder / f"{name}.svg").read_bytes()).decode() for name in captions}
    metrics, provenance = run.read_json("metrics.json"), run.read_json("provenance.json")
    content: dict[str, Any] = {
        **metrics,
        "run": run.name,
        "interval": wilson(metrics["evaluate"]["top1"], metrics["evaluate"]["images"]),
        "arch": run.read_json("architecture.json"),
        "captions": captions,
        "sources": sources,
        "parameters": {stage: yaml.safe_dump(entry["parameters"]) for stage, entry in provenance.items()},
        "environment": provenance["03-search"],
        "notebooks": sorted(path.name for path in run.reports.glob("*.ipynb")),
    }
    write_text(run.reports / "index.html", TEMPLATES.get_template("report.html.j2").render(content))
    return f"reports/{run.name}/index.html"


def write_study(run: Run) -> str:
    """Writes evidence.html, notebook 09 as it ran, without code; returns its path relative to the repository."""
    clean = TagRemovePreprocessor(remove_all_outputs_tags={"work"})
    exporter = HTMLExporter(template_name="basic", exclude_input=True, preprocessors=[clean])
    body, _ = exporter.from_filename(str(run.reports / "09-evidence.ipynb"))
    made = run.read_json("provenance.json")["09-evidence"]
    content = {
        "run": run.name, "data": run.read_json("metrics.json")["data"], "body": body,
        "parameters": yaml.safe_dump(made["parameters"]), "environment": made,
    }  # fmt: skip
    write_text(run.reports / "evidence.html", TEMPLATES.get_template("study.html.j2").render(content))
    # Where the README has a place for this study, its figure and result stand there.
    quoted = TEMPLATES.get_template("study.md.j2").render(run.read_json("metrics.json"), run=run.name, made=made)
    readme, place = ROOT / "README.md", rf"(<!-- {re.escape(run.name)} -->).*?(?=<!-- end -->)"
    if readme.is_file():  # not where DENSENAS_ROOT keeps runs apart
        text = re.sub(place, lambda match: f"{match[1]}\n{quoted}\n", read_text(readme), flags=re.DOTALL)
        write_text(readme, text)
    return f"reports/{run.name}/evidence.html"


def tell(run: Run) -> None:
    """Writes the run's pages and prints their summary.

    Raises FileNotFoundError or ValueError with one sentence where there is nothing to report.
    """
    metrics = run.read_json("metrics.json")
    if not {"evidence", "evaluate"} & set(metrics):
        have = "is not there" if not run.reports.is_dir() else "holds no result of 06-evaluate or 09-evidence yet"
        raise FileNotFoundError(f"run '{run.name}' has nothing to report: reports/{run.name} {have}")
    print(f"\nRun '{run.name}'")
    try:
        if "evidence" in metrics:
            _tell_study(run, metrics)
        if "evaluate" in metrics:
            _tell_run(run, metrics)
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        what = f"the files of reports/{run.name} are incomplete or of another version ({error})"
        raise ValueError(f"{what}: run the stages of '{run.name}' again") from None


def _tell_study(run: Run, metrics: dict[str, Any]) -> None:
    path, found = write_study(run), metrics["evidence"]["verdict"]
    print(f"{found}\n  {'report':<16} {path}, beside all runs in {write_overview()}\n")


def _tell_run(run: Run, metrics: dict[str, Any]) -> None:
    run.need(run.reports / "architecture.json", "04-derive")
    run.need(run.reports / "provenance.json", "01-data to 06-evaluate")
    test, arch = metrics["evaluate"], run.read_json("architecture.json")
    about = {"arch": arch, "interval": wilson(test["top1"], test["images"]), "path": write_report(run)}
    print(TEMPLATES.get_template("report.txt.j2").render(metrics, overview=write_overview(), **about))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m densenas.report", description=__doc__.partition(" `")[0])
    parser.add_argument("run", metavar="RUN", help="name of a run whose stages are done, a folder in reports/")
    try:
        tell(Run(parser.parse_args().run))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
