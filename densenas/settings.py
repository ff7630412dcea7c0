"""Settings: every knob of every stage once, with its unit, range, default and reason.

A run's YAML file (`RunConfig`), a notebook's parameters (`Settings.of`), a command line and the stage's function share
one model a stage. Each is complete: a stage asks for nothing else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, model_validator

from densenas.files import Strict, naming, read_yaml
from densenas.recipes import Epochs, Images

# Pixels: packing keeps up to 16 times as many of the longer side (`transforms.ELONGATION`), and no
# side of a JPEG can be much longer than 65,500.
LARGEST_PACK = 65_500 // 16
HAND_MADE = ("MobileNetV2", "ResNet-18", "ResNet-34", "ResNet-50")  # designs of `baselines`
WITHIN = 0.05  # of a study's target, as a share: what random and hand-made networks may cost


def _as_device(device: str) -> str:
    """Only whether there can be such a device: the machine that checks may not be the one that computes."""
    try:
        kind = torch.device("cpu" if device == "auto" else device).type
    except RuntimeError:
        kind = "unknown"
    if kind in ("unknown", "meta"):
        raise ValueError("expected auto, cpu, cuda or one GPU such as cuda:1")
    return device


def _as_pack(pack: Any) -> Any:
    if pack in (None, "original") or (type(pack) is int and 0 < pack <= LARGEST_PACK):
        return pack
    raise ValueError(f"expected 'original' or a shorter side of 1 to {LARGEST_PACK} pixels")


def _as_classes(classes: Any) -> Any:
    if classes is None or type(classes) is int:
        return classes
    if not isinstance(classes, list):
        raise ValueError("expected a number of classes, or a list of their names")
    for name in classes:
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is not read as text, put names of classes in quotes")
    return classes


def _as_networks(networks: int) -> int:
    if networks in (1, 2):
        raise ValueError("a rank correlation needs at least 3 networks, 0 measures none")
    return networks


def _as_targets(targets: tuple[float, ...]) -> tuple[float, ...]:
    for low, high in itertools.pairwise(sorted(targets)):
        if high <= low * (1 + WITHIN):
            near = f"{low!r} and {high!r} are within {WITHIN:.0%} of each other"
            raise ValueError(f"{near} and would count networks twice, leave one out")
    return tuple(float(f"{target:g}") for target in targets)  # as the names of jobs have them


def _as_budgets(budgets: tuple[float, ...]) -> tuple[float, ...]:
    names = [f"{budget:g}" for budget in budgets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice, leave one out")
    return tuple(map(float, names))  # as folders are called, however many digits were written


def _as_searches(searches: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name in searches:
        taken = name in ("random", "hand-made", *HAND_MADE) or name.startswith("matched")
        if taken or not re.fullmatch(r"[A-Za-z][\w.+-]{0,40}", name):
            expected = "a word of letters, digits, '_', '.', '+', '-' that names no other network"
            raise ValueError(f"a way of searching is called {name!r}, expected {expected}")
    return searches


Dataset = Literal["digits", "cifar10", "fashion_mnist", "imagenette", "folder"]
Augment = Literal["weak", "random_sized", "rand_scale"]  # the published training transforms
Precision = Literal["fp32", "tf32", "bf16"]  # bf16: autocast; tf32: on CUDA
Device = Annotated[str, AfterValidator(_as_device)]  # auto is a GPU where there is one
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Side = Annotated[int, Field(ge=8)]  # of square images, in pixels
Pack = Annotated[Literal["original"] | int | None, BeforeValidator(_as_pack)]
Classes = Annotated[int | list[str] | None, BeforeValidator(_as_classes)]
Networks = Annotated[int, Field(ge=0, le=10_000), AfterValidator(_as_networks)]
Targets = Annotated[
    tuple[PositiveFloat, ...],
    Field(min_length=1, max_length=100, strict=False),
    AfterValidator(_as_targets),
]
Budgets = Annotated[
    tuple[PositiveFloat, ...], Field(max_length=100, strict=False), AfterValidator(_as_budgets)
]
Overrides = dict[str, Any]  # fields of a recipe, checked by `recipes.override` against the space's
# Recipes by the names of ways of searching, which become parts of file names.
Searches = Annotated[dict[str, Overrides], Field(min_length=1), AfterValidator(_as_searches)]


class Settings(Strict):
    """What a stage can be asked for."""

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> Self:
        """The settings among a notebook's variables; ValueError with one sentence where one cannot be.

        Nothing is converted: papermill's `-p skip_broken no` is a text, and no truth value.
        """
        given = {name: variables[name] for name in cls.model_fields if name in variables}
        with naming("parameters"):
            return cls.model_validate(given)


class SourceSettings(Settings):
    """Which images a run uses, of whatever size."""

    dataset: Dataset = "digits"
    source: str | None = None  # folder with the data; None: embedded, or downloaded
    num_classes: Classes = None  # the first n in sorted order, or those named; None: all
    # Share of the training images that the architecture step gets.
    val_fraction: float = Field(0.2, gt=0, lt=1)
    # None: original bytes, small sets in memory; "original": read from the pack in every epoch; or
    # the shorter side in pixels to which images are resized once.
    pack: Pack = None
    quality: int = Field(90, ge=1, le=100)  # JPEG quality of what is resized
    augment: Augment | None = None  # None: weak in memory, random_sized from the pack
    # Whether training mirrors images, which letters and signs do not bear; None: not digits and clothes.
    mirror: bool | None = None
    skip_broken: bool = False  # leave out images that cannot be read
    seed: Seed = 0  # decides which training images are val


class DataSettings(SourceSettings):
    """01: from images to a pack with train, val and test."""

    image_size: Side = 32

    @model_validator(mode="after")
    def _packs_large_enough(self) -> Self:
        if isinstance(self.pack, int) and self.pack < self.image_size:
            seen = f"training sees images of {self.image_size} pixels"
            raise ValueError(f"pack is {self.pack}, but {seen}: set it to at least that")
        return self


class CostSettings(Settings):
    """02: what every candidate costs."""

    space: str = "digits"  # preset or YAML file
    image_size: Side | None = None  # None: that of the prepared images, no other is priced
    kind: Literal["mult_adds", "latency"] = "mult_adds"
    device: Device = "auto"  # where latency is measured
    batch_size: int = Field(1, ge=1)  # images at once in a measurement
    networks: Networks = 0  # random networks whose latency is predicted and measured
    rounds: int = Field(12, ge=1, le=10_000)  # timings of each op and network
    table: str | None = None  # what densenas.onnx_ops' timer left on another device; None: measured

    @model_validator(mode="after")
    def _times_one_device(self) -> Self:
        if self.table is not None and self.kind != "latency":
            kind = f"kind is {self.kind}: set it to latency"
            raise ValueError(f"table holds milliseconds, but {kind}")
        if self.table is not None and self.networks:
            here = "networks are timed on this machine, and table is of another device"
            raise ValueError(f"{here}: set networks to 0")
        if self.table is not None and self.batch_size != 1:
            raise ValueError(
                "batch_size is of a measurement here, and table has its own: leave it out"
            )
        return self


class Computing(Settings):
    """How a training computes."""

    seed: Seed = 0  # of initialisation, sampling, order and augmentation
    precision: Precision = "fp32"
    device: Device = "auto"
    deterministic: bool = False  # refuse CUDA kernels that do not repeat exactly; a CPU always does

    def decisive(self, kind: str) -> dict[str, Any]:
        """What decides the outcome on a device of this kind, for the configuration of a training."""
        asked = {"deterministic": True} if kind == "cuda" and self.deterministic else {}
        return {"seed": self.seed, "precision": self.precision, "device": kind, **asked}


class TrainingSettings(Computing):
    """What search and retraining share. None is the recipe of the space."""

    epochs: Epochs | None = None
    batch_size: Images | None = None  # images a step, over all devices
    recipe: Overrides | None = None  # any other field of the recipe, e.g. {"lr": 0.1}
    devices: int = Field(1, ge=1)  # processes on this machine that train together

    @property
    def shortened(self) -> Overrides:
        """The fields of the recipe that have settings of their own, where they are set."""
        names = {"epochs", "arch_start_epoch", "batch_size"}
        return self.model_dump(include=names, exclude_none=True)

    def overrides(self) -> Overrides:
        """What replaces fields of the space's recipe."""
        return {**(self.recipe or {}), **self.shortened}

    def computing(self) -> Computing:
        return Computing(**self.model_dump(include={*Computing.model_fields}))

    @model_validator(mode="after")
    def _sets_nothing_twice(self) -> Self:
        for name in self.shortened:
            if name in (self.recipe or {}):
                raise ValueError(f"{name} is given twice, by itself and in recipe: leave one out")
        return self


