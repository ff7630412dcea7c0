"""Latency of another device: `python -m densenas.onnx_ops SPACE --out FOLDER` writes every op of a space as ONNX.

The folder goes to the phone, the board or the server; `python time_ops.py` in it needs NumPy and ONNX Runtime alone
and leaves times.json, which `02-cost` takes as its `table`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from torch import Tensor, nn

from densenas.files import PACKAGE, atomic, write_text
from densenas.latency import build
from densenas.method.space import Layer, SearchSpace
from densenas.runs.progress import progress
from densenas.timings import Manifest, Op, distinct, space_digest
from densenas.training.processes import exiting

TIMER = "time_ops.py"
TOGETHER = 32  # ops that are exported at once: alone each would take seconds


class _Side(nn.Module):
    """Several ops, each with an input and an output of its own."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x) for module, x in zip(self.each, inputs, strict=True))


def write_ops(
    space: SearchSpace, folder: Path, input_size: int, num_classes: int, batch_size: int = 1
) -> Manifest:
    """Writes each distinct op as ONNX (fp32, evaluation mode), manifest.json and the timer into `folder`.

    Raises ValueError or OSError with one sentence.
    """
    layers = distinct(space, input_size, num_classes).timed
    ops: list[Op] = []
    starts = range(0, len(layers), TOGETHER)
    for start in progress(len(starts), "ONNX", starts):
        ops += _write_some(layers[start : start + TOGETHER], start, space, folder, batch_size)
    manifest = Manifest(
        space=space.name,
        digest=space_digest(space),
        input_size=input_size,
        num_classes=num_classes,
        batch_size=batch_size,
        ops=ops,
    )
    with atomic(folder / TIMER) as partial:
        shutil.copyfile(PACKAGE / "templates" / TIMER, partial)
    write_text(folder / "manifest.json", manifest.model_dump_json(indent=1))
    return manifest


def _write_some(
    layers: list[Layer], first: int, space: SearchSpace, folder: Path, batch_size: int
) -> list[Op]:
    import onnx  # these two take seconds to import
    import torch.onnx

    modules, inputs = [], []
    for layer in layers:
        modules.append(build(layer, space))
        inputs.append(torch.randn(batch_size, layer.in_channels, layer.side, layer.side))
    side = _Side(modules).eval()
    with torch.no_grad():
        outputs = side(*inputs)
    sources = [f"input{number}" for number in range(len(layers))]
    sinks = [f"output{number}" for number in range(len(layers))]
    program = torch.onnx.export(
        side, tuple(inputs), input_names=sources, output_names=sinks, dynamo=True, verbose=False
    )
    assert program is not None  # the stub's other case: where it writes to a file itself
    extractor = onnx.utils.Extractor(program.model_proto)
    ops = []
    for number, layer in enumerate(layers):
        name = f"{first + number:03d}.onnx"
        with atomic(folder / name) as partial:
            onnx.save(extractor.extract_model([sources[number]], [sinks[number]]), str(partial))
        shapes = [*inputs[number].shape], [*outputs[number].shape]
        ops.append(Op(key=layer, file=name, input=shapes[0], output=shapes[1], ms=[]))
    return ops


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m densenas.onnx_ops", description="Writes every op of a space as ONNX."
    )
    parser.add_argument("space", metavar="SPACE", help="preset or YAML file")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--input-size", type=int, help="side in pixels; left out: the space's own")
    parser.add_argument(
        "--num-classes", type=int, default=100, help="of the run's images: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images at once: %(default)s")
    asked = parser.parse_args()
    with exiting():
        space = SearchSpace.load(asked.space)
        size = asked.input_size or space.input_size
        written = write_ops(space, asked.out, size, asked.num_classes, asked.batch_size)
    print(
        f"{len(written.ops)} ops of space {space.name} are in {asked.out}: copy it to the device,"
    )
    print(
        f"run `python {TIMER}` there and give 02-cost what it leaves, kind: latency, table: times.json"
    )


if __name__ == "__main__":
    main()
