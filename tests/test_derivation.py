"""The k best, the best at a cost, and random architectures, against every architecture of small spaces."""

import math
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from helpers import (
    SKIP,
    SMALL,
    block_paths,
    edges_by_rule,
    make_space,
    path_probability,
    random_supernet,
    refused,
    smallest_input,
    spaces,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from densenas import Architecture, CostTable, SearchSpace
from densenas.method.derivation import Lattice
from densenas.method.probabilities import Probabilities, visit_probabilities

seeds = st.integers(0, 2**16)


def everything(space, net, table):
    """Every architecture: (path, head ops, stacks without skips) → the best log-probability of its layers, its cost."""
    p = net.path_probabilities().tolist()
    head = torch.cat([*net.alpha_head]).detach().log_softmax(1)
    stack = torch.cat([*net.alpha_stack]).detach().log_softmax(1)
    head, stack = (part - part.amax(1, True) if len(part) else part for part in (head, stack))
    rows = {edge: row for row, edge in enumerate(space.head_edges)}
    found = {}
    for path in block_paths(space):
        choices = []
        for i, j in pairwise(path[:-1]):
            first = sum(space.num_layers[:j])
            layers = range(first, first + space.num_layers[j])
            choices += [[(rows[i, j], o, op) for o, op in enumerate(space.head_ops)]]
            choices += [
                [(layer, o, op) for o, op in enumerate(space.stack_ops)] for layer in layers
            ]
        for chosen in product(*choices):
            chosen, score, blocks = (
                list(chosen),
                math.log(path_probability({e: p[e[0]][e[1]] for e in edges_by_rule(space)}, path)),
                [],
            )
            for j in path[1:-1]:
                row, o, op = chosen.pop(0)
                score += float(head[row, o])
                ops = [chosen.pop(0) for _ in range(space.num_layers[j])]
                score += sum(float(stack[layer, o]) for layer, o, _ in ops)
                blocks.append((op, tuple(op for *_, op in ops if op != SKIP)))
            key = (tuple(path), tuple(blocks))
            found[key] = max(found.get(key, -math.inf), score)
    return found


def key_of(candidate):
    return candidate.path, tuple(
        (block.head, block.stack) for block in candidate.architecture.routing_blocks
    )


@st.composite
def small_cases(draw):
    space = draw(spaces())
    layers = sum(space.num_layers[1:])
    assume(
        len(block_paths(space)) * len(space.head_ops) ** 3 * len(space.stack_ops) ** layers < 1500
    )
    net = random_supernet(space, draw(seeds))
    # Random widths may leave two blocks with the same maps and widths indistinguishable in cost, not in path.
    table = CostTable.mult_adds(space, 32, 3)
    return space, net, table, Lattice(table, net.probabilities())


@given(small_cases(), st.integers(1, 12))
def test_the_k_best_are_the_k_best_of_all(case, k):
    space, net, table, lattice = case
    found = everything(space, net, table)
    best = lattice.best(k)
    assert [one.log_probability for one in best] == pytest.approx(
        sorted(found.values(), reverse=True)[:k], abs=1e-9
    )
    assert len({key_of(one) for one in best}) == len(best) == min(k, len(found))
    for one in best:
        assert one.log_probability == pytest.approx(found[key_of(one)], abs=1e-9)
        assert one.cost == pytest.approx(one.architecture.mult_adds(32, 3), rel=1e-9)
    assert best[0].architecture == net.derive()


@given(small_cases(), st.floats(0.1, 0.9), st.sampled_from([0.02, 0.05, 0.2]))
def test_the_best_at_a_cost_is_the_best_of_all_that_cost_so_much(case, share, tolerance):
    space, net, table, lattice = case
    low, high = lattice.reach
    found = everything(space, net, table)
    by_key = {}
    for one in lattice.best(len(found)):
        by_key[key_of(one)] = one.cost
    assert by_key.keys() == found.keys()
    assert (low, high) == pytest.approx((min(by_key.values()), max(by_key.values())))
    target = low + share * (high - low)
    window = target * (1 - tolerance), target * (1 + tolerance)
    slack = 0.002 * target  # the bins' margin
    inside = [
        found[key] for key, cost in by_key.items() if window[0] + slack <= cost <= window[1] - slack
    ]
    if not any(window[0] <= cost <= window[1] for cost in by_key.values()):
        with refused(ValueError, r"has no architecture of .* it reaches from .* to"):
            lattice.at(target, tolerance)
    elif inside:
        one = lattice.at(target, tolerance)
        assert window[0] <= one.cost <= window[1]
        assert one.log_probability >= max(inside) - 1e-9
        assert one.log_probability == pytest.approx(found[key_of(one)], abs=1e-9)


@given(small_cases())
def test_quantiles_count_every_architecture_once(case):
    space, net, table, lattice = case
    costs = sorted(one.cost for one in lattice.best(len(everything(space, net, table))))
    for share in (0.1, 0.5, 0.9):
        rank = min(len(costs) - 1, math.ceil(share * len(costs)) - 1)
        assert lattice.quantile(share) == pytest.approx(costs[rank], abs=0.01 * costs[-1])


def test_random_architectures_are_uniform():
    space = make_space(
        input_size=16,
        init_dim=4,
        chs=[4, 6, 8],
        fm_sizes=[8, 8, 8],
        stage=[0, 1, 1, 2],
        num_layers=[0, 1, 0],
        max_connections=2,
        head_ops=["mbconv_k3_t3", "mbconv_k5_t6"],
        stack_ops=["mbconv_k3_t3", SKIP],
    )
    lattice = Lattice(CostTable.mult_adds(space, 16, 3))
    count = len(lattice.best(10**6))
    seen = Counter(str(one.architecture) for one in lattice.sample(200 * count, seed=1))
    assert len(seen) == count
    assert all(abs(n - 200) < 5 * math.sqrt(200) for n in seen.values())
    assert [one.architecture for one in lattice.sample(5, seed=3)] == [
        one.architecture for one in lattice.sample(5, seed=3)
    ]


@pytest.mark.parametrize(
    "preset", ["mbv2", "resnet", "bottleneck", "cifar_mbv2", "cifar_resnet", "digits"]
)
@given(seed=seeds, share=st.floats(0.1, 0.9))
def test_every_target_between_the_deciles_is_hit(preset, seed, share):
    """Whatever the probabilities, what is derived really costs the target within 3 %."""
    space = SearchSpace.load(preset)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.zeros(space.num_blocks, space.num_blocks + 1)
    for i, j in space.edges:
        edges[i, j] = torch.rand((), generator=generator) ** 3 + 1e-6
    shares = [
        (3 * torch.randn(n, len(names), generator=generator)).softmax(1)
        for n, names in (
            (len(space.head_edges), space.head_ops),
            (sum(space.num_layers), space.stack_ops),
        )
    ]
    table = CostTable.mult_adds(space, space.input_size, 10)
    lattice = Lattice(table, Probabilities(edges / edges.sum(1, True), *shares))
    low, high = lattice.quantile(0.1), lattice.quantile(0.9)
    target = low + share * (high - low)
    arch = lattice.at(target).architecture
    assert arch.mult_adds(space.input_size, 10) == pytest.approx(target, rel=0.03)


@given(spaces(), seeds)
def test_a_path_of_an_architecture_makes_that_architecture(space, seed):
    size = smallest_input(space)
    for one in Lattice(CostTable.mult_adds(space, size, 3)).sample(3, seed):
        chosen = [(block.head, block.stack) for block in one.architecture.routing_blocks]
        assert space.architecture(space.path_of(one.architecture), chosen) == one.architecture


def test_an_architecture_of_another_space_has_no_path():
    with refused(
        ValueError, r"the architecture is not one of space made up: \[\[16, 16\], 'mbconv_k3_t1'"
    ):
        SMALL.path_of(Architecture.named("DenseNAS-A"))


@given(spaces(), seeds)
def test_visits_are_summed_over_all_paths(space, seed):
    net = random_supernet(space, seed)
    p = net.path_probabilities().detach()
    chances = {edge: float(p[edge]) for edge in edges_by_rule(space)}
    for node, visit in enumerate(visit_probabilities(p).tolist()):
        expected = sum(
            path_probability(chances, path) for path in block_paths(space) if node in path
        )
        assert visit == pytest.approx(expected)


def test_a_space_without_choices_has_a_lattice_and_health():
    """One edge from block to block, one op on each, no stacked layers: nothing is undecided."""
    space = make_space(
        init_dim=4,
        chs=[4, 6],
        fm_sizes=[16, 16],
        stage=[0, 1, 2],
        num_layers=[0, 0],
        max_connections=1,
        head_ops=["mbconv_k3_t3"],
        stack_ops=[],
    )
    moment = random_supernet(space, 0).probabilities()
    lattice = Lattice(CostTable.mult_adds(space, 32, 3), moment)
    best = lattice.derive()
    assert best.path == (0, 1, 2) and lattice.derive(best.cost) == best
    health = moment.health(space)
    assert (health["alpha_entropy"], health["beta_entropy"], health["expected_layers"]) == (0, 0, 1)


def test_health_of_a_uniform_and_of_a_decided_search():
    moment = random_supernet(SMALL, 0).probabilities()
    uniform = Probabilities(
        moment.p.gt(0) / moment.p.gt(0).sum(1, True),
        *(torch.full_like(x, 1 / x.shape[1]) for x in (moment.head, moment.stack)),
    )
    health = uniform.health(SMALL)
    assert (health["alpha_entropy"], health["beta_entropy"]) == pytest.approx((1, 1))
    assert health["skip_share"] == pytest.approx(1 / 4)
    head, stack = torch.zeros_like(moment.head), torch.zeros_like(moment.stack)
    head[:, 0], stack[:, 3] = 1, 1
    decided = Probabilities(uniform.p, head, stack).health(SMALL)
    assert (
        decided["alpha_entropy"],
        decided["skip_share"],
        decided["cheapest_share"],
    ) == pytest.approx((0, 1, 1))
    visits = visit_probabilities(uniform.p)
    assert decided["expected_layers"] == pytest.approx(float(visits[1:-1].sum()))
