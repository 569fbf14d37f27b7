"""Weights and biases as integers: their scales, the BatchNorm algebra on them, and what an accumulator can reach.

A weight's output channels are its dim 0 for Conv and Linear (``[C_out, C_in / groups, *kernel]``) and its dim 1, per
group, for ConvTranspose (``[C_in, C_out / groups, *kernel]``). So the functions here take ``axis``, 0 or 1, and
``groups``; channel vectors always have ``C_out`` values, in the order of the output's channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import divide_and_round, integer_range, per_output, require_float32, round_and_clamp

WEIGHT_MAX = 127
BIAS_MAX = 2**30
# The least scale, the smallest normal float32: a channel of zeros has a scale to divide by.
TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def weight_scale(w: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """``max|w[c]| / 127`` per output channel in float64, rounded once to float32, and at least 2^-126.

    Returns:
        float32, ``[C_out]``, all positive and finite.

    Raises:
        ValueError: `w` is not finite, which names the channels.
    """
    peak = output_channels_first(w, axis, groups).flatten(1).abs().amax(1).to(torch.float64)
    _require_finite(peak, "weight")
    return (peak / torch.full_like(peak, WEIGHT_MAX)).to(torch.float32).clamp_(min=TINY)


def quantize_weight(w: Tensor, scale: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """``clamp(round_half_even(float32(w) / scale[c]), -127, 127)``, int8, of `w`'s shape.

    Raises:
        ValueError: NaN in `w`, a scale that is not positive and finite, or a wrong number of scales.
    """
    require_float32(scale, "the weight's scale")
    shaped = _per_weight(scale.to(w.device), w, axis, groups)
    return divide_and_round(w, shaped, -WEIGHT_MAX, WEIGHT_MAX, torch.int8, check=True)


def weight_qparams(
    w: Tensor, k: Tensor | None, bias: Tensor | None, s_x: Tensor, axis: int = 0, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of an anchor with its BatchNorm: `weight_scale`, `quantize_weight`, `absorb` in a row.

    Args and results as in `absorb`, with the float weight instead of its integers.
    """
    s_w = weight_scale(w, axis, groups)
    return absorb(quantize_weight(w, s_w, axis, groups), s_w, k, bias, s_x, axis, groups)


