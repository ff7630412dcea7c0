"""What the steps of search and retraining share: gradients over many processes, SGD and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from densenas import own
from densenas.files import naming
from densenas.ranks import rank_and_world
from densenas.recipes import RetrainRecipe, SearchRecipe


def check_batches(batch_size: int, splits: Mapping[str, int], world: int | None = None) -> None:
    """Raises ValueError with one sentence where `world` processes (None: these) cannot train with such batches.

    `splits` are the numbers of images by name. Batch norm learns nothing of a single image, so each
    of the processes that train needs two of every batch.
    """
    for split, images in splits.items():
        if batch_size > images:
            few = f"{split} has {images:,} images: set batch_size to at most that"
            raise ValueError(f"batch_size is {batch_size:,}, but {few}")
    if world is None:
        _, world = rank_and_world()
    devices = f"{world} devices" if world > 1 else "1 device"
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared equally by {devices}")
    if batch_size < 2 * world:
        raise ValueError(
            f"batch_size {batch_size} on {devices} is less than the two images a process that batch norm"
            f" needs: set batch_size to at least {2 * world} or lower devices"
        )


def loss_of(recipe: SearchRecipe | RetrainRecipe) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits (B, num_classes) and labels (B,) → loss, 0-d: cross-entropy, smoothed where the recipe says so, or the
    recipe's own. ValueError with one sentence where that cannot be imported.
    """
    if recipe.loss is None:
        smoothing = recipe.label_smoothing if isinstance(recipe, RetrainRecipe) else 0.0
        return partial(F.cross_entropy, label_smoothing=smoothing)
    with naming("loss", " "):
        return own.function(recipe.loss)


def check_loss(recipe: SearchRecipe | RetrainRecipe, num_classes: int) -> None:
    """Tries the recipe's loss on two images; ValueError with one sentence where nothing can be learnt by it."""
    function = loss_of(recipe)
    logits = torch.linspace(-1, 1, 2 * num_classes).view(2, num_classes).requires_grad_()
    labels = torch.tensor([0, num_classes - 1])
    called = f"loss '{recipe.loss}' of logits {tuple(logits.shape)} and labels (2,)"
    try:
        with torch.random.fork_rng(devices=[]):
            loss = function(logits, labels)
    except Exception as error:
        raise ValueError(f"{called}: {own.reason(error)}") from None
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{called} is of {shape}, expected a tensor without dimensions")
    if not loss.isfinite():
        raise ValueError(f"{called} is {loss.item()}, expected a finite number")
    if not loss.requires_grad:
        raise ValueError(f"{called} has no gradient: compute it from the logits by PyTorch alone")


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, these leave the graph: their gradients, half of a step's work, are never computed."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def descend(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    parameters: list[nn.Parameter],
    penalty: Tensor | float = 0.0,
) -> Tensor:
    """Computes the gradients of loss + penalty; returns the loss and the share of correct predictions as one tensor.

    Over several processes, gradients and values are averaged by one all-reduce; parameters that took no part in the
    loss have no gradient and do not travel. Batch norm sees the images of its own process only.
    """
    (loss + penalty).backward()
    correct = logits.detach().argmax(dim=1) == labels
    outcome = torch.stack([loss.detach().float(), correct.float().mean()])
    _, world = rank_and_world()
    if world > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        _average([*gradients, outcome], world)
    return outcome


def _average(tensors: list[Tensor], world: int) -> None:
    """Replaces tensors by their means over all processes."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    means = (flat / world).split([tensor.numel() for tensor in tensors])
    shaped = [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


def fused_sgd(
    parameters: list[nn.Parameter], recipe: SearchRecipe | RetrainRecipe
) -> torch.optim.SGD:
    """SGD as one kernel over the parameters that have a gradient.

    Momentum starts at zero everywhere, which is the same as without: the kernel refuses parameters with and without
    momentum side by side, and a sampled step leaves most without a gradient.
    """
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if recipe.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, lr_min: float, warmup: int = 0
) -> LambdaLR:
    """Per step: linear from `lr_min` over `warmup` steps, then half a cosine down to `lr_min` at `steps`."""
    floor = lr_min / optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return floor + (1 - floor) * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)
