"""Times every op of this folder on the machine that runs this; needs NumPy and ONNX Runtime alone.

Writes times.json after each round, which 02-cost takes as its `table`.
"""

import argparse
import json
import platform
import random
import time
from pathlib import Path
from statistics import median

import numpy
import onnxruntime

HERE = Path(__file__).absolute().parent
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default=platform.processor() or platform.machine(), help="its name")
parser.add_argument("--threads", type=int, default=1, help="that an op may use")
parser.add_argument("--rounds", type=int, default=12, help="timings of each op")
parser.add_argument("--provider", default="CPUExecutionProvider", help="of ONNX Runtime")
asked = parser.parse_args()
if asked.provider not in onnxruntime.get_available_providers():
    parser.error(f"provider is {asked.provider}, not of {onnxruntime.get_available_providers()}")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = asked.threads


def milliseconds(op: dict) -> float:
    path = str(HERE / op["file"])
    session = onnxruntime.InferenceSession(path, options, providers=[asked.provider])
    images = {session.get_inputs()[0].name: numpy.random.rand(*op["input"]).astype("float32")}
    calls = 3
    for _ in range(2):  # warms up, and sees how many calls take 10 ms
        start = time.perf_counter()
        for _ in range(calls):
            session.run(None, images)
        each = (time.perf_counter() - start) / calls
        calls = max(3, int(0.01 / each))
    return 1000 * each


found = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
found.update(device=asked.device, threads=asked.threads, provider=asked.provider)
found["onnxruntime"] = onnxruntime.__version__
for number in range(asked.rounds):
    # In another order each time: a device that grows hot slows no op down more than others.
    for op in random.sample(found["ops"], len(found["ops"])):
        op["ms"].append(milliseconds(op))
    (HERE / "times.part").write_text(json.dumps(found), encoding="utf-8")
    (HERE / "times.part").replace(HERE / "times.json")
    spread = median(max(op["ms"]) / min(op["ms"]) for op in found["ops"])
    print(f"round {number + 1} of {asked.rounds}: slowest / fastest of an op {spread:.2f}")
