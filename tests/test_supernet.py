"""Supernet, chained cost, derivation and cost table against brute force on random spaces and PyTorch's own count."""

import json
import math
import os
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from helpers import (
    MBCONVS,
    SKIP,
    SMALL,
    before,
    best_path,
    block_paths,
    candidates,
    counted_mult_adds,
    edge_probabilities,
    everything,
    expectation_over_paths,
    make_space,
    path_probability,
    random_supernet,
    random_table,
    refused,
    smallest_input,
    softmax,
    spaces,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from densenas import Choice, CostTable, SearchSpace, SuperNet
from densenas.method import ops

NO_LAYERS = make_space(
    init_dim=3,
    chs=[3, 5, 7],
    fm_sizes=[16, 8, 8],
    stage=[0, 1, 1, 1],
    num_layers=[0, 0, 0],
    head_ops=["mbconv_k3_t3"],
    stack_ops=[],
)
seeds = st.integers(0, 2**31)


def rows_of(part):
    return [row for rows in part for row in rows]


def entries(table):
    rows = table.head + table.stack
    return [table.stem, *table.final, table.classifier, *(entry for row in rows for entry in row)]


@given(spaces(), seeds, st.sampled_from([0, 1]))
def test_cost_is_the_expectation_over_all_paths(space, seed, spare_rows):
    net, table = random_supernet(space, seed), random_table(space, seed + 1, spare_rows=spare_rows)
    expected = expectation_over_paths(net, table, everything(space))
    assert net.cost(table).item() == pytest.approx(expected, rel=1e-9)
    for count in (1, 2):
        choice = net.sample(count, torch.Generator().manual_seed(seed))
        assert net.cost(table, choice).item() == pytest.approx(
            expectation_over_paths(net, table, choice), rel=1e-9
        )


@given(spaces(), seeds)
def test_cost_in_mult_adds(space, seed):
    net, table = (
        random_supernet(space, seed),
        CostTable.mult_adds(space, smallest_input(space), num_classes=3),
    )
    assert net.cost(table).item() == pytest.approx(
        expectation_over_paths(net, table, everything(space)), rel=1e-9
    )


def test_cost_is_a_scalar_in_the_networks_precision():
    net, table = SuperNet(SMALL, 3), CostTable.mult_adds(SMALL, 16, 3)
    assert (net.cost(table).shape, net.cost(table).dtype) == ((), torch.float32)
    assert net.cost(table).item() == pytest.approx(
        expectation_over_paths(net, table, everything(SMALL)), rel=1e-5
    )


def test_cost_refuses_another_spaces_table():
    with refused(ValueError, r"cost table is of space digits, the supernet of made up"):
        SuperNet(SMALL, 3).cost(CostTable.mult_adds(SearchSpace.load("digits"), 32))


@pytest.mark.parametrize("count", [None, 2])
def test_gradients_of_the_cost(count):
    net, table = random_supernet(SMALL, 5), random_table(SMALL, 6)
    choice = count and net.sample(count, torch.Generator().manual_seed(7))
    parameters = [parameter for parameter in net.arch_parameters() if parameter.numel()]
    assert torch.autograd.gradcheck(lambda *_: net.cost(table, choice), parameters)
    assert all(parameter.requires_grad for parameter in net.parameters())
    net.cost(table, choice).backward()
    for parameter in parameters:
        assert parameter.shape[-1] == 1 or parameter.grad.abs().max() > 0
    assert all(weight.grad is None for weight in net.weight_parameters())


def argmax(values):
    return max(range(len(values)), key=values.__getitem__)


def derived_by_hand(net, table):
    """The best of all paths as a net_config, and what the table says that it costs."""
    space, probabilities = net.space, edge_probabilities(net)
    path = max(block_paths(space), key=lambda path: path_probability(probabilities, path))
    cost = (
        table.stem + table.final[before(space, space.num_blocks).index(path[-2])] + table.classifier
    )
    pieces = (
        [f"[[{space.init_dim}, {space.chs[0]}], 'mbconv_k3_t1', [], 0, 1]"]
        if is_mbv2(space)
        else []
    )
    for i, j in pairwise(path[:-1]):
        row = before(space, j).index(i)
        head = argmax(net.alpha_head[j - 1][row].tolist())
        best = [argmax(alpha) for alpha in net.alpha_stack[j - 1].tolist()]
        head_costs, stack_costs = table.nested()[1][j - 1]
        cost += head_costs[row][head]
        cost += sum(stack_costs[layer][index] for layer, index in enumerate(best))
        names = [space.stack_ops[index] for index in best if space.stack_ops[index] != SKIP]
        stride = space.fm_sizes[i] // space.fm_sizes[j]
        pieces.append(
            f"[[{space.chs[i]}, {space.chs[j]}], '{space.head_ops[head]}', {names}, {len(names)}, {stride}]"
        )
    if is_mbv2(space):
        pieces.append(f"[[{space.chs[path[-2]]}, {space.last_dim}], 'conv1_1']")
    return path, "|".join(pieces), cost


def is_mbv2(space):
    return space.head_ops[0].startswith("mbconv")


@given(spaces(), seeds)
def test_derivation_is_the_best_of_all_paths(space, seed):
    net, table = random_supernet(space, seed), random_table(space, seed + 1, equal_layers=True)
    path, text, cost = derived_by_hand(net, table)
    arch = net.derive()
    assert best_path(net) == path
    assert str(arch) == text
    assert table.total(arch) == pytest.approx(cost, rel=1e-9)
    assert table.total(text) == table.total(arch)


def test_derivation_is_not_the_greedy_path():
    """0 → 1 is the likeliest first edge, but what follows it is split three ways."""
    space = make_space(
        init_dim=3,
        chs=[3, 4, 5, 6],
        fm_sizes=[16] * 4,
        stage=[0] * 5,
        num_layers=[0] * 4,
        max_connections=4,
        head_ops=["mbconv_k3_t3"],
        stack_ops=[SKIP],
    )
    net = SuperNet(space, 2)
    with torch.no_grad():
        for beta, shares in zip(
            net.beta, ([0.4, 0.05, 0.25, 0.3], [0.34, 0.33, 0.33], [0.5, 0.5], [1.0]), strict=True
        ):
            beta.copy_(torch.tensor(shares).log())
    assert best_path(net) == [0, 4]


@pytest.mark.parametrize("op", ["basic_block", "bottleneck"])
def test_resnet_space_in_which_the_stem_could_feed_the_final_node(op):
    """Such a path has no block, which a net_config cannot say: refused as a space, or never the derived path."""
    settings = {
        "init_dim": 4,
        "chs": [4, 6],
        "fm_sizes": [16, 16],
        "stage": [0, 0, 0],
        "num_layers": [0, 0],
        "head_ops": [op],
        "stack_ops": [op],
    }
    with pytest.raises(ValueError, match=r"block 0 .*final node"):
        make_space(**settings)


def test_space_without_any_stacked_layer():
    net, table = random_supernet(NO_LAYERS, 0), CostTable.mult_adds(NO_LAYERS, 32, 3)
    assert net.cost(table).item() == pytest.approx(
        expectation_over_paths(net, table, everything(NO_LAYERS)), rel=1e-9
    )
    choice = net.sample(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(
            net(noise(NO_LAYERS, 0).double(), choice), net(noise(NO_LAYERS, 0).double())
        )
    assert table.total(net.derive()) == pytest.approx(derived_by_hand(net, table)[2])


@given(spaces(), seeds, st.integers(1, 5))
def test_samples_fit_the_space_and_are_distinct(space, seed, count):
    net = random_supernet(space, seed)
    choice = net.sample(count, torch.Generator().manual_seed(seed))
    for chosen, alphas in ((choice.head, net.alpha_head), (choice.stack, net.alpha_stack)):
        assert [len(rows) for rows in chosen] == [len(alpha) for alpha in alphas]
        for rows, alpha in zip(chosen, alphas, strict=True):
            for row in rows:
                assert len(row) == len(set(row)) == min(count, alpha.shape[1])
                assert set(row) <= set(range(alpha.shape[1]))
    assert net.sample(count, torch.Generator().manual_seed(seed)) == choice


def test_another_seed_samples_something_else():
    net = random_supernet(SMALL, 0)
    draws = [net.sample(1, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert any(draw != draws[0] for draw in draws)


def test_without_a_generator_the_global_one_is_used():
    net = random_supernet(SMALL, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = net.sample(2)
        torch.manual_seed(3)
        assert net.sample(2) == drawn


@pytest.mark.parametrize("count", [0, -1])
def test_sampling_nothing_is_refused(count):
    with refused(ValueError, rf"k = {count} candidates asked for, at least 1"):
        SuperNet(SMALL, 2).sample(count)


def test_sampling_follows_softmax_of_alpha_without_replacement():
    """Chi-square against the exact probabilities of singles and of pairs, over many equal layers."""
    space = make_space(
        init_dim=2,
        chs=[2, 3],
        fm_sizes=[16, 16],
        stage=[0, 0, 0],
        num_layers=[0, 50],
        max_connections=1,
        head_ops=["mbconv_k3_t1"],
        stack_ops=["mbconv_k3_t1", "mbconv_k5_t1", "mbconv_k7_t1", SKIP],
    )
    net, generator = SuperNet(space, 2), torch.Generator().manual_seed(0)
    alpha = [0.0, 1.0, -1.5, 0.4]
    with torch.no_grad():
        net.alpha_stack[0].copy_(torch.tensor(alpha).expand(50, 4))
    p = softmax(alpha)
    singles = {(a,): p[a] for a in range(4)}
    pairs = {
        (a, b): p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))
        for a, b in combinations(range(4), 2)
    }
    for count, shares in ((1, singles), (2, pairs)):
        drawn = Counter(
            tuple(sorted(row)) for _ in range(80) for row in net.sample(count, generator).stack[0]
        )
        assert set(drawn) <= set(shares)
        assert (
            sum((drawn[key] - 4000 * share) ** 2 / (4000 * share) for key, share in shares.items())
            < 30
        )


def test_sampling_survives_certainty():
    net = SuperNet(SMALL, 2)
    with torch.no_grad():
        for alpha in (*net.alpha_head, *net.alpha_stack):
            alpha[:, 1] = 500.0
    for count in (1, 2):
        choice = net.sample(count, torch.Generator().manual_seed(0))
        for row in rows_of(choice.head) + rows_of(choice.stack):
            assert row[0] == 1 and len(set(row)) == count


def noise(space, seed):
    return torch.randn(
        4, 3, space.input_size, space.input_size, generator=torch.Generator().manual_seed(seed)
    )


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@settings(max_examples=12)
@given(spaces(), seeds)
def test_choosing_everything_is_the_whole_network(space, seed):
    net, choice, images = (
        random_supernet(space, seed, dtype=torch.float32),
        everything(space),
        noise(space, seed),
    )
    backwards = Choice(
        *([[row[::-1] for row in rows] for rows in part] for part in (choice.head, choice.stack))
    )
    with torch.no_grad():
        logits = net(images)
        assert logits.shape == (4, 3)
        assert torch.equal(net(images, choice), logits)
        assert distance(net(images, backwards), logits) < 1e-3


@settings(max_examples=12)
@given(spaces(), seeds)
def test_one_candidate_a_layer_uses_and_trains_only_these(space, seed):
    net, images = random_supernet(space, seed, dtype=torch.float32), noise(space, seed)
    generator = torch.Generator().manual_seed(seed)
    choice = net.sample(1, generator)
    logits = net(images, choice)
    logits.square().sum().backward()
    for module, chosen in candidates(net, choice):
        assert all((parameter.grad is not None) == chosen for parameter in module.parameters())
    with torch.no_grad():
        for module, chosen in candidates(net, choice):
            for parameter in module.parameters():
                parameter.add_(0.0 if chosen else 1.0)
        for alpha in (*net.alpha_head, *net.alpha_stack):
            alpha.add_(torch.randn(alpha.shape, generator=generator))
        assert torch.equal(net(images, choice), logits)


def test_shares_of_two_sampled_candidates_come_from_these_two_alone():
    net, images = random_supernet(SMALL, 1, dtype=torch.float32), noise(SMALL, 1)
    choice = Choice(
        head=[[[0, 2] for _ in rows] for rows in everything(SMALL).head],
        stack=[[[3, 1] for _ in rows] for rows in everything(SMALL).stack],
    )
    with torch.no_grad():
        logits, cost = net(images, choice), net.cost(random_table(SMALL, 2), choice)
        for alpha in net.alpha_head:
            alpha[:, 1] += 3
            alpha += 0.7
        for alpha in net.alpha_stack:
            alpha[:, [0, 2]] -= 2
        assert distance(net(images, choice), logits) < 1e-3
        assert net.cost(random_table(SMALL, 2), choice).item() == pytest.approx(
            cost.item(), rel=1e-5
        )
        net.alpha_head[0][:, 2] += 1
        assert distance(net(images, choice), logits) > 1e-2


def spoiled(change):
    choice = everything(SMALL)
    change(choice)
    return choice


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c.head.pop(), r"choice\.head has 2 blocks, the space has 3"),
        (lambda c: c.stack.append([]), r"choice\.stack has 4 blocks, the space has 3"),
        (lambda c: c.head[1].pop(), r"choice\.head: block 2 has 1 layers, the space has 2"),
        (lambda c: c.stack[0].append([0]), r"choice\.stack: block 1 has 2 layers, the space has 1"),
        (lambda c: c.head[2].__setitem__(0, [0, 3]), r"choice\.head: block 3 .*\[0, 3\].* 0 to 2"),
        (lambda c: c.stack[1].__setitem__(1, [-1]), r"choice\.stack: block 2 .*\[-1\].* 0 to 3"),
        (
            lambda c: c.stack[1].__setitem__(0, [2, 2]),
            r"choice\.stack: block 2 .*\[2, 2\].*different",
        ),
        (lambda c: c.head[0].__setitem__(0, []), r"choice\.head: block 1 .*\[\].*different"),
    ],
)
def test_choice_that_does_not_fit(change, pattern):
    net, choice = random_supernet(SMALL, 0), spoiled(change)
    with refused(ValueError, pattern):
        net(torch.zeros(2, 3, 16, 16, dtype=torch.float64), choice)
    with refused(ValueError, pattern):
        net.cost(random_table(SMALL, 1), choice)


