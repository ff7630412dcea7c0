"""The dense super network: every block, edge and candidate of a space at once (paper, sections 3.1 to 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from densenas.method import ops
from densenas.method.architecture import Architecture, Candidate
from densenas.method.cost import CostTable
from densenas.method.layers import RoutingBlock, Term
from densenas.method.probabilities import Probabilities, derive, visit_probabilities
from densenas.method.space import SearchSpace
from densenas.recipes import Weights

T = TypeVar("T")
Indices = list[list[list[int]]]  # block → edge or layer → candidates


@dataclass(frozen=True)
class Choice:
    """Active candidates of every mixed layer: `head[b][edge]` and `stack[b][layer]` for block b + 1.

    With a `path`, nodes from 0 to the final one, it is one whole network: the first candidate of each layer on it.
    """

    head: Indices
    stack: Indices
    path: tuple[int, ...] | None = None

    @classmethod
    def of(cls, space: SearchSpace, network: Architecture | Candidate) -> Choice:
        """A network as a path of the space; ValueError where it is none.

        An architecture does not tell which path it is where widths repeat, and which layers a shorter stack skipped:
        the first path and the last layers. A candidate is where it was found.
        """
        if isinstance(network, Candidate):
            arch, path, stacks = network.architecture, network.path, network.stacks
        else:
            arch, path = network, space.path_of(network)
            stacks = tuple(block.stack for block in arch.routing_blocks)
        head = [[[0]] * len(space.incoming(j)) for j in range(1, space.num_blocks)]
        stack = [[[0]] * layers for layers in space.num_layers[1:]]
        edges = pairwise(path[:-1])
        for (before, j), block, chosen in zip(edges, arch.routing_blocks, stacks, strict=True):
            head[j - 1][space.incoming(j).index(before)] = [space.head_ops.index(block.head)]
            for layer in range(space.num_layers[j]):
                op = chosen[layer] if layer < len(chosen) else ops.SKIP
                stack[j - 1][layer] = [space.stack_ops.index(op)]
        return cls(head, stack, path)


class SuperNet(nn.Module):
    """images (B, 3, H, W) → logits (B, num_classes), by all candidates, those of a `Choice`, or along its one path.

    `beta[i]` (outgoing edges of block i), `alpha_head[b]` (incoming edges × head ops) and `alpha_stack[b]`
    (layers × stack ops) of block b + 1 are the architecture parameters; they start at zero, so that everything is
    equally probable. `temperature` divides beta and only beta. Candidates have `weights` of their "own" (as published),
    or those of a layer are slices of "shared" ones (`SharedLayer`).
    """

    blocks: Sequence[RoutingBlock]  # PyTorch's lists do not tell what they hold

    # Where edges stand in the matrix of their probabilities, kept on the device so that no step waits for the host.
    _edge: Tensor
    _head_edge: Tensor
    _final_edge: Tensor

    def __init__(self, space: SearchSpace, num_classes: int, weights: Weights = "own") -> None:
        super().__init__()
        self.space = space
        self.temperature = space.search.softmax_temp
        norm = ops.batch_norm(affine=False, eps=space.bn_eps, momentum=space.bn_momentum)
        activation = nn.ReLU6 if space.net_type == "mbv2" else nn.ReLU
        self.stem = ops.conv_norm(3, space.init_dim, norm, activation, kernel_size=3, stride=2)
        for block in space.stem:
            self.stem.append(ops.build_op(block.head, block.in_ch, block.out_ch, 1, norm))

        layers = space.layers(space.input_size)
        heads = layers.head
        blocks = []
        for j in range(1, space.num_blocks):
            incoming = space.incoming(j)
            stack = layers.stack[space.stack_rows(j)]
            rows = heads[: len(incoming)]
            blocks.append(RoutingBlock(incoming, rows, stack, norm, weights))
            heads = heads[len(incoming) :]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final = nn.ModuleList()
        for layer in layers.final:
            self.final.append(ops.conv_norm(layer.in_channels, layer.width, norm, nn.ReLU6))
        self.classifier = nn.Linear(space.last_dim, num_classes)
        ops.init_weights(self)

        self.beta = nn.ParameterList()
        self.alpha_head = nn.ParameterList()
        self.alpha_stack = nn.ParameterList()
        for i in range(space.num_blocks):
            self.beta.append(torch.zeros(len(space.outgoing(i))))
        for j in range(1, space.num_blocks):
            self.alpha_head.append(torch.zeros(len(space.incoming(j)), len(space.head_ops)))
            self.alpha_stack.append(torch.zeros(space.num_layers[j], len(space.stack_ops)))
        final = [(i, space.num_blocks) for i in space.incoming(space.num_blocks)]
        places = {"_edge": space.edges, "_head_edge": space.head_edges, "_final_edge": final}
        for name, edges in places.items():
            self.register_buffer(name, torch.tensor(edges).T.contiguous(), persistent=False)

    def arch_parameters(self) -> list[nn.Parameter]:
        """alpha and beta."""
        return [*self.beta, *self.alpha_head, *self.alpha_stack]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything else that is trained; what an op of one's own holds fixed stays so."""
        weights = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not name.startswith(("alpha_", "beta.")):
                weights.append(parameter)
        return weights

    def path_probabilities(self) -> Tensor:
        """p_ij = softmax(beta_i / temperature) as a matrix (blocks, nodes), 0 where there is no edge (section 3.2)."""
        return self._path_logits().softmax(dim=1)

    def _path_logits(self) -> Tensor:
        """beta / temperature as that matrix, -∞ where there is no edge."""
        beta = torch.cat([*self.beta])
        logits = beta.new_full((self.space.num_blocks, self.space.num_blocks + 1), -torch.inf)
        return logits.index_put(tuple(self._edge), beta / self.temperature)

    @torch.no_grad()
    def probabilities(self) -> Probabilities:
        """Of every edge and of every candidate, on the CPU."""
        head = torch.cat([*self.alpha_head]).softmax(dim=1)
        stack = torch.cat([*self.alpha_stack]).softmax(dim=1)
        return Probabilities(self.path_probabilities().cpu(), head.cpu(), stack.cpu())

    def _mixtures(self, choice: Choice | None) -> tuple[Mixture, Mixture]:
        """Mixing weights of all head layers and of all stacked layers."""
        head, stack = (choice.head, choice.stack) if choice else (None, None)
        return Mixture(self.alpha_head, head, "head"), Mixture(self.alpha_stack, stack, "stack")

    def forward(self, images: Tensor, choice: Choice | None = None) -> Tensor:
        if choice is not None and choice.path is not None:
            return self._along(images, choice, choice.path)
        head, stack = self._mixtures(choice)
        p = self.path_probabilities()
        heads = head.terms(p[tuple(self._head_edge)])
        stacks = stack.terms()
        outputs = [self.stem(images)]
        for b, block in enumerate(self.blocks):
            outputs.append(block(outputs, heads[b], stacks[b]))
        # As published, the final node normalises the probabilities of its incoming edges once more.
        weights = p[tuple(self._final_edge)].softmax(dim=0).unbind()
        incoming = self.space.incoming(self.space.num_blocks)
        # Averaging before the sum is the same, costs less, and lets branches with maps of two sizes meet.
        features = sum(
            weights[edge] * branch(outputs[incoming[edge]]).mean(dim=(2, 3))
            for edge, branch in enumerate(self.final)
        )
        return self.classifier(features)

    def _along(self, images: Tensor, choice: Choice, path: tuple[int, ...]) -> Tensor:
        """What the derived network computes: neither p nor alpha weighs anything."""
        x = self.stem(images)
        for before, j in pairwise(path[:-1]):
            edge = self.space.incoming(j).index(before)
            x = self.blocks[j - 1].along(x, edge, choice.head[j - 1], choice.stack[j - 1])
        last = self.space.incoming(path[-1]).index(path[-2])
        return self.classifier(self.final[last](x).mean(dim=(2, 3)))

    def cost(self, table: CostTable, choice: Choice | None = None) -> Tensor:
        """Expected cost over all paths and active candidates (section 3.3); 0-d, in the table's unit."""
        if table.space != self.space:
            other = f"the cost table is of space {table.space.name}"
            raise ValueError(f"{other}, the supernet of {self.space.name}")
        head, stack = self._mixtures(choice)
        p = self.path_probabilities()
        return expected_cost(table, Probabilities(p, head.weights, stack.weights))

    @torch.no_grad()
    def sample(self, k: int, generator: torch.Generator | None = None) -> Choice:
        """k candidates of every mixed layer, or all where there are fewer, by softmax(alpha) without replacement.

        Drawn on the CPU, so that every device gives the same choice. FloatingPointError where alpha is not finite.
        """
        if k < 1:
            raise ValueError(f"k = {k} candidates asked for, at least 1 is needed")

        def draw(alphas: nn.ParameterList) -> Indices:
            probabilities = torch.cat([*alphas]).float().cpu().softmax(dim=1)
            if not len(probabilities):
                return [[] for _ in alphas]
            if not probabilities.isfinite().all():
                raise FloatingPointError("alpha")
            count = min(k, probabilities.shape[1])
            drawn = torch.multinomial(probabilities, count, generator=generator)
            return _by_block(drawn.tolist(), alphas)

        return Choice(draw(self.alpha_head), draw(self.alpha_stack))

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> Choice:
        """One whole network: its path by p, its candidates by softmax(alpha); drawn on the CPU like `sample`."""
        choice = self.sample(1, generator)
        p = self.path_probabilities().float().cpu()
        if not p.isfinite().all():
            raise FloatingPointError("beta")
        path = [0]
        while path[-1] < self.space.num_blocks:
            path.append(int(torch.multinomial(p[path[-1]], 1, generator=generator)))
        return Choice(choice.head, choice.stack, tuple(path))

    def log_probabilities(self, networks: list[Choice]) -> Tensor:
        """Of whole networks being drawn by `draw` (n,): the sums over their edges and the layers on their paths."""
        edges = self._path_logits().log_softmax(dim=1)
        head = torch.cat([*self.alpha_head]).log_softmax(dim=1)
        stack = torch.cat([*self.alpha_stack]).log_softmax(dim=1)
        rows = {edge: row for row, edge in enumerate(self.space.head_edges)}
        sums = []
        for network in networks:
            assert network.path is not None, "a whole network has a path"
            before, after = torch.tensor([*pairwise(network.path)]).T
            total = edges[before, after].sum()
            for i, j in pairwise(network.path[:-1]):
                row = rows[i, j]
                edge = self.space.incoming(j).index(i)
                total = total + head[row, network.head[j - 1][edge][0]]
                active = [index for index, *_ in network.stack[j - 1]]
                layers = stack[self.space.stack_rows(j)]
                total = total + layers[range(len(active)), active].sum()
            sums.append(total)
        return torch.stack(sums)

    @contextmanager
    def keeping_mass(self, choice: Choice) -> Iterator[None]:
        """Around an optimiser's step: shifts each layer's sampled alphas so that their summed exp stays what it was.

        Only the shares among the sampled candidates are learnt from a sampled step (section 3.3).
        """
        with torch.no_grad():
            head_mass, stack_mass = [mixture.mass() for mixture in self._mixtures(choice)]
        yield
        with torch.no_grad():
            head, stack = self._mixtures(choice)
            head.restore(head_mass)
            stack.restore(stack_mass)

    @torch.no_grad()
    def derive(self) -> Architecture:
        """The most probable path and on it the most probable candidate of every layer (section 3.4)."""
        return derive(self.space, self.probabilities())


