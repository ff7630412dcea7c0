"""The table of costs that 02-cost kept for a run, for the stages behind it."""

from __future__ import annotations

from densenas import own
from densenas.images.data import prepared
from densenas.method.cost import CostTable
from densenas.method.space import RECIPES, SearchSpace
from densenas.runs.run import Run


def read_costs(run: Run) -> CostTable:
    """The table that 02-cost kept; ValueError where it is damaged, or made for other images than the prepared ones."""
    path = run.need(run.reports / "cost.json", "02-cost")
    again = f"run 02-cost of run '{run.name}' again"
    try:
        table = CostTable.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from None
    if table.conditions.get("code", {}) != own.codes(table.space.own_ops):
        raise ValueError(f"{path} prices other code of {', '.join(table.space.own_ops)}: {again}")
    if "input_size" not in table.conditions:
        raise ValueError(f"{path} does not say for which images it holds: {again}")
    if (run.work / "data.json").exists():
        size, classes = prepared(run)
        if (table.input_size, table.num_classes) != (size, classes):
            found = f"{table.input_size} pixels in {table.num_classes} classes"
            have = f"the prepared ones have {size} in {classes}"
            raise ValueError(f"{path} prices images of {found}, {have}: {again}")
    return table


def priced_space(table: CostTable, space: str | None) -> SearchSpace:
    """The space that the costs are of, with the recipes of the preset or file `space` where that is given.

    Raises ValueError with one sentence where `space` is another one.
    """
    if space is None:
        return table.space
    given = SearchSpace.load(space)
    settings = [name for name in SearchSpace.model_fields if name not in RECIPES]
    changed = [name for name in settings if getattr(given, name) != getattr(table.space, name)]
    if changed:
        priced = f"the one that the run's costs are of, {table.space.name}"
        differ = f"({', '.join(changed)} differ)"
        raise ValueError(f"space '{space}' is not {priced} {differ}: run 02-cost with it first")
    return given
