"""Files: settings read strictly, results written whole, and where both live."""

from __future__ import annotations

import ast
import glob
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

PACKAGE = Path(__file__).parent
# A checkout keeps data/ at its top level; an installed wheel carries it inside the package.
DATA = PACKAGE / "data" if (PACKAGE / "data").is_dir() else PACKAGE.parent / "data"
TEXT_BYTES = 16 << 20  # of a text file that is read whole; the longest cost table has less than one
SETTINGS_BYTES = 1 << 18  # of a YAML file
DEEPEST = 10  # settings within settings
HOST = re.sub(r"[^\w-]", "-", platform.node())[:64]
_WRITES = itertools.count()


def root() -> Path:
    """Where reports/ and runs/ live: DENSENAS_ROOT, or else this checkout, or else the working directory."""
    chosen = os.environ.get("DENSENAS_ROOT")
    if chosen:
        return Path(chosen).expanduser().absolute()
    checkout = PACKAGE.parent
    return checkout if (checkout / "Snakefile").is_file() else Path.cwd()


class Strict(BaseModel):
    """Unknown names are errors: a misspelled knob must never fall back to its default in silence.

    So are values of another type, infinity and nan: `epochs: true` is not one epoch. A tuple needs
    `strict=False` in its field, since YAML and JSON know lists only; its entries stay strict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@contextmanager
def naming(where: str, link: str = ": ") -> Iterator[None]:
    """Around what may raise ValueError, pydantic's included, or OSError: it says in one sentence where, and what."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}{link}{error}") from None
    except OSError as error:
        raise type(error)(f"{where}{link}{error}") from None


def _sentence(error: ValidationError) -> str:
    """The first thing that pydantic found, in our words."""
    errors = error.errors()
    # A misspelled name also leaves the right one missing: the misspelling is what to mend.
    misspelled = [one for one in errors if one["type"] in ("extra_forbidden", "invalid_key")]
    first = (misspelled or errors)[0]
    setting = ".".join(str(part) for part in first["loc"])
    given = first["input"]
    if misspelled:
        return f"there is no setting '{setting}', is it misspelled?"
    if first["type"] == "missing":
        return f"the setting '{setting}' is missing"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason.replace("a valid tuple", "a list")
    if reason.endswith("list") and str(given).startswith("["):
        reason += "; papermill takes one by -y, not by -p"
    if not setting:
        return reason
    if isinstance(given, dict):  # a whole section, of which the reason names the settings
        return f"{setting}: {reason}"
    if first["type"] == "float_type" and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", str(given), re.I):
        reason += "; YAML takes 1e-4 and 1.0e4 for text, write 1.0e-4 and 1.0e+4"
    return f"{setting}: {reason} (got {shown(given)})"


def shown(value: Any) -> str:
    """A value as it stands in a sentence: repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:90]} …"


def one_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def literal(text: str) -> Any:
    """A Python literal, never executed; ValueError where the text is anything else."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"is not a Python literal: {text.strip()[:80]!r}") from None


def read_text(path: str | Path) -> str:
    """A whole text file; FileNotFoundError or ValueError with one sentence where it is none."""
    path = Path(path)
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise FileNotFoundError(f"there is no file '{path}'")
    try:
        if path.stat().st_size > TEXT_BYTES:
            most = f"{TEXT_BYTES >> 20} MiB"
            raise ValueError(f"{path}: larger than {most}, more than is read of a text file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class _Settings(yaml.SafeLoader):
    """YAML without what makes a small file endless, or another number of what is written."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor:
            self._refuse("anchors and aliases (& and *) are not read, write the value out", event)
        if event.tag not in (None, "!"):
            self._refuse(f"the tag {event.tag} is not read", event)
        if self.level == DEEPEST:
            self._refuse(f"settings are nested more than {DEEPEST} deep", event)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: list[Any] = []
        for key, _ in node.value:
            if key.value in names:
                self._refuse(f"the setting {shown(key.value)} is there twice", key)
            names.append(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        is_number = node.tag.endswith((":int", ":float"))
        if is_number and re.match(r"[-+]?0[\d_]|.*:", node.value):
            base = "would be read as octal or sexagesimal, write a decimal number"
            self._refuse(f"{node.value[:40]} {base}", node)
        return super().construct_scalar(node)

    def _refuse(self, problem: str, where: yaml.Event | yaml.Node) -> NoReturn:
        mark: Any = where.start_mark  # the stubs tell those of the C parser apart
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """Safe-loads a YAML mapping; raises ValueError with one sentence when the file holds anything else."""
    text = read_text(path)
    if len(text) > SETTINGS_BYTES:
        raise ValueError(f"{path}: larger than {SETTINGS_BYTES >> 10} KiB, more than settings need")
    try:
        content = yaml.load(text, _Settings)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else "?"
        problem = error.problem or error.context
        raise ValueError(f"{path}: not valid YAML in line {line}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object; ValueError names a damaged file and the remedy, what to do about it."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {remedy}")
    return content


def read_kept(path: Path, settings: str) -> dict[str, Any] | None:
    """What a step of a study kept, if it is whole and of these settings (a digest); says so where it is not."""
    if not path.exists():
        return None
    try:
        content = read_json(path, "it does not count and is made anew")
    except ValueError as error:
        print(error)
        return None
    if content.get("settings") != settings:
        print(f"{path} is of other data, costs or recipes: it does not count and is made anew")
        return None
    return content


@contextmanager
def writing(path: Path, *also: Path) -> Iterator[None]:
    """Around what writes to `path`: OSError with one sentence where it cannot, as on a full disk."""
    places = {None, *map(str, (path, *also, *path.parents))}
    try:
        yield
    except OSError as error:
        if error.filename not in places:
            raise  # of another file
        sentence = f"cannot be written ({error.strerror}); as soon as it can, the same call goes on"
        raise OSError(error.errno, sentence, str(path)) from None


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end.

    No reader and no kill meets half a file. File and folder are synced to the disk, or a power cut
    could leave an empty file under the new name. Raises OSError with one sentence where the disk is
    full or cannot be written.
    """
    path = Path(path)
    # Of this write alone, whoever else writes to the same path.
    # The suffix stays last, some writers look at it.
    partial = path.with_name(f".partial.{HOST}.{os.getpid()}.{next(_WRITES)}.{path.name}")
    with writing(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        try:
            yield partial
            _sync(partial)
            partial.replace(path)
        except RuntimeError:
            _refuse_full(partial)
            raise
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        with suppress(OSError):  # a file system that cannot sync a folder has the file nevertheless
            _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_full(partial: Path) -> None:
    """OSError where nothing more can be written: PyTorch calls a full disk 'unexpected pos'."""
    with partial.open("ab") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())


def _remove_abandoned(path: Path) -> None:
    """Removes what killed processes left half-written; another machine's once it is a day old."""
    for partial in path.parent.glob(f".partial.*.{glob.escape(path.name)}"):
        _, _, host, process, *_ = partial.name.split(".")
        with suppress(OSError):  # another process may have removed it
            old = time.time() - partial.stat().st_mtime > 24 * 3600
            if old or (host == HOST and not _lives(process)):
                partial.unlink()


def _lives(process: str) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole text file or nothing."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
