"""A report credits its numbers to the network that they belong to, and says in one sentence what it lacks."""

import json
import re
import shutil
import sys

import pandas as pd
import pytest
from helpers import REPOSITORY, refused

from densenas import figures
from densenas.report import all_runs, curve, in_words, main, tell, write_overview, write_report
from densenas.runs.run import Run

EXAMPLE = REPOSITORY / "reports/examples/digits"
RESULT = {"target": 1.0, "number": 0, "seed": 0, "loss": 0.1, "images": 359, "blocks": 2}
OTHER = (
    "[[8, 8], 'mbconv_k3_t1', [], 0, 1]|[[8, 16], 'mbconv_k5_t3', [], 0, 2]|[[16, 128], 'conv1_1']"
)
TRAINED = {"weights": "abc", "folder": "runs/digits/model"}
BY_NAME = {"network": "squeezenet1_1", "model": "squeezenet1_1"}
BY_TEXT = {
    "network": "a network of another net_config",
    "net_config": OTHER,
    "blocks": 1,
    "layers": 1,
}
COST = {"mult_adds_m": 1.18, "params_m": 0.01566}


@pytest.fixture
def digits(reported):
    """The default run, whose derived network was trained and tested."""
    run = reported
    found = run.read_json("architecture.json")
    assert found["mult_adds_m"] != COST["mult_adds_m"]
    own = {key: found[key] for key in ("net_config", "blocks", "layers", "mult_adds_m", "params_m")}
    change(run, retrain=own | TRAINED, evaluate=own | TRAINED | {"network": "the derived network"})
    return run


IDENTITY = (
    "network",
    "net_config",
    "model",
    "blocks",
    "layers",
    "mult_adds_m",
    "params_m",
    "weights",
    "folder",
)


def change(run, **sections):
    """Replaces which network a section of metrics.json is of; None takes the section away."""
    metrics = run.read_json("metrics.json")
    for name, of in sections.items():
        kept = {key: value for key, value in metrics.pop(name, {}).items() if key not in IDENTITY}
        if of is not None:
            metrics[name] = kept | of
    (run.reports / "metrics.json").write_text(json.dumps(metrics))


def first_screen(run):
    """The page's words before its first heading of a section, and the terminal's."""
    page = (run.reports / write_report(run).rpartition("/")[2]).read_text()
    head = re.sub(r"<[^>]+>", " ", page.split("<h1>")[1].split("<h2>")[0])
    return " ".join(head.split()), in_words(run, "there", "everywhere"), page


def test_a_derived_network_has_its_own_numbers(digits):
    found = digits.read_json("architecture.json")
    for words in first_screen(digits)[:2]:
        assert "derived network" in words and f"{found['mult_adds_m']:.3f} M" in words
        assert "not" not in words.replace("neither", "")
    (row,) = all_runs().to_dict("records")
    assert (
        row["cost"] == found["mult_adds_m"]
        and row["group"] == "digits"
        and row["seed"] == found["seed"]
    )


def test_the_answer_comes_first(digits):
    page = first_screen(digits)[2]
    order = [page.index(f'id="{name}"') for name in ("04-architecture", "06-confusion", "04-path")]
    order += [page.index(f'id="{name}"') for name in ("03-history", "01-images", "02-cost")]
    assert order == sorted(order)
    assert page.index('id="04-architecture"') < page.index("<h2>")


@pytest.mark.parametrize(
    ("entropies", "target", "words"),
    [
        ((0.04, 0.3), 1.0, "certain about paths (entropy 0.04) and fairly sure about operations"),
        ((0.6, 0.7), 1.0, "unsure about paths (entropy 0.60) and operations (entropy 0.70), 1"),
        ((1.0000001, 0.95), None, "undecided about paths (entropy 1.00) and operations (entropy 0"),
        ((0.04, 0.3), 1.5, "is the most probable one within 3 % of 1.5 million Mult-Adds."),
        ((0.04, 0.3), None, "is the most probable path with its most probable operations."),
    ],
)
def test_how_far_the_search_decided_is_said_in_words(entropies, target, words, digits):
    search = digits.read_json("metrics.json")["search"]
    beta, alpha = entropies
    digits.update_json(
        "metrics.json", "search", {**search, "beta_entropy": beta, "alpha_entropy": alpha}
    )
    found = digits.read_json("architecture.json")
    (digits.reports / "architecture.json").write_text(json.dumps(found | {"target_cost": target}))
    assert words in first_screen(digits)[0]


