"""The search space: routing blocks of many widths, and which of them may feed which (paper, section 3.1)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from densenas.files import PACKAGE, Strict, naming, read_yaml, refuse
from densenas.method import ops
from densenas.method.architecture import Architecture, Block
from densenas.recipes import RetrainRecipe, SearchRecipe

PRESETS = ("mbv2", "resnet", "bottleneck", "cifar_mbv2", "cifar_resnet", "digits")
# Far beyond all that is trained, and near enough that nothing computed from a space takes for ever.
BLOCKS = 128
LAYERS = 64  # of a block
SEQUENCES = 200_000  # of ops that the stacks of a space can become; mbv2 has 3,371
PIXELS = 8192  # of a side
CHANNELS = 65_536
Positive = Annotated[int, Field(ge=1)]
Channels = Annotated[int, Field(le=CHANNELS)]
Layer = tuple[
    str, int, int, int, int
]  # op, real input channels, nominal width, side of the input map, stride
Layers = tuple[list[list[list[Layer]]], list[list[list[Layer]]], list[Layer]]


class SearchSpace(Strict):
    """A dense search space as data. Names are those of the published configurations.

    Block 0 is the stem's output, blocks 1 … N-1 are routing blocks, node N is the final one (1×1 convolution,
    pooling, classifier). `chs`, `fm_sizes` and `num_layers` have one entry a block, `stage` one more for the final
    node. `fm_sizes` are the maps at `input_size`; at another input size they follow from the strides.
    """

    name: str = Field(pattern=r"^[^\n\r]+$", max_length=200)
    source: str = ""  # where the numbers come from
    input_size: int = Field(ge=1, le=PIXELS)
    init_dim: int = Field(ge=1, le=CHANNELS)  # channels after the stem's convolution
    chs: tuple[Channels, ...] = Field(strict=False, max_length=BLOCKS)
    fm_sizes: tuple[int, ...] = Field(strict=False)
    stage: tuple[int, ...] = Field(strict=False)
    num_layers: tuple[Annotated[int, Field(le=LAYERS)], ...] = Field(strict=False)
    last_dim: int = Field(ge=1, le=CHANNELS)  # channels that reach the classifier
    max_connections: Positive  # blocks an edge may look ahead
    head_ops: tuple[str, ...] = Field(strict=False)  # candidates of a shape-alignment layer
    stack_ops: tuple[str, ...] = Field(strict=False)  # candidates of a stacked layer
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
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"no search space '{space}': neither a YAML file nor one of {', '.join(PRESETS)}"
            )
        settings = read_yaml(path)
        with naming(f"search space {path.name}"):
            loaded = cls.model_validate({"name": path.stem, **settings})
            loaded.refuse_endless()
        return loaded

    @field_validator("head_ops", "stack_ops")
    @classmethod
    def _ops_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for op in names:
            ops.net_type(op)
        refuse(len(set(names)) < len(names), "lists an op twice")
        return names

    @model_validator(mode="after")
    def _can_work(self) -> SearchSpace:
        blocks = len(self.chs)
        for name, nodes in {
            "fm_sizes": "",
            "num_layers": "",
            "stage": " and the final node",
        }.items():
            found, needed = len(getattr(self, name)), blocks + bool(nodes)
            wrong = f"{name} has {found} entries, {needed} are needed for the {blocks} blocks of chs{nodes}"
            refuse(found != needed, wrong)
        refuse(blocks < 2, "chs lists fewer than 2 blocks, so there is nothing to search")
        refuse(not self.head_ops, "head_ops is empty, every edge needs a candidate")
        refuse(
            ops.SKIP in self.head_ops,
            "head_ops holds skip_connect, which cannot change width or map",
        )
        bare = any(self.num_layers) and not self.stack_ops
        refuse(bare, "stack_ops is empty, but num_layers asks for stacked layers")
        with naming("head_ops and stack_ops"):
            resnet = ops.family((*self.head_ops, *self.stack_ops)) == "res"
        wrong = (
            f"block 0 is {self.chs[0]} wide, but a ResNet stem leaves init_dim = {self.init_dim}"
        )
        refuse(resnet and self.init_dim != self.chs[0], wrong)
        for block in range(blocks):
            self._block_can_work(block)
        rule = f"(an edge spans at most {self.max_connections} blocks, one stage and one halving of the map)"
        for block in range(blocks):
            unreached = block > 0 and not self.incoming(block)
            refuse(unreached, f"block {block} cannot be reached from any block before it {rule}")
            refuse(not self.outgoing(block), f"block {block} has no path to the end {rule}")
        empty = (
            "block 0 may feed the final node, but a ResNet network needs at least one routing block"
        )
        refuse(resnet and (0, blocks) in self.edges, empty)
        return self

    def _block_can_work(self, block: int) -> None:
        width, side, layers = self.chs[block], self.fm_sizes[block], self.num_layers[block]
        refuse(width < 1, f"block {block} has width {width}, widths must be positive")
        refuse(layers < 0, f"block {block} has {layers} layers, depth cannot be negative")
        refuse(side < 1, f"block {block} has a map of {side}, a map cannot shrink below 1")
        if block == 0:
            refuse(
                layers > 0,
                "block 0 is the stem's output without layers, num_layers must start with 0",
            )
            half = math.ceil(self.input_size / 2)
            halved = f"the stem halves input_size = {self.input_size} to {half}"
            refuse(side != half, f"block 0 has a map of {side}, {halved}")
        else:
            larger = side > self.fm_sizes[block - 1]
            refuse(
                larger, f"block {block} has a larger map than block {block - 1}, maps cannot grow"
            )
        stage, onward = self.stage[block : block + 2]
        node = "the final node" if block + 1 == self.num_blocks else f"block {block + 1}"
        refuse(
            onward < stage,
            f"{node} is in stage {onward}, before block {block}; stages cannot go back",
        )

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
        return (
            self.chs[block] if block == 0 else ops.out_channels(self.head_ops[0], self.chs[block])
        )

    def maps(self, input_size: int) -> list[int]:
        """Side of every block's map for a square input of `input_size` pixels; ValueError where one would vanish."""
        if not isinstance(input_size, Integral) or input_size > PIXELS:
            expected = f"expected whole pixels, at most {PIXELS}"
            raise ValueError(f"input size is {input_size!r}, {expected}")
        sizes = [math.ceil(input_size / 2)]
        for block in range(1, self.num_blocks):
            i = self.incoming(block)[0]
            stride = self.stride(i, block)
            wrong = f"search space {self.name}: block {block} would shrink a map below 1 at input size {input_size}"
            refuse(stride > sizes[i] or input_size < 2, wrong)
            sizes.append(math.ceil(sizes[i] / stride))
        return sizes

    def layers(self, input_size: int) -> Layers:
        """Every candidate in the nesting of a cost table: head (per block from 1 on, per incoming edge, per op), stack
        (per block, per layer, per op) and final (per edge to the final node).
        """
        sizes, channels = (
            self.maps(input_size),
            [self.real_channels(block) for block in range(self.num_blocks)],
        )
        head, stack = [], []
        for j, width in enumerate(self.chs[1:], start=1):
            edges = [(channels[i], width, sizes[i], self.stride(i, j)) for i in self.incoming(j)]
            head.append([[(op, *edge) for op in self.head_ops] for edge in edges])
            stack.append(
                [[(op, channels[j], width, sizes[j], 1) for op in self.stack_ops]]
                * self.num_layers[j]
            )
        final = [
            ("conv1_1", channels[i], self.last_dim, sizes[i], 1)
            for i in self.incoming(self.num_blocks)
        ]
        return head, stack, final

    def path_of(self, arch: Architecture) -> tuple[int, ...]:
        """The first path, nodes from 0 to the final one, that can be this architecture; ValueError if none can."""
        stem, last = len(self.stem), self.num_blocks

        def fits(i: int, j: int, block: Block) -> bool:
            skipped = (ops.SKIP,) * (self.num_layers[j] - len(block.stack))
            shape = (block.in_ch, block.out_ch, block.stride) == (
                self.chs[i],
                self.chs[j],
                self.stride(i, j),
            )
            chosen = block.head in self.head_ops and {*block.stack, *skipped} <= {*self.stack_ops}
            return shape and chosen and len(block.stack) <= self.num_layers[j]

        # Of the paths to one block the first is kept: where widths repeat, there can be millions.
        paths = {0: (0,)} if arch.blocks[:stem] == self.stem else {}
        for block in arch.blocks[stem:]:
            onward: dict[int, tuple[int, ...]] = {}
            for i, path in paths.items():
                for j in self.outgoing(i):
                    longer = (*path, j)
                    if j < last and fits(i, j, block) and longer < onward.get(j, (last,)):
                        onward[j] = longer
            paths = onward
        whole = [(*path, last) for i, path in paths.items() if last in self.outgoing(i)]
        if not whole:
            raise ValueError(f"the architecture is not one of space {self.name}: {arch}")
        return min(whole)

    @property
    def stem(self) -> tuple[Block, ...]:
        """The block that every network of a MobileNetV2 space starts with; none in a ResNet space."""
        return (
            (Block(self.init_dim, self.chs[0], "mbconv_k3_t1", (), 1),)
            if self.net_type == "mbv2"
            else ()
        )

    def architecture(
        self, path: Sequence[int], chosen: Iterable[tuple[str, tuple[str, ...]]]
    ) -> Architecture:
        """The network along a path (nodes from 0 to the final one), with the head op and stack of each block on it."""
        edges = zip(pairwise(path[:-1]), chosen, strict=True)
        blocks = [
            Block(self.chs[i], self.chs[j], head, stack, self.stride(i, j))
            for (i, j), (head, stack) in edges
        ]
        return Architecture(
            (*self.stem, *blocks), self.last_dim if self.net_type == "mbv2" else None
        )

    def count_paths(self) -> int:
        """Number of block paths from block 0 to the final node."""
        ways = [1] + [0] * self.num_blocks
        for i, j in self.edges:
            ways[j] += ways[i]
        return ways[-1]

    def count_sequences(self) -> int:
        """Number of op sequences, skips dropped, that the stacks of all blocks can become."""
        convolutions = len(set(self.stack_ops) - {ops.SKIP})
        total = 0
        for layers in self.num_layers:
            fewest = 0 if ops.SKIP in self.stack_ops else layers
            total += sum(convolutions**kept for kept in range(fewest, layers + 1))
        return total

    def refuse_endless(self) -> None:
        """ValueError where stacks can become more sequences than a derivation can weigh in time."""
        if self.count_sequences() > SEQUENCES:
            count = f"{self.count_sequences():.3g} sequences of ops"
            most = f"at most {SEQUENCES:,} can be weighed: take fewer layers or ops"
            raise ValueError(
                f"num_layers and the {len(self.stack_ops)} stack_ops allow {count}, {most}"
            )
