"""What a network costs: Mult-Adds or milliseconds of every candidate, as one table of a search space."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, model_validator
from torch import Tensor

from densenas.files import Strict, literal, naming, read_text, write_text
from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.space import PIXELS, PRESETS, Layer, Layers, SearchSpace

UNITS = {"mult_adds": "million Mult-Adds", "latency": "ms"}
DEAREST = 1e15  # no op costs as much, in either unit


def _cost(entry: Any) -> float:
    if type(entry) not in (int, float) or not 0 <= entry <= DEAREST:
        raise ValueError("expected a finite number of at least 0")
    return entry


Kind = Literal["mult_adds", "latency"]
Cost = Annotated[float, PlainValidator(_cost)]
Rows = list[list[Cost]]
# The published nesting: stem, for each block (incoming edges × head ops, layers × stack ops), final edges, classifier.
Nesting = tuple[Cost, list[tuple[Rows, Rows]], list[Cost], Cost]


class Conditions(Strict):
    """What a kept table must say about itself; whatever else it says is kept, too."""

    model_config = ConfigDict(extra="allow")

    input_size: int = Field(ge=1, le=PIXELS)
    num_classes: int = Field(ge=1)
    batch_size: int = Field(1, ge=1)


class Measured(Conditions):
    """The conditions of a latency; the software is PyTorch or ONNX Runtime."""

    device: str = Field(min_length=1)
    threads: int = Field(ge=1)
    torch: str | None = None
    onnxruntime: str | None = None

    @model_validator(mode="after")
    def _names_its_software(self) -> Measured:
        if not self.torch and not self.onnxruntime:
            raise ValueError("the version of torch or onnxruntime is missing")
        return self


CONDITIONS: dict[str, type[Conditions]] = {"mult_adds": Conditions, "latency": Measured}


class Record(Strict):
    """A table as a file of our own, cost.json."""

    kind: Kind
    unit: str
    conditions: dict[str, Any]
    space: SearchSpace
    nesting: str = ""
    table: Nesting


class CostTensors(NamedTuple):
    """A table on one device, in one precision, with what it takes to sum it over the edges of a space."""

    head: Tensor  # (edges into blocks, head ops)
    stack: Tensor  # (layers, stack ops)
    final: Tensor  # (blocks, nodes): the cost of each edge to the final node, 0 elsewhere
    head_edges: tuple[Tensor, Tensor]  # where each row of head belongs in such a matrix
    stack_blocks: Tensor  # the block of each row of stack


@dataclass(frozen=True)
class CostTable:
    """The cost of every candidate of a space. Additive: a network costs the sum of its entries (paper, section 3.3).

    `head` has a row for each edge into a block, in the order of `space.head_edges`, with an entry for each head op;
    `stack` a row for each stacked layer, in the order of `space.stack_layers`, with an entry for each stack op; `final`
    an entry for each edge to the final node, nearest block first. Every entry is in the unit of `kind` (see `UNITS`).

    `spare` holds by block the rows of layers that it does not have: the published MobileNetV2 list has such. Its
    networks' totals count them as skips, the chained cost does not.
    """

    space: SearchSpace
    kind: Kind
    stem: float
    head: Rows
    stack: Rows
    final: list[float]
    classifier: float
    conditions: dict[str, Any]  # see `Conditions`; a published list says none
    spare: dict[int, Rows] = field(default_factory=dict)
    _tensors: dict[tuple[torch.device, torch.dtype], CostTensors] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def _layers(self, block: int) -> Rows:
        """The rows of a block's layers, spare ones included."""
        return self.stack[self.space.stack_rows(block)] + self.spare.get(block, [])

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def input_size(self) -> int:
        """Pixels of a side; ValueError where the table does not say, as of `num_classes`."""
        return self._condition("input_size")

    @property
    def num_classes(self) -> int:
        return self._condition("num_classes")

    def _condition(self, name: str) -> int:
        if name not in self.conditions:
            raise ValueError(f"the cost table of space {self.space.name} does not say its {name}")
        return self.conditions[name]

    @classmethod
    def mult_adds(
        cls, space: SearchSpace, input_size: int = 224, num_classes: int = 100
    ) -> CostTable:
        """Mult-Adds in millions for one square image; arithmetic on shapes only, nothing is run or allocated."""
        layers = space.layers(input_size)
        if not isinstance(num_classes, Integral) or num_classes < 1:
            expected = "expected a whole number of at least 1"
            raise ValueError(f"num_classes is {num_classes!r}, {expected}")
        side = math.ceil(input_size / 2)
        stem = 27 * space.init_dim * side**2
        for block in space.stem:
            stem += ops.mult_adds(block.head, block.in_ch, block.out_ch, side, 1)
        ends = stem / 1e6, space.last_dim * num_classes / 1e6
        conditions: dict[str, Any] = {"input_size": input_size, "num_classes": num_classes}
        conditions["batch_size"] = 1
        conditions |= space.code()
        return cls.of(
            space, "mult_adds", layers, lambda layer: ops.mult_adds(*layer) / 1e6, *ends, conditions
        )

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        kind: Kind,
        layers: Layers,
        cost: Callable[[Layer], float],
        stem: float,
        classifier: float,
        conditions: dict[str, Any],
    ) -> CostTable:
        """The table with the cost of each of these layers; `skip_reg` charges a skip a tenth of its row's first op."""
        head = [[cost(layer) for layer in row] for row in layers.head]
        stack = [[cost(layer) for layer in row] for row in layers.stack]
        if space.skip_reg and ops.SKIP in space.stack_ops:
            # A skip that costs nothing would be chosen for the cost term's sake alone.
            skip = space.stack_ops.index(ops.SKIP)
            for costs in stack:
                costs[skip] = costs[0] / 10
        final = [cost(layer) for layer in layers.final]
        return cls(space, kind, stem, head, stack, final, classifier, conditions)

    @classmethod
    def from_nested(
        cls, space: SearchSpace, kind: Kind, nesting: Nesting, conditions: dict[str, Any]
    ) -> CostTable:
        """The table of a published nesting, see `nested`; ValueError where it does not fit the space."""
        stem, blocks, final, classifier = nesting
        if mismatch := _mismatch(space, nesting):
            raise ValueError(f"cost table does not fit space {space.name}: {mismatch}")
        head: Rows = []
        stack: Rows = []
        spare: dict[int, Rows] = {}
        for j, (edges, layers) in enumerate(blocks, start=1):
            count = space.num_layers[j]
            head += edges
            stack += layers[:count]
            if len(layers) > count:
                spare[j] = layers[count:]
        return cls(space, kind, stem, head, stack, final, classifier, conditions, spare)

    def nested(self) -> list[Any]:
        """The published nesting: [stem, [[edges × ops, layers × ops] per block], [final edges], classifier]."""
        blocks, first = [], 0
        for j in range(1, self.space.num_blocks):
            end = first + len(self.space.incoming(j))
            blocks.append([self.head[first:end], self._layers(j)])
            first = end
        return [self.stem, blocks, self.final, self.classifier]

    def scaled(self, factor: float) -> CostTable:
        """Every entry times a factor, as whole networks ask for where single ops were measured."""
        if not 0 < factor < math.inf:
            expected = "expected a finite number above 0"
            raise ValueError(f"a cost table cannot be scaled by {factor}, {expected}")

        def times(entry: Any) -> Any:
            return [times(inner) for inner in entry] if isinstance(entry, list) else factor * entry

        conditions = {**self.conditions, "factor": factor}
        return CostTable.from_nested(self.space, self.kind, times(self.nested()), conditions)

    def derived_ends(self) -> dict[int, float]:
        """What a derived network costs behind the last block i of its path, for each i.

        A derived ResNet has no 1×1 convolution there, its classifier takes the block's own channels; a latency table
        of ours measures just that (`final`).
        """
        space, ends = self.space, {}
        for i, cost in zip(space.incoming(space.num_blocks), self.final, strict=True):
            ends[i] = cost + self.classifier
            if space.net_type == "res" and self.kind == "mult_adds":
                ends[i] = space.real_channels(i) * self.num_classes / 1e6
        return ends

    def write(self, path: str | Path) -> None:
        """Writes the table as JSON, atomically; ValueError where conditions that its kind needs are missing."""
        with naming(f"{path}: conditions"):
            CONDITIONS[self.kind].model_validate(self.conditions)
        record = {
            "kind": self.kind,
            "unit": self.unit,
            "conditions": self.conditions,
            "space": self.space.model_dump(mode="json"),
            "nesting": "[stem, [[incoming edges × head ops, layers × stack ops] per block], [final edges], classifier]",
            "table": self.nested(),
        }
        write_text(path, json.dumps(record, indent=1))

    @classmethod
    def read(cls, path: str | Path, space: SearchSpace | None = None) -> CostTable:
        """A table written by `write`, or a published latency literal (ms), parsed as a literal and never executed.

        A literal names no space: without `space` it is the first preset that it fits. Raises ValueError with one
        sentence when the file is neither, or fits no space or another than `space`; FileNotFoundError for no file.
        """
        text = read_text(path)
        if text.lstrip().startswith("{"):
            return cls._of_record(path, text, space)
        with naming(f"{path} is neither a cost table of ours nor a published latency list"):
            nesting = TypeAdapter(Nesting).validate_python(literal(text))
        if space is None:
            presets = [SearchSpace.load(preset) for preset in PRESETS]
            fitting = [preset for preset in presets if _mismatch(preset, nesting) is None]
            if not fitting:
                raise ValueError(f"{path} does not fit: its nesting fits no preset, name the space")
            space = fitting[0]
        with naming(str(path)):
            return cls.from_nested(space, "latency", nesting, {})

    @classmethod
    def _of_record(cls, path: str | Path, text: str, space: SearchSpace | None) -> CostTable:
        with naming(str(path)):
            record = Record.model_validate_json(text)
            unit = UNITS[record.kind]
            if record.unit != unit:
                raise ValueError(f"unit is '{record.unit}', that of {record.kind} is {unit}")
            if space and space != record.space:
                priced = f"space {record.space.name}"
                if space.name == record.space.name:
                    priced = f"another version of {priced}"
                raise ValueError(f"it prices {priced}, asked for was {space.name}")
            with naming("conditions"):
                CONDITIONS[record.kind].model_validate(record.conditions)
            return cls.from_nested(record.space, record.kind, record.table, record.conditions)

    def total(self, arch: str | Architecture) -> float:
        """The sum along one architecture, given as such, by its published name or as a net_config.

        Layers of a visited block that it lacks count as skips, as in the chained cost. Raises ValueError when it is
        not one of the space.
        """
        if isinstance(arch, str):
            arch = Architecture.read(arch)
        space, path = self.space, self.space.path_of(arch)
        edges = space.head_edges
        total = self.stem + self.final[space.incoming(path[-1]).index(path[-2])] + self.classifier
        for edge, block in zip(pairwise(path[:-1]), arch.routing_blocks, strict=True):
            total += self.head[edges.index(edge)][space.head_ops.index(block.head)]
            within = 0.0
            for number, row in enumerate(self._layers(edge[1])):
                if number < len(block.stack):
                    within += row[space.stack_ops.index(block.stack[number])]
                elif ops.SKIP in space.stack_ops:
                    within += row[space.stack_ops.index(ops.SKIP)]
            total += within
        return total

    def tensors(self, like: Tensor) -> CostTensors:
        """The table on the device and in the precision of a tensor; kept, so that a step neither copies nor waits."""
        key = like.device, like.dtype
        if key not in self._tensors:
            space, last = self.space, self.space.num_blocks
            final = like.new_zeros(last, last + 1)
            final[space.incoming(last), last] = like.new_tensor(self.final)
            start, end = torch.tensor(space.head_edges, device=like.device).T
            blocks = [block for block, _ in space.stack_layers]
            self._tensors[key] = CostTensors(
                like.new_tensor(self.head),
                like.new_tensor(self.stack).reshape(len(self.stack), len(space.stack_ops)),
                final,
                (start, end),
                torch.tensor(blocks, dtype=torch.long, device=like.device),
            )
        return self._tensors[key]


def _mismatch(space: SearchSpace, nesting: Nesting) -> str | None:
    """What keeps a nesting from fitting a space, in words; None where it fits."""
    _, blocks, final, _ = nesting
    if len(blocks) != space.num_blocks - 1:
        return f"{len(blocks)} blocks in the table, {space.num_blocks - 1} in the space"
    for j, (edges, layers) in enumerate(blocks, start=1):
        needed = len(space.incoming(j))
        if len(edges) != needed or any(len(row) != len(space.head_ops) for row in edges):
            return f"block {j} needs {needed} edges of {len(space.head_ops)} ops"
        needed = space.num_layers[j]
        if len(layers) < needed or any(len(row) != len(space.stack_ops) for row in layers):
            return f"block {j} needs {needed} layers of {len(space.stack_ops)} ops"
    needed = len(space.incoming(space.num_blocks))
    if len(final) != needed:
        return f"{len(final)} final edges in the table, {needed} in the space"
    return None
