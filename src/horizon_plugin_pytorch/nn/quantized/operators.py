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
from torch import Tensor

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor


class Operator:
    """One operator; `nonnegative` says whether its result is, given that its inputs are."""

    nonnegative: bool | None = None  # None: if all inputs are

    def float(self, *xs: Tensor) -> Tensor:
        raise NotImplementedError

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__


_FLOAT_ACTIVATION: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda y: y, "relu": torch.relu, "relu6": F.relu6}


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
    _table: tuple[tuple[Any, ...], Tensor] | None = field(default=None, repr=False, compare=False)

    def float(self, *xs: Tensor) -> Tensor:
        return self.function(xs[0])

    def integer(self, xs: Sequence[QTensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        x = xs[0]
        payload = x.payload
        key = (x.scale, x.scale._version, scale, scale._version, payload.dtype, dtype)
        if self._table is None or any(a is not b and (isinstance(a, Tensor) or a != b) for a, b in zip(key, self._table[0], strict=True)):
            self._table = key, reference.lookup_table(self.function, x.scale, payload.dtype, scale, dtype)
        return reference.lookup(payload, self._table[1])

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}


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
        return pool(xs[0], self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, **self._divisor())

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
