"""What `make reproduce` and `make evidence` start: Snakemake on one run, and its report at the end.

RUN, CONFIG and CORES come from the environment, where no shell reads them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SNAKEFILE = Path(__file__).absolute().parent.parent / "Snakefile"
GOES_ON = "the same command goes on from the last checkpoint"
STOPPED = f"stopped; {GOES_ON}"
# Errors that say what is wrong in a sentence; any other is a fault of the program.
SENTENCES = ("ValueError", "FileNotFoundError", "RuntimeError", "FloatingPointError")


def last_words(logs: Path) -> list[str]:
    """One sentence for each job that failed, out of what it left in its log."""
    sentences = []
    for path in sorted(logs.glob("*.log")):
        text = path.read_text(encoding="utf-8", errors="replace")
        # A job of its own ends with the sentence alone, behind the word that `exiting` begins it with.
        last = text.strip().rpartition("\n")[2]
        if last.startswith("error: "):
            sentences.append(path.stem + last.removeprefix("error"))
        elif "Traceback (most recent call last)" in text:
            sentences.append(_sentence(path, text))
    return sentences or [
        f"a stage was ended from outside, or for want of memory or disk; {GOES_ON}"
    ]


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


def say_wait(_: str) -> None:
    print("another make is at work here: waiting for it to end", flush=True)


def tied() -> list[str]:
    """What starts a command that ends with whoever started it, kill -9 included; macOS has no such thing."""
    if shutil.which("setpriv"):
        return ["setpriv", "--pdeathsig", "KILL"]
    if sys.platform == "linux":
        ends = "which ends stages with their pipeline"
        raise ValueError(f"setpriv is missing, {ends}: install util-linux")
    return []


def run_snakemake(root: Path, name: str, configuration: Path, targets: list[str]) -> int:
    """Runs the Snakefile's rules and returns the exit status; KeyboardInterrupt where a signal has ended it."""
    from densenas.threads import cores

    command = [*tied(), sys.executable, "-m", "snakemake"]
    # A lock of Snakemake's own would stay behind after a kill -9.
    command += ["--snakefile", str(SNAKEFILE), "--nolock", "--rerun-incomplete"]
    command += ["--cores", os.environ.get("CORES") or str(cores())]
    command += ["--quiet", "host", "reason", "progress"]
    # The dot before a relative path: Snakemake reads values as YAML, and cannot where one starts with #.
    command += ["--config", f"run={name}", f"configuration={os.path.join('.', configuration)}"]
    command += ["--keep-going", "--", *targets] if targets else []
    # A session of its own: Ctrl-C reaches this process alone, which ends Snakemake and its jobs in order.
    there = {**os.environ, "DENSENAS_ROOT": str(root)}
    snakemake = subprocess.Popen(command, cwd=root, env=there, start_new_session=True)
    stopped = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        with suppress(ProcessLookupError):
            os.killpg(snakemake.pid, signal.SIGTERM)

    _handle(stop)
    status = snakemake.wait()
    _handle(signal.default_int_handler)
    if stopped and status:
        raise KeyboardInterrupt
    return status


def _handle(handler: Callable[[int, Any], None]) -> None:
    """Of every signal that means stop, unless nohup or the like has it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def check_writable(root: Path, name: str) -> None:
    """PermissionError with one sentence where the run could not keep what it makes."""
    for folder in (root / ".snakemake", root / "runs" / name, root / "reports" / name):
        nearest = folder
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise PermissionError(
                f"{nearest} cannot be written, results belong there: see DENSENAS_ROOT"
            )


def keep_caches(folder: Path) -> None:
    """Where HOME cannot be written, this is where Snakemake, matplotlib and Jupyter keep what they would keep there."""
    if not os.access(Path.home(), os.W_OK):
        for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            os.environ.setdefault(name, str(folder / name.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m densenas.pipeline", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "target", nargs="?", choices=["evidence"], help="the study instead of the stages"
    )
    target = parser.parse_args().target
    usual = "evidence-digits" if target else "digits"
    try:
        _handle(signal.default_int_handler)
        # Seconds, in which a signal is heard already.
        from densenas.files import root
        from densenas.preflight import identify
        from densenas.report import tell
        from densenas.runs.locks import locked
        from densenas.runs.run import Run
        from densenas.settings import RunConfig

        home = root()
        if not SNAKEFILE.is_file():
            raise FileNotFoundError(
                f"{SNAKEFILE} is not there, an installed package is no pipeline: clone the repository"
            )
        name, path = identify(os.environ.get("RUN", ""), os.environ.get("CONFIG", ""), usual)
        if target and not RunConfig.load(path).evidence:
            raise ValueError(
                f"{path} has no section 'evidence': targets, seeds and networks of the study"
            )
        path = path if Path.cwd() == home else path.absolute()
        check_writable(home, name)
        keep_caches(home / "runs" / ".caches")
        with locked(home / "runs" / ".lock", say_wait):
            if run_snakemake(home, name, path, [target] if target else []):
                sys.exit(1)
        tell(Run(name))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
