"""Truth: networks trained alone for long, a table that studies and rankings use instead of training them again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from pydantic import Field

from densenas import own
from densenas.files import Strict, naming, read_json, write_text
from densenas.images.data import ImageData
from densenas.recipes import RetrainRecipe
from densenas.runs.locks import locked
from densenas.runs.run import Run
from densenas.settings import Precision

# Of the epochs, when a long training looks at test; and after so many whole ones.
SHARES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
EPOCHS = (1, 2, 5, 10, 20, 40)
# Of a training, what a study's result says as well.
DESCRIPTION = ("seed", "epochs", "mult_adds_m", "params_m", "blocks", "layers", "net_config")
COLUMNS = ("group", "target", "number", "seed", "net_config", "epochs", "seconds")


def looks(epochs: int) -> list[int]:
    """After which of so many epochs (from 1) accuracy on test is noted; it decides nothing."""
    shares = {max(1, round(share * epochs)) for share in SHARES}
    return sorted(shares | {epoch for epoch in EPOCHS if epoch <= epochs})


def by_epoch(row: Mapping[str, Any]) -> dict[int, float]:
    """The accuracies of a row by epoch: its columns `top1_1`, `top1_2`, … that are filled."""
    found = {}
    for name, value in row.items():
        if re.fullmatch(r"top1_\d+", name) and pd.notna(value):
            found[int(name.removeprefix("top1_"))] = float(value)
    return dict(sorted(found.items()))


class Conditions(Strict):
    """On what and how the networks of a table were trained, all of them: truth.json."""

    data: str  # digest of the images, as `ImageData` has it
    image_size: int  # pixels
    classes: int
    precision: Precision
    recipe: dict[str, Any]  # a `RetrainRecipe` without its epochs, which each row has
    code: dict[str, str] = Field(default_factory=dict)  # of a loss of one's own, a digest
    latency: dict[str, Any] | None = None  # how `latency_ms` was measured

    @classmethod
    def of(cls, data: ImageData, recipe: RetrainRecipe, precision: Precision) -> Conditions:
        images = {"data": data.digest, "image_size": data.image_size, "classes": len(data.classes)}
        steps = recipe.model_dump(mode="json", exclude={"epochs"})
        how = {"precision": precision, "recipe": steps, "code": own.codes([recipe.loss])}
        return cls.model_validate({**images, **how})


class Truth:
    """The table of a run, reports/<run>/truth.csv with its truth.json: a row is one training of one network.

    Columns are group (how the network was found), target (million Mult-Adds), number within these, seed, net_config,
    epochs, layers, blocks, mult_adds_m, params_m, seconds, revision, `top1_<epoch>` (a share of the test images; see
    `by_epoch`), perhaps latency_ms. A network is known by net_config, epochs and seed; one with ops of one's own, whose
    code may change, has no place here.
    """

    def __init__(self, run: Run) -> None:
        self.table = run.reports / "truth.csv"
        self.about = run.reports / "truth.json"
        self.lock = run.work / ".truth.lock"

    @property
    def conditions(self) -> Conditions | None:
        """None where there is no table; ValueError with one sentence where it does not say what it is of."""
        if not self.table.exists():
            return None
        with naming(str(self.about)):
            content = read_json(self.about, f"without it nobody knows what {self.table} is of")
            return Conditions(**content)

    def serves(self, conditions: Conditions) -> bool:
        """Whether its numbers are of these images and this recipe; says so where they are not."""
        found = self.conditions
        if found is None:
            return False
        for name, value in conditions:
            if name != "latency" and getattr(found, name) != value:
                print(f"{self.table} is of another {name}: no accuracy is taken from there")
                return False
        return True

    def rows(self) -> pd.DataFrame:
        """Every training; ValueError with one sentence where the table is damaged."""
        if not self.table.exists():
            return pd.DataFrame(columns=[*COLUMNS])
        try:
            rows = pd.read_csv(self.table)
            sound = bool(rows[[*COLUMNS]].notna().all(axis=None))
        except (ValueError, KeyError):
            sound = False
        if not sound:
            raise ValueError(f"{self.table} is damaged: a row lacks one of {', '.join(COLUMNS)}")
        return rows

    def find(self, net_config: str, epochs: int, seed: int) -> dict[str, Any] | None:
        """The row of such a training, if there is one."""
        rows = self.rows()
        same = (rows["net_config"] == net_config) & (rows["seed"] == seed)
        found = rows[same & (rows["epochs"] == epochs)].to_dict("records")
        return {str(name): value for name, value in found[0].items()} if found else None

    def networks(self, group: str, target: float) -> dict[int, str]:
        """The net_configs of a group and target by their numbers."""
        rows = self.rows()
        near = (rows["target"] - target).abs() < 1e-9
        rows = rows[near & (rows["group"] == group)].sort_values("number", kind="stable")
        return dict(zip(rows["number"].astype(int), rows["net_config"], strict=True))

    def add(self, row: Mapping[str, Any], conditions: Conditions) -> None:
        """Adds a training, whatever other processes add; the first one also says what the table is of."""
        with locked(self.lock):
            if not self.table.exists():
                content = conditions.model_dump(mode="json", exclude_defaults=True)
                write_text(self.about, json.dumps(content, indent=1) + "\n")
            known, new = self.rows(), pd.DataFrame([row])
            rows = pd.concat([known, new], ignore_index=True) if len(known) else new
            rows = rows.drop_duplicates(["net_config", "epochs", "seed"])  # two jobs at once
            write_text(self.table, rows.to_csv(index=False))