@torch.no_grad()
def absorb(
    w_q: Tensor,
    s_w: Tensor,
    k: Tensor | None,
    bias: Tensor | None,
    s_x: Tensor,
    axis: int = 0,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale a quantized weight's output channels by `k` and quantize the bias; no weight is divided by anything.

    With one symmetric scale per channel, ``quantize(w * k)`` is ``sign(k) * quantize(w)`` with scale ``|k| * s_w``::

        s     = float32(|k| * s_w)                              at least 2^-126
        s     = float32(|bias| / (s_x * 2^30))                  where |bias| > s_x * s * 2^30
        w'    = sign(k) * w_q                                   where s is float32(|k| * s_w), else
        w'    = round(float32(sign(k) * w_q) * float32(|k| * s_w / s))
        b_q   = clamp(round_half_even(bias / (s_x * s)), -2^30, 2^30)

    all in float64 but where float32 is written. The second line is the nearly dead channel, whose scale is too small to
    write its bias with: the bias gets the scale that it needs, and the weights, which then hardly count, are quantized
    again with it; for k = 0 to zeros, so that the channel is its bias and nothing else. A channel whose weights are
    all zero arrives with the least scale and goes the same way.

    Args:
        w_q: int8 weight; layout as `axis` and `groups` say.
        s_w: float32, ``[C_out]``, its scales.
        k: ``[C_out]``, BatchNorm's ``gamma / sqrt(var + eps)``, better in float64; None for 1.
        bias: ``[C_out]``, what is added after the scaling, ``beta + (b - mean) * k``, better in float64; None for 0.
        s_x: float32, the input's scale: one value, or one per input channel if the convolution is depthwise
            (``groups == C_in``, with any channel multiplier). The bias then has the scale ``s_x[c_in] * s[c]``, and
            the multiplier ``m[c]`` takes ``s_x[c_in]`` too (`group_multipliers`).
        axis, groups: see the module.

    Returns:
        ``(w', s, b_q)``: int8 of `w_q`'s shape, float32 ``[C_out]``, int32 ``[C_out]``.

    Raises:
        ValueError: `k`, `bias` or a scale is not finite; input scales per channel, but no depthwise convolution.
    """
    channels = w_q.shape[axis] * (groups if axis else 1)
    scale_in = _input_scale(s_x.to(w_q.device), w_q, channels, axis, groups).to(torch.float64)
    zeros = torch.zeros(channels, dtype=torch.float64, device=w_q.device)
    k = zeros + 1 if k is None else k.detach().to(zeros)
    bias = zeros if bias is None else bias.detach().to(zeros)
    _require_finite(k, "BatchNorm factor")
    _require_finite(bias, "bias")

    wanted = k.abs() * s_w.to(zeros)
    exact = wanted.to(torch.float32)
    s = exact.clamp(min=TINY)
    reach = scale_in * BIAS_MAX
    needed = (bias.abs() / reach).to(torch.float32)
    s = torch.where(bias.abs() > reach * s.to(torch.float64), needed, s)
    _require_finite(s, "scale of the weight")

    ratio = torch.where(s == exact, 1.0, (wanted / s.to(torch.float64)).to(torch.float32))
    factor = _per_weight(k.sign().to(torch.float32) * ratio, w_q, axis, groups)
    weight = round_and_clamp(w_q.to(torch.float32) * factor, -WEIGHT_MAX, WEIGHT_MAX, torch.int8)
    integers = (bias / (scale_in * s.to(torch.float64))).round_().clamp_(-BIAS_MAX, BIAS_MAX)
    return weight, s, integers.to(torch.int32)


def accumulator_bound(w_q: Tensor, bias_q: Tensor | None, x_dtype: torch.dtype, axis: int = 0, groups: int = 1) -> int:
    """``max over c of max|x_q| * sum|w_q[c]| + |bias_q[c]|``: what the accumulator can reach with inputs of `x_dtype`.

    A group where this exceeds 2^31 - 1 has no int32 accumulator and must be refused.
    """
    size = output_channels_first(w_q, axis, groups).flatten(1).to(torch.int16).abs().sum(1, dtype=torch.int64)
    bound = size * largest_input(x_dtype)
    if bias_q is not None:
        bound = bound + bias_q.to(bound).abs()
    return int(bound.max())


# Shared by the modules of this package.


def largest_input(dtype: torch.dtype) -> int:
    """The largest magnitude of an activation of `dtype`: 128 or 255."""
    return max(map(abs, integer_range(dtype)))


def output_channels_first(w: Tensor, axis: int, groups: int) -> Tensor:
    """`w` as ``[C_out, C_in / groups, *kernel]``, whichever layout it has; a view if possible."""
    if axis == 0:
        return w
    return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _per_weight(values: Tensor, w: Tensor, axis: int, groups: int) -> Tensor:
    """A vector over the output channels, in the shape that broadcasts against `w`."""
    channels = w.shape[axis] * (groups if axis else 1)
    if values.shape != (channels,):
        raise ValueError(
            f"weight {tuple(w.shape)} has {channels} output channels, but there are {values.numel()} scales"
        )
    if axis == 1:
        values = values.view(groups, 1, -1).expand(groups, w.shape[0] // groups, -1).flatten(0, 1)
    return values.view(*values.shape, *[1] * (w.dim() - values.dim()))


def _input_scale(s_x: Tensor, w: Tensor, channels: int, axis: int, groups: int) -> Tensor:
    inputs = w.shape[0] if axis else w.shape[1] * groups
    if s_x.numel() > 1 and not (s_x.numel() == inputs == groups):
        raise ValueError(
            f"{s_x.numel()} input scales, but only a depthwise convolution takes one per channel; "
            f"this one has {inputs} input channels in {groups} groups"
        )
    return per_output(s_x, channels)


def _require_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the {what} is not finite in output channels {bad[:8]}{', ...' if len(bad) > 8 else ''}")
