"""A stage on one machine of several: `torchrun … -m densenas.stage RUN STAGE [CONFIGURATION]`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densenas.files import DATA
from densenas.method.space import SearchSpace
from densenas.search import search_run
from densenas.settings import RunConfig
from densenas.train import retrain_run
from densenas.training.processes import exiting, join

STAGES: dict[str, Callable[[str, Any], None]] = {"03-search": search_run, "05-retrain": retrain_run}


def main() -> None:
    """This process's part of a stage; without torchrun all of it."""
    parser = argparse.ArgumentParser(
        "torchrun … -m densenas.stage", description="Runs a stage on several machines."
    )
    parser.add_argument("run", help="name of the run")
    parser.add_argument("stage", choices=[*STAGES], help="what to do of it")
    parser.add_argument(
        "configuration", nargs="?", help="the run's YAML file, data/configs/RUN.yml unless given"
    )
    asked = parser.parse_args()
    with exiting():
        path = Path(asked.configuration or DATA / "configs" / f"{asked.run}.yml")
        if not path.is_file():
            named = "name its file behind the stage"
            raise FileNotFoundError(f"run '{asked.run}' has no configuration '{path}': {named}")
        config = RunConfig.load(path)
        settings = config.stages(SearchSpace.load(config.space).input_size)[asked.stage]
    stage = STAGES[asked.stage]
    if "WORLD_SIZE" in os.environ:
        join(stage, config.device, asked.run, settings)
        return
    with exiting():
        stage(asked.run, settings)


if __name__ == "__main__":
    main()
