"""What several test files need: random small spaces, brute force over their paths, and checks of error sentences."""

import math
import re
import resource
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from densenas import Architecture, Choice, CostTable, SearchSpace, SuperNet
from densenas.images.data import ImageData, Split
from densenas.method.probabilities import best_paths
from densenas.recipes import RetrainRecipe, SearchRecipe
from densenas.settings import DataSettings

REPOSITORY = Path(__file__).parent.parent
MBCONVS = [f"mbconv_k{kernel}_t{expansion}" for kernel in (3, 5, 7) for expansion in (1, 3, 6)]
SKIP = "skip_connect"
RECIPES = {
    "search": {
        "epochs": 1,
        "arch_start_epoch": 0,
        "batch_size": 2,
        "log_base": 2.0,
        "sub_loss_factor": 0.1,
    },
    "retrain": {},
}


@contextmanager
def refused(kind, pattern):
    """The block raises exactly this kind of error, with one line that matches the pattern."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


@contextmanager
def full_disk(size=1 << 16):
    """No file can grow beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def class_folders(place, **settings):
    """The settings of a data set of one's own."""
    return DataSettings(dataset="folder", source=str(place), **{"image_size": 16, **settings})


def make_space(**settings):
    usual = {"name": "made up", "input_size": 32, "max_connections": 3, "last_dim": 7, **RECIPES}
    return SearchSpace(**{**usual, **settings})


# data.json of a folder of three classes.
DESCRIPTION = {
    "dataset": "folder",
    "classes": ["a", "b", "c"],
    "image_size": 48,
    "pack": None,
    "resident": True,
    "augment": "weak",
    "digest": "",
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "manifest": "",
}


TINY = Architecture.parse(
    "[[8, 8], 'mbconv_k3_t1', [], 0, 1]|[[8, 8], 'mbconv_k3_t3', ['mbconv_k5_t6'], 1, 2]|[[8, 99], 'conv1_1']"
)
SMALL = make_space(
    input_size=16,
    init_dim=4,
    chs=[4, 6, 8, 10],
    fm_sizes=[8, 8, 4, 4],
    stage=[0, 1, 1, 2, 2],
    num_layers=[0, 1, 2, 0],
    max_connections=2,
    head_ops=["mbconv_k3_t3", "mbconv_k5_t6", "mbconv_k7_t3"],
    stack_ops=["mbconv_k3_t3", "mbconv_k3_t1", "mbconv_k5_t6", SKIP],
)


