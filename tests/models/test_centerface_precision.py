"""A trained face detector in int8, on a photo, calibrated on other photos: what it loses, and that QAT evaluates to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch import demo
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.quantization import calibrate, convert_fx, prepare_qat_fx
from horizon_plugin_pytorch.quantization.improve import add_headroom, equalize, reconstruct

NNCF = (23.3, 25.9, 11.2, 25.6)
"""The most that OpenVINO with NNCF's default int8 reached, with either way to pad the photos (dB); benchmarks/precision.py measures both."""


def calibration_photos() -> list[Tensor]:
    return [demo.to_input(p) for p in demo.calibration_photos()]


def sqnr(exact: list[Tensor], found: list[Tensor]) -> list[float]:
    return [demo.sqnr(a, b) for a, b in zip(exact, found, strict=True)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    pytest.importorskip("onnx2torch")
    pytest.importorskip("skimage")
    return demo.load_centerface()


def test_channels_before_depthwise_convolutions_have_their_own_scales(model: nn.Module) -> None:
    q = prepare_qat_fx(model, example_inputs=torch.zeros(1, 3, 64, 64))
    axes = [m.axis for m in q.modules() if isinstance(m, FakeQuantize)]
    assert axes.count(1) == 17  # one for each depthwise convolution


@torch.no_grad()
def test_the_recipe_on_a_part_of_the_photo(model: nn.Module) -> None:
    """Quick: 256x256 around the face."""
    x = demo.to_input(demo.load_photo())[:, :, 0:256, 96:352]
    data = [p[:, :, 0:256, 128:384] for p in calibration_photos()]
    exact = model(x)
    plain = horizon.quantize(model, data, progress=False, improve=False)
    q = prepare_qat_fx(model, example_inputs=data[0])
    equalize(q, data, progress=False)
    torch.testing.assert_close(q(x), exact, rtol=1e-3, atol=1e-3)
    calibrate(q, data, progress=False)
    add_headroom(q)
    reconstruct(q, data, progress=False)
    int8 = convert_fx(q)
    found = int8(x)
    assert [int((a != b).sum()) for a, b in zip(q(x), found, strict=True)] == [0, 0, 0, 0]
    gains = [b - a for a, b in zip(sqnr(exact, plain(x)), sqnr(exact, found), strict=True)]
    assert min(gains) > 1, gains


@pytest.mark.slow
@torch.no_grad()
def test_the_default_recipe_loses_3_db_less_than_nncf(model: nn.Module) -> None:
    x = demo.to_input(demo.load_photo())
    int8 = horizon.quantize(model, calibration_photos(), progress=False)
    found = sqnr(model(x), int8(x))
    assert all(ours > theirs + 3 for ours, theirs in zip(found, NNCF, strict=True)), found
