"""What a run is told: the recipes that come with a search space, and the YAML file of a run."""

from __future__ import annotations

import ast
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PACKAGE = Path(__file__).parent
# A checkout keeps data/ at its top level; an installed wheel carries it inside the package.
DATA = next(folder for folder in (PACKAGE / "data", PACKAGE.parent / "data") if folder.is_dir())


def _root() -> Path:
    """Where reports/ and runs/ live: DENSENAS_ROOT, or else this checkout, or else the working directory."""
    if named := os.environ.get("DENSENAS_ROOT"):
        return Path(named).expanduser().absolute()
    checkout = PACKAGE.parent
    return checkout if (checkout / "Snakefile").is_file() else Path.cwd()


ROOT = _root()

Dataset = Literal["digits", "cifar10", "fashion_mnist", "imagenette", "folder"]
Augment = Literal["weak", "random_sized", "rand_scale"]  # the published training transforms


class Strict(BaseModel):
    """Unknown names are errors: a misspelled knob must never fall back to its default in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SearchRecipe(Strict):
    """How a supernet is searched; the defaults are the paper's (section 4.1 and the published configuration)."""

    epochs: int = Field(ge=1)  # passes over the training split
    arch_start_epoch: int = Field(ge=0)  # first epoch (from 0) that also updates alpha and beta
    batch_size: int = Field(ge=2)  # images a step
    log_base: float = Field(gt=1)  # cost at which the cost term equals sub_loss_factor, in the table's unit
    sub_loss_factor: float = Field(ge=0)  # weight of the cost term
    softmax_temp: float = Field(1.0, gt=0)  # divides beta, never alpha
    lr: float = Field(0.2, gt=0)  # weights: SGD, cosine per step down to lr_min
    lr_min: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(4e-5, ge=0)
    arch_lr: float = Field(3e-4, gt=0)  # alpha and beta: Adam
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_weight_decay: float = Field(1e-3, ge=0)

    @model_validator(mode="after")
    def _learns_an_architecture(self) -> SearchRecipe:
        never = f"arch_start_epoch is {self.arch_start_epoch}, of {self.epochs} epochs none would move alpha and beta"
        refuse(self.arch_start_epoch >= self.epochs, never)
        return self


class RetrainRecipe(Strict):
    """How a derived network is trained from scratch; the defaults are the paper's."""

    epochs: int = Field(240, ge=1)
    batch_size: int = Field(1024, ge=2)
    lr: float = Field(0.5, gt=0)  # SGD, cosine per step down to lr_min
    lr_min: float = Field(1e-5, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)  # linear from lr_min, before the cosine
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(4e-5, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    grad_clip: float | None = Field(None, gt=0)  # largest norm of the gradient; None: unclipped


Recipe = TypeVar("Recipe", SearchRecipe, RetrainRecipe)


def refuse(wrong: bool, sentence: str) -> None:
    """Raises ValueError with this sentence where something is wrong."""
    if wrong:
        raise ValueError(sentence)


@contextmanager
def naming(where: str, link: str = ": ") -> Iterator[None]:
    """Around what may raise ValueError, pydantic's included: it says in one sentence where, and what."""
    try:
        yield
    except ValidationError as error:
        # A misspelled name also leaves the right one missing: the misspelling is what to mend.
        first = min(error.errors(), key=lambda entry: entry["type"] not in ("extra_forbidden", "invalid_key"))
        field, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        unknown, missing = f"there is no setting '{field}', is it misspelled?", f"the setting '{field}' is missing"
        known = {"extra_forbidden": unknown, "invalid_key": unknown, "missing": missing}
        usual = f"{field}: {reason} (got {first['input']!r})" if field else reason
        raise ValueError(f"{where}: {known.get(first['type'], usual)}") from None
    except ValueError as error:
        raise ValueError(f"{where}{link}{error}") from None


def override(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with those settings that are not None; ValueError with one sentence where one cannot be."""
    given = {name: value for name, value in settings.items() if value is not None}
    with naming(type(recipe).__name__):
        return type(recipe)(**{**recipe.model_dump(), **given})


def literal(text: str) -> Any:
    """A Python literal, never executed; ValueError where the text is anything else."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"is not a Python literal: {text.strip()[:80]!r}") from None


def read_text(path: str | Path) -> str:
    """A whole text file; ValueError with one sentence where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Safe-loads a YAML mapping; raises ValueError with one sentence when the file holds anything else."""
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    refuse(not isinstance(content, dict), f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object; ValueError names a damaged file and the remedy, what to do about it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {remedy}")
    return content


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end.

    No reader and no kill meets half a file. File and folder are synced to the disk, or a power cut could leave an
    empty file under the new name. Raises OSError with one sentence where the disk is full or cannot be written.
    """
    path = Path(path)
    # The suffix stays last, some writers look at it.
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Removes what killed processes of this machine left half-written beside `path`."""
    for partial in path.parent.glob(f".partial.*.{glob.escape(path.name)}"):
        process = partial.name.split(".")[2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole text file or nothing."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
