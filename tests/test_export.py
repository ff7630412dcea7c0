"""What leaves for other programs is the same network, for any number of images."""

import onnxruntime
import pytest
import torch
from helpers import ARCH, REPOSITORY, TINY, full_disk, refused
from safetensors import safe_open
from safetensors.torch import load_file

from densenas import Architecture
from densenas.export import export
from densenas.networks import EXPORTS, save_network

RES = Architecture.parse(
    "[[8, 12], 'basic_block', ['basic_block'], 1, 2]|[[12, 16], 'basic_block', [], 0, 1]"
)


@pytest.mark.parametrize("arch", [TINY, ARCH, RES], ids=["mbv2", "with an odd width", "res"])
def test_exported_networks_compute_what_pytorch_computes(arch, tmp_path):
    net = arch.build(3).eval()
    for module in net.modules():  # statistics and scales as training leaves them
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    frame = export(net, tmp_path, 32)
    assert (
        frame["runtime"].tolist() == ["PyTorch", "torch.export", "ONNX Runtime"]
        and (frame["ms"] > 0).all()
    )
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        logits = net(images)
        exported = torch.export.load(tmp_path / "model.pt2").module()(images)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (computed,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(exported, logits)
    torch.testing.assert_close(torch.from_numpy(computed), logits, rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {*EXPORTS} - {"MODEL_CARD.md"}
    again = arch.build(3).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images), logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert Architecture.parse(file.metadata()["net_config"]) == arch


def test_weights_that_two_layers_share_leave_as_copies(tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 192), torch.nn.Linear(192, 192)
    )
    net[2].weight = net[1].weight
    export(net, tmp_path, 8)
    state = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "channels"),
    [("DenseNAS-A", [16, 24, 48, 128, 384]), ("DenseNAS-C (arXiv v1)", [16, 24, 48, 112, 480])],
)
def test_a_detector_gets_the_last_map_of_each_side(name, channels):
    net = Architecture.named(name).build(3).eval()
    maps = net.features(torch.randn(1, 3, 96, 96))
    assert [tuple(one.shape[1:]) for one in maps] == [
        (channels[0], 48, 48),
        (channels[1], 24, 24),
        (channels[2], 12, 12),
        (channels[3], 6, 6),
        (channels[4], 3, 3),
    ]


def test_the_readmes_lines_on_using_a_network_run(tmp_path, monkeypatch):
    section = (REPOSITORY / "README.md").read_text().split("## Use your network\n")[1]
    lines = section.split("```python\n")[1].split("```")[0]
    folder = tmp_path / "runs" / "digits" / "model"
    net = TINY.build(10)
    save_network(folder, str(TINY), net)
    export(net, folder, 32)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    assert [one.shape[-1] for one in names["maps"]] == [16, 8]
    expected = net.eval()(names["images"]).detach()
    torch.testing.assert_close(torch.tensor(names["logits"]), expected, rtol=1e-4, atol=1e-4)
    assert names["net"].classifier.weight.grad.shape == (5, 99)
    assert (tmp_path / "runs" / "fine-tuned" / "model.onnx").exists()


def test_features_are_those_that_the_network_classifies():
    for arch in (TINY, RES):
        net, images = arch.build(3).eval(), torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(
            torch.nn.Sequential(*[*net][2:])(net.features(images)[-1]), net(images)
        )


def test_a_network_that_changes_on_its_way_out_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="exported for PyTorch deviates"):
        export(TINY.build(3), tmp_path, 32, tolerance=-1.0)


class Undecided(torch.nn.Linear):
    """What it computes depends on the numbers in the image."""

    def forward(self, images):
        flat = images.flatten(1)
        return super().forward(flat if flat.sum() > 0 else -flat)


def test_a_network_that_cannot_leave_is_named_in_a_sentence(tmp_path):
    with refused(ValueError, r"the network cannot be exported by torch\.export: "):
        export(Undecided(3 * 8 * 8, 3), tmp_path, 8)
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    sentence = r"cannot be written \(File too large\); .*: '.*model\.pt2'"
    with full_disk(2000), refused(OSError, sentence):
        export(TINY.build(3), tmp_path, 32)
    assert not [*tmp_path.iterdir()]
