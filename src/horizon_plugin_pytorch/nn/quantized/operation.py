"""Converted forms of operators outside a group, of the stub and of FloatFunctional."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized import compiled, operators
from horizon_plugin_pytorch.nn.quantized.group import require_quantized
from horizon_plugin_pytorch.nn.quantized.operators import Operator
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, dequantize, quantize
from horizon_plugin_pytorch.nn.quantized.tensors import MakesIntegers


def run_operator(
    operator: Operator, xs: Any, scale: Tensor, dtype8: torch.dtype, path: str, float_calls: Counter[str] | None = None
) -> QTensor:
    """An operator on integers; what goes wrong in it names `path`."""
    try:
        q = operator.integer(xs, scale, dtype8)
    except ValueError as error:
        raise QuantizationError(f"{path!r}: {error}") from None
    return QTensor.make(q, scale, dtype8, float_calls)


def hold_parameters(owner: nn.Module, operator: Operator) -> None:
    """Give `owner` the parameters of the module that an operator computes with, under their names."""
    if operator.module is not None:
        for name, parameter in operator.module.named_parameters(recurse=False):
            owner.register_parameter(name, parameter)


class _Quantizing(MakesIntegers):
    """A module that makes integers of one scale.

    Buffers:
        scale: float32, one value or one per channel.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dtype8: torch.dtype, path: str) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.dtype8, self.path = dtype8, path
        self.float_calls: Counter[str] = Counter()
        self.eval()

    def _run(self, operator: Operator, *xs: Any) -> QTensor:
        require_quantized(self, *xs)
        return run_operator(operator, xs, self.scale, self.dtype8, self.path, self.float_calls)

    def extra_repr(self) -> str:
        return f"output={str(self.dtype8).removeprefix('torch.')}"


class Quantize(_Quantizing):
    """``clamp(round(x / s), lo, hi)``; a NaN raises. Hands a quantized tensor on."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, QTensor):
            return x
        if torch.compiler.is_compiling():
            return compiled.call(self, (x,))
        return quantize(x, self.scale, self.dtype8, self.path, self.float_calls)

    def float_form(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return xs[0]


class Operation(_Quantizing):
    """An operator on integers, e.g. a pool, an add outside a group, or a table."""

    def __init__(self, operator: Operator, scale: Tensor, dtype8: torch.dtype, path: str) -> None:
        super().__init__(scale, dtype8, path)
        self.operator = operator
        hold_parameters(self, operator)

    def forward(self, *xs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.call(self, xs)
        return self._run(self.operator, *xs)

    def float_form(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return xs[0] if isinstance(self.operator, operators.Elementwise) else self.operator.float(*xs)

    def _get_name(self) -> str:
        return f"Quantized{self.operator.name}"


class QFunctional(_Quantizing):
    """The converted `FloatFunctional`."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run_or_call("add", operators.Add(), x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run_or_call("add_relu", operators.Add("relu"), x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run_or_call("mul", operators.Mul(), x, y)

    def cat(self, x: Any, dim: int = 0) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.call(self, x, "cat", (dim,))
        return self._run(operators.Cat(dim), *x)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.call(self, (x,), "add_scalar", number=float(y))
        return self._run(operators.Elementwise(lambda t: t + y), x)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.call(self, (x,), "mul_scalar", number=float(y))
        return self._run(operators.Elementwise(lambda t: t * y), x)

    def sub(self, x: Tensor, y: Tensor) -> Tensor:
        return self._in_float(torch.sub, x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._in_float(torch.matmul, x, y)

    def uncompiled(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int], number: float | None) -> Tensor:
        if method == "cat":
            return self.cat(xs, sizes[0])
        return getattr(self, method)(*xs, *([] if number is None else [number]))

    def float_form(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        if method == "cat":
            return torch.cat(list(xs), sizes[0])
        function = torch.matmul if method == "matmul" else torch.add
        return function(*xs) if len(xs) > 1 else xs[0]

    def _run_or_call(self, method: str, operator: Operator, *xs: Tensor) -> Tensor:
        return compiled.call(self, xs, method) if torch.compiler.is_compiling() else self._run(operator, *xs)

    def _in_float(self, function: Callable[..., Tensor], *xs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.call(self, xs, function.__name__)
        for x in xs:
            if isinstance(x, QTensor):
                x.float_calls[function.__name__] += 1
        return quantize(function(*map(dequantize, xs)), self.scale, self.dtype8, self.path, self.float_calls)
