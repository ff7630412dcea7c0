"""From probabilities to architectures: the k best, the best at a given cost, and random ones (paper, section 3.4).

A network is a walk through one small graph: over an edge with a head op into a block, through its stack out of the
block, and on to the final node. Probabilities multiply along a walk and costs add, so dynamic programming is exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from densenas.files import refuse
from densenas.method import ops
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable

BINS = 16384  # of cost, from nothing to the dearest network of interest


def visit_probabilities(p: Tensor) -> Tensor:
    """The probability v (nodes,) that a path visits a node, the sum over all paths to it.

    The forward recursion over p (blocks, nodes), v_0 = 1 and v_j = Σ_i v_i p_ij, is one triangular system.
    """
    eye = torch.eye(len(p), dtype=p.dtype, device=p.device)
    visits = torch.linalg.solve_triangular(
        (eye - p[:, :-1]).T, eye[:, :1], upper=False, unitriangular=True
    )
    return torch.cat([visits, p[:, -1:].T @ visits]).flatten()


def expected_cost(table: CostTable, p: Tensor, head: Tensor, stack: Tensor) -> Tensor:
    """The chained cost (section 3.3), from the front: each edge and layer as often as a path visits it; 0-d.

    p (blocks, nodes), head (edges into blocks, head ops) and stack (layers, stack ops) are probabilities.
    """
    head_cost, stack_cost, edges, head_edge, owner = table.tensors(like=p)
    edges = edges.index_put(head_edge, (head * head_cost).sum(dim=1))
    visits = visit_probabilities(p)
    layers = visits[owner] @ (stack * stack_cost).sum(dim=1)
    return table.stem + visits[:-1] @ (p * edges).sum(dim=1) + layers + table.classifier


class Arc(NamedTuple):
    """One choice: the op of an edge or the ops of a stack, with what it adds to log-probability and cost."""

    to: int
    ops: tuple[str, ...]
    log_p: float
    cost: float


@dataclass(frozen=True)
class Candidate:
    """An architecture with its path (nodes from 0 to the final one), log-probability and cost in the table's unit."""

    architecture: Architecture
    path: tuple[int, ...]
    log_probability: float
    cost: float


