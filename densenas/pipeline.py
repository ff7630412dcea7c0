"""What `make reproduce` and `make evidence` start: Snakemake on one run, and its report at the end.

RUN, CONFIG and CORES come from the environment, where no shell reads them.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from densenas.config import PACKAGE, ROOT, read_text
from densenas.preflight import identify
from densenas.report import tell
from densenas.run import Run, RunConfig

GOES_ON = "the same command goes on from the last checkpoint"
STOPPED = f"stopped; {GOES_ON}"
# Errors that say what is wrong in a sentence; any other is a fault of the program.
SENTENCES = ("ValueError", "FileNotFoundError", "RuntimeError", "FloatingPointError")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def last_words(logs: Path) -> list[str]:
    """One sentence for each job that failed, out of what it left in its log."""
    sentences = []
    for path in sorted(logs.glob("*.log")):
        text = read_text(path)
        if "Traceback (most recent call last)" in text:
            sentences.append(_sentence(path, text))
    return sentences or [f"a stage was ended from outside, or for want of memory; {GOES_ON}"]


def _sentence(path: Path, text: str) -> str:
    last = text.strip().splitlines()[-1]
    kind, _, words = last.partition(": ")
    if kind.endswith("KeyboardInterrupt"):
        return STOPPED
    if kind.endswith("DeadKernelError"):
        return f"{path.stem}: the notebook's process died, as it does for want of memory; {GOES_ON}"
    if "No space left on device" in last:
        return f"{path.stem}: the disk is full; free some of it, then {GOES_ON}"
    if kind.rpartition(".")[2] in SENTENCES:
        return f"{path.stem}: {words}"
    return f"{path.stem}: {last} (where: {path})"


@contextmanager
def one_pipeline() -> Iterator[None]:
    """One pipeline at a time: a second one says so and waits for the first, also for one whose terminal is gone.

    The lock is the kernel's and goes with its process, where Snakemake's own would stay behind after a kill -9.
    """
    path = ROOT / "runs" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another make is at work here: waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_snakemake(name: str, configuration: Path, targets: list[str]) -> int:
    """Runs the Snakefile's rules and returns the exit status; passes on what would stop this process."""
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "snakemake"]
    command += ["--snakefile", str(PACKAGE.parent / "Snakefile"), "--nolock", "--rerun-incomplete"]
    command += ["--cores", os.environ.get("CORES") or str(len(os.sched_getaffinity(0)))]
    command += ["--quiet", "host", "reason", "progress"]
    # The dot before a relative path: Snakemake reads values as YAML, and cannot where one starts with #.
    command += ["--config", f"run={name}", f"configuration={os.path.join('.', configuration)}"]
    command += ["--keep-going", "--", *targets] if targets else []
    # A session of its own: Ctrl-C reaches this process alone, which ends Snakemake and its jobs in order.
    there = {**os.environ, "DENSENAS_ROOT": str(ROOT)}
    snakemake = subprocess.Popen(command, cwd=ROOT, env=there, start_new_session=True)
    stopped = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        os.killpg(snakemake.pid, signal.SIGTERM)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    status = snakemake.wait()
    if stopped and status:
        raise KeyboardInterrupt
    return status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m densenas.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", choices=["evidence"], help="the study instead of the stages")
    target = parser.parse_args().target
    usual = "evidence-digits" if target else "digits"
    try:
        name, path = identify(os.environ.get("RUN", ""), os.environ.get("CONFIG", ""), usual)
        if target and not RunConfig.load(path).evidence:
            raise ValueError(f"{path} has no section 'evidence': targets, seeds and networks of the study")
        if not shutil.which("setpriv"):
            raise ValueError("setpriv is missing, which ends stages with their pipeline: install util-linux")
        path = path if Path.cwd() == ROOT else path.absolute()
        with one_pipeline():
            if run_snakemake(name, path, [target] if target else []):
                sys.exit(1)
        tell(Run(name))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
