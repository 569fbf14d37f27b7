"""Numbers: quantize, dequantize, the exact fused multiply-add, ratios of scales, and the epilogue of every operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import without_gradients

# How many elements a chain of elementwise operations takes at a time on the CPU: per thread, so that they stay in its
# cache, and at most, because the C library maps larger buffers anew each time, at more cost than the work itself.
BLOCK = 2**16
BLOCK_MAX = 2**19

_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}

# Each activation works in place on y, in units of the output's scale; `bound` is 6 in those units.
_ACTIVATIONS: dict[str | None, Callable[[Tensor, Any], Tensor]] = {
    None: lambda y, bound: y,
    "relu": lambda y, bound: y.clamp_(min=0),
    "relu6": lambda y, bound: torch.minimum(y.clamp_(min=0), bound),
}


def integer_range(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest activation of `dtype`: int8 is [-128, 127], uint8 is [0, 255].

    Raises:
        ValueError: for any other dtype.
    """
    if dtype not in _RANGES:
        raise ValueError(f"quantized tensors are torch.int8 or torch.uint8, not {dtype}")
    return _RANGES[dtype]


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int | None = None, *, check: bool = True) -> Tensor:
    """``clamp(round_half_even(float32(x) / scale), lo, hi)``: a true division, infinities clamp.

    Args:
        x: floating point, any shape; other precisions are first converted to float32.
        scale: float32, one value, or one per index of `axis`.
        dtype: torch.int8 or torch.uint8.
        axis: the dimension of `x` that a vector of scales runs along.
        check: look for NaN in `x` and for scales that are not positive and finite. That reads the result on the host;
            without it a NaN becomes an unspecified integer.

    Returns:
        The integers, of `x`'s shape and layout.

    Raises:
        ValueError: NaN in `x`; a scale that is zero, negative or not finite; a vector of scales that does not fit.
        TypeError: scales that are not float32.
    """
    lo, hi = integer_range(dtype)
    return divide_and_round(x, along(scale, x, axis, "scale"), lo, hi, dtype, check)


