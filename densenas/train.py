"""Training a network from scratch, and measuring one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from densenas import identity, own
from densenas.card import write_card
from densenas.costs import read_costs
from densenas.export import export
from densenas.files import write_text
from densenas.images.data import ImageData, load
from densenas.images.loading import Batches
from densenas.method.architecture import Architecture
from densenas.networks import (
    as_model,
    check_network,
    code_digest,
    load_network,
    model_folder,
    network,
    own_code,
    save_network,
)
from densenas.ranks import rank_and_world
from densenas.recipes import RetrainRecipe, override
from densenas.runs.progress import progress, quiet
from densenas.runs.provenance import environment
from densenas.runs.run import Run
from densenas.settings import Computing, EvaluateSettings, Precision, RetrainSettings
from densenas.training.checkpoint import Part, Row
from densenas.training.device import computing_on
from densenas.training.engine import alone, resumable
from densenas.training.steps import check_batches, check_loss, cosine, descend, fused_sgd, loss_of
from densenas.truth import Conditions, looks


def retrain(
    run: Run,
    data: ImageData,
    model: str | Architecture,
    recipe: RetrainRecipe,
    how: Computing = Computing(),
    looks: Collection[int] = (),
) -> tuple[nn.Module, list[Row]]:
    """Trains `model` (see `network`) from scratch on all training images; returns it with one history row an epoch.

    A killed training goes on when called again (`resumable`). The test split is looked at once, by `evaluate`, unless
    `looks` are given: behind these epochs, from 1, its accuracy is `test_top1` of their rows, and decides nothing.
    Raises ValueError with one sentence where there can be no such training, see `check_retraining`.
    """
    model = str(model)
    with computing_on(how) as device:
        check_retraining(data, model, recipe)
        torch.manual_seed(how.seed)
        net = network(model, len(data.classes)).to(device).to(memory_format=torch.channels_last)
        net.train()
        batches = Batches(data, ("train", "val"), recipe.batch_size, device, how.seed)
        trainer = Trainer(net, recipe, len(batches), how.precision)
        configuration = {
            "model": model,
            "recipe": recipe.model_dump(mode="json"),
            "data": data.digest,
            **how.decisive(device.type),
        }
        if code := _codes(model, net, recipe):
            configuration["code"] = code
        if looks:
            configuration["looks"] = [*looks]
        steps = [len(batches)] * recipe.epochs
        with resumable(run, "retrain", configuration, trainer.parts(), steps) as training:
            for epoch in training.epochs():
                for images, labels in training.batches("train", batches):
                    training.record(trainer.step(images, labels))
                row: Row = {"lr": trainer.schedule.get_last_lr()[0]}
                if epoch + 1 in looks:
                    with quiet():
                        row["test_top1"] = evaluate(net, data, device=how.device)["top1"]
                    net.train()
                training.end_epoch(row)
    return net, training.history


def _codes(model: str, net: nn.Module, recipe: RetrainRecipe) -> dict[str, str]:
    """Digests of all code of one's own that a training runs."""
    codes = own.codes([recipe.loss])
    if own.is_own(model):
        return codes | {model: code_digest(model, net)}
    return codes | own.codes(own_code(model))


def train_alone(
    run: Run, data: ImageData, arch: Architecture, recipe: RetrainRecipe, how: Computing
) -> dict[str, Any]:
    """`retrain`, and what a row of `truth.Truth` says of that."""
    moments, classes = looks(recipe.epochs), len(data.classes)
    _, history = retrain(run, data, arch, recipe, how, moments)
    row: dict[str, Any] = {
        "seed": how.seed,
        "net_config": str(arch),
        "epochs": recipe.epochs,
        "layers": arch.num_layers,
        "blocks": len(arch.routing_blocks),
        "mult_adds_m": arch.mult_adds(data.image_size, classes),
        "params_m": arch.params(classes),
    }
    row |= {f"top1_{epoch}": round(history[epoch - 1]["test_top1"], 6) for epoch in moments}
    row["seconds"] = sum(float(one["seconds"]) for one in history)
    return row | {"revision": environment()["git"]["revision"]}


