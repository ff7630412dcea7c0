"""Does the default run decide, whatever its seed? The digits searched and trained as data/configs/digits.yml has it.

    python benchmarks/seeds.py            # five seeds, one thread: five minutes

For each seed: how far the supernet knows the network that it derives (`path_top1`, on val), how decided alpha and beta
are (entropies, shares of the highest possible), what the network costs, and what it reaches on test, trained alone.
Results go to benchmarks/results/seeds-cpu.json.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
from tqdm import tqdm

from densenas import CostTable, SearchSpace
from densenas.files import write_text
from densenas.images.prepare import prepare
from densenas.runs.progress import quiet
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import Computing, DataSettings
from densenas.train import evaluate, retrain

RESULTS = Path(__file__).parent / "results" / "seeds-cpu.json"
TARGET = 1.0  # million Mult-Adds, of data/configs/digits.yml


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    space = SearchSpace.load("digits")
    rows = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        data = prepare(Run("data", Path(folder)), DataSettings())
        table = CostTable.mult_adds(space, data.image_size, len(data.classes))
        for seed in tqdm(range(options.seeds), "seeds"):
            run, how = Run(f"seed-{seed}", Path(folder)), Computing(seed=seed, device="cpu")
            found = search(run, data, table, space.search, TARGET, how)
            arch = found.best.architecture
            net, _ = retrain(run, data, arch, space.retrain, how)
            last = found.history[-1]
            entropies = {name: last[name] for name in ("alpha_entropy", "beta_entropy")}
            rows.append(
                {
                    "seed": seed,
                    "net_config": str(arch),
                    "layers": arch.num_layers,
                    "cost": found.best.cost,
                    "gap": found.best.cost / TARGET - 1,
                    "path_top1": last["path_top1"],
                    **entropies,
                    "test_top1": evaluate(net, data, device="cpu")["top1"],
                    "search_seconds": sum(float(row["seconds"]) for row in found.history),
                }
            )
    print(pd.DataFrame(rows).drop(columns="net_config").round(4).to_string(index=False))
    content = {"target": TARGET, "seeds": rows, **environment()}
    write_text(RESULTS, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
