"""Notebooks read as short papers, and every cell can be run again."""

import ast
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))


def assigned(cell):
    """Names that a cell's code gives a value to."""
    nodes = ast.walk(ast.parse(cell.source))
    return {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_leave_the_parameters_alone(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    parameters, work = [], []
    for cell in cells:
        group = parameters if "parameters" in cell.metadata.get("tags", []) else work
        group.append(cell)
    for cell in work:
        assert len(cell.source.splitlines()) <= 15, cell.source
        for given in parameters:
            assert not assigned(cell) & assigned(given), cell.source
