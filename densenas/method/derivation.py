"""Whole networks and their costs: the k most probable, the most probable at a given cost, and random ones.

A network is a walk through one small graph: over an edge with a head op into a block, through its stack out of the
block, and on to the final node. Probabilities multiply along a walk and costs add, so dynamic programming is exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from densenas.method import ops
from densenas.method.architecture import Candidate
from densenas.method.cost import CostTable
from densenas.method.probabilities import Probabilities

BINS = 16384  # of cost, from nothing to the dearest network of interest


class Place(NamedTuple):
    """Where a walk can stand: at the entry of a block or of the final node, or at a block's exit, behind its stack."""

    block: int
    exit: bool


class Arc(NamedTuple):
    """One choice: the op of an edge or the ops of a stack, skips included, with what it adds to log-probability and
    cost.
    """

    to: Place
    ops: tuple[str, ...]
    log_p: float
    cost: float


class Lattice:
    """All architectures of a table's space, each as a walk over arcs from the exit of block 0 to the final node.

    Without probabilities all architectures are equally probable, one that repeated widths give several paths once for
    each. Costs are those of derived networks: a skip costs nothing, and a ResNet has no last 1×1 convolution.

    The log-probability of a candidate is that of its path plus, for each layer on it, the log-odds of its op against
    the layer's best one. This is the probability of a choice for *all* layers, visited or not, up to a constant, so the
    best candidate is what `SuperNet.derive` gives; the plain product over visited layers would favour short paths.
    """

    def __init__(self, table: CostTable, probabilities: Probabilities | None = None) -> None:
        self.table = table
        self.space = space = table.space
        space.check_sequences()
        last = space.num_blocks
        if probabilities is None:
            head = torch.ones(len(table.head), len(space.head_ops))
            stack = torch.ones(len(table.stack), len(space.stack_ops))
            probabilities = Probabilities(torch.ones(last, last + 1), head, stack)
        # What underflowed to 0 is the least probable, yet not impossible.
        log_p = probabilities.p.double().log().clamp(min=-1e4).tolist()
        log_head = _log_odds(probabilities.head)
        log_stack = _log_odds(probabilities.stack)

        self.start, self.end = Place(0, exit=True), Place(last, exit=False)
        self.arcs: dict[Place, list[Arc]] = {self.start: []}  # in the order of all walks
        for j in range(1, last):
            rows = space.stack_rows(j)
            self.arcs[Place(j, exit=False)] = self._stacks(j, log_stack[rows], table.stack[rows])
            self.arcs[Place(j, exit=True)] = []
        for row, (i, j) in enumerate(space.head_edges):
            entry, onward = Place(j, exit=False), self.arcs[Place(i, exit=True)]
            for index, op in enumerate(space.head_ops):
                log_probability = log_p[i][j] + log_head[row][index]
                onward.append(Arc(entry, (op,), log_probability, table.head[row][index]))
        for i, cost in table.derived_ends().items():
            self.arcs[Place(i, exit=True)].append(Arc(self.end, (), log_p[i][last], cost))
        self.backwards = [*reversed(self.arcs)]

    def _stacks(
        self, block: int, log_odds: list[list[float]], costs: list[list[float]]
    ) -> list[Arc]:
        """Every sequence of ops that the block's layers can become once skips are dropped, each in its best way."""
        sequences: dict[tuple[str, ...], Arc] = {(): Arc(Place(block, exit=True), (), 0.0, 0.0)}
        for layer in range(len(costs)):
            longer: dict[tuple[str, ...], Arc] = {}
            for sequence, (exit, layers, log_p, cost) in sequences.items():
                for index, op in enumerate(self.space.stack_ops):
                    more = costs[layer][index]
                    key = (*sequence, op)
                    if op == ops.SKIP:
                        key = sequence
                        if self.space.skip_reg:
                            more = 0.0
                    arc = Arc(exit, (*layers, op), log_p + log_odds[layer][index], cost + more)
                    if key not in longer or arc.log_p > longer[key].log_p:
                        longer[key] = arc
            sequences = longer
        return [*sequences.values()]

    def _candidate(self, walk: list[Arc]) -> Candidate:
        path = [0]
        heads: list[str] = []
        stacks: list[tuple[str, ...]] = []
        log_p = cost = 0.0
        for arc in walk:
            log_p += arc.log_p
            cost += arc.cost
            if arc.to.exit:
                stacks.append(arc.ops)
            else:
                path.append(arc.to.block)
                heads += arc.ops  # none on the way to the final node
        kept = [tuple(op for op in stack if op != ops.SKIP) for stack in stacks]
        architecture = self.space.architecture(path, zip(heads, kept, strict=True))
        stem = self.table.stem
        return Candidate(architecture, tuple(path), tuple(stacks), log_p, stem + cost)

    def best(self, k: int = 1) -> list[Candidate]:
        """The k most probable architectures, the best first."""
        walks: dict[Place, list[tuple[float, tuple[Arc, ...]]]] = {self.end: [(0.0, ())]}
        for place in self.backwards:
            onward = (
                (arc.log_p + log_p, (arc, *rest))
                for arc in self.arcs[place]
                for log_p, rest in walks[arc.to]
            )
            walks[place] = heapq.nlargest(k, onward, key=lambda walk: walk[0])
        return [self._candidate([*walk]) for _, walk in walks[self.start]]

    def derive(self, target_cost: float | None = None) -> Candidate:
        """The most probable architecture, or the most probable one at a target (see `at`)."""
        return self.best()[0] if target_cost is None else self.at(target_cost)

    def at(self, target: float, tolerance: float = 0.03) -> Candidate:
        """The most probable architecture whose cost is within `tolerance` (a share) of `target`.

        Costs are counted in bins as fine as 1/16,384 of the highest; the window shrinks by what rounding could add, so
        the cost found is inside for sure. Raises ValueError where the space has no such architecture.
        """
        low, high = target * (1 - tolerance), target * (1 + tolerance)
        width = high / BINS
        # Half a bin for each of at most two arcs a block.
        margin = width * (self.space.num_blocks + 1)
        first = max(0, math.ceil((low - self.table.stem + margin) / width))
        final = max(0, math.floor((high - self.table.stem - margin) / width) + 1)
        best = {self.end: np.where(np.arange(BINS + 1) == 0, 0.0, -np.inf)}
        for place in self.backwards:
            best[place] = np.full(BINS + 1, -np.inf)
            for arc in self.arcs[place]:
                shift = round(arc.cost / width)
                if shift <= BINS:
                    here = best[place][shift:]
                    np.maximum(here, best[arc.to][: BINS + 1 - shift] + arc.log_p, out=here)
        window = best[self.start][first:final]
        if not np.isfinite(window).any():
            cheapest, dearest = self.reach
            reaches = f"it reaches from {cheapest:.4g} to {dearest:.4g}"
            raise ValueError(f"{self._none(low, high)}, {reaches}")

        def choose(ways: list[tuple[Arc, int]]) -> int:
            return int(np.argmax([best[arc.to][rest] + arc.log_p for arc, rest in ways]))

        return self._walk(first + int(window.argmax()), width, choose)

    def _walk(
        self, position: int, width: float, choose: Callable[[list[tuple[Arc, int]]], int]
    ) -> Candidate:
        """From start to end at a cost of so many bins; `choose` picks one of the arcs, each with the bins it leaves."""
        place, walk = self.start, []
        while place != self.end:
            ways = []
            for arc in self.arcs[place]:
                rest = position - round(arc.cost / width)
                if rest >= 0:
                    ways.append((arc, rest))
            arc, position = ways[choose(ways)]
            walk.append(arc)
            place = arc.to
        return self._candidate(walk)

    def _none(self, low: float, high: float) -> str:
        unit = self.table.unit
        return f"space {self.space.name} has no architecture of {low:.4g} to {high:.4g} {unit}"

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The costs of the cheapest and of the dearest architecture."""
        cheapest, dearest = {self.end: 0.0}, {self.end: 0.0}
        for place in self.backwards:
            cheapest[place] = min(arc.cost + cheapest[arc.to] for arc in self.arcs[place])
            dearest[place] = max(arc.cost + dearest[arc.to] for arc in self.arcs[place])
        stem = self.table.stem
        return stem + cheapest[self.start], stem + dearest[self.start]

    @cached_property
    def _counts(self) -> tuple[float, dict[Place, np.ndarray]]:
        """The width of a cost bin, and how many ways lead from each place to the end at each cost."""
        width = self.reach[1] / BINS
        counts = {self.end: np.where(np.arange(BINS + 1) == 0, 1.0, 0.0)}
        for place in self.backwards:
            counts[place] = np.zeros(BINS + 1)
            for arc in self.arcs[place]:
                shift = round(arc.cost / width)
                counts[place][shift:] += counts[arc.to][: BINS + 1 - shift]
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
        width, counts = self._counts
        dice = np.random.default_rng(seed)
        costs = self.table.stem + width * np.arange(BINS + 1)
        weights = counts[self.start] * ((costs >= low) & (costs <= high))
        if not weights.any():
            raise ValueError(self._none(low, high))
        if even:
            weights = weights > 0

        def choose(ways: list[tuple[Arc, int]]) -> int:
            shares = [counts[arc.to][rest] for arc, rest in ways]
            return dice.choice(len(ways), p=np.array(shares) / sum(shares))

        positions = dice.choice(BINS + 1, n, p=weights / weights.sum())
        return [self._walk(position, width, choose) for position in positions]


def _log_odds(probabilities: Tensor) -> list[list[float]]:
    """log(probability) of every candidate (rows, ops), less that of its row's best."""
    return [(row - row.max()).tolist() for row in probabilities.double().log().clamp(min=-1e4)]
