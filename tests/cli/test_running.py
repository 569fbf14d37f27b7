"""`horizon run` and `horizon bench`: plans and models as a user names them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import horizon_plugin_pytorch as horizon_package
from horizon_plugin_pytorch.cli.app import app
from horizon_plugin_pytorch.cli.model_spec import SpecError
from horizon_plugin_pytorch.cli.programs import load_program
from horizon_plugin_pytorch.plan import Plan, record

MODULE = """
import torch
from torch import nn
import horizon_plugin_pytorch as horizon

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return {"logits": self.head(self.norm(x).mean((2, 3))), "map": x * 2}

def converted():
    torch.manual_seed(0)
    return horizon.quantize(Net().eval(), [torch.randn(2, 3, 8, 8)], improve=False, progress=False)

class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x
"""


@pytest.fixture
def horizon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in a folder that holds the module `running_nets` and a plan of its `converted`."""
    (tmp_path / "running_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    load_program("running_nets:converted", ["2,3,8,8"]).plan.save(tmp_path / "net.safetensors")
    threads = torch.get_num_threads()
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    torch.set_num_threads(threads)
    sys.modules.pop("running_nets", None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_run_prints_the_outputs_of_a_plan(horizon: Any, backend: str) -> None:
    result = horizon("run", "net.safetensors", "--backend", backend, "--threads", "1", "--repeats", "2")
    assert result.exit_code == 0, result.output
    program = load_program("net.safetensors", [])
    logits = program.plan.compile("reference")(*program.inputs)["logits"].double()
    (row,) = re.findall(r"\['logits'\] +2×5 +float32 +(\S+) +(\S+) +(\S+) +(\S+)", result.stdout)
    expected = (logits.min(), logits.mean(), logits.max(), logits.std(correction=0))
    assert [float(n) for n in row] == pytest.approx([float(e) for e in expected], rel=1e-4)
    assert "['map']" in result.stdout and "2×8×8×8" in result.stdout
    assert "median, ms" in result.stdout


def test_run_takes_another_shape(horizon: Any) -> None:
    result = horizon("run", "net.safetensors", "--input", "3,3,12,10", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "3×8×12×10" in result.stdout


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_float_model_is_quantized_and_that_is_said(horizon: Any, command: str) -> None:
    result = horizon(command, "running_nets:Net", "--input", "1,3,8,8", "--threads", "1", "--repeats", "2")
    assert result.exit_code == 0, result.output
    assert "random numbers as calibration data" in result.stderr


def test_a_converted_model_is_run_as_it_is(horizon: Any) -> None:
    result = horizon("run", "running_nets:converted", "--input", "2,3,8,8", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "2×8×8×8" in result.stdout


def test_bench_shows_percentiles_float_and_steps(horizon: Any) -> None:
    result = horizon("bench", "running_nets:Net", "--input", "1,3,8,8", "--threads", "1", "--repeats", "4")
    assert result.exit_code == 0, result.output
    for row in (r"int8, \w+", "float, PyTorch eager"):
        (found,) = re.findall(rf"{row} +(\S+) +(\S+) +(\S+) +(\S+)", result.stdout)
        median, low, high, _ = map(float, found)
        assert 0 < low <= median <= high
    names = load_program("running_nets:Net", ["1,3,8,8"]).plan.steps
    assert all(step.name in result.stdout for step in names)


def test_bench_lists_as_many_steps_as_asked_and_has_no_float_beside_a_plan(horizon: Any) -> None:
    result = horizon("bench", "net.safetensors", "--steps", "2", "--repeats", "1", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "float, PyTorch" not in result.stdout
    table = result.stdout[result.stdout.index("share") :].splitlines()[1:]
    assert sum("%" in line for line in table) == 2


@pytest.mark.parametrize("command", ["run", "bench"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.safetensors",), "there is no plan at absent.safetensors"),
        (("running_nets.py",), "running_nets.py is not a plan"),
        (("running_nets:Net",), "--input SHAPE"),
        (("running_nets:Net", "--input", "1,5,8,8"), "does not run on inputs of shape 1,5,8,8"),
        (("running_nets:Absent", "--input", "1,3,8,8"), "has no 'Absent'"),
        (("running_nets:Sized", "--input", "1,3,8,8"), "cannot be traced as a whole"),
        (("net.safetensors", "--input", "1,3,8,8", "--input", "1"), "give --input 1 times"),
        (("net.safetensors", "--input", "1,5,8,8"), "step "),
        (("net.safetensors", "--backend", "gpu"), "backend 'gpu' is not available"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    horizon: Any, command: str, arguments: tuple[str, ...], message: str
) -> None:
    result = horizon(command, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.linear(x) + y)


def test_a_plan_has_shapes_and_order_of_its_own(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 4), torch.randn(2, 6))
    int8 = horizon_package.quantize(TwoInputs().eval(), [inputs], improve=False, progress=False)
    plan: Plan = record(int8, inputs)
    plan.save(tmp_path / "two.safetensors")
    loaded = load_program(str(tmp_path / "two.safetensors"), [])
    assert [tuple(x.shape) for x in loaded.inputs] == [(2, 4), (2, 6)]
    assert loaded.plan == plan
    assert loaded.float_model is None
    with pytest.raises(SpecError, match="takes x, y: give --input 2 times"):
        load_program(str(tmp_path / "two.safetensors"), ["2,4"])
