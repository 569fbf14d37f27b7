"""QuantStub and DeQuantStub of a float model."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub, fuse_fx


def test_they_hand_their_input_on() -> None:
    x = torch.randn(2, 3)
    assert QuantStub()(x) is x and DeQuantStub()(x) is x
    assert QuantStub(scale=1 / 128)(x) is x


@pytest.mark.parametrize("scale", [None, 1 / 128, 1, torch.tensor(0.5)])
def test_a_fixed_scale(scale: float | None) -> None:
    stub = QuantStub(scale)
    assert stub.scale == (None if scale is None else float(scale))
    assert pickle.loads(pickle.dumps(stub)).scale == stub.scale
    assert ("scale=" in repr(stub)) is (scale is not None)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        QuantStub(scale)


@pytest.mark.parametrize("zero_point", [1, -128, 128])
def test_quantization_is_symmetric(zero_point: int) -> None:
    QuantStub(0.1, 0), QuantStub(0.1, None)
    with pytest.raises(ValueError, match=f"zero_point is 0, not {zero_point}"):
        QuantStub(0.1, zero_point)


def test_the_documented_order_of_arguments() -> None:
    marker = object()
    stub = QuantStub(0.5, 0, marker)
    assert stub.scale == 0.5 and stub.qconfig is marker
    assert not hasattr(QuantStub(), "qconfig")  # inherited from the module around it


@pytest.mark.parametrize(
    "stubs", [(QuantStub, DeQuantStub), (torch.ao.quantization.QuantStub, torch.ao.quantization.DeQuantStub)]
)
def test_fusing_by_graph_keeps_them_as_calls(stubs: tuple[type[nn.Module], type[nn.Module]]) -> None:
    quant, dequant = stubs
    model = nn.Sequential(quant(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), dequant()).eval()
    fused = fuse_fx(model)
    called = [fused.get_submodule(str(n.target)) for n in fused.graph.nodes if n.op == "call_module"]
    assert [type(m) for m in called[::2]] == [quant, dequant] and len(called) == 3


def test_a_stub_between_the_stages_ends_a_group() -> None:
    fused = fuse_fx(nn.Sequential(nn.Conv2d(3, 3, 1), DeQuantStub(), nn.ReLU()))
    assert fused.fusion_report.groups == []
