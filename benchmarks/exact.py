"""A case small enough to know the truth: does a search choose the best of a few dozen networks of equal cost?

    python benchmarks/exact.py            # twenty minutes on one thread

The space is cut out of the digits' one: four routing blocks, two ops a layer, 16 pixels. Every network of it within 3 %
of the target is trained alone to the end with two seeds; its mean accuracy on test is the truth. Then each way of
searching, published and sampled, searches for that target with five seeds. What counts is the rank of the network
that it chose among all of them, beside 1/2 by chance, and how many points it lies below the best. The best of
many means is too high by chance: beside it stands how well the two seeds agree.

Results go to benchmarks/results/exact-cpu.json.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from tqdm import tqdm

from densenas import Architecture, CostTable, SearchSpace
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
    """Nine paths over four routing blocks."""
    whole = SearchSpace.load("digits").model_dump()
    return SearchSpace(
        **whole
        | {
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
    )


def networks(table: CostTable, target: float) -> list[str]:
    """All of the space within 3 % of the target: drawn until none is new."""
    low, high = (1 - WITHIN) * target, (1 + WITHIN) * target
    drawn = Lattice(table).sample(20_000, 0, low, high)
    return sorted({str(candidate.architecture) for candidate in drawn})


def accuracies(data: ImageData, table: CostTable, texts: list[str]) -> dict[str, list[float]]:
    """Of each network, trained alone, on test; a number for each seed."""
    recipe, found = table.space.retrain, {}
    for text in tqdm(texts, "networks"):
        found[text] = []
        for seed in range(TRAININGS):
            with tempfile.TemporaryDirectory() as folder, quiet():
                how = Computing(seed=seed, device="cpu")
                arch = Architecture.parse(text)
                row = train_alone(Run("alone", Path(folder)), data, arch, recipe, how)
            found[text].append(row[f"top1_{recipe.epochs}"])
    return found


def choices(data: ImageData, table: CostTable, target: float, way: str) -> list[str]:
    """What a way of searching chooses, a network for each seed."""
    recipe, found = override(table.space.search, **WAYS[way]), []
    for seed in tqdm(range(SEARCHES), way):
        with tempfile.TemporaryDirectory() as folder, quiet():
            how = Computing(seed=seed, device="cpu")
            result = search(Run("search", Path(folder)), data, table, recipe, target, how)
        found.append(str(result.best.architecture))
    return found


def main() -> None:
    space = small_space()
    table = CostTable.mult_adds(space, SIZE, 10)
    target = Lattice(table).quantile(0.5)
    texts = networks(table, target)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Run("exact", Path(folder)), DataSettings(image_size=SIZE))
        truth = accuracies(data, table, texts)
        chosen = {way: choices(data, table, target, way) for way in WAYS}
    tops = np.array([truth[text] for text in texts])
    agreement = np.corrcoef(tops.T)[np.triu_indices(TRAININGS, 1)].mean()
    mean = dict(zip(texts, tops.mean(axis=1), strict=True))
    rows = []
    for way, found in chosen.items():
        for seed, text in enumerate(found):
            above = np.mean([top > mean[text] for top in mean.values()])
            below = 100 * (max(mean.values()) - mean[text])
            rows.append(
                {
                    "way": way,
                    "seed": seed,
                    "net_config": text,
                    "share_above": above,
                    "points_below_best": below,
                }
            )
        ours = [row for row in rows if row["way"] == way]
        shares, points = (
            [row[name] for row in ours] for name in ("share_above", "points_below_best")
        )
        print(
            f"{way}: {np.mean(shares):.0%} of the networks are better ({min(shares):.0%} to {max(shares):.0%}),"
            f" {np.mean(points):.1f} points below the best, n = {len(ours)}"
        )
    spread = 100 * np.array([*mean.values()])
    print(
        f"{len(texts)} networks, {spread.min():.1f} to {spread.max():.1f} %, mean {spread.mean():.1f};"
        f" correlation of two seeds {agreement:.2f}"
    )
    content = {"target": target, "truth": truth, "searches": rows, "seed_correlation": agreement}
    RESULTS.write_text(json.dumps({**content, **environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
