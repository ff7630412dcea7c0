"""Recipes: how a supernet is searched and a derived network trained, with the paper's numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from densenas import own
from densenas.files import Strict, naming

Epochs = Annotated[int, Field(ge=1, le=100_000)]
Images = Annotated[int, Field(ge=2, le=1_000_000)]  # of a batch: batch norm needs two
Beta = Annotated[float, Field(ge=0, lt=1)]
Weights = Literal["own", "shared"]


def _as_loss(loss: str) -> str:
    if not own.is_own(loss):
        raise ValueError("expected package.module:function, called with logits and labels")
    return loss


# A loss of one's own in place of cross-entropy. Left out where there is none, so that recipes from before it are whole.
Loss = Annotated[
    Annotated[str, AfterValidator(_as_loss)] | None, Field(exclude_if=lambda loss: loss is None)
]


class SearchRecipe(Strict):
    """How a supernet is searched; the defaults are the paper's (section 4.1 and the published configuration)."""

    epochs: Epochs  # passes over the training split
    arch_start_epoch: int = Field(ge=0)  # first epoch (from 0) that also updates alpha and beta
    batch_size: Images  # images a step
    paths: Literal["all", "sampled"] = "all"  # of a step: all, as published, or that of one network
    weights: Weights = "own"  # of a layer's candidates: own, or slices of one bank
    log_base: float = Field(gt=1)  # cost, in the table's unit, of a term equal to sub_loss_factor
    sub_loss_factor: float = Field(ge=0)  # weight of the cost term
    softmax_temp: float = Field(1.0, gt=0)  # divides beta, never alpha
    lr: float = Field(0.2, gt=0)  # weights: SGD, cosine per step down to lr_min
    lr_min: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(4e-5, ge=0)
    arch_lr: float = Field(3e-4, gt=0)  # alpha and beta: Adam
    arch_betas: tuple[Beta, Beta] = Field((0.5, 0.999), strict=False)
    arch_weight_decay: float = Field(1e-3, ge=0)
    loss: Loss = None  # of both steps

    @model_validator(mode="after")
    def _learns_an_architecture(self) -> SearchRecipe:
        if self.arch_start_epoch >= self.epochs:
            never = f"of {self.epochs} epochs none would move alpha and beta"
            raise ValueError(f"arch_start_epoch is {self.arch_start_epoch}, {never}")
        _check_rates(self.lr, self.lr_min)
        return self


class RetrainRecipe(Strict):
    """How a derived network is trained from scratch; the defaults are the paper's."""

    epochs: Epochs = 240
    batch_size: Images = 1024
    lr: float = Field(0.5, gt=0)  # SGD, cosine per step down to lr_min
    lr_min: float = Field(1e-5, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)  # linear from lr_min, before the cosine
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(4e-5, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of cross-entropy
    loss: Loss = None
    grad_clip: float | None = Field(None, gt=0)  # largest norm of the gradient; None: unclipped

    @model_validator(mode="after")
    def _learns(self) -> RetrainRecipe:
        _check_rates(self.lr, self.lr_min)
        return self


def _check_rates(lr: float, lr_min: float) -> None:
    if lr_min > lr:
        raise ValueError(f"lr_min is {lr_min:g}, more than lr = {lr:g}, from where the rate falls")


Recipe = TypeVar("Recipe", SearchRecipe, RetrainRecipe)


def override(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with these settings instead; ValueError with one sentence where one cannot be."""
    with naming("recipe"):
        return type(recipe)(**{**recipe.model_dump(), **settings})
