"""Networks of others: torchvision's and the user's own, on the same data and recipe."""

import json
import sys
import warnings

import pytest
import torch
import yaml
from helpers import ARCH, DATA, RETRAIN, full_disk, refused
from torch import nn

from densenas import Architecture, CostTable, SearchSpace, own
from densenas.correlations import wilson
from densenas.identity import describe, search_digest
from densenas.networks import (
    EXPORTS,
    as_model,
    check_network,
    load_network,
    model_folder,
    network,
    save_network,
)
from densenas.recipes import override
from densenas.settings import EvaluateSettings, RetrainSettings
from densenas.train import Trainer, evaluate, evaluate_run, export_run, retrain, retrain_run, size


def small_network(num_classes):
    """What a user may write."""
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
    )
    return nn.Sequential(*layers, nn.Linear(4, num_classes))


OWN = f"{__name__}:small_network"


@pytest.mark.parametrize("model", [OWN, "squeezenet1_1", "mnasnet0_5", str(ARCH), "DenseNAS-A"])
def test_a_trained_network_comes_back_from_its_folder(model, tmp_path):
    net = network(model, 3).eval()
    save_network(tmp_path, model, net)
    again = load_network(tmp_path, 3, model).eval()
    assert type(again) is type(net)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), net(images))


def test_exports_of_an_earlier_network_do_not_stay_beside_another(tmp_path):
    save_network(tmp_path, str(ARCH), network(str(ARCH), 3))
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).touch()
    save_network(tmp_path, OWN, network(OWN, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "weights.pt"]


def test_a_networks_file_is_found_from_the_root_and_missed_by_its_path(root, monkeypatch):
    """A notebook runs in notebooks/, its user reads paths from the root."""
    save_network(root / "reports/made-up/budgets/1", str(ARCH), network(str(ARCH), 3))
    (root / "notebooks").mkdir()
    monkeypatch.chdir(root / "notebooks")
    assert as_model("reports/made-up/budgets/1/net_config") == str(ARCH)
    assert as_model(str(ARCH)) == str(ARCH) and as_model("DenseNAS-A") == "DenseNAS-A"
    with refused(
        ValueError, r"no network 'reports/other', .*; there is no file of that path below"
    ):
        network(as_model("reports/other"), 3)


@pytest.mark.parametrize(("epochs", "top"), [(1, 5), (4, 20), (30, 50)])
def test_a_recipe_cut_short_still_lets_the_rate_fall(epochs, top):
    """Of 10 steps an epoch and five epochs of warm-up."""
    recipe = override(RETRAIN, epochs=epochs, warmup_epochs=5, lr=0.1, lr_min=1e-3)
    trainer = Trainer(network(str(ARCH), 3), recipe, 10, "fp32")
    rates = []
    for _ in range(10 * epochs):
        rates.append(trainer.sgd.param_groups[0]["lr"])
        trainer.sgd.step()
        trainer.schedule.step()
    assert rates[top - 1] == pytest.approx(0.1) == max(rates)
    assert rates[-1] < 0.02


def test_a_full_disk_is_said_in_a_sentence_and_leaves_what_was_there(tmp_path):
    save_network(tmp_path, str(ARCH), network(str(ARCH), 3))
    before = (tmp_path / "weights.pt").read_bytes()
    sentence = r"cannot be written \(File too large\); .*: '.*weights\.pt'"
    with full_disk(2000), refused(OSError, sentence):
        save_network(tmp_path, str(ARCH), network(str(ARCH), 3))
    assert (tmp_path / "weights.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net_config", "weights.pt"]


def broken(state, key, value):
    return state | {key: value}


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (None, r"holds no weights\.pt, the weights of its network"),
        (b"", r"weights\.pt is damaged"),
        (b"weights", r"weights\.pt is damaged"),
        (lambda state: [], r"weights\.pt: expected a state dict, found a list"),
        (
            lambda state: broken(state, 7, torch.zeros(1)),
            r"weights\.pt: expected a state dict, but 7",
        ),
        (
            lambda state: broken(state, "5.bias", torch.full((3,), torch.nan)),
            r"'5\.bias' holds numbers that",
        ),
        (
            lambda state: broken(state, "6.bias", torch.zeros(3)),
            r"does not fit .*there is no place for '6\.bias'",
        ),
        (
            lambda state: network(OWN, 4).state_dict(),
            r"does not fit '.*small_network' with 3 classes: '5\.weight'",
        ),
    ],
)
def test_damaged_weights_of_another_network(change, pattern, tmp_path):
    save_network(tmp_path, OWN, network(OWN, 3))
    path = tmp_path / "weights.pt"
    if callable(change):
        torch.save(change(dict(torch.load(path))), path)
    elif change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    with refused(FileNotFoundError if change is None else ValueError, pattern):
        load_network(tmp_path, 3, OWN)


