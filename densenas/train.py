"""Training a network from scratch, and measuring one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from densenas import identity
from densenas.export import export
from densenas.images.data import ImageData, load
from densenas.images.loading import Batches, rank_and_world
from densenas.method.architecture import Architecture
from densenas.networks import (
    check_network,
    code_digest,
    is_code,
    load_network,
    model_folder,
    network,
    save_network,
)
from densenas.pricing import read_costs
from densenas.recipes import RetrainRecipe, override
from densenas.runs.run import Run, progress
from densenas.settings import EvaluateSettings
from densenas.training.device import computing_on
from densenas.training.engine import (
    Pass,
    alone,
    check_training,
    cosine,
    descend,
    fit,
    fused_sgd,
)


def size(net: nn.Module, input_size: int) -> dict[str, float]:
    """Mult-Adds for one square image (convolutions and linear layers, no biases) and parameters, in millions."""
    net.eval()
    first = next(net.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(first.new_zeros(1, 3, input_size, input_size))
    params = sum(parameter.numel() for parameter in net.parameters())
    return {"mult_adds_m": counter.get_total_flops() / 2e6, "params_m": params / 1e6}


def retrain(
    run: Run,
    data: ImageData,
    model: str | Architecture,
    recipe: RetrainRecipe,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
    deterministic: bool = False,
    started: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains `model` (see `network`) from scratch on all training images; returns it with one history row an epoch.

    A killed training goes on when called again (`fit`). The test split is looked at once, by
    `evaluate`. `started` is called when nothing was refused, before the first step. Raises
    ValueError with one sentence.
    """
    images = len(data.train) + len(data.val)
    check_training(seed, recipe.batch_size, {"train with val": images})
    with computing_on(device, precision, deterministic) as where:
        check_network(str(model), len(data.classes), data.image_size)
        configuration = {
            "model": str(model),
            "recipe": recipe.model_dump(mode="json"),
            "data": data.digest,
            "seed": seed,
            "precision": precision,
            "device": where.type,
        }
        torch.manual_seed(seed)
        net = network(str(model), len(data.classes)).to(where, memory_format=torch.channels_last)
        if is_code(str(model)):
            configuration["code"] = code_digest(str(model), net)
        weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
        batches = Batches(data, ("train", "val"), recipe.batch_size, where, seed)
        sgd = fused_sgd(weights, recipe)
        warmup = round(recipe.warmup_epochs * len(batches))
        schedule = cosine(sgd, recipe.epochs * len(batches), recipe.lr_min, warmup)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = net(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            sgd.zero_grad()
            outcome = descend(loss, logits, labels, weights)
            if recipe.grad_clip:
                nn.utils.clip_grad_norm_(weights, recipe.grad_clip)
            sgd.step()
            schedule.step()
            return outcome

        net.train()
        started()
        parts = {"net": net, "sgd": sgd, "schedule": schedule}
        one_pass = [Pass("train", batches, step, weights)]
        history = fit(
            run,
            "retrain",
            configuration,
            parts,
            recipe.epochs,
            lambda _: one_pass,
            lambda: {"lr": schedule.get_last_lr()[0]},
        )
    return net, history


def retrain_run(
    name: str,
    net_config: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    **how: Any,
) -> None:
    """`retrain` as notebook 05 and torchrun call it: on the run's data.

    None is the run's own network and recipe. Keeps the network in runs/<run>/model, and in
    metrics.json what was trained and how it went.
    """
    run = Run(name)
    rank, world = rank_and_world()
    with alone(run):
        found = identity.derived(run)  # refuses what an earlier search left
        model = net_config or found["net_config"]
        shortened = {"epochs": epochs, "batch_size": batch_size}
        recipe = override(read_costs(run).space.retrain, **shortened)
        data = load(run)

        def started() -> None:
            if rank == 0:
                asked = {"net_config": net_config, **shortened, "devices": world, **how}
                run.record_provenance("05-retrain", **asked, recipe=recipe.model_dump(mode="json"))

        net, history = retrain(run, data, model, recipe, **how, started=started)
        if rank == 0:
            save_network(run.work / "model", model, net)
            last = history[-1]
            result = {
                "epochs": len(history),
                "seconds": sum(row["seconds"] for row in history),
                "train_top1": last["train_top1"],
                "train_loss": last["train_loss"],
                "n": 1,
            }
            trained = identity.describe(run, net, run.work / "model") | size(net, data.image_size)
            run.update_json("metrics.json", "retrain", result | trained)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    data: ImageData,
    split: str = "test",
    batch_size: int = 256,
    device: str = "auto",
) -> dict[str, Any]:
    """Accuracy of a network in evaluation mode.

    Returns top1 and top5 in [0, 1], the mean cross-entropy, images, and the confusion matrix (truth × prediction).
    """
    with computing_on(device, "fp32") as where:
        net = net.to(where).eval()
        batches = Batches(data, split, batch_size, where)
        classes = len(data.classes)
        parts = []
        for images, labels in progress(len(batches), "evaluate", batches.epoch(0)):
            logits = net(images).float()
            told = logits.shape[1]
            if told != classes:
                apart = f"the network tells {told} classes apart"
                raise ValueError(f"{apart}, the data set has {classes}")
            if not logits.isfinite().all():
                raise ValueError(
                    f"what the network makes of {split} is not finite: its weights are spoilt"
                )
            parts.append((logits, labels))
    scores, truth = map(torch.cat, zip(*parts, strict=True))
    best = scores.topk(min(5, classes), dim=1).indices
    hits = best == truth[:, None]
    confusion = torch.bincount(truth * classes + best[:, 0], minlength=classes**2).view(
        classes, classes
    )
    return {
        "top1": float(hits[:, 0].float().mean()),
        "top5": float(hits.any(dim=1).float().mean()),
        "loss": float(F.cross_entropy(scores, truth)),
        "images": len(truth),
        "confusion": confusion.tolist(),
    }


@dataclass(frozen=True)
class Tested:
    """A network of the folder `folder` and what the test images say of it, as in metrics.json."""

    net: nn.Module
    folder: Path
    image_size: int
    result: dict[str, Any]


def evaluate_run(run: Run, settings: EvaluateSettings) -> Tested:
    """`evaluate` as notebook 06 calls it: the run's test images, once; kept in metrics.json with provenance."""
    data = load(run)
    folder = model_folder(run, settings.model)
    net = load_network(folder, len(data.classes), settings.net_config)
    described = identity.describe(run, net, folder) | size(net, data.image_size)
    tested = evaluate(net, data, device=settings.device)
    result = {**tested, **described, "n": 1}
    run.update_json("metrics.json", "evaluate", {**result, "ms": {}})
    run.record_provenance("06-evaluate", **settings.model_dump(mode="json"))
    return Tested(net, folder, data.image_size, result)


def export_run(run: Run, tested: Tested) -> pd.DataFrame:
    """`export` as notebook 06 calls it: beside the network's weights; keeps milliseconds of an image."""
    exported = export(tested.net, tested.folder, tested.image_size)
    milliseconds = exported.set_index("runtime")["ms"].to_dict()
    run.update_json("metrics.json", "evaluate", {**tested.result, "ms": milliseconds})
    return exported
