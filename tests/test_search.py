"""Search, retraining and evaluation: what a step may move, seeds, interruptions, and what is refused."""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ARCH,
    DATA,
    RETRAIN,
    SEARCH,
    SMALL,
    TABLE,
    before_each_step,
    candidates,
    checkpoint,
    identical,
    image_data,
    random_table,
    refused,
    stopping_before_step,
)
from torch import nn

from densenas import CostTable, SuperNet
from densenas.costs import read_costs
from densenas.images.data import ImageData, Split
from densenas.images.loading import Batches
from densenas.method.derivation import Lattice
from densenas.outcome import (
    collapsed,
    finished_search,
    load_search,
    record_search,
    write_architecture,
)
from densenas.runs.run import Run
from densenas.search import search, search_run
from densenas.settings import Computing, SearchSettings
from densenas.train import evaluate, retrain


class Log:
    """The parameters before every optimiser's step of a search, the step's kind and choice; and after the last."""

    def __init__(self, monkeypatch):
        self.net, self.choices, self.kinds, self.states = None, [], [], []
        sample = SuperNet.sample

        def recording(net, *args, **kwargs):
            self.net = net
            self.choices.append(sample(net, *args, **kwargs))
            return self.choices[-1]

        monkeypatch.setattr(SuperNet, "sample", recording)

    def before_step(self, optimizer, *_):
        self.kinds.append(type(optimizer).__name__)
        self.states.append(self.state())

    def state(self):
        return {parameter: parameter.detach().clone() for parameter in self.net.parameters()}

    def steps(self):
        return list(zip(self.kinds, self.choices, self.states, self.states[1:], strict=False))


@pytest.fixture
def log(run, monkeypatch):
    log = Log(monkeypatch)
    with before_each_step(log.before_step):
        search(run, DATA, TABLE, SEARCH)
    log.states.append(log.state())
    return log


def moved(before, after, parameters):
    return [
        parameter
        for parameter in parameters
        if not torch.equal(before[parameter], after[parameter])
    ]


def test_passes_alternate_once_the_architecture_is_learnt(log):
    weights, architecture = ["SGD"] * 3, ["Adam"] * 2
    assert log.kinds == weights + 2 * (architecture + weights)


def test_architecture_stays_uniform_before_its_start(log):
    first = log.kinds.index("Adam")
    for state in log.states[: first + 1]:
        assert all(not state[parameter].any() for parameter in log.net.arch_parameters())


def test_a_weight_step_moves_the_sampled_weights_alone(log):
    net = log.net
    for kind, choice, before, after in log.steps():
        if kind == "SGD":
            assert not moved(before, after, net.arch_parameters())
            assert all(
                len(row) == 1
                for part in (choice.head, choice.stack)
                for rows in part
                for row in rows
            )
            for module, chosen in candidates(net, choice):
                weights = list(module.parameters())
                assert len(moved(before, after, weights)) == (len(weights) if chosen else 0)


def test_an_architecture_step_keeps_each_layers_sampled_mass_and_all_weights(log):
    net = log.net
    for kind, choice, before, after in log.steps():
        if kind == "Adam":
            assert not moved(before, after, net.weight_parameters())
            assert moved(before, after, net.beta)
            for parts, chosen in ((net.alpha_head, choice.head), (net.alpha_stack, choice.stack)):
                for alpha, rows in zip(parts, chosen, strict=True):
                    for old, new, row in zip(before[alpha], after[alpha], rows, strict=True):
                        assert len(row) == 2
                        assert not torch.equal(old[row], new[row])
                        assert new[row].exp().sum().item() == pytest.approx(
                            old[row].exp().sum().item(), rel=1e-5
                        )


def test_candidates_that_were_never_sampled_stay_where_they_are(log):
    net = log.net
    choice, before, after = next(
        (choice, *states) for kind, choice, *states in log.steps() if kind == "Adam"
    )
    for parts, chosen in ((net.alpha_head, choice.head), (net.alpha_stack, choice.stack)):
        for alpha, rows in zip(parts, chosen, strict=True):
            for old, new, row in zip(before[alpha], after[alpha], rows, strict=True):
                others = [index for index in range(len(old)) if index not in row]
                assert torch.equal(old[others], new[others])


