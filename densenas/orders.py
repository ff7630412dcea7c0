"""How well scores order networks, a supernet's and those that need none, against accuracy after training alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn

from densenas.correlations import noise_ceiling, rankings
from densenas.images.data import ImageData
from densenas.judge import Judge
from densenas.method.architecture import Architecture
from densenas.method.supernet import Choice
from densenas.outcome import Search
from densenas.settings import Computing
from densenas.training.device import computing_on
from densenas.verdict import ANY_DEPTH, MATCHED, RANDOM, SEARCHED_DEPTH, path_in

EARLY = (2, 5, 10, 20)  # epochs after which the order is looked at


def ranked(
    searches: Mapping[str, Search], results: pd.DataFrame, data: ImageData, device: str = "auto"
) -> pd.DataFrame:
    """The random networks of a study by `kind` (`RANDOM`, `MATCHED`), `target` and `accuracy` on test.

    A column for each score that may order them: accuracy on val as a path of the supernet of each way's search, and
    those that need none (`scores`).
    """
    drawn = results[results["method"].isin([RANDOM, MATCHED])].drop_duplicates("net_config")
    table = drawn[["method", "target", "top1"]].set_axis(["kind", "target", "accuracy"], axis=1)
    for way, found in searches.items():
        net, recipe = found.net, found.configuration["recipe"]
        archs = map(Architecture.parse, drawn["net_config"])
        with computing_on(Computing(device=device)) as where:
            judge = Judge(data, recipe["batch_size"], where)
            net.to(where)
            table[path_in(way)] = [judge.top1(net, Choice.of(net.space, arch)) for arch in archs]
    return table.join(scores(drawn, data.image_size, len(data.classes)))


def orders(networks: pd.DataFrame, trainings: pd.DataFrame) -> pd.DataFrame:
    """`rankings` of what was `ranked`, with their `noise_ceiling`: of networks of any depth, of those as deep as the
    searched ones, and of both kinds, which a score may order by telling the kinds apart.
    """
    kinds = {ANY_DEPTH: [RANDOM], SEARCHED_DEPTH: [MATCHED], "of both kinds": [RANDOM, MATCHED]}
    found = {}
    for name, kind in kinds.items():
        rows = networks[networks["kind"].isin(kind)].drop(columns="kind")
        if len(rows):
            found[name] = pd.concat([rankings(rows), noise_ceiling(rows, trainings)])
    return pd.concat(found, names=["networks"])


def longer(truth: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """`rankings` of accuracies during a training of so many epochs, with those of the longest one in the table.

    Of the networks that both trained with seed 0, searched ones among them.
    """
    rows = truth[truth["seed"] == 0].drop_duplicates(["net_config", "epochs"])
    longest = rows["epochs"].max()
    final = rows[rows["epochs"] == longest].set_index("net_config")
    table = pd.DataFrame({"target": final["target"], "accuracy": final[f"top1_{longest}"]})
    short = rows[rows["epochs"] == epochs].set_index("net_config")
    for epoch in EARLY:
        if f"top1_{epoch}" in short:
            table[f"after {epoch} of {epochs} epochs"] = short[f"top1_{epoch}"]
    return rankings(table)


def scores(networks: pd.DataFrame, input_size: int, num_classes: int) -> pd.DataFrame:
    """What any ranking is beside, a column each: scores of trained networks (rows of a study's results) that need no
    supernet, and their accuracies after fewer epochs than they were trained for.
    """
    archs = map(Architecture.parse, networks["net_config"])
    flows = [synaptic_flow(arch, input_size, num_classes) for arch in archs]
    columns = {"layers": "layers", "Mult-Adds": "mult_adds_m", "parameters": "params_m"}
    table = pd.DataFrame({name: networks[column] for name, column in columns.items()})
    table["synaptic flow"] = flows
    for epoch in EARLY:
        if f"top1_{epoch}" in networks and epoch < networks["epochs"].max():
            table[f"accuracy after {epoch} epochs"] = networks[f"top1_{epoch}"]
    return table


def synaptic_flow(arch: Architecture, input_size: int, num_classes: int) -> float:
    """The logarithm of the synaptic flow of a network that has seen no image (Tanaka et al., 2020).

    All weights of a new network are made positive and an image of ones is sent through; the score is the sum over all
    weights of weight · gradient of the summed logits. Batch norm of a new network in evaluation mode passes everything
    on; ReLU6 would cut the flow off, so ReLU takes its place.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = arch.build(num_classes).double().eval()
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    with torch.no_grad():
        for weight in net.parameters():
            weight.abs_()
    image = torch.ones(1, 3, input_size, input_size, dtype=torch.float64)
    net(image).sum().backward()
    flow = torch.zeros((), dtype=torch.float64)
    for weight in net.parameters():
        if weight.grad is not None:
            flow += (weight.detach() * weight.grad).sum()
    return float(flow.log())