@pytest.mark.parametrize(
    ("alone", "steps", "classes", "words"),
    [
        (0.96, 0.97, 10, "its weights fit that network"),
        (0.50, 0.97, 10, "its weights hardly fit that network"),
        (0.11, 0.10, 10, "no better than chance"),  # of 287 images
        (0.36, 0.33, 3, "no better than chance"),
    ],
)
def test_chance_is_no_knowledge(alone, steps, classes, words, digits):
    metrics = digits.read_json("metrics.json")
    digits.update_json(
        "metrics.json", "search", {**metrics["search"], "path_top1": alone, "val_top1": steps}
    )
    digits.update_json("metrics.json", "data", {**metrics["data"], "classes": classes})
    assert f": {words}." in first_screen(digits)[0]


def test_a_network_of_another_devices_table_has_its_milliseconds(digits):
    assert " ms by the table of" not in " ".join(first_screen(digits)[:2])
    cost = digits.read_json("cost.json")
    cost["conditions"]["device"] = "a board"
    (digits.reports / "cost.json").write_text(json.dumps(cost))
    for words in first_screen(digits)[:2]:
        assert "1.02 ms by the table of a board" in words


def study(run, *results, **recipe):
    """Networks of a study of this run's, as (method, design, million Mult-Adds, top1)."""
    columns = ("method", "design", "mult_adds_m", "top1")
    rows = [{**RESULT, **dict(zip(columns, result, strict=True)), **recipe} for result in results]
    pd.DataFrame(rows).to_csv(run.reports / "evidence.csv", index=False)
    how = {"data": run.read_json("metrics.json")["data"]["digest"], "recipe": {"lr": 0.1}}
    run.update_json("metrics.json", "evidence", {"how": how})
    trained = run.read_json("metrics.json")["retrain"]
    run.update_json("metrics.json", "retrain", {**trained, "how": how})


SEARCHED, DRAWN = ("searched", "DenseNAS", 1.0, 0.99), ("random", "random", 1.0, 0.9)


@pytest.mark.parametrize(
    ("results", "tile"),
    [
        (
            (SEARCHED, DRAWN, ("random", "random", 1.05, 0.8)),
            "random, of equal cost 85.00 % mean of 2",
        ),
        ((SEARCHED, DRAWN, ("hand-made", "narrow", 1.0, 0.95)), "random, of equal cost 90.00 %"),
        (
            (("hand-made", "wide", 1.0, 0.5), ("hand-made", "narrow", 1.0, 0.6)),
            "narrow, of equal cost 60.00 %",
        ),
        ((SEARCHED, ("random", "random", 1.2, 0.9)), None),
    ],
)
def test_a_baseline_of_equal_cost_stands_beside_the_accuracy(results, tile, digits):
    epochs = digits.read_json("provenance.json")["05-retrain"]["parameters"]["recipe"]["epochs"]
    assert "of equal cost" not in first_screen(digits)[0]
    study(digits, *results, epochs=epochs)
    screen = first_screen(digits)[0]
    assert tile in screen if tile else "of equal cost" not in screen
    study(digits, *results, epochs=epochs + 1)
    assert "of equal cost" not in first_screen(digits)[0], "trained otherwise"
    study(digits, *results, epochs=epochs)
    how = digits.read_json("metrics.json")["evidence"]["how"]
    for other in ({"data": "of other images"}, {"recipe": {"lr": 0.9}}):
        digits.update_json("metrics.json", "evidence", {"how": how | other})
        assert "of equal cost" not in first_screen(digits)[0], other