@settings(max_examples=40)
@given(
    st.sampled_from([*MBCONVS, "basic_block", "bottleneck"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 15),
    st.sampled_from([1, 2]),
)
def test_mult_adds_of_every_op(op, in_channels, width, size, stride):
    with torch.device("meta"):
        module = ops.build_op(op, in_channels, width, stride, ops.batch_norm(affine=True))
        images = torch.empty(2, in_channels, size, size)
        assert ops.mult_adds(op, in_channels, width, size, stride) == counted_mult_adds(
            module, images
        )
        assert module(images).shape[1] == ops.out_channels(op, width)


def test_a_skip_changes_and_costs_nothing():
    images = torch.randn(2, 5, 6, 6)
    assert torch.equal(ops.build_op(SKIP, 5, 5, 1, ops.batch_norm(affine=True))(images), images)
    assert ops.mult_adds(SKIP, 5, 5, 6, 1) == 0


@given(spaces(), seeds, st.integers(0, 40), st.integers(2, 20))
def test_size_of_derived_networks(space, seed, more, num_classes):
    size = smallest_input(space) + more
    arch = random_supernet(space, seed).derive()
    with torch.device("meta"):
        net = arch.build(num_classes)
        counted = counted_mult_adds(net, torch.empty(2, 3, size, size))
    assert arch.mult_adds(size, num_classes) == pytest.approx(counted / 1e6, rel=1e-12)
    assert arch.params(num_classes) == pytest.approx(
        sum(p.numel() for p in net.parameters()) / 1e6, rel=1e-12
    )


@given(spaces(skip_reg=False), seeds, st.integers(0, 40))
def test_cost_table_agrees_with_the_derived_network(space, seed, more):
    """A ResNet network has no final 1×1 convolution, the supernet that the table describes has one."""
    size, num_classes = smallest_input(space) + more, 6
    net = random_supernet(space, seed)
    arch, table = net.derive(), CostTable.mult_adds(space, size, num_classes)
    total = table.total(arch)
    if not is_mbv2(space):
        end = best_path(net)[-2]
        channels = space.chs[end] * (4 if space.head_ops == ("bottleneck",) else 1)
        total -= table.final[before(space, space.num_blocks).index(end)] + table.classifier
        total += channels * num_classes / 1e6
    assert total == pytest.approx(arch.mult_adds(size, num_classes), rel=1e-9)


@given(spaces(skip_reg=False), st.integers(0, 20))
def test_cost_table_adds_up_to_the_whole_supernet(space, more):
    size = smallest_input(space) + more
    table = CostTable.mult_adds(space, size, num_classes=6)
    with torch.device("meta"):
        counted = counted_mult_adds(SuperNet(space, 6), torch.empty(2, 3, size, size))
    assert sum(entries(table)) == pytest.approx(counted / 1e6, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"init_dim": 2, "head_ops": ["mbconv_k3_t3"], "stack_ops": ["mbconv_k5_t3"]}, 32),
        ({"init_dim": 4, "head_ops": ["basic_block"], "stack_ops": ["basic_block"]}, 32),
        ({"init_dim": 4, "head_ops": ["bottleneck"], "stack_ops": ["bottleneck"]}, 5),
    ],
)
def test_final_node_fed_from_two_map_sizes(settings, size):
    """The edge rule lets a block with twice the last map feed the final node: blocks 1 and 2 here."""
    space = make_space(
        chs=[4, 5, 6],
        fm_sizes=[16, 16, 8],
        stage=[0, 1, 1, 2],
        num_layers=[0, 1, 0],
        max_connections=2,
        **settings,
    )
    assert before(space, 3) == [2, 1]
    net, table = SuperNet(space, 3), CostTable.mult_adds(space, size, 3)
    images = torch.randn(2, 3, size, size)
    assert sum(entries(table)) == pytest.approx(counted_mult_adds(net, images) / 1e6, rel=1e-9)
    with torch.no_grad():
        net.beta[0].copy_(torch.tensor([5.0, -5.0]))
        net.beta[1].copy_(torch.tensor([-5.0, 5.0]))
    assert best_path(net) == [0, 1, 3]
    final = table.final[1] + table.classifier
    width = 5 * (4 if settings["head_ops"] == ["bottleneck"] else 1)
    end = final if is_mbv2(space) else width * 3 / 1e6
    arch = net.derive()
    assert table.total(arch) - final + end == pytest.approx(arch.mult_adds(size, 3), rel=1e-9)


