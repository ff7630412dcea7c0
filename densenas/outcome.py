"""What a search leaves: read from its checkpoint, checked against the run of today, kept for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from densenas import own
from densenas.costs import read_costs
from densenas.files import write_text
from densenas.identity import check_images
from densenas.images.data import load
from densenas.method.architecture import Candidate
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.probabilities import Probabilities
from densenas.method.space import RECIPES
from densenas.method.supernet import SuperNet
from densenas.published import save_published
from densenas.runs.run import Run
from densenas.training.checkpoint import Position, Row, digest, read_checkpoint, restore
from densenas.weights import read_saved

# Of the last epoch, what metrics.json holds of a search.
MEASURES = (
    "train_top1",
    "train_loss",
    "val_top1",
    "val_loss",
    "path_top1",
    "expected_cost",
    "derived_cost",
    "target_cost",
    "alpha_entropy",
    "beta_entropy",
    "cheapest_share",
    "skip_share",
    "expected_layers",
)


@dataclass
class Search:
    """A search: the supernet, its most probable architecture, what happened in every epoch, and what was asked for.

    `configuration` is what its checkpoint holds, never what a run was last asked for: space, recipe, cost (the nested
    table), target_cost, data (a digest), seed, precision, device.
    """

    net: SuperNet
    table: CostTable
    configuration: Mapping[str, Any]
    history: list[Row]
    trace: list[Probabilities]  # before the first epoch and after every one

    @property
    def target_cost(self) -> float | None:
        return self.configuration["target_cost"]

    @property
    def best(self) -> Candidate:
        """What the search found."""
        return Lattice(self.table, self.trace[-1]).derive(self.target_cost)

    def derived(self) -> list[Candidate]:
        """What would be derived at every moment of the trace, the last one being the result."""
        return [Lattice(self.table, moment).derive(self.target_cost) for moment in self.trace]


class Trace(list[Probabilities]):
    """Probabilities before the first epoch and after every one, as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"entries": [vars(entry) for entry in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        entries = [Probabilities(**entry) for entry in state["entries"]]
        if not entries:
            raise ValueError("a trace without entries")
        self[:] = entries


def finished_search(run: Run) -> Search:
    """The run's search, for what is made of it.

    Raises ValueError with one sentence where it is unfinished, or where the run's data or costs are no longer those
    that it was searched with.
    """
    data = load(run)
    result = load_search(run, read_costs(run), len(data.classes))
    check_images(run, result.configuration["data"], data.digest, "03-search")
    done, epochs = len(result.history), result.configuration["recipe"]["epochs"]
    if done < epochs:
        unfinished = f"the search of run '{run.name}' has done {done} of {epochs} epochs"
        raise ValueError(f"{unfinished}: run 03-search again, it goes on from there")
    return result


def load_search(run: Run, table: CostTable, num_classes: int) -> Search:
    """The search that a run's checkpoint holds, finished or not; on the CPU.

    Raises FileNotFoundError or ValueError with one sentence where there is none, where it is damaged, and where `table`
    is not the one it was searched with.
    """
    path = run.need(run.work / "search.pt", "03-search")
    again = "run 03-search again"
    try:
        checkpoint = read_checkpoint(path)
        other = _changed(checkpoint, table, num_classes)
        if other is None:
            weights = checkpoint["configuration"]["recipe"]["weights"]
            net = SuperNet(table.space, num_classes, weights)
            trace = Trace([net.probabilities()])
            position = Position()
            restore({"net": net, "trace": trace, "position": position}, checkpoint, path)
            net.temperature = checkpoint["configuration"]["recipe"]["softmax_temp"]
    except ValueError as error:
        raise ValueError(f"{error}: {again}, it goes on from the checkpoint before") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} does not hold a search of space {table.space.name}: {again}"
        ) from None
    if other is not None:
        raise ValueError(f"run '{run.name}' has {other} now than it was searched with: {again}")
    return Search(net, table, checkpoint["configuration"], position.history, trace)


