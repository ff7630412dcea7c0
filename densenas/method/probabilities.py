"""The probabilities that a search has reached: the most probable network (paper, section 3.4), and how sure it is."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.space import SearchSpace


@dataclass(frozen=True)
class Probabilities:
    """Of every edge p (blocks, nodes), 0 where there is none, and of every candidate: head (edges into blocks, head
    ops) and stack (layers, stack ops), rows as in a `CostTable`.
    """

    p: Tensor
    head: Tensor
    stack: Tensor

    def health(self, space: SearchSpace) -> dict[str, float]:
        """How decided a search is, and for what; every value but expected_layers is a share from 0 to 1.

        Entropies are means over layers (alpha) and blocks (beta), 1 for a uniform choice. Expectations are over paths:
        layers of a network, and on its path the probability of a skip and of the cheapest op, a skip included.
        """
        visits = visit_probabilities(self.p)[:-1]
        start, end = torch.tensor(space.head_edges).T
        head_weight = (visits[:, None] * self.p)[start, end]
        stack_weight = visits.repeat_interleave(torch.tensor(space.num_layers))
        layers = torch.cat([head_weight, stack_weight])
        skipped = (stack_weight * _share(self.stack, space.stack_ops, ops.SKIP)).sum()
        cheapest_head = _share(self.head, space.head_ops, _cheapest(space.head_ops))
        cheapest_stack = _share(self.stack, space.stack_ops, _cheapest(space.stack_ops))
        cheapest = (layers * torch.cat([cheapest_head, cheapest_stack])).sum()
        return {
            "alpha_entropy": _entropy(self.head, self.stack),
            "beta_entropy": _entropy(self.p),
            "expected_layers": float(layers.sum() - skipped),
            "skip_share": float(skipped / stack_weight.sum()) if len(self.stack) else 0.0,
            "cheapest_share": float(cheapest / layers.sum()),
        }


def _cheapest(names: tuple[str, ...]) -> str | None:
    """The op with the fewest Mult-Adds, the same at any width and map; None of no ops."""
    return min(names, key=lambda op: ops.mult_adds(op, 64, 64, 14, 1), default=None)


def _share(rows: Tensor, names: tuple[str, ...], op: str | None) -> Tensor:
    """The probability of an op in each row; 0 where it is no candidate."""
    columns = [index for index, name in enumerate(names) if name == op]
    return rows[:, columns].sum(dim=1)


def _entropy(*parts: Tensor) -> float:
    """The mean of the rows' entropies, each over that of a uniform choice among its open ones; 0 if none is open."""
    choices = torch.cat([(rows > 0).sum(dim=1) for rows in parts])
    entropies = torch.cat([torch.special.entr(rows).sum(dim=1) for rows in parts])
    shares = (entropies / choices.log())[choices > 1]
    return float(shares.mean()) if len(shares) else 0.0


def visit_probabilities(p: Tensor) -> Tensor:
    """The probability v (nodes,) that a path visits a node, the sum over all paths to it.

    The forward recursion over p (blocks, nodes), v_0 = 1 and v_j = Σ_i v_i p_ij, is one triangular system.
    """
    eye = torch.eye(len(p), dtype=p.dtype, device=p.device)
    visits = torch.linalg.solve_triangular(
        (eye - p[:, :-1]).T, eye[:, :1], upper=False, unitriangular=True
    )
    return torch.cat([visits, p[:, -1:].T @ visits]).flatten()


def best_paths(space: SearchSpace, p: Tensor, k: int = 1) -> list[tuple[float, tuple[int, ...]]]:
    """The k paths from block 0 to the final node with the largest products of p (blocks, nodes), each behind its
    product, by Viterbi from the back (section 3.4).
    """
    log_p = p.double().log().tolist()
    last = space.num_blocks
    best: dict[int, list[tuple[float, tuple[int, ...]]]] = {last: [(0.0, (last,))]}
    for i in reversed(range(last)):
        onward = [
            (log_p[i][j] + rest, (i, *path)) for j in space.outgoing(i) for rest, path in best[j]
        ]
        best[i] = heapq.nlargest(k, onward, key=lambda way: way[0])
    return [(math.exp(log_probability), path) for log_probability, path in best[0]]


def derive(space: SearchSpace, found: Probabilities) -> Architecture:
    """The best path and on it the most probable candidate of every layer; skips are dropped (section 3.4)."""
    _, path = best_paths(space, found.p)[0]
    best_head = found.head.argmax(dim=1).tolist()
    best_stack = found.stack.argmax(dim=1).tolist() if found.stack.numel() else []
    edges = space.head_edges
    chosen = []
    for edge in pairwise(path[:-1]):
        head_op = space.head_ops[best_head[edges.index(edge)]]
        layers = [space.stack_ops[index] for index in best_stack[space.stack_rows(edge[1])]]
        chosen.append((head_op, tuple(op for op in layers if op != ops.SKIP)))
    return space.architecture(path, chosen)