class Mixture:
    """softmax(alpha over the active candidates) of all layers of one kind (section 3.2).

    `active` are the candidates of each layer; `logits` and `weights` are (layers, candidates), -∞ and 0 for the
    inactive ones. Raises ValueError where the choice does not fit.
    """

    def __init__(self, alphas: nn.ParameterList, choice: Indices | None, kind: str) -> None:
        self.alphas = alphas
        alpha = torch.cat([*alphas])
        layers, candidates = alpha.shape
        if choice is None:
            self.active = [[*range(candidates)] for _ in range(layers)]
        else:
            _check_choice(choice, alphas, kind)
            self.active = [row for block in choice for row in block]
        places = []
        for layer, row in enumerate(self.active):
            places += [layer * candidates + index for index in row]
        # Pinned, the copy does not make the host wait for the device.
        index = torch.tensor(places, dtype=torch.long, pin_memory=alpha.is_cuda)
        self.places = index.to(alpha.device, non_blocking=True)
        logits = torch.full_like(alpha, -torch.inf).flatten()
        logits = logits.index_put((self.places,), alpha.flatten()[self.places])
        self.logits = logits.view(layers, candidates)
        self.weights = self.logits.softmax(dim=1)

    def terms(self, scale: Tensor | None = None) -> list[list[list[Term]]]:
        """block → edge or layer → its active candidates with their weights, times `scale` (layers,)."""
        weights = self.weights if scale is None else self.weights * scale[:, None]
        scalars = weights.flatten()[self.places].unbind()
        rows, first = [], 0
        for active in self.active:
            rows.append([(index, scalars[first + k]) for k, index in enumerate(active)])
            first += len(active)
        return _by_block(rows, self.alphas)

    def mass(self) -> Tensor:
        """log Σ exp(alpha) over each layer's active candidates (layers,)."""
        return self.logits.logsumexp(dim=1)

    def restore(self, mass: Tensor) -> None:
        """Shifts each layer's active alphas by one constant, so that this is their mass again."""
        shift = (mass - self.mass())[:, None] * (self.logits > -torch.inf)
        torch._foreach_add_([*self.alphas], shift.split([len(alpha) for alpha in self.alphas]))


