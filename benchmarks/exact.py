"""A case small enough to know the truth: does a search choose the best of a few dozen networks of equal cost?

    python benchmarks/exact.py            # half an hour on one thread
    python benchmarks/exact.py --table    # what the results say

The space is cut out of the digits' one: four routing blocks, two ops a layer, images of 16 pixels. Every network of it
within 3 % of the median cost is trained alone to the end with two seeds; its mean accuracy on test is the truth. Then
each way of searching, published and sampled, searches for that cost with five seeds. What counts is how many of all
networks are better than the one chosen (half of them by chance), and by how many points of accuracy the best is. The
best of many means is too high by chance, so how well the two seeds agree stands beside it.

Results go to benchmarks/results/exact-cpu.json, each as soon as it is known; what is there is not computed again.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from tqdm import tqdm

from densenas import Architecture, CostTable, SearchSpace
from densenas.files import write_text
from densenas.images.data import ImageData
from densenas.images.prepare import prepare
from densenas.method.derivation import Lattice
from densenas.recipes import override
from densenas.runs.progress import quiet
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.search import search
from densenas.settings import Computing, DataSettings
from densenas.train import train_alone

RESULTS = Path(__file__).parent / "results" / "exact-cpu.json"
SIZE = 16  # pixels
WITHIN = 0.03  # of the target, as far as a search may miss it
TRAININGS = 2  # seeds of each network
SEARCHES = 5  # seeds of each way
WAYS: dict[str, dict[str, Any]] = {
    "published": {"paths": "all", "weights": "own"},
    "sampled": {"paths": "sampled", "weights": "shared"},
}


def small_space() -> SearchSpace:
    """Four routing blocks of two widths a stage, the first of which may be left out."""
    whole = SearchSpace.load("digits").model_dump()
    small = {
        "name": "exact",
        "input_size": SIZE,
        "chs": [8, 8, 12, 16, 24],
        "fm_sizes": [8, 4, 4, 2, 2],
        "stage": [0, 1, 1, 2, 2, 3],
        "num_layers": [0, 0, 1, 1, 1],
        "last_dim": 64,
        "head_ops": ["mbconv_k3_t3", "mbconv_k3_t6"],
        "stack_ops": ["mbconv_k3_t3", "skip_connect"],
    }
    return SearchSpace(**{**whole, **small})


def networks(table: CostTable, target: float) -> list[str]:
    """All of the space within 3 % of the target."""
    everything = Lattice(table).best(100_000)
    near = [one for one in everything if abs(one.cost / target - 1) <= WITHIN]
    return sorted(str(candidate.architecture) for candidate in near)


def trained(data: ImageData, table: CostTable, text: str, seed: int) -> float:
    """The accuracy on test of a network trained alone."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        how = Computing(seed=seed, device="cpu")
        arch = Architecture.parse(text)
        row = train_alone(Run("alone", Path(folder)), data, arch, table.space.retrain, how)
    return row[f"top1_{table.space.retrain.epochs}"]


def chosen(data: ImageData, table: CostTable, target: float, way: str, seed: int) -> str:
    """The network that a search derives."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        how = Computing(seed=seed, device="cpu")
        recipe = override(table.space.search, **WAYS[way])
        result = search(Run("search", Path(folder)), data, table, recipe, target, how)
    return str(result.best.architecture)


def compute(results: dict[str, Any]) -> None:
    """Fills in what is not known yet."""
    table = CostTable.mult_adds(small_space(), SIZE, 10)
    target = Lattice(table).quantile(0.5)
    texts = networks(table, target)
    results |= {"target": target, "space": table.space.model_dump(mode="json"), **environment()}

    def keep() -> None:
        write_text(RESULTS, json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Run("exact", Path(folder)), DataSettings(image_size=SIZE))
        for way in WAYS:
            found = results["chosen"].setdefault(way, [])
            for seed in tqdm(range(len(found), SEARCHES), way):
                found.append(chosen(data, table, target, way, seed))
                keep()
        for text in tqdm(texts, "networks"):
            accuracies = results["truth"].setdefault(text, [])
            for seed in range(len(accuracies), TRAININGS):
                accuracies.append(trained(data, table, text, seed))
                keep()


def table(results: dict[str, Any]) -> str:
    """What the searches chose, beside the truth."""
    tops = 100 * np.array([*results["truth"].values()])
    mean = dict(zip(results["truth"], tops.mean(axis=1), strict=True))
    everyone = np.array([*mean.values()])
    agreement = np.corrcoef(tops.T)[0, 1]
    lines = [
        f"{len(mean)} networks of {results['target']:.3f} M Mult-Adds, {everyone.min():.1f} to"
        f" {everyone.max():.1f} % on test, mean {everyone.mean():.1f}; correlation of two seeds {agreement:.2f}"
    ]
    for way, texts in results["chosen"].items():
        ours = np.array([mean[text] for text in texts])
        better = 100 * (everyone > ours[:, None]).mean(axis=1)
        below = everyone.max() - ours
        lines.append(
            f"{way}: {better.mean():.0f} % of the networks are better ({better.min():.0f} to {better.max():.0f}),"
            f" the best by {below.mean():.1f} points ({below.min():.1f} to {below.max():.1f});"
            f" {len({*texts})} different ones in {len(texts)} searches, {ours.mean():.1f} %"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {"truth": {}, "chosen": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    if not options.table:
        compute(results)
    print(table(results))


if __name__ == "__main__":
    main()
