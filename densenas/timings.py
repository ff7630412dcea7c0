"""A latency table out of the timings of single ops, on this machine (`latency`) or on another device (`onnx_ops`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from densenas.files import Strict, naming, read_text
from densenas.method import ops
from densenas.method.cost import CostTable
from densenas.method.space import RECIPES, Layer, Layers, SearchSpace
from densenas.training.checkpoint import digest

Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0)]


class Op(Strict):
    """A file of the folder, and what the timer adds."""

    key: Layer
    file: str
    input: list[Count]  # shapes
    output: list[Count]
    ms: list[Milliseconds]  # of each round; none in a manifest


class Manifest(Strict):
    """manifest.json: which space, at which size, the ops of a folder are of."""

    space: str
    digest: str
    input_size: Count
    num_classes: Count
    batch_size: Count
    ops: list[Op]


class Times(Manifest):
    """times.json: a manifest with what was measured, and where."""

    device: str = Field(min_length=1)
    threads: Count
    provider: str
    onnxruntime: str


@dataclass(frozen=True)
class Distinct:
    """What a latency table is made of: every candidate, and the two ends that all networks share.

    A derived ResNet has no 1×1 convolution: its classifier takes the last block's own channels and stands in `final`,
    `classifier` is None.
    """

    layers: Layers
    stem: Layer
    classifier: Layer | None

    @property
    def timed(self) -> list[Layer]:
        """Each op once, however often the space uses it; a skip is none, since a derived network drops it."""
        ends = [self.stem, self.classifier] if self.classifier else [self.stem]
        found = set().union(ends, *self.layers.head, *self.layers.stack, self.layers.final)
        return sorted(layer for layer in found if layer.op != ops.SKIP)


def distinct(space: SearchSpace, input_size: int, num_classes: int) -> Distinct:
    layers = space.layers(input_size)
    stem = Layer("stem", 3, space.chs[0], input_size, 2)
    if space.net_type == "mbv2":
        side = space.maps(input_size)[-1]
        return Distinct(layers, stem, Layer("classifier", space.last_dim, num_classes, side, 1))
    final = [layer._replace(op="classifier", width=num_classes) for layer in layers.final]
    return Distinct(layers._replace(final=final), stem, None)


def tabulate(
    space: SearchSpace,
    found: Distinct,
    times: Mapping[Layer, list[float]],
    conditions: dict[str, Any],
) -> CostTable:
    """The table of a space out of the milliseconds of each round of each op: the fastest counts."""
    # A skip is the one op that is not timed.
    least = defaultdict(float, {layer: min(times[layer]) for layer in found.timed})
    entries = [_entry(layer, times[layer]) for layer in found.timed]
    ends = least[found.stem], least[found.classifier] if found.classifier else 0.0
    conditions = {**conditions, **space.code(), "entries": entries}
    return CostTable.of(space, "latency", found.layers, least.__getitem__, *ends, conditions)


def _entry(layer: Layer, times: list[float]) -> dict[str, str | float]:
    """An op as the conditions of a table list it."""
    return {**layer._asdict(), "ms": min(times), "median": median(times), "max": max(times)}


def space_digest(space: SearchSpace) -> str:
    """Changes with whatever changes a cost, the code of ops of one's own among it, and not with recipes."""
    decisive = space.model_dump(mode="json", exclude={*RECIPES}) | space.code()
    return digest(decisive)


def read_times(
    path: str | Path, space: SearchSpace, input_size: int, num_classes: int
) -> CostTable:
    """The table of what the timer measured; ValueError or FileNotFoundError with one sentence where it is of others."""
    found = distinct(space, input_size, num_classes)
    with naming(str(path)):
        times = Times.model_validate_json(read_text(path))
        measured = {op.key: op.ms for op in times.ops}
        theirs = times.space, times.input_size, times.num_classes
        ours = space.name, input_size, num_classes
        again = "write its ops with python -m densenas.onnx_ops and time them"
        if theirs != ours:
            raise ValueError(f"times {_of(*theirs)}, not {_of(*ours)}: {again}")
        if times.digest != space_digest(space):
            raise ValueError(f"times another version of space {space.name}: {again}")
        missing = [layer for layer in found.timed if not measured.get(layer)]
        if missing:
            lacks = f"lacks the times of {len(missing)} ops of space {space.name}"
            raise ValueError(f"{lacks}: {again}")
    rounds = min(len(measured[layer]) for layer in found.timed)
    conditions = times.model_dump(exclude={"space", "digest", "ops"}) | {"rounds": rounds}
    return tabulate(space, found, measured, conditions)


def _of(space: str, input_size: int, num_classes: int) -> str:
    return f"space {space} at {input_size} pixels in {num_classes} classes"
