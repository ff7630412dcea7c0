"""What can be known before a run is refused before it. `python -m densenas.preflight CONFIG` looks, and runs nothing.

The same look finds what the run's stages read from outside, so that the pipeline notices when that has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from densenas import own
from densenas.files import DATA, naming, root
from densenas.images.items import fingerprint
from densenas.images.prepare import listing
from densenas.method.cost import CostTable
from densenas.method.derivation import Lattice
from densenas.method.space import SearchSpace
from densenas.networks import as_model, check_network, load_network, own_code
from densenas.recipes import RetrainRecipe, SearchRecipe, override
from densenas.runs.run import Run
from densenas.settings import RunConfig
from densenas.timings import read_times
from densenas.training.processes import check_devices, exiting
from densenas.training.steps import check_batches, check_loss

DOWNLOADED = 10  # classes that every set of torchvision's has, for one that is yet to be downloaded
# What `load_network` reads; exports may lie beside them.
NETWORK_FILES = ("net_config", "model", "weights.pt")


COMMITTED = ("cifar10", "examples")  # in reports/, which no run shall replace by chance


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
        if name in COMMITTED and not run:
            raise ValueError(f"a run called '{name}' would replace the committed reports/{name}")
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
    data = config.data_settings(space.input_size)
    space.maps(data.image_size)  # refuses a size at which a map would vanish
    search, ways, retrain = _recipes(config, space)
    with naming("data"):
        splits = listing(data, download=False)
    if splits is None:
        chosen = data.num_classes
        classes = len(chosen) if isinstance(chosen, list) else chosen or DOWNLOADED
    else:
        classes = len({item.label for item in splits["train"]})
        _check_batches(config, search, ways, retrain, len(splits["train"]), len(splits["val"]))
    table, device = CostTable.mult_adds(space, data.image_size, classes), config.cost.table
    if device is not None:
        with naming("cost.table"):
            table = read_times(device, space, data.image_size, classes)
    _check_targets(config, table)
    recipes: dict[str, SearchRecipe | RetrainRecipe] = {"search": search, "retrain": retrain}
    recipes |= {f"evidence.searches.{way}": recipe for way, recipe in ways.items()}
    for name, recipe in recipes.items():
        with naming(name):
            check_loss(recipe, classes)
    model = config.retrain.net_config
    if model is not None:
        with naming("retrain.net_config"):
            check_network(as_model(model), classes, data.image_size)
    outside = _outside(model) + _digests([retrain.loss])
    timed = _digest([Path(device)]) if device else ""
    images = trained = ""
    # Torchvision's sets are what their names say, and this may be before their download.
    if splits is not None and data.dataset in ("digits", "folder"):
        images = fingerprint(item for items in splits.values() for item in items)
    if config.evaluate.model is not None:
        folder = Path(config.evaluate.model).expanduser()
        with naming("evaluate.model"):
            if not folder.is_dir():
                raise FileNotFoundError(f"'{config.evaluate.model}' is not a folder")
            load_network(folder, classes, model, space.own_ops)
        trained = _digest([folder / name for name in NETWORK_FILES])
    return {
        "01-data": images,
        "02-cost": hashlib.sha256(space.model_dump_json().encode()).hexdigest()
        + _digests(space.own_ops)
        + timed,
        "03-search": _digests([search.loss]),
        "05-retrain": outside,
        "06-evaluate": outside + trained,
        "09-evidence": _digests(way.loss for way in ways.values()),
    }


def check_machine(config: RunConfig) -> None:
    """ValueError where this machine lacks the devices that the stages compute on."""
    with naming("search"):
        check_devices(config.device, config.search.devices)
    with naming("retrain"):
        check_devices(config.device, config.retrain.devices)


def _recipes(
    config: RunConfig, space: SearchSpace
) -> tuple[SearchRecipe, dict[str, SearchRecipe], RetrainRecipe]:
    """Those of search, of a study's ways and of retraining; ValueError where a recipe cannot be overridden so."""
    with naming("search"):
        search = override(space.search, **config.search.overrides())
    ways: dict[str, SearchRecipe] = {}
    for way, changed in (config.evidence.searches if config.evidence else {}).items():
        with naming(f"evidence.searches.{way}"):
            ways[way] = override(search, **changed)
    with naming("retrain"):
        retrain = override(space.retrain, **config.retrain.overrides())
    return search, ways, retrain


def _check_batches(
    config: RunConfig,
    search: SearchRecipe,
    ways: dict[str, SearchRecipe],
    retrain: RetrainRecipe,
    train: int,
    val: int,
) -> None:
    splits = {"val": val, "train": train}
    with naming("search", "."):
        check_batches(search.batch_size, splits, config.search.devices)
    for way, recipe in ways.items():
        with naming(f"evidence.searches.{way}", "."):
            check_batches(recipe.batch_size, splits)
    with naming("retrain", "."):
        splits = {"train with val": train + val}
        check_batches(retrain.batch_size, splits, config.retrain.devices)


def _check_targets(config: RunConfig, table: CostTable) -> None:
    """ValueError where no network costs what is asked for, as far as that is known before a measurement."""
    lattice = Lattice(table)
    if config.search.target_cost is not None and config.cost.kind == table.kind:
        with naming("search.target_cost"):
            lattice.at(config.search.target_cost)
    if config.evidence:
        with naming("evidence.targets"):
            for target in config.evidence.targets:
                lattice.at(target)
    if config.cost.kind == table.kind:
        with naming("derive.budgets"):
            for budget in config.derive.budgets:
                lattice.at(budget)


def _digests(names: Iterable[str | None]) -> str:
    """Of code of one's own; empty where there is none."""
    return "".join(own.codes(names).values())


def _digest(files: Iterable[Path]) -> str:
    """Of their contents, in this order; a file that is not there counts as empty."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _outside(model: str | None) -> str:
    """Of what lies behind a network: the file with its net_config, and the source of what is code of one's own."""
    if model is None:
        return ""
    network = as_model(model)
    content = hashlib.sha256(network.encode()).hexdigest() if network != model else ""
    return content + _digests(own_code(network))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m densenas.preflight", description=__doc__.splitlines()[0]
    )
    parser.add_argument("configuration", metavar="CONFIG", help="a run's YAML file")
    path = Path(parser.parse_args().configuration).absolute()
    with exiting():
        os.chdir(root())  # from where a configuration's paths are meant
        config, _ = checked(path)
        check_machine(config)
    print(f"{path}: nothing stands against this run")


if __name__ == "__main__":
    main()