def expected_cost(table: CostTable, probabilities: Probabilities) -> Tensor:
    """The chained cost (section 3.3), from the front: each edge and layer as often as a path visits it; 0-d."""
    p = probabilities.p
    costs = table.tensors(like=p)
    head = (probabilities.head * costs.head).sum(dim=1)
    stack = (probabilities.stack * costs.stack).sum(dim=1)
    edges = costs.final.index_put(costs.head_edges, head)
    visits = visit_probabilities(p)
    layers = visits[costs.stack_blocks] @ stack
    return table.stem + visits[:-1] @ (p * edges).sum(dim=1) + layers + table.classifier


def _by_block(rows: list[T], alphas: nn.ParameterList) -> list[list[T]]:
    """The rows of all blocks, as many for each as its alphas have."""
    blocks = []
    for alpha in alphas:
        blocks.append(rows[: len(alpha)])
        rows = rows[len(alpha) :]
    return blocks


def _check_choice(choice: Indices, alphas: nn.ParameterList, kind: str) -> None:
    """ValueError where a choice does not fit the supernet."""
    if len(choice) != len(alphas):
        needed = f"the space has {len(alphas)} after the stem"
        raise ValueError(f"choice.{kind} has {len(choice)} blocks, {needed}")
    for block, alpha in enumerate(alphas, start=1):
        layers, where = choice[block - 1], f"choice.{kind}: block {block} has"
        if len(layers) != len(alpha):
            raise ValueError(f"{where} {len(layers)} layers, the space has {len(alpha)}")
        for row in layers:
            if not row or len(set(row)) < len(row) or min(row) < 0 or max(row) >= alpha.shape[1]:
                expected = f"expected different ones of 0 to {alpha.shape[1] - 1}"
                raise ValueError(f"{where} the candidates {row}, {expected}")