def test_the_cost_term_makes_the_expected_network_cheaper(run):
    def last_cost(factor):
        recipe = SEARCH.model_copy(
            update={"epochs": 4, "arch_start_epoch": 0, "sub_loss_factor": factor}
        )
        return search(run, DATA, TABLE, recipe).history[-1]["expected_cost"]

    assert last_cost(20.0) < 0.97 * last_cost(0.0)


def test_what_a_search_returns_can_be_trained_on_in_every_way(log):
    net = log.net
    assert all(parameter.requires_grad for parameter in net.parameters())
    net.zero_grad()
    net.cost(TABLE).backward()
    assert all(beta.grad is not None for beta in net.beta)


@pytest.mark.parametrize(
    ("kind", "share"), [("mult_adds", 0.1), ("mult_adds", 0.9), ("latency", 0.5)]
)
def test_a_target_is_hit(kind, share, run):
    """For whatever probabilities, `Lattice.at` is tested with the method."""
    table = TABLE if kind == "mult_adds" else random_table(SMALL, 0, equal_layers=True)
    target = Lattice(table).quantile(share)
    recipe = SEARCH.model_copy(update={"epochs": 2})
    result = search(run, DATA, table, recipe, target_cost=target)
    assert result.best.cost == pytest.approx(target, rel=0.05)
    if kind == "mult_adds":
        assert table.total(result.best.architecture) == pytest.approx(result.best.cost)
        assert result.best.architecture.mult_adds(16, 3) == pytest.approx(target, rel=0.05)
    assert result.history[-1]["derived_cost"] == result.best.cost
    assert load_search(run, table, 3).best == result.best


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_target_pulls_the_expected_cost_from_either_side(share, run):
    low, high = Lattice(TABLE).reach
    target = low + share * (high - low)
    recipe = SEARCH.model_copy(update={"epochs": 60, "arch_start_epoch": 0, "arch_lr": 0.1})
    history = search(run, DATA, TABLE, recipe, target_cost=target).history
    first, last = (abs(row["expected_cost"] / target - 1) for row in (history[0], history[-1]))
    assert last < 0.15 and last < first


@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_a_target_out_of_reach_is_refused_with_the_range(target, run):
    low, high = Lattice(TABLE).reach
    with refused(
        ValueError,
        rf"no architecture of .* million Mult-Adds, it reaches from {low:.4g} to {high:.4g}",
    ):
        search(run, DATA, TABLE, SEARCH, target_cost=target)


def test_a_collapse_is_told_in_words_with_what_to_change(run):
    recipe = SEARCH.model_copy(
        update={"epochs": 40, "arch_start_epoch": 0, "sub_loss_factor": 300.0, "arch_lr": 0.3}
    )
    warning = collapsed(search(run, DATA, TABLE, recipe).history)
    assert re.search(
        r"collapsed: \d+%.*cheapest op.*target_cost.*sub_loss_factor.*arch_start_epoch", warning
    )
    assert collapsed(search(Run("sound"), DATA, TABLE, SEARCH).history) is None


def run_search(run, recipe=SEARCH, **how):
    result = search(run, DATA, TABLE, recipe, how=Computing(**how))
    return result.net, result.history


def run_retrain(run, recipe=RETRAIN, **how):
    return retrain(run, DATA, ARCH, recipe, Computing(**how))


STAGES = {"search": (run_search, SEARCH), "retrain": (run_retrain, RETRAIN)}
every_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The checkpoint that either stage ends with when nothing happens to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENAS_ROOT", str(tmp_path_factory.mktemp("undisturbed")))
        run = Run("undisturbed")
        for train, _ in STAGES.values():
            train(run)
        return {stage: checkpoint(run, stage) for stage in STAGES}


