"""Converted forms of operators outside a group, of the stub and of FloatFunctional."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.nn.quantized import operators
from horizon_plugin_pytorch.nn.quantized.group import require_quantized
from horizon_plugin_pytorch.nn.quantized.operators import Operator
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, dequantize
from horizon_plugin_pytorch.nn.quantized.tensors import KeepsDtype


class _Quantizing(KeepsDtype):
    """A module that makes integers of one scale.

    Buffers:
        scale: float32, one value or one per channel.
    """

    def __init__(self, scale: Tensor, dtype8: torch.dtype, path: str) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.dtype8, self.path = dtype8, path
        self.float_calls: Counter[str] = Counter()
        self.eval()

    def _make(self, payload: Tensor) -> QTensor:
        return QTensor.make(payload, self.scale, self.dtype8, self.float_calls)

    def _run(self, operator: Operator, *xs: Any) -> QTensor:
        require_quantized(self, *xs)
        return self._make(operator.integer(xs, self.scale, self.dtype8))

    def extra_repr(self) -> str:
        return f"output={str(self.dtype8).removeprefix('torch.')}"


class Quantize(_Quantizing):
    """``clamp(round(x / s), lo, hi)``; a NaN raises. Hands a quantized tensor on."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, QTensor):
            return x
        return self._make(reference.quantize(x, self.scale, self.dtype8, None if self.scale.dim() == 0 else 1))


class Operation(_Quantizing):
    """An operator on integers, e.g. a pool, an add outside a group, or a table."""

    def __init__(self, operator: Operator, scale: Tensor, dtype8: torch.dtype, path: str) -> None:
        super().__init__(scale, dtype8, path)
        self.operator = operator

    def forward(self, *xs: Any) -> Tensor:
        return self._run(self.operator, *xs)

    def _get_name(self) -> str:
        return f"Quantized{self.operator.name}"


class QFunctional(_Quantizing):
    """The converted `FloatFunctional`."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(operators.Add(), x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(operators.Add("relu"), x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(operators.Mul(), x, y)

    def cat(self, x: Any, dim: int = 0) -> Tensor:
        return self._run(operators.Cat(dim), *x)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return self._run(operators.Elementwise(lambda t: t + y), x)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return self._run(operators.Elementwise(lambda t: t * y), x)

    def sub(self, x: Tensor, y: Tensor) -> Tensor:
        return self._in_float(torch.sub, x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._in_float(torch.matmul, x, y)

    def _in_float(self, function: Any, *xs: Any) -> Tensor:
        for x in xs:
            if isinstance(x, QTensor):
                x.float_calls[function.__name__] += 1
        return self._make(reference.quantize(function(*map(dequantize, xs)), self.scale, self.dtype8))
