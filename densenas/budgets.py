"""The network at a budget, trained alone: one search gives a curve of accuracy against cost.

`python -m densenas.budgets CONFIGURATION RUN BUDGET` does one budget of a run, as Snakemake and a cluster start it.
"""

from __future__ import annotations

import argparse

from densenas.costs import read_costs
from densenas.identity import derived_at
from densenas.images.data import load
from densenas.judge import Judge
from densenas.method.derivation import Lattice
from densenas.method.supernet import Choice
from densenas.outcome import load_search
from densenas.runs.run import Run
from densenas.settings import EvaluateSettings, RetrainSettings, RunConfig
from densenas.train import evaluate_run, retrain_run
from densenas.training.device import computing_on
from densenas.training.processes import exiting, launch


def train_budget(run: Run, settings: RetrainSettings, budget: float) -> None:
    """Trains the network that 04-derive kept for a budget, and tests it once, as 05 and 06 do with the run's own.

    Goes on after a kill. Weights go to runs/<run>/budgets/<cost>/model, results to reports/<run>/budgets/<cost>/, with
    the accuracy on val that the network has as a path of the supernet. Raises FileNotFoundError or ValueError with one
    sentence.
    """
    network = derived_at(run, budget)["net_config"]
    settings = settings.model_copy(update={"net_config": network})
    launch(retrain_run, settings.devices, settings.device, run.name, settings, budget)
    evaluate_run(run, EvaluateSettings(device=settings.device), budget)
    data = load(run)
    result = load_search(run, read_costs(run), len(data.classes))
    path = Choice.of(result.net.space, Lattice(result.table, result.trace[-1]).at(budget))
    with computing_on(settings.computing()) as device:
        judge = Judge(data, result.configuration["recipe"]["batch_size"], device)
        top1 = judge.top1(result.net.to(device), path)
    run.budget(budget).update_json("metrics.json", "supernet", {"path_top1": top1})


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m densenas.budgets", description="Trains and tests the network at one budget."
    )
    parser.add_argument(
        "configuration", help="the run's YAML file, with budgets in its section derive"
    )
    parser.add_argument("run", help="name of the run, whose 04-derive is done")
    parser.add_argument("budget", type=float, help="one of its budgets")
    asked = parser.parse_args()
    with exiting():
        config = RunConfig.load(asked.configuration)
        train_budget(Run(asked.run), config.retrain, asked.budget)


if __name__ == "__main__":
    main()
