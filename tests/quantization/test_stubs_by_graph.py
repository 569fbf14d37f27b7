"""Stubs that the user placed, in models that `prepare_qat_fx` prepares: integers are between them and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub, get_default_qconfig, prepare_qat_fx
from quantization.roads import by_graph, call, forms, in_float, sqnr


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def quantize(body: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    net, x = Net(body, **modules), torch.randn(2, 4, 8, 8)
    expected = call(net.eval(), x)
    _, int8 = by_graph(net, x)
    assert sqnr(call(int8, x), expected) > 28
    return int8


def test_integers_are_between_the_stubs() -> None:
    int8 = quantize(lambda m, x: m.c(m.dequant(m.b(m.quant(m.a(x))))))
    assert list(forms(int8)) == ["quant", "b"]
    assert in_float(int8) == dict.fromkeys("ac", "it is not between a QuantStub and a DeQuantStub")


def test_behind_a_float_operator_they_go_on() -> None:
    int8 = quantize(lambda m, x: m.dequant(m.b(m.a(m.quant(x)).softmax(1))))
    assert list(forms(int8)) == ["quant", "a", "_quant_0", "b"]


def test_dequantized_in_the_middle_and_quantized_again() -> None:
    int8 = quantize(
        lambda m, x: m.dequant(m.b(m.quant2(m.dequant2(m.a(m.quant(x))) * 2))),
        quant2=QuantStub(),
        dequant2=DeQuantStub(),
    )
    assert list(forms(int8)) == ["quant", "a", "quant2", "b"]
    assert int8.a.high_precision and list(in_float(int8)) == ["_generated_mul_0"]


def test_an_operand_that_was_dequantized_keeps_the_operator_in_float() -> None:
    int8 = quantize(
        lambda m, x: m.dequant(m.b(m.quant2(F.silu(m.a(m.quant(x))) + m.dequant2(m.c(m.quant(x)))))),
        quant2=QuantStub(),
        dequant2=DeQuantStub(),
    )
    assert in_float(int8)["_generated_add_0"] == "it is not between a QuantStub and a DeQuantStub"


def test_parameters_need_no_stub() -> None:
    int8 = quantize(lambda m, x: m.dequant(m.b(F.silu(m.a(m.quant(x))) * m.gamma)))
    assert not in_float(int8)


def test_a_fixed_scale_and_a_qconfig_of_its_own() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.dequant(m.a(m.quant(x)) + m.b(m.quant2(x * 0.01)))

    fixed = get_default_qconfig(
        activation_observer="fixed_scale", activation_qkwargs={"scale": 0.001, "dtype": "qint8"}
    )
    int8 = quantize(body, quant=QuantStub(scale=1 / 32), quant2=QuantStub(qconfig=fixed))
    assert float(int8.quant.scale) == 1 / 32 and float(int8.quant2.scale) == pytest.approx(0.001)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(scale=1 / 32), DeQuantStub()
        self.a, self.block = nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        if float(x.sum()) > 1e9:
            return x
        return self.dequant(self.block(self.a(x)))


def test_stubs_in_a_model_that_cannot_be_traced() -> None:
    net, x = Branching(), torch.randn(2, 4, 8, 8)
    expected = call(net.eval(), x)
    _, int8 = by_graph(net, x)
    assert float(int8.quant.scale) == 1 / 32 and sqnr(call(int8, x), expected) > 28
    assert {"quant", "a", "block.0", "block.2"} <= set(forms(int8))


def test_a_stub_whose_result_is_overwritten_is_refused() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.quant(x)
        x[:, 0].mul_(2)
        return m.dequant(m.a(x))

    with pytest.raises(QuantizationError, match="'quant'.*in place"):
        prepare_qat_fx(Net(body).eval())


def test_an_unsigned_input_is_unsigned_unless_the_qconfig_says_otherwise() -> None:
    net, x = nn.Sequential(QuantStub(), nn.Conv2d(4, 4, 1), DeQuantStub()), torch.rand(2, 4, 8, 8)
    _, int8 = by_graph(net, x)
    assert int8.get_submodule("0").dtype8 == torch.uint8
    signed = get_default_qconfig(activation_qkwargs={"dtype": "qint8"})
    _, int8 = by_graph(net, x, qconfig_dict={"": signed})
    assert int8.get_submodule("0").dtype8 == torch.int8
