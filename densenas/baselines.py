"""What a search is compared with at equal cost: networks as people drew them before there was one, and random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from densenas.images.loading import seed_of
from densenas.method.architecture import Architecture, Block
from densenas.method.derivation import Lattice
from densenas.method.ops import SKIP
from densenas.method.space import SearchSpace
from densenas.settings import WITHIN

AS_DEEP = "random, as deep as searched"  # what benchmarks/truth.py calls those that it drew
DRAWS = 50  # of 200 networks each, before there count as no more of some depth
# Layers of each stage; widths and strides of the stages are those of the original networks.
DESIGNS: dict[str, dict[str, tuple[int, ...]]] = {
    "mbconv_k3_t6": {
        "MobileNetV2": (1, 2, 3, 4, 3, 3, 1),
        "MobileNetV2, one layer a stage": (1,) * 7,
    },
    "basic_block": {"ResNet-18": (2, 2, 2, 2), "ResNet-34": (3, 4, 6, 3)},
    "bottleneck": {"ResNet-50": (3, 4, 6, 3)},
}


def _usual_op(space: SearchSpace) -> str:
    """What hand-made networks of the space's family are made of."""
    if space.net_type == "mbv2":
        return "mbconv_k3_t6"
    return "bottleneck" if "bottleneck" in space.head_ops else "basic_block"


def designs(space: SearchSpace) -> list[str]:
    """The names of the space's hand-made family."""
    return list(DESIGNS[_usual_op(space)])


def hand_made(
    space: SearchSpace, target: float, input_size: int, num_classes: int
) -> dict[str, Architecture]:
    """MobileNetV2 (Sandler et al., 2018) or ResNets (He et al., 2016), of the one width that costs nearest to `target`.

    `target` is in millions of Mult-Adds. Widths are multiples of 4; where none of those costs within 5 % of the
    target, of 2, or else of 1; a design of which no width does is left out. As usual for small images, the first
    strides are left out where the space halves the map less often; the last 1×1 convolution is the space's own.
    """

    def cost(arch: Architecture) -> float:
        return arch.mult_adds(input_size, num_classes)

    found = {}
    for design, layers in DESIGNS[_usual_op(space)].items():
        for multiple in (4, 2, 1):
            drawn = [_drawn(space, layers, 1.02**k, multiple) for k in range(-200, 100)]
            nearest = min(drawn, key=lambda arch: abs(math.log(cost(arch) / target)))
            if abs(cost(nearest) / target - 1) <= WITHIN:
                found[design] = nearest
                break
    return found


def _drawn(
    space: SearchSpace, layers: tuple[int, ...], factor: float, multiple: int
) -> Architecture:
    """The space's hand-made family with so many layers a stage, its widths times a factor, rounded to multiples."""

    def rounded(width: int) -> int:
        return max(multiple, multiple * round(width * factor / multiple))

    mobile = space.net_type == "mbv2"
    op = _usual_op(space)
    if mobile:
        stem_width, widths, halving = 32, [16, 24, 32, 64, 96, 160, 320], [1, 2, 3, 5]
    else:
        stem_width, widths, halving = 64, [64, 128, 256, 512], [0, 1, 2, 3]
    halvings = round(math.log2(space.fm_sizes[0] / space.fm_sizes[-1]))
    halving = halving[max(0, len(halving) - halvings) :]  # stages whose first layer halves the map
    blocks = []
    before = rounded(stem_width)
    for stage, count in enumerate(layers):
        width = rounded(widths[stage])
        head = "mbconv_k3_t1" if mobile and stage == 0 else op
        stride = 2 if stage in halving else 1
        blocks.append(Block(before, width, head, (op,) * (count - 1), stride))
        before = width
    return Architecture(tuple(blocks), space.last_dim if mobile else None)


def draw(lattice: Lattice, target: float, n: int, *seed: object) -> list[Architecture]:
    """Random networks within 5 % of the target, uniform over architectures; the same ones for the same `seed`."""
    low, high = (1 - WITHIN) * target, (1 + WITHIN) * target
    return [one.architecture for one in lattice.sample(n, seed_of(*seed), low, high)]


@cache
def _apart_by_depth(lattice: Lattice) -> tuple[Lattice, float]:
    """The same networks where a layer costs so much more that a cost also tells how many layers there are."""
    table, more = lattice.table, lattice.reach[1]
    extra = [0.0 if op == SKIP else more for op in table.space.stack_ops]
    head = [[cost + more for cost in row] for row in table.head]
    stack = [[cost + one for cost, one in zip(row, extra, strict=True)] for row in table.stack]
    return Lattice(replace(table, head=head, stack=stack)), more


def as_deep_in_turn(
    lattice: Lattice,
    target: float,
    depths: Sequence[int],
    known: Sequence[Architecture],
    number: int,
) -> Architecture | None:
    """The random network of that number among those that have each of the depths in turn (see `as_deep`)."""
    turns = [depths[turn % len(depths)] for turn in range(number + 1)]
    depth = turns.pop()
    deep = tuple(arch for arch in known if arch.num_layers == depth)
    return as_deep(lattice, target, depth, deep, turns.count(depth))


@cache
def as_deep(
    lattice: Lattice, target: float, depth: int, known: tuple[Architecture, ...], number: int
) -> Architecture | None:
    """The random network of that number (from 0) among different ones with so many layers within 5 % of the target,
    `known` being the first. Drawn uniformly but for the rounding of costs, which is as much coarser as there are depths
    and keeps few near the ends of the window in deep spaces. None where so many draws find no other.
    """
    apart, more = _apart_by_depth(lattice)
    low, high = ((1 + sign * WITHIN) * target for sign in (-1, 1))
    networks = [*known]
    for attempt in range(DRAWS):
        if number < len(networks):
            break
        try:
            seed = seed_of("depth", depth, target, attempt)
            drawn = apart.sample(200, seed, low + depth * more, high + depth * more)
        except ValueError:  # no network is so deep at this cost
            break
        for one in drawn:
            # Costs are drawn up to rounding.
            if low <= one.cost - depth * more <= high and one.architecture not in networks:
                networks.append(one.architecture)
    return networks[number] if number < len(networks) else None
