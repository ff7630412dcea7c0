"""Whole networks as paths of a supernet, and weights that candidates share."""

import json
import math
from collections import Counter
from itertools import pairwise, product

import pandas as pd
import paths
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DATA,
    REPOSITORY,
    SEARCH,
    SKIP,
    SMALL,
    TABLE,
    block_paths,
    checkpoint,
    edge_probabilities,
    identical,
    make_space,
    path_probability,
    random_supernet,
    refused,
    spaces,
    stopping_before_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from densenas import Architecture, Choice, CostTable, SuperNet
from densenas.judge import Judge
from densenas.method import ops
from densenas.method.derivation import Lattice
from densenas.method.layers import SharedLayer
from densenas.method.space import Layer
from densenas.outcome import load_search
from densenas.recipes import override
from densenas.search import SearchTrainer, search
from densenas.training.device import pick_device

SAMPLED = override(SEARCH, paths="sampled", weights="shared", arch_lr=0.2)
NORM = ops.batch_norm(affine=False, eps=1e-3)
FAMILIES = {
    "mbconv": ["mbconv_k3_t1", "mbconv_k3_t3", "mbconv_k5_t6", "mbconv_k7_t3", SKIP],
    "basic_block": ["basic_block", SKIP],
    "bottleneck": ["bottleneck", SKIP],
}


# Weights that candidates share.


def slice_by_hand(weight, shape):
    """First channels, centre of the kernel."""
    rows = [slice(size) for size in shape[:2]]
    centre = []
    for whole, size in zip(weight.shape[2:], shape[2:], strict=True):
        centre.append(slice((whole - size) // 2, (whole + size) // 2))
    return weight[(*rows, *centre)]


@settings(max_examples=25)
@given(st.sampled_from([*FAMILIES]), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2]))
def test_a_candidate_is_the_op_alone_with_its_slice_of_the_weights(family, before, width, stride):
    in_channels = ops.out_channels(family, before) if family == "bottleneck" else before
    same = stride == 1 and in_channels == ops.out_channels(family, width)
    names = FAMILIES[family] if same else FAMILIES[family][:-1]
    torch.manual_seed(0)
    layer = SharedLayer([Layer(op, in_channels, width, 6, stride) for op in names], NORM).double()
    x = torch.randn(4, in_channels, 6, 6, dtype=torch.float64)
    for index, op in enumerate(names):
        alone = ops.build_op(op, in_channels, width, stride, NORM).double()
        banks = {name.replace(".", "_"): bank for name, bank in layer.named_parameters()}
        with torch.no_grad():
            for name, weight in alone.named_parameters():
                weight.copy_(slice_by_hand(banks[name.replace(".", "_")], weight.shape))
        ours, expected = layer.candidate(index, x), alone(x)
        torch.testing.assert_close(ours, expected)
        if op == SKIP:
            continue
        cotangent = torch.randn_like(expected)
        layer.zero_grad()
        ours.backward(cotangent)
        expected.backward(cotangent)
        for name, weight in alone.named_parameters():
            bank = banks[name.replace(".", "_")]
            torch.testing.assert_close(slice_by_hand(bank.grad, weight.shape), weight.grad)
            outside = bank.grad.abs().sum() - slice_by_hand(bank.grad, weight.shape).abs().sum()
            assert abs(float(outside)) < 1e-9 * max(1.0, float(bank.grad.abs().sum()))


def test_a_layers_weights_are_as_large_as_the_largest_in_every_dimension():
    names = ["mbconv_k3_t6", "mbconv_k7_t3"]
    layer = SharedLayer([Layer(op, 4, 5, 8, 1) for op in names], NORM)
    shapes = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    assert shapes == {
        "expand_conv_0_weight": (24, 4, 1, 1),
        "depthwise_conv_0_weight": (24, 1, 7, 7),
        "project_conv_0_weight": (5, 24, 1, 1),
    }


# One path.


def copied(net, arch):
    """The derived network with the supernet's convolutions, normalising by the batch as the supernet does."""
    model = arch.build(net.classifier.out_features).double().train()
    choice = Choice.of(net.space, arch)
    weights = [*net.stem.parameters()]
    for before, j in pairwise(choice.path[:-1]):
        block = net.blocks[j - 1]
        edge = net.space.incoming(j).index(before)
        weights += weights_of(block.heads[edge], choice.head[j - 1][edge][0])
        for layer, (index,) in zip(block.stack, choice.stack[j - 1], strict=True):
            weights += weights_of(layer, index)
    last = net.space.incoming(choice.path[-1]).index(choice.path[-2])
    weights += [*net.final[last].parameters()]
    convolutions = [weight for weight in weights if weight.dim() == 4]
    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for module, weight in zip(modules, convolutions, strict=True):
            module.weight.copy_(weight)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = net.space.bn_eps
    model.classifier.load_state_dict(net.classifier.state_dict())
    return model


