"""Our numbers against those of the published code (tests/reference/); computed there in float64, training mode."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from densenas import Architecture, Choice, CostTable, SearchSpace, SuperNet, load_published
from densenas.published import from_published

REFERENCE = Path(__file__).parent / "reference"
GOLDEN = {
    name: json.loads((REFERENCE / f"{name}-supernet.json").read_text())
    for name in ("mbv2", "resnet")
}
CASES = [(name, index) for name, golden in GOLDEN.items() for index in range(len(golden["cases"]))]


def noise(count, salt):
    h = np.arange(count, dtype=np.uint64) + np.uint64(salt * 7919)
    for factor, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        h = (h * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        h ^= h >> np.uint64(shift)
    return torch.from_numpy(h / 2**31 - 1)


def images(*shape):
    return 1.7 * noise(math.prod(shape), 2).reshape(shape)


@torch.no_grad()
def fill(net):
    """The goldens' weights: a function of a tensor's shape alone."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            weight.copy_(
                noise(weight.numel(), 1).reshape(weight.shape) * math.sqrt(3 / weight[0].numel())
            )
            if module.bias is not None:
                module.bias.zero_()
    return net


@torch.no_grad()
def golden_supernet(name, case, dtype=torch.float64):
    net = fill(SuperNet(SearchSpace.load(name), num_classes=100).to(dtype)).train()
    for parameters, values in (
        (net.beta, case["betas"]),
        (net.alpha_head, case["alpha_head"]),
        (net.alpha_stack, case["alpha_stack"]),
    ):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(torch.tensor(value, dtype=dtype).reshape(parameter.shape))
    return net


def relative_norm(ours, golden):
    golden = torch.tensor(golden, dtype=torch.float64)
    return float((ours.double() - golden).norm() / golden.norm())


@pytest.mark.parametrize(("name", "edges", "paths"), [("mbv2", 54, 15456), ("resnet", 87, 540225)])
def test_graph(name, edges, paths):
    space, golden = SearchSpace.load(name), GOLDEN[name]
    assert (len(space.edges), space.count_paths()) == (edges, paths)
    for node, expected in enumerate(golden["input_configs"], start=1):
        assert space.incoming(node) == expected["in_block_idx"]
        assert [space.stride(i, node) for i in space.incoming(node)] == expected["strides"]
        assert [space.outgoing(i).index(node) for i in space.incoming(node)] == expected["beta_idx"]
        assert [space.chs[i] for i in space.incoming(node)] == expected["in_chs"]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_mult_adds_entry_is_exact(name):
    assert CostTable.mult_adds(SearchSpace.load(name)).nested() == GOLDEN[name]["flops_millions"]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_supernet(name, index):
    case = GOLDEN[name]["cases"][index]
    net = golden_supernet(name, case)
    assert net.temperature == case["softmax_temp"]
    table = CostTable.mult_adds(net.space)
    sampled = case["sampled"]
    choice = Choice(head=sampled["head_index"], stack=sampled["stack_index"])
    batch = images(4, 3, 64, 64)
    with torch.no_grad():
        assert float(net.cost(table)) == pytest.approx(case["all"]["cost"], rel=1e-5)
        assert float(net.cost(table, choice)) == pytest.approx(sampled["cost"], rel=1e-5)
        assert relative_norm(net(batch, choice), sampled["logits"]) < 1e-6
        assert relative_norm(net(batch), case["all"]["logits"]) < 1e-6
    arch = net.derive()
    assert str(arch) == case["net_config"]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_cost_in_float32(name, index):
    case = GOLDEN[name]["cases"][index]
    net = golden_supernet(name, case, torch.float32)
    with torch.no_grad():
        assert float(net.cost(CostTable.mult_adds(net.space))) == pytest.approx(
            case["all"]["cost"], rel=1e-5
        )


@pytest.mark.parametrize(("name", "index"), CASES)
def test_derived_network(name, index):
    case = GOLDEN[name]["cases"][index]
    derived = case["derived"]
    arch = Architecture.parse(case["net_config"])
    assert str(arch) == case["net_config"]
    assert arch.mult_adds(224) == derived["mult_adds_millions"]
    assert arch.params() == derived["params_millions"]
    net = fill(arch.build().double()).train()
    shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert shapes == {from_published(key): shape for key, shape in derived["state_dict"].items()}
    with torch.no_grad():
        assert relative_norm(net(images(2, 3, 224, 224)), derived["logits_224"]) < 1e-6


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", GOLDEN)
def test_published_folder(name, prefix, tmp_path):
    """A folder with the published keys, as a stranger would bring it, gives the golden logits."""
    case = GOLDEN[name]["cases"][0]
    ours = fill(Architecture.parse(case["net_config"]).build()).state_dict()
    state = {prefix + key: ours[from_published(key)] for key in case["derived"]["state_dict"]}
    torch.save(state, tmp_path / "weights.pt")
    net_type = "res" if name == "resnet" else "mbv2"
    (tmp_path / "net_config").write_text(f"{case['net_config']}\nnet_type: {net_type}\n")
    arch, net = load_published(tmp_path)
    assert str(arch) == case["net_config"]
    fill(net.double().train())  # the file holds float32, the goldens are float64
    with torch.no_grad():
        assert relative_norm(net(images(2, 3, 224, 224)), case["derived"]["logits_224"]) < 1e-6


@pytest.mark.parametrize(
    ("name", "mult_adds"),
    [("DenseNAS-A", 251.334416), ("DenseNAS-B", 313.580096), ("DenseNAS-C", 360.808256)],
)
def test_named_architectures(name, mult_adds):
    arch = Architecture.named(name)
    assert arch.mult_adds(224) == mult_adds
    assert arch.params() == pytest.approx(arch.published["params_m"], rel=1e-9)
    assert CostTable.mult_adds(SearchSpace.load("mbv2"), num_classes=1000).total(
        name
    ) == pytest.approx(mult_adds)


@pytest.mark.skipif(
    "DENSENAS_LATENCY_LISTS" not in os.environ, reason="needs the folder of published latency lists"
)
@pytest.mark.parametrize(
    ("name", "ms"), [("DenseNAS-A", 13.66), ("DenseNAS-B", 15.83), ("DenseNAS-C", 18.03)]
)
def test_published_latency_list(name, ms):
    table = CostTable.read(
        Path(os.environ["DENSENAS_LATENCY_LISTS"]) / "lat_list_densenas_mbv2_xp32"
    )
    assert (table.space.name, table.unit) == ("mbv2", "ms")
    assert round(table.total(name), 2) == ms
