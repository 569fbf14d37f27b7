"""QAT forms of operators outside a group, of the stubs and of FloatFunctional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, FakeQuantState
from horizon_plugin_pytorch.nn.qat.modes import in_integers, without_autocast
from horizon_plugin_pytorch.nn.quantized import operators
from horizon_plugin_pytorch.nn.quantized.group import require_quantized
from horizon_plugin_pytorch.nn.quantized.operation import hold_parameters, run_operator
from horizon_plugin_pytorch.nn.quantized.operators import Operator
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, dequantize


def apply_operator(module: Any, operator: Operator, xs: tuple[Any, ...], quant: FakeQuantize) -> Tensor:
    """An operator with its output quantized: in float for calibration, rounded in training, on integers in eval."""
    if not module.state.quantizes:
        y = operator.float(*map(dequantize, xs))
        if module.state is FakeQuantState.CALIBRATION:
            quant.observe(y)
        return y
    require_quantized(module, *xs)
    if module.training:
        with without_autocast(xs[0].device.type):
            y = operator.float(*(x.dequantize() for x in xs))
        return quant.train_quantize(y)
    integers = in_integers(module, *xs)
    return run_operator(operator, integers, quant.current_scale(), quant.dtype8, module.path, quant.float_calls)


class Operation(nn.Module):
    """An operator with an integer rule, and the quantizer of its output."""

    quantizes_inputs = True

    def __init__(self, operator: Operator, output_quant: FakeQuantize, path: str) -> None:
        super().__init__()
        self.operator, self.output_quant = operator, output_quant
        self.state, self.path = FakeQuantState.FLOAT, path
        output_quant.path = f"{path}.output_quant"
        hold_parameters(self, operator)

    def forward(self, *xs: Tensor) -> Tensor:
        return apply_operator(self, self.operator, xs, self.output_quant)

    def _get_name(self) -> str:
        return f"QAT{self.operator.name}"


class FloatFunctional(nn.Module):
    """The QAT form of `FloatFunctional`; its methods share one output scale, so use one instance per call site."""

    quantizes_inputs = True

    def __init__(self, output_quant: FakeQuantize, path: str) -> None:
        super().__init__()
        self.activation_post_process = output_quant
        self.state, self.path = FakeQuantState.FLOAT, path
        output_quant.path = f"{path}.activation_post_process"

    def _apply_operator(self, operator: Operator, *xs: Any) -> Tensor:
        return apply_operator(self, operator, xs, self.activation_post_process)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._apply_operator(operators.Add(), x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self._apply_operator(operators.Add("relu"), x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._apply_operator(operators.Mul(), x, y)

    def cat(self, x: Any, dim: int = 0) -> Tensor:
        return self._apply_operator(operators.Cat(dim), *x)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return self._apply_operator(operators.Elementwise(lambda t: t + y), x)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return self._apply_operator(operators.Elementwise(lambda t: t * y), x)

    def sub(self, x: Tensor, y: Tensor) -> Tensor:
        return self._in_float(torch.sub, x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._in_float(torch.matmul, x, y)

    def _in_float(self, function: Callable[..., Tensor], *xs: Any) -> Tensor:
        """No integer rule: dequantize, compute in float32, quantize."""
        for x in xs:
            if isinstance(x, QTensor):
                x.float_calls[function.__name__] += 1
        return self.activation_post_process(function(*map(dequantize, xs)))


class QuantStub(nn.Module):
    """Quantizes a float tensor; hands a quantized one on."""

    quantizes_inputs = True

    def __init__(self, output_quant: FakeQuantize, path: str) -> None:
        super().__init__()
        self.output_quant = output_quant
        self.state, self.path = FakeQuantState.FLOAT, path
        output_quant.path = path

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise QuantizationError(
                f"{self.path!r} is to quantize a {type(x).__name__}: give prepare_qat_fx example_inputs, so that it knows which arguments "
                "are tensors"
            )
        return x if isinstance(x, QTensor) else self.output_quant(x)


class DeQuantStub(nn.Module):
    """Turns integers into float32; hands a float tensor on. The same in QAT and after convert."""

    def forward(self, x: Tensor) -> Tensor:
        return dequantize(x)


class Alone(nn.Module):
    """An anchor with integers inside and float tensors around: it quantizes its input, and its output is float32.

    Stands where code calls the anchor that could not be traced. The same in QAT and after convert.
    """

    def hold(self, quant: nn.Module, group: nn.Module) -> None:
        self.quant, self.group = quant, group

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return dequantize(self.group(self.quant(input), *args, **kwargs))
