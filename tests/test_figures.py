"""Figures of the largest space and of the smallest: what a reader sees in them, and that nothing is cut off."""

from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_space
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.text import Text

from densenas import Architecture, CostTable, SearchSpace, figures
from densenas.explore import undecided
from densenas.figures.results import pareto
from densenas.method.derivation import Lattice
from densenas.method.probabilities import visit_probabilities

OPS = ["mbconv_k3_t3", "mbconv_k7_t6"]
ONE_BLOCK = make_space(
    init_dim=8,
    chs=[8, 16],
    fm_sizes=[16, 8],
    stage=[0, 1, 1],
    num_layers=[0, 1],
    head_ops=OPS,
    stack_ops=OPS,
)
DIGITS = SearchSpace.load("digits")
SPACES = {
    "one block": ONE_BLOCK,
    "mbv2": SearchSpace.load("mbv2"),
    "resnet": SearchSpace.load("resnet"),
    "bottleneck": SearchSpace.load("bottleneck"),
}
DENSENAS_A = Architecture.named("DenseNAS-A")


def writing(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def red(artist):
    colour = artist.get_edgecolor()
    return np.allclose(colour[:3], (0.83, 0, 0.125), atol=0.01)


def after_a_search(space):
    """Costs, probabilities before and after a search that prefers what was probable, and two derived networks."""
    table = CostTable.mult_adds(space, space.input_size, 10)
    moment = undecided(table)
    sharp = torch.where(moment.p > 0, moment.p**2, moment.p)
    found = Lattice(table, moment).best(2)
    return table, moment, [moment.p, sharp / sharp.sum(dim=1, keepdim=True)], found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SPACES)
def test_figures_fit_their_canvas(name):
    space = SPACES[name]
    _, moment, trace, found = after_a_search(space)
    networks = {f"number {k}": one.architecture for k, one in enumerate(found)}
    for figure in (
        figures.search_space(space),
        figures.search_space(space, trace[1], found[0].path),
        figures.path_probabilities(space, trace[:1]),
        figures.path_probabilities(space, [*trace, trace[1]]),
        figures.candidates(space, moment.head, moment.stack, "share"),
        figures.block_counts_and_widths(space, trace, found[:1]),
        figures.architectures(networks),
        figures.shapes({"DenseNAS": [*networks.values()]}),
    ):
        figure.draw_without_rendering()
        box, size = figure.get_tightbbox(), figure.get_size_inches()  # in inches
        assert box.x0 > -0.05 and box.y0 > -0.05 and (box.max < size + 0.05).all(), (box, size)


@pytest.mark.parametrize("space", [DIGITS, SPACES["resnet"]], ids=lambda space: space.name)
def test_a_space_is_drawn_whole(space):
    figure = figures.search_space(space)
    arrows = figure.findobj(FancyArrowPatch)
    assert {arrow.get_gid() for arrow in arrows} == {f"edge-{i}-{j}" for i, j in space.edges}
    assert len(figure.findobj(FancyBboxPatch)) >= space.num_blocks + 1
    found = writing(figure)
    assert [text for text in found if text.isdigit()].count(str(space.last_dim)) >= 1
    for side in {*space.fm_sizes}:
        assert f"{side}²" in found
    for text in (*map(str, space.chs), "stride 1", "stride 2", "final", "stage 0 (stem)"):
        assert text in found
    assert not any(red(arrow) for arrow in arrows) and "derived path" not in found


def test_probable_edges_are_thick_and_the_derived_path_is_red():
    _, _, trace, found = after_a_search(DIGITS)
    path = found[0].path
    figure = figures.search_space(DIGITS, trace[1], path)
    steps = {f"edge-{i}-{j}" for i, j in pairwise(path)}
    arrows = {arrow.get_gid(): arrow for arrow in figure.findobj(FancyArrowPatch)}
    assert {name for name, arrow in arrows.items() if red(arrow)} == steps
    boxes = [box for box in figure.findobj(FancyBboxPatch) if box.get_gid()]
    assert {box.get_gid() for box in boxes if red(box)} == {f"node-{i}" for i in path}
    strength = [box.get_facecolor()[3] for box in boxes]
    assert strength == pytest.approx(visit_probabilities(trace[1]).tolist()) and min(strength) < 0.5
    others = {edge: arrows["edge-{}-{}".format(*edge)] for edge in DIGITS.edges}
    thin = [edge for edge, arrow in others.items() if not red(arrow)]
    thin.sort(key=lambda edge: float(trace[1][edge]))
    widths = [others[edge].get_linewidth() for edge in thin]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_path_probabilities_are_those_of_the_trace():
    _, _, trace, _ = after_a_search(DIGITS)
    figure = figures.path_probabilities(DIGITS, [trace[0], trace[0], trace[1], trace[1]])
    *moments, visits, _ = figure.axes
    assert [axes.get_title() for axes in moments] == [
        "start",
        "after 2 epochs",
        "after 3 epochs",
    ]
    shown = moments[0].collections[0].get_array()
    assert {tuple(edge) for edge in np.argwhere(~np.ma.getmaskarray(shown))} == {*DIGITS.edges}
    for i, j in DIGITS.edges:
        assert shown[i, j] == pytest.approx(float(trace[0][i, j]))
    shares = visits.collections[0].get_array()
    assert shares.shape == (DIGITS.num_blocks, 4) and np.allclose(shares[0], 1)
    assert np.allclose(shares[1], 1 / 3)  # of block 1: one of the three edges that leave the stem