@pytest.mark.parametrize("preset", ["resnet", "cifar_resnet", "bottleneck"])
def test_a_regularised_skip_costs_a_tenth_of_the_first_op(preset):
    table = CostTable.mult_adds(SearchSpace.load(preset))
    assert all(layer == [layer[0], layer[0] / 10] for layer in table.stack)


@pytest.mark.parametrize("arch", ["DenseNAS-A", "DenseNAS-C"])
def test_total_refuses_an_architecture_of_another_space(arch):
    with refused(ValueError, r"not .* of space digits"):
        CostTable.mult_adds(SearchSpace.load("digits"), 32).total(arch)


def test_total_refuses_more_layers_than_the_block_has():
    def with_layers(count):
        stack = ["mbconv_k3_t3"] * count
        return f"[[4, 4], 'mbconv_k3_t1', [], 0, 1]|[[4, 8], 'mbconv_k3_t3', {stack}, {count}, 2]|[[8, 7], 'conv1_1']"

    table = CostTable.mult_adds(SMALL, 16, 3)
    one_layer = table.nested()[1][1][1][0][0]
    assert table.total(with_layers(2)) == pytest.approx(table.total(with_layers(0)) + 2 * one_layer)
    with refused(ValueError, r"architecture is not one of space made up"):
        table.total(with_layers(3))


