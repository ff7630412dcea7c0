"""What other systems lack, taken away here: macOS knows no sched_getaffinity, no setpriv and no nproc."""

import os
import re
import shutil
import subprocess
import sys

from helpers import REPOSITORY as ROOT
from helpers import refused

from densenas import pipeline
from densenas.pipeline import tied
from densenas.runs.provenance import environment
from densenas.threads import cores
from densenas.training.processes import check_devices


def test_cores_are_those_that_a_process_may_use():
    assert cores() == len(os.sched_getaffinity(0))


def test_without_affinity_all_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert environment()["hardware"]["cores"] == cores() == 3
    check_devices("cpu", 3)
    with refused(ValueError, r"devices is 4, .* at most 3, the processor cores of this machine"):
        check_devices("cpu", 4)


def test_without_setpriv_macos_goes_on_and_linux_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pipeline.shutil, "which", lambda program: None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tied() == []
    monkeypatch.setattr(sys, "platform", "linux")
    with refused(ValueError, r"setpriv is missing, .*: install util-linux"):
        tied()


def test_make_counts_cores_without_nproc(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    (count,) = re.findall(r"\$\$\(nproc .*?\)", makefile)
    (tmp_path / "getconf").symlink_to(shutil.which("getconf"))
    bash = shutil.which("bash")
    command = f"echo {count.replace('$$', '$')}"
    bare = subprocess.check_output([bash, "-c", command], env={"PATH": str(tmp_path)}, text=True)
    assert int(bare) == os.cpu_count()