def dequantize(q: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """``float32(q) * scale``, float32, of `q`'s shape; `scale` and `axis` as in `quantize`."""
    return q.to(torch.float32) * along(scale, q, axis, "scale")


@without_gradients
def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors (broadcast), rounded once to float32, as a hardware fused multiply-add.

    The product of two float32 is exact in float64. Its sum with `c` may not be, and rounding it first to float64 and
    then to float32 goes wrong where the first rounding lands half way between two float32. So the float64 sum is
    rounded to odd instead, for which the second rounding is proven innocuous (S. Boldo, G. Melquiond, "Emulation of
    FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57(4),
    2008); its error comes from Knuth's TwoSum.
    """
    p, c = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    s = p + c
    t = s - p
    error = (c - t).sub_((s - t).sub_(p))  # exactly p + c - s; NaN where s is not finite
    # Of operands that come from quantized tensors hardly a float64 sum is inexact; the CPU can look without waiting.
    if s.device.type == "cpu" and not torch.compiler.is_exporting() and not error.any():
        return s.to(torch.float32)
    bits = s.view(torch.int64)
    inexact_even = (error.abs() > 0) & ((bits & 1) == 0)
    outwards = (error > 0) == (s > 0)
    step = torch.where(outwards, 1, -1).mul_(inexact_even)
    return (bits + step).view(torch.float64).to(torch.float32)


@without_gradients
def scale_ratio(s: Tensor, t: Tensor | None = None, *, over: Tensor | None = None) -> Tensor:
    """``float32(s * t / over)``: float64, where the product is exact, rounded once at its end; on `s`'s device."""
    value = s.to(torch.float64)
    if t is not None:
        value = value * t.to(s.device, torch.float64)
    if over is not None:
        value = value / over.to(s.device, torch.float64)  # a tensor there: CUDA inverts a CPU scalar and multiplies
    return value.to(torch.float32)


class Multipliers(NamedTuple):
    """What `epilogue` multiplies by, for one group; each is float32, one value or one per output channel."""

    m: Tensor
    residual_ratio: Tensor | None
    bound: Tensor


def group_multipliers(
    s_x: Tensor, s_w: Tensor | None, s_y: Tensor | None = None, s_r: Tensor | None = None
) -> Multipliers:
    """The multipliers of a fused group: ``m = s_x * s_w / s_y``, ``residual_ratio = s_r / s_y``, ``bound = 6 / s_y``.

    Args:
        s_x: the input's scale; a vector, one per input channel, for a depthwise convolution (see `per_output`).
        s_w: the weight's scales, one per output channel; None for an add that stands alone, where it is 1.
        s_y: the output's scale, one value or one per output channel. None for a high-precision output (float32), where
            ``m = s_x * s_w``, ``residual_ratio = s_r`` and ``bound = 6``.
        s_r: the scale of the add's other operand, None for a group without an add.
    """
    if s_w is not None:
        s_x = per_output(s_x, s_w.numel())
    six = torch.full((), 6, dtype=torch.float32, device=s_x.device)
    return Multipliers(
        m=scale_ratio(s_x, s_w, over=s_y),
        residual_ratio=None if s_r is None else scale_ratio(s_r, over=s_y),
        bound=scale_ratio(six, over=s_y),
    )


@without_gradients
def epilogue(
    acc: Tensor,
    m: Tensor,
    *,
    residual: Tensor | None = None,
    residual_ratio: Tensor | None = None,
    activation: str | None = None,
    bound: Tensor | None = None,
    dtype: torch.dtype,
    axis: int = 1,
) -> Tensor:
    """From an integer accumulator to the output, with its one rounding::

        y   = float32(acc) * m
        y   = fma(float32(residual), residual_ratio, y)
        y   = max(y, 0)                                 "relu";  "relu6": min(max(y, 0), bound)
        y_q = clamp(round_half_even(y), lo, hi)         of dtype; torch.float32 returns y

    Args:
        acc: integers, any shape.
        m: float32, see `group_multipliers`: one value, a vector along `axis`, or shaped to broadcast against `acc`.
        residual: the add's other operand, int8 or uint8, in a shape that broadcasts against `acc`.
        residual_ratio: the residual's scale over the output's, as `m`.
        activation: None, "relu" or "relu6".
        bound: 6 over the output's scale, as `m`; needed for "relu6".
        dtype: torch.int8, torch.uint8, or torch.float32 for a high-precision output.
        axis: the channel dimension of `acc`: 1, the last one for Linear.

    Raises:
        ValueError: an unknown activation or dtype, a multiplier that is missing or does not fit.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} has no integer form; there are {list(_ACTIVATIONS)}")
    if residual is not None and residual_ratio is None:
        raise ValueError("a residual needs residual_ratio")
    if activation == "relu6" and bound is None:
        raise ValueError("relu6 needs bound")
    limits = None if dtype == torch.float32 else integer_range(dtype)

    def five_lines(acc: Tensor, residual: Tensor | None, m: Tensor, ratio: Any, bound: Tensor | None) -> Tensor:
        y = acc.to(torch.float32) * m
        if residual is not None:
            y = fma(residual.to(torch.float32), ratio, y)
        y = _ACTIVATIONS[activation](y, bound)
        return y if limits is None else round_and_clamp(y, *limits, dtype)

    named = {"m": m, "residual_ratio": residual_ratio, "bound": bound}
    ratios = [None if ratio is None else along(ratio, acc, axis, name) for name, ratio in named.items()]
    return _in_blocks(five_lines, acc, [residual, *ratios], dtype)


# Shared by the modules of this package.


def along(scale: Tensor, x: Tensor, axis: int | None, name: str) -> Tensor:
    """`scale` on `x`'s device, in a shape that broadcasts: one value, a vector along `axis` of `x`, or already shaped.

    On the device, because CUDA divides by a scalar that lives on the CPU by multiplying with its reciprocal.
    """
    require_float32(scale, name)
    scale = scale.to(x.device)
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() != 1:
        return scale
    if axis is None:
        raise ValueError(f"{name} has {scale.numel()} values, so the axis they run along must be given")
    if scale.numel() != x.shape[axis]:
        raise ValueError(f"{name} has {scale.numel()} values, but dimension {axis} of {tuple(x.shape)} does not")
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.view(shape)


def require_float32(scale: Tensor, name: str) -> None:
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, not {scale.dtype}: round it once from float64")


def per_output(s_x: Tensor, channels: int) -> Tensor:
    """An input scale as each of `channels` output channels sees it.

    One value stays as it is. A vector, one scale per input channel, is for depthwise convolutions only: there the
    output channels ``c * k .. c * k + k - 1`` read input channel ``c`` alone, for a channel multiplier ``k``.
    """
    if s_x.numel() == 1:
        return s_x.reshape(())
    if s_x.dim() != 1 or channels % s_x.numel():
        raise ValueError(f"{tuple(s_x.shape)} input scales do not divide {channels} output channels")
    return s_x.repeat_interleave(channels // s_x.numel())


@without_gradients
def divide_and_round(x: Tensor, scale: Tensor, lo: int, hi: int, dtype: torch.dtype, check: bool) -> Tensor:
    """``clamp(round_half_even(float32(x) / scale), lo, hi)``, `scale` shaped to broadcast; checks as in `quantize`."""
    exporting = (
        torch.compiler.is_exporting()
    )  # a graph checks when it runs, and its scales, constants, were checked before
    if check and not exporting and not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError("a scale is zero, negative or not finite: it comes from data without range, or was never set")
    y = x.to(torch.float32) / scale
    if check and exporting:
        torch._assert_async(~y.isnan().any(), "the tensor to quantize holds NaN")
    elif check and bool(y.isnan().any()):
        raise ValueError(f"the tensor to quantize, of shape {tuple(x.shape)}, holds NaN")
    return round_and_clamp(y, lo, hi, dtype)


def round_and_clamp(y: Tensor, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """``clamp(round_half_even(y), lo, hi)`` as `dtype`; overwrites `y`."""
    # int16 on the way: PyTorch converts float32 to uint8 directly about five times slower than through it.
    return y.round_().clamp_(lo, hi).to(torch.int16).to(dtype)


def _in_blocks(fn: Callable[..., Tensor], acc: Tensor, others: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """``fn(acc, *others)``, elementwise, as `dtype`; on the CPU in blocks, whose intermediate results stay in cache."""
    operands = [acc, *others]
    shape = torch.broadcast_shapes(*(o.shape for o in operands if o is not None))
    block = min(BLOCK * torch.get_num_threads(), BLOCK_MAX)
    if acc.device.type != "cpu" or torch.compiler.is_exporting() or shape.numel() <= block:
        return fn(*operands)

    def fill(out: Tensor, parts: Sequence[Tensor | None]) -> None:
        if out.numel() <= block:
            out.copy_(fn(*parts))
            return
        # halves along the dimension that is outermost in memory, so that they are contiguous
        dim = max(range(out.dim()), key=lambda d: out.stride(d) if out.shape[d] > 1 else 0)
        half = out.shape[dim] // 2
        for start, length in ((0, half), (half, out.shape[dim] - half)):
            fill(out.narrow(dim, start, length), [None if p is None else p.narrow(dim, start, length) for p in parts])

    result = torch.empty_like(acc.expand(shape), dtype=dtype)
    fill(result, [None if o is None else o.expand(shape) for o in operands])
    return result
