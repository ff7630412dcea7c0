"""What the sliders of notebook 00 show is what supernet, search and derivation say; driven without a browser."""

import io
import shutil

import pytest
import torch
from helpers import (
    DATA,
    SEARCH,
    SMALL,
    TABLE,
    best_path,
    block_paths,
    edge_probabilities,
    everything,
    expectation_over_paths,
    path_probability,
    random_supernet,
    refused,
    spaces,
)
from hypothesis import given

from densenas import CostTable, figures
from densenas.explore import (
    NO_RUN,
    Explorer,
    block_places,
    candidates,
    finished,
    priced,
    undecided,
    view,
)
from densenas.method.derivation import Lattice
from densenas.method.probabilities import Probabilities, best_paths
from densenas.method.supernet import expected_cost
from densenas.outcome import write_architecture
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import Computing

# No run of the checkout is looked at.
pytestmark = pytest.mark.usefixtures("root")


@given(spaces())
def test_expected_cost_and_best_paths_are_those_of_the_supernet(space):
    net = random_supernet(space, 1)
    table, moment = CostTable.mult_adds(space, space.input_size, 3), net.probabilities()
    cost = expected_cost(table, moment)
    assert cost.item() == pytest.approx(
        expectation_over_paths(net, table, everything(space)), rel=1e-9
    )
    shares, best = edge_probabilities(net), best_paths(space, moment.p, 4)
    assert list(best[0][1]) == best_path(net)
    for share, path in best:
        assert share == pytest.approx(path_probability(shares, path), rel=1e-9)
    every = sorted((path_probability(shares, path) for path in block_paths(space)), reverse=True)
    assert [share for share, _ in best] == pytest.approx(every[:4], rel=1e-9)


@pytest.mark.parametrize("name", ["digits", "resnet"])
def test_sliders_move_probabilities_costs_and_the_derived_path(name):
    explorer = Explorer(name, 10)
    space, p = explorer.table.space, undecided(explorer.table).p
    assert (
        "<svg" in explorer.graph.value
        and f'id="edge-0-{space.outgoing(0)[-1]}"' in explorer.graph.value
    )
    assert figures.restyled(space, p, best_paths(space, p)[0][1]) in explorer.style.value
    explorer.block.value = 1
    logits = torch.linspace(-1, 2.3, len(space.outgoing(1)))
    for slider, logit in zip(explorer.beta.children, logits.tolist(), strict=True):
        before = explorer.style.value, explorer.numbers.value
        slider.value = logit
        assert (explorer.style.value, explorer.numbers.value) != before
    explorer.temperature.value = 0.5
    p[1, space.outgoing(1)] = (logits / 0.5).softmax(0)
    best, moment = best_paths(space, p), undecided(explorer.table)
    assert figures.restyled(space, p, best[0][1]) in explorer.style.value
    cost = expected_cost(explorer.table, Probabilities(p, moment.head, moment.stack))
    assert f"<b>{cost:.4g}</b>" in explorer.numbers.value
    assert "→".join(map(str, best[0][1])) in explorer.numbers.value


def test_temperature_says_why_it_does_nothing():
    explorer = Explorer("digits", 10)
    shown = explorer.numbers.value
    explorer.temperature.value = 0.3
    assert explorer.numbers.value == shown and "changes nothing yet" in explorer.note.value
    explorer.beta.children[0].value = 2.0
    assert explorer.note.value == ""
    shown = explorer.numbers.value
    explorer.temperature.value = 3.0
    assert explorer.numbers.value != shown


def test_a_click_on_a_block_chooses_it():
    explorer = Explorer("digits", 10)
    places = block_places(explorer.graph.value, 7)
    lefts = [float(place.partition("left: ")[2].partition("%")[0]) for place in places.values()]
    assert lefts == sorted(lefts) and 0 < lefts[0] < lefts[-1] < 100
    for block, button in enumerate(explorer.picture.children[1:]):
        button.click()
        assert explorer.block.value == block
        assert f".block-{block} {{outline" in explorer.style.value
        assert f".block-{block} {{{places[block]}}}" in explorer.places.value


