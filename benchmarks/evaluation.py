"""Would a search find better networks if it derived them by evaluation instead of by probability?

    python benchmarks/evaluation.py cifar10 data/configs/cifar10-cpu.yml sampled

RUN is a run with a study (`make evidence`) and with networks that were trained for long (reports/RUN/truth.csv). For
each search of the way, all networks of that table within 3.5 % of its target are evaluated on val as paths of its
supernet. The best of them by that is what an evaluation would have derived from so many candidates; it is set beside
what the search derived, both by their accuracy on test when trained alone. Also printed: how the paths order them.

Results go to benchmarks/results/evaluation-cpu.json, a row for each search.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from tqdm import tqdm
from truth import alone

from densenas import Architecture
from densenas.evidence import configured
from densenas.files import write_text
from densenas.judge import Judge
from densenas.method.supernet import Choice
from densenas.outcome import load_search
from densenas.runs.provenance import environment
from densenas.truth import Truth
from densenas.verdict import SEARCHED

RESULTS = Path(__file__).parent / "results" / "evaluation-cpu.json"
NEAR = 0.035  # of the target, a little more than a search may miss it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("configuration", help="the study's YAML file")
    parser.add_argument("way", help="of searching, as the study calls it")
    options = parser.parse_args()
    study = configured(options.configuration, options.run)
    truth = alone(Truth(study.run).rows()).set_index("net_config")
    judge = Judge(study.data, 256, torch.device("cpu"))
    jobs = [job for job in study.jobs() if job.method == SEARCHED and job.way == options.way]
    rows = []
    for job in tqdm(jobs, "searches"):
        found = load_search(study.folder(job), study.table, len(study.data.classes))
        near = truth["accuracy"][(truth["mult_adds_m"] / job.target - 1).abs() <= NEAR]
        choices = [Choice.of(found.net.space, Architecture.parse(text)) for text in near.index]
        paths = [judge.top1(found.net, choice) for choice in choices]
        table = pd.DataFrame({"path": paths, "alone": near})
        derived, picked = str(found.best.architecture), table["path"].idxmax()
        rows.append(
            {
                "target": job.target,
                "seed": job.number,
                "candidates": len(table),
                "spearman": table["path"].rank().corr(table["alone"].rank()),
                "derived_top1": truth["accuracy"].get(derived),
                "evaluated_top1": near[picked],
                "same": derived == picked,
                "best_top1": near.max(),
            }
        )
    results = pd.DataFrame(rows)
    print(results.round(3).to_string(index=False))
    gain = 100 * (results["evaluated_top1"] - results["derived_top1"])
    print(
        f"gain of evaluation: {gain.mean():+.2f} points ({gain.min():+.2f} to {gain.max():+.2f}), n = {len(gain)}"
    )
    content = {"searches": json.loads(results.to_json(orient="records")), **environment()}
    write_text(RESULTS, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