@every_stage
def test_the_same_seed_gives_the_same_run(stage, run, undisturbed):
    train, _ = STAGES[stage]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        net, history = train(run)
        assert torch.initial_seed() == 12345
    assert identical(checkpoint(run, stage), undisturbed[stage])
    assert identical(history, undisturbed[stage]["position"]["history"])
    assert identical(dict(net.state_dict()), dict(undisturbed[stage]["net"]))


@every_stage
def test_another_seed_gives_another_run(stage, run, undisturbed):
    net, history = STAGES[stage][0](run, seed=1)
    assert history[-1]["train_loss"] != undisturbed[stage]["position"]["history"][-1]["train_loss"]
    assert not identical(dict(net.state_dict()), dict(undisturbed[stage]["net"]))


@every_stage
def test_history_is_one_row_an_epoch_and_is_kept(stage, run):
    _, history = STAGES[stage][0](run)
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert all(0 <= row["train_top1"] <= 1 and row["train_loss"] > 0 for row in history)
    assert ["val_loss" in row for row in history] == [False, stage == "search", stage == "search"]
    kept = run.history(stage)
    assert kept["train_loss"].tolist() == pytest.approx([row["train_loss"] for row in history])


def half_a_file(_, path):
    Path(path).write_bytes(b"half a checkpoint")


@contextmanager
def stopping_at_write(number, halfway):
    """Ctrl-C at the end of writing the checkpoint of this number, from 1, or in the middle of it."""
    save, writes = torch.save, []

    def stop(content, path):
        writes.append(path)
        if len(writes) == number and halfway:
            half_a_file(content, path)
        else:
            save(content, path)
        if len(writes) == number:
            raise KeyboardInterrupt

    with mock.patch("torch.save", stop):
        yield


# Every epoch writes the best checkpoint, if it is that, before its own.
INTERRUPTIONS = {
    "behind writing the first epoch's best": lambda: stopping_at_write(1, halfway=False),
    "while writing the second checkpoint": lambda: stopping_at_write(2, halfway=True),
    "in the middle of the second epoch": lambda: stopping_before_step(5),
    "in the middle of the third epoch": lambda: stopping_before_step(11),
    "before the first checkpoint": lambda: stopping_before_step(2),
}


@every_stage
@pytest.mark.parametrize("when", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_if_undisturbed(stage, when, run, undisturbed):
    train, _ = STAGES[stage]
    with INTERRUPTIONS[when](), pytest.raises(KeyboardInterrupt):
        train(run)
    net, history = train(run)
    assert identical(checkpoint(run, stage), undisturbed[stage])
    assert identical(history, undisturbed[stage]["position"]["history"])
    assert identical(dict(net.state_dict()), dict(undisturbed[stage]["net"]))
    assert [path.name for path in run.work.glob(".partial*")] == []


@every_stage
def test_a_finished_run_is_not_trained_again(stage, run):
    train, _ = STAGES[stage]
    first_net, first = train(run)
    steps = []
    with before_each_step(lambda *_: steps.append(1)):
        net, history = train(run)
    assert steps == []
    assert history == first
    assert identical(dict(net.state_dict()), dict(first_net.state_dict()))


@every_stage
@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.05}, "recipe"), ({"epochs": 4}, "recipe"), ({}, "seed")],
    ids=["learning rate", "epochs", "seed"],
)
def test_a_changed_recipe_starts_anew_and_says_so(stage, change, named, run, capsys):
    train, recipe = STAGES[stage]
    changed, seed = recipe.model_copy(update=change), int(named == "seed")
    train(Run("fresh"), changed, seed=seed)
    train(run)
    assert "anew" not in capsys.readouterr().out
    _, history = train(run, changed, seed=seed)
    assert (
        f"{stage}.pt is of another configuration ({named} differ): starting anew"
        in capsys.readouterr().out
    )
    assert len(history) == changed.epochs
    assert identical(checkpoint(run, stage), checkpoint(Run("fresh"), stage))


def test_other_data_start_a_search_anew(run, capsys):
    run_search(run)
    search(run, image_data(seed=1), TABLE, SEARCH)
    assert "(data differ): starting anew" in capsys.readouterr().out


