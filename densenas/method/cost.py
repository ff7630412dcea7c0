"""What a network costs: Mult-Adds or milliseconds of every candidate, as one table of a search space."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from densenas.files import Strict, literal, naming, read_text, shown, write_text
from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.space import PIXELS, PRESETS, Layer, Layers, SearchSpace

UNITS = {"mult_adds": "million Mult-Adds", "latency": "ms"}
DEAREST = 1e15  # no op costs as much, in either unit
NEITHER = "is neither a cost table of ours nor a published latency list"

Rows = list[list[float]]
# The published nesting; its entries are checked where each has a name (`CostTable.__post_init__`).
Nesting = tuple[Any, list[tuple[list[list[Any]], list[list[Any]]]], list[Any], Any]
Tensors = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor]  # see `CostTable.tensors`


class Conditions(Strict):
    """What a kept table must say about itself; whatever else it says is kept, too."""

    model_config = ConfigDict(extra="allow")

    input_size: int = Field(ge=1, le=PIXELS)
    num_classes: int = Field(ge=1)
    batch_size: int = Field(1, ge=1)


class Measured(Conditions):
    """The conditions of a latency."""

    device: str = Field(min_length=1)
    threads: int = Field(ge=1)
    torch: str


CONDITIONS = {"mult_adds": Conditions, "latency": Measured}


class Record(Strict):
    """A table as a file of our own, cost.json."""

    kind: Literal["mult_adds", "latency"]
    unit: str
    conditions: dict[str, Any]
    space: SearchSpace
    nesting: str = ""
    table: Nesting


@dataclass(frozen=True)
class CostTable:
    """The cost of every candidate of a space. Additive: a network costs the sum of its entries (paper, section 3.3).

    `head[b]` has a row for each incoming edge of block b + 1, nearest first, and an entry for each head op;
    `stack[b]` a row for each of its layers and an entry for each stack op; `final` an entry for each edge to the final
    node. The published MobileNetV2 list has layer rows even for blocks without layers: its networks' totals count
    those as skips, the chained cost does not. Every entry is in the unit of `kind` (see `UNITS`).
    """

    space: SearchSpace
    kind: str
    stem: float
    head: list[Rows]
    stack: list[Rows]
    final: list[float]
    classifier: float
    conditions: dict[str, Any] = field(
        default_factory=dict
    )  # input size, classes, and for latency the device
    _tensors: dict[Any, Tensors] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in [*UNITS]:
            raise ValueError(f"cost kind '{self.kind}' is unknown, known are {', '.join(UNITS)}")
        if mismatch := _mismatch(self.space, self.head, self.stack, self.final):
            raise ValueError(f"cost table does not fit space {self.space.name}: {mismatch}")
        for place, cost in self._entries():
            number = isinstance(cost, int | float) and not isinstance(cost, bool)
            if not number or not 0 <= cost <= DEAREST:
                table = f"cost table of space {self.space.name}"
                wrong = "holds an entry that is not a finite number of at least 0"
                raise ValueError(f"{table} {wrong}: {place} is {shown(cost)}")

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """Every entry behind its place in words."""
        space, last = self.space, self.space.num_blocks
        yield "stem", self.stem
        for j, (edges, layers) in enumerate(zip(self.head, self.stack, strict=True), start=1):
            for i, row in zip(space.incoming(j), edges, strict=True):
                for op, cost in zip(space.head_ops, row, strict=True):
                    yield f"block {j}, edge {i}→{j}, {op}", cost
            for number, row in enumerate(layers, start=1):
                for op, cost in zip(space.stack_ops, row, strict=True):
                    yield f"block {j}, layer {number}, {op}", cost
        for i, cost in zip(space.incoming(last), self.final, strict=True):
            yield f"final edge {i}→{last}", cost
        yield "classifier", self.classifier

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

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
        stem += sum(
            ops.mult_adds(block.head, block.in_ch, block.out_ch, side, 1) for block in space.stem
        )
        ends = stem / 1e6, space.last_dim * num_classes / 1e6
        conditions = {"input_size": input_size, "num_classes": num_classes, "batch_size": 1}
        return cls.of(
            space, "mult_adds", layers, lambda layer: ops.mult_adds(*layer) / 1e6, *ends, conditions
        )

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        kind: str,
        layers: Layers,
        cost: Callable[[Layer], float],
        stem: float,
        classifier: float,
        conditions: dict[str, Any],
    ) -> CostTable:
        """The table with the cost of each of these layers; `skip_reg` charges a skip a tenth of its row's first op."""
        head, stack, final = layers

        def costs(row: list[Layer]) -> list[float]:
            # A skip that costs nothing would be chosen for the cost term's sake alone.
            return [
                cost(row[0]) / 10 if space.skip_reg and layer[0] == ops.SKIP else cost(layer)
                for layer in row
            ]

        blocks = ([[costs(row) for row in rows] for rows in part] for part in (head, stack))
        return cls(
            space, kind, stem, *blocks, [cost(layer) for layer in final], classifier, conditions
        )

    def nested(self) -> list[Any]:
        """The published nesting: [stem, [[edges × ops, layers × ops] per block], [final edges], classifier]."""
        return [
            self.stem,
            [[h, s] for h, s in zip(self.head, self.stack, strict=True)],
            self.final,
            self.classifier,
        ]

    def scaled(self, factor: float) -> CostTable:
        """Every entry times a factor, as whole networks ask for where single ops were measured."""
        if not 0 < factor < math.inf:
            expected = "expected a finite number above 0"
            raise ValueError(f"a cost table cannot be scaled by {factor}, {expected}")

        def times(entry: Any) -> Any:
            return [times(inner) for inner in entry] if isinstance(entry, list) else factor * entry

        entries = map(times, (self.stem, self.head, self.stack, self.final, self.classifier))
        return CostTable(self.space, self.kind, *entries, self.conditions | {"factor": factor})

    def derived_ends(self) -> dict[int, float]:
        """What a derived network costs behind the last block i of its path, for each i.

        A derived ResNet has no 1×1 convolution there, its classifier takes the block's own channels; a latency table
        of ours measures just that (`final`).
        """
        last = self.space.incoming(self.space.num_blocks)
        if self.space.net_type == "res" and self.kind == "mult_adds":
            return {
                i: self.space.real_channels(i) * self.conditions["num_classes"] / 1e6 for i in last
            }
        return {i: cost + self.classifier for i, cost in zip(last, self.final, strict=True)}

    def write(self, path: str | Path) -> None:
        """Writes the table as JSON, atomically; `read` gives it back.

        Raises ValueError where `conditions` lack the input size, the classes or what a latency
        depends on, OSError where the file cannot be written.
        """
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

        A literal names no space: without `space` it is the first preset whose blocks, edges and ops
        it fits. Nor does it say its conditions, which stay empty. Raises ValueError with one sentence
        when the file is neither, or fits no space or another than `space`; FileNotFoundError where
        there is none.
        """
        text = read_text(path)
        if text.lstrip().startswith("{"):
            return cls._of_record(path, text, space)
        try:
            nested = TypeAdapter(Nesting).validate_python(literal(text))
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{first['msg']} at {'.'.join(map(str, first['loc'])) or 'the top'}"
            raise ValueError(f"{path} {NEITHER}: {reason}") from None
        except ValueError as error:
            raise ValueError(f"{path} {NEITHER}: {error}") from None
        parts = _parts(nested)
        candidates = [space] if space else [SearchSpace.load(preset) for preset in PRESETS]
        for known in candidates:
            if not _mismatch(known, *parts[1:4]):
                with naming(str(path)):
                    return cls(known, "latency", *parts, {})
        reason = "its nesting fits no preset, name the space"
        if space:
            reason = _mismatch(space, *parts[1:4])
        raise ValueError(f"{path} does not fit: {reason}")

    @classmethod
    def _of_record(cls, path: str | Path, text: str, space: SearchSpace | None) -> CostTable:
        with naming(str(path)):
            record = Record.model_validate_json(text)
            if record.unit != UNITS[record.kind]:
                unit = UNITS[record.kind]
                raise ValueError(f"unit is '{record.unit}', that of {record.kind} is {unit}")
            if space and space != record.space:
                priced = f"space {record.space.name}"
                if space.name == record.space.name:
                    priced = f"another version of {priced}"
                raise ValueError(f"it prices {priced}, asked for was {space.name}")
            with naming("conditions"):
                CONDITIONS[record.kind].model_validate(record.conditions)
            return cls(record.space, record.kind, *_parts(record.table), record.conditions)

    def total(self, arch: str | Architecture) -> float:
        """The sum along one architecture, given as such, by its published name or as a net_config.

        Layers of a visited block that the architecture lacks count as skips, as in the chained cost.
        Raises ValueError when the architecture is not one of the space.
        """
        if isinstance(arch, str):
            arch = Architecture.read(arch)
        space, path = self.space, self.space.path_of(arch)
        total = self.stem + self.final[space.incoming(path[-1]).index(path[-2])] + self.classifier
        for (i, j), block in zip(pairwise(path[:-1]), arch.routing_blocks, strict=True):
            layers, skips = self.stack[j - 1], [ops.SKIP] if ops.SKIP in space.stack_ops else []
            chosen = (*block.stack, *skips * (len(layers) - len(block.stack)))
            total += self.head[j - 1][space.incoming(j).index(i)][space.head_ops.index(block.head)]
            total += sum(
                row[space.stack_ops.index(op)] for row, op in zip(layers, chosen, strict=False)
            )
        return total

    def tensors(self, like: Tensor) -> Tensors:
        """head (edges into blocks, head ops), stack (layers, stack ops), final in a matrix (blocks, nodes), where in it
        the rows of head belong, and the block of each row of stack; rows in the supernet's order.

        Kept for each device and dtype, so that a step neither copies nor waits.
        """
        key, space, last = (like.device, like.dtype), self.space, self.space.num_blocks
        if key not in self._tensors:
            head, edges = like.new_tensor([*chain(*self.head)]), like.new_zeros(last, last + 1)
            rows = [
                *chain(
                    *(
                        rows[:used]
                        for rows, used in zip(self.stack, space.num_layers[1:], strict=True)
                    )
                )
            ]
            stack = like.new_tensor(rows).reshape(len(rows), len(space.stack_ops))
            edges[space.incoming(last), last] = like.new_tensor(self.final)
            owner = (
                torch.arange(last).repeat_interleave(torch.tensor(space.num_layers)).to(like.device)
            )
            where = tuple(torch.tensor(space.head_edges, device=like.device).T)
            self._tensors[key] = head, stack, edges, where, owner
        return self._tensors[key]


def _parts(nested: Nesting) -> tuple[float, list[Rows], list[Rows], list[float], float]:
    """The nesting as `CostTable` has it: stem, head, stack, final, classifier."""
    stem, blocks, final, classifier = nested
    return stem, [head for head, _ in blocks], [stack for _, stack in blocks], final, classifier


def _mismatch(
    space: SearchSpace, head: list[Rows], stack: list[Rows], final: list[float]
) -> str | None:
    """What keeps a nesting from fitting a space, in words; None where it fits."""
    if len(head) != space.num_blocks - 1:
        return f"{len(head)} blocks in the table, {space.num_blocks - 1} in the space"
    for j, (edges, layers) in enumerate(zip(head, stack, strict=True), start=1):
        needed = len(space.incoming(j))
        if len(edges) != needed or any(len(row) != len(space.head_ops) for row in edges):
            return f"block {j} needs {needed} edges of {len(space.head_ops)} ops"
        if len(layers) < space.num_layers[j] or any(
            len(row) != len(space.stack_ops) for row in layers
        ):
            return f"block {j} needs {space.num_layers[j]} layers of {len(space.stack_ops)} ops"
    if len(final) != len(space.incoming(space.num_blocks)):
        return f"{len(final)} final edges in the table, {len(space.incoming(space.num_blocks))} in the space"
    return None
