"""Elementwise operators outside a fused group: add, mul, and any function of one tensor as a table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import dequantize, epilogue, group_multipliers, integer_range, quantize


def add(
    a: Tensor, s_a: Tensor, b: Tensor, s_b: Tensor, s_y: Tensor, dtype: torch.dtype, activation: str | None = None
) -> Tensor:
    """``round(fma(float32(b), float32(s_b / s_y), float32(a) * float32(s_a / s_y)))``, clamped.

    Args:
        a, s_a: the first operand, int8 or uint8, and its scale.
        b, s_b: the other, in a shape that broadcasts with `a`.
        s_y, dtype: the result's.
        activation: None, "relu" or "relu6", before the rounding.
    """
    m, ratio, bound = group_multipliers(s_a, None, s_y, s_b)
    return epilogue(a, m, residual=b, residual_ratio=ratio, activation=activation, bound=bound, dtype=dtype)


def mul(
    a: Tensor, s_a: Tensor, b: Tensor, s_b: Tensor, s_y: Tensor, dtype: torch.dtype, activation: str | None = None
) -> Tensor:
    """``round(float32(a * b) * float32(s_a * s_b / s_y))``, clamped; arguments as `add`."""
    m, _, bound = group_multipliers(s_a, s_b, s_y)
    product = a.to(torch.int32) * b.to(torch.int32)
    return epilogue(product, m, activation=activation, bound=bound, dtype=dtype)


def lookup_table(
    fn: Callable[[Tensor], Tensor], s_x: Tensor, in_dtype: torch.dtype, s_y: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """An elementwise function of one tensor as a table: entry i is ``quantize(fn(float32(lo + i) * s_x), s_y)``.

    Args:
        fn: takes a float32 tensor ``[256]`` on the CPU and returns one; on the CPU whatever the model's device is, so
            that the table does not depend on it.
        s_x, in_dtype: the input's scale and dtype, whose least value is lo.
        s_y, out_dtype: the output's.

    Returns:
        `out_dtype`, ``[256]``, on `s_x`'s device.

    Raises:
        ValueError: `fn` gives NaN for an input that int8 or uint8 can hold, or is not elementwise.
    """
    lo, hi = integer_range(in_dtype)
    x = dequantize(torch.arange(lo, hi + 1, device="cpu"), s_x)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y = fn(x)
    if y.shape != x.shape:
        raise ValueError(f"not an elementwise function: {tuple(x.shape)} became {tuple(y.shape)}")
    if bool(y.isnan().any()):
        raise ValueError(f"the function is NaN at {x[y.isnan()][0].item():g}, which {in_dtype} can hold at this scale")
    return quantize(y, s_y, out_dtype).to(s_x.device)


def lookup(q: Tensor, table: Tensor) -> Tensor:
    """``table[q - lo]``: `q` through a table from `lookup_table`, shape and layout kept, dtype the table's."""
    lo, _ = integer_range(q.dtype)
    return table.to(q.device)[q.to(torch.int32) - lo]