class Lattice:
    """All architectures of a table's space, each as a walk over arcs; state 2j enters block j, state 2j + 1 leaves it.

    `p` (blocks, nodes), `head` (edges into blocks, head ops) and `stack` (layers, stack ops) are probabilities, rows in
    the supernet's order; without them everything is equally probable. Costs are those of derived networks: a skip
    costs nothing, and a ResNet has no last 1×1 convolution.

    The log-probability of a candidate is that of its path plus, for each layer on it, the log-odds of its op against
    the layer's best one. This is the probability of a choice for *all* layers, visited or not, up to a constant, so the
    best candidate is what `SuperNet.derive` gives; the plain product over visited layers would favour short paths.
    """

    def __init__(
        self,
        table: CostTable,
        p: Tensor | None = None,
        head: Tensor | None = None,
        stack: Tensor | None = None,
    ) -> None:
        self.table, self.space = table, table.space
        self.space.refuse_endless()
        space, last = self.space, self.space.num_blocks
        p = torch.ones(last, last + 1) if p is None else p
        head = torch.ones(len(space.head_edges), len(space.head_ops)) if head is None else head
        stack = torch.ones(sum(space.num_layers), len(space.stack_ops)) if stack is None else stack
        log_p = p.double().log().tolist()
        log_head, log_stack = (
            [(row - row.max()).tolist() for row in v.double().log()] for v in (head, stack)
        )
        self.start, self.end, layers = 1, 2 * last, iter(log_stack)
        self.arcs: dict[int, list[Arc]] = {state: [] for state in range(self.start, self.end)}
        for j in range(1, last):
            self.arcs[2 * j] = self._stacks(j, [*islice(layers, space.num_layers[j])])
        for (i, j), chances, costs in zip(
            space.head_edges, log_head, chain(*table.head), strict=True
        ):
            for op, chance, cost in zip(space.head_ops, chances, costs, strict=True):
                self.arcs[2 * i + 1].append(Arc(2 * j, (op,), log_p[i][j] + chance, cost))
        for i, cost in table.derived_ends().items():
            self.arcs[2 * i + 1].append(Arc(self.end, (), log_p[i][last], cost))

    def _stacks(self, block: int, log_p: list[list[float]]) -> list[Arc]:
        """Every sequence of ops that the block's layers can become once skips are dropped."""
        sequences: dict[tuple[str, ...], tuple[float, float]] = {(): (0.0, 0.0)}
        for chances, costs in zip(log_p, self.table.stack[block - 1], strict=False):
            longer: dict[tuple[str, ...], tuple[float, float]] = {}
            for sequence, (so_far, spent) in sequences.items():
                for op, chance, cost in zip(self.space.stack_ops, chances, costs, strict=True):
                    skip = op == ops.SKIP
                    key = sequence if skip else (*sequence, op)
                    entry = so_far + chance, spent + (0.0 if skip and self.space.skip_reg else cost)
                    if key not in longer or entry[0] > longer[key][0]:
                        longer[key] = entry
            sequences = longer
        return [Arc(2 * block + 1, sequence, *entry) for sequence, entry in sequences.items()]

    def _candidate(self, arcs: list[Arc]) -> Candidate:
        edges, stacks = arcs[::2], arcs[1::2]
        path = (0, *(edge.to // 2 for edge in edges))
        chosen = [
            (edge.ops[0], inside.ops) for edge, inside in zip(edges[:-1], stacks, strict=True)
        ]
        log_p, cost = sum(arc.log_p for arc in arcs), sum(arc.cost for arc in arcs)
        return Candidate(self.space.architecture(path, chosen), path, log_p, self.table.stem + cost)

    def best(self, k: int = 1) -> list[Candidate]:
        """The k most probable architectures, the best first."""
        walks: dict[int, list[tuple[float, tuple[Arc, ...]]]] = {self.end: [(0.0, ())]}
        for state in sorted(self.arcs, reverse=True):
            onward = (
                (arc.log_p + log_p, (arc, *rest))
                for arc in self.arcs[state]
                for log_p, rest in walks[arc.to]
            )
            walks[state] = heapq.nlargest(k, onward, key=lambda walk: walk[0])
        return [self._candidate([*arcs]) for _, arcs in walks[self.start]]

    def _walk(
        self, position: int, width: float, choose: Callable[[list[tuple[Arc, int]]], int]
    ) -> Candidate:
        """From start to end at a cost of so many bins; `choose` picks one of the arcs, each with the bins it leaves."""
        state, walk = self.start, []
        while state != self.end:
            ways = [(arc, position - round(arc.cost / width)) for arc in self.arcs[state]]
            ways = [(arc, rest) for arc, rest in ways if rest >= 0]
            arc, position = ways[choose(ways)]
            walk.append(arc)
            state = arc.to
        return self._candidate(walk)

    def _none(self, low: float, high: float) -> str:
        return f"space {self.space.name} has no architecture of {low:.4g} to {high:.4g} {self.table.unit}"

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The costs of the cheapest and of the dearest architecture."""
        bounds = []
        for choose in (min, max):
            cost = {self.end: 0.0}
            for state in sorted(self.arcs, reverse=True):
                cost[state] = choose(arc.cost + cost[arc.to] for arc in self.arcs[state])
            bounds.append(self.table.stem + cost[self.start])
        return bounds[0], bounds[1]

    def within(self, low: float, high: float) -> Candidate:
        """The most probable architecture that costs from `low` to `high`; ValueError where the space has none.

        Costs are counted in bins as fine as 1/16,384 of `high`; the window shrinks by what rounding could add, so the
        cost found is inside for sure.
        """
        width = high / BINS
        margin = width * (
            self.space.num_blocks + 1
        )  # half a bin for each of at most two arcs a block
        first = max(0, math.ceil((low - self.table.stem + margin) / width))
        final = max(0, math.floor((high - self.table.stem - margin) / width) + 1)
        best = {self.end: np.where(np.arange(BINS + 1) == 0, 0.0, -np.inf)}
        for state in sorted(self.arcs, reverse=True):
            best[state] = np.full(BINS + 1, -np.inf)
            for arc in self.arcs[state]:
                if (shift := round(arc.cost / width)) <= BINS:
                    here = best[state][shift:]
                    np.maximum(here, best[arc.to][: BINS + 1 - shift] + arc.log_p, out=here)
        window = best[self.start][first:final]
        if not np.isfinite(window).any():
            raise ValueError(
                self._none(low, high) + ", it reaches from {:.4g} to {:.4g}".format(*self.reach)
            )

        def choose(ways: list[tuple[Arc, int]]) -> int:
            return np.argmax([best[arc.to][rest] + arc.log_p for arc, rest in ways])

        return self._walk(first + int(window.argmax()), width, choose)

    def at(self, target: float, tolerance: float = 0.03) -> Candidate:
        """The most probable architecture whose cost is within `tolerance` (a share) of `target`."""
        return self.within(target * (1 - tolerance), target * (1 + tolerance))

    @cached_property
    def _counts(self) -> tuple[float, dict[int, np.ndarray]]:
        """The width of a cost bin, and how many ways lead from each state to the end at each cost."""
        width = self.reach[1] / BINS
        counts = {self.end: np.where(np.arange(BINS + 1) == 0, 1.0, 0.0)}
        for state in sorted(self.arcs, reverse=True):
            counts[state] = np.zeros(BINS + 1)
            for arc in self.arcs[state]:
                shift = round(arc.cost / width)
                counts[state][shift:] += counts[arc.to][: BINS + 1 - shift]
        return width, counts

    def quantile(self, share: float) -> float:
        """The cost that this share of all architectures stays below, each counted once."""
        width, counts = self._counts
        below = counts[self.start].cumsum()
        return self.table.stem + width * int(np.searchsorted(below, share * below[-1]))

    def sample(
        self, n: int, seed: int = 0, low: float = 0.0, high: float = math.inf, even: bool = False
    ) -> list[Candidate]:
        """n architectures drawn uniformly from all that cost `low` to `high` (up to rounding), with replacement.

        Most architectures of a space cost about the same; `even` gives each cost that occurs the same chance instead.
        """
        (width, counts), dice = self._counts, np.random.default_rng(seed)
        costs = self.table.stem + width * np.arange(BINS + 1)
        weights = counts[self.start] * ((costs >= low) & (costs <= high))
        refuse(not weights.any(), self._none(low, high))
        weights = weights > 0 if even else weights

        def choose(ways: list[tuple[Arc, int]]) -> int:
            shares = [counts[arc.to][rest] for arc, rest in ways]
            return dice.choice(len(ways), p=np.array(shares) / sum(shares))

        positions = dice.choice(BINS + 1, n, p=weights / weights.sum())
        return [self._walk(position, width, choose) for position in positions]
