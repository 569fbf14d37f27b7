"""The programs that run exported files, as a user starts them: without this package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import horizon_plugin_pytorch as horizon

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BLOCKED = (
    "import runpy, sys; sys.modules['horizon_plugin_pytorch'] = None; sys.modules['torch'] = None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run(program: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLES / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 classifier of 16×24 images, in a folder with a photo."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    x = torch.randn(2, 3, 16, 24)
    plan = horizon.plan.record(horizon.quantize(net, [x], improve=False, progress=False), x)
    horizon.export.to_onnx(plan, folder / "net.onnx", dynamic_size=False)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder / "net.onnx"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime(runtime: str, model: Path) -> None:
    pytest.importorskip(runtime)
    program = f"run_{runtime}.py"
    text = run(program, "net.onnx", "--repeats", 2, "--batch", 3, folder=model.parent)
    assert "float32 [3, 3, 16, 24]" in text and "float32 [3, 5]" in text
    assert re.search(r"latency: \d+\.\d+ ms, the median of 2 runs", text)
    seen = run(
        program,
        "net.onnx",
        "--repeats",
        1,
        "--image",
        "photo.png",
        "--mean",
        "0.5,0.4,0.3",
        "--std",
        0.2,
        folder=model.parent,
    )
    assert "float32 [1, 5]" in seen and seen.splitlines()[1] != text.splitlines()[1]
    assert "--image" in run(program, "--help", folder=model.parent)


def test_both_runtimes_say_the_same(model: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    ranges = []
    for runtime in ("onnxruntime", "openvino"):
        text = run(f"run_{runtime}.py", "net.onnx", "--repeats", 1, "--image", "photo.png", folder=model.parent)
        (found,) = re.findall(r"from (\S+) to (\S+)", text)
        ranges.append([float(n) for n in found])
    np.testing.assert_allclose(ranges[0], ranges[1], atol=0.02)


def test_a_repository_of_triton(model: Path, tmp_path: Path) -> None:
    run("triton/make_repository.py", model, "--name", "digits", "--max-batch", 8, folder=tmp_path)
    folder = tmp_path / "model_repository" / "digits"
    assert (folder / "1" / "model.onnx").read_bytes() == model.read_bytes()
    text = (folder / "config.pbtxt").read_text()
    graph = onnx.load(model).graph
    assert (
        'name: "digits"' in text and "max_batch_size: 8" in text and "dynamic_batching {" in text and "KIND_CPU" in text
    )
    assert re.findall(r'name: "([^"]+)"\n +data_type: (\w+)\n +dims: \[ (.*) \]', text) == [
        (graph.input[0].name, "TYPE_FP32", "3, 16, 24"),
        (graph.output[0].name, "TYPE_FP32", "5"),
    ]


def test_a_fixed_batch_is_not_collected(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(proto, tmp_path / "fixed.onnx")
    run("triton/make_repository.py", "fixed.onnx", "--gpus", 2, "--version", 3, folder=tmp_path)
    text = (tmp_path / "model_repository" / "fixed" / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in text and "dims: [ 2, 3, 16, 24 ]" in text and "dynamic_batching" not in text
    assert "count: 2" in text and "KIND_GPU" in text
    assert (tmp_path / "model_repository" / "fixed" / "3" / "model.onnx").is_file()
