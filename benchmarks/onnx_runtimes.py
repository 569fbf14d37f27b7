"""Our ONNX files in ONNX Runtime and OpenVINO: how near they come to the plan, what OpenVINO fuses, and how fast it runs them.

    python benchmarks/onnx_runtimes.py                          # everything; about half an hour, most of it to quantize
    python benchmarks/onnx_runtimes.py agree --networks unet    # how near, and what is fused
    python benchmarks/onnx_runtimes.py latency --networks unet  # OpenVINO on our file beside OpenVINO on NNCF's model
    python benchmarks/onnx_runtimes.py table --write            # docs/onnx.md from what has been measured

Plans and files are made once, in ``build/benchmarks/onnx/models``, and results kept as JSON beside them; delete one to make it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from math import inf, log10
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks" / "onnx"
TABLE = ROOT / "docs" / "onnx.md"
sys.path.append(str(ROOT / "tests"))  # plans are taken apart there

from _cpu_peers import Work, openvino_files  # noqa: E402
from _networks import NETWORKS  # noqa: E402

import horizon_plugin_pytorch as horizon  # noqa: E402
from horizon_plugin_pytorch.export import Agreement, to_onnx, verify  # noqa: E402
from horizon_plugin_pytorch.plan import Plan  # noqa: E402
from horizon_plugin_pytorch.utils.timing import take_turns  # noqa: E402

ELEMENTWISE = {"Eltwise", "Subgraph", "Math", "FakeQuantize"}
TEST_IMAGES, TEST_SEED = 4, 9


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "agree", "latency", "table"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    for name in options.networks if options.what != "table" else []:
        if options.what in ("all", "agree"):
            keep(name, agree(name))
        if options.what in ("all", "latency"):
            for threads in options.threads:
                keep(name, {f"latency {threads}": latency(name, threads, options.rounds)})
        print(name, json.dumps(result(name)), flush=True)
    if options.what in ("all", "table"):
        from _onnx_table import render

        text = render({name: result(name) for name in NETWORKS})
        print(text)
        if options.write or options.what == "all":
            TABLE.write_text(text)


def result(name: str) -> dict[str, Any]:
    path = FOLDER / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(name: str, new: dict[str, Any]) -> None:
    path = FOLDER / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result(name), "title": NETWORKS[name].title, **new}, indent=1))


# -- files --------------------------------------------------------------------------------------------------------------------


class Quantized(Work):
    """Quantized as a user of either library does it, with its defaults: `horizon.quantize`, `nncf.quantize`."""

    def record(self, model: torch.nn.Module) -> Plan:
        int8 = horizon.quantize(model, self.calibration(), progress=False)
        return horizon.plan.record(int8, self.calibration()[0][:1])


def work_of(name: str, threads: int = 1) -> Quantized:
    return Quantized(FOLDER / "models" / name, 1, threads, network=NETWORKS[name])


def exported(work: Work, form: str, **options: Any) -> Path:
    return to_onnx(work.plan, work.folder / f"{form}.onnx", form=form, **options)  # type: ignore[arg-type]


# -- how near -----------------------------------------------------------------------------------------------------------------


def agree(name: str) -> dict[str, Any]:
    from export import made

    work = work_of(name)
    plan, x = work.plan, work.x
    files = {form: exported(work, form) for form in ("qdq", "qoperator")}
    cut, inputs = made.apart(plan, x)
    layers = to_onnx(cut, work.folder / "layers.onnx", dynamic_batch=False, dynamic_size=False)
    found = {
        "qoperator": numbers(verify(plan, files["qoperator"], x)),
        "qoperator optimized": numbers(verify(plan, files["qoperator"], x, optimize=True)),
        "layers onnxruntime": numbers(verify(cut, layers, inputs)),
        "layers openvino": numbers(verify(cut, layers, inputs, "openvino")),
        "qdq": numbers(verify(plan, files["qdq"], x)),
        "qdq optimized": numbers(verify(plan, files["qdq"], x, optimize=True)),
        "qdq openvino": numbers(verify(plan, files["qdq"], x, "openvino")),
    }
    layers.unlink()
    nncf = openvino_files(work)[1]
    return {
        **found,
        "one step": one_step(plan, x),
        "float": to_float(work, files["qdq"], nncf),
        "nodes": {
            "as written": nodes(files["qdq"], None),
            "fixed size": nodes(files["qdq"], x),
            "nncf": nodes(nncf, x),
        },
    }


def numbers(found: Agreement) -> dict[str, Any]:
    steps = [o.steps for o in found.outputs if o.steps is not None]
    return {
        "runtime": found.runtime,
        "elements": sum(o.elements for o in found.outputs),
        "differing": found.differing,
        "steps": max(steps, default=None),
        "sqnr": None if found.sqnr == inf else found.sqnr,
    }


def sqnr(actual: Tensor, expected: Tensor) -> float:
    noise = float((actual.double() - expected.double()).square().sum())
    return inf if noise == 0 else 10 * log10(float(expected.double().square().sum()) / noise)


def one_step(plan: Plan, x: Tensor) -> float:
    """The plan's output beside its output for an input of which one element is off by one step; the median of five places, in dB."""
    runner = plan.compile()
    scale = float(plan.constants[plan.steps[0].params["scale"].name])
    expected = [y.clone() for y in tree_leaves(runner(x))]
    values = []
    for seed in range(5):
        moved = x.clone().flatten()
        place = int(torch.randint(len(moved), (), generator=torch.Generator().manual_seed(seed)))
        moved[place] -= moved[place].sign() * scale
        values.append(min(sqnr(a, b) for a, b in zip(tree_leaves(runner(moved.view_as(x))), expected, strict=True)))
    return median(values)


