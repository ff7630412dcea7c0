"""DenseNAS: search a network's block counts and block widths.

The data's way: space → cost → supernet → search → architecture → training → figures.
"""

from densenas.architecture import Architecture, load_published
from densenas.cost import CostTable
from densenas.space import SearchSpace
from densenas.supernet import Choice, SuperNet

__all__ = ["Architecture", "Choice", "CostTable", "SearchSpace", "SuperNet", "load_published"]
