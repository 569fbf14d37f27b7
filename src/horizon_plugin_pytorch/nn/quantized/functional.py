"""`FloatFunctional`: adds, products and concatenations as a module, so that they can be named, fused and quantized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.nn.quantized.operators import Operator


class FloatFunctional(nn.Module):
    """Operators as methods of a module; use one instance per call site, and call its methods, not the module.

    Has the methods of ``torch.ao.nn.quantized.FloatFunctional`` and works where PyTorch no longer ships it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("FloatFunctional is not called itself: use .add(), .mul(), .cat(), …")

    def _out(self, x: Tensor) -> Tensor:
        return self.activation_post_process(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._out(torch.add(x, y))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.add(x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self._out(torch.relu(torch.add(x, y)))

    def sub(self, x: Tensor, y: Tensor) -> Tensor:
        return self._out(torch.sub(x, y))

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._out(torch.mul(x, y))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.mul(x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._out(torch.matmul(x, y))

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        return self._out(torch.cat(list(x), dim=dim))


class FloatOperator(nn.Module):
    """An operator that has an integer form, as a module of a float graph."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *xs: Tensor) -> Tensor:
        return self.operator.float(*xs)

    def extra_repr(self) -> str:
        return repr(self.operator)
