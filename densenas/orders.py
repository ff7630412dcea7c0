"""Which networks a supernet thinks better, beside what orders them without one and how they did when trained alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from densenas.images.data import ImageData
from densenas.method.architecture import Architecture
from densenas.method.supernet import SuperNet
from densenas.ranking import PathOf, synaptic_flow
from densenas.runs.progress import quiet
from densenas.train import evaluate
from densenas.verdict import MATCHED, RANDOM, path_in

EARLY = (2, 5, 10, 20)  # epochs after which the order is looked at


def ranked(
    supernets: Mapping[str, SuperNet],
    results: pd.DataFrame,
    data: ImageData,
    device: str = "auto",
    truth: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The random networks of a study, of any depth and of the searched ones', by `target` and `accuracy` on test.

    A column for each score that may order them: accuracy on val as a path of each way's supernet, those that need none
    (`scores`), and accuracies of longer trainings where the rows of `truth` have them, nan where they do not.
    """
    drawn = results[results["method"].isin([RANDOM, MATCHED])].drop_duplicates("net_config")
    table = pd.DataFrame({"target": drawn["target"], "accuracy": drawn["top1"]})
    for way, net in supernets.items():
        with quiet():
            paths = [PathOf(net, Architecture.parse(text)) for text in drawn["net_config"]]
            judged = [evaluate(path, data, "val", device=device)["top1"] for path in paths]
        table[path_in(way)] = judged
    table = table.join(scores(drawn, data.image_size, len(data.classes)))
    if truth is not None:
        longer = truth[(truth["epochs"] > drawn["epochs"].max()) & (truth["seed"] == 0)]
        for epochs, rows in longer.groupby("epochs"):
            top1 = rows.drop_duplicates("net_config").set_index("net_config")[f"top1_{epochs}"]
            table[f"trained for {epochs} epochs"] = drawn["net_config"].map(top1)
    return table


def scores(networks: pd.DataFrame, input_size: int, num_classes: int) -> pd.DataFrame:
    """What any ranking is beside, a column each: scores of trained networks (rows of a study's results) that need no
    supernet, and their accuracies after fewer epochs than they were trained for.
    """
    flows = []
    for text in networks["net_config"]:
        flows.append(synaptic_flow(Architecture.parse(text), input_size, num_classes))
    columns = {"layers": "layers", "Mult-Adds": "mult_adds_m", "parameters": "params_m"}
    table = pd.DataFrame({name: networks[column] for name, column in columns.items()})
    table["synaptic flow"] = flows
    for epoch in EARLY:
        if f"top1_{epoch}" in networks and epoch < networks["epochs"].max():
            table[f"accuracy after {epoch} epochs"] = networks[f"top1_{epoch}"]
    return table
