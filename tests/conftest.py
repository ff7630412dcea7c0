import multiprocessing
import os
import shutil

# Tiny networks gain nothing from threads, and lose much once another process wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from helpers import REPOSITORY
from hypothesis import HealthCheck, settings

from densenas.runs.run import Run

settings.register_profile(
    "densenas",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("densenas")


@pytest.fixture(scope="session")
def processes():
    """Processes that start at once: forked off one that has PyTorch imported, but never used."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densenas.search", "densenas.train", "torch.utils.tensorboard"])
    return context


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Runs keep their folders here instead of in the repository."""
    monkeypatch.setenv("DENSENAS_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def run(root):
    return Run("made-up")


@pytest.fixture
def reported(root):
    """The committed run of the digits, where it can be changed and damaged."""
    shutil.copytree(REPOSITORY / "reports/examples/digits", root / "reports" / "digits")
    return Run("digits")
