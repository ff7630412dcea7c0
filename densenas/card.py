"""The card of a network: what it was trained on, what it costs and how accurate it is, out of its run's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import yaml

from densenas.correlations import wilson
from densenas.files import PACKAGE, write_text
from densenas.identity import credit
from densenas.images.data import ImageData
from densenas.runs.run import Run

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PACKAGE / "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def write_card(run: Run, folder: Path, data: ImageData) -> None:
    """Writes MODEL_CARD.md, with the front matter of Hugging Face, beside the network that 06-evaluate tested last.

    Raises OSError with one sentence where it cannot be written.
    """
    metrics, found = run.read_json("metrics.json"), run.read_json("architecture.json")
    test = metrics["evaluate"]
    card = TEMPLATES.get_template("model_card.md.j2").render(
        front=yaml.safe_dump(
            _front_matter(run.name, data.dataset, test), sort_keys=False, allow_unicode=True
        ),
        run=run.name,
        data=data,
        test=test,
        interval=wilson(test["top1"], test["images"]),
        credit=credit(metrics, found),
        search=metrics.get("search"),
        retrain=metrics.get("retrain"),
        target=found.get("target_cost"),
        unit=found.get("cost_unit"),
        provenance=run.read_json("provenance.json"),
    )
    write_text(folder / "MODEL_CARD.md", card)


def _front_matter(run: str, dataset: str, test: dict[str, Any]) -> dict[str, Any]:
    """As the Hub reads it: https://huggingface.co/docs/hub/model-cards."""
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": dataset, "type": dataset, "split": "test"},
        "metrics": [{"type": "accuracy", "value": test["top1"]}],
    }
    return {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["densenas", "neural-architecture-search"],
        "model-index": [{"name": run, "results": [result]}],
    }
