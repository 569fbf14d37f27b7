"""Straight-through quantization for training.

Forward rounds; backward passes the gradient on where nothing was clipped (Bengio et al. 2013, "Estimating or Propagating
Gradients Through Stochastic Neurons for Conditional Computation", https://arxiv.org/abs/1308.3432). The integers stay
integers, in a floating-point tensor: a consumer multiplies by the scale after its convolution, so the gradient of the
integers is the value's times the scale.

A learned scale (Esser et al. 2020, "Learned Step Size Quantization", https://arxiv.org/abs/1902.08153) gets all of its
gradient where the rounding is: with ``z = x / s`` and the value ``v = q * s`` it is the sum of ``dL/dv * (q - z)``, or of
``dL/dv * q`` where ``q`` was clipped. Consumers take scales as constants. (Left to the chain rule the two terms would come
from different places, each some hundred times larger than their difference, which a convolution in bfloat16 has no digits
for.)

What backward needs is kept small: a byte per element of an activation, and of a weight nothing that is not there anyway.
Only the learned scale of an activation needs the unrounded values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WEIGHT_UNIT = 2.0**-15
"""Integer weights are carried times this in training, so that sums of 8-bit products stay inside float16's range; a power
of two changes no result otherwise."""
LEAST_POSITIVE = torch.finfo(torch.float32).tiny


class RoundActivation(torch.autograd.Function):
    """``q = clamp(round(min(max(x, 0), bound) / s), lo, hi)``, the maximum and the minimum where asked for.

    Args:
        x: float32, any shape.
        s: float32 scale in a shape that broadcasts against `x`; learned if it requires a gradient.
        lo, hi: the range of the integers; with `relu`, `lo` is 0.
        relu: there is a ReLU: no gradient passes where ``x <= 0``.
        bound: where ReLU6 ends, or None.
        dtype: floating point, the result's.
        overwrite: compute in `x`'s memory; only with float32, and a scale that is not learned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        lo: int,
        hi: int,
        relu: bool,
        bound: float | None,
        dtype: torch.dtype,
        overwrite: bool,
    ) -> Tensor:
        ctx.learned, ctx.limits = ctx.needs_input_grad[1], (lo, hi, relu, bound)
        if overwrite:
            ctx.mark_dirty(x)
            x.div_(s)
            ctx.save_for_backward(_passes(x, s, *ctx.limits), s)
            _round(x, s, lo, hi, bound)
            return x
        z = x / s
        ctx.save_for_backward(z if ctx.learned else _passes(z, s, *ctx.limits), s)
        return _round(z.clone() if ctx.learned else z, s, lo, hi, bound).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved, s = ctx.saved_tensors
        if not ctx.learned:
            return saved.float().mul_(grad).div_(s), *[None] * 7
        grad = grad.float() / s
        lo, hi, relu, bound = ctx.limits
        q = _round(saved.clone(), s, lo, hi, bound)
        z = saved.clamp(min=0) if relu else saved
        z = z if bound is None else torch.minimum(z, bound / s)
        error = q - z * ((z > lo - 0.5) & (z < hi + 0.5))
        return grad * _passes(saved, s, *ctx.limits), (grad * error).sum_to_size(s.shape), *[None] * 6


def _passes(z: Tensor, s: Tensor, lo: int, hi: int, relu: bool, bound: float | None) -> Tensor:
    """int8: 1 where the gradient of ``z = x / s`` passes, else 0.

    On a CPU, comparing into a float tensor and multiplying by int8 is several times faster than either with booleans.
    """
    low = LEAST_POSITIVE if relu else lo - 0.5
    if bound is None:
        kept = z.clamp(low, hi + 0.5)
    else:
        top = torch.clamp(bound / s, max=hi + 0.5)
        kept = z.clamp(torch.full_like(top, low), top)
    return kept.eq_(z).to(torch.int8)


def _round(z: Tensor, s: Tensor, lo: int, hi: int, bound: float | None) -> Tensor:
    """The integers of ``z = x / s``, in its memory."""
    z.round_()
    if bound is None:
        return z.clamp_(lo, hi)
    top = torch.clamp((bound / s).round_(), max=hi)
    return z.clamp_(torch.full_like(top, lo), top)


class RoundWeight(torch.autograd.Function):
    """``clamp(round(w / s), -127, 127) * WEIGHT_UNIT``.

    Args:
        w: the weight.
        s: float32 scale in a shape that broadcasts; learned if it requires a gradient.
        clips: whether any weight may exceed ``127 * s``.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, clips: bool) -> Tensor:
        ctx.save_for_backward(s, w if clips else None)
        q = (w / s).round_()
        return (q.clamp_(-127, 127) if clips else q).mul_(WEIGHT_UNIT)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        s, w = ctx.saved_tensors
        grad = grad * (WEIGHT_UNIT / s)
        if w is None:
            return grad, None, None
        z = w / s
        inside = z.abs() < 127.5
        grad_s = None
        if ctx.needs_input_grad[1]:
            grad_s = (grad * (z.round().clamp_(-127, 127) - z * inside)).sum_to_size(s.shape)
        return grad * inside, grad_s, None


class Affine(torch.autograd.Function):
    """``acc * m + b`` in float32, in the memory of `acc` if it is float32.

    Args:
        acc: a fresh accumulator, floating point.
        m, b: float32, in shapes that broadcast; `m` is a constant.
    """

    @staticmethod
    def forward(ctx: Any, acc: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(m)
        ctx.dtype, ctx.bias = acc.dtype, None if b is None else b.shape
        if acc.dtype == torch.float32:
            ctx.mark_dirty(acc)
            acc.mul_(m)
        else:
            acc = acc * m
        if b is not None:
            acc.add_(b)
        return acc

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (m,) = ctx.saved_tensors
        grad_b = grad.sum_to_size(ctx.bias) if ctx.needs_input_grad[2] else None
        return (grad * m).to(ctx.dtype), None, grad_b