class Trainer:
    """A network with its optimiser and schedule; layers that the user froze stay as they are."""

    def __init__(
        self, net: nn.Module, recipe: RetrainRecipe, steps_per_epoch: int, precision: Precision
    ) -> None:
        self.net = net
        self.recipe = recipe
        self.precision = precision
        self.loss = loss_of(recipe)
        self.weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.sgd = fused_sgd(self.weights, recipe)
        steps = recipe.epochs * steps_per_epoch
        # Of a recipe that was cut short at most half, or the rate would never fall.
        warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps // 2)
        self.schedule = cosine(self.sgd, steps, recipe.lr_min, warmup)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 3, H, W) and labels (B,); returns what `descend` does."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.net(images)
            loss = self.loss(logits, labels)
        self.sgd.zero_grad()
        outcome = descend(loss, logits, labels, self.weights)
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(self.weights, self.recipe.grad_clip)
        self.sgd.step()
        self.schedule.step()
        return outcome

    def parts(self) -> dict[str, Part]:
        """All that a step changes, for a checkpoint."""
        return {"net": self.net, "sgd": self.sgd, "schedule": self.schedule}


def check_retraining(data: ImageData, model: str, recipe: RetrainRecipe) -> None:
    """Raises ValueError with one sentence where such a network cannot be trained so on these images."""
    check_batches(recipe.batch_size, {"train with val": len(data.train) + len(data.val)})
    check_loss(recipe, len(data.classes))
    check_network(model, len(data.classes), data.image_size)


def retrain_run(name: str, settings: RetrainSettings, budget: float | None = None) -> None:
    """`retrain` as notebook 05 and torchrun call it: on the run's data, by default of the network that it derived.

    Keeps the network in runs/<run>/model, and in metrics.json what was trained and how it went. What provenance.json
    holds has passed every check; what is refused leaves the run as it was. With a `budget` all that is kept is
    kept in the budget's own place (`Run.budget`); its network is `net_config`.
    """
    run = Run(name)
    place = run if budget is None else run.budget(budget)
    how = settings.computing()
    rank, world = rank_and_world()
    with alone(place), computing_on(how):
        derived = identity.derived(run)  # refuses what an earlier search left
        model = as_model(settings.net_config) if settings.net_config else derived["net_config"]
        recipe = override(read_costs(run).space.retrain, **settings.overrides())
        data = load(run)
        check_retraining(data, model, recipe)
        if rank == 0:
            parameters: dict[str, Any] = settings.model_dump(mode="json")
            parameters["devices"] = world
            parameters["recipe"] = recipe.model_dump(mode="json")
            place.record_provenance("05-retrain", **parameters)
        net, history = retrain(place, data, model, recipe, how)
        if rank == 0:
            save_network(place.work / "model", model, net)
            described = identity.describe(run, net, place.work / "model")
            metrics = {
                "epochs": len(history),
                "seconds": sum(row["seconds"] for row in history),
                "train_top1": history[-1]["train_top1"],
                "train_loss": history[-1]["train_loss"],
                "n": 1,
                "how": Conditions.of(data, recipe, how.precision).model_dump(mode="json"),
            }
            metrics |= described | size(net, data.image_size)
            place.update_json("metrics.json", "retrain", metrics)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    data: ImageData,
    split: str = "test",
    batch_size: int = 256,
    device: str = "auto",
) -> dict[str, Any]:
    """Accuracy of a network in evaluation mode.

    Returns top1 and top5 in [0, 1], the mean cross-entropy, images, and the confusion matrix (truth × prediction);
    top5 is None where there are no more than five classes, of which any guess is right. Of several processes each tests
    all images.
    """
    classes = len(data.classes)
    scores, truth = [], []
    with computing_on(Computing(device=device)) as where:
        net = net.to(where).eval()
        batches = Batches(data, split, batch_size, where, rank=0, world=1)
        for images, labels in progress(len(batches), "evaluate", batches.epoch(0)):
            logits = net(images).float()
            if logits.shape[1] != classes:
                apart = f"the network tells {logits.shape[1]} classes apart"
                raise ValueError(f"{apart}, the data set has {classes}")
            if not logits.isfinite().all():
                made = f"what the network makes of {split} is not finite"
                raise ValueError(f"{made}: its weights are spoilt")
            scores.append(logits)
            truth.append(labels)
    return _accuracy(torch.cat(scores), torch.cat(truth), classes)


