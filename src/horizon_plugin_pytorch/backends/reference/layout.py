"""Operators that move integers: concatenation, nearest up-sampling, padding."""

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

    Args:
        x_q: int8 or uint8.
        size: the output's spatial size.
        scale_factor: or its ratio to the input's; ``out = floor(in * scale_factor)``.
        exact: "nearest-exact" instead of "nearest".

    Raises:
        ValueError: neither or both of `size` and `scale_factor`.
    """
    spatial = x_q.shape[2:]
    targets: list[tuple[int, float | None]]
    if size is not None and scale_factor is None:
        targets = [(out, None) for out in as_tuple(size, len(spatial))]
    elif scale_factor is not None and size is None:
        factors = [scale_factor] * len(spatial) if isinstance(scale_factor, (int, float)) else scale_factor
        targets = [(floor(n * f), f) for n, f in zip(spatial, factors, strict=True)]
    else:
        raise ValueError("one of size and scale_factor must be given")
    y = x_q
    for dim, (out, factor) in enumerate(targets, start=2):
        if len(spatial) == 2 and not exact and out in (x_q.shape[dim], 2 * x_q.shape[dim]):
            factor = None
        y = y.index_select(dim, nearest_sources(x_q.shape[dim], out, factor, exact).to(x_q.device))
    return in_layout_of(x_q, y)


def nearest_sources(length: int, out: int, factor: float | None, exact: bool) -> Tensor:
    """The input index of each output index along one dimension, int64 ``[out]``; see `upsample_nearest`."""
    index = torch.arange(out, device="cpu")
    ratio = torch.tensor(1 / factor if factor else length / out, dtype=torch.float64, device="cpu").to(torch.float32)
    position = (index + (0.5 if exact else 0.0)).to(torch.float32) * ratio
    return position.floor().to(torch.int64).clamp_(max=length - 1)


def pad(x_q: Tensor, padding: Sequence[int], mode: str = "constant") -> Tensor:
    """`torch.nn.functional.pad` of integers, with zeros or by a mode that copies; dtype and scale unchanged."""
    integer_range(x_q.dtype)
    # In float32, which holds these integers: not every mode has an integer kernel on every device.
    return in_layout_of(x_q, F.pad(x_q.to(torch.float32), list(padding), mode).to(torch.int16).to(x_q.dtype))
