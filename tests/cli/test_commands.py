"""The commands as a user types them."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from horizon_plugin_pytorch.cli.app import app

MODULE = """
import torch
from torch import nn

class Residual(nn.Module):
    \"\"\"The first convolution's output has two readers, so it cannot take the batch norm behind it.\"\"\"

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.stem(x)
        y = self.stem_bn(x)
        return self.relu(self.bn(self.conv(y)) + x)

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x, y):
        return torch.relu(self.linear(x) + y)

def number():
    return 3
"""


@pytest.fixture
def horizon(tmp_path, monkeypatch):
    """Runs the command in a folder that holds the module `command_nets`."""
    (tmp_path / "command_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    sys.modules.pop("command_nets", None)


def test_check_prints_what_fuses_and_what_does_not(horizon, tmp_path):
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    result = horizon("check", "command_nets:Residual", "--input", "1,3,8,8", "--html", str(page), "--json", str(data))
    assert result.exit_code == 0, result.output
    assert "conv" in result.output and "stem_bn" in result.output
    report = json.loads(data.read_text())
    assert len(report["groups"]) == 1
    assert len(report["missed"]) == 1
    assert "stem" in report["missed"][0]["reason"]
    assert "<table" in page.read_text()


@pytest.mark.parametrize("inputs", [(), ("--input", "2,4", "--input", "2,6")])
def test_check_takes_no_input_or_one_per_argument(horizon, inputs):
    result = horizon("check", "command_nets:TwoInputs", *inputs)
    assert result.exit_code == 0, result.output
    assert "LinearAddReLU" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("command_nets_absent:Residual",), "there is no module 'command_nets_absent'"),
        (("command_nets:Absent",), "module 'command_nets' has no 'Absent'"),
        (("command_nets:number",), "command_nets:number() returned a int, not an nn.Module"),
        (("command_nets:Residual", "--input", "1,3,8,x"), "input '1,3,8,x' is not a shape"),
        (("command_nets:Residual", "--input", "1,5,8,8"), "expected input[1, 5, 8, 8] to have 3 channels"),
        (("command_nets:Residual", "--json", "absent/report.json"), "absent/report.json"),
    ],
)
def test_check_names_what_is_wrong_and_exits_with_2(horizon, arguments, message):
    result = horizon("check", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["check", "run", "bench", "demo"])
def test_help_shows_an_example(horizon, command):
    result = horizon(command, "--help")
    assert result.exit_code == 0
    assert f"Example: horizon {command}" in result.output


def test_the_package_imports_neither_typer_nor_rich():
    program = (
        "import sys, horizon_plugin_pytorch, horizon_plugin_pytorch.cli; "
        "print(sorted({'typer', 'rich', 'onnx2torch'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
