"""Operators outside a fused group that have integer rules, each in float and on integers.

`float` is what the float model computes; `integer` is the row of the numerics for it: QTensors in, integers of a given output scale
and dtype out. QAT and quantized modules hold one of these objects; adding an operator is adding a class here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.nn.quantized.tensors import Remembered


class Operator:
    """One operator; `nonnegative` says whether its result is, given that its inputs are."""

    nonnegative: bool | None = None  # None: if all inputs are

    def float(self, *xs: Tensor) -> Tensor:
        raise NotImplementedError

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    @property
    def module(self) -> nn.Module | None:
        """The module that computes it in float, if it is one: its parameters are the operator's."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__


_FLOAT_ACTIVATION: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
}


@dataclass
class Add(Operator):
    """``fma(b, s_b / s_y, a * (s_a / s_y))``, `a` the first operand."""

    activation: str | None = None

    def float(self, *xs: Tensor) -> Tensor:
        return _FLOAT_ACTIVATION[self.activation](torch.add(xs[0], xs[1]))

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = xs
        return reference.add(a.payload, a.scale, b.payload, b.scale, scale, dtype, self.activation)


@dataclass
class Mul(Operator):
    """``(a * b) * (s_a * s_b / s_y)``."""

    def float(self, *xs: Tensor) -> Tensor:
        return torch.mul(xs[0], xs[1])

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = xs
        return reference.mul(a.payload, a.scale, b.payload, b.scale, scale, dtype)


@dataclass
class Cat(Operator):
    """Each operand ``q * (s_i / s_y)``; one of the output's scale is copied."""

    dim: int = 0

    def float(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        return reference.cat([x.payload for x in xs], [x.scale for x in xs], scale, self.dim, dtype)


@dataclass
class Elementwise(Operator):
    """Any function of one tensor, element by element, as a table of 256 entries."""

    function: Callable[[Tensor], Tensor]
    nonnegative: bool | None = False
    _tables: Remembered[Tensor] = field(default_factory=lambda: Remembered(4), repr=False, compare=False)

    def float(self, *xs: Tensor) -> Tensor:
        return self.function(xs[0])

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        x = xs[0]
        payload = x.payload
        parameters = [] if self.module is None else list(self.module.parameters())
        table = self._tables.get(
            (x.scale, scale, *parameters),
            (payload.dtype, dtype),
            lambda: reference.lookup_table(self._on_cpu(), x.scale, payload.dtype, scale, dtype),
        )
        return reference.lookup(payload, table)

    def _on_cpu(self) -> Callable[[Tensor], Tensor]:
        """The function for a tensor on the CPU, wherever the model is: tables are made there."""
        module = self.module
        if module is None:
            return self.function
        parameters = {name: p.detach().to("cpu", torch.float32) for name, p in module.named_parameters()}
        return lambda x: torch.func.functional_call(module, parameters, (x,))

    @property
    def module(self) -> nn.Module | None:
        return self.function if isinstance(self.function, nn.Module) else None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


@dataclass
class AvgPool(Operator):
    """``sum * (s_x / (n * s_y))`` over a window; the arguments of `torch.nn.functional.avg_pool2d`."""

    dims: int
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def _divisor(self) -> dict[str, Any]:
        return {} if self.dims == 1 else {"divisor_override": self.divisor_override}

    def float(self, *xs: Tensor) -> Tensor:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[self.dims - 1]
        return pool(
            xs[0],
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            **self._divisor(),
        )

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        x = xs[0]
        return reference.avg_pool(
            x.payload, x.scale, scale, dtype, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad, self.divisor_override, dims=self.dims,
        )  # fmt: skip


@dataclass
class AdaptiveAvgPool(Operator):
    """``sum * (s_x / (n * s_y))`` over each of `output_size` parts."""

    dims: int
    output_size: Any

    _POOLS: ClassVar = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)

    def float(self, *xs: Tensor) -> Tensor:
        return self._POOLS[self.dims - 1](xs[0], self.output_size)

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        x = xs[0]
        return reference.adaptive_avg_pool(x.payload, x.scale, scale, dtype, self.output_size, dims=self.dims)


@dataclass
class Mean(Operator):
    """``sum * (s_x / (n * s_y))`` over dimensions."""

    dim: tuple[int, ...]
    keepdim: bool = False

    def float(self, *xs: Tensor) -> Tensor:
        return torch.mean(xs[0], self.dim, self.keepdim)

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        x = xs[0]
        return reference.mean(x.payload, x.scale, scale, dtype, self.dim, self.keepdim)