def test_total_leaves_out_spare_rows_where_nothing_can_be_skipped():
    space = SMALL.model_copy(update={"stack_ops": ("mbconv_k3_t3",)})
    table = CostTable.mult_adds(space, 16, 3)
    stem, blocks, *ends = table.nested()
    blocks = [(head, [*layers, *layers, [7.0]]) for head, layers in blocks]
    spare = CostTable.from_nested(space, "mult_adds", (stem, blocks, *ends), table.conditions)
    assert spare.nested()[1] == [list(block) for block in blocks]
    stack = ["mbconv_k3_t3"] * 2
    arch = f"[[4, 4], 'mbconv_k3_t1', [], 0, 1]|[[4, 8], 'mbconv_k3_t3', {stack}, 2, 2]|[[8, 7], 'conv1_1']"
    assert spare.total(arch) == table.total(arch)


@given(spaces(), seeds)
def test_a_written_table_reads_back(tmp_path_factory, space, seed):
    path = tmp_path_factory.mktemp("table") / "cost.json"
    for table in (CostTable.mult_adds(space, smallest_input(space), 5), random_table(space, seed)):
        table.write(path)
        assert CostTable.read(path) == table


def test_published_literal_is_read_as_the_space_it_fits(tmp_path):
    ours = CostTable.mult_adds(SearchSpace.load("mbv2"), num_classes=1000)
    path = tmp_path / "lat_list"
    path.write_text(repr(ours.nested()) + "\n")
    table = CostTable.read(path)
    assert (table.space.name, table.kind, table.unit) == ("mbv2", "latency", "ms")
    assert table.nested() == ours.nested()
    for name in ("DenseNAS-A", "DenseNAS-B", "DenseNAS-C"):
        assert table.total(name) == ours.total(name)