def test_an_accuracy_stands_beside_no_other_images_than_its_own(digits, root, capsys):
    metrics = digits.read_json("metrics.json")
    tested = {**metrics["evaluate"], "data": metrics["data"]["digest"]}
    digits.update_json("metrics.json", "evaluate", tested)
    assert len(all_runs()) == 1 and len(curve(digits)) == 1
    digits.update_json("metrics.json", "data", {**metrics["data"], "digest": "of others"})
    again = r"has other images now than 06-evaluate was run on: run 06-evaluate again"
    with refused(ValueError, again):
        write_report(digits)
    assert all_runs().empty and curve(digits).empty
    assert "06-evaluate again" in capsys.readouterr().out


@pytest.mark.parametrize("other", [BY_NAME, BY_TEXT], ids=["by name", "by text"])
def test_another_networks_accuracy_is_not_credited_to_the_derived_one(other, digits, root):
    change(digits, retrain=other | COST | TRAINED, evaluate=other | COST | TRAINED)
    found = digits.read_json("architecture.json")
    screen, terminal, page = first_screen(digits)
    for words in (screen, terminal):
        assert re.search(
            rf"Tested was not the network that this run derived, but {other['network']}", words
        )
        assert re.search(r"tested network +1\.180 M .*15\.7 k", words)
        assert f"{found['mult_adds_m']:.3f} M" in words  # what was searched is still shown as that
        assert ("routing blocks" in words.split("derived network  ")[0] or "1 blocks" in words) == (
            "blocks" in other
        )
    assert f"epochs, {other['network']} classifies" in " ".join(page.split())
    assert found["net_config"].replace("'", "&#39;") in page
    (row,) = all_runs().to_dict("records")
    assert (
        row["cost"] == 1.18
        and row["params"] == 15.66
        and row["network"] == row["group"] == other["network"]
    )
    overview = (root / write_overview()).read_text()
    assert ">1.180</td>" in overview and f"{found['mult_adds_m']:.3f}" not in overview


def test_what_was_tested_before_04_derived_another_network_is_not_its(digits):
    found = digits.read_json("architecture.json")
    (digits.reports / "architecture.json").write_text(
        json.dumps(found | {"net_config": OTHER, "mult_adds_m": 0.335})
    )
    for words in first_screen(digits)[:2]:
        assert (
            "not the network that this run derived, but a network that was derived before the present one"
            in words
        )
        assert f"{found['mult_adds_m']:.3f} M" in words and "0.335 M" in words
    assert all_runs()["group"].tolist() == ["a network that was derived before the present one"]


def test_weights_from_elsewhere_are_not_those_that_were_trained(digits):
    own = digits.read_json("metrics.json")["evaluate"]
    change(
        digits,
        evaluate={key: own[key] for key in IDENTITY if key in own}
        | {"weights": "of 2020", "folder": "shelf"},
    )
    screen, terminal, page = first_screen(digits)
    for words in (screen, terminal):
        assert (
            "Its weights are those in shelf, which are not the last that 05-retrain trained."
            in words
        )
    assert (
        "with the weights in <code>shelf</code>" in " ".join(page.split())
        and "Trained from scratch for" not in page
    )
    assert "retraining " not in terminal


def test_a_network_that_was_only_tested(digits):
    change(digits, retrain=None, evaluate=BY_NAME | COST | {"weights": "x", "folder": "shelf"})
    screen, terminal, _ = first_screen(digits)
    assert "but squeezenet1_1 (shelf)" in screen and "retraining" not in terminal


def test_an_evaluation_that_names_no_network_is_shown_as_that(digits):
    change(digits, retrain={}, evaluate=COST)
    screen, terminal, _ = first_screen(digits)
    for words in (screen, terminal):
        assert (
            "Which network was tested is not recorded" in words and "run 06-evaluate again" in words
        )
    assert all_runs()["network"].tolist() == ["not recorded"]


@pytest.mark.parametrize(
    ("section", "stage"),
    [("data", "01-data"), ("search", "03-search"), ("evaluate", "06-evaluate")],
)
def test_a_missing_stage_is_named(section, stage, digits):
    change(digits, **{section: None})
    with refused(
        FileNotFoundError,
        rf"run 'digits' has no '{section}' in metrics\.json yet: run {stage} first",
    ):
        write_report(digits)


