"""Straight-through quantization for training.

Forward rounds, backward passes the gradient on where nothing was clipped (Bengio et al. 2013, "Estimating or Propagating Gradients
Through Stochastic Neurons for Conditional Computation"). The integers stay integers in a floating-point tensor: a consumer
multiplies by the scale after its convolution, so the gradient of the integers is the value's times the scale.

What backward needs is kept small: one byte per element for activations, nothing per element for weights. A learned scale (Esser
et al. 2020, "Learned Step Size Quantization", https://arxiv.org/abs/1902.08153) needs the unrounded values as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WEIGHT_UNIT = 2.0**-15
"""Integer weights are carried times this in training, so that sums of 8-bit products stay inside float16's range; a power of two
changes no result otherwise."""


class RoundActivation(torch.autograd.Function):
    """``q = clamp(round(min(max(x, 0), bound) / s), lo, hi)``, the maximum and minimum only where asked for.

    Args:
        x: float32; overwritten if `inplace`.
        s: float32 scale in a shape that broadcasts.
        low, high: where the gradient stops, in steps: ``0`` or ``lo - 1/2``, and ``hi + 1/2``.
        bound: ReLU6's bound, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, low: float, lo: int, hi: int, bound: float | None, inplace: bool
    ) -> Tensor:
        z = x.div_(s) if inplace else x / s
        if inplace:
            ctx.mark_dirty(x)
        if bound is None:
            mask = (z > low) & (z < hi + 0.5)
        else:
            top = bound / s
            mask = (z > low) & (z < torch.clamp(top, max=hi + 0.5))
        ctx.learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(mask, s, z.clone() if ctx.learned else None)
        if bound is not None:
            torch.minimum(z, top, out=z)
        return z.round_().clamp_(lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        mask, s, z = ctx.saved_tensors
        kept = grad * mask
        grad_s = None
        if ctx.learned:
            grad_s = -(kept * z / s)
            grad_s = grad_s.sum_to_size(s.shape)
        return kept / s, grad_s, None, None, None, None, None


class RoundWeight(torch.autograd.Function):
    """``clamp(round(w / s), -127, 127) * WEIGHT_UNIT``. With ``s = max|w| / 127`` nothing is clipped, so backward needs no mask."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor) -> Tensor:
        z = w / s
        ctx.learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(s, z.clone() if ctx.learned else None)
        return z.round_().clamp_(-127, 127).mul_(WEIGHT_UNIT)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        s, z = ctx.saved_tensors
        grad = grad * WEIGHT_UNIT
        if not ctx.learned:
            return grad / s, None
        inside = z.abs() <= 127.5
        return grad * inside / s, -(grad * inside * z / s).sum_to_size(s.shape)


class Affine(torch.autograd.Function):
    """``acc * m + b``, in place on a fresh accumulator; `m` and `b` per channel, in shapes that broadcast."""

    @staticmethod
    def forward(ctx: Any, acc: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
        ctx.learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(m, acc if ctx.learned else None)
        ctx.bias = None if b is None else b.shape
        if ctx.learned or acc.dtype != torch.float32:
            y = acc.float() * m
        else:
            ctx.mark_dirty(acc)
            y = acc.mul_(m)
        ctx.dtype = acc.dtype
        return y if b is None else y.add_(b)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        m, acc = ctx.saved_tensors
        grad_m = (grad * acc).sum_to_size(m.shape) if ctx.learned else None
        grad_b = grad.sum_to_size(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
        return (grad * m).to(ctx.dtype), grad_m, grad_b
