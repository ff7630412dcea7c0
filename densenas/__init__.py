"""DenseNAS: search a network's block counts and block widths.

Two wings: `method` (space → cost → supernet → derivation) is the paper, and knows no run, image or figure; `runs`,
`images` and `training` are a laboratory that keeps, feeds and trains what it is given, and knows no alpha and no beta.
They meet in `search` and `train`; `evidence`, `figures` and `report` say what came out.
"""

import densenas.threads  # noqa: F401 (before PyTorch is loaded)
from densenas.method.architecture import Architecture
from densenas.method.cost import CostTable
from densenas.method.space import SearchSpace
from densenas.method.supernet import Choice, SuperNet
from densenas.published import load_published

__all__ = ["Architecture", "Choice", "CostTable", "SearchSpace", "SuperNet", "load_published"]
