"""How much memory a process had at most."""

import re
import resource
from pathlib import Path


def peak_gib() -> float:
    """Of this process. Where the system keeps it, not `ru_maxrss`: that knows the process which started it, too."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