class SearchSettings(TrainingSettings):
    """03: the search."""

    space: str | None = None  # preset or YAML file, for its recipe; None: the one that was priced
    arch_start_epoch: int | None = Field(None, ge=0)  # first epoch (from 0) with architecture steps
    target_cost: float | None = Field(None, gt=0)  # in the table's unit; None: the paper's loss


class DeriveSettings(Settings):
    """04: from probabilities to networks."""

    # In the table's unit: costs at which the supernet's network is kept, too, beside the run's own.
    budgets: Budgets = ()


class RetrainSettings(TrainingSettings):
    """05: training a network from scratch."""

    # A net_config or a file that holds one, a network's name or "package.module:function"; None: the derived network.
    net_config: str | None = None


class EvaluateSettings(Settings):
    """06: the test images, once."""

    model: str | None = None  # folder of a network; None: what 05-retrain trained
    net_config: str | None = None  # what 05-retrain was given, where that was the user's own code
    device: Device = "auto"


class StudySettings(Settings):
    """09: searched, random and hand-made networks of equal cost, trained alone.

    Where the run has a table of such trainings (`truth`) of the same images and recipe, it is used.
    """

    space: str | None = None  # preset or YAML file, for its recipes; None: the one that was priced
    targets: Targets  # millions of Mult-Adds
    seeds: int = Field(3, ge=1, le=1000)  # searches of each way for each target
    trainings: int | None = Field(None, ge=1, le=1000)  # of each hand-made network; None: as many
    networks: int = Field(8, ge=2, le=1000)  # random ones for each target
    matched: int | None = Field(None, ge=1, le=1000)  # and as deep as each way's; None: as many
    # Ways of searching: what in the recipe makes each of them.
    searches: Searches = Field(default_factory=lambda: {"default": {}}, validate_default=True)
    search: Overrides | None = None  # fields of the recipe of every search
    retrain: Overrides | None = None  # and of every training
    precision: Precision = "fp32"
    device: Device = "auto"
    deterministic: bool = False  # as in search and retraining


