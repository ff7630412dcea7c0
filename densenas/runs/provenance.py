"""What a result comes from: the revision of the code, the packages, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import torch

from densenas.files import PACKAGE
from densenas.threads import cores

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "papermill", "snakemake", "densenas")
CPUINFO = Path("/proc/cpuinfo")
GIT_SECONDS = 20.0  # a repository on a network drive may never answer


def environment() -> dict[str, Any]:
    """Git revision, package versions and hardware of this process.

    What cannot be known is said to be unknown, and is never an error.
    """
    # Without a driver that serves it PyTorch counts GPUs whose names it cannot tell.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "git": _code(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        },
    }


def _code() -> dict[str, Any]:
    """Revision and dirty flag of the checkout that holds the package, else "unknown" and None.

    An installed package and an unpacked archive have no revision, also where a repository lies
    around them: the version among the packages says what they are.
    """
    unknown = {"revision": "unknown", "dirty": None}
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != PACKAGE.parent.resolve():
        return unknown
    # Unpacked straight into somebody's repository, the package is none of its files.
    if _git("ls-files", "--error-unmatch", f"{PACKAGE.name}/__init__.py") is None:
        return unknown
    revision = _git("rev-parse", "HEAD")
    # What a run itself writes is not a change of the code that made it.
    changes = _git("status", "--porcelain", "--untracked-files=normal", "--", ".", ":!reports")
    if not revision:
        return unknown
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _git(*command: str) -> str | None:
    """What git answers in the package's folder; None where it fails, is silent or not installed."""
    # GIT_DIR and the like would lead to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *command],
            env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _version(package: str) -> str:
    project = PACKAGE.parent / "pyproject.toml"
    if package == PACKAGE.name and project.is_file():  # an unpacked archive need not be installed
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    try:
        return importlib.metadata.version(package) or "unknown"
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return "not installed"


def processor() -> str:
    """The CPU's model, or what else tells it from others: architecture, implementer and parts."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""

    def values(field: str) -> list[str]:
        found = re.findall(rf"^{field}[ \t]*:[ \t]*(\S.*)$", text, flags=re.MULTILINE)
        return sorted({value.strip() for value in found} - {"unknown"})

    if models := values("model name"):
        return ", ".join(models)
    name = platform.processor() or platform.machine() or "unknown"
    if parts := values("CPU part"):  # ARM
        implementers = ", ".join(values("CPU implementer"))
        name = f"{name}, implementer {implementers}, part {', '.join(parts)}"
    return name
