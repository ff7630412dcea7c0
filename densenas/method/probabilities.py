"""The probabilities that a search has reached: which blocks they visit, and how decided they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from densenas.method import ops
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
