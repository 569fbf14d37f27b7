"""`horizon export`: a plan or a model as ONNX, and how near a runtime comes to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from horizon_plugin_pytorch.cli.app import app

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")

MODULE = """
import torch
from torch import nn
import horizon_plugin_pytorch as horizon

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)))

def fixed():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5))
"""


@pytest.fixture
def horizon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "export_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: CliRunner().invoke(app, ["export", *arguments])


def test_help_has_an_example(horizon: Any) -> None:
    result = horizon("--help")
    assert (
        result.exit_code == 0
        and "Example: horizon export resnet18.safetensors -o resnet18.onnx --verify" in result.stdout
    )


def test_a_model_and_its_plan(horizon: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    result = horizon("export_nets:Net", "--input", "1,3,8,8", "--form", "qoperator", "--verify", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert "Net.int8.onnx: qoperator" in result.stdout and "0 of 320 elements differ" in result.stdout
    assert "quantized here with random numbers" in result.stderr
    assert {n.op_type for n in onnx.load(tmp_path / "Net.int8.onnx").graph.node} >= {"QLinearConv", "ConvInteger"}

    from horizon_plugin_pytorch.cli.programs import load_program

    load_program("export_nets:Net", ["1,3,8,8"]).plan.save(tmp_path / "net.safetensors")
    result = horizon("net.safetensors", "-o", "out.onnx", "--fixed-size", "--fixed-batch")
    assert result.exit_code == 0, result.output
    shape = onnx.load(tmp_path / "out.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape] == [1, 3, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export_nets:Net", "--input", "1,3,8,8", "--form", "int4"), "form 'int4' is not one of"),
        (("export_nets:Net", "--input", "1,3,8,8", "--verify", "tensorrt"), "runtime 'tensorrt' is not one of"),
        (("export_nets:fixed", "--input", "1,3,8,8", "--dynamic-size"), "export with dynamic_size=False"),
        (("gone.safetensors",), "gone.safetensors"),
    ],
)
def test_errors_in_one_line(horizon: Any, arguments: tuple[str, ...], message: str) -> None:
    result = horizon(*arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_suffix_of_torch_export(horizon: Any, tmp_path: Path) -> None:
    for form in ((), ("--form", "horizon")):
        result = horizon("export_nets:Net", "--input", "1,3,8,8", "-o", "net.pt2", *form)
        assert result.exit_code == 0, result.output
        assert f"net.pt2: {form[1] if form else 'aten'}, " in result.stdout
        program = torch.export.load("net.pt2")
        assert any("run_plan" in str(n.target) for n in program.graph.nodes) == bool(form)
    for options, message in (
        (("--verify", "openvino"), "are for .onnx"),
        (("--form", "qdq"), "ops is 'aten' or 'horizon'"),
    ):
        result = horizon("export_nets:Net", "--input", "1,3,8,8", "-o", "other.pt2", *options)
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert not list(Path().glob("other*"))
