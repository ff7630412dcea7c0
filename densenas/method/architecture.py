"""Derived networks: the `net_config` text format, the network it describes, and its size."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from densenas import own
from densenas.files import DATA, literal, naming
from densenas.method import ops

# Far beyond any published network; a number with some zeros too many must not allocate for ever.
WIDEST = 100_000  # channels
MOST_LAYERS = 500
MOST_PARAMS = 1_000  # millions


def _check_widths(found: str, *widths: int) -> None:
    if min(widths) < 1:
        raise ValueError(f"{found}, widths must be positive")
    if max(widths) > WIDEST:
        raise ValueError(f"{found}, widths are at most {WIDEST:,}")


@dataclass(frozen=True)
class Block:
    """One routing block of a derived network; widths are nominal (a Bottleneck leaves four times as many)."""

    in_ch: int
    out_ch: int
    head: str
    stack: tuple[str, ...]
    stride: int

    def __str__(self) -> str:
        widths = [self.in_ch, self.out_ch]
        return str([widths, self.head, [*self.stack], len(self.stack), self.stride])

    @classmethod
    def parse(cls, text: str) -> Block:
        match literal(text):
            case [[in_ch, out_ch], str(head), list(stack), count, stride] if all(
                type(number) is int for number in (in_ch, out_ch, count, stride)
            ) and all(isinstance(op, str) for op in stack):
                pass
            case _:
                expected = "expected [[in, out], head op, [stack ops], their number, stride]"
                raise ValueError(f"{expected}, found {text[:200]!r}")
        if count != len(stack):
            raise ValueError(f"announces {count} stacked ops, but lists {len(stack)}")
        _check_widths(f"has widths {in_ch} and {out_ch}", in_ch, out_ch)
        if stride not in (1, 2):
            raise ValueError(f"has stride {stride}, strides are 1 or 2")
        for op in (head, *stack):
            ops.net_type(op)  # refuses an unknown one
            if op == ops.SKIP:
                raise ValueError(f"holds {ops.SKIP}, which a derived network drops")
        return cls(in_ch, out_ch, head, tuple(stack), stride)


@dataclass(frozen=True)
class Architecture:
    """A chain of blocks, as `str` ↔ `parse` write and read it: the published `net_config` (section 3.4).

    MobileNetV2 networks start with the stem's `mbconv_k3_t1` block and end with a 1×1 convolution to `last_dim`
    channels; ResNet networks have neither. `published` holds a named network's published figures.
    """

    blocks: tuple[Block, ...]
    last_dim: int | None = None
    published: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("net_config has no blocks")
        layers = sum(1 + len(block.stack) for block in self.blocks)
        if layers > MOST_LAYERS:
            raise ValueError(f"net_config has {layers:,} layers, at most {MOST_LAYERS:,} are built")
        with naming("net_config"):
            net_type = ops.family(self.all_ops)
            for index, (before, block) in enumerate(pairwise(self.blocks), start=1):
                if before.out_ch != block.in_ch:
                    left = f"block {index - 1} leaves {before.out_ch}"
                    raise ValueError(f"block {index} takes {block.in_ch} channels, {left}")
            if net_type == "mbv2" and self.last_dim is None:
                end = "ends with [[in, out], 'conv1_1'], which is missing"
                raise ValueError(f"a MobileNetV2 network {end}")
            if net_type == "res" and self.last_dim is not None:
                raise ValueError("a ResNet network has no conv1_1 at its end")
            if self.last_dim is not None:
                _check_widths(f"conv1_1 leaves {self.last_dim} channels", self.last_dim)

    @property
    def routing_blocks(self) -> tuple[Block, ...]:
        """The blocks that a search chose: all but the stem's own."""
        return self.blocks[1:] if self.net_type == "mbv2" else self.blocks

    @property
    def num_layers(self) -> int:
        """Layers of these blocks: one shape alignment each, and their stacks."""
        return sum(1 + len(block.stack) for block in self.routing_blocks)

    @property
    def net_type(self) -> ops.NetType:
        """The family, which shows at the end: ops of one's own may be of either."""
        return "res" if self.last_dim is None else "mbv2"

    @property
    def all_ops(self) -> list[str]:
        """Of every layer from input to output."""
        return [op for block in self.blocks for op in (block.head, *block.stack)]

    @property
    def own_ops(self) -> list[str]:
        """The different ones that are code of one's own."""
        return [op for op in dict.fromkeys(self.all_ops) if own.is_own(op)]

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Reads a `net_config`; raises ValueError naming the block and what is wrong with it."""
        pieces = text.strip().split("|")
        if len(pieces) > MOST_LAYERS + 1:
            found = f"net_config has {len(pieces):,} blocks"
            raise ValueError(f"{found}, at most {MOST_LAYERS:,} are built")
        with naming(f"net_config: block {len(pieces) - 1}", " "):
            end = literal(pieces[-1])
        match end:
            case [[in_ch, last_dim], "conv1_1"] if type(in_ch) is type(last_dim) is int:
                pieces.pop()
            case _:
                in_ch = last_dim = None
        blocks = []
        for index, piece in enumerate(pieces):
            with naming(f"net_config: block {index}", " "):
                blocks.append(Block.parse(piece))
        arch = cls(tuple(blocks), last_dim)
        if last_dim is not None and in_ch != blocks[-1].out_ch:
            leaves = f"the last block leaves {blocks[-1].out_ch}"
            raise ValueError(f"net_config: conv1_1 takes {in_ch} channels, {leaves}")
        return arch

    @classmethod
    def read(cls, text: str) -> Architecture:
        """A network given as a net_config or by its published name."""
        return cls.parse(text) if text.lstrip().startswith("[") else cls.named(text)

    def __str__(self) -> str:
        pieces = [str(block) for block in self.blocks]
        if self.last_dim is not None:
            pieces.append(f"[[{self.blocks[-1].out_ch}, {self.last_dim}], 'conv1_1']")
        return "|".join(pieces)

    @classmethod
    def named(cls, name: str) -> Architecture:
        """A network whose layers are public, e.g. "DenseNAS-A"; KeyError lists the names."""
        known = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))["architectures"]
        if name not in known:
            listed = ", ".join(known)
            raise KeyError(f"no published layer list for '{name}', there is one for {listed}")
        arch = cls.parse(known[name]["net_config"])
        return cls(arch.blocks, arch.last_dim, {"name": name, **known[name]})

    def mult_adds(self, input_size: int, num_classes: int = 1000) -> float:
        """Multiply-adds for one square image, in millions; no BN, no biases (as published)."""
        size = math.ceil(input_size / 2)
        channels = self.blocks[0].in_ch
        total = 27 * channels * size**2
        for block in self.blocks:
            total += ops.mult_adds(block.head, channels, block.out_ch, size, block.stride)
            size = math.ceil(size / block.stride)
            channels = ops.out_channels(block.head, block.out_ch)
            total += sum(ops.mult_adds(op, channels, block.out_ch, size, 1) for op in block.stack)
        if self.last_dim:
            total += ops.mult_adds("conv1_1", channels, self.last_dim, size, 1)
            channels = self.last_dim
        return (total + channels * num_classes) / 1e6

    def params(self, num_classes: int = 1000) -> float:
        """Parameters in millions, counted without allocating any."""
        with torch.device("meta"):
            return sum(p.numel() for p in DerivedNet(self, num_classes).parameters()) / 1e6

    def build(self, num_classes: int = 1000) -> DerivedNet:
        """The network, freshly initialised from PyTorch's global generator; ValueError where it is too large."""
        params = self.params(num_classes)
        if params > MOST_PARAMS:
            limit = f"at most {MOST_PARAMS:,} million are built"
            raise ValueError(f"net_config has {params:,.0f} million parameters, {limit}")
        return DerivedNet(self, num_classes)


