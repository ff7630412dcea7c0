"""The probabilities that a search has reached: what would be derived from them, and how decided they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densenas.method import ops
from densenas.method.cost import CostTable
from densenas.method.derivation import Candidate, Lattice, visit_probabilities
from densenas.method.space import SearchSpace
from densenas.method.supernet import SuperNet


@dataclass(frozen=True)
class Probabilities:
    """p (blocks, nodes), head (edges into blocks, head ops), stack (layers, stack ops) after one epoch."""

    p: Tensor
    head: Tensor
    stack: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, net: SuperNet) -> Probabilities:
        head, stack = (
            torch.cat([*alphas]).softmax(dim=1).cpu()
            for alphas in (net.alpha_head, net.alpha_stack)
        )
        return cls(net.path_probabilities().cpu(), head, stack)

    def shapes(self) -> tuple[torch.Size, ...]:
        return self.p.shape, self.head.shape, self.stack.shape

    def derive(self, table: CostTable, target_cost: float | None) -> Candidate:
        """The most probable architecture, or the most probable one at the target (see `Lattice.at`)."""
        lattice = Lattice(table, self.p, self.head, self.stack)
        return lattice.best()[0] if target_cost is None else lattice.at(target_cost)

    def health(self, space: SearchSpace) -> dict[str, float]:
        """How decided a search is, and for what; every value but expected_layers is a share from 0 to 1.

        Entropies are means over layers (alpha) and blocks (beta), 1 for a uniform choice. Expectations are over paths:
        layers of a network, and on its path the probability of a skip and of the cheapest op, a skip included.
        """

        def entropy(*parts: Tensor) -> float:
            choices = [(rows > 0).sum(dim=1) for rows in parts]
            shares = [
                torch.special.entr(rows).sum(dim=1) / n.log()
                for rows, n in zip(parts, choices, strict=True)
            ]
            open_ones = torch.cat(shares)[torch.cat(choices) > 1]
            return float(open_ones.mean()) if len(open_ones) else 0.0

        visits = visit_probabilities(self.p)[:-1]
        head_weight = (visits[:, None] * self.p)[tuple(torch.tensor(space.head_edges).T)]
        stack_weight = visits.repeat_interleave(torch.tensor(space.num_layers))
        layers = torch.cat([head_weight, stack_weight])
        skips = [index for index, op in enumerate(space.stack_ops) if op == ops.SKIP]
        skipped = (stack_weight * self.stack[:, skips].sum(dim=1)).sum()
        both = (self.head, space.head_ops), (self.stack, space.stack_ops)
        cheap = torch.cat([shares[:, ops.cheapest(names)].sum(dim=1) for shares, names in both])
        return {
            "alpha_entropy": entropy(self.head, self.stack),
            "beta_entropy": entropy(self.p),
            "expected_layers": float(layers.sum() - skipped),
            "skip_share": float(skipped / stack_weight.sum()) if len(self.stack) else 0.0,
            "cheapest_share": float((layers * cheap).sum() / layers.sum()),
        }


class Trace(list[Probabilities]):
    """Probabilities before the first epoch and after every one, as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"entries": [vars(entry) for entry in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        entries = [Probabilities(**entry) for entry in state["entries"]]
        if not entries or any(entry.shapes() != self[0].shapes() for entry in entries):
            raise ValueError("probabilities of another space")
        self[:] = entries