def test_every_candidate_is_named_and_numbered():
    _, moment, _, _ = after_a_search(DIGITS)
    figure = figures.candidates(DIGITS, moment.head, moment.stack, "share")
    head, stack = figure.axes
    found = writing(head)
    assert found.count("0.25") == 4 * len(DIGITS.head_edges)
    assert {"k3\ne6", "k5\ne3", "0→1", "5→6"} <= {*found}
    assert writing(stack).count("0.20") == 5 * 6
    assert {"block 6, layer 1", "skip"} <= {*writing(stack)}
    costs = torch.tensor([[0.0, 50.0, 2.0, 3.0]] * len(DIGITS.head_edges))
    stack_costs = torch.tensor([[1000.0, 1.0, 1.0, 1.0, 0.0]] * 6)
    figure = figures.candidates(DIGITS, costs, stack_costs, "cost", logarithmic=True)
    assert "1e+03" in writing(figure) and "0" not in writing(figure)
    scales = [axes.collections[0].norm for axes in figure.axes]
    assert {(scale.vmin, scale.vmax) for scale in scales} == {(1, 1000)}  # one for both tables


def test_widths_and_block_counts_are_those_of_the_derived_network():
    _, _, trace, found = after_a_search(SPACES["mbv2"])
    arch = found[0].architecture
    figure = figures.block_counts_and_widths(SPACES["mbv2"], [*trace, trace[1]], found)
    left, right = figure.axes
    areas = [patch for patch in right.patches if isinstance(patch, Rectangle)]
    assert [area.get_height() for area in areas] == [block.out_ch for block in arch.routing_blocks]
    assert areas[-1].get_x() + areas[-1].get_width() == arch.num_layers == right.get_xlim()[1]
    widths = [area.get_height() for area in areas]
    assert widths == sorted(widths)
    (line,) = left.lines
    assert [*line.get_xdata()] == [1, 2]
    assert [*line.get_ydata()] == [len(one.architecture.routing_blocks) for one in found]
    stages = max(SPACES["mbv2"].stage[:-1])
    assert {"derived architecture", "stage 1", f"stage {stages}"} <= {*writing(figure)}
    assert "stage 0 (stem)" not in writing(figure)


def test_an_architecture_is_a_row_of_bars_with_its_widths():
    figure = figures.architectures({"DenseNAS-A": DENSENAS_A, "again": DENSENAS_A})
    blocks, layers = len(DENSENAS_A.routing_blocks), DENSENAS_A.num_layers
    found = writing(figure)
    for name in ("DenseNAS-A", "again"):
        assert f"{name}\nblocks: {blocks}, layers: {layers}" in found
    for block in DENSENAS_A.routing_blocks:
        assert str(block.out_ch) in found
    frames = [patch for patch in figure.axes[0].patches if patch.get_height() == 0.92]
    assert len(frames) == 2 * (blocks + 2)  # with the stem's block and the last convolution
    bars = [patch for patch in figure.axes[0].patches if patch.get_width() == 0.9]
    assert len(bars) == 2 * (layers + 2)
    assert {"kernel 3×3", "expansion 6", "1×1 convolution"} <= {*found}


def test_curves_leave_out_what_a_history_lacks():
    history = pd.DataFrame({"epoch": [0, 1, 2], "a": [1.0, 2.0, 3.0], "target_cost": 2.0})
    panels = {
        "left (%)": {"a": "first", "b": "second", "target_cost": "target"},
        "right": {"a": ""},
    }
    figure = figures.curves(history, panels)
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("left (%)", "right")
    assert [text.get_text() for text in left.get_legend().texts] == ["first", "target"]
    assert [*left.lines[0].get_ydata()] == [100, 200, 300]
    assert [*right.lines[0].get_ydata()] == [1, 2, 3]


def test_a_search_is_drawn_from_its_first_epoch_on():
    history = pd.DataFrame({"epoch": [0], "train_top1": [0.1], "train_loss": [2.3]})
    history["expected_cost"], history["derived_cost"] = 1.6, 1.2
    trained_too = "from epoch 1 on alpha and beta are trained too"
    assert trained_too not in writing(figures.search_history(history, "ms"))
    later = pd.concat([history, history.assign(epoch=1, val_top1=0.2, val_loss=2.2)])
    figure = figures.search_history(later.reset_index(drop=True), "ms")
    assert [*figure.axes[0].lines[0].get_ydata()] == [10, 10]
    assert figure.axes[2].get_ylabel() == "cost (ms)"
    assert all({*axes.lines[-1].get_xdata()} == {1} for axes in figure.axes)
    assert trained_too in writing(figure)


