"""Mixed layers and routing blocks: what a supernet is made of (paper, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from densenas.method import ops
from densenas.method.space import Layer
from densenas.recipes import Weights

Term = tuple[int, Tensor]  # an active candidate and its weight


class MixedLayer(nn.ModuleList):
    """All candidates of one layer: x → total + Σ weight · candidate(x) over the active ones (section 3.2)."""

    def __init__(self, candidates: list[Layer], norm: ops.Norm) -> None:
        super().__init__(_build(candidates, norm))

    def candidate(self, index: int, x: Tensor) -> Tensor:
        """The output of one candidate."""
        return self[index](x)

    def forward(self, x: Tensor, active: list[Term], total: Tensor | None = None) -> Tensor:
        for index, weight in active:
            term = weight * self.candidate(index, x)
            total = term if total is None else total + term
        assert total is not None, "a choice has at least one candidate a layer"
        return total


class SharedLayer(MixedLayer):
    """A mixed layer with one bank of weights, of which every candidate is a slice.

    A weight of the bank is in each dimension as large as the largest candidate's of the same name; a candidate has its
    first channels and the centre of its kernel. So what all candidates agree on is learnt with every image, whichever
    of them is drawn. A skip has no weights, and what only some candidates have, as the shortcut's convolution of a
    ResNet block, is shared by these.
    """

    def __init__(self, candidates: list[Layer], norm: ops.Norm) -> None:
        nn.ModuleList.__init__(self)
        with torch.device("meta"):
            # Their shapes and forward passes are needed, not their numbers; a tuple hides them from the state.
            self.shapes = tuple(_build(candidates, norm))
        for layer, shape in zip(candidates, self.shapes, strict=True):
            if list(shape.buffers()) or not all(p.requires_grad for p in shape.parameters()):
                held = f"op '{layer.op}' holds buffers or fixed parameters"
                raise ValueError(f"{held}, which cannot be shared: take weights: own")
        for name, largest in _largest(self.shapes).items():
            self.register_parameter(_key(name), nn.Parameter(torch.zeros(largest)))
        self._fill(_build(candidates, norm))

    @torch.no_grad()
    def _fill(self, built: list[nn.Module]) -> None:
        """Starts as the candidates would start alone, the largest last."""
        sizes = [sum(weight.numel() for weight in module.parameters()) for module in built]
        for index in sorted(range(len(built)), key=sizes.__getitem__):
            ops.init_weights(built[index])
            slices = self.slices(index)
            for name, weight in built[index].named_parameters():
                slices[name].copy_(weight)

    def train(self, mode: bool = True) -> Self:
        for shape in self.shapes:
            shape.train(mode)
        return super().train(mode)

    def slices(self, index: int) -> dict[str, Tensor]:
        """The weights of one candidate, by their names in its module."""
        weights = {}
        for name, like in self.shapes[index].named_parameters():
            weights[name] = _slice(self.get_parameter(_key(name)), like.shape)
        return weights

    def candidate(self, index: int, x: Tensor) -> Tensor:
        return functional_call(self.shapes[index], self.slices(index), (x,))


def _build(candidates: list[Layer], norm: ops.Norm) -> list[nn.Module]:
    built = []
    for op, in_channels, width, _, stride in candidates:
        built.append(ops.build_op(op, in_channels, width, stride, norm))
    return built


def _largest(shapes: Sequence[nn.Module]) -> dict[str, list[int]]:
    """The largest size of every parameter in each dimension, by its name."""
    largest: dict[str, list[int]] = {}
    for module in shapes:
        for name, parameter in module.named_parameters():
            known = largest.get(name, [0] * parameter.dim())
            largest[name] = [max(sizes) for sizes in zip(known, parameter.shape, strict=True)]
    return largest


def _slice(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The first channels of a weight, and the centre of its kernel."""
    for dimension, size in enumerate(shape):
        spare = weight.shape[dimension] - size
        if spare:  # a slice of all would be one more kernel, forward and backward
            start = spare // 2 if dimension >= 2 else 0
            weight = weight.narrow(dimension, start, size)
    return weight


def _key(name: str) -> str:
    """The name of a parameter as PyTorch allows it for a direct one."""
    return name.replace(".", "_")


class RoutingBlock(nn.Module):
    """Shape-alignment layers (one mixed layer an incoming edge), then a stack of mixed layers.

    `incoming` are the blocks that feed it, nearest first: x_j = Σ_i p_ij · mixed_ij(x_i).
    """

    heads: Sequence[MixedLayer]  # PyTorch's lists do not tell what they hold
    stack: Sequence[MixedLayer]

    def __init__(
        self,
        incoming: list[int],
        heads: list[list[Layer]],
        stack: list[list[Layer]],
        norm: ops.Norm,
        weights: Weights,
    ) -> None:
        super().__init__()
        mixed = SharedLayer if weights == "shared" else MixedLayer
        self.incoming = incoming
        self.heads = nn.ModuleList(mixed(row, norm) for row in heads)  # type: ignore[assignment]
        self.stack = nn.ModuleList(mixed(row, norm) for row in stack)  # type: ignore[assignment]

    def forward(
        self, outputs: list[Tensor], heads: list[list[Term]], stack: list[list[Term]]
    ) -> Tensor:
        """From the outputs of all blocks before and the weights of its layers, those of the heads times p_ij."""
        x: Tensor | None = None
        for edge, i in enumerate(self.incoming):
            x = self.heads[edge](outputs[i], heads[edge], x)
        assert x is not None, "a space has an edge into every block"
        for layer, active in enumerate(stack):
            if len(active) == 1:  # its weight is 1, whatever alpha is
                index, _ = active[0]
                x = self.stack[layer].candidate(index, x)
            else:
                x = self.stack[layer](x, active)
        return x

    def along(self, x: Tensor, edge: int, heads: list[list[int]], stack: list[list[int]]) -> Tensor:
        """From the output x of the block before on this incoming edge alone, by the first active candidates."""
        x = self.heads[edge].candidate(heads[edge][0], x)
        for layer, active in enumerate(stack):
            x = self.stack[layer].candidate(active[0], x)
        return x
