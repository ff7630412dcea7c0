"""Training a derived network from scratch, and measuring one."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from densenas.architecture import Architecture
from densenas.config import RetrainRecipe
from densenas.data import ImageData
from densenas.loading import Batches
from densenas.run import Run, load_checkpoint, pick_device, progress, save_checkpoint

PRECISIONS = ("fp32", "bf16")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """fp32 as it is, or bf16 by autocast; ValueError for anything else."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is unknown, known are {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cosine(optimizer: torch.optim.Optimizer, steps: int, lr_min: float, warmup: int = 0) -> LambdaLR:
    """Per step: linear from `lr_min` over `warmup` steps, then half a cosine down to `lr_min` at `steps`."""
    floor = lr_min / optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return floor + (1 - floor) * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)


class Meter:
    """Mean loss and accuracy of a pass, shown in a progress bar."""

    def __init__(self, what: str, bar: tqdm) -> None:
        self.what, self.bar = what, bar
        self.steps = self.images = 0
        self.loss_sum = self.correct = 0.0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts one step; raises FloatingPointError, naming the step, when its loss is not finite."""
        correct = (logits.argmax(dim=1) == labels).sum()
        # The one place in a step where the host waits for the device.
        loss_here, correct_here = torch.stack([loss.detach().float(), correct.float()]).tolist()
        self.steps += 1
        if not math.isfinite(loss_here):
            raise FloatingPointError(f"{self.what}: the loss is not finite at step {self.steps}; lower lr and rerun")
        self.images += len(labels)
        self.loss_sum += loss_here * len(labels)
        self.correct += correct_here
        self.bar.set_postfix(loss=f"{self.loss:.3f}", top1=f"{self.top1:.1%}", refresh=False)
        self.bar.update()

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images

    @property
    def top1(self) -> float:
        """Share of correct predictions, in [0, 1]."""
        return self.correct / self.images


def retrain(
    run: Run,
    data: ImageData,
    arch: Architecture,
    recipe: RetrainRecipe,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains `arch` from scratch on all training images; returns the network and one history row an epoch.

    After every epoch a checkpoint is written; a rerun with the same configuration goes on behind it. The test split
    is looked at once, after the last epoch, by `evaluate`.
    """
    where = pick_device(device)
    configuration = {
        "net_config": str(arch), "recipe": recipe.model_dump(mode="json"), "data": data.digest, "seed": seed,
        "precision": precision, "device": where.type,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = arch.build(len(data.classes))
    net.to(where, memory_format=torch.channels_last)
    batches = Batches(data, ("train", "val"), recipe.batch_size, where, seed)
    sgd = torch.optim.SGD(
        net.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    schedule = cosine(
        sgd, recipe.epochs * len(batches), recipe.lr_min, warmup=round(recipe.warmup_epochs * len(batches))
    )
    state = {"net": net, "sgd": sgd, "schedule": schedule}
    path = run.work / "retrain.pt"
    history: list[dict[str, Any]] = []
    if checkpoint := load_checkpoint(path, configuration):
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        generator.set_state(checkpoint["generator"])
        history = checkpoint["history"]
    bar = progress(recipe.epochs * len(batches), "retrain", initial=len(history) * len(batches))
    net.train()
    for epoch in range(len(history), recipe.epochs):
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, "lr": schedule.get_last_lr()[0]}
        meter = Meter(f"retrain, epoch {epoch}", bar)
        for images, labels in batches.epoch(epoch):
            with autocast(where, precision):
                logits = net(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
            meter.add(loss, logits, labels)
        row |= {"train_loss": meter.loss, "train_top1": meter.top1, "seconds": time.perf_counter() - start}
        history.append(row)
        save_checkpoint(
            path, configuration, generator=generator.get_state(), history=history,
            **{name: part.state_dict() for name, part in state.items()},
        )  # fmt: skip
    bar.close()
    run.write_history("retrain", history)
    return net, history


@torch.no_grad()
def evaluate(
    net: nn.Module, data: ImageData, split: str, batch_size: int = 256, device: str = "auto"
) -> dict[str, Any]:
    """Accuracy of a network in evaluation mode.

    Returns top1 and top5 in [0, 1], the mean cross-entropy, images, and the confusion matrix (truth × prediction).
    """
    where = pick_device(device)
    net = net.to(where).eval()
    batches = Batches(data, split, batch_size, where)
    bar = progress(len(batches), "evaluate")
    logits, labels = [], []
    for images, truth in batches.epoch(0):
        logits.append(net(images).float())
        labels.append(truth)
        bar.update()
    bar.close()
    scores, truth = torch.cat(logits), torch.cat(labels)
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = best == truth[:, None]
    classes = len(data.classes)
    confusion = torch.bincount(truth * classes + best[:, 0], minlength=classes**2).view(classes, classes)
    return {
        "top1": float(hits[:, 0].float().mean()),
        "top5": float(hits.any(dim=1).float().mean()),
        "loss": float(F.cross_entropy(scores, truth)),
        "images": len(truth),
        "confusion": confusion.tolist(),
    }
