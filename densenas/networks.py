"""Networks by name and in folders: derived, published, torchvision's or the user's own."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from densenas import own
from densenas.files import atomic, read_text, root, shown, write_text
from densenas.method.architecture import Architecture, DerivedNet
from densenas.published import load_published, read_net_config, save_published
from densenas.runs.run import Run
from densenas.weights import fill, read_state

# Not those for detection, segmentation, video or optical flow, nor quantized ones.
CLASSIFIERS = frozenset(torchvision.models.list_models(module=torchvision.models))
# What `export` and `write_card` put beside a network's weights.
EXPORTS = ("model.pt2", "model.onnx", "model.safetensors", "MODEL_CARD.md")


def network(model: str, num_classes: int) -> nn.Module:
    """A new network by net_config, published name, torchvision's name or "package.module:function".

    The function, of the user's own code, is called with `num_classes`. Raises ValueError with one
    sentence where there is no such network.
    """
    if own.is_own(model):
        return own.module("model", model, f"num_classes={num_classes}", num_classes=num_classes)
    if model in CLASSIFIERS:
        return torchvision.models.get_model(model, num_classes=num_classes)
    if model in torchvision.models.list_models():
        raise ValueError(
            f"model {shown(model)} is one of torchvision's, but not for classification of single images"
        )
    try:
        return Architecture.read(model).build(num_classes)
    except KeyError:
        kinds = "DenseNAS-A, -B or -C, a torchvision classifier, a net_config or a file with one"
        known = f"{kinds}, or package.module:function"
        known += f"; there is no file of that path below {root()}" if "/" in model else ""
        raise ValueError(f"no network {shown(' '.join(model.split()))}, expected {known}") from None


def as_model(given: str) -> str:
    """A network as `network` takes it: the net_config in a file, named from here or from the root; else as it is."""
    path = os.path.expanduser(given)
    files = [one for one in (path, root() / path) if not own.is_own(given) and os.path.isfile(one)]
    return str(read_net_config(Path(files[0]))) if files else given


def own_code(model: str) -> list[str]:
    """The code of one's own that a network is built of: its function, or the ops in its net_config."""
    if own.is_own(model):
        return [model]
    return Architecture.parse(model).own_ops if model.lstrip().startswith("[") else []


def code_digest(model: str, net: nn.Module) -> str:
    """Changes with the code that makes the network, and with its weights' names and shapes."""
    digest = hashlib.sha256(own.code(model).encode())
    for name, value in net.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
    return digest.hexdigest()


def check_network(model: str, num_classes: int, image_size: int) -> None:
    """Tries one training step and an evaluation with two images, before hours are spent.

    Raises ValueError with one sentence that names the network and says why it cannot be trained on such images.
    """
    wrong = _why_untrainable(model, num_classes, image_size)
    if wrong is None:
        return
    images = f"{image_size}×{image_size} pixels and {num_classes} classes"
    wrong = f"model {shown(model)} cannot be trained on images of {images}: {wrong}"
    # What torchvision's classifiers were made for.
    if not own.is_own(model) and _why_untrainable(model, num_classes, 224) is None:
        wrong += "; it can with 224 pixels"
    raise ValueError(wrong)


def _why_untrainable(model: str, num_classes: int, image_size: int) -> str | None:
    # Without numbers a step costs no memory, but a user's code may want to look at some.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _try_step(model, num_classes, image_size, "cpu" if own.is_own(model) else "meta")
        except NotImplementedError:  # RegNets compute their widths by tensors
            return _try_step(model, num_classes, image_size, "cpu")


