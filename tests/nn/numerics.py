"""A fused group once more, from its float tensors to its integers, in NumPy and exact fractions.

Written from the document of the numerics alone, so that two implementations have to agree. Slow: every fused multiply-add is
exact rational arithmetic, rounded once.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
TINY = np.float32(2.0**-126)
f32, f64 = np.float32, np.float64


def round_to_float32(value: Fraction) -> np.float32:
    """The nearest float32, ties to even."""
    near = f32(float(value))  # at most one float32 away: it was rounded twice
    candidates = [near, np.nextafter(near, f32(np.inf)), np.nextafter(near, f32(-np.inf))]
    finite = [c for c in candidates if np.isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = np.broadcast_arrays(a, b, c)
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a.flat, b.flat, c.flat, strict=True)
    ]
    return np.array([round_to_float32(v) for v in exact], dtype=f32).reshape(a.shape)


def quantize(x: np.ndarray, scale: Any, dtype: torch.dtype) -> np.ndarray:
    lo, hi = RANGE[dtype]
    return np.clip(np.rint(x.astype(f32) / f32(scale)), lo, hi).astype(np.int64)


def channels_first(w: np.ndarray, transposed: bool, groups: int) -> np.ndarray:
    """``[C_out, ...]`` of either layout."""
    if not transposed:
        return w
    c_in, per_group = w.shape[:2]
    return w.reshape(groups, c_in // groups, per_group, *w.shape[2:]).swapaxes(1, 2).reshape(groups * per_group, -1)


def group(
    anchor: nn.Module,
    norm: nn.Module | None,
    x_q: Tensor,
    s_x: Tensor,
    *,
    s_y: Tensor | None,
    dtype: torch.dtype,
    residual: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
) -> np.ndarray:
    """The integers of the group's output, or its float32 values where `s_y` is None.

    Args:
        anchor, norm: the float modules.
        x_q, s_x: the input's integers and scale (one, or one per channel).
        residual: the other operand's integers and scale.
    """
    transposed = "Transpose" in type(anchor).__name__
    groups = getattr(anchor, "groups", 1)
    w = anchor.weight.detach().numpy()
    rows = channels_first(w, transposed, groups)
    c_out = rows.shape[0]
    s_w = np.maximum(f32(f64(np.abs(rows).reshape(c_out, -1).max(1)) / 127), TINY)
    w_q = np.clip(np.rint(rows.reshape(c_out, -1) / s_w[:, None]), -127, 127)

    k = np.ones(c_out)
    bias = np.zeros(c_out) if anchor.bias is None else f64(anchor.bias.detach().numpy())
    if norm is not None:
        gamma = np.ones(c_out) if norm.weight is None else f64(norm.weight.detach().numpy())
        beta = np.zeros(c_out) if norm.bias is None else f64(norm.bias.detach().numpy())
        k = gamma / np.sqrt(f64(norm.running_var.numpy()) + norm.eps)
        bias = beta + (bias - f64(norm.running_mean.numpy())) * k
    scale_in = f64(s_x.numpy().reshape(-1))
    scale_in = np.repeat(scale_in, c_out // len(scale_in)) if len(scale_in) > 1 else np.full(c_out, scale_in[0])

    plain = f32(np.abs(k) * f64(s_w))
    s = np.maximum(plain, TINY)
    dead = np.abs(bias) > scale_in * f64(s) * 2**30
    s = np.where(dead, f32(np.abs(bias) / (scale_in * 2**30)), s)
    again = f32(np.sign(k)[:, None] * w_q) * f32(np.abs(k) * f64(s_w) / f64(s))[:, None]
    w_q = np.where((s == plain)[:, None], np.sign(k)[:, None] * w_q, np.clip(np.rint(again), -127, 127))
    b_q = np.clip(np.rint(bias / (scale_in * f64(s))), -(2**30), 2**30)

    w_int = w_q.reshape(rows.shape)
    if transposed:
        per_group = w.shape[1]
        w_int = w_int.reshape(groups, per_group, w.shape[0] // groups, *w.shape[2:]).swapaxes(1, 2).reshape(w.shape)
    acc = integer_sum(anchor, x_q, torch.from_numpy(np.ascontiguousarray(w_int, dtype=f64))).numpy()
    axis = acc.ndim - 1 if isinstance(anchor, nn.Linear) else acc.ndim - 1 - (w.ndim - 2)
    shape = [1] * acc.ndim
    shape[axis] = -1
    acc = acc + b_q.reshape(shape)
    assert np.abs(acc).max(initial=0) < 2**31

    over = np.ones(1) if s_y is None else f64(s_y.numpy().reshape(-1))
    along = over.reshape(shape) if len(over) > 1 else over
    y = acc.astype(np.int64).astype(f32) * f32(scale_in * f64(s) / over).reshape(shape)
    if residual is not None:
        r_q, s_r = residual
        y = fma(r_q.numpy().astype(f32), f32(f64(s_r.numpy()) / along), y)
    if activation is not None:
        y = np.maximum(y, f32(0))
    if activation == "relu6":
        y = np.minimum(y, f32(6 / along))
    if s_y is None:
        return y
    lo, hi = RANGE[dtype]
    return np.clip(np.rint(y), lo, hi).astype(np.int64)


def integer_sum(anchor: Any, x_q: Tensor, w: Tensor) -> Tensor:
    """The anchor's sum of integers, exact in float64."""
    x = x_q.double()
    if isinstance(anchor, nn.Linear):
        return F.linear(x, w)
    dims = w.dim() - 2
    if "Transpose" in type(anchor).__name__:
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return conv(
            x, w, None, anchor.stride, anchor.padding, anchor.output_padding, anchor.groups, anchor.dilation
        ).round()
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    padding = anchor.padding
    if anchor.padding_mode != "zeros":
        x, padding = F.pad(x, anchor._reversed_padding_repeated_twice, mode=anchor.padding_mode), 0
    return conv(x, w, None, anchor.stride, padding, anchor.dilation, anchor.groups).round()
