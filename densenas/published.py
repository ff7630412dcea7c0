"""A published model folder: `net_config`, the text of an architecture, and `weights.pt`, its state dict."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from densenas.files import naming, read_text, write_text
from densenas.method.architecture import Architecture, DerivedNet
from densenas.weights import fill, read_state


def from_published(key: str) -> str:
    """A published state-dict key as ours: no `module.` in front, no `_` before expand, depthwise, project."""
    return key.removeprefix("module.").replace("._", ".")


def save_published(folder: Path, arch: Architecture) -> None:
    """Writes `net_config`, one of the two files of a folder that `load_published` reads."""
    write_text(folder / "net_config", f"{arch}\nnet_type: {arch.net_type}\n")


def load_published(
    folder: str | Path, own_ops: Collection[str] = ()
) -> tuple[Architecture, DerivedNet]:
    """The network in a folder with `net_config` (then `net_type: mbv2|res`) and `weights.pt`.

    The class count is that of the stored classifier. Ops of one's own are code: one that net_config names is imported
    where `own_ops` names it, too. Raises FileNotFoundError or ValueError with one sentence.
    """
    folder = Path(folder)
    for name in ("net_config", "weights.pt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; a published model folder has net_config and weights.pt"
            )
    arch = read_net_config(folder / "net_config")
    for op in arch.own_ops:
        if op not in own_ops:
            foreign = f"names the code '{op}', which is run only where own_ops names it, too"
            raise ValueError(f"{folder / 'net_config'} {foreign}")
    path = folder / "weights.pt"
    stored = read_state(path)
    state = {from_published(key): value for key, value in stored.items()}
    if len(state) < len(stored):
        twice = "some entries are there twice, with and without 'module.' or '_' in their names"
        raise ValueError(f"{path}: {twice}")
    classifier = state.get("classifier.weight")
    if classifier is None:
        raise ValueError(f"{path}: no classifier.weight among the {len(state)} entries")
    if classifier.dim() != 2 or len(classifier) < 1:
        shapes = f"the shape {tuple(classifier.shape)}, expected (classes, channels)"
        raise ValueError(f"{path}: classifier.weight has {shapes}")
    with naming(str(path)):
        model = arch.build(num_classes=len(classifier))
    fill(model, state, path, "its net_config")
    return arch, model


def read_net_config(path: Path) -> Architecture:
    """The architecture in a file; as the published reader, it joins the lines up to the one with net_type and stops.

    Raises FileNotFoundError or ValueError with one sentence.
    """
    text, stated = "", None
    for line in read_text(path).removeprefix("\ufeff").splitlines():
        if "net_type" in line:
            stated = line.rpartition(":")[2].strip()
            break
        text += line.strip()
    with naming(str(path)):
        arch = Architecture.parse(text.removesuffix("|"))
        if stated not in (None, arch.net_type):
            raise ValueError(f"net_type is {stated[:80]}, but the ops are {arch.net_type}")
    return arch
