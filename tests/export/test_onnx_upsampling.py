"""Up-sampling of integers in the form ``qoperator``: the plan's integers, whatever the factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Between(nn.Module):
    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__()
        self.before, self.behind, self.call = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(F.interpolate(torch.relu(self.before(x)), **{"mode": "bilinear"} | self.call))


@pytest.mark.parametrize(
    ("call", "any_size"),
    [
        ({"scale_factor": 2}, True),
        ({"scale_factor": (4, 0.5)}, True),
        ({"scale_factor": 1.7}, False),
        ({"size": (13, 17)}, False),
        ({"scale_factor": 2, "align_corners": True}, False),
        # where a runtime's division finds other sources than PyTorch's product
        ({"size": (492, 82), "mode": "nearest"}, False),
        ({"size": (141, 82), "mode": "nearest-exact"}, False),
        ({"scale_factor": (1.15, 2.05), "mode": "nearest"}, False),
        ({"scale_factor": 41, "mode": "nearest"}, False),
        ({"scale_factor": (3, 2), "mode": "nearest"}, True),
        ({"scale_factor": 7, "mode": "nearest-exact"}, True),
    ],
)
def test_integers_equal_the_plans(call: dict[str, Any], any_size: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 14)
    plan = horizon.plan.record(horizon.quantize(Between(call).eval(), [x], progress=False), x)
    path = horizon.export.to_onnx(plan, tmp_path / "net.onnx", form="qoperator")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert isinstance(given.shape[2], str) == any_size
    for item in (x, torch.randn(1, 3, 20, 9)) if any_size else (x,):
        (found,) = session.run(None, {given.name: item.numpy()})
        expected = plan.compile("reference")(item)
        assert found.shape == expected.shape and int((torch.from_numpy(found) != expected).sum()) == 0
