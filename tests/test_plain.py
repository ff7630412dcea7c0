"""Our search steps against the same ones written the obvious way (benchmarks/plain.py)."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import random_supernet
from plain import Plain
from search_step import RESULTS, table

from densenas import CostTable, SearchSpace
from densenas.config import ROOT
from densenas.ops import Depthwise
from densenas.search import SearchTrainer

SPACE = SearchSpace.load("digits")


def both(dtype, seed=0):
    net, table = random_supernet(SPACE, seed, 10, dtype), CostTable.mult_adds(SPACE, 32, 10)
    plain = Plain(net, table, SPACE.search)
    torch.manual_seed(seed)
    images, labels = torch.randn(6, 3, 32, 32, dtype=dtype), torch.randint(10, (6,))
    net.to(memory_format=torch.channels_last)
    return net, table, plain, images, labels


def close(ours, plain, tolerance):
    assert (ours is None) == (plain is None)
    assert ours is None or (ours - plain).norm() <= tolerance * max(plain.norm(), 1e-3)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_loss_cost_and_gradients_are_those_of_the_plain_implementation(count, dtype, tolerance):
    net, table, plain, images, labels = both(dtype)
    choice = net.sample(count, torch.Generator().manual_seed(1))
    loss, cost = F.cross_entropy(net(images, choice), labels), net.cost(table, choice)
    expected, expected_cost = F.cross_entropy(plain(images, choice), labels), plain.cost(choice)
    close(loss, expected, tolerance)
    close(cost, expected_cost, tolerance)
    (loss + cost.log()).backward()
    (expected + expected_cost.log()).backward()
    for ours, theirs in zip(net.parameters(), plain.net.parameters(), strict=True):
        # A weight that is one whatever alpha is has a gradient of zero there, and none here.
        close(ours.grad, theirs.grad, tolerance)


@pytest.mark.parametrize("kind", ["weight_step", "arch_step"])
def test_three_steps_move_parameters_as_the_plain_ones_do(kind):
    net, table, plain, images, labels = both(torch.float64)
    trainer = SearchTrainer(net, table, SPACE.search, steps=10**9, precision="fp32")
    for parameter in trainer.arch if kind == "weight_step" else trainer.weights:
        parameter.requires_grad_(False)
    for ours, theirs in zip(net.parameters(), plain.net.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    for seed in range(3):
        torch.manual_seed(seed)
        loss, top1 = getattr(trainer, kind)(images, labels).tolist()
        torch.manual_seed(seed)
        assert getattr(plain, kind)(images, labels) == pytest.approx((loss, top1), rel=1e-5)
    for ours, theirs in zip(net.parameters(), plain.net.parameters(), strict=True):
        close(ours, theirs, 1e-5)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("width", "size"), [(6, 1), (6, 2), (6, 7), (24, 65)])
def test_the_depthwise_gradients_are_pytorchs(kernel, stride, width, size):
    torch.manual_seed(0)
    ours = Depthwise(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
    theirs = torch.nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
    theirs.load_state_dict(ours.state_dict())
    grads = []
    for module in (ours, theirs):
        x = torch.randn(3, width, size, size, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        module(x).sin().sum().backward()
        grads.append((x.grad, module.weight.grad))
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


def test_readme_shows_the_committed_results():
    rows = json.loads((RESULTS / "search_step-cpu-fp32.json").read_text())["rows"]
    shown = (ROOT / "README.md").read_text().split("<!-- speed -->\n")[1].split("\n<!-- /speed -->")[0]
    assert shown == table(rows), "python benchmarks/search_step.py --table"
