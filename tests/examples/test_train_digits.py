"""The example program, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "examples" / "train_digits.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def scores(*options: str, launcher: tuple[str, ...] = (), timeout: float = 280) -> dict[str, list[float]]:
    """Mean float, PTQ and QAT scores of each task, as printed."""
    command = [sys.executable, *launcher, str(PROGRAM), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^(\w+), .*\n +seed +float +PTQ int8 +QAT int8\n(?: +\d.*\n)+ +mean +(.*)$", done.stdout, re.M)
    return {task: [float(score) for score in row.split()] for task, row in rows}


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "torchrun"])
def test_a_few_epochs(launcher: tuple[str, ...]) -> None:
    found = scores("--seeds", "1", "--epochs", "4", "--qat-epochs", "1", launcher=launcher)
    assert found.keys() == {"Classifier", "Denoiser"}
    accuracy, psnr = found["Classifier"], found["Denoiser"]
    assert accuracy[0] > 80 and all(abs(score - accuracy[0]) < 3 for score in accuracy[1:])
    assert psnr[0] > 13 and all(abs(score - psnr[0]) < 1 for score in psnr[1:])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quantization_aware_training_loses_nothing() -> None:
    found = scores(timeout=1200)
    floating, _, qat = found["Classifier"]
    assert floating > 97.5 and qat > floating - 0.3
    floating, _, qat = found["Denoiser"]
    assert floating > 16.5 and qat > floating - 0.2
