"""What a run is told: one YAML file, a section for each stage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, field_validator

from densenas.baselines import WITHIN
from densenas.files import Strict, naming, read_yaml
from densenas.images.decoding import SHORTER
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import SearchSpace
from densenas.recipes import Epochs, Images, override

Dataset = Literal["digits", "cifar10", "fashion_mnist", "imagenette", "folder"]
Augment = Literal["weak", "random_sized", "rand_scale"]  # the published training transforms


class DataConfig(Strict):
    dataset: Dataset
    source: str | None = None
    num_classes: int | list[str] | None = None
    val_fraction: float = Field(0.2, gt=0, lt=1)
    pack: Literal["original"] | int | None = None
    quality: int = Field(90, ge=1, le=100)
    augment: Augment | None = None
    skip_broken: bool = False

    @field_validator("pack", mode="before")
    @classmethod
    def _is_a_side(cls, pack: Any) -> Any:
        if pack in (None, "original") or (type(pack) is int and 0 < pack <= SHORTER):
            return pack
        raise ValueError(f"expected 'original' or a shorter side of 1 to {SHORTER} pixels")

    @field_validator("num_classes", mode="before")
    @classmethod
    def _names_are_text(cls, classes: Any) -> Any:
        for name in classes if isinstance(classes, list) else ():
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is not read as text, put names of classes in quotes")
        return classes


class CostConfig(Strict):
    kind: Literal["mult_adds", "latency"] = "mult_adds"
    batch_size: int = Field(1, ge=1)
    networks: int = Field(0, ge=0, le=10_000)
    rounds: int = Field(12, ge=1, le=10_000)

    @field_validator("networks")
    @classmethod
    def _can_be_ranked(cls, networks: int) -> int:
        if networks == 1:
            raise ValueError("a rank correlation needs at least 2 networks, 0 measures none")
        return networks


class TrainingConfig(Strict):
    epochs: Epochs | None = None
    batch_size: Images | None = None
    devices: int = Field(1, ge=1)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"


class SearchConfig(TrainingConfig):
    arch_start_epoch: int | None = Field(None, ge=0)
    target_cost: float | None = Field(None, gt=0)


class RetrainConfig(TrainingConfig):
    net_config: str | None = None


class EvaluateConfig(Strict):
    model: str | None = None


class EvidenceConfig(Strict):
    """A study: `targets` in millions of Mult-Adds, searches and random networks for each."""

    # A YAML list becomes a tuple, its entries are as strict as everything else.
    targets: tuple[PositiveFloat, ...] = Field(min_length=1, max_length=100, strict=False)
    seeds: int = Field(3, ge=1, le=1000)
    networks: int = Field(8, ge=2, le=1000)

    @field_validator("targets")
    @classmethod
    def _are_apart(cls, targets: tuple[float, ...]) -> tuple[float, ...]:
        ordered = sorted(targets)
        for low, high in itertools.pairwise(ordered):
            if high <= low * (1 + WITHIN):
                near = f"{low!r} and {high!r} are within {WITHIN:.0%} of each other"
                raise ValueError(f"{near} and would count networks twice, leave one out")
        return targets


class RunConfig(Strict):
    """One run as a YAML file: what the stages share on top, what one stage alone takes in its section.

    Names and meanings are those of the notebooks' parameters; what is left out is None, the space's own recipe.
    """

    space: str
    image_size: int | None = Field(None, ge=8)  # None: the space's own input size
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    deterministic: bool = False
    data: DataConfig
    cost: CostConfig = CostConfig()
    search: SearchConfig = SearchConfig()
    retrain: RetrainConfig = RetrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    evidence: EvidenceConfig | None = None  # the study that `make evidence` makes

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        """Only whether there can be such a device: the machine that checks may not be the one that computes."""
        try:
            kind = torch.device("cpu" if device == "auto" else device).type
        except RuntimeError:
            kind = "unknown"
        if kind in ("unknown", "meta"):
            raise ValueError("expected auto, cpu, cuda or one GPU such as cuda:1")
        return device

    @property
    def targets(self) -> list[tuple[str, float]]:
        """Every cost in million Mult-Adds that is asked for, with the setting that asks."""
        targets = [
            ("evidence.targets", target)
            for target in (self.evidence.targets if self.evidence else ())
        ]
        if self.search.target_cost is not None and self.cost.kind == "mult_adds":
            targets.append(("search.target_cost", self.search.target_cost))
        return targets

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Reads and checks a run's file, its space included; ValueError or FileNotFoundError with one sentence."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no run configuration '{path}'")
        settings = read_yaml(Path(path))
        with naming(str(path)):
            config = cls.model_validate(settings)
            config.fit(SearchSpace.load(config.space))
        return config

    def fit(self, space: SearchSpace) -> None:
        """ValueError where this run cannot be made in its space; `preflight` looks further, at the images too."""
        with naming("search"):
            override(
                space.search,
                **self.search.model_dump(include={"epochs", "arch_start_epoch", "batch_size"}),
            )
        size = self.image_size or space.input_size
        space.maps(size)  # refuses a size at which a map would vanish
        pack = self.data.pack
        if isinstance(pack, int) and pack < size:
            raise ValueError(
                f"data.pack is {pack}, but training sees images of {size} pixels: set it to at least that"
            )
        if self.evidence and self.cost.kind != "mult_adds":
            raise ValueError(
                f"evidence compares at equal Mult-Adds, but cost.kind is {self.cost.kind}"
            )
        if not self.targets:
            return
        # The classes are not counted yet, the classifier's share is small.
        low = Lattice(CostTable.mult_adds(space, size, 2)).reach[0]
        high = Lattice(CostTable.mult_adds(space, size, 10_000)).reach[1]
        for setting, target in self.targets:
            if not low <= target <= high:
                reach = (
                    f"networks of space {space.name} at {size} pixels have {low:.4g} to {high:.4g}"
                )
                raise ValueError(f"{setting} is {target:g} million Mult-Adds, {reach}")

    def parameters(self, run: str) -> dict[str, dict[str, Any]]:
        """What each stage's notebook is given."""
        size = self.image_size or SearchSpace.load(self.space).input_size
        training = {"seed": self.seed, "device": self.device, "deterministic": self.deterministic}
        stages = {
            "01-data": {**self.data.model_dump(), "image_size": size, "seed": self.seed},
            "02-cost": {
                **self.cost.model_dump(),
                "space": self.space,
                "image_size": size,
                "device": self.device,
            },
            "03-search": {**self.search.model_dump(), "space": self.space, **training},
            "04-derive": {},
            "05-retrain": {**self.retrain.model_dump(), **training},
            "06-evaluate": {
                **self.evaluate.model_dump(),
                "net_config": self.retrain.net_config,
                "device": self.device,
            },
            "07-figures": {},
        }
        if self.evidence:
            stages["09-evidence"] = {
                **self.evidence.model_dump(mode="json"),
                "space": self.space,
                "precision": self.retrain.precision,
                "device": self.device,
                "search": self.search.model_dump(
                    include={"epochs", "arch_start_epoch", "batch_size"}
                ),
                "retrain": self.retrain.model_dump(include={"epochs", "batch_size"}),
            }
        return {stage: {"run": run, **values} for stage, values in stages.items()}