def to_float(work: Work, ours: Path, nncf: Path) -> dict[str, list[float]]:
    """SQNR to the float model, per output, on images that were not calibrated on."""
    x = NETWORKS[work.folder.name].inputs(TEST_IMAGES, TEST_SEED)
    with torch.no_grad():
        expected = tree_leaves(work.float_model()(x))
    return {
        name: [sqnr(a, b) for a, b in zip(outputs, expected, strict=True)]
        for name, outputs in (
            ("plan", tree_leaves(work.plan.compile()(x))),
            ("ours", openvino_outputs(ours, x)),
            ("nncf", openvino_outputs(nncf, x)),
        )
    }


# -- OpenVINO -----------------------------------------------------------------------------------------------------------------


def opened(path: Path, x: Tensor | None, **settings: Any) -> Any:
    """Compiled for the CPU, for the sizes of `x`, or as the file has them."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if x is not None:
        model.reshape(list(x.shape))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})


def openvino_outputs(path: Path, x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(np.array(y)) for y in opened(path, x)([x.numpy()]).values()]


def nodes(path: Path, x: Tensor | None) -> dict[str, int]:
    """What OpenVINO runs: convolutions, transposed ones, and elementwise nodes that read the result of either."""

    def kind(node: Any) -> str:
        return str(node.get_rt_info()["layerType"].astype(str))

    running = opened(path, x).get_runtime_model().get_ops()
    count: Counter[str] = Counter()
    for node in running:
        if kind(node) in ("Convolution", "Deconvolution"):
            count[kind(node)] += 1
        makers = {kind(i.get_source_output().get_node()) for i in node.inputs()} if kind(node) in ELEMENTWISE else set()
        if "Deconvolution" in makers:
            count["after Deconvolution"] += 1
        elif "Convolution" in makers:
            count["after Convolution"] += 1
    return dict(count)


def latency(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds and ratios to NNCF's model, medians over rounds in which the candidates take turns; one image."""
    from _cpu_measure import machine

    work = work_of(name, threads)
    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    ours, nncf, x = exported(work, "qdq"), openvino_files(work)[1], work.x
    inputs = [x.numpy()]
    forwards = {}
    for candidate, path, sizes in (("nncf", nncf, x), ("ours, fixed size", ours, x), ("ours, as written", ours, None)):
        request = opened(path, sizes, **settings).create_infer_request()
        forwards[candidate] = lambda request=request: request.infer(inputs, share_inputs=True, share_outputs=True)
    times = take_turns(forwards, rounds, turn=0.05)
    return {
        "machine": machine(),
        **{
            candidate: {
                "seconds": median(seconds),
                "ratio": median(a / b for a, b in zip(seconds, times["nncf"], strict=True)),
            }
            for candidate, seconds in times.items()
        },
    }


if __name__ == "__main__":
    main(sys.argv[1:])