@st.composite
def spaces(
    draw, families=("mbv2", "basic_block", "bottleneck"), skip_reg=None, one_map_at_the_end=True
):
    """3 to 6 blocks of different widths on maps from 16 down to 1."""
    family = draw(st.sampled_from(families))
    candidates = MBCONVS if family == "mbv2" else [family]
    blocks = draw(st.integers(3, 6))
    maps, stages = [16], [0]
    for _ in range(blocks - 1):
        maps.append(maps[-1] // 2 if maps[-1] > 1 and draw(st.booleans()) else maps[-1])
    for _ in range(blocks):
        stages.append(stages[-1] + draw(st.integers(0, 1)))
    widths = draw(st.lists(st.integers(1, 12), min_size=blocks, max_size=blocks, unique=True))
    layers = [0, *draw(st.lists(st.integers(0, 2), min_size=blocks - 1, max_size=blocks - 1))]
    some = st.lists(st.sampled_from(candidates), min_size=1, max_size=3, unique=True)
    stack = st.lists(st.sampled_from([*candidates, SKIP]), min_size=1, max_size=3, unique=True)
    settings = {
        "init_dim": draw(st.integers(1, 8)) if family == "mbv2" else widths[0],
        "chs": widths,
        "fm_sizes": maps,
        "stage": stages,
        "num_layers": layers,
        "last_dim": draw(st.integers(1, 9)),
        "max_connections": draw(st.integers(1, blocks if family == "mbv2" else blocks - 1)),
        "head_ops": draw(some),
        "stack_ops": draw(stack),
        "skip_reg": draw(st.booleans()) if skip_reg is None else skip_reg,
    }
    temperature = draw(st.sampled_from([0.5, 0.9, 1.0, 2.0]))
    space = make_space(**settings, search={**RECIPES["search"], "softmax_temp": temperature})
    assume(not one_map_at_the_end or all(maps[i] == maps[-1] for i in before(space, blocks)))
    return space


def smallest_input(space):
    return 2 * space.fm_sizes[0] // space.fm_sizes[-1]


def edges_by_rule(space):
    """The rule of the dense connections (section 3.1), written apart from `SearchSpace.edges`."""
    maps = [*space.fm_sizes, space.fm_sizes[-1]]
    last = len(space.chs)
    found = []
    for i in range(last):
        for j in range(i + 1, last + 1):
            if j - i > space.max_connections:
                break
            if space.stage[j] - space.stage[i] > 1 or maps[i] / maps[j] not in (1, 2):
                break
            found.append((i, j))
    return found


def block_paths(space):
    """Every block path from block 0 to the final node."""
    last, onward = len(space.chs), {}
    for i, j in edges_by_rule(space):
        onward.setdefault(i, []).append(j)

    def extend(path):
        if path[-1] == last:
            yield path
        else:
            for j in onward[path[-1]]:
                yield from extend([*path, j])

    return list(extend([0]))


def before(space, node):
    """Blocks that feed a node, nearest first."""
    return sorted((i for i, j in edges_by_rule(space) if j == node), reverse=True)


def softmax(values, temperature=1.0):
    powers = [math.exp((value - max(values)) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def edge_probabilities(net):
    probabilities = {}
    for i, beta in enumerate(net.beta):
        after = sorted(j for k, j in edges_by_rule(net.space) if k == i)
        for j, share in zip(after, softmax(beta.tolist(), net.temperature), strict=True):
            probabilities[i, j] = share
    return probabilities


def path_probability(probabilities, path):
    return math.prod(probabilities[edge] for edge in pairwise(path))


def best_path(net):
    """The most probable path of a supernet, from block 0 to the final node."""
    ((_, path),) = best_paths(net.space, net.path_probabilities())
    return [*path]


def random_supernet(space, seed, num_classes=3, dtype=torch.float64):
    """A supernet whose weights and architecture parameters are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SuperNet(space, num_classes).to(dtype)
        with torch.no_grad():
            for parameter in net.arch_parameters():
                parameter.copy_(1.5 * torch.randn_like(parameter))
    return net


LATENCY = {
    "input_size": 16,
    "num_classes": 3,
    "batch_size": 1,
    "device": "made up",
    "threads": 1,
    "torch": "0",
}


def random_table(space, seed, equal_layers=False, spare_rows=0, conditions=LATENCY):
    """Costs without any pattern in them, so that no two entries can be confused."""
    generator = torch.Generator().manual_seed(seed)

    def row(count):
        return torch.rand(count, generator=generator, dtype=torch.float64).tolist()

    blocks = []
    for block in range(1, space.num_blocks):
        head = [row(len(space.head_ops)) for _ in before(space, block)]
        layers = [row(len(space.stack_ops)) for _ in range(space.num_layers[block] + spare_rows)]
        blocks.append((head, [layers[0] for _ in layers] if equal_layers else layers))
    stem, classifier = row(2)
    final = row(len(before(space, space.num_blocks)))
    nesting = (stem, blocks, final, classifier)
    return CostTable.from_nested(space, "latency", nesting, dict(conditions))


def counted_mult_adds(net, images):
    """What PyTorch itself counts for one image, in single Mult-Adds."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    return counter.get_total_flops() / 2 / len(images)


def candidates(net, choice):
    """Every candidate module of the supernet, and whether it is chosen."""
    for block, heads, layers in zip(net.blocks, choice.head, choice.stack, strict=True):
        for modules, rows in ((block.heads, heads), (block.stack, layers)):
            for layer, row in zip(modules, rows, strict=True):
                for index, module in enumerate(layer):
                    yield module, index in row


# ---------------------------------------------------------------- small trainings


TABLE = CostTable.mult_adds(SMALL, 16, 3)
SEARCH = SearchRecipe(
    epochs=3,
    arch_start_epoch=1,
    batch_size=8,
    log_base=2.0,
    sub_loss_factor=0.1,
    arch_lr=0.05,
    softmax_temp=0.9,
)
RETRAIN = RetrainRecipe(epochs=3, batch_size=8, lr=0.1, warmup_epochs=1)
ARCH = Architecture.parse(
    "[[4, 4], 'mbconv_k3_t1', [], 0, 1]|[[4, 6], 'mbconv_k3_t3', ['mbconv_k5_t6'], 1, 2]|[[6, 7], 'conv1_1']"
)


def split(count, seed):
    """Noise whose brightness is the class."""
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return Split((noise + 90 * labels[:, None, None, None]).byte(), labels)


def image_data(train=24, val=16, test=10, seed=0):
    parts = [split(count, 3 * seed + index) for index, count in enumerate((train, val, test))]
    classes, digest = ["dark", "grey", "light"], f"made up {train} {val} {seed}"
    return ImageData("digits", classes, *parts, [0.45] * 3, [0.3] * 3, digest)


DATA = image_data()


@contextmanager
def before_each_step(hook):
    """Calls this with the optimiser before each of its steps."""
    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stopping_before_step(number):
    """Ctrl-C in the middle of the step of this number, from 1."""
    steps = []

    def stop(*_):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt

    with before_each_step(stop):
        yield


def checkpoint(run, stage):
    return torch.load(run.work / f"{stage}.pt", weights_only=True)


def identical(ours, theirs):
    """The same values bit by bit, times and devices aside."""
    if isinstance(ours, dict):
        compared = ours.keys() - {"seconds"}
        return ours.keys() == theirs.keys() and all(
            identical(ours[key], theirs[key]) for key in compared
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(identical, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs.cpu())
    return ours == theirs


def everything(space):
    """All candidates of every mixed layer, as a choice."""
    head = [
        [[*range(len(space.head_ops))] for _ in before(space, j)]
        for j in range(1, space.num_blocks)
    ]
    stack = [
        [[*range(len(space.stack_ops))] for _ in range(count)] for count in space.num_layers[1:]
    ]
    return Choice(head, stack)


def layer_cost(alpha, costs, active):
    shares = softmax([alpha[index] for index in active])
    return sum(share * costs[index] for share, index in zip(shares, active, strict=True))


def expectation_over_paths(net, table, choice):
    """The expectation over all block paths, each the probability times the cost of its mixed layers."""
    space, probabilities = net.space, edge_probabilities(net)
    last, expected = space.num_blocks, 0.0
    for path in block_paths(space):
        cost = table.stem + table.final[before(space, last).index(path[-2])] + table.classifier
        for i, j in pairwise(path[:-1]):
            head, stack = table.nested()[1][j - 1]
            row = before(space, j).index(i)
            alpha = net.alpha_head[j - 1][row].tolist()
            cost += layer_cost(alpha, head[row], choice.head[j - 1][row])
            for layer, active in enumerate(choice.stack[j - 1]):
                alpha = net.alpha_stack[j - 1][layer].tolist()
                cost += layer_cost(alpha, stack[layer], active)
        expected += path_probability(probabilities, path) * cost
    return expected


def study_results(
    lead=0.0, ways=("DenseNAS",), networks=12, targets=(0.4, 0.6, 0.8), noise=0.004, seed=0
):
    """Rows of a study as if they had been trained: searched networks are so much (a share) above random ones."""
    dice = np.random.default_rng(seed)
    rows = []
    for target in targets:
        columns = [("searched", way, way, 3, lead) for way in ways]
        columns += [("matched", way, f"random, as deep as {way}", networks, 0.0) for way in ways]
        columns += [("random", "", "random", networks, -0.01)]
        columns += [("hand-made", "", name, 3, -0.02) for name in ("wide", "deep")]
        for method, way, design, count, ahead in columns:
            for number in range(count):
                same = method == "hand-made"
                worth = 0.6 + target / 10 + ahead + (0 if same else 0.008 * dice.normal())
                row = {"method": method, "way": way, "target": target, "number": number}
                row |= {"design": design, "seed": number if same else 0, "epochs": 20}
                row |= {"net_config": f"{design} {target} {0 if same else number}", "images": 10000}
                row |= {"mult_adds_m": target * (1 + 0.09 * (dice.random() - 0.5)), "layers": 6}
                row |= {"params_m": 0.1, "blocks": 3, "train_seconds": 300.0}
                row["search_seconds"] = 150.0 if method == "searched" else math.nan
                for epoch in (1, 2, 5, 10, 20):
                    row[f"top1_{epoch}"] = worth - 0.3 / epoch + noise * dice.normal()
                rows.append({**row, "top1": row["top1_20"]})
    return pd.DataFrame(rows)