class DerivedNet(nn.Sequential):
    """A derived network: images (B, 3, H, W) → logits (B, num_classes)."""

    def __init__(self, arch: Architecture, num_classes: int) -> None:
        norm = ops.batch_norm(affine=True, eps=1e-3 if arch.net_type == "mbv2" else 1e-5)
        stem = channels = arch.blocks[0].in_ch
        blocks = nn.Sequential()
        for block in arch.blocks:
            head = ops.build_op(block.head, channels, block.out_ch, block.stride, norm)
            channels = ops.out_channels(block.head, block.out_ch)
            stack = nn.Sequential()
            for op in block.stack:
                stack.append(ops.build_op(op, channels, block.out_ch, 1, norm))
            blocks.append(nn.Sequential(OrderedDict(head_layer=head, stack_layers=stack)))
        last = nn.Sequential()
        if arch.last_dim:
            last.add_module("conv1_1", ops.conv_norm(channels, arch.last_dim, norm, nn.ReLU6))
            channels = arch.last_dim
        super().__init__(
            OrderedDict(
                input_block=ops.conv_norm(3, stem, norm, nn.ReLU6, kernel_size=3, stride=2),
                blocks=blocks,
                conv1_1_block=last,
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=nn.Linear(channels, num_classes),
            )
        )
        self.arch = arch
        ops.init_weights(self)

    def features(self, images: Tensor) -> list[Tensor]:
        """The last map of each side, largest first: of 224 pixels those of 112, 56, 28, 14 and 7.

        Each is (B, channels, side, side), without the last 1×1 convolution; a detector takes the last four.
        """
        stem, blocks, *_ = self
        maps = [stem(images)]
        for block in blocks.children():
            x = block(maps[-1])
            if x.shape[-1] == maps[-1].shape[-1]:
                maps.pop()
            maps.append(x)
        return maps


@dataclass(frozen=True)
class Candidate:
    """An architecture with its path (nodes from 0 to the final one), the ops of every stack on it, skips included,
    log-probability and cost in the table's unit.
    """

    architecture: Architecture
    path: tuple[int, ...]
    stacks: tuple[tuple[str, ...], ...]
    log_probability: float
    cost: float
