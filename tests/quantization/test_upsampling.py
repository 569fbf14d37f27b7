"""Up-sampling between integers: every form of a network gives the same, and nothing of it runs in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.quantization import FakeQuantState


class Pyramid(nn.Module):
    """What a coarse scale finds, up-sampled onto a fine one of any size."""

    def __init__(self, upsample: nn.Module | None) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 20, 3, 2, 1), nn.Conv2d(20, 20, 3, 2, 1)
        self.mix, self.head, self.upsample = nn.Conv2d(40, 16, 1), nn.Conv2d(16, 4, 1), upsample

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.fine(x))
        coarse = torch.relu(self.coarse(fine))
        if self.upsample is None:
            up = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=True)
        else:
            up = self.upsample(coarse)
        mixed = torch.relu(self.mix(torch.cat([fine, up], 1)))
        return F.interpolate(self.head(mixed), scale_factor=2, mode="bilinear")


UPSAMPLES: dict[str, Any] = {
    "to a size that the input has": lambda: None,
    "module": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "aligned module": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
}


@pytest.mark.parametrize("name", UPSAMPLES)
def test_every_form_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    model, x = Pyramid(UPSAMPLES[name]()).eval(), torch.randn(2, 3, 24, 32)
    prepared = horizon.quantization.prepare_qat_fx(model)
    horizon.quantization.calibrate(prepared, [x], progress=False)
    horizon.quantization.set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    int8 = horizon.quantization.convert_fx(prepared)
    with torch.no_grad():
        expected = int8(x)
        assert int((prepared.eval()(x) != expected).sum()) == 0
        signal, noise = model(x), (model(x) - expected)
    assert float(10 * torch.log10(signal.square().sum() / noise.square().sum())) > 25
    plan = horizon.plan.record(int8, x)
    outputs = [plan.compile("reference")(x)]
    if library.why_not() is None:
        runner = plan.compile("cpu")
        outputs.append(runner(x))
        last = runner.report.splitlines()[-1]
        assert "interpolate" in last and last.count(";") == 0  # only the last, whose input is float
    assert sum(int((y != expected).sum()) for y in outputs) == 0
    other = torch.randn(1, 3, 40, 16)
    with torch.no_grad():
        assert int((plan.compile("auto")(other) != int8(other)).sum()) == 0
