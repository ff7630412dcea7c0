"""An op and a loss of one's own: priced, searched, trained and kept like any other, and imported only when used."""

import sys

import pytest
import torch
from helpers import (
    ARCH,
    DATA,
    REPOSITORY,
    RETRAIN,
    SEARCH,
    SMALL,
    checkpoint,
    counted_mult_adds,
    identical,
    refused,
    stopping_before_step,
)

from densenas import Architecture, CostTable, SearchSpace, SuperNet, figures, load_published, own
from densenas.baselines import hand_made
from densenas.costs import read_costs
from densenas.figures.space import op_name
from densenas.images.prepare import prepare
from densenas.latency import measure
from densenas.method import ops
from densenas.networks import load_network, network, save_network
from densenas.outcome import finished_search, record_search, write_architecture
from densenas.preflight import checked
from densenas.pricing import price
from densenas.recipes import override
from densenas.runs.run import Run
from densenas.search import search, search_run
from densenas.settings import (
    CostSettings,
    DataSettings,
    EvaluateSettings,
    RetrainSettings,
    SearchSettings,
)
from densenas.train import evaluate_run, export_run, retrain, retrain_run
from densenas.training import device

SE = "notebooks.own_ops:se_k3"
OPS = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from densenas.method.ops import MBConv

def mbconv(in_channels, width, stride, norm):
    return MBConv(in_channels, width, stride, 5, 6, norm)

class Attention(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.mix = nn.Linear(channels, width, bias=False)
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.mix(tokens @ tokens.transpose(1, 2) @ tokens)
        return mixed.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])

def attention(in_channels, width, stride, norm):
    return nn.Sequential(nn.AvgPool2d(stride), Attention(in_channels, width))

def strides_not(in_channels, width, stride, norm):
    return nn.Conv2d(in_channels, width, 1)

def fixed_gain(in_channels, width, stride, norm):
    layers = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), norm(width))
    layers.gain = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)
    return layers

def fails(in_channels, width, stride, norm):
    raise RuntimeError(f"no {width} today\\nand more")

def fails_later(in_channels, width, stride, norm):
    return nn.Conv2d(in_channels + 1, width, 1)

def no_module(in_channels, width, stride, norm):
    return cross_entropy

number = 7

def same(logits, labels):
    return cross_entropy(logits, labels)

def smoothed(logits, labels):
    return cross_entropy(logits, labels, label_smoothing=0.1)

def each(logits, labels):
    return cross_entropy(logits, labels, reduction="none")

def infinite(logits, labels):
    return cross_entropy(logits, labels) / 0

def detached(logits, labels):
    return cross_entropy(logits.detach(), labels)

def accuracy(logits, labels):
    return float((logits.argmax(1) == labels).float().mean())

