"""Figures of the largest space and of the smallest: they are drawn without a warning, and nothing is cut off."""

import pytest
import torch
from helpers import make_space

from densenas import CostTable, SearchSpace, figures
from densenas.derivation import Lattice
from densenas.explore import undecided

OPS = ["mbconv_k3_t3", "mbconv_k7_t6"]
ONE_BLOCK = make_space(
    init_dim=8, chs=[8, 16], fm_sizes=[16, 8], stage=[0, 1, 1], num_layers=[0, 1], head_ops=OPS, stack_ops=OPS
)
SPACES = {"one block": ONE_BLOCK} | {name: SearchSpace.load(name) for name in ("mbv2", "resnet", "bottleneck")}


def test_the_largest_space_is_among_them():
    assert max(space.count_paths() for space in SPACES.values()) == 540225


def drawn(space):
    """Every figure of a space, undecided and with something derived."""
    table = CostTable.mult_adds(space, space.input_size, 10)
    moment = undecided(table)
    found = Lattice(table, moment.p, moment.head, moment.stack).best(2)
    sharp = torch.where(moment.p > 0, moment.p**2, moment.p)
    trace = [moment.p, sharp / sharp.sum(dim=1, keepdim=True)]
    yield figures.search_space(space)
    yield figures.search_space(space, trace[1], found[0].path)
    yield figures.path_probabilities(space, trace[:1])
    yield figures.path_probabilities(space, [*trace, trace[1]])
    yield figures.operation_probabilities(space, moment.head, moment.stack)
    yield figures.cost_table(table)
    yield figures.block_counts_and_widths(space, trace, found[:1])
    yield figures.architectures({f"number {number}": one.architecture for number, one in enumerate(found)})
    yield figures.shapes({"DenseNAS": [one.architecture for one in found]})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SPACES)
def test_figures_fit_their_canvas(name):
    for figure in drawn(SPACES[name]):
        figure.draw_without_rendering()
        box, size = figure.get_tightbbox(), figure.get_size_inches()  # in inches
        assert box.x0 > -0.05 and box.y0 > -0.05 and (box.max < size + 0.05).all(), (box, size)