def test_published_literal_for_a_space_of_ones_own(tmp_path):
    path = tmp_path / "lat_list"
    path.write_text(repr(random_table(SMALL, 0).nested()))
    assert CostTable.read(path, SMALL).nested() == random_table(SMALL, 0).nested()
    with refused(ValueError, r"lat_list does not fit: .*fits no preset"):
        CostTable.read(path)
    with refused(
        ValueError,
        r"lat_list: cost table does not fit space digits: 3 blocks in the table, 6 in the space",
    ):
        CostTable.read(path, SearchSpace.load("digits"))


def test_a_literal_with_code_in_it_is_not_run(tmp_path):
    path, touched = tmp_path / "lat_list", tmp_path / "touched"
    for text in (
        f"__import__('os').system('touch {touched}')",
        f"[1.0, [], [__import__('os').system('touch {touched}')], 1.0]",
        f"open({str(touched)!r}, 'w')",
    ):
        path.write_text(text)
        with refused(
            ValueError, r"lat_list is neither a cost table of ours nor a published latency list"
        ):
            CostTable.read(path)
        assert not touched.exists()


def own_format(change=lambda record: None, **settings):
    record = {
        "kind": "mult_adds",
        "unit": "million Mult-Adds",
        "conditions": {"input_size": 16, "num_classes": 3},
        "space": SMALL.model_dump(mode="json"),
        "table": random_table(SMALL, 0).nested(),
        **settings,
    }
    change(record)
    return json.dumps(record)