def misspelled(logits, labels):
    return cross_entropy(logit, labels)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """my_ops.py, a file that a user wrote; `fresh()` imports it anew, as another process would."""
    path = tmp_path / "my_ops.py"
    path.write_text(OPS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(own, "SEEN", {})

    def fresh():
        own.SEEN.clear()
        ops._own_mult_adds.cache_clear()
        sys.modules.pop("my_ops", None)

    fresh()
    yield path, fresh
    fresh()


def with_ops(space, *names):
    """The space with these candidates beside its own."""
    lists = {name: [*getattr(space, name), *names] for name in ("head_ops", "stack_ops")}
    return SearchSpace(**{**space.model_dump(), **lists})


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize(
    ("in_channels", "width", "size", "stride"), [(8, 8, 16, 1), (5, 12, 7, 2), (3, 4, 1, 1)]
)
def test_what_pytorch_counts_of_an_mbconv_is_what_is_published(
    mine, in_channels, width, size, stride
):
    shape = in_channels, width, size, stride
    assert ops.mult_adds("my_ops:mbconv", *shape) == ops.mult_adds("mbconv_k5_t6", *shape)


def test_the_mult_adds_of_squeeze_and_excitation():
    """Those of the MBConv, and of two 1×1 convolutions between 24 and 6 channels on one pixel."""
    usual = ops.mult_adds("mbconv_k3_t3", 8, 12, 16, 2)
    assert ops.mult_adds(SE, 8, 12, 16, 2) == usual + 2 * 24 * 6


def test_an_edited_op_is_not_counted_by_the_code_before(mine):
    path, _ = mine
    ops.mult_adds("my_ops:attention", 4, 8, 16, 1)
    path.write_text(OPS + "# another\n")
    with refused(ValueError, r"my_ops\.py was edited since this process imported it"):
        ops.mult_adds("my_ops:attention", 4, 8, 16, 1)


def test_matrix_products_count_too(mine):
    assert ops.mult_adds("my_ops:attention", 4, 6, 8, 2) == 2 * 16 * 16 * 4 + 16 * 4 * 6


def test_a_network_with_an_op_of_ones_own_is_built_counted_and_written(mine):
    text = (
        "[[8, 8], 'mbconv_k3_t1', [], 0, 1]|[[8, 12], 'my_ops:mbconv', ['mbconv_k3_t3', 'my_ops:attention'], 2, 2]"
        "|[[12, 20], 'conv1_1']"
    )
    arch = Architecture.parse(text)
    assert str(arch) == text and arch.own_ops == ["my_ops:mbconv", "my_ops:attention"]
    net = arch.build(10).eval()
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    counted = counted_mult_adds(net, torch.zeros(1, 3, 32, 32))
    assert arch.mult_adds(32, 10) * 1e6 == pytest.approx(counted)
    assert arch.params(10) * 1e6 == sum(p.numel() for p in net.parameters())


def test_the_family_of_a_space_with_ops_of_ones_own(mine):
    resnet = SearchSpace.load("cifar_resnet")
    both = with_ops(resnet, "my_ops:mbconv")
    assert both.net_type == "res" and both.stem == ()
    alone = both.model_copy(update={"head_ops": ("my_ops:mbconv",)})
    assert alone.net_type == "res"
    arch = alone.architecture([0, 1, 2], [("my_ops:mbconv", ())])
    again = Architecture.parse(str(arch))
    assert again == arch and again.net_type == "res"
    arch.build(3)(torch.zeros(2, 3, 32, 32))
    assert set(hand_made(both, 30.0, 32, 10)) == set(hand_made(resnet, 30.0, 32, 10)) != set()
    only = SearchSpace(
        **{**SMALL.model_dump(), "head_ops": ["my_ops:mbconv"], "stack_ops": ["my_ops:mbconv"]}
    )
    assert only.net_type == "mbv2"
    with pytest.raises(
        ValueError, match=r"bottleneck leaves four times its width.* cannot be mixed"
    ):
        with_ops(SearchSpace.load("bottleneck"), "my_ops:mbconv")


def test_the_supernet_holds_it_without_averages_and_the_derived_network_with_them(mine):
    net = SuperNet(with_ops(SMALL, "my_ops:mbconv"), 3)
    op = net.blocks[0].heads[0][-1]
    assert type(op).__module__ == "densenas.method.ops" and op.expand_conv[1].running_mean is None
    assert (
        network(str(ARCH).replace("mbconv_k3_t3", "my_ops:mbconv"), 3)
        .blocks[1]
        .head_layer.expand_conv[1]
        .running_mean
        is not None
    )


def test_figures_call_it_by_its_function():
    assert op_name(SE) == "se_k3"
    arch = Architecture.parse(str(ARCH).replace("mbconv_k5_t6", SE))
    legend = figures.architectures({"mine": arch}).legends[0]
    assert "se_k3" in [text.get_text() for text in legend.get_texts()]
    space = with_ops(SMALL, SE)
    table = CostTable.mult_adds(space, 16, 3)
    axes = figures.candidates(space, table.head, table.stack, "cost", logarithmic=True).axes[0]
    assert axes.get_xticklabels()[-1].get_text() == "se\nk3"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("op", "sentence"),
    [
        (
            "nowhere.at:all",
            r"no source file of 'nowhere\.at:all', expected package\.module:function in the working",
        ),
        ("sys:exit", r"no source file of 'sys:exit'"),
        ("my_ops:nothing", r"op 'my_ops:nothing' cannot be imported: .*no attribute 'nothing'"),
        ("my_ops:number", r"op 'my_ops:number' is a int, expected a function"),
        (
            "my_ops:fails",
            r"op 'my_ops:fails' called with \(4, 6, 1, norm\): no 6 today \(RuntimeError\)",
        ),
        (
            "my_ops:fails_later",
            r"op 'my_ops:fails_later' of \(1, 4, 8, 8\): .*channel.* \(RuntimeError\)",
        ),
        (
            "my_ops:no_module",
            r"op 'my_ops:no_module' returns a function, expected a torch\.nn\.Module",
        ),
        (
            "my_ops:strides_not",
            r"'my_ops:strides_not' makes \(1, 8, 8, 8\) of \(1, 6, 8, 8\), expected \(1, 8, 4, 4\), its width 8 at stride 2",
        ),
    ],
)
def test_an_op_that_is_none_is_refused_in_a_sentence(mine, op, sentence):
    space = with_ops(SMALL, op)
    with refused(ValueError, sentence):
        CostTable.mult_adds(space, 16, 3)


