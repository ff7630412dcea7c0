"""What PyTorch's threads read from the environment when it is loaded; the package imports this first."""

import os
import sys

# OpenMP threads that spin for long while they wait make small networks many times slower as soon
# as something else wants a core; this short a spin costs nothing on a quiet machine, a shorter one
# does. Where PyTorch was loaded before, it is too late for this process, and its training says so.
_CHOSEN = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
SPINS_FOR_LONG = "torch" in sys.modules and not _CHOSEN
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# oneDNN keeps 1,024 compiled convolutions; the steps of a supernet need more and would compile
# some of them every time. Read before the first convolution.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


def cores() -> int:
    """Processor cores that this process may use; where the system keeps no such account, as macOS, all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