def test_a_network_for_other_classes_is_refused_before_it_sees_an_image(tmp_path):
    save_network(tmp_path, str(ARCH), network(str(ARCH), 7))
    with refused(ValueError, r"weights\.pt: the network tells 7 classes apart, the data set has 3"):
        load_network(tmp_path, 3)


def test_a_file_alone_has_no_code_imported(tmp_path):
    save_network(tmp_path, OWN, network(OWN, 3))
    for named in (None, "squeezenet1_1"):
        with refused(
            ValueError, rf"the network is '{OWN}', code is run only where net_config says the same"
        ):
            load_network(tmp_path, 3, named)


def test_a_derived_network_takes_the_place_of_another(tmp_path):
    for model in (OWN, str(ARCH)):
        save_network(tmp_path, model, network(model, 3))
    assert load_network(tmp_path, 3).arch == ARCH


def test_a_folder_to_evaluate(run, tmp_path):
    with refused(FileNotFoundError, r"run 'made-up' has no model yet: run 05-retrain first"):
        model_folder(run)
    with refused(
        FileNotFoundError,
        r"model 'nowhere' is no folder, expected one with net_config and weights\.pt",
    ):
        model_folder(run, "nowhere")
    assert model_folder(run, str(tmp_path)) == tmp_path


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


def raising(num_classes):
    raise RuntimeError("no luck\ntoday")


def without_parameters(num_classes):
    return nn.Flatten()


def no_network(num_classes):
    return [num_classes]


def other_arguments(width, depth):
    return nn.Linear(width, depth)


def other_classes(num_classes):
    return small_network(num_classes + 1)


def frozen(num_classes):
    return small_network(num_classes).requires_grad_(False)


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def headless(num_classes):
    return small_network(num_classes)[:3]


def for_64_pixels(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, num_classes))