def test_a_change_of_space_leaves_nothing_of_the_old_one():
    explorer, fresh = Explorer("resnet", 10), Explorer("digits", 10)
    explorer.block.value, explorer.temperature.value = 20, 3
    explorer.space.value = "digits"
    assert (explorer.block.value, explorer.run.value, explorer.temperature.value) == (0, NO_RUN, 1)
    assert 'id="node-7"' in explorer.graph.value and 'id="node-8"' not in explorer.graph.value
    assert explorer.numbers.value == fresh.numbers.value


def test_candidates_are_those_of_the_block():
    table, moment = TABLE, random_supernet(SMALL, 2, dtype=torch.float32).probabilities()
    frame = candidates(table, moment, 2)
    assert frame["layer"].drop_duplicates().tolist() == [
        *(f"{i}→2" for i in SMALL.incoming(2)),
        "layer 1",
        "layer 2",
    ]
    assert frame.groupby("layer")["probability"].sum().tolist() == pytest.approx(
        [1] * frame["layer"].nunique()
    )
    head, stack = table.nested()[1][1]
    costs = [cost for row in head + stack for cost in row]
    assert frame["cost"].tolist() == pytest.approx(costs)
    assert frame["probability"].iloc[0] == pytest.approx(float(moment.head[1, 0]))
    assert candidates(table, moment, 0).empty


@pytest.fixture
def space_file(tmp_path):
    path = tmp_path / "made up.yml"
    path.write_text(SMALL.model_dump_json())  # JSON is YAML
    return str(path)


@pytest.fixture(params=[None, 0.04])
def searched(root, run, space_file, request):
    result = search(run, DATA, TABLE, SEARCH, request.param, how=Computing(device="cpu"))
    TABLE.write(run.reports / "cost.json")
    return run.name, space_file, result


def test_an_epoch_of_a_run_is_the_trace_of_that_run(searched):
    name, space, result = searched
    explorer = Explorer(space, None, name)
    assert (
        explorer.run.options == (NO_RUN, name) and explorer.epoch.max == len(result.trace) - 1 == 3
    )
    assert explorer.temperature.value == SEARCH.softmax_temp
    assert explorer.table.conditions["num_classes"] == 3  # the run's
    for epoch, found in enumerate(result.derived()):
        explorer.epoch.value = epoch
        torch.testing.assert_close(explorer.moment.p.float(), result.trace[epoch].p)
        assert f"{expected_cost(TABLE, result.trace[epoch]):.4g}</b>" in explorer.numbers.value
        assert f"<b>{found.architecture.mult_adds(16, 3):.3f} M</b>" in explorer.numbers.value
        assert figures.restyled(SMALL, explorer.moment.p, found.path) in explorer.style.value
    explorer.temperature.value = 0.3  # of a moment that is looked at, not of the run
    explorer.epoch.value = 1
    explorer.temperature.value = SEARCH.softmax_temp
    torch.testing.assert_close(explorer.moment.p.float(), result.trace[1].p)


def test_its_numbers_are_those_of_the_report(searched, run):
    name, _, result = searched
    record = write_architecture(run, result)
    explorer = Explorer(run=name)
    for text in (
        f"<b>{record['mult_adds_m']:.3f} M</b> Mult-Adds",
        f"{1000 * record['params_m']:.1f} k parameters",
        f"{record['blocks']} routing blocks, {record['layers']} layers",
        f"<b>{result.history[-1]['expected_cost']:.4g}</b>",
    ):
        assert text in explorer.numbers.value
    assert ("at the target of 0.04" in explorer.numbers.value) == (result.target_cost is not None)


