"""Absorbing a batch norm into the linear operator before it.

In evaluation a batch norm is an affine map per channel c,

    y[c] = k[c] · x[c] + (beta[c] - mean[c] · k[c]),      k[c] = gamma[c] / sqrt(var[c] + eps)

and a convolution, a transposed convolution or a linear layer followed by it is the same operator with

    weight'[c] = k[c] · weight[c]
    bias'[c]   = k[c] · (bias[c] - mean[c]) + beta[c]

(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3.2.)
Nothing divides by gamma, so gamma = 0 and gamma < 0 are ordinary values. Everything is computed in float64 and rounded once to
the anchor's dtype. The output channels are dim 0 of a weight, except in a transposed convolution, whose weight is
[in_channels, out_channels / groups, *kernel]: there they are dim 1, a group after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.fusion.patterns import Anchor


def bn_factor_and_shift(norm: Mapping[str, Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """The affine map of a batch norm: ``(k, shift)`` with ``y = k * x + shift``, float64, shape [channels].

    Args:
        norm: ``running_mean`` and ``running_var`` and, where affine, ``weight`` and ``bias``; each of shape [channels].
        eps: the constant added to the variance.
    """
    mean, var = norm["running_mean"], norm["running_var"]
    assert mean is not None and var is not None
    k = (var.double() + eps).rsqrt()
    gamma, beta = norm.get("weight"), norm.get("bias")
    if gamma is not None:
        k = k * gamma.double()
    shift = -mean.double() * k
    if beta is not None:
        shift = shift + beta.double()
    return k, shift


def scale_output_channels(weight: Tensor, k: Tensor, anchor: Anchor, groups: int) -> Tensor:
    """``weight'[c] = k[c] * weight[c]`` along the anchor's output channels; keeps `weight`'s shape."""
    if not anchor.transposed:
        return weight * k.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * k.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def fold(
    anchor: Anchor, groups: int, weight: Tensor, bias: Tensor | None, norm: Mapping[str, Tensor | None], eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the operator that equals anchor + batch norm, in float64; the formula is the module's."""
    k, shift = bn_factor_and_shift(norm, eps)
    folded = scale_output_channels(weight.double(), k, anchor, groups)
    return folded, shift if bias is None else bias.double() * k + shift


def absorbed_values_reason(anchor: Anchor, module: nn.Module, norm: nn.Module) -> str | None:
    """Why the absorbed values would be no use: finite ones that are too large for a narrow dtype."""
    weight: Any = module.weight
    bias: Any = module.bias
    if weight.dtype in (torch.float32, torch.float64, torch.bfloat16) or weight.is_meta:
        return None  # as wide as the result of the norm itself
    values = (weight, *(b for b in [bias] if b is not None))
    absorbed = fold(anchor, anchor.groups(module), weight.detach(), bias, norm_tensors(norm), norm.eps)  # type: ignore[arg-type]
    if all(bool(v.isfinite().all()) for v in values) and not all(
        bool(v.to(weight.dtype).isfinite().all()) for v in absorbed
    ):
        return f"absorbing it makes weights that overflow {weight.dtype}; fuse the model in float32 first"
    return None


def norm_tensors(norm: nn.Module) -> dict[str, Tensor | None]:
    return {name: getattr(norm, name, None) for name in ("weight", "bias", "running_mean", "running_var")}


@torch.no_grad()
def absorb_into(
    anchor: Anchor,
    module: nn.Module,
    norm: Mapping[str, Tensor | None],
    eps: float,
    *,
    raw: tuple[Tensor, Tensor | None] | None = None,
    in_place: bool = False,
) -> None:
    """Give `module` the weight and bias of `module` followed by the batch norm; a missing bias is created.

    New parameters are made (a weight tied to another module's must not change that one) with the old ones' ``requires_grad``.

    Args:
        raw: weight and bias before the norm, by default the module's.
        in_place: write into the parameters that are there, e.g. because an optimizer holds them.
    """
    old: Any = module.weight
    old_bias: Any = module.bias
    raw = raw or (old, old_bias)
    weight, bias = fold(anchor, anchor.groups(module), *raw, norm, eps)
    if in_place:
        old.copy_(weight)
        old_bias.copy_(bias)
        return
    weight, bias = weight.to(old.dtype), bias.to(old.dtype)
    beta = norm.get("bias")
    trains = (
        old_bias.requires_grad
        if old_bias is not None
        else bool(beta is not None and beta.requires_grad) or old.requires_grad
    )
    module.weight = nn.Parameter(weight.contiguous(memory_format=_memory_format(old)), requires_grad=old.requires_grad)
    module.bias = nn.Parameter(bias, requires_grad=trains)


def _memory_format(weight: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(weight.dim())
    if last is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
