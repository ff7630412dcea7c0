"""Figures of the largest space and of the smallest: they are drawn without a warning, and nothing is cut off."""

from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
from helpers import make_space
from matplotlib.text import Text

from densenas import Architecture, CostTable, SearchSpace, figures
from densenas.explore import undecided
from densenas.method.derivation import Lattice

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
SPACES = {"one block": ONE_BLOCK} | {
    name: SearchSpace.load(name) for name in ("mbv2", "resnet", "bottleneck")
}


def test_the_largest_space_is_among_them():
    assert max(space.count_paths() for space in SPACES.values()) == 540225


def drawn(space):
    """Every figure of a space, undecided and with something derived."""
    table = CostTable.mult_adds(space, space.input_size, 10)
    moment = undecided(table)
    found = Lattice(table, moment).best(2)
    sharp = torch.where(moment.p > 0, moment.p**2, moment.p)
    trace = [moment.p, sharp / sharp.sum(dim=1, keepdim=True)]
    yield figures.search_space(space)
    yield figures.search_space(space, trace[1], found[0].path)
    yield figures.path_probabilities(space, trace[:1])
    yield figures.path_probabilities(space, [*trace, trace[1]])
    yield figures.operation_probabilities(space, moment.head, moment.stack)
    yield figures.cost_table(table)
    yield figures.block_counts_and_widths(space, trace, found[:1])
    yield figures.architectures(
        {f"number {number}": one.architecture for number, one in enumerate(found)}
    )
    yield figures.shapes({"DenseNAS": [one.architecture for one in found]})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SPACES)
def test_figures_fit_their_canvas(name):
    for figure in drawn(SPACES[name]):
        figure.draw_without_rendering()
        assert not [
            text for text in figure.findobj(Text) if "$" in text.get_text()
        ]  # of a formatter
        box, size = figure.get_tightbbox(), figure.get_size_inches()  # in inches
        assert box.x0 > -0.05 and box.y0 > -0.05 and (box.max < size + 0.05).all(), (box, size)


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
LONG = [f"a name of very many words that only ends in {number}" for number in (1, 2)]


def named(names):
    """Every figure in which names from outside are written, and the names that each shows."""
    count = len(names)
    numbers = [[9] * count] * count
    network = Architecture.named("DenseNAS-A")
    points = pd.DataFrame(
        {"name": names, "group": "DenseNAS", "cost": range(1, count + 1), "top1": 50.0}
    )
    yield figures.class_counts({"train": [9] * count}, names), names
    yield figures.confusion(numbers, names), names[:: -(-count // 20)]
    yield figures.image_grid(torch.rand(count, 3, 8, 8), names), names
    yield figures.accuracy_against_cost(points, "$ per hour"), [*names, "$ per hour"]
    yield figures.architectures(dict.fromkeys(names, network)), []
    yield (
        figures.shapes({name: [network] for name in names[:8]}),
        [f"{name} (n = 1)" for name in names[:8]],
    )


def texts(figure, path):
    """What a reader of the SVG finds, and whoever looks at the PNG."""
    figure.savefig(path.with_suffix(".svg"))
    figure.savefig(path.with_suffix(".png"))
    return [
        node.text
        for node in ElementTree.parse(path.with_suffix(".svg")).iter()
        if node.tag.endswith("text")
    ]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_names_are_written_as_they_are(tmp_path):
    for figure, names in named(NAMES):
        found = texts(figure, tmp_path / "figure")
        assert not [name for name in names if name not in found]


def test_long_names_stay_apart(tmp_path):
    for figure in (
        figures.class_counts({"train": [1, 2]}, LONG),
        figures.confusion([[1, 2], [3, 4]], LONG),
    ):
        assert {"a name o…ds in 1", "a name o…ds in 2"} <= {*texts(figure, tmp_path / "figure")}


def test_a_thousand_classes(tmp_path):
    names = [f"$class {number}$" for number in range(1000)]
    found = texts(figures.confusion([[0, 2] * 500] * 1000, names), tmp_path / "confusion")
    assert {name for name in names if name in found} == {*names[::50]}
    assert "2" in found  # at the colour bar, and no formula
    assert not [text for text in found if "math" in text]
    found = texts(figures.class_counts({"train": [*range(1000)]}, names), tmp_path / "counts")
    assert not [text for text in found if "$" in text]
