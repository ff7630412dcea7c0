"""Code of one's own, named as "package.module:function": an op, a loss, a network. Nothing is registered.

A name in a file is data. Its source can be found and compared without running it; it is imported where something is
built of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
SEEN: dict[Path, str] = {}  # digests of code as this process imported it


def is_own(name: str) -> bool:
    """Whether this is the name of a function, package.module:function."""
    return NAME.fullmatch(name) is not None


def source_of(name: str) -> Path | None:
    """The file of the module that `name` begins with; None where there is none. Nothing is imported.

    Looked for where Python imports from: what is installed, this repository among it, and the working directory.
    """
    if not is_own(name):
        return None
    here = os.getcwd()  # a notebook imports from there, a program that was installed does not
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    first, *inner = name.partition(":")[0].split(".")
    try:
        found = importlib.util.find_spec(first)
    except (ImportError, ValueError, AttributeError):
        return None
    if found is None:
        return None
    if not inner:
        return Path(found.origin) if found.origin and found.has_location else None
    # Asked for a module in a package, importlib would import the package.
    for folder in found.submodule_search_locations or ():
        module = Path(folder, *inner)
        for path in (module / "__init__.py", module.parent / f"{module.name}.py"):
            if path.is_file():
                return path
    return None


def code(name: str) -> str:
    """A digest of the source behind a name: of its file, or of the whole package; empty where there is no source."""
    source = source_of(name)
    if source is None:
        return ""
    package = source.parent
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    whole = (source.parent / "__init__.py").is_file()
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")) if whole else [source]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def codes(names: Iterable[str | None]) -> dict[str, str]:
    """`code` of each name: what results depend on besides numbers.

    ValueError with one sentence where there is no source to tell one version from another.
    """
    found = {name: code(name) for name in names if name is not None}
    for name, digest in found.items():
        if not digest:
            expected = "expected package.module:function in the working directory or installed"
            raise ValueError(f"there is no source file of '{name}', {expected}")
    return found


def function(name: str) -> Callable[..., Any]:
    """The function of that name, imported; ValueError with one sentence, which begins with the name."""
    source = source_of(name)
    if source is not None:
        # A process keeps the code that it imported first, whatever the file says since.
        digest = code(name)
        if SEEN.setdefault(source, digest) != digest:
            edited = f"{source} was edited since this process imported it"
            raise ValueError(f"{name!r:.100}: {edited}: restart the process or kernel")
    # Whatever the user's code raises is told in one sentence; a script may even exit when imported.
    try:
        found = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name!r:.100} cannot be imported: {reason(error)}") from None
    if not callable(found):
        raise ValueError(f"{name!r:.100} is a {type(found).__name__}, expected a function")
    return found


def module(kind: str, name: str, call: str, *arguments: Any, **named: Any) -> nn.Module:
    """What the function makes of these arguments, which a sentence shows as `call`; ValueError with one sentence, which
    begins with the kind of thing that was named, where that is no module.
    """
    called = f"{kind} {name!r:.100}"
    try:
        make = function(name)
    except ValueError as error:
        raise ValueError(f"{kind} {error}") from None
    try:
        made = make(*arguments, **named)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{called} called with {call}: {reason(error)}") from None
    if not isinstance(made, nn.Module):
        raise ValueError(f"{called} returns a {type(made).__name__}, expected a torch.nn.Module")
    return made


def reason(error: BaseException) -> str:
    """What an error of others says, with its kind."""
    kind = type(error).__name__
    first = str(error).strip().partition("\n")[0].strip()
    return f"{first[:200] or kind} ({kind})"
