"""DenseNAS: search a network's block counts and block widths.

The data's way: space → cost → supernet → search → architecture → training → figures.
"""

import densenas.threads  # noqa: F401 (before PyTorch is loaded)
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.space import SearchSpace
from densenas.method.supernet import Choice, SuperNet
from densenas.published import load_published

__all__ = ["Architecture", "Choice", "CostTable", "SearchSpace", "SuperNet", "load_published"]