def entry(*place, to):
    """The own format with another entry at this place of its nesting."""

    def change(record):
        row = record["table"]
        for index in place[:-1]:
            row = row[index]
        row[place[-1]] = to

    return own_format(change)


LIST = r"is neither a cost table of ours nor a published latency list: "
MEASURED = {"input_size": 16, "num_classes": 3, "batch_size": 1}
JUNK = {
    "empty": ("", LIST),
    "words": ("not a cost table", LIST),
    "a number": ("5", LIST),
    "two numbers": ("[1.0, 2.0]", LIST),
    "no blocks": ("[1.0, [], [], 1.0]", r"does not fit: its nesting fits no preset"),
    "flat": ("[1.0, [1.0, 2.0], [3.0], 4.0]", LIST + r"1\.0: .*a list"),
    "bracket left open": ("[[[1.0", LIST),
    "a mapping": ("{'stem': 1.0}", r"Invalid JSON"),
    "a set": ("[1.0, [[{}, []]], {[]: 1}, 1.0]", LIST),
    "nested too deep": ("[" * 100_000, LIST),
    "mapping nested too deep": ('{"a":' * 100_000, r"Invalid JSON"),
    "blocks are numbers": (repr([1.0, [1.0] * 6, [1.0], 1.0]), LIST + r"1\.0: .*a list"),
    "JSON cut off": (own_format()[:-100], r"Invalid JSON"),
    "JSON without a space": (
        own_format(lambda record: record.pop("space")),
        r"the setting 'space' is missing",
    ),
    "JSON without a table": (
        own_format(lambda record: record.pop("table")),
        r"the setting 'table' is missing",
    ),
    "JSON with a broken space": (
        own_format(lambda record: record["space"].update(chs=[4, 0, 8, 10])),
        r"space\.chs\.1: .*\(got 0\)",
    ),
    "JSON with a space of words": (own_format(space="digits"), r"space: .*\(got 'digits'\)"),
    "JSON with a space of another version": (
        own_format(lambda record: record["space"].update(depth=3)),
        r"no setting 'space\.depth'",
    ),
    "JSON of another size": (
        own_format(lambda record: record["table"][1].pop()),
        r"does not fit space made up: 2 bl",
    ),
    "JSON with a flat block": (
        entry(1, 2, 0, to=1.0),
        r"table\.1\.2\.0: .*valid array \(got 1\.0\)",
    ),
    "JSON with an unknown kind": (own_format(kind="euro"), r"kind: .*\(got 'euro'\)"),
    "JSON with a list as kind": (own_format(kind=["latency"]), r"kind: "),
    "JSON with another unit": (
        own_format(unit="ms"),
        r"unit is 'ms', that of mult_adds is million Mult-Adds",
    ),
    "JSON without conditions": (
        own_format(lambda record: record.pop("conditions")),
        r"'conditions' is missing",
    ),
    "JSON with empty conditions": (
        own_format(conditions={}),
        r"conditions: the setting 'input_size' is missing",
    ),
    "JSON without classes": (
        own_format(conditions={"input_size": 16}),
        r"conditions: .*'num_classes' is missing",
    ),
    "JSON with a size as text": (
        own_format(conditions={"input_size": "16", "num_classes": 3}),
        r"conditions: input_size: .*\(got '16'\)",
    ),
    "JSON of no device": (
        own_format(kind="latency", unit="ms", conditions=MEASURED),
        r"conditions: the setting 'device' is missing",
    ),
    "JSON with a word as cost": (
        entry(0, to="cheap"),
        r"table\.0: expected a finite number of at least 0 \(got 'cheap'\)",
    ),
    "JSON with a negative cost": (entry(3, to=-1.0), r"table\.3: .*\(got -1\.0\)"),
    "JSON with NaN": (entry(1, 2, 0, 1, 0, to=math.nan), r"table\.1\.2\.0\.1\.0: .*\(got nan\)"),
    "JSON with infinity": (
        entry(1, 1, 1, 0, 2, to=math.inf),
        r"table\.1\.1\.1\.0\.2: .*\(got inf\)",
    ),
    "JSON with a truth value": (entry(2, 0, to=True), r"table\.2\.0: .*\(got True\)"),
    "JSON with nothing": (
        entry(1, 0, 0, 0, 0, to=None),
        r"table\.1\.0\.0\.0\.0: .*\(got None\)",
    ),
    "JSON with a huge number": (entry(0, to=10**400), r"table\.0: .*\(got 1000.* …\)$"),
    "a list with infinity": (
        repr(random_table(SMALL, 0).nested()).replace("[", "[1e400, ", 1),
        LIST,
    ),
    "binary": (b"\x80\x02\xff\xfe", r"not a text file"),
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_refused_in_one_sentence_that_names_file_and_entry(name, tmp_path):
    content, pattern = JUNK[name]
    path = tmp_path / "lat_list"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(ValueError, rf"lat_list.*{pattern}"):
        CostTable.read(path)


@pytest.mark.parametrize(
    ("text", "shown"), [("1e400", "inf"), ("-0.5", "-0.5"), ("True", "True"), ("'1'", "'1'")]
)
def test_an_entry_of_a_published_literal_is_named(text, shown, tmp_path):
    path = tmp_path / "lat_list"
    _, *rest = random_table(SMALL, 0).nested()
    path.write_text(f"[{text}, {repr(rest)[1:]}")
    with refused(
        ValueError,
        rf"lat_list {LIST}0: expected a finite number of at least 0 \(got {shown}\)$",
    ):
        CostTable.read(path, SMALL)


def test_a_table_of_another_space_than_asked_for_is_refused(tmp_path):
    path = tmp_path / "cost.json"
    CostTable.mult_adds(SMALL, 16, 3).write(path)
    assert CostTable.read(path, SMALL).space == SMALL
    with refused(ValueError, r"cost\.json: it prices space made up, asked for was digits"):
        CostTable.read(path, SearchSpace.load("digits"))


def test_a_table_that_would_be_waited_for_or_is_not_there(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with refused(FileNotFoundError, r"there is no file"):
            CostTable.read(tmp_path / name)


@pytest.mark.parametrize("classes", [0, -1, 2.5, "10", math.nan])
def test_classes_that_are_no_number(classes):
    with refused(ValueError, r"num_classes is .*, expected a whole number of at least 1"):
        CostTable.mult_adds(SMALL, 16, classes)