def _accuracy(scores: Tensor, truth: Tensor, classes: int) -> dict[str, Any]:
    """What `evaluate` returns, of scores (N, classes) and labels (N,)."""
    best = scores.topk(min(5, classes), dim=1).indices
    hits = best == truth[:, None]
    pairs = truth * classes + best[:, 0]
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    return {
        "top1": float(hits[:, 0].float().mean()),
        "top5": float(hits.any(dim=1).float().mean()) if classes > 5 else None,
        "loss": float(F.cross_entropy(scores, truth)),
        "images": len(truth),
        "confusion": confusion.tolist(),
    }


def size(net: nn.Module, input_size: int) -> dict[str, float]:
    """Mult-Adds for one square image (convolutions and linear layers, no biases) and parameters, in millions."""
    parameters = [*net.parameters()]
    image = parameters[0].new_zeros(1, 3, input_size, input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(image)
    count = sum(parameter.numel() for parameter in parameters)
    return {"mult_adds_m": counter.get_total_flops() / 2e6, "params_m": count / 1e6}


@dataclass(frozen=True)
class Tested:
    """A network of the folder `folder` and what the test images say of it, as in metrics.json."""

    net: nn.Module
    folder: Path
    image_size: int
    result: dict[str, Any]
    confusion: pd.DataFrame  # images by true class (rows) and predicted one


def evaluate_run(run: Run, settings: EvaluateSettings, budget: float | None = None) -> Tested:
    """`evaluate` as notebook 06 calls it: the run's test images, once; kept in metrics.json with provenance.

    With a `budget` it is the network that was trained for that, and kept in the budget's own place. ValueError with one
    sentence where the run's own was trained on other images than it has now, which may have been these.
    """
    place = run if budget is None else run.budget(budget)
    data = load(run)
    folder = model_folder(place, settings.model)
    if settings.model is None:
        trained = place.read_json("metrics.json").get("retrain", {}).get("how", {})
        identity.check_images(run, trained.get("data"), data.digest, "05-retrain")
    # Without costs, of images alone, a run has no space and no ops of its own.
    priced = (run.reports / "cost.json").exists()
    own_ops = read_costs(run).space.own_ops if priced else []
    net = load_network(folder, len(data.classes), settings.net_config, own_ops)
    described = identity.describe(run, net, folder) | size(net, data.image_size)
    tested = evaluate(net, data, device=settings.device)
    # Not in metrics.json: of a thousand classes it is a million numbers.
    confusion = pd.DataFrame(tested.pop("confusion"), data.classes, data.classes)
    write_text(place.reports / "confusion.csv", confusion.to_csv())
    result = {**tested, **described, "n": 1, "data": data.digest}
    place.update_json("metrics.json", "evaluate", {**result, "ms": {}})
    place.record_provenance("06-evaluate", **settings.model_dump(mode="json"))
    return Tested(net, folder, data.image_size, result, confusion)


def export_run(run: Run, tested: Tested) -> pd.DataFrame:
    """`export` as notebook 06 calls it: beside the network's weights, with a card; keeps milliseconds of an image."""
    exported = export(tested.net, tested.folder, tested.image_size)
    milliseconds = exported.set_index("runtime")["ms"].to_dict()
    run.update_json("metrics.json", "evaluate", {**tested.result, "ms": milliseconds})
    write_card(run, tested.folder, load(run))
    return exported
