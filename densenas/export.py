"""A trained network for other programs: torch.export, ONNX and safetensors; the first two checked and timed here."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save
from torch import nn

from densenas import own
from densenas.files import atomic
from densenas.method.architecture import DerivedNet
from densenas.training.device import milliseconds


def export(
    net: nn.Module, folder: str | Path, input_size: int, tolerance: float = 1e-4
) -> pd.DataFrame:
    """Writes model.pt2, model.onnx and model.safetensors into `folder`.

    The first two take any number of images (N, 3, input_size, input_size), the third holds the state dict.

    Returns a row for each of PyTorch, torch.export and ONNX Runtime: milliseconds for one image on this CPU and the
    largest difference of a logit from PyTorch's. Raises with one sentence RuntimeError where that is more than
    `tolerance` times the largest logit, ValueError where the network cannot leave PyTorch, OSError where it cannot be
    written.
    """
    import onnxruntime  # these two take seconds to import
    import torch.onnx

    package, model = Path(folder) / "model.pt2", Path(folder) / "model.onnx"
    net, images = net.cpu().eval(), torch.randn(2, 3, input_size, input_size)
    with torch.no_grad():
        logits = net(images)
    with _naming("torch.export"):
        any_number = ({0: torch.export.Dim("images")},)
        program = torch.export.export(net, (images,), dynamic_shapes=any_number)
    with _naming("ONNX"):
        onnx = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
        assert onnx is not None  # the stub's other case: where it writes to a file itself
    # By way of memory: on a full disk the archive's own writer would end the process.
    archive = io.BytesIO()
    torch.export.save(program, archive)
    with atomic(package) as partial:
        partial.write_bytes(archive.getbuffer())
    with atomic(model) as partial:
        onnx.save(str(partial), external_data=False)
    _save_tensors(net, Path(folder) / "model.safetensors")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    exported = torch.export.load(package).module()

    def in_onnxruntime(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    runtimes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "PyTorch": net,
        "torch.export": exported,
        "ONNX Runtime": in_onnxruntime,
    }
    rows = []
    for name, run in runtimes.items():
        with torch.no_grad():
            deviation = float((run(images) - logits).abs().max())
        if deviation > tolerance * max(1.0, float(logits.abs().max())):
            network = f"the network exported for {name}"
            raise RuntimeError(f"{network} deviates by {deviation:.2g} from PyTorch's")
        rows.append(
            {"runtime": name, "ms": milliseconds(run, images[:1]), "largest difference": deviation}
        )
    return pd.DataFrame(rows)


def _save_tensors(net: nn.Module, path: Path) -> None:
    state = {}
    for key, value in net.state_dict().items():
        # Plain copies: the format knows no memory layout, and no weights that two layers share.
        state[key] = value.detach().clone(memory_format=torch.contiguous_format)
    known = {"net_config": str(net.arch)} if isinstance(net, DerivedNet) else {}
    with atomic(path) as partial:
        partial.write_bytes(save(state, {"format": "pt", **known}))


@contextmanager
def _naming(program: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # exporters raise many kinds of their own, over many lines
        refused = f"the network cannot be exported by {program}"
        raise ValueError(f"{refused}: {own.reason(error)}") from None