def test_choosing_a_block_changes_nothing(searched):
    name, space, _ = searched
    explorer = Explorer(space, None, name)
    before = explorer.logits.clone(), explorer.numbers.value
    for block in range(SMALL.num_blocks):
        explorer.block.value = block
        for slider in explorer.beta.children:
            slider.value += 1e-9  # as a browser does that has drawn it
        assert torch.equal(explorer.logits, before[0]) and explorer.numbers.value == before[1]
    moved = explorer.beta.children[0]
    explorer.block.value = 1
    j = SMALL.outgoing(1)[0]
    explorer.beta.children[0].value = 4.2
    changed = (explorer.logits != before[0]).nonzero().tolist()
    assert changed == [[1, j]] and moved is not explorer.beta.children[0]


def test_it_opens_on_the_last_run_that_was_searched(searched, space_file):
    name, space, _ = searched
    for explorer in (Explorer(), Explorer(space), Explorer(space, 3)):
        assert explorer.run.value == name
    assert explorer.spaces[explorer.space.value] == SMALL
    assert Explorer("digits").run.value == Explorer(space, 7).run.value == NO_RUN
    explorer.space.value = "digits"
    assert explorer.run.value == NO_RUN
    explorer.space.value = space
    assert explorer.run.value == name


def test_a_run_that_cannot_be_read_is_said_and_not_shown(searched, run):
    name, space, _ = searched
    damaged = run.work / "search.pt"
    damaged.write_bytes(damaged.read_bytes()[:-99])
    explorer = Explorer()
    assert explorer.run.value == NO_RUN and "search.pt is damaged" in explorer.note.value
    assert explorer.numbers.value == Explorer(space, 10).numbers.value
    with refused(ValueError, "search.pt is damaged"):
        Explorer(run=name)


def test_the_coldest_temperature_still_finds_the_network_at_the_target(searched):
    explorer = Explorer(run=searched[0])
    for block in range(SMALL.num_blocks):
        explorer.block.value = block
        for slider, logit in zip(explorer.beta.children, (15.0, -15.0), strict=False):
            slider.value = logit
    explorer.temperature.value = explorer.temperature.min
    assert explorer.temperature.value == 0.1
    found = Lattice(TABLE, explorer.moment).derive(searched[2].target_cost)
    assert found.log_probability > -torch.inf
    assert figures.restyled(SMALL, explorer.moment.p, found.path) in explorer.style.value


def test_space_and_classes_are_those_of_the_run(searched):
    name, space, _ = searched
    table = priced(None, None, name)
    assert (table.space, table.input_size, table.num_classes) == (SMALL, 16, 3)
    assert priced(space, 3, name) == table
    assert priced("digits", 7).num_classes == 7
    assert (priced(None, None).space.name, priced(None, None).num_classes) == ("digits", 10)
    with refused(ValueError, f"num_classes is 7, but run '{name}' tells 3 classes apart"):
        priced(space, 7, name)


def test_without_a_browser_it_is_a_picture(searched, monkeypatch):
    name, space, result = searched
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    drawn = view(space, None, name, None)
    expected = figures.search_space(SMALL, result.trace[-1].p, result.best.path)
    shown, wanted = io.BytesIO(), io.BytesIO()
    drawn.savefig(shown)
    expected.savefig(wanted)
    assert shown.getvalue() == wanted.getvalue()
    assert isinstance(view(space, None, name, True), Explorer)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    assert isinstance(view(space, None, name, None), Explorer)


def test_wrong_spaces_and_runs_are_refused_in_one_sentence(searched):
    name, space, _ = searched
    with refused(FileNotFoundError, "no search space 'digit'"):
        Explorer("digit", 10)
    with refused(ValueError, f"run '{name}' is of space made up, not digits"):
        Explorer("digits", 10, name)
    with refused(FileNotFoundError, "run 'other' has no cost.json yet: run 02-cost first"):
        Explorer(space, 3, "other")
    shutil.rmtree(Run(name).work)
    with refused(FileNotFoundError, "has no search.pt yet: run 03-search first"):
        finished(name, SMALL)