def weights_of(layer, index):
    if isinstance(layer, SharedLayer):
        return [*layer.slices(index).values()]
    return [*layer[index].parameters()]


@settings(max_examples=12)
@given(spaces(families=("mbv2",)), st.integers(0, 99), st.sampled_from(["own", "shared"]))
def test_a_path_gives_the_logits_of_the_derived_network_with_copied_weights(space, seed, weights):
    torch.manual_seed(seed)
    net = SuperNet(space, 3, weights).double()
    table = CostTable.mult_adds(space, space.input_size, 3)
    (candidate,) = Lattice(table).sample(1, seed)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    arch = candidate.architecture
    ours = net(images, Choice.of(space, arch))
    torch.testing.assert_close(ours, copied(net, arch)(images), rtol=1e-6, atol=1e-8)


@settings(max_examples=30)
@given(spaces(), st.integers(0, 99))
def test_what_is_derived_is_judged_where_it_was_found(space, seed):
    """By the weights of the very layers that chose its ops, though a skip or equal widths hide which these are."""
    net = random_supernet(space, seed)
    table = CostTable.mult_adds(space, space.input_size, 3)
    candidate = Lattice(table, net.probabilities()).derive()
    choice = Choice.of(space, candidate)
    assert choice.path == candidate.path
    for before, j in pairwise(choice.path[:-1]):
        edge = space.incoming(j).index(before)
        assert choice.head[j - 1][edge] == [int(net.alpha_head[j - 1][edge].argmax())]
        assert choice.stack[j - 1] == [[int(row.argmax())] for row in net.alpha_stack[j - 1]]


def test_an_architecture_of_another_space_is_no_path():
    with refused(ValueError, "not one of space made up"):
        Choice.of(SMALL, Architecture.named("DenseNAS-A"))


# Drawing networks.


def network_of(space, choice):
    """A drawn network's edges and the candidates on its path, hashable."""
    rows = []
    for before, j in pairwise(choice.path[:-1]):
        edge = space.incoming(j).index(before)
        rows.append((choice.head[j - 1][edge][0], *(row[0] for row in choice.stack[j - 1])))
    return choice.path, tuple(rows)


TOY = make_space(
    input_size=8,
    init_dim=2,
    chs=[2, 3, 4],
    fm_sizes=[4, 4, 2],
    stage=[0, 1, 1, 2],
    num_layers=[0, 1, 0],
    head_ops=["mbconv_k3_t1", "mbconv_k3_t3"],
    stack_ops=["mbconv_k3_t1", SKIP],
)


def all_networks(net):
    """Every whole network of the toy space with its probability, by hand."""
    space, edges = net.space, edge_probabilities(net)
    head = [alpha.softmax(dim=1).tolist() for alpha in net.alpha_head]
    stack = [alpha.softmax(dim=1).tolist() for alpha in net.alpha_stack]
    found = {}
    for path in block_paths(space):
        options = []
        for before, j in pairwise(path[:-1]):
            edge = space.incoming(j).index(before)
            layers = [range(len(space.head_ops))] + [
                range(len(space.stack_ops))
            ] * space.num_layers[j]
            options.append([(j, edge, chosen) for chosen in product(*layers)])
        for network in product(*options):
            probability = path_probability(edges, path)
            for j, edge, (op, *layers) in network:
                probability *= head[j - 1][edge][op]
                for layer, index in enumerate(layers):
                    probability *= stack[j - 1][layer][index]
            found[tuple(path), tuple(chosen for _, _, chosen in network)] = probability
    return found


def test_networks_are_drawn_as_often_as_they_are_probable():
    net = random_supernet(TOY, seed=1)
    expected = all_networks(net)
    assert math.isclose(sum(expected.values()), 1)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    found = Counter(network_of(TOY, net.draw(generator)) for _ in range(draws))
    assert found.keys() <= expected.keys()
    for network, probability in expected.items():
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(found[network] / draws - probability) < 4.5 * spread + 1e-9