def _try_step(model: str, num_classes: int, image_size: int, device: str) -> str | None:
    """What is wrong with the network as training and evaluation use it; None if nothing is."""
    with torch.device(device) if device == "meta" else nullcontext():
        net = network(model, num_classes)
    parameters = [*net.parameters()]
    if any(isinstance(parameter, UninitializedParameter) for parameter in parameters):
        return "it has lazy layers, which have no weights before the first image"
    if not any(parameter.requires_grad for parameter in parameters):
        return "it has no parameters to train"
    if not all(isinstance(value, Tensor) for value in net.state_dict().values()):
        return "its state_dict holds more than tensors"
    images = torch.zeros(2, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    try:
        net = net.to(device).to(memory_format=torch.channels_last).train()
        logits = net(images)
        wrong = _wrong_output(logits, num_classes, "training")
        if wrong is None:
            F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device=device)).backward()
            with torch.no_grad():
                wrong = _wrong_output(net.eval()(images), num_classes, "evaluation")
    except NotImplementedError:
        if device == "meta":
            raise
        return "it has no forward method, or one for another kind of tensor"
    except Exception as error:
        return own.reason(error)
    return wrong


def _wrong_output(logits: Any, num_classes: int, mode: str) -> str | None:
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        return f"it returns several outputs in {mode} ({kind}), one tensor is needed"
    if logits.shape != (2, num_classes):
        shape = f"a tensor of shape {tuple(logits.shape)}"
        return f"it returns {shape} in {mode} for 2 images, expected {(2, num_classes)}"
    if not logits.is_floating_point():
        return f"it returns numbers of {logits.dtype} in {mode}, expected a floating-point type"
    return None


def save_network(folder: Path, model: str, net: nn.Module) -> None:
    """Keeps a trained network where `load_network` finds it; a derived one in the published format.

    Takes the place of an earlier network, and of its exports. Raises OSError with one sentence where the disk is full.
    """
    for export in EXPORTS:
        (folder / export).unlink(missing_ok=True)
    state = net.state_dict()  # with the versions of its layers, which some of torchvision's ask for
    for key, value in state.items():
        state[key] = value.cpu()
    # First what can fail for want of space: until it is written, the earlier network is whole.
    with atomic(folder / "weights.pt") as partial:
        torch.save(state, partial)
    if isinstance(net, DerivedNet):
        (folder / "model").unlink(missing_ok=True)
        save_published(folder, net.arch)
    else:
        (folder / "net_config").unlink(missing_ok=True)
        write_text(folder / "model", f"{model}\n")


def load_network(
    folder: str | Path, num_classes: int, model: str | None = None, own_ops: Collection[str] = ()
) -> nn.Module:
    """The network in a published folder, or in one that `save_network` wrote.

    A folder may name torchvision's networks. Code is imported only where the caller, not a file,
    names it: as `model`, as an op of the net_config `model`, or among `own_ops`. Raises
    FileNotFoundError or ValueError with one sentence.
    """
    folder = Path(folder)
    if not (folder / "model").is_file():
        if model:
            own_ops = [*own_ops, *own_code(as_model(model))]
        _, published = load_published(folder, own_ops)
        known = len(published.state_dict()["classifier.weight"])
        if known != num_classes:
            apart = f"the network tells {known} classes apart, the data set has {num_classes}"
            raise ValueError(f"{folder / 'weights.pt'}: {apart}")
        return published
    found = read_text(folder / "model").strip()
    if found not in CLASSIFIERS and found != model:
        foreign = "code is run only where net_config says the same"
        raise ValueError(f"{folder}: the network is {found[:80]!r}, {foreign}")
    net = network(found, num_classes)
    path = folder / "weights.pt"
    fill(net, read_state(path), path, f"'{found}' with {num_classes} classes")
    return net


def model_folder(run: Run, model: str | None = None) -> Path:
    """The folder of the network to evaluate, and of its exports; None is what 05-retrain trained.

    Raises FileNotFoundError or ValueError with one sentence where it is none, or nothing can be written there.
    """
    folder = Path(model).expanduser() if model else run.need(run.work / "model", "05-retrain")
    if not folder.is_dir():
        expected = "expected one with net_config and weights.pt"
        raise FileNotFoundError(f"model '{folder}' is no folder, {expected}")
    if not os.access(folder, os.W_OK):
        belong = "where the network's exports belong"
        raise ValueError(f"{folder} cannot be written to, {belong}: copy the folder")
    return folder
