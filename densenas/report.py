"""The report of a run: reports/<run>/index.html, one file that needs no network. `python -m densenas.report RUN`"""

from __future__ import annotations

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
# Columns of the overview with their heads.
COLUMNS = {
    "name": "run", "dataset": "data", "group": "space", "top1": "test top-1 (%)", "low": "from", "high": "to",
    "images": "test images", "cost": "Mult-Adds (M)", "target": "target", "params": "parameters (k)",
    "ms": "ms an image", "blocks": "blocks", "layers": "layers", "seconds": "search (s)", "seed": "seed",
}  # fmt: skip


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials (Wilson 1927)."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def headline(run: Run) -> dict[str, str]:
    """The run's main numbers in words, from its files."""
    metrics, arch = run.read_json("metrics.json"), run.read_json("architecture.json")
    test, search, training = metrics["evaluate"], metrics["search"], metrics["retrain"]
    low, high = wilson(test["top1"], test["images"])
    return {
        "test accuracy": f"{test['top1']:.2%} of {test['images']} images (95 % interval {low:.1%} to {high:.1%})",
        "derived network": f"{arch['mult_adds_m']:.3f} M Mult-Adds, {arch['params_m'] * 1000:.1f} k parameters,"
        f" {arch['blocks']} routing blocks, {arch['layers']} layers",
        "search": f"{search['epochs']} epochs in {search['seconds']:.0f} s, val accuracy {search['val_top1']:.1%}",
        "retraining": f"{training['epochs']} epochs in {training['seconds']:.0f} s",
    }


def all_runs() -> pd.DataFrame:
    """Every evaluated run with what COLUMNS names; top1 and its interval in %, the target in the cost's own unit."""
    rows = []
    for folder in sorted((ROOT / "reports").glob("*/architecture.json")):
        run = Run(folder.parent.name)
        metrics, arch = run.read_json("metrics.json"), run.read_json("architecture.json")
        if "evaluate" not in metrics:
            continue
        test, target = metrics["evaluate"], arch["target_cost"]
        low, high = wilson(test["top1"], test["images"])
        unit = arch["cost_unit"].replace("million", "M")
        rows.append([
            run.name, metrics["data"]["dataset"], arch["space"], 100 * test["top1"], 100 * low, 100 * high,
            test["images"], arch["mult_adds_m"], f"{target} {unit}" if target else "none",
            1000 * arch["params_m"], test["ms"]["PyTorch"], arch["blocks"], arch["layers"],
            metrics["search"]["seconds"], arch["seed"],
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=[*COLUMNS])


def write_overview() -> str:
    """Writes reports/index.html, all runs in one table that sorts; returns its path relative to the repository."""
    formats = {"top1": "%.2f", "low": "%.1f", "high": "%.1f", "cost": "%.3f", "params": "%.1f", "ms": "%.2f"}
    template, runs = TEMPLATES.get_template("overview.html.j2"), all_runs().to_dict("records")
    studies = sorted(path.parent.name for path in (ROOT / "reports").glob("*/evidence.html"))
    page = template.render(runs=runs, columns=COLUMNS, formats=formats, studies=studies)
    write_text(ROOT / "reports" / "index.html", page)
    return "reports/index.html"


def write_report(run: Run) -> str:
    """Writes index.html from the run's files; returns its path relative to the repository."""
    captions = run.read_json("figures/captions.json")
    folder = run.reports / "figures"
    sources = {name: base64.b64encode((folder / f"{name}.svg").read_bytes()).decode() for name in captions}
    figures = [{"name": name, "caption": captions[name], "source": sources[name]} for name in sorted(captions)]
    metrics, provenance = run.read_json("metrics.json"), run.read_json("provenance.json")
    content: dict[str, Any] = {
        **metrics,
        "run": run.name,
        "interval": wilson(metrics["evaluate"]["top1"], metrics["evaluate"]["images"]),
        "arch": run.read_json("architecture.json"),
        "figures": figures,
        "parameters": {stage: yaml.safe_dump(entry["parameters"]) for stage, entry in provenance.items()},
        "environment": provenance["03-search"],
        "notebooks": sorted(path.name for path in run.reports.glob("*.ipynb")),
    }
    path = run.reports / "index.html"
    write_text(path, TEMPLATES.get_template("report.html.j2").render(content))
    return path.relative_to(run.reports.parents[1]).as_posix()


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
    path = run.reports / "evidence.html"
    write_text(path, TEMPLATES.get_template("study.html.j2").render(content))
    # Where the README has a place for this study, its figure and result stand there.
    quoted = TEMPLATES.get_template("study.md.j2").render(run.read_json("metrics.json"), run=run.name, made=made)
    readme, place = ROOT / "README.md", rf"(<!-- {re.escape(run.name)} -->).*?(?=<!-- end -->)"
    write_text(readme, re.sub(place, lambda match: f"{match[1]}\n{quoted}\n", read_text(readme), flags=re.DOTALL))
    return path.relative_to(run.reports.parents[1]).as_posix()


if __name__ == "__main__":
    run = Run(sys.argv[1])
    metrics = run.read_json("metrics.json")
    print(f"\nRun '{run.name}'")
    if "evidence" in metrics:
        path, found = write_study(run), metrics["evidence"]["verdict"]
        print(f"{found}\n  {'report':<16} {path}, beside all runs in {write_overview()}\n")
    if "evaluate" in metrics:
        path = write_report(run)
        for name, text in headline(run).items():
            print(f"  {name:<16} {text}")
        print(f"  {'report':<16} {path}, beside all runs in {write_overview()}\n")
