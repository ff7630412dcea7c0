"""What a run's candidates cost: 02-cost prices them, `costs` reads the table that it kept."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from densenas.images.data import prepared
from densenas.latency import agreement, judge, measure
from densenas.method.cost import CostTable
from densenas.method.space import SearchSpace
from densenas.runs.run import Run
from densenas.settings import CostSettings
from densenas.timings import read_times


@dataclass(frozen=True)
class Prices:
    """What 02-cost found.

    `table` is what the search will use; a latency table is scaled by the factor by which whole networks are slower.
    `measured` are latencies before that, None where nothing was timed. `networks` are random networks, predicted and
    measured in ms, and `agreement` what they say of `measured`; both None where no network was timed.
    """

    table: CostTable
    mult_adds: CostTable
    measured: CostTable | None = None
    networks: pd.DataFrame | None = None
    agreement: dict[str, float] | None = None


def price(run: Run, settings: CostSettings) -> Prices:
    """Prices every candidate of a space for the run's images; keeps the table, agreement and provenance.

    Latency is that of `table`, or else measured where it is the price or where networks are to be timed; a killed
    measurement goes on. Raises ValueError, FileNotFoundError or OSError with one sentence.
    """
    image_size, num_classes = prepared(run, settings.image_size)
    space = SearchSpace.load(settings.space)
    mult_adds = CostTable.mult_adds(space, image_size, num_classes)
    prices = Prices(mult_adds, mult_adds)
    if settings.table:
        measured = read_times(settings.table, space, image_size, num_classes)
        prices = Prices(measured, mult_adds, measured)
    elif settings.networks or settings.kind == "latency":
        with run.alone():  # beside another stage of this run all would be timed wrong
            prices = _timed(run, mult_adds, settings)
    path, agreed = run.reports / "latency.json", None
    if prices.measured is None:
        path.unlink(missing_ok=True)  # that of an earlier pricing may be of another space or device
    else:
        prices.measured.write(path)
        if prices.agreement is not None:
            agreed = {**prices.agreement, "device": prices.measured.conditions["device"]}
    run.update_json("metrics.json", "latency", agreed)
    prices.table.write(run.reports / "cost.json")
    parameters = settings.model_dump(mode="json") | {"image_size": image_size}
    run.record_provenance("02-cost", **parameters)
    return prices


def _timed(run: Run, flops: CostTable, settings: CostSettings) -> Prices:
    """The prices with latency of every op and of some whole networks."""
    device, rounds = settings.device, settings.rounds
    images, log = (flops.input_size, flops.num_classes), run.work / "latency.jsonl"
    measured = measure(flops.space, *images, log, settings.batch_size, device, rounds)
    table = measured if settings.kind == "latency" else flops
    if not settings.networks:
        return Prices(table, flops, measured)
    networks = judge(measured, settings.networks, device, rounds)
    agreed = agreement(networks)
    if settings.kind == "latency":
        table = measured.scaled(agreed["factor"])
    return Prices(table, flops, measured, networks, agreed)