def test_a_damaged_search_is_named(digits):
    search = digits.work / "search.pt"
    search.parent.mkdir(parents=True)
    search.write_bytes(b"half")
    with refused(ValueError, r"search\.pt is damaged or holds more .*: run 03-search again"):
        write_report(digits)


def test_runs_with_and_without_a_derived_network_stand_in_one_table_and_one_figure(digits, root):
    names = [f"baseline{number}" for number in range(9)]  # more than there are colours
    for name in names:
        shutil.copytree(digits.reports, root / "reports" / name)
        other = {**BY_NAME, "network": name, "model": name}
        change(Run(name), evaluate=other | COST | TRAINED)
    # Tested on the images, never searched.
    (root / "reports" / names[0] / "architecture.json").unlink()
    runs = all_runs()
    assert runs["group"].tolist() == [*names, "digits"]
    figures.accuracy_against_cost(runs, "Mult-Adds (millions)").draw_without_rendering()
    page = (root / write_overview()).read_text()
    # space, target, blocks, layers, seconds, seed
    assert page.count(' data-value="">–</td>') == 6 * len(names)


def test_a_repository_without_runs(root):
    assert all_runs().empty
    assert "<tbody>" in (root / write_overview()).read_text()


def test_a_report_of_nothing_is_an_error(reported, monkeypatch, capsys):
    with refused(FileNotFoundError, r"run 'nope' has nothing to report: reports/nope is not there"):
        tell(Run("nope"))
    endings = {"": "required: RUN", "nope": "is not there", "a/b": "not usable as a folder name"}
    for arguments, ending in endings.items():
        monkeypatch.setattr(sys, "argv", ["report", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code not in (None, 0)
        assert ending in capsys.readouterr().err + str(ended.value.code)


@pytest.mark.parametrize(
    ("name", "content", "kind", "sentence"),
    [
        (
            "architecture.json",
            None,
            FileNotFoundError,
            r"no architecture\.json yet: run 04-derive first",
        ),
        ("provenance.json", None, FileNotFoundError, r"no '03-search' in provenance\.json yet"),
        (
            "metrics.json",
            "{}",
            FileNotFoundError,
            r"holds no result of 06-evaluate or 09-evidence yet",
        ),
        (
            "metrics.json",
            '{"data": {}, "search": {}, "evaluate": {}}',
            ValueError,
            r"reports/digits are incomplete.*run the stages of",
        ),
        ("metrics.json", '{"evalu', ValueError, r"metrics\.json is damaged: delete it"),
        ("figures/03-history.svg", None, FileNotFoundError, r"03-history\.svg"),
    ],
)
def test_half_a_run_is_reported_in_one_sentence(reported, name, content, kind, sentence):
    path = reported.reports / name
    path.unlink() if content is None else path.write_text(content)
    with refused(kind, sentence):
        tell(reported)


def test_a_damaged_run_does_not_stop_the_report_of_another(reported, capsys):
    for name in ("second", "my copy"):
        shutil.copytree(reported.reports, reported.reports.parent / name)
    (reported.reports.parent / "second/metrics.json").write_text("{")
    tell(reported)
    said = capsys.readouterr().out
    assert re.search(r"left out of the overview: .*second/metrics\.json is damaged", said)
    assert re.search(r"left out of the overview: run name 'my copy'", said)


def test_the_overview_lists_every_evaluated_run(reported, tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "reports" / "second")
    unfinished = tmp_path / "reports" / "unfinished"
    unfinished.mkdir()
    shutil.copy(EXAMPLE / "architecture.json", unfinished)
    (unfinished / "evidence.html").touch()
    page = (tmp_path / write_overview()).read_text()
    pages = ["digits/index.html", "second/index.html", "unfinished/evidence.html"]
    assert re.findall(r'href="(.*?)"', page) == pages
    top1 = json.loads((EXAMPLE / "metrics.json").read_text())["evaluate"]["top1"]
    assert page.count(f">{100 * top1:.2f}</td>") == 2
    assert not re.search("https?://", page), "it must read without a network"