def last_moment(run: Run) -> Probabilities:
    """The probabilities after the last epoch of a search, which may still go on; its weights are not read."""
    path = run.need(run.work / "search.pt", "03-search")
    return Probabilities(**read_saved(path, mapped=True)["trace"]["entries"][-1])


def _changed(checkpoint: Mapping[str, Any], table: CostTable, num_classes: int) -> str | None:
    """What the run has another of since its search, in words; None where it has the same."""
    configuration = checkpoint["configuration"]
    space = {name: value for name, value in configuration["space"].items() if name not in RECIPES}
    present = table.space.model_dump(mode="json", exclude={*RECIPES})
    if [space, configuration["cost"]] != [present, json.loads(json.dumps(table.nested()))]:
        return "other costs"
    codes = own.codes(table.space.own_ops)
    if codes != {op: configuration.get("code", {}).get(op) for op in codes}:
        return f"other code of {', '.join(codes)}"
    if len(checkpoint["net"]["classifier.weight"]) != num_classes:
        return "another number of classes"
    return None


def write_architecture(run: Run, result: Search, budgets: Sequence[float] = ()) -> dict[str, Any]:
    """Keeps what a search found as architecture.json and net_config; returns what the former holds.

    `search` is the digest of the search that it is from, `data` that of the images. `budgets`, in the table's unit, has
    an entry for each cost asked for beside the run's own: the supernet's most probable network there, whose net_config
    is also kept as a file in reports/<run>/budgets/<cost>/. ValueError where the space has no network of such a cost.
    """
    found, table = result.best, result.table
    lattice = Lattice(table, result.trace[-1])
    others = {budget: lattice.at(budget) for budget in budgets}
    num_classes = result.net.classifier.out_features
    record = {
        **_entry(found, table, num_classes),
        "target_cost": result.target_cost,
        "cost_unit": table.unit,
        "input_size": table.input_size,
        "num_classes": num_classes,
        "space": table.space.name,
        "seed": result.configuration["seed"],
        "search": digest(result.configuration),
        "data": result.configuration["data"],
        "budgets": [
            {"budget": budget, **_entry(other, table, num_classes)}
            for budget, other in others.items()
        ],
    }
    for budget, other in others.items():
        save_published(run.budget(budget).reports, other.architecture)
    save_published(run.reports, found.architecture)
    write_text(run.reports / "architecture.json", json.dumps(record, indent=1) + "\n")
    return record


def _entry(found: Candidate, table: CostTable, num_classes: int) -> dict[str, Any]:
    """A network as architecture.json has it."""
    arch = found.architecture
    return {
        "net_config": str(arch),
        "mult_adds_m": arch.mult_adds(table.input_size, num_classes),
        "params_m": arch.params(num_classes),
        "cost": found.cost,
        "blocks": len(arch.routing_blocks),
        "layers": arch.num_layers,
    }


def record_search(run: Run, result: Search) -> None:
    """Keeps in metrics.json how a search went, as the section "search"."""
    table, history = result.table, result.history
    metrics: dict[str, Any] = {
        "epochs": len(history),
        "seconds": sum(row["seconds"] for row in history),
        "cost_unit": table.unit,
        "n": 1,
        "warning": collapsed(result.history),
        "edges": len(table.space.edges),
        "paths": table.space.count_paths(),
    }
    metrics |= {name: history[-1].get(name) for name in MEASURES}
    run.update_json("metrics.json", "search", metrics)


def collapsed(history: list[Row]) -> str | None:
    """A warning in words where a search ended at the cheapest ops for the cost's sake, with what to change."""
    first, last = history[0], history[-1]
    if last["cheapest_share"] < 0.8 or last["cheapest_share"] < 1.5 * first["cheapest_share"]:
        return None
    return (
        f"The search has collapsed: {last['cheapest_share']:.0%} of the choices on a path fall on the cheapest op"
        f" ({first['cheapest_share']:.0%} at its start), {last['skip_share']:.0%} of the stacked layers are skipped."
        " Cost outweighs accuracy. Give a target_cost, or lower sub_loss_factor; a later arch_start_epoch lets the"
        " weights tell candidates apart before these are judged."
    )
