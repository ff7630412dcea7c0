"""Our search steps against the same ones written the obvious way (benchmarks/plain.py)."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY as ROOT
from helpers import TINY, random_supernet
from plain import Plain
from search_step import RESULTS, table
from torch.nn.utils import prune

from densenas import CostTable, SearchSpace
from densenas.method.ops import MBConv, batch_norm, norm_act_conv
from densenas.recipes import override
from densenas.search import SearchTrainer

SPACE = SearchSpace.load("digits")
PUBLISHED = override(SPACE.search, paths="all", weights="own")


def both(dtype, seed=0):
    net, table = random_supernet(SPACE, seed, 10, dtype), CostTable.mult_adds(SPACE, 32, 10)
    plain = Plain(net, table, PUBLISHED)
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
    trainer = SearchTrainer(net, table, PUBLISHED, steps=10**9, precision="fp32")
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


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("width", "size", "frozen", "derived"),
    [(6, 1, False, False), (6, 7, False, True), (6, 7, True, False), (24, 65, False, False)],
)
def test_a_fused_layer_is_its_three_modules(kernel, stride, width, size, frozen, derived):
    torch.manual_seed(0)
    groups = width if kernel > 1 else 1
    conv = torch.nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = torch.nn.BatchNorm2d(width, affine=derived, track_running_stats=derived)
    if derived:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.uniform_(norm.bias, -0.5, 2)
    conv.requires_grad_(not frozen)
    ours, theirs = (
        torch.nn.Sequential(norm, conv),
        copy.deepcopy(torch.nn.Sequential(norm, torch.nn.ReLU6(), conv)),
    )
    results = []
    for net, function in (
        (ours, partial(norm_act_conv, norm=norm, act=torch.nn.ReLU6(), conv=conv)),
        (theirs, theirs),
    ):
        x = 3 * torch.randn(3, width, size, size, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = function(x)
        y.sin().sum().backward()
        results.append(
            [y, x.grad, *(p.grad for p in net.parameters() if p.requires_grad), *net.buffers()]
        )
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


def pruned(block):
    for part in (block.expand_conv, block.depthwise_conv, block.project_conv):
        prune.l1_unstructured(part[0], "weight", 0.3)


def smooth(block):
    for part in (block.expand_conv, block.depthwise_conv):
        part[2] = torch.nn.SiLU()


def biased(block):
    conv = block.project_conv[0]
    block.project_conv[0] = torch.nn.Conv2d(conv.in_channels, conv.out_channels, 1)


def averaging(block):
    for part in (block.expand_conv, block.depthwise_conv):
        part[1].momentum = None


def watched(block):
    block.seen = []
    for part in (block.expand_conv[2], block.depthwise_conv):
        part.register_forward_hook(lambda *call: block.seen.append(call))


@pytest.mark.parametrize("change", [pruned, smooth, biased, averaging, watched])
def test_a_step_trains_what_the_user_made_of_a_block(change):
    """What was put in place of a layer, or hung on it, is what trains, step after step."""
    blocks = []
    for _ in range(2):
        torch.manual_seed(0)
        blocks.append(MBConv(4, 8, 1, 3, 3, torch.nn.BatchNorm2d).train())
        change(blocks[-1])
    ours, theirs = blocks
    images = torch.randn(4, 4, 8, 8)
    for _ in range(2):
        x = images
        for part in (theirs.expand_conv, theirs.depthwise_conv, theirs.project_conv):
            x = part(x)
        y = ours(images)
        torch.testing.assert_close(y, x)
        for net, out in ((ours, y), (theirs, x)):
            net.zero_grad()
            out.square().sum().backward()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
    for mine, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, expected)
    assert change is not watched or len(ours.seen) == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_has_the_gradient_that_plain_modules_give_it(frozen):
    """As a penalty on gradients or a Hessian's product needs it: exact, through batch norm and convolution."""
    torch.manual_seed(0)
    ours = TINY.build(3).double().train()
    for module in ours.modules():
        if isinstance(module, MBConv):
            module.depthwise_conv[0].requires_grad_(not frozen)
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        if isinstance(module, MBConv):
            module.forward = partial(plain_forward, module)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = []
    for net in (ours, theirs):
        weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
        loss = F.cross_entropy(net(images), torch.tensor([0, 1]))
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        found.append([weight.grad for weight in weights])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def plain_forward(self, x):
    y = self.project_conv(self.depthwise_conv(self.expand_conv(x)))
    return y + x if self.residual else y


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("training", [False, True])
def test_torchscript_reads_the_network(training):
    net = TINY.build(3)
    scripted = torch.jit.script(copy.deepcopy(net)).train(training)
    images = torch.randn(2, 3, 32, 32)
    traced = torch.jit.trace(copy.deepcopy(net).train(training), images)
    expected = net.train(training)(images)
    torch.testing.assert_close(scripted(images), expected)
    torch.testing.assert_close(traced(images), expected)


def test_a_frozen_norm_stays_frozen():
    """Fine-tuning with batch norm in evaluation mode, as `for norm in norms: norm.eval()` leaves it."""
    layer = MBConv(6, 6, 1, 3, 3, batch_norm(affine=True)).train()
    norms = [module for module in layer.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.running_mean)
        norm.eval()
    before, x = [norm.running_mean.clone() for norm in norms], torch.randn(2, 6, 8, 8)
    y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x))
    assert all(
        torch.equal(mean, norm.running_mean) for mean, norm in zip(before, norms, strict=True)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_keeps_at_most_half_of_what_the_plain_one_keeps(count):
    """Between the forward and the backward pass; a weight step (count 1) and an architecture step."""
    net, _, plain, images, _ = both(torch.float32)
    choice = net.sample(count, torch.Generator().manual_seed(1))
    kept = []
    for trained in (net, plain.net):
        for parameter in trained.arch_parameters() if count == 1 else trained.weight_parameters():
            parameter.requires_grad_(False)
    for forward in (net, plain):
        storages = {}

        def keep(tensor, storages=storages):
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(images, choice)
        assert output.requires_grad
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    assert kept[0] <= kept[1] / 2


def test_readme_shows_the_committed_results():
    rows = json.loads((RESULTS / "search_step-cpu-fp32.json").read_text())["rows"]
    shown = (
        (ROOT / "README.md").read_text().split("<!-- speed -->\n")[1].split("\n<!-- /speed -->")[0]
    )
    assert shown == table(rows), "python benchmarks/search_step.py --table"
