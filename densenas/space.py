"""The search space: routing blocks of many widths, and which of them may feed which (paper, section 3.1)."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from densenas import ops
from densenas.config import PACKAGE, RetrainRecipe, SearchRecipe, Strict, one_sentence, read_yaml

PRESETS = ("mbv2", "resnet", "bottleneck", "cifar_mbv2", "cifar_resnet", "digits")
Positive = Annotated[int, Field(ge=1)]


class SearchSpace(Strict):
    """A dense search space as data. Names are those of the published configurations.

    Block 0 is the stem's output, blocks 1 … N-1 are routing blocks, node N is the final one (1×1 convolution,
    pooling, classifier). `chs`, `fm_sizes` and `num_layers` have one entry a block, `stage` one more for the final
    node. `fm_sizes` are the maps at `input_size`; at another input size they follow from the strides.
    """

    name: str
    source: str = ""  # where the numbers come from
    input_size: Positive
    init_dim: Positive  # channels after the stem's convolution
    chs: tuple[int, ...]
    fm_sizes: tuple[int, ...]
    stage: tuple[int, ...]
    num_layers: tuple[int, ...]
    last_dim: Positive  # channels that reach the classifier
    max_connections: Positive  # blocks an edge may look ahead
    head_ops: tuple[str, ...]  # candidates of a shape-alignment layer
    stack_ops: tuple[str, ...]  # candidates of a stacked layer
    skip_reg: bool = False  # a skip costs a tenth of its layer's first op
    bn_momentum: float = Field(0.1, gt=0, le=1)
    bn_eps: float = Field(1e-5, gt=0)
    search: SearchRecipe
    retrain: RetrainRecipe

    @classmethod
    def load(cls, space: str | Path) -> SearchSpace:
        """A preset by name or a YAML file by path; raises ValueError or FileNotFoundError with one sentence."""
        preset = PACKAGE / "spaces" / f"{space}.yml"
        path = preset if space in PRESETS else Path(space)
        if not path.is_file():
            raise FileNotFoundError(f"no search space '{space}': neither a YAML file nor one of {', '.join(PRESETS)}")
        try:
            return cls(**{"name": path.stem, **read_yaml(path)})
        except ValidationError as error:
            raise one_sentence(error, f"search space {path.name}") from None

    @field_validator("head_ops", "stack_ops")
    @classmethod
    def _ops_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for op in names:
            ops.net_type(op)
        if len(set(names)) < len(names):
            raise ValueError("lists an op twice")
        return names

    @model_validator(mode="after")
    def _can_work(self) -> SearchSpace:
        blocks = len(self.chs)
        lengths = {"fm_sizes": blocks, "num_layers": blocks, "stage": blocks + 1}
        for field, expected in lengths.items():
            if (found := len(getattr(self, field))) != expected:
                final = " and the final node" if field == "stage" else ""
                raise ValueError(
                    f"{field} has {found} entries, {expected} are needed for the {blocks} blocks of chs{final}"
                )
        if blocks < 2:
            raise ValueError("chs lists fewer than 2 blocks, so there is nothing to search")
        self._ops_agree()
        for block in range(blocks):
            self._block_can_work(block)
        for block in range(blocks):
            if block and not self.incoming(block):
                raise ValueError(f"block {block} cannot be reached from any block before it {self._edge_rule}")
            if not self.outgoing(block):
                raise ValueError(f"block {block} has no path to the end {self._edge_rule}")
        if self.net_type == "res" and (0, blocks) in self.edges:
            raise ValueError("block 0 may feed the final node, but a ResNet network needs at least one routing block")
        return self

    def _ops_agree(self) -> None:
        if not self.head_ops:
            raise ValueError("head_ops is empty, every edge needs a candidate")
        if ops.SKIP in self.head_ops:
            raise ValueError("head_ops holds skip_connect, which cannot change width or map")
        if any(self.num_layers) and not self.stack_ops:
            raise ValueError("stack_ops is empty, but num_layers asks for stacked layers")
        try:
            ops.family((*self.head_ops, *self.stack_ops))
        except ValueError as error:
            raise ValueError(f"head_ops and stack_ops: {error}") from None
        if self.net_type == "res" and self.init_dim != self.chs[0]:
            raise ValueError(f"block 0 is {self.chs[0]} wide, but a ResNet stem leaves init_dim = {self.init_dim}")

    def _block_can_work(self, block: int) -> None:
        if self.chs[block] < 1:
            raise ValueError(f"block {block} has width {self.chs[block]}, widths must be positive")
        if self.num_layers[block] < 0:
            raise ValueError(f"block {block} has {self.num_layers[block]} layers, depth cannot be negative")
        if self.fm_sizes[block] < 1:
            raise ValueError(f"block {block} has a map of {self.fm_sizes[block]}, a map cannot shrink below 1")
        if block == 0:
            if self.num_layers[0]:
                raise ValueError("block 0 is the stem's output without layers, num_layers must start with 0")
            if self.fm_sizes[0] != math.ceil(self.input_size / 2):
                raise ValueError(
                    f"block 0 has a map of {self.fm_sizes[0]}, the stem halves input_size = {self.input_size}"
                    f" to {math.ceil(self.input_size / 2)}"
                )
        elif self.fm_sizes[block] > self.fm_sizes[block - 1]:
            raise ValueError(f"block {block} has a larger map than block {block - 1}, maps cannot grow")
        if self.stage[block + 1] < self.stage[block]:
            node = "the final node" if block + 1 == len(self.chs) else f"block {block + 1}"
            raise ValueError(f"{node} is in stage {self.stage[block + 1]}, before block {block}; stages cannot go back")

    @property
    def _edge_rule(self) -> str:
        return f"(an edge spans at most {self.max_connections} blocks, one stage and one halving of the map)"

    @property
    def net_type(self) -> Literal["mbv2", "res"]:
        """The family, as the published `net_type` line names it."""
        return ops.net_type(self.head_ops[0])

    @property
    def num_blocks(self) -> int:
        """Blocks without the final node, whose index this is."""
        return len(self.chs)

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """All edges (i, j), by i and then j; METHOD: scanning ends at the first block that is too far."""
        sizes = (*self.fm_sizes, self.fm_sizes[-1])
        edges = []
        for i in range(self.num_blocks):
            for j in range(i + 1, min(i + self.max_connections, self.num_blocks) + 1):
                if self.stage[j] - self.stage[i] > 1 or sizes[i] not in (sizes[j], 2 * sizes[j]):
                    break
                edges.append((i, j))
        return edges

    @property
    def head_edges(self) -> list[tuple[int, int]]:
        """Edges into routing blocks, by block and nearest first: the order of all shape-alignment layers."""
        return [(i, j) for j in range(1, self.num_blocks) for i in self.incoming(j)]

    def incoming(self, node: int) -> list[int]:
        """Blocks that feed a node, nearest first: the order of `alpha_head`'s rows."""
        return [i for i, j in reversed(self.edges) if j == node]

    def outgoing(self, block: int) -> list[int]:
        """Nodes that a block feeds, nearest first: the order of `beta`'s entries."""
        return [j for i, j in self.edges if i == block]

    def stride(self, i: int, j: int) -> int:
        """1 or 2: how edge i → j shrinks the map."""
        return 1 if j == self.num_blocks else self.fm_sizes[i] // self.fm_sizes[j]

    def real_channels(self, block: int) -> int:
        """Channels that leave a block: its width, or four times as many behind Bottlenecks (the stem has none)."""
        return self.chs[block] if block == 0 else ops.out_channels(self.head_ops[0], self.chs[block])

    def maps(self, input_size: int) -> list[int]:
        """Side of every block's map for a square input of `input_size` pixels; ValueError where one would vanish."""
        sizes = [math.ceil(input_size / 2)]
        for block in range(1, self.num_blocks):
            i = self.incoming(block)[0]
            stride = self.stride(i, block)
            if stride > sizes[i] or input_size < 2:
                raise ValueError(
                    f"search space {self.name}: block {block} would shrink a map below 1 at input size {input_size}"
                )
            sizes.append(math.ceil(sizes[i] / stride))
        return sizes

    def count_paths(self) -> int:
        """Number of block paths from block 0 to the final node."""
        ways = [1] + [0] * self.num_blocks
        for i, j in self.edges:
            ways[j] += ways[i]
        return ways[-1]
