"""Which network a number belongs to: the one that a run derived, or another in its place.

04-derive keeps what it found in architecture.json. 05-retrain and 06-evaluate record beside their
numbers what they trained and tested; whoever credits a number to a network reads it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densenas.files import naming, read_text, root
from densenas.method.architecture import Architecture, DerivedNet
from densenas.runs.run import Run
from densenas.training.checkpoint import digest, read_configuration

DERIVED = "the derived network"
PUBLISHED = [f"DenseNAS-{kind}{of}" for of in ("", " (arXiv v1)") for kind in "ABC"]
ENTRIES = (  # of architecture.json, which reports rely on
    "net_config",
    "mult_adds_m",
    "params_m",
    "cost",
    "target_cost",
    "cost_unit",
    "blocks",
    "layers",
    "input_size",
    "num_classes",
    "space",
    "seed",
)


def derived(run: Run) -> dict[str, Any]:
    """What 04-derive found, as architecture.json holds it.

    Raises FileNotFoundError or ValueError with one sentence where there is none, or none of the present search.
    """
    path = run.need(run.reports / "architecture.json", "04-derive")
    found = run.read_json(path.name)
    for entry in ENTRIES:
        if entry not in found:
            raise ValueError(f"{path} has no entry '{entry}': run 04-derive again")
    with naming(str(path)):
        Architecture.parse(str(found["net_config"]))
    present = search_digest(run)
    if present is not None and found.get("search", present) != present:
        again = f"run '{run.name}' was searched again since {path.name} was written"
        raise ValueError(f"{again}: run 04-derive again")
    return found


def derived_at(run: Run, budget: float) -> dict[str, Any]:
    """What 04-derive found at one of its budgets, an entry of architecture.json; raises as `derived`."""
    for entry in derived(run).get("budgets", []):
        if entry["budget"] == budget:
            return entry
    lacks = f"run '{run.name}' has no network at {budget:g}"
    raise FileNotFoundError(f"{lacks}: run 04-derive with that among its budgets")


def search_digest(run: Run) -> str | None:
    """That of the run's present search; None where it is not here, as in a fresh clone."""
    path = run.work / "search.pt"
    if not path.exists():
        return None
    try:
        return digest(read_configuration(path))
    except ValueError as error:
        raise ValueError(f"{error}: run 03-search again") from None


def describe(run: Run, net: nn.Module, folder: Path) -> dict[str, Any]:
    """What the network in `folder` is, as metrics.json holds it beside its numbers.

    `network` is it in words, `net_config` or `model` what it is built from, `weights` a digest.
    """
    folder = folder.absolute()
    # Relative to the root, which is another on every machine.
    known = folder.relative_to(root()) if folder.is_relative_to(root()) else folder
    place = {"folder": str(known), "weights": weights_digest(net)}
    if not isinstance(net, DerivedNet):
        model = read_text(folder / "model").strip()
        return {"network": model, "model": model, **place}
    arch = net.arch
    return {
        "network": _in_words(run, arch),
        "net_config": str(arch),
        "blocks": len(arch.routing_blocks),
        "layers": arch.num_layers,
        **place,
    }


def _in_words(run: Run, arch: Architecture) -> str:
    if (run.reports / "architecture.json").exists() and derived(run)["net_config"] == str(arch):
        return DERIVED
    for name in PUBLISHED:
        if arch == Architecture.named(name):
            return name
    return "a network of another net_config"


def check_images(run: Run, then: str | None, now: str, stage: str) -> None:
    """ValueError where the run has other images now than a stage had, by their digests; an older one left none."""
    if then not in (None, now):
        other = f"run '{run.name}' has other images now than {stage} was run on"
        raise ValueError(f"{other}: run {stage} again")


def weights_digest(net: nn.Module) -> str:
    """The same for the same weights, wherever they are kept."""
    weights = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return weights.hexdigest()


@dataclass(frozen=True)
class Credit:
    """The network that an evaluation's numbers belong to."""

    network: str  # in words
    derived: bool  # whether it is the one that the run derived
    trained: bool  # whether its weights are those that 05-retrain trained last
    notice: str | None  # what a reader must know beside the numbers; None where nothing is unusual


def credit(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> Credit:
    """Whose the numbers of metrics.json's section `evaluate` are; `found` is `derived`, or empty without a search."""
    test = metrics["evaluate"]
    last_weights = metrics.get("retrain", {}).get("weights")
    is_trained = "weights" in test and test["weights"] == last_weights
    is_derived = "net_config" in test and test["net_config"] == found.get("net_config")
    notice = None
    if "network" not in test:
        network = "not recorded"
        notice = (
            "Which network was tested is not recorded, the evaluation is of an older version:"
            " run 06-evaluate again."
        )
    elif is_derived:
        network = DERIVED
        if not is_trained:
            notice = (
                f"Its weights are those in {test['folder']},"
                " which are not the last that 05-retrain trained."
            )
    else:
        network = test["network"]
        if network == DERIVED:
            network = "a network that was derived before the present one"
        notice = (
            f"Tested was not the network that this run derived, but {network} ({test['folder']}):"
            " the accuracy is not that of the derived one."
        )
    return Credit(network, is_derived, is_trained, notice)
