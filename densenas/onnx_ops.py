"""Latency of another device: `python -m densenas.onnx_ops SPACE --out FOLDER` writes every op of a space as ONNX.

The folder goes to the phone, the board or the server; `python time_ops.py` in it needs NumPy and ONNX Runtime alone
and leaves times.json, which `02-cost` takes as its `table`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from densenas.costs import RECIPES
from densenas.files import PACKAGE, Strict, atomic, naming, read_text, write_text
from densenas.latency import build, distinct, tabulate
from densenas.method.cost import CostTable
from densenas.method.space import Layer, SearchSpace
from densenas.runs.progress import progress
from densenas.training.processes import exiting

TIMER = "time_ops.py"
TOGETHER = 32  # ops that are exported at once: alone each would take seconds
Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0)]


class Op(Strict):
    """A file of the folder, and what the timer adds."""

    key: tuple[str, int, int, int, int] = Field(strict=False)  # a `Layer`
    file: str
    input: list[Count]  # shapes
    output: list[Count]
    ms: list[Milliseconds]  # of each round; none in a manifest


class Manifest(Strict):
    """manifest.json: which space, at which size, the ops of a folder are of."""

    space: str
    digest: str
    input_size: Count
    num_classes: Count
    batch_size: Count
    ops: list[Op]


class Times(Manifest):
    """times.json: a manifest with what was measured, and where."""

    device: str = Field(min_length=1)
    threads: Count
    provider: str
    onnxruntime: str


class _Side(nn.Module):
    """Several ops, each with an input and an output of its own."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x) for module, x in zip(self.each, inputs, strict=True))


def space_digest(space: SearchSpace) -> str:
    """Changes with whatever changes a cost, and not with recipes."""
    text = json.dumps(space.model_dump(mode="json", exclude={*RECIPES}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def read_times(
    path: str | Path, space: SearchSpace, input_size: int, num_classes: int
) -> CostTable:
    """The table of what the timer measured; ValueError or FileNotFoundError with one sentence where it is of others."""
    found = distinct(space, input_size, num_classes)
    with naming(str(path)):
        times = Times.model_validate_json(read_text(path))
        measured = {Layer(*op.key): op.ms for op in times.ops}
        theirs = times.space, times.input_size, times.num_classes
        ours = space.name, input_size, num_classes
        again = "write its ops with python -m densenas.onnx_ops and time them"
        if theirs != ours:
            raise ValueError(f"times {_of(*theirs)}, not {_of(*ours)}: {again}")
        if times.digest != space_digest(space):
            raise ValueError(f"times another version of space {space.name}: {again}")
        missing = [layer for layer in found.timed if not measured.get(layer)]
        if missing:
            raise ValueError(
                f"lacks the times of {len(missing)} ops of space {space.name}: {again}"
            )
    said = {
        "input_size",
        "num_classes",
        "batch_size",
        "device",
        "threads",
        "provider",
        "onnxruntime",
    }
    rounds = min(len(measured[layer]) for layer in found.timed)
    return tabulate(space, found, measured, {**times.model_dump(include=said), "rounds": rounds})


def _of(space: str, input_size: int, num_classes: int) -> str:
    return f"space {space} at {input_size} pixels in {num_classes} classes"


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