def test_an_op_of_another_shape_is_refused_where_it_is_built(mine):
    with refused(ValueError, r"my_ops:strides_not' makes .*expected .*stride 2"):
        ops.build_op("my_ops:strides_not", 4, 8, 2, ops.batch_norm(affine=True))


@pytest.mark.parametrize("name", ["my ops:f", "my-ops:f", "my_ops:", ":f", "my_ops:f()", "a..b:f"])
def test_a_name_that_is_none_is_an_unknown_op(name):
    with pytest.raises(ValueError, match=r"unknown op .*known are .*package\.module:function"):
        with_ops(SMALL, name)


def test_reading_a_file_imports_nothing(mine, tmp_path):
    path, fresh = mine
    space = with_ops(SMALL, "my_ops:mbconv")
    table = CostTable.mult_adds(space, 16, 3)
    table.write(tmp_path / "cost.json")
    arch = Architecture.parse(str(ARCH).replace("mbconv_k3_t3", "my_ops:mbconv"))
    save_network(tmp_path / "model", str(arch), arch.build(3))
    fresh()
    path.write_text("raise SystemExit('imported')")
    assert SearchSpace(**space.model_dump()) == CostTable.read(tmp_path / "cost.json").space
    assert Architecture.parse(str(arch)).own_ops == ["my_ops:mbconv"]
    assert own.source_of("my_ops:mbconv") == path and own.code("my_ops:mbconv")
    with refused(
        ValueError, r"net_config names the code 'my_ops:mbconv', which is run only where own_ops"
    ):
        load_published(tmp_path / "model")
    with refused(ValueError, r"op 'my_ops:mbconv' cannot be imported: imported \(SystemExit\)"):
        load_published(tmp_path / "model", own_ops=["my_ops:mbconv"])
    path.write_text(OPS)
    fresh()
    load_published(tmp_path / "model", own_ops=["my_ops:mbconv"])
    load_network(tmp_path / "model", 3, str(arch))
    (tmp_path / "mine.txt").write_text(str(arch))
    load_network(tmp_path / "model", 3, str(tmp_path / "mine.txt"))  # as 05 took it


def test_code_is_found_in_a_package_without_importing_that_and_changes_with_all_of_it(
    mine, tmp_path
):
    package = tmp_path / "my_package"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (package / name).write_text("raise SystemExit")
    (package / "inner" / "ops.py").write_text("")
    (package / "helper.py").write_text("")
    name = "my_package.inner.ops:f"
    assert own.source_of(name) == package / "inner" / "ops.py"
    before = own.code(name)
    (package / "helper.py").write_text("# another\n")
    assert own.code(name) != before
    assert own.source_of("my_package.outer:f") is None