class Several(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = small_network(num_classes)

    def forward(self, images):
        return (self.net(images), images) if self.training else self.net(images)


class NoForward(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = small_network(num_classes)


NOT_A_FUNCTION = 7
CANNOT = r"cannot be trained on images of 64×64 pixels and 10 classes: "


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (
            "nowhere.at:all",
            r"model 'nowhere\.at:all' cannot be imported: No module named 'nowhere'",
        ),
        (f"{__name__}:nothing", r"cannot be imported: .*no attribute 'nothing'"),
        ("a:b:c", r"no network .a:b:c., expected .*package.module:function"),
        (":", r"no network .:., expected"),
        (f"{__name__}:NOT_A_FUNCTION", r"is a int, expected a function"),
        (f"{__name__}:raising", r"raising' called with num_classes=10: no luck \(RuntimeError\)"),
        (f"{__name__}:no_network", r"returns a list, expected a torch\.nn\.Module"),
        (
            f"{__name__}:other_arguments",
            r"called with num_classes=10: .*unexpected keyword argument 'num_classes'",
        ),
        (f"{__name__}:without_parameters", CANNOT + "it has no parameters to train"),
        (f"{__name__}:frozen", CANNOT + "it has no parameters to train"),
        (f"{__name__}:lazy", CANNOT + "it has lazy layers"),
        (
            f"{__name__}:other_classes",
            CANNOT + r"it returns .*\(2, 11\) in training.*expected \(2, 10\)",
        ),
        (f"{__name__}:headless", CANNOT + r"it returns a tensor of shape \(2, 4, 1, 1\)"),
        (f"{__name__}:Several", CANNOT + r"it returns several outputs in training \(tuple\)"),
        (f"{__name__}:NoForward", CANNOT + r"it has no forward method"),
        (
            "googlenet",
            rf"model 'googlenet' {CANNOT}it returns several outputs in training \(GoogLeNetOutputs\)",
        ),
        ("inception_v3", rf"model 'inception_v3' {CANNOT}.*too small"),
        (
            "vit_b_32",
            rf"model 'vit_b_32' {CANNOT}.*Expected 224 but got 64.*; it can with 224 pixels",
        ),
        (
            "fasterrcnn_resnet50_fpn",
            r"one of torchvision's, but not for classification of single images",
        ),
        ("fcn_resnet50", r"not for classification"),
        ("r3d_18", r"not for classification"),
        ("quantized_resnet18", r"not for classification"),
        ("raft_small", r"not for classification"),
        ("resnet17", r"no network 'resnet17'.*DenseNAS-A.*torchvision.*package\.module:function"),
        ("two\nlines", r"no network 'two lines'"),
        ("[[8, 8], 'conv']", r"net_config: block 0 expected"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_network_that_cannot_be_trained_is_refused_beforehand(model, pattern):
    with refused(ValueError, pattern):
        check_network(model, 10, 64)


def test_a_network_for_other_images_is_told_by_the_size():
    check_network(f"{__name__}:for_64_pixels", 10, 64)
    with refused(
        ValueError,
        r"for_64_pixels' cannot be trained on images of 32×32 pixels.*mat1 and mat2 shapes",
    ):
        check_network(f"{__name__}:for_64_pixels", 10, 32)


@pytest.mark.parametrize(
    "model", [OWN, "shufflenet_v2_x0_5", "regnet_x_400mf", "DenseNAS-C", str(ARCH)]
)
def test_a_check_changes_nothing_and_says_nothing(model):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_network(model, 3, 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_made_where_the_network_cannot_be_trained(run):
    with refused(
        ValueError, r"model 'vit_b_32' cannot be trained on images of 16×16 pixels and 3 classes"
    ):
        retrain(run, DATA, "vit_b_32", RETRAIN)
    assert not (run.work / "retrain.pt").exists()


def test_a_batch_larger_than_the_set(run):
    recipe = RETRAIN.model_copy(update={"batch_size": 1024})
    with refused(
        ValueError,
        r"batch_size is 1,024, but train with val has 40 images: set batch_size to at most that",
    ):
        retrain(run, DATA, ARCH, recipe)


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A module that a user wrote, imported anew by each `fresh()` as by another process."""
    path = tmp_path / "my_networks.py"
    path.write_text(f"from {__name__} import small_network\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("densenas.own.SEEN", {})

    def fresh():
        own.SEEN.clear()
        sys.modules.pop("my_networks", None)

    yield path, fresh
    fresh()


def test_the_file_of_a_users_network(own_file):
    path, _ = own_file
    assert own.source_of("my_networks:small_network") == path
    for other in (
        "squeezenet1_1",
        "DenseNAS-A",
        str(ARCH),
        "nowhere.at:all",
        "sys:path",
        ":",
        "my_networks.x:f",
    ):
        assert own.source_of(other) is None


def test_changed_code_does_not_go_on_from_the_old_checkpoint(own_file, run, capsys):
    path, fresh = own_file
    retrain(run, DATA, "my_networks:small_network", RETRAIN)
    fresh()
    retrain(run, DATA, "my_networks:small_network", RETRAIN)
    assert "starting anew" not in capsys.readouterr().out
    path.write_text(path.read_text() + "# wider now\n")
    with refused(ValueError, r"my_networks\.py was edited since this process imported it: restart"):
        retrain(run, DATA, "my_networks:small_network", RETRAIN)
    fresh()
    retrain(run, DATA, "my_networks:small_network", RETRAIN)
    assert "retrain.pt is of another configuration (code differ)" in capsys.readouterr().out


def test_a_derived_networks_checkpoint_stays_what_it_was(run):
    retrain(run, DATA, ARCH, RETRAIN)
    configuration = json.loads(torch.load(run.work / "retrain.pt")["configuration"])
    assert {*configuration} == {"model", "recipe", "data", "seed", "precision", "device"}


def half_frozen(num_classes):
    net = small_network(num_classes)
    net[0].requires_grad_(False)
    return net


def test_layers_that_the_user_froze_stay_as_they_were(run):
    torch.manual_seed(0)
    net = retrain(run, DATA, f"{__name__}:half_frozen", RETRAIN)[0].cpu()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = half_frozen(3)
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[5].weight, before[5].weight)


def test_a_gradient_is_clipped(run):
    retrain(run, DATA, ARCH, RETRAIN.model_copy(update={"grad_clip": 1e-12, "weight_decay": 0.0}))
    after = torch.load(run.work / "retrain.pt", map_location="cpu")["net"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = network(str(ARCH), 3).state_dict()
    weights = [key for key in before if key.endswith("weight")]
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in weights)


@pytest.fixture
def derived_run(run, monkeypatch):
    """A run that was searched, up to 04-derive."""
    space = SearchSpace.load("digits")
    run.reports.mkdir(parents=True)
    CostTable.mult_adds(space, 32, 3).write(run.reports / "cost.json")
    run.work.mkdir(parents=True)
    found = {
        "net_config": str(ARCH),
        "mult_adds_m": 1.0,
        "params_m": 0.1,
        "cost": 1.0,
        "target_cost": None,
    }
    found |= {
        "cost_unit": "million Mult-Adds",
        "blocks": 1,
        "layers": 2,
        "input_size": 16,
        "num_classes": 3,
    }
    torch.save({"configuration": '{"seed": 0}'}, run.work / "search.pt")
    found |= {"space": "digits", "seed": 0, "search": search_digest(run)}
    (run.reports / "architecture.json").write_text(json.dumps(found))
    monkeypatch.setattr("densenas.train.load", lambda run: DATA)
    return run


SHORT = {"epochs": 1, "batch_size": 8, "seed": 3}


@pytest.mark.parametrize("model", [None, OWN, "DenseNAS-A"])
def test_what_was_trained_is_recorded_with_how_it_went(model, derived_run):
    retrain_run("made-up", RetrainSettings(net_config=model, **SHORT))
    recorded = derived_run.read_json("metrics.json")["retrain"]
    net = load_network(derived_run.work / "model", 3, model)
    history = derived_run.history("retrain")
    assert recorded["network"] == (model or "the derived network")
    assert (
        recorded["train_top1"] == pytest.approx(history["train_top1"].iloc[-1])
        and recorded["epochs"] == 1
    )
    assert recorded.items() >= describe(derived_run, net, derived_run.work / "model").items()
    assert recorded.items() >= size(net, 16).items()


def test_a_trained_network_is_tested_and_leaves_for_other_programs(derived_run, monkeypatch):
    run = derived_run
    retrain_run("made-up", RetrainSettings(**SHORT))
    tested = evaluate_run(run, EvaluateSettings(device="cpu"))
    known = run.read_json("metrics.json")["evaluate"]
    assert known == {**tested.result, "ms": {}}, "kept, whatever becomes of the export"
    assert known["images"] == len(DATA.test) and known["network"] == "the derived network"
    again = evaluate(tested.net, DATA)
    assert again.pop("confusion") == tested.confusion.to_numpy().tolist()
    assert known.items() >= again.items()
    assert run.read_json("provenance.json")["06-evaluate"]["parameters"]["device"] == "cpu"
    assert tested.confusion.shape == (3, 3) and tested.confusion.to_numpy().sum() == known["images"]
    assert "confusion" not in known, "of many classes metrics.json could not be read"
    assert (run.reports / "confusion.csv").read_text() == tested.confusion.to_csv()
    exported = export_run(run, tested)
    assert {path.name for path in tested.folder.iterdir()} == {"net_config", "weights.pt", *EXPORTS}
    times = run.read_json("metrics.json")["evaluate"]["ms"]
    assert [*times] == sorted(exported["runtime"]) and min(times.values()) > 0

    card = (tested.folder / "MODEL_CARD.md").read_text()
    _, front, text = card.split("---\n", 2)
    (model,) = yaml.safe_load(front)["model-index"]
    assert model["results"][0]["metrics"] == [{"type": "accuracy", "value": known["top1"]}]
    low, high = wilson(known["top1"], known["images"])
    for said in (
        f"{100 * known['top1']:.2f} % of {known['images']} test images",
        f"interval {100 * low:.1f} % to {100 * high:.1f} %",
        f"{known['mult_adds_m']:.3f} M Mult-Adds",
        "Trained with | revision",
        f"in the order of the logits: {', '.join(DATA.classes)}.",
    ):
        assert said in text
    # The card's own code loads the network.
    monkeypatch.chdir(tested.folder)
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(names["net"].eval()(images), tested.net.cpu().eval()(images))
    save_network(tested.folder, known["net_config"], tested.net)
    assert {path.name for path in tested.folder.iterdir()} == {"net_config", "weights.pt"}


def test_the_card_of_a_network_that_the_run_did_not_train_says_so(derived_run, tmp_path):
    run = derived_run
    retrain_run("made-up", RetrainSettings(**SHORT))
    save_network(tmp_path, OWN, network(OWN, 3))
    tested = evaluate_run(run, EvaluateSettings(model=str(tmp_path), net_config=OWN, device="cpu"))
    export_run(run, tested)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| Training | not by this run |" in card and "Trained with" not in card
    assert "Tested was not the network that this run derived" in card and "```" not in card


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        ({"net_config": "garbage"}, "no network 'garbage'"),
        ({"net_config": "vit_b_32"}, "cannot be trained on images of 16×16"),
        ({"recipe": {"momentum": 2.0}}, "momentum: Input should be less than 1"),
        ({"batch_size": 4096}, "batch_size is 4,096, but train with val has 40 images"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_a_refused_retraining_leaves_what_is_known_of_an_earlier_one(wrong, pattern, derived_run):
    retrain_run("made-up", RetrainSettings(**SHORT))
    kept = ("provenance.json", "metrics.json", "history.csv")
    before = [(derived_run.reports / name).read_bytes() for name in kept]
    with refused(ValueError, pattern):
        retrain_run("made-up", RetrainSettings(**{**SHORT, "seed": 4, **wrong}))
    assert [(derived_run.reports / name).read_bytes() for name in kept] == before
    assert json.loads(before[0])["05-retrain"]["parameters"]["seed"] == 3


def test_a_network_of_an_earlier_search_is_not_taken_for_the_present_ones(derived_run):
    torch.save({"configuration": '{"seed": 1}'}, derived_run.work / "search.pt")
    with refused(ValueError, r"run 'made-up' was searched again since .*: run 04-derive again"):
        retrain_run("made-up", RetrainSettings(**SHORT))
    (derived_run.work / "search.pt").unlink()  # nothing to compare with, as in a fresh clone
    retrain_run("made-up", RetrainSettings(**SHORT))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{}", "has no entry 'net_config': run 04-derive again"),
        ("", "architecture.json is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_a_damaged_architecture_is_named(text, pattern, derived_run):
    (derived_run.reports / "architecture.json").write_text(text)
    with refused(ValueError, pattern):
        retrain_run("made-up", RetrainSettings(**SHORT))


def test_classes_that_do_not_match():
    with refused(ValueError, "the network tells 7 classes apart, the data set has 3"):
        evaluate(ARCH.build(7), DATA)


def test_a_network_whose_outputs_are_not_finite_has_no_accuracy():
    net = ARCH.build(3)
    net.input_block[1].running_var.fill_(-1.0)
    with refused(
        ValueError, r"what the network makes of test is not finite: its weights are spoilt"
    ):
        evaluate(net, DATA, device="cpu")
