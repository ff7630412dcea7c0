"""DenseNAS: search a network's block counts and block widths.

The data's way: space → cost → supernet → search → architecture → training → figures.
"""

import os

# oneDNN keeps 1,024 compiled convolutions; the steps of a supernet need more and would compile some of them every time.
# Read before the first convolution.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

from densenas.architecture import Architecture, load_published
from densenas.cost import CostTable
from densenas.space import SearchSpace
from densenas.supernet import Choice, SuperNet

__all__ = ["Architecture", "Choice", "CostTable", "SearchSpace", "SuperNet", "load_published"]
