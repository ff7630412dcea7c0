"""The search space: routing blocks of many widths, and which of them may feed which (paper, section 3.1)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, field_validator, model_validator

from densenas import own
from densenas.files import PACKAGE, Strict, naming, read_yaml
from densenas.method import ops
from densenas.method.architecture import Architecture, Block
from densenas.recipes import RetrainRecipe, SearchRecipe

PRESETS = ("mbv2", "resnet", "bottleneck", "cifar_mbv2", "cifar_resnet", "digits")
# What of a space its networks and their costs do not depend on.
RECIPES = ("name", "source", "search", "retrain")
# Far beyond all that is trained, and near enough that nothing computed from a space takes for ever.
BLOCKS = 128
LAYERS = 64  # of a block
SEQUENCES = 200_000  # of ops that the stacks of a space can become; mbv2 has 3,371
PIXELS = 8192  # of a side
CHANNELS = 65_536
Positive = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=0, le=LAYERS)]
Channels = Annotated[int, Field(ge=1, le=CHANNELS)]


class Layer(NamedTuple):
    """A candidate: its op, and what its Mult-Adds and its latency depend on."""

    op: str
    in_channels: int  # real ones
    width: int  # nominal
    side: int  # of the input map, in pixels
    stride: int


class Layers(NamedTuple):
    """Every candidate of a space; rows as in a cost table, a `Layer` for each op."""

    head: list[list[Layer]]  # a row for each edge into a block
    stack: list[list[Layer]]  # a row for each stacked layer
    final: list[Layer]  # an entry for each edge to the final node


class SearchSpace(Strict):
    """A dense search space as data. Names are those of the published configurations.

    Block 0 is the stem's output, blocks 1 … N-1 are routing blocks, node N is the final one (1×1 convolution,
    pooling, classifier). `chs`, `fm_sizes` and `num_layers` have one entry a block, `stage` one more for the final
    node. `fm_sizes` are the maps at `input_size`; at another input size they follow from the strides.
    """

    name: str = Field(pattern=r"^[^\n\r]+$", max_length=200)
    source: str = ""  # where the numbers come from
    input_size: int = Field(ge=1, le=PIXELS)
    init_dim: Channels  # channels after the stem's convolution
    chs: tuple[Channels, ...] = Field(strict=False, min_length=2, max_length=BLOCKS)
    fm_sizes: tuple[Positive, ...] = Field(strict=False)
    stage: tuple[int, ...] = Field(strict=False)
    num_layers: tuple[Depth, ...] = Field(strict=False)
    last_dim: Channels  # channels that reach the classifier
    max_connections: Positive  # blocks an edge may look ahead
    head_ops: tuple[str, ...] = Field(
        strict=False, min_length=1
    )  # candidates of a shape-alignment layer
    stack_ops: tuple[str, ...] = Field(strict=False)  # candidates of a stacked layer
    skip_reg: bool = False  # a skip costs a tenth of its layer's first op
    bn_momentum: float = Field(0.1, gt=0, le=1)
    bn_eps: float = Field(1e-5, gt=0)
    search: SearchRecipe
    retrain: RetrainRecipe

    @classmethod
    def load(cls, space: str | Path) -> SearchSpace:
        """A preset by name or a YAML file by path; raises ValueError or FileNotFoundError with one sentence."""
        path = PACKAGE / "spaces" / f"{space}.yml" if space in PRESETS else Path(space)
        if not os.path.isfile(path):
            known = f"neither a YAML file nor one of {', '.join(PRESETS)}"
            raise FileNotFoundError(f"no search space '{space}': {known}")
        settings = read_yaml(path)
        with naming(f"search space {path.name}"):
            loaded = cls.model_validate({"name": path.stem, **settings})
            loaded.check_sequences()
        return loaded

    @property
    def net_type(self) -> ops.NetType:
        """The family, as the published `net_type` line names it."""
        return ops.family((*self.head_ops, *self.stack_ops)) or "mbv2"

    @property
    def own_ops(self) -> list[str]:
        """Candidates that are code of one's own, package.module:function."""
        return [op for op in dict.fromkeys((*self.head_ops, *self.stack_ops)) if own.is_own(op)]

    def code(self) -> dict[str, dict[str, str]]:
        """Digests of these ops' code, for the conditions of a cost table: none where there are none of them."""
        codes = own.codes(self.own_ops)
        return {"code": codes} if codes else {}

    @property
    def num_blocks(self) -> int:
        """Blocks without the final node, whose index this is."""
        return len(self.chs)

    # The graph

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """All edges (i, j), by i and then j; scanning j ends at the first block that is too far."""
        sizes = (*self.fm_sizes, self.fm_sizes[-1])
        edges = []
        for i in range(self.num_blocks):
            for j in range(i + 1, min(i + self.max_connections, self.num_blocks) + 1):
                if self.stage[j] - self.stage[i] > 1 or sizes[i] not in (sizes[j], 2 * sizes[j]):
                    break
                edges.append((i, j))
        return edges

    def incoming(self, node: int) -> list[int]:
        """Blocks that feed a node, nearest first: the order of `alpha_head`'s rows."""
        return [i for i, j in reversed(self.edges) if j == node]

    def outgoing(self, block: int) -> list[int]:
        """Nodes that a block feeds, nearest first: the order of `beta`'s entries."""
        return [j for i, j in self.edges if i == block]

    @property
    def head_edges(self) -> list[tuple[int, int]]:
        """Edges into routing blocks, by block and nearest first: the rows of all shape-alignment layers."""
        return [(i, j) for j in range(1, self.num_blocks) for i in self.incoming(j)]

    @property
    def stack_layers(self) -> list[tuple[int, int]]:
        """(block, number in it from 0) of every stacked layer, in the order of all rows."""
        return [(j, number) for j in range(self.num_blocks) for number in range(self.num_layers[j])]

    def stack_rows(self, block: int) -> slice:
        """Where a block's layers stand among those rows."""
        first = sum(self.num_layers[:block])
        return slice(first, first + self.num_layers[block])

    def count_paths(self) -> int:
        """Number of block paths from block 0 to the final node."""
        ways = [1] + [0] * self.num_blocks
        for i, j in self.edges:
            ways[j] += ways[i]
        return ways[-1]

    # Maps, channels and layers

    def stride(self, i: int, j: int) -> int:
        """1 or 2: how edge i → j shrinks the map."""
        return 1 if j == self.num_blocks else self.fm_sizes[i] // self.fm_sizes[j]

    def real_channels(self, block: int) -> int:
        """Channels that leave a block: its width, or four times as many behind Bottlenecks (the stem has none)."""
        width = self.chs[block]
        return width if block == 0 else ops.out_channels(self.head_ops[0], width)

    def maps(self, input_size: int) -> list[int]:
        """Side of every block's map for a square input of `input_size` pixels; ValueError where one would vanish."""
        if not isinstance(input_size, Integral) or input_size > PIXELS:
            expected = f"expected whole pixels, at most {PIXELS}"
            raise ValueError(f"input size is {input_size!r}, {expected}")
        sizes = [math.ceil(input_size / 2)]
        for block in range(1, self.num_blocks):
            i = self.incoming(block)[0]
            stride = self.stride(i, block)
            if stride > sizes[i] or input_size < 2:
                vanishes = f"block {block} would shrink a map below 1 at input size {input_size}"
                raise ValueError(f"search space {self.name}: {vanishes}")
            sizes.append(math.ceil(sizes[i] / stride))
        return sizes

    def layers(self, input_size: int) -> Layers:
        """Every candidate at this input size."""
        sizes = self.maps(input_size)
        channels = [self.real_channels(block) for block in range(self.num_blocks)]
        head = []
        for i, j in self.head_edges:
            shape = channels[i], self.chs[j], sizes[i], self.stride(i, j)
            head.append([Layer(op, *shape) for op in self.head_ops])
        stack = []
        for j, _ in self.stack_layers:
            shape = channels[j], self.chs[j], sizes[j], 1
            stack.append([Layer(op, *shape) for op in self.stack_ops])
        final = []
        for i in self.incoming(self.num_blocks):
            final.append(Layer("conv1_1", channels[i], self.last_dim, sizes[i], 1))
        return Layers(head, stack, final)

    # Networks

    @property
    def stem(self) -> tuple[Block, ...]:
        """The block that every network of a MobileNetV2 space starts with; none in a ResNet space."""
        if self.net_type == "res":
            return ()
        return (Block(self.init_dim, self.chs[0], "mbconv_k3_t1", (), 1),)

    def architecture(
        self, path: Sequence[int], chosen: Iterable[tuple[str, tuple[str, ...]]]
    ) -> Architecture:
        """The network along a path (nodes from 0 to the final one), with the head op and stack of each block on it."""
        blocks = [*self.stem]
        for (i, j), (head, stack) in zip(pairwise(path[:-1]), chosen, strict=True):
            blocks.append(Block(self.chs[i], self.chs[j], head, stack, self.stride(i, j)))
        return Architecture(tuple(blocks), self.last_dim if self.net_type == "mbv2" else None)

    def path_of(self, arch: Architecture) -> tuple[int, ...]:
        """The first path, nodes from 0 to the final one, that can be this architecture; ValueError if none can."""
        stem, last = len(self.stem), self.num_blocks
        # Of the paths to one block the first is kept: where widths repeat, there can be millions.
        paths: dict[int, tuple[int, ...]] = {}
        if arch.blocks[:stem] == self.stem:
            paths[0] = (0,)
        for block in arch.blocks[stem:]:
            onward: dict[int, tuple[int, ...]] = {}
            for i, j in self.head_edges:
                if i in paths and self._fits(i, j, block):
                    longer = (*paths[i], j)
                    onward[j] = min(longer, onward.get(j, longer))
            paths = onward
        whole = [(*path, last) for i, path in paths.items() if last in self.outgoing(i)]
        if not whole:
            raise ValueError(f"the architecture is not one of space {self.name}: {arch}")
        return min(whole)

    def _fits(self, i: int, j: int, block: Block) -> bool:
        """Whether a network's block can be block j behind block i."""
        shape = self.chs[i], self.chs[j], self.stride(i, j)
        skipped = self.num_layers[j] - len(block.stack)
        return (
            (block.in_ch, block.out_ch, block.stride) == shape
            and block.head in self.head_ops
            and {*block.stack} <= {*self.stack_ops}
            and (skipped == 0 or (skipped > 0 and ops.SKIP in self.stack_ops))
        )

    # Validation

    @field_validator("head_ops", "stack_ops")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("lists an op twice")
        return names

    @model_validator(mode="after")
    def _check(self) -> SearchSpace:
        self._check_lengths()
        self._check_ops()
        self._check_blocks()
        self._check_graph()
        return self

    def _check_lengths(self) -> None:
        blocks = self.num_blocks
        lengths = {"fm_sizes": blocks, "num_layers": blocks, "stage": blocks + 1}
        for name, needed in lengths.items():
            found = len(getattr(self, name))
            if found != needed:
                nodes = "blocks of chs and the final node" if name == "stage" else "blocks of chs"
                wanted = f"{needed} are needed for the {blocks} {nodes}"
                raise ValueError(f"{name} has {found} entries, {wanted}")

    def _check_ops(self) -> None:
        if ops.SKIP in self.head_ops:
            raise ValueError("head_ops holds skip_connect, which cannot change width or map")
        if any(self.num_layers) and not self.stack_ops:
            raise ValueError("stack_ops is empty, but num_layers asks for stacked layers")
        with naming("head_ops and stack_ops"):
            ops.family((*self.head_ops, *self.stack_ops))
        if self.net_type == "res" and self.init_dim != self.chs[0]:
            left = f"a ResNet stem leaves init_dim = {self.init_dim}"
            raise ValueError(f"block 0 is {self.chs[0]} wide, but {left}")

    def _check_blocks(self) -> None:
        half = math.ceil(self.input_size / 2)
        sizes = (*self.fm_sizes, self.fm_sizes[-1])
        if self.num_layers[0] > 0:
            raise ValueError("block 0 is the stem without layers, num_layers must start with 0")
        if sizes[0] != half:
            halved = f"the stem halves input_size = {self.input_size} to {half}"
            raise ValueError(f"block 0 has a map of {sizes[0]}, {halved}")
        for block in range(self.num_blocks):
            after = block + 1
            if sizes[after] > sizes[block]:
                larger = f"block {after} has a larger map than block {block}"
                raise ValueError(f"{larger}, maps cannot grow")
            if self.stage[after] < self.stage[block]:
                node = "the final node" if after == self.num_blocks else f"block {after}"
                back = f"{node} is in stage {self.stage[after]}, before block {block}"
                raise ValueError(f"{back}; stages cannot go back")

    def _check_graph(self) -> None:
        span = f"an edge spans at most {self.max_connections} blocks"
        rule = f"({span}, one stage and one halving of the map)"
        for block in range(self.num_blocks):
            if block > 0 and not self.incoming(block):
                raise ValueError(f"block {block} cannot be reached from any block before it {rule}")
            if not self.outgoing(block):
                raise ValueError(f"block {block} has no path to the end {rule}")
        if self.net_type == "res" and (0, self.num_blocks) in self.edges:
            needed = "a ResNet network needs at least one routing block"
            raise ValueError(f"block 0 may feed the final node, but {needed}")

    def count_sequences(self) -> int:
        """Number of op sequences, skips dropped, that the stacks of all blocks can become."""
        convolutions = len(set(self.stack_ops) - {ops.SKIP})
        total = 0
        for layers in self.num_layers:
            fewest = 0 if ops.SKIP in self.stack_ops else layers
            total += sum(convolutions**kept for kept in range(fewest, layers + 1))
        return total

    def check_sequences(self) -> None:
        """ValueError where stacks can become more sequences than a derivation can weigh in time."""
        count = self.count_sequences()
        if count > SEQUENCES:
            allowed = f"the {len(self.stack_ops)} stack_ops allow {count:.3g} sequences of ops"
            most = f"at most {SEQUENCES:,} can be weighed: take fewer layers or ops"
            raise ValueError(f"num_layers and {allowed}, {most}")