def test_a_search_loads_back_as_it_ended(run):
    recipe = SEARCH.model_copy(update={"softmax_temp": 0.3})
    result = search(run, DATA, TABLE, recipe)
    loaded = load_search(run, TABLE, 3)
    assert loaded.net.temperature == recipe.softmax_temp
    assert loaded.best == result.best
    assert loaded.best.architecture == result.net.derive()
    assert identical(dict(loaded.net.state_dict()), dict(result.net.state_dict()))
    assert loaded.history == result.history
    assert len(loaded.trace) == recipe.epochs + 1
    assert loaded.derived() == result.derived()
    assert loaded.derived()[-1] == result.best


def test_loading_a_search_before_it_ran_names_the_stage(run):
    with refused(FileNotFoundError, r"run 'made-up' has no search\.pt yet: run 03-search first"):
        load_search(run, TABLE, 3)


@every_stage
def test_bf16_runs_and_is_not_fp32(stage, run, undisturbed):
    net, history = STAGES[stage][0](run, precision="bf16")
    exact = undisturbed[stage]["position"]["history"]
    assert history[0]["train_loss"] != exact[0]["train_loss"]
    assert history[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


@every_stage
def test_device_that_is_not_there(stage, run):
    with refused(ValueError, r"device 'cuda:99' cannot be used here: \S"):
        STAGES[stage][0](run, device="cuda:99")


@every_stage
def test_a_loss_that_is_not_finite_names_the_step(stage, run):
    train, recipe = STAGES[stage]
    with refused(FloatingPointError, rf"{stage}, epoch 0: .*finite at step \d+"):
        train(run, recipe.model_copy(update={"lr": 1e30, "warmup_epochs": 0}))


def test_a_loss_that_is_not_finite_in_an_architecture_step(run):
    """One weight step an epoch spoils the weights, the next architecture pass meets them."""
    recipe = SEARCH.model_copy(update={"lr": 1e30, "arch_start_epoch": 0})
    with refused(FloatingPointError, r"search, epoch 1: .*finite at step \d+"):
        search(run, image_data(train=8), TABLE, recipe)


def test_retraining_learns_what_the_images_show(run):
    recipe = RETRAIN.model_copy(update={"epochs": 12})
    net, history = run_retrain(run, recipe)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert evaluate(net, DATA, "test")["top1"] == 1.0


class Prophet(nn.Module):
    """Says what it was told to say, row by row."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.modes, self.said = logits, set(), 0

    def forward(self, images):
        self.modes.add(self.training)
        self.said += len(images)
        return self.logits[self.said - len(images) : self.said].to(images.device)


@pytest.mark.parametrize("batch_size", [3, 10, 256])
def test_evaluation_counts(batch_size):
    scores = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.cat(
        [labels for _, labels in Batches(DATA, "test", batch_size, torch.device("cpu")).epoch(0)]
    )
    prophet, truth = Prophet(scores), labels.tolist()
    result = evaluate(prophet, DATA, "test", batch_size)
    guesses = scores.argmax(dim=1).tolist()
    confusion = [[0] * 3 for _ in range(3)]
    for label, guess in zip(truth, guesses, strict=True):
        confusion[label][guess] += 1
    assert result["confusion"] == confusion
    assert result["top1"] == pytest.approx(sum(confusion[label][label] for label in range(3)) / 10)
    assert 0 < result["top1"] < 1
    assert result["top5"] is None  # of three classes
    assert result["loss"] == pytest.approx(float(F.cross_entropy(scores, labels)))
    assert (result["images"], prophet.modes) == (10, {False})


def test_evaluation_counts_the_best_five_of_seven_classes():
    labels = torch.tensor([0, 4, 5, 6])
    images = Split(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), labels)
    data = ImageData(
        "digits", [*"abcdefg"], images, images, images, [0.5] * 3, [1.0] * 3, "made up"
    )
    result = evaluate(Prophet(torch.arange(7.0).neg().expand(4, 7)), data, "test")
    assert (result["top1"], result["top5"]) == (0.25, 0.5)


@pytest.mark.parametrize("target", [math.inf, math.nan, 0, -1.0])
def test_a_target_that_is_no_cost_is_refused(target, run):
    with refused(
        ValueError, r"target_cost is \S+, expected a positive number of million Mult-Adds, or None"
    ):
        search(run, DATA, TABLE, SEARCH, target_cost=target)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            CostTable.mult_adds(SMALL, 32, 3),
            r"the costs are for input_size 32, the images have 16: run 02-cost again",
        ),
        (
            CostTable.mult_adds(SMALL, 16, 10),
            r"the costs are for num_classes 10, the images have 3: run 02-cost again",
        ),
    ],
)
def test_costs_of_other_images_are_refused(table, sentence, run):
    with refused(ValueError, sentence):
        search(run, DATA, table, SEARCH)


def test_a_batch_larger_than_a_split_is_refused(run):
    with refused(
        ValueError, r"batch_size is 17, but val has 16 images: set batch_size to at most that"
    ):
        search(run, DATA, TABLE, SEARCH.model_copy(update={"batch_size": 17}))


def test_alpha_that_is_not_finite_names_the_step(run, monkeypatch):
    """As an architecture step with much too high a rate leaves it, on steps of which every loss is finite."""
    step = torch.optim.Adam.step

    def spoiling(optimizer):
        step(optimizer)
        optimizer.param_groups[0]["params"][-2].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoiling)
    with refused(
        FloatingPointError,
        r"search, epoch 1: alpha is not finite at step 1 \(search\.pt is from before",
    ):
        search(run, DATA, TABLE, SEARCH)


@pytest.fixture
def prepared(run, monkeypatch):
    """A run with images and costs, and its space as a file."""
    for module in ("search", "outcome"):
        monkeypatch.setattr(f"densenas.{module}.load", lambda _: DATA)
    table = CostTable.mult_adds(SMALL.model_copy(update={"search": SEARCH}), 16, 3)
    table.write(run.reports / "cost.json")
    return run


def space_file(run, **changes):
    path = run.reports / "space.yml"
    path.write_text(SMALL.model_copy(update={"search": SEARCH, **changes}).model_dump_json())
    return str(path)


def provenance(run):
    return run.read_json("provenance.json").get("03-search", {}).get("parameters", {})


def test_what_is_refused_leaves_the_run_and_its_provenance_as_they_were(prepared):
    run, target = prepared, Lattice(TABLE).quantile(0.5)
    search_run(run.name, SearchSettings(target_cost=target, seed=3))
    recorded, before = provenance(run), (run.reports / "provenance.json").read_bytes()
    assert (recorded["seed"], recorded["target_cost"], recorded["space"]) == (3, target, "made up")
    for wrong in (
        {"target_cost": 100.0},
        {"batch_size": 17},
        {"device": "cuda:99"},
        {"recipe": {"lr": -1.0}},
        {"recipe": {"learning_rate": 0.1}},
        {"space": "digits"},
        {"space": "nowhere"},
        {"arch_start_epoch": 99},
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            search_run(run.name, SearchSettings(seed=7, **wrong))
        assert (run.reports / "provenance.json").read_bytes() == before
    record = write_architecture(run, finished_search(run))
    assert (record["seed"], record["target_cost"]) == (3, target)


def test_what_was_searched_is_read_from_the_search_not_from_the_last_record(prepared):
    run = prepared
    search_run(run.name, SearchSettings(seed=3))
    run.record_provenance("03-search", target_cost=100.0, seed=7)
    first = write_architecture(run, finished_search(run))
    assert (first["seed"], first["target_cost"], first["data"]) == (3, None, DATA.digest)
    assert json.loads((run.reports / "architecture.json").read_text()) == first
    search_run(run.name, SearchSettings(seed=4))
    assert write_architecture(run, finished_search(run))["search"] != first["search"]


def test_how_a_search_went_is_kept(prepared):
    run = prepared
    search_run(run.name, SearchSettings())
    result = finished_search(run)
    record_search(run, result)
    metrics, last = run.read_json("metrics.json")["search"], result.history[-1]
    assert (metrics["epochs"], metrics["n"], metrics["warning"]) == (3, 1, None)
    assert metrics["paths"] == SMALL.count_paths() and metrics["edges"] == len(SMALL.edges)
    for name in ("train_top1", "val_loss", "expected_cost", "alpha_entropy"):
        assert metrics[name] == pytest.approx(last[name])


def test_without_a_space_it_is_that_of_the_costs_and_another_one_is_refused(prepared):
    run = prepared
    wider = space_file(run, chs=(4, 6, 8, 12))
    with refused(
        ValueError,
        r"space '.*' is not the one that the run's costs are of, made up \(chs differ\): run",
    ):
        search_run(run.name, SearchSettings(space=wider))
    faster = space_file(run, name="mine", search=SEARCH.model_copy(update={"lr": 0.01}))
    search_run(run.name, SearchSettings(space=faster, recipe={"arch_lr": 0.07}))
    used = provenance(run)["recipe"]
    assert (used["lr"], used["arch_lr"], used["epochs"]) == (0.01, 0.07, SEARCH.epochs)


def test_nothing_is_made_of_an_unfinished_search(prepared):
    run = prepared
    with stopping_before_step(6), pytest.raises(KeyboardInterrupt):
        search_run(run.name, SearchSettings())
    with refused(
        ValueError,
        r"the search of run 'made-up' has done 1 of 3 epochs: run 03-search again, it goes on",
    ):
        finished_search(run)


def test_nothing_is_made_of_a_search_with_other_costs_or_images(prepared, monkeypatch):
    run = prepared
    search_run(run.name, SearchSettings())
    table = read_costs(run)
    table.scaled(2.0).write(run.reports / "cost.json")
    with refused(
        ValueError,
        r"run 'made-up' has other costs now than it was searched with: run 03-search again",
    ):
        finished_search(run)
    table.write(run.reports / "cost.json")
    monkeypatch.setattr("densenas.outcome.load", lambda _: image_data(seed=1))
    with refused(
        ValueError,
        r"run 'made-up' has other images now than 03-search was run on: run 03-search again",
    ):
        finished_search(run)
    with refused(
        ValueError, r"run 'made-up' has another number of classes now than it was searched with"
    ):
        load_search(run, table, 4)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_loading_a_damaged_search_names_the_file_and_the_way_out(content, run):
    search(run, DATA, TABLE, SEARCH)
    path = run.work / "search.pt"
    if content is None:
        torch.save({"configuration": json.dumps({}), "net": {}}, path)
    else:
        path.write_bytes(content)
    with refused(
        ValueError,
        r"search\.pt (is damaged|does not hold a search of space made up).*: run 03-search again",
    ):
        load_search(run, TABLE, 3)


def remade(path, change):
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_a_search_of_another_version_or_with_spoilt_weights_is_refused_in_a_sentence(run):
    search(run, DATA, TABLE, SEARCH)
    path = run.work / "search.pt"
    whole = path.read_bytes()

    def older(checkpoint):
        configuration = json.loads(checkpoint["configuration"])
        del configuration["space"]["init_dim"]
        checkpoint["configuration"] = json.dumps(configuration)

    remade(path, older)
    with refused(ValueError, r"has other costs now than it was searched with: run 03-search again"):
        load_search(run, TABLE, 3)
    for change, sentence in (
        (
            lambda c: c["net"]["classifier.bias"].fill_(math.nan),
            r"holds values that are not finite \(net\.classifier",
        ),
        (
            lambda c: c["trace"]["entries"].clear(),
            r"does not hold what such a training keeps as 'trace'",
        ),
        (
            lambda c: c["position"].update(history=5),
            r"does not hold what such a training keeps as 'position'",
        ),
    ):
        path.write_bytes(whole)
        remade(path, change)
        with refused(ValueError, rf"search\.pt {sentence}.*: run 03-search again"):
            load_search(run, TABLE, 3)
