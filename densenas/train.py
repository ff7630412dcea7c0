"""Training a network from scratch, and measuring one: derived, published, torchvision's or the user's own."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from densenas.architecture import Architecture, load_published, save_published
from densenas.config import RetrainRecipe, atomic, override, read_text, refuse, write_text
from densenas.data import ImageData, load
from densenas.engine import Pass, computing_on, cosine, descend, fit, fused_sgd, rank_and_world
from densenas.loading import Batches
from densenas.run import Run, progress


def network(model: str, num_classes: int) -> nn.Module:
    """A new network: a net_config, a published name, a torchvision model, or the user's own "package.module:function".

    The function is called with `num_classes`. Raises ValueError with one sentence where there is no such network.
    """
    if ":" in model and not model.lstrip().startswith("["):
        try:
            return pkgutil.resolve_name(model)(num_classes=num_classes)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model '{model}' cannot be imported: {error}") from None
    if model in torchvision.models.list_models():
        return torchvision.models.get_model(model, num_classes=num_classes)
    try:
        return Architecture.read(model).build(num_classes)
    except KeyError:
        kinds = "DenseNAS-A, -B or -C, a torchvision model, a net_config or package.module:function"
        raise ValueError(f"no network '{model}', expected {kinds}") from None


def save_network(folder: Path, model: str, net: nn.Module) -> None:
    """Keeps a trained network where `load_network` finds it; a derived one in the published format."""
    if hasattr(net, "arch"):
        (folder / "model").unlink(missing_ok=True)  # of an earlier network that was not derived
        save_published(folder, net.arch)
    else:
        write_text(folder / "model", f"{model}\n")
    with atomic(folder / "weights.pt") as partial:
        torch.save({key: value.cpu() for key, value in net.state_dict().items()}, partial)


def load_network(folder: str | Path, num_classes: int, model: str | None = None) -> nn.Module:
    """The network in a published folder, or in one that `save_network` wrote.

    A folder may name torchvision's networks. Code is imported only where the caller, not a file, names it as `model`.
    """
    folder = Path(folder)
    if not (folder / "model").is_file():
        return load_published(folder)[1]
    found = read_text(folder / "model").strip()
    foreign = f"{folder}: the network is {found[:80]!r}, code is run only where net_config says the same"
    refuse(found not in torchvision.models.list_models() and found != model, foreign)
    net = network(found, num_classes)
    net.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True))
    return net


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
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains `model` (see `network`) from scratch on all training images; returns it with one history row an epoch.

    A killed training goes on when called again (`fit`). The test split is looked at once, by `evaluate`.
    """
    with computing_on(device, precision, deterministic) as where:
        configuration = {
            "model": str(model), "recipe": recipe.model_dump(mode="json"), "data": data.digest, "seed": seed,
            "precision": precision, "device": where.type,
        }  # fmt: skip
        torch.manual_seed(seed)
        net = network(str(model), len(data.classes)).to(where, memory_format=torch.channels_last)
        weights = list(net.parameters())
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
        parts = {"net": net, "sgd": sgd, "schedule": schedule}
        one_pass = [Pass("train", batches, step, weights)]
        history = fit(
            run, "retrain", configuration, parts, recipe.epochs, lambda _: one_pass,
            lambda: {"lr": schedule.get_last_lr()[0]},
        )  # fmt: skip
    return net, history


def retrain_run(
    name: str, net_config: str | None = None, epochs: int | None = None, batch_size: int | None = None, **how: Any
) -> None:
    """`retrain` as notebook 05 and torchrun call it: on the run's data; None is the run's own network and recipe."""
    run = Run(name)
    derived = run.need(run.reports / "architecture.json", "04-derive")
    model = net_config or run.read_json(derived.name)["net_config"]
    shortened = {"epochs": epochs, "batch_size": batch_size}
    recipe = override(run.costs().space.retrain, **shortened)
    rank, world = rank_and_world()
    if rank == 0:
        asked = {"net_config": net_config, **shortened, "devices": world, **how}
        run.record_provenance("05-retrain", **asked, recipe=recipe.model_dump(mode="json"))
    net, _ = retrain(run, load(run), model, recipe, **how)
    if rank == 0:
        save_network(run.work / "model", model, net)


@torch.no_grad()
def evaluate(
    net: nn.Module, data: ImageData, split: str = "test", batch_size: int = 256, device: str = "auto"
) -> dict[str, Any]:
    """Accuracy of a network in evaluation mode.

    Returns top1 and top5 in [0, 1], the mean cross-entropy, images, and the confusion matrix (truth × prediction).
    """
    with computing_on(device, "fp32") as where:
        net = net.to(where).eval()
        batches = Batches(data, split, batch_size, where)
        parts = [(net(images).float(), truth) for images, truth in progress(len(batches), "evaluate", batches.epoch(0))]
    scores, truth = map(torch.cat, zip(*parts, strict=True))
    told, classes = scores.shape[1], len(data.classes)
    refuse(told != classes, f"the network tells {told} classes apart, the data set has {classes}")
    best = scores.topk(min(5, classes), dim=1).indices
    hits = best == truth[:, None]
    confusion = torch.bincount(truth * classes + best[:, 0], minlength=classes**2).view(classes, classes)
    return {
        "top1": float(hits[:, 0].float().mean()),
        "top5": float(hits.any(dim=1).float().mean()),
        "loss": float(F.cross_entropy(scores, truth)),
        "images": len(truth),
        "confusion": confusion.tolist(),
    }
