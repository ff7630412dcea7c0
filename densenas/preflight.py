"""What can be known before a run is refused before it. `python -m densenas.preflight CONFIG` looks, and runs nothing.

The same look finds what the run's stages read from outside, so that the pipeline notices when that has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch

from densenas.files import DATA, naming, root
from densenas.images.data import listing
from densenas.images.pack import Item, fingerprint
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import SearchSpace
from densenas.networks import check_network, load_network, source_of
from densenas.recipes import override
from densenas.runs.run import Run
from densenas.settings import RunConfig
from densenas.training.processes import check_devices

DOWNLOADED = 10  # classes of every set that torchvision downloads
NETWORK_FILES = (
    "net_config",
    "model",
    "weights.pt",
)  # what `load_network` reads; exports may lie beside them


def identify(run: str = "", configuration: str = "", usual: str = "digits") -> tuple[str, Path]:
    """A run's name and its configuration file, of which one says the other; `usual` where neither is given.

    Raises ValueError or FileNotFoundError with one sentence.
    """
    if configuration:
        path = Path(configuration)
        name = run or path.stem
    else:
        name = run or usual
        path = DATA / "configs" / f"{name}.yml"
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    try:
        Run(name)
    except ValueError as error:
        named = "" if run else "; name the run yourself with RUN= (snakemake: --config run=)"
        raise ValueError(f"{error}{named}") from None
    if not path.is_file():
        usage = f"write data/configs/{name}.yml, or name its file with CONFIG= (snakemake: --config configuration=)"
        raise FileNotFoundError(f"there is no configuration '{path}' for run '{name}': {usage}")
    return name, path


def checked(path: Path) -> tuple[RunConfig, dict[str, str]]:
    """A configuration that passes `preflight`, and what that returns; every sentence names the file."""
    config = RunConfig.load(path)
    with naming(str(path)):
        return config, preflight(config)


def preflight(config: RunConfig) -> dict[str, str]:
    """Checks all that can be known before the first stage, the computing machine aside (`check_machine`).

    Looks at the space, at every image's name and size, and at the networks and folders that the configuration names.
    Returns for each stage that reads something from outside a hash of that. Raises ValueError or FileNotFoundError
    with one sentence.
    """
    space = SearchSpace.load(config.space)
    size = config.image_size or space.input_size
    fit(config, space, size)
    data, retrain = config.data, config.retrain
    source = data.dataset, data.source, data.num_classes, data.val_fraction, config.seed
    with naming("data"):
        items = listing(*source, download=False)
    if items is None:
        named = data.num_classes
        classes = len(named) if isinstance(named, list) else named or DOWNLOADED
    else:
        classes = len({item.label for item in chain(*items.values())})
        _check_batches(config, space, len(items["train"]), len(items["val"]))
    if config.targets:
        lattice = Lattice(CostTable.mult_adds(space, size, classes))
        for setting, target in config.targets:
            with naming(setting):
                lattice.at(target)
    if retrain.net_config is not None:
        with naming("retrain.net_config"):
            check_network(retrain.net_config, classes, size)
    if config.evaluate.model is not None:
        with naming("evaluate.model"):
            _check_trained(config.evaluate.model, classes, size, retrain.net_config)
    code = _code(retrain.net_config)
    return {
        "01-data": _images(data.dataset, chain(*items.values())) if items else "",
        "02-cost": hashlib.sha256(space.model_dump_json().encode()).hexdigest(),
        "05-retrain": code,
        "06-evaluate": code + _trained(config.evaluate.model),
    }


def fit(config: RunConfig, space: SearchSpace, size: int) -> None:
    """ValueError where this run cannot be made in its space, whatever its images are."""
    for section, recipe in {"search": space.search, "retrain": space.retrain}.items():
        with naming(section):
            override(recipe, **getattr(config, section).overrides())
    space.maps(size)  # refuses a size at which a map would vanish
    config.stages(space.input_size)  # refuses a pack that is smaller than the images
    if not config.targets:
        return
    # The classes are not counted yet, the classifier's share is small.
    low = Lattice(CostTable.mult_adds(space, size, 2)).reach[0]
    high = Lattice(CostTable.mult_adds(space, size, 10_000)).reach[1]
    for setting, target in config.targets:
        if not low <= target <= high:
            reach = f"networks of space {space.name} at {size} pixels have {low:.4g} to {high:.4g}"
            raise ValueError(f"{setting} is {target:g} million Mult-Adds, {reach}")


def check_machine(config: RunConfig) -> None:
    """ValueError where this machine lacks the devices that the stages compute on."""
    for section, training in {"search": config.search, "retrain": config.retrain}.items():
        with naming(section):
            check_devices(config.device, training.devices)


def _check_batches(config: RunConfig, space: SearchSpace, train: int, val: int) -> None:
    """Every process must get two images of each batch, and a batch cannot be larger than the set."""
    search, retrain = config.search, config.retrain
    sections = [
        ("search", search, space.search, train),
        ("retrain", retrain, space.retrain, train + val),
    ]
    for section, settings, recipe, images in sections:
        batch, devices = settings.batch_size or recipe.batch_size, settings.devices
        whose = "" if settings.batch_size else f" (of space {space.name})"
        given = f"{section}.batch_size is {batch}{whose}"
        if batch > images:
            raise ValueError(
                f"{given}, but there are only {images} images to train on: set it to at most that"
            )
        if batch % devices or batch < 2 * devices:
            raise ValueError(
                f"{given}, but {devices} devices share it: set it to a multiple of at least {2 * devices}"
            )
    if val < 2 * search.devices:
        few = f"{val} images are val, too few for {search.devices} processes of two images each"
        raise ValueError(
            f"data.val_fraction is {config.data.val_fraction}: {few}, raise it or add images"
        )


def _check_trained(folder: str, classes: int, size: int, net_config: str | None) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"'{folder}' is not a folder")
    net = load_network(folder, classes, net_config).eval()
    with torch.no_grad():
        told = net(torch.zeros(1, 3, size, size)).shape[-1]
    if told != classes:
        raise ValueError(
            f"the network in '{folder}' tells {told} classes apart, the data set has {classes}"
        )


def _digest(files: Iterable[Path]) -> str:
    """Of their contents, in this order; a file that is not there counts as empty."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _images(dataset: str, items: Iterable[Item]) -> str:
    """Only of sets that change. Torchvision's are what their names say, and this may be before their download."""
    return fingerprint(items) if dataset in ("digits", "folder") else ""


def _trained(folder: str | None) -> str:
    """Of the files of a trained network; empty without a folder."""
    return _digest(Path(folder, name) for name in NETWORK_FILES) if folder else ""


def _code(model: str | None) -> str:
    """Of the source behind "package.module:function": its file, or its whole package; empty for other networks."""
    source = source_of(model) if model else None
    if source is None:
        return ""
    package = source.parent
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    whole = (source.parent / "__init__.py").is_file()
    return _digest(sorted(package.rglob("*.py")) if whole else [source])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m densenas.preflight", description=__doc__.splitlines()[0]
    )
    parser.add_argument("configuration", metavar="CONFIG", help="a run's YAML file")
    path = Path(parser.parse_args().configuration).absolute()
    try:
        os.chdir(root())  # from where a configuration's paths are meant
        config, _ = checked(path)
        check_machine(config)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"{path}: nothing stands against this run")


if __name__ == "__main__":
    main()
