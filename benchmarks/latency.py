"""Is a sum of measured ops the latency of a network? Measures every op of a space, then 30 random networks as a whole.

    python benchmarks/latency.py mbv2

The result, with time, hardware and versions, goes to benchmarks/results/latency-<space>-<device>.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from densenas import SearchSpace, latency
from densenas.runs.provenance import environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("space", help="preset or YAML file")
    parser.add_argument("--networks", type=int, default=30)
    options = parser.parse_args()
    space = SearchSpace.load(options.space)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        table = latency.measure(space, space.input_size, 1000, Path(folder) / "latency.jsonl")
        seconds = time.perf_counter() - start
    frame = latency.judge(table, options.networks)
    result = {
        "space": space.name,
        "ops": len(table.conditions["entries"]),
        "seconds": seconds,
        **latency.agreement(frame),
        "fastest_ms": frame["measured"].min(),
        "slowest_ms": frame["measured"].max(),
        **environment(),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(__file__).parent / "results" / f"latency-{space.name}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        "{ops} ops in {seconds:.0f} s; {networks} networks: rank correlation {spearman:.3f}, "
        "mean error {error:.1f} %, times one factor {error_corrected:.1f} %".format(**result)
    )


if __name__ == "__main__":
    main()