# Settings that stand on top of a run's file, for all stages.
SHARED = ("space", "image_size", "seed", "device", "deterministic")
# Settings of a stage that follow from the sections of others.
DERIVED = {"evidence": ("search", "retrain", "precision"), "evaluate": ("net_config",)}


class RunConfig(Strict):
    """One run as a YAML file: what the stages share on top, what one stage alone takes in its section.

    A section is its stage's settings, the shared ones filled in. Names and meanings are those of the notebooks'
    parameters; what is left out is the space's own recipe.
    """

    space: str
    image_size: Side | None = None  # None: the space's own input size
    seed: Seed = 0
    device: Device = "auto"
    deterministic: bool = False
    data: SourceSettings
    cost: CostSettings
    search: SearchSettings
    derive: DeriveSettings
    retrain: RetrainSettings
    evaluate: EvaluateSettings
    evidence: StudySettings | None = None  # the study that `make evidence` makes

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Reads and checks a run's file alone; ValueError or FileNotFoundError with one sentence.

        Whether the run can be made in its space, and of its images, is `preflight`'s to say.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no run configuration '{path}'")
        settings = read_yaml(Path(path))
        with naming(str(path)):
            return cls.model_validate(settings)

    @model_validator(mode="before")
    @classmethod
    def _share(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Fills what stands on top into the sections that take it."""
        models: dict[str, type[Settings]] = {
            "data": SourceSettings,
            "cost": CostSettings,
            "search": SearchSettings,
            "derive": DeriveSettings,
            "retrain": RetrainSettings,
            "evaluate": EvaluateSettings,
            "evidence": StudySettings,
        }
        optional = ("cost", "search", "derive", "retrain", "evaluate")
        filled: dict[str, Any] = {**{section: {} for section in optional}, **settings}
        for section, model in models.items():
            given = filled.get(section)
            if not isinstance(given, dict):
                continue  # missing, or refused as what it is
            _refuse_displaced(section, given)
            shared = {
                name: settings[name]
                for name in SHARED
                if name in model.model_fields and settings.get(name) is not None
            }
            filled[section] = {**given, **shared}
        return filled

    @model_validator(mode="after")
    def _compares_at_equal_cost(self) -> Self:
        if self.evidence and self.cost.kind != "mult_adds":
            kind = f"cost.kind is {self.cost.kind}"
            raise ValueError(f"evidence compares at equal Mult-Adds, but {kind}")
        return self

    def data_settings(self, input_size: int) -> DataSettings:
        """Those of 01-data; `input_size` is the space's own, for a run that names no other.

        ValueError where the pack is too small for it.
        """
        side = self.image_size or input_size
        with naming("data"):
            return DataSettings(**self.data.model_dump(), image_size=side)

    def stages(self, input_size: int) -> dict[str, Settings]:
        """Every stage's settings, by its notebook; as `data_settings`."""
        data = self.data_settings(input_size)
        stages: dict[str, Settings] = {
            "01-data": data,
            "02-cost": self.cost.model_copy(update={"image_size": data.image_size}),
            "03-search": self.search,
            "04-derive": self.derive,
            "05-retrain": self.retrain,
            "06-evaluate": self.evaluate.model_copy(update={"net_config": self.retrain.net_config}),
        }
        if self.evidence:
            sections = {"search": self.search.overrides(), "retrain": self.retrain.overrides()}
            trained = {**sections, "precision": self.retrain.precision}
            stages["09-evidence"] = self.evidence.model_copy(update=trained)
        return stages

    def parameters(self, run: str, input_size: int) -> dict[str, dict[str, Any]]:
        """What each notebook is given, as YAML and JSON know it."""
        parameters: dict[str, dict[str, Any]] = {"07-figures": {}}
        for stage, settings in self.stages(input_size).items():
            parameters[stage] = settings.model_dump(mode="json")
        return {stage: {"run": run, **parameters[stage]} for stage in sorted(parameters)}


def _refuse_displaced(section: str, given: dict[str, Any]) -> None:
    """ValueError where a section sets what stands elsewhere."""
    for name in given:
        if name in SHARED:
            place = "it stands on top, for all stages"
        elif name in DERIVED.get(section, ()):
            place = "it follows from the sections search and retrain"
        else:
            continue
        raise ValueError(f"there is no setting '{section}.{name}': {place}")