def test_the_working_directory_and_the_repository_are_looked_at(tmp_path, monkeypatch):
    (tmp_path / "beside.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    assert own.source_of("beside:f") == tmp_path / "beside.py"
    assert own.source_of(SE) == REPOSITORY / "notebooks" / "own_ops.py"


# ---------------------------------------------------------------- latency


def test_its_latency_is_measured_again_when_its_code_has_changed(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "SECONDS", 0.0)
    path, fresh = mine
    space, log = with_ops(SMALL, "my_ops:mbconv"), tmp_path / "log.jsonl"
    table = measure(space, 16, 3, log, rounds=1)
    measured = [entry for entry in table.conditions["entries"] if entry["op"] == "my_ops:mbconv"]
    assert measured and all(entry["ms"] > 0 for entry in measured)
    lines = log.read_text()
    assert measure(space, 16, 3, log, rounds=1) == table
    assert log.read_text().split() == lines.split()
    path.write_text(OPS + "# slower\n")
    fresh()
    measure(space, 16, 3, log, rounds=1)
    assert len(log.read_text().split("\n{")) > len(lines.split("\n{"))


# ---------------------------------------------------------------- a whole run, as the notebooks make it

SPACE = f"""
input_size: 8
init_dim: 4
chs: [4, 6, 8]
fm_sizes: [4, 4, 2]
stage: [0, 1, 1, 2]
num_layers: [0, 1, 1]
last_dim: 16
max_connections: 2
head_ops: [{SE}]
stack_ops: [mbconv_k3_t3, {SE}, skip_connect]
search: {{epochs: 2, arch_start_epoch: 1, batch_size: 64, log_base: 2.0, sub_loss_factor: 0.1}}
retrain: {{epochs: 2, batch_size: 128, lr: 0.1}}
"""


def run_stages(run, space, stop=False):
    """02 to 06 behind 01; with `stop` both trainings are interrupted and gone on with."""
    prepare(run, DataSettings(image_size=8, num_classes=3))
    price(run, CostSettings(space=str(space), image_size=8))
    searching, training = SearchSettings(device="cpu"), RetrainSettings(device="cpu")
    for step, stage, settings in ((8, search_run, searching), (5, retrain_run, training)):
        if stop:
            with stopping_before_step(step), pytest.raises(KeyboardInterrupt):
                stage(run.name, settings)
        stage(run.name, settings)
        if stage is search_run:
            result = finished_search(run)
            record_search(run, result)
            write_architecture(run, result)
    tested = evaluate_run(run, EvaluateSettings(device="cpu"))
    return tested, export_run(run, tested)


def test_a_run_with_an_op_of_ones_own_from_space_to_export(root):
    space = root / "space.yml"
    space.write_text(SPACE)
    runs = [Run("whole"), Run("stopped")]
    tested, exported = run_stages(runs[0], space)
    again, _ = run_stages(runs[1], space, stop=True)
    assert SE in tested.net.arch.own_ops
    assert tested.result["network"] == "the derived network" and set(exported["runtime"]) == {
        "PyTorch",
        "torch.export",
        "ONNX Runtime",
    }
    assert again.result == {**tested.result, "folder": again.result["folder"]}
    for stage in ("search", "retrain"):
        first, second = (checkpoint(run, stage) for run in runs)
        assert identical(first, second) and SE in first["configuration"]


# ---------------------------------------------------------------- changed code


def test_changed_code_of_an_op_counts_as_another_op(mine, run, monkeypatch, capsys):
    path, fresh = mine
    for module in ("search", "outcome"):
        monkeypatch.setattr(f"densenas.{module}.load", lambda _: DATA)
    space = with_ops(SMALL, "my_ops:mbconv").model_copy(update={"search": SEARCH})
    CostTable.mult_adds(space, 16, 3).write(run.reports / "cost.json")
    search_run(run.name, SearchSettings(device="cpu"))
    finished_search(run)
    path.write_text(OPS + "# another\n")
    with refused(ValueError, r"my_ops\.py was edited since this process imported it: restart"):
        SuperNet(space, 3)
    fresh()
    with refused(ValueError, r"cost\.json prices other code of my_ops:mbconv: run 02-cost"):
        read_costs(run)
    CostTable.mult_adds(space, 16, 3).write(run.reports / "cost.json")
    with refused(
        ValueError, r"has other code of my_ops:mbconv now than it was searched with: run 03"
    ):
        finished_search(run)
    capsys.readouterr()
    search_run(run.name, SearchSettings(device="cpu"))
    assert (
        "search.pt is of another configuration (code differ): starting anew"
        in capsys.readouterr().out
    )
    finished_search(run)


def test_changed_code_of_op_or_loss_trains_a_network_anew(mine, run, capsys):
    path, fresh = mine
    arch = str(ARCH).replace("mbconv_k3_t3", "my_ops:mbconv")
    recipe = override(RETRAIN, loss="my_ops:same", epochs=2)
    for model in (arch, str(ARCH)):
        retrain(run, DATA, model, recipe)
        path.write_text(path.read_text() + "# another\n")
        fresh()
        capsys.readouterr()
        retrain(run, DATA, model, recipe)
        assert "(code differ): starting anew" in capsys.readouterr().out
        retrain(run, DATA, model, recipe)
        assert "starting anew" not in capsys.readouterr().out


def test_a_runs_file_is_checked_before_and_its_code_known_by_content(mine, tmp_path):
    _, fresh = mine
    (tmp_path / "my_losses.py").write_text("from my_ops import same\n")
    lines = SPACE.replace(SE, "my_ops:mbconv").replace("input_size: 8", "input_size: 8\nname: mine")
    (tmp_path / "space.yml").write_text(lines)
    config = tmp_path / "run.yml"
    text = f"space: {tmp_path}/space.yml\ndata: {{dataset: digits}}\n"
    config.write_text(f"{text}search: {{recipe: {{loss: my_losses:same}}}}\n")
    _, before = checked(config)
    for name, stages in {"my_losses.py": {"03-search"}, "my_ops.py": {"02-cost"}}.items():
        file = tmp_path / name
        file.write_text(file.read_text() + "# another\n")
        fresh()
        sys.modules.pop("my_losses", None)
        own.SEEN.clear()
        _, after = checked(config)
        assert {stage for stage in after if after[stage] != before[stage]} == stages
        before = after
    config.write_text(f"{text}retrain: {{recipe: {{loss: my_ops:each}}}}\n")
    with refused(ValueError, r"run\.yml: retrain: loss 'my_ops:each' .*shape \(2,\)"):
        checked(config)
    (tmp_path / "space.yml").write_text(lines.replace("my_ops:mbconv", "my_ops:strides_not"))
    with refused(ValueError, r"run\.yml: op 'my_ops:strides_not' makes"):
        checked(config)


# ---------------------------------------------------------------- losses


def test_the_usual_loss_under_a_name_of_ones_own_gives_the_same_bytes(mine, root):
    plain, named = Run("plain"), Run("named")
    table = CostTable.mult_adds(SMALL, 16, 3)
    search(plain, DATA, table, SEARCH)
    search(named, DATA, table, override(SEARCH, loss="my_ops:same"))
    retrain(plain, DATA, ARCH, RETRAIN)
    retrain(named, DATA, ARCH, override(RETRAIN, loss="my_ops:smoothed", label_smoothing=0.5))
    for stage in ("search", "retrain"):
        usual, own_one = checkpoint(plain, stage), checkpoint(named, stage)
        assert '"loss"' not in usual.pop("configuration") and "my_ops" in own_one.pop(
            "configuration"
        )
        assert identical(usual, own_one)


def test_a_loss_of_ones_own_is_what_both_trainings_follow(run):
    focal = "notebooks.own_loss:focal"
    table = CostTable.mult_adds(SMALL, 16, 3)
    found = search(run, DATA, table, override(SEARCH, loss=focal)).history
    usual = search(run, DATA, table, SEARCH).history
    _, trained = retrain(run, DATA, ARCH, override(RETRAIN, loss=focal))
    _, as_usual = retrain(run, DATA, ARCH, RETRAIN)
    assert found[0]["train_loss"] < 0.8 * usual[0]["train_loss"]  # what is sure counts less
    assert found[-1]["val_loss"] != usual[-1]["val_loss"]
    assert trained[0]["train_loss"] < 0.8 * as_usual[0]["train_loss"]


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ("nowhere:focal", r"^loss 'nowhere:focal' cannot be imported: No module named 'nowhere'"),
        ("my_ops:nothing", r"^loss 'my_ops:nothing' cannot be imported"),
        (
            "my_ops:each",
            r"^loss 'my_ops:each' of logits \(2, 3\) and labels \(2,\) is of shape \(2,\), expected a tensor without",
        ),
        ("my_ops:accuracy", r"^loss 'my_ops:accuracy' .*is of float, expected a tensor"),
        ("my_ops:infinite", r"^loss 'my_ops:infinite' .*is inf, expected a finite number"),
        ("my_ops:detached", r"^loss 'my_ops:detached' .*has no gradient"),
        (
            "my_ops:misspelled",
            r"^loss 'my_ops:misspelled' .*: name 'logit' is not defined \(NameError\)",
        ),
    ],
)
def test_a_loss_that_is_none_is_refused_in_a_sentence(mine, loss, sentence, run):
    with refused(ValueError, sentence):
        search(run, DATA, CostTable.mult_adds(SMALL, 16, 3), override(SEARCH, loss=loss))
    with refused(ValueError, sentence):
        retrain(run, DATA, ARCH, override(RETRAIN, loss=loss))
    assert not list(run.work.glob("*.pt"))


@pytest.mark.parametrize("recipe", [SEARCH, RETRAIN])
def test_a_recipe_without_a_loss_of_ones_own_says_nothing_of_it(recipe):
    assert "loss" not in recipe.model_dump() and '"loss"' not in recipe.model_dump_json()
    named = override(recipe, loss="my_ops:same")
    assert override(named, lr=0.1).loss == "my_ops:same" and override(named, loss=None).loss is None
    with refused(ValueError, r"recipe: loss: expected package\.module:function.*'focal'"):
        override(recipe, loss="focal")


def test_what_an_op_holds_fixed_is_not_searched(mine, run):
    table = CostTable.mult_adds(with_ops(SMALL, "my_ops:fixed_gain"), 16, 3)
    net = search(run, DATA, table, SEARCH).net
    gains = [value for name, value in net.named_parameters() if name.endswith("gain")]
    assert gains and all(float(gain) == 2 for gain in gains)


def test_focal_loss():
    function = own.function("notebooks.own_loss:focal")
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
    p = logits.softmax(1)[[0, 1], labels]
    assert float(function(logits, labels)) == pytest.approx(float(((1 - p) ** 2 * -p.log()).mean()))
