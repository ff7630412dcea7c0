"""Networks of others: torchvision's and the user's own, on the same data and recipe."""

import pytest
import torch
from helpers import refused
from test_search import ARCH, DATA, RETRAIN
from torch import nn

from densenas import Architecture
from densenas.train import evaluate, load_network, network, retrain, save_network, size


def small_network(num_classes):
    """What a user may write."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3)
    return nn.Sequential(*layers, nn.Linear(4, num_classes))


OWN = f"{__name__}:small_network"


@pytest.mark.parametrize("model", [OWN, "squeezenet1_1", str(ARCH), "DenseNAS-A"])
def test_a_trained_network_comes_back_from_its_folder(model, tmp_path):
    net = network(model, 3).eval()
    save_network(tmp_path, model, net)
    again = load_network(tmp_path, 3, model).eval()
    assert type(again) is type(net)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), net(images))


def test_a_file_alone_has_no_code_imported(tmp_path):
    save_network(tmp_path, OWN, network(OWN, 3))
    for named in (None, "squeezenet1_1"):
        with refused(ValueError, rf"the network is '{OWN}', code is run only where net_config says the same"):
            load_network(tmp_path, 3, named)


def test_a_derived_network_takes_the_place_of_another(tmp_path):
    for model in (OWN, str(ARCH)):
        save_network(tmp_path, model, network(model, 3))
    assert load_network(tmp_path, 3).arch == ARCH


def test_a_users_network_is_trained_and_repeats_exactly(run, root):
    net, history = retrain(run, DATA, OWN, RETRAIN)
    assert len(history) == 3 and isinstance(net[4], nn.Dropout)
    (run.work / "retrain.pt").unlink()
    again, _ = retrain(run, DATA, OWN, RETRAIN)
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("name", ["DenseNAS-A", "DenseNAS-B", "DenseNAS-C"])
def test_size_is_what_the_architecture_says(name):
    arch = Architecture.named(name)
    assert size(arch.build(10), 32) == pytest.approx(
        {"mult_adds_m": arch.mult_adds(32, 10), "params_m": arch.params(10)}
    )


@pytest.mark.parametrize(
    ("model", "pattern"),
    [("nowhere.at:all", "cannot be imported: No module named"), (f"{__name__}:nothing", "cannot be imported")],
)
def test_a_network_that_is_not_there(model, pattern):
    with refused(ValueError, rf"model '{model}' {pattern}"):
        network(model, 3)


def test_a_name_that_nobody_knows():
    with refused(ValueError, "no network 'resnet17'.*DenseNAS-A.*torchvision.*package.module:function"):
        network("resnet17", 3)


def test_a_gradient_is_clipped(run):
    retrain(run, DATA, ARCH, RETRAIN.model_copy(update={"grad_clip": 1e-12, "weight_decay": 0.0}))
    after = torch.load(run.work / "retrain.pt")["net"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = network(str(ARCH), 3).state_dict()
    weights = [key for key in before if key.endswith("weight")]
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in weights)


def test_classes_that_do_not_match():
    with refused(ValueError, "the network tells 7 classes apart, the data set has 3"):
        evaluate(ARCH.build(7), DATA)