def runs(count, **more):
    tops = [50.0 + number for number in range(count)]
    names = [f"run {number}" for number in range(count)]
    costs = [*range(1, count + 1)]
    return pd.DataFrame({"name": names, "group": "digits", "cost": costs, "top1": tops, **more})


def test_one_run_is_a_point_with_its_interval_and_no_front():
    figure = figures.accuracy_against_cost(runs(1, low=40.0, high=55.0), "$ per hour")
    assert {"run 0", "$ per hour", "digits"} <= {*writing(figure)}
    assert "Pareto front" not in writing(figure)
    (bar,) = figure.axes[0].containers
    assert np.allclose(bar.lines[2][0].get_segments()[0], [[1, 40], [1, 55]])


def test_one_searchs_curve_is_its_own_front():
    figure = figures.accuracy_against_cost(runs(3).assign(group="DenseNAS"), "cost")
    assert "DenseNAS" in writing(figure) and "Pareto front" not in writing(figure)


def test_runs_have_their_front_and_a_look_that_does_not_depend_on_missing_costs():
    figure = figures.accuracy_against_cost(runs(3), "cost")
    assert "Pareto front" in writing(figure)
    many = runs(12)
    many["group"] = [f"group {number}" for number in range(12)]  # more than there are colours
    some = many.assign(cost=many["cost"].where(many.index > 5))
    for group in many["group"][6:]:
        looks = set()
        for points in (many, some):
            (axes,) = figures.accuracy_against_cost(points, "cost").axes
            (line,) = [bar.lines[0] for bar in axes.containers if bar.get_label() == group]
            looks.add((str(line.get_color()), line.get_marker()))
        assert len(looks) == 1


def test_panels_share_one_legend():
    points = pd.concat([runs(2, panel="left"), runs(3, panel="right")], ignore_index=True)
    figure = figures.accuracy_against_cost(points, "cost")
    assert [axes.get_title() for axes in figure.axes] == ["left", "right"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["Pareto front", "digits"]


def test_the_pareto_front_is_what_nothing_beats():
    points = pd.DataFrame({"cost": [3, 1, 2, 2, 4], "top1": [60.0, 50.0, 55.0, 56.0, 60.0]})
    assert pareto(points).index.tolist() == [1, 3, 0]


NAMES = [
    "$x^2$",
    "a $ b",
    r"$\nothing$",
    "_hidden",
    "{brace}",
    "100%",
    "猫と犬",
    "🐱",
    "العربية",
    "<b>&",
]


def texts(figure, path):
    """What a reader of the SVG finds, and whoever looks at the PNG."""
    figure.savefig(path.with_suffix(".svg"))
    figure.savefig(path.with_suffix(".png"))
    tree = ElementTree.parse(path.with_suffix(".svg"))
    return [node.text for node in tree.iter() if node.tag.endswith("text")]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_names_are_written_as_they_are(tmp_path):
    points = runs(len(NAMES), name=NAMES)
    found = texts(figures.accuracy_against_cost(points, "$ per hour"), tmp_path / "figure")
    assert {*NAMES, "$ per hour"} <= {*found}
    texts(figures.architectures(dict.fromkeys(NAMES, DENSENAS_A)), tmp_path / "figure")
    groups = {name: [DENSENAS_A] for name in NAMES[:8]}
    found = texts(figures.shapes(groups), tmp_path / "figure")
    assert {f"{name} (n = 1)" for name in groups} <= {*found}
    figure, (axes,) = figures.canvas(4, 3)
    axes.bar(NAMES, 1)
    assert {*NAMES} <= {*texts(figure, tmp_path / "figure")}


def test_long_names_stay_apart():
    long = [f"a name of very many words that only ends in {number}" for number in (1, 2)]
    assert figures.short_names(long) == ["a name o…ds in 1", "a name o…ds in 2"]
    assert figures.short_names(["sixteen letters.", ""]) == ["sixteen letters.", ""]


def test_the_same_data_gives_the_same_svg(tmp_path):
    _, moment, trace, found = after_a_search(DIGITS)
    groups = {name: [one.architecture for one in found] for name in ("DenseNAS", "random")}

    def page(name):
        """Of figures with text, with colours and with what seaborn estimates."""
        for number, figure in enumerate(
            (
                figures.search_space(DIGITS, trace[1], found[0].path),
                figures.candidates(DIGITS, moment.head, moment.stack, "share"),
                figures.accuracy_against_cost(runs(3), "cost"),
                figures.shapes(groups),
            )
        ):
            figure.savefig(tmp_path / f"{name} {number}.svg", metadata={"Date": None})
            yield (tmp_path / f"{name} {number}.svg").read_bytes()

    assert [*page("first")] == [*page("second")]