def test_log_probabilities_are_those_of_the_draws():
    net = random_supernet(TOY, seed=2)
    expected = all_networks(net)
    generator = torch.Generator().manual_seed(0)
    networks = [net.draw(generator) for _ in range(20)]
    found = net.log_probabilities(networks).exp().tolist()
    assert found == pytest.approx([expected[network_of(TOY, one)] for one in networks])


def test_an_architecture_step_estimates_the_gradient_of_the_expected_loss(monkeypatch):
    """The mean over many steps is the exact gradient, by enumeration of all networks."""
    net = random_supernet(TOY, seed=3)
    recipe = override(SAMPLED, weights="own")
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    table = CostTable.mult_adds(TOY, 8, 3)
    trainer = SearchTrainer(net, table, recipe, steps=10, precision="fp32")
    monkeypatch.setattr(trainer, "_penalty", lambda cost: 0.0 * cost)
    monkeypatch.setattr(trainer.adam, "step", lambda: None)
    drawn = {}
    generator = torch.Generator().manual_seed(0)
    while len(drawn) < len(all_networks(net)):
        choice = net.draw(generator)
        drawn.setdefault(network_of(TOY, choice), choice)
    networks = [*drawn.values()]
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(net(images, one), labels) for one in networks])
    exact = torch.autograd.grad(
        net.log_probabilities(networks).exp() @ losses, net.arch_parameters()
    )
    torch.manual_seed(0)
    sums = [torch.zeros_like(parameter) for parameter in net.arch_parameters()]
    steps = 1500
    for _ in range(steps):
        trainer.arch_step(images, labels)
        for total, parameter in zip(sums, net.arch_parameters(), strict=True):
            total += parameter.grad
    found = torch.cat([total.flatten() for total in sums]) / steps
    wanted = torch.cat([gradient.flatten() for gradient in exact])
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.97
    assert 0.8 < float(found.norm() / wanted.norm()) < 1.25


# A whole search.


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_a_search_over_sampled_paths_hits_its_target_and_goes_on_after_a_kill(
    weights, run, tmp_path
):
    recipe = override(SAMPLED, weights=weights)
    target = Lattice(TABLE).quantile(0.5)
    undisturbed = search(run, DATA, TABLE, recipe, target)
    assert abs(undisturbed.best.cost / target - 1) <= 0.03
    again = replace_run(run, tmp_path)
    with pytest.raises(KeyboardInterrupt), stopping_before_step(8):
        search(again, DATA, TABLE, recipe, target)
    search(again, DATA, TABLE, recipe, target)
    assert identical(checkpoint(run, "search"), checkpoint(again, "search"))
    loaded = load_search(run, TABLE, 3)
    assert identical(loaded.net.state_dict(), undisturbed.net.state_dict())
    assert loaded.best == undisturbed.best


def replace_run(run, folder):
    return type(run)("again", folder)


@pytest.mark.parametrize("paths", ["all", "sampled"])
def test_every_epoch_says_what_the_derived_network_reaches_by_the_supernets_weights(paths, run):
    result = search(run, DATA, TABLE, override(SAMPLED, paths=paths))
    history = run.history("search")
    assert history["path_top1"].between(0, 1).all() and len(history) == SEARCH.epochs
    judge = Judge(DATA, SEARCH.batch_size, pick_device())
    assert history["path_top1"].iloc[-1] == pytest.approx(
        judge.top1(result.net, Choice.of(result.net.space, result.best))
    )


def test_a_network_is_judged_on_whole_batches_of_val():
    net = random_supernet(SMALL, 0, dtype=torch.float32)
    (candidate,) = Lattice(TABLE).sample(1, 0)
    judge = Judge(DATA, 8, torch.device("cpu"))
    choice = Choice.of(SMALL, candidate.architecture)
    hits = 0
    for images, labels in judge.batches.epoch(0):
        hits += int((net(images, choice).argmax(dim=1) == labels).sum())
    assert judge.top1(net, choice) == pytest.approx(hits / len(DATA.val))


def test_readme_shows_what_each_way_knows():
    rows = pd.DataFrame(json.loads(paths.RESULTS.read_text())["searches"])
    readme = (REPOSITORY / "README.md").read_text()
    shown = readme.split("<!-- paths -->\n")[1].split("\n<!-- /paths -->")[0]
    assert shown == paths.table(rows), "python benchmarks/paths.py --table"
