"""The dense super network: every block, edge and candidate of a space at once (paper, sections 3.1 to 3.3)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from densenas.files import refuse
from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.derivation import expected_cost
from densenas.method.space import Layer, SearchSpace

Term = tuple[
    int, Tensor | None
]  # an active candidate and its weight; None for a weight that can only be 1
Indices = list[list[list[int]]]  # block → edge or layer → candidates


@dataclass(frozen=True)
class Choice:
    """Active candidates of every mixed layer: `head[b][edge]` and `stack[b][layer]` for block b + 1."""

    head: Indices
    stack: Indices


class RoutingBlock(nn.Module):
    """Shape-alignment layers (one mixed layer an incoming edge), then a stack of mixed layers."""

    def __init__(self, heads: list[list[Layer]], stack: list[list[Layer]], norm: ops.Norm) -> None:
        super().__init__()

        def layers(rows: list[list[Layer]]) -> nn.ModuleList:
            """A mixed layer for each row, from the candidates' op, channels, width and stride."""
            built = [[ops.build_op(*of, stride, norm) for *of, _, stride in row] for row in rows]
            return nn.ModuleList(map(nn.ModuleList, built))

        self.heads, self.stack = layers(heads), layers(stack)


class SuperNet(nn.Module):
    """images (B, 3, H, W) → logits (B, num_classes), by all candidates or by those of a `Choice`.

    `beta[i]` (outgoing edges of block i), `alpha_head[b]` (incoming edges × head ops) and `alpha_stack[b]`
    (layers × stack ops) of block b + 1 are the architecture parameters; they start at zero, so that everything is
    equally probable. `temperature` divides beta and only beta.
    """

    def __init__(self, space: SearchSpace, num_classes: int) -> None:
        super().__init__()
        self.space = space
        self.temperature = space.search.softmax_temp
        norm = ops.batch_norm(affine=False, eps=space.bn_eps, momentum=space.bn_momentum)
        activation = nn.ReLU6 if space.net_type == "mbv2" else nn.ReLU
        self.stem = ops.conv_norm(3, space.init_dim, norm, activation, kernel_size=3, stride=2)
        self.stem.extend(
            ops.build_op(block.head, block.in_ch, block.out_ch, 1, norm) for block in space.stem
        )
        head, stack, final = space.layers(space.input_size)
        self.blocks = nn.ModuleList(
            RoutingBlock(*rows, norm) for rows in zip(head, stack, strict=True)
        )
        self.final = nn.ModuleList(
            ops.conv_norm(channels, out, norm, nn.ReLU6) for _, channels, out, *_ in final
        )
        self.classifier = nn.Linear(space.last_dim, num_classes)
        ops.init_weights(self)

        def logits(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        self.beta = nn.ParameterList(
            logits(len(space.outgoing(i))) for i in range(space.num_blocks)
        )
        self.alpha_head = nn.ParameterList(logits(len(rows), len(space.head_ops)) for rows in head)
        self.alpha_stack = nn.ParameterList(
            logits(len(rows), len(space.stack_ops)) for rows in stack
        )
        self._incoming = [space.incoming(node) for node in range(space.num_blocks + 1)]
        # Where edges stand in the matrix of their probabilities, kept on the device so that no step waits for the host.
        final = [(i, space.num_blocks) for i in self._incoming[-1]]
        for name, edges in (
            ("_edge", space.edges),
            ("_head_edge", space.head_edges),
            ("_final_edge", final),
        ):
            self.register_buffer(name, torch.tensor(edges).T.contiguous(), persistent=False)

    def arch_parameters(self) -> list[nn.Parameter]:
        """alpha and beta."""
        return [*self.beta, *self.alpha_head, *self.alpha_stack]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything else that is trained."""
        return [
            p for name, p in self.named_parameters() if not name.startswith(("alpha_", "beta."))
        ]

    def path_probabilities(self) -> Tensor:
        """p_ij = softmax(beta_i / temperature) as a matrix (blocks, nodes), 0 where there is no edge (section 3.2)."""
        beta = torch.cat([*self.beta])
        logits = beta.new_full((self.space.num_blocks, self.space.num_blocks + 1), -torch.inf)
        return logits.index_put(tuple(self._edge), beta / self.temperature).softmax(dim=1)

    def _mixtures(self, choice: Choice | None) -> tuple[Mixture, Mixture]:
        """Mixing weights of all head layers and of all stacked layers."""
        head, stack = (choice.head, choice.stack) if choice else (None, None)
        return Mixture(self.alpha_head, head, "head"), Mixture(self.alpha_stack, stack, "stack")

    def forward(self, images: Tensor, choice: Choice | None = None) -> Tensor:
        head, stack = self._mixtures(choice)
        p = self.path_probabilities()
        heads = head.active_layers(p[tuple(self._head_edge)])
        layers = stack.active_layers()
        outputs = [self.stem(images)]
        for number, block in enumerate(self.blocks, start=1):
            x: Tensor | None = None
            for candidates, i in zip(block.heads, self._incoming[number], strict=True):
                x = mixed(candidates, outputs[i], next(heads), x)
            for candidates in block.stack:
                x = mixed(candidates, x, next(layers))
            outputs.append(x)
        # As published, the final node normalises the probabilities of its incoming edges once more.
        weights = p[tuple(self._final_edge)].softmax(dim=0).unbind()
        # Averaging before the sum is the same, costs less, and lets branches with maps of two sizes meet.
        x = sum(
            weight * branch(outputs[i]).mean(dim=(2, 3))
            for branch, i, weight in zip(self.final, self._incoming[-1], weights, strict=True)
        )
        return self.classifier(x)

    def cost(self, table: CostTable, choice: Choice | None = None) -> Tensor:
        """Expected cost over all paths and active candidates (section 3.3); 0-d, in the table's unit."""
        other = f"the cost table is of space {table.space.name}, the supernet of {self.space.name}"
        refuse(table.space != self.space, other)
        head, stack = self._mixtures(choice)
        return expected_cost(table, self.path_probabilities(), head.weights, stack.weights)

    @torch.no_grad()
    def sample(self, k: int, generator: torch.Generator | None = None) -> Choice:
        """k candidates of every mixed layer, or all where there are fewer, by softmax(alpha) without replacement.

        Drawn on the CPU, from `generator` or PyTorch's global one, so that every device gives the same choice. Raises
        FloatingPointError where alpha is not finite.
        """
        refuse(k < 1, f"k = {k} candidates asked for, at least 1 is needed")

        def draw(alphas: nn.ParameterList) -> Indices:
            probabilities = torch.cat([*alphas]).float().cpu().softmax(dim=1)
            if not len(probabilities):
                return [[] for _ in alphas]
            if not probabilities.isfinite().all():
                raise FloatingPointError("alpha")
            count = min(k, probabilities.shape[1])
            drawn = iter(torch.multinomial(probabilities, count, generator=generator).tolist())
            return [[next(drawn) for _ in alpha] for alpha in alphas]

        return Choice(draw(self.alpha_head), draw(self.alpha_stack))

    @contextmanager
    def keeping_mass(self, choice: Choice) -> Iterator[None]:
        """Around an optimiser's step: shifts each layer's sampled alphas so that their summed exp stays what it was.

        Only the shares among the sampled candidates are learnt from a sampled step (section 3.3).
        """
        with torch.no_grad():
            before = [mixture.logits.logsumexp(dim=1) for mixture in self._mixtures(choice)]
        yield
        with torch.no_grad():
            both = self.alpha_head, self.alpha_stack
            for alphas, mixture, mass in zip(both, self._mixtures(choice), before, strict=True):
                shift = (mass - mixture.logits.logsumexp(dim=1))[:, None] * (
                    mixture.logits > -torch.inf
                )
                torch._foreach_add_([*alphas], shift.split([len(alpha) for alpha in alphas]))

    @torch.no_grad()
    def best_path(self) -> list[int]:
        """The most probable path from block 0 to the final node, by Viterbi from the back (section 3.4)."""
        return list(best_paths(self.space, self.path_probabilities())[0][1])

    @torch.no_grad()
    def derive(self) -> Architecture:
        """The most probable path and on it the most probable candidate of every layer (section 3.4)."""
        head, stack = torch.cat([*self.alpha_head]), torch.cat([*self.alpha_stack])
        return derive(self.space, self.path_probabilities(), head, stack)


class Mixture:
    """softmax(alpha over the active candidates) of all layers of one kind (section 3.2).

    `weights` is (layers, candidates), 0 for the inactive ones. Raises ValueError where the choice does not fit.
    """

    def __init__(self, alphas: nn.ParameterList, choice: Indices | None, what: str) -> None:
        alpha = torch.cat([*alphas])
        layers, candidates = alpha.shape
        self.rows = (
            [[*range(candidates)]] * layers if choice is None else _rows(choice, alphas, what)
        )
        active = [
            row * candidates + index for row, indices in enumerate(self.rows) for index in indices
        ]
        # Pinned, the copy does not make the host wait for the device.
        index = torch.tensor(active, dtype=torch.long, pin_memory=alpha.is_cuda)
        self.active = index.to(alpha.device, non_blocking=True)
        logits = torch.full_like(alpha, -torch.inf).flatten()
        self.logits = logits.index_put((self.active,), alpha.flatten()[self.active]).view(
            layers, candidates
        )
        self.weights = self.logits.softmax(dim=1)

    def active_layers(self, scale: Tensor | None = None) -> Iterator[list[Term]]:
        """For each layer its active candidates with their weights, times `scale` (layers,)."""
        weights = self.weights if scale is None else self.weights * scale[:, None]
        weights = iter(weights.flatten()[self.active].unbind())
        for row in self.rows:
            terms = [(index, next(weights)) for index in row]
            yield [(row[0], None)] if scale is None and len(row) == 1 else terms


def mixed(
    candidates: nn.ModuleList, x: Tensor, terms: list[Term], y: Tensor | None = None
) -> Tensor:
    """y + Σ weight · candidate(x) over the active candidates of one mixed layer (section 3.2)."""
    for index, weight in terms:
        out = candidates[index](x)
        if weight is not None:
            out = weight * out
        y = out if y is None else y + out
    return y


def _rows(choice: Indices, alphas: nn.ParameterList, what: str) -> list[list[int]]:
    """The layers of all blocks in one list; ValueError where a choice does not fit the supernet."""
    if len(choice) != len(alphas):
        raise ValueError(
            f"choice.{what} has {len(choice)} blocks, the space has {len(alphas)} after the stem"
        )
    for block, (layers, alpha) in enumerate(zip(choice, alphas, strict=True), start=1):
        if len(layers) != len(alpha):
            raise ValueError(
                f"choice.{what}: block {block} has {len(layers)} layers, the space has {len(alpha)}"
            )
        for row in layers:
            if not row or len(set(row)) < len(row) or min(row) < 0 or max(row) >= alpha.shape[1]:
                expected = f"expected different ones of 0 to {alpha.shape[1] - 1}"
                raise ValueError(
                    f"choice.{what}: block {block} has the candidates {row}, {expected}"
                )
    return [row for layers in choice for row in layers]


def best_paths(space: SearchSpace, p: Tensor, k: int = 1) -> list[tuple[float, tuple[int, ...]]]:
    """The k paths from block 0 to the final node with the largest products of p (blocks, nodes), each behind its
    product, by Viterbi from the back (section 3.4).
    """
    log_p, ways = p.double().log().tolist(), {space.num_blocks: [(0.0, (space.num_blocks,))]}
    for i in reversed(range(space.num_blocks)):
        onward = (
            (log_p[i][j] + rest, (i, *path)) for j in space.outgoing(i) for rest, path in ways[j]
        )
        ways[i] = heapq.nlargest(k, onward, key=lambda way: way[0])
    return [(math.exp(log_probability), path) for log_probability, path in ways[0]]


def derive(space: SearchSpace, p: Tensor, head: Tensor, stack: Tensor) -> Architecture:
    """Best path by p (blocks, nodes), and on it the largest of head (edges into blocks, ops) and stack (layers, ops).

    `head` and `stack` are alphas or their softmax, rows in the supernet's order. Skips are dropped (section 3.4).
    """
    path = best_paths(space, p)[0][1]
    rows = {edge: row for row, edge in enumerate(space.head_edges)}
    best_head, best_stack = (
        head.argmax(dim=1).tolist(),
        stack.argmax(dim=1).tolist() if stack.numel() else [],
    )
    chosen = []
    for i, j in pairwise(path[:-1]):
        first = sum(space.num_layers[:j])
        layers = [
            space.stack_ops[index] for index in best_stack[first : first + space.num_layers[j]]
        ]
        kept = tuple(op for op in layers if op != ops.SKIP)
        chosen.append((space.head_ops[best_head[rows[i, j]]], kept))
    return space.architecture(path, chosen)
