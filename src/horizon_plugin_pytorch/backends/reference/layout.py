"""Operators that move integers: concatenation, up-sampling, padding."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import epilogue, integer_range, scale_ratio
from .shapes import as_tuple, in_layout_of


def cat(operands: Sequence[Tensor], scales: Sequence[Tensor], s_y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Concatenate; each operand becomes ``clamp(round_half_even(float32(q) * float32(s_i / s_y)))``.

    An operand that has scale s_y comes out as it went in, for the ratio is 1 (and is clamped if `dtype` is narrower).

    Args:
        operands: int8 or uint8, shapes equal but along `dim`.
        scales: one per operand.
        s_y, dtype: the result's.
    """
    ratios = [scale_ratio(s, over=s_y) for s in scales]
    return torch.cat([epilogue(q, m, dtype=dtype) for q, m in zip(operands, ratios, strict=True)], dim)


def upsample_nearest(
    x_q: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    *,
    exact: bool = False,
) -> Tensor:
    """Nearest up-sampling (or down) of ``[N, C, *in]`` by PyTorch's rule; dtype and scale unchanged.

    Along each dimension, in float32, with ``r = 1 / scale_factor`` where that is given and else ``r = in / out``::

        source(i) = min(floor(i * r), in - 1)              "nearest"
        source(i) = min(floor((i + 0.5) * r), in - 1)      `exact`, "nearest-exact"

    The one exception is PyTorch's own: for "nearest" in two dimensions, a scale factor that is close to 1 or 2, so that
    ``out == in`` or ``out == 2 * in``, is taken for 1 or 2. (Its kernels disagree about this exception. It is the rule
    of those for the CPU, whatever the device here.)

    For "nearest-exact" this is the rule of PyTorch's kernels for CUDA, for many channels in channels_last, and for CPUs
    without fused multiply-add. With it, its others compute ``(i + 0.5) * r - 0.5`` with one rounding and add 0.5: where
    ``(i + 0.5) * in / out`` is a whole number and `r` is not exact, they may take the source before or after (4 to 82:
    one index). No result here depends on the layout or on the machine.

    Args:
        x_q: int8 or uint8.
        size: the output's spatial size.
        scale_factor: or its ratio to the input's; ``out = floor(in * scale_factor)``.
        exact: "nearest-exact" instead of "nearest".

    Raises:
        ValueError: neither or both of `size` and `scale_factor`.
    """
    y = x_q
    for dim, (out, factor) in enumerate(upsampled(x_q.shape[2:], size, scale_factor), start=2):
        y = y.index_select(dim, nearest_sources(x_q.dim() - 2, x_q.shape[dim], out, factor, exact).to(x_q.device))
    return in_layout_of(x_q, y)


def nearest_sources(dims: int, length: int, out: int, factor: float | None, exact: bool) -> Tensor:
    """The input index of each output index along one of `dims` spatial dimensions, int64 ``[out]``; see `upsample_nearest`."""
    if dims == 2 and not exact and out in (length, 2 * length):
        factor = None
    index = torch.arange(out, device="cpu")
    ratio = torch.tensor(1 / factor if factor else length / out, dtype=torch.float64, device="cpu").to(torch.float32)
    position = (index + (0.5 if exact else 0.0)).to(torch.float32) * ratio
    return position.floor().to(torch.int64).clamp_(max=length - 1)


LINEAR_BITS = {1: 22, 2: 11}
"""Bits of a weight of `upsample_linear` by the number of dimensions: as many as leave the sum of an image's weights 2^22."""


def upsample_linear(
    x_q: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    *,
    align_corners: bool = False,
) -> Tensor:
    """Linear up-sampling (or down) of ``[N, C, L]``, bilinear of ``[N, C, H, W]``; dtype and scale unchanged.

    Along each dimension output i lies at p, between two inputs, of which the second gets the weight w in units of 2^-b, with
    ``b = 22`` in one dimension and 11 in two. In float64, with r as in `upsample_nearest`, but for ``r = (in - 1) / (out - 1)`` (0 for
    one output) with `align_corners`::

        p    = i * r  with align_corners,  max((i + 0.5) * r - 0.5, 0)  without
        low  = min(floor(p), in - 1),  high = min(low + 1, in - 1)
        w    = round_half_even(min(p - low, 1) * 2^b)

    These are PyTorch's places; its weights are float32 and not rounded. For factors 2, 4, 8, … they are equal, for others w is off by
    2^-12 at most, and so the value by an eighth of a step. The sum over the two inputs of each dimension is exact in int32::

        acc = sum q * (the product of its weights)
        y_q = round_half_even(float32(acc) * 2^-22)

    Args:
        x_q: int8 or uint8.
        size, scale_factor: as for `upsample_nearest`.
        align_corners: whether the first and last places of input and output are the same.

    Raises:
        ValueError: another number of dimensions; neither or both of `size` and `scale_factor`.
    """
    dims = x_q.dim() - 2
    if dims not in LINEAR_BITS:
        raise ValueError(f"linear up-sampling of integers is for one or two dimensions, not {dims}")
    acc = x_q.to(torch.int32)
    bits = LINEAR_BITS[dims]
    for dim, (out, factor) in enumerate(upsampled(x_q.shape[2:], size, scale_factor), start=2):
        low, high, w = (t.to(x_q.device) for t in linear_sources(x_q.shape[dim], out, factor, align_corners, bits))
        w = w.view(-1, *[1] * (x_q.dim() - 1 - dim))
        acc = acc.index_select(dim, low) * (2**bits - w) + acc.index_select(dim, high) * w
    m = torch.full((), 0.5 ** (dims * bits), dtype=torch.float32, device=x_q.device)
    return in_layout_of(x_q, epilogue(acc, m, dtype=x_q.dtype))


def linear_sources(
    length: int, out: int, factor: float | None, align_corners: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``low``, ``high`` (int64) and ``w`` (int32) of each output index along one dimension; see `upsample_linear`."""
    index = torch.arange(out, dtype=torch.float64, device="cpu")
    if align_corners:
        position = index * ((length - 1) / (out - 1) if out > 1 else 0.0)
    else:
        position = ((index + 0.5) * (1 / factor if factor else length / out) - 0.5).clamp_(min=0)
    low = position.floor().clamp_(max=length - 1)
    w = ((position - low).clamp_(max=1) * 2**bits).round_().to(torch.int32)
    low = low.to(torch.int64)
    return low, (low + 1).clamp_(max=length - 1), w


def upsampled(
    spatial: Sequence[int], size: int | Sequence[int] | None, scale_factor: float | Sequence[float] | None
) -> list[tuple[int, float | None]]:
    """For each dimension the output's size, and the factor if one was given; see `upsample_nearest`."""
    if (size is None) == (scale_factor is None):
        raise ValueError("one of size and scale_factor must be given")
    if size is not None:
        return [(out, None) for out in as_tuple(size, len(spatial))]
    assert scale_factor is not None
    factors = [scale_factor] * len(spatial) if isinstance(scale_factor, (int, float)) else scale_factor
    return [(floor(n * f), f) for n, f in zip(spatial, factors, strict=True)]


def pad(x_q: Tensor, padding: Sequence[int], mode: str = "constant") -> Tensor:
    """`torch.nn.functional.pad` of integers, with zeros or by a mode that copies; dtype and scale unchanged."""
    integer_range(x_q.dtype)
    # In float32, which holds these integers: not every mode has an integer kernel on every device.
    return in_layout_of(x_q, F.pad(x_q.to(torch.float32), list(padding), mode).to(torch.int16).to(x_q.dtype))
