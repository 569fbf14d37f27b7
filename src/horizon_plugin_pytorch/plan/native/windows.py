"""Pools, up-sampling and padding that copies: operations on windows or places of three spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.backends.reference import pooling
from horizon_plugin_pytorch.backends.reference.shapes import as_tuple
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.native.layout import View, fresh
from horizon_plugin_pytorch.plan.native.program import Builder
from horizon_plugin_pytorch.plan.program import Ref, Step

if TYPE_CHECKING:
    from horizon_plugin_pytorch.plan.native.lowering import Lowering

Edges = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Where the windows along one dimension begin and end, within the input."""


def _three(values: Sequence[int], filler: int) -> list[int]:
    return [filler] * (3 - len(values)) + list(values)


def _places(params: Any, x: View, y: View, axis: int) -> None:
    """Images, strides and output sizes; all dimensions before the channels' are images of one stride."""
    params.images = x.shape[0] if axis else 1
    params.in_image, params.out_image = (x.strides[0], y.strides[0]) if axis else (0, 0)
    params.in_stride[:] = _three(x.strides[axis + 1 :], 0)
    params.out_stride[:] = _three(y.strides[axis + 1 :], 0)
    params.out_size[:] = _three(y.shape[axis + 1 :], 1)


def emit_pool(
    builder: Builder, kind: str, x: View, y: View, axis: int, edges: Sequence[Edges], m: Tensor | None
) -> None:
    """``max_pool`` or ``avg_pool`` over windows of the dimensions behind `axis`; `m`: float32, one per place."""
    params = library.Pool(channels=x.shape[axis])
    _places(params, x, y, axis)
    whole = (np.zeros(1, np.int32), np.ones(1, np.int32))
    three = [whole] * (3 - len(edges)) + list(edges)
    params.start[:] = [builder.array(start, np.int32) for start, _ in three]
    params.stop[:] = [builder.array(stop, np.int32) for _, stop in three]
    if m is not None:
        params.m = builder.array(m.reshape(-1).contiguous())
    builder.add(kind, params, [(params.in_, x), (params.out, y)])


def emit_gather(builder: Builder, x: View, y: View, axis: int, sources: Sequence[NDArray[np.int32]]) -> None:
    """``y[..., i, j] = x[..., sources[0][i], sources[1][j]]`` for the dimensions behind `axis`."""
    params = library.Upsample(bytes=x.shape[axis] * x.item)
    _places(params, x, y, axis)
    three = [np.zeros(1, np.int32)] * (3 - len(sources)) + list(sources)
    params.from_[:] = [builder.array(source, np.int32) for source in three]
    builder.add("upsample", params, [(params.in_, x), (params.out, y)])


def emit_linear(
    builder: Builder, x: View, y: View, targets: Sequence[tuple[int, float | None]], align_corners: bool
) -> None:
    """`reference.upsample_linear`; `targets` as of `reference.layout.upsampled`."""
    bits = reference.layout.LINEAR_BITS[len(targets)]
    params = library.Interpolate(channels=x.shape[1], m=0.5 ** (bits * len(targets)))
    _places(params, x, y, 1)
    places, weights = [np.zeros((1, 2), np.int32)], [np.array([[1, 0]], np.int32)]  # of one row
    for length, (out, factor) in zip(x.shape[2:], targets, strict=True):
        low, high, w = reference.layout.linear_sources(length, out, factor, align_corners, bits)
        places.append(torch.stack((low, high), 1).numpy())
        weights.append(torch.stack((2**bits - w, w), 1).numpy())
    params.place[:] = [builder.array(place, np.int32) for place in places[-2:]]
    params.weight[:] = [builder.array(weight, np.int32) for weight in weights[-2:]]
    builder.add("interpolate", params, [(params.in_, x), (params.out, y)])


# -- padding that copies ----------------------------------------------------------------------------------------------------------


def padded_size(geometry: Geometry, size: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial size that a group's walk sees: with padding where that is not zeros, which are in memory."""
    if geometry.padding_mode == "zeros":
        return size
    sides = _sides(geometry)
    return tuple(n + before + after for n, (before, after) in zip(size, sides, strict=True))


def _sides(geometry: Geometry) -> list[tuple[int, int]]:
    """Padding before and after each spatial dimension, for modes other than zeros."""
    if geometry.padding == "valid":
        return [(0, 0)] * geometry.dims
    if isinstance(geometry.padding, str):  # same
        totals = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in geometry.padding]


def pad(builder: Builder, x: View, geometry: Geometry) -> View:
    """A copy of `x` with its padding, by a mode that copies: reflect, replicate or circular."""
    axis = len(x.shape) - 1 - geometry.dims
    sides = _sides(geometry)
    shape = (*x.shape[: axis + 1], *padded_size(geometry, x.shape[axis + 1 :]))
    y = fresh(shape, x.dtype, axis, None, x.scale)
    index = [torch.arange(n, dtype=torch.float64).view(1, 1, -1) for n in x.shape[axis + 1 :]]
    sources = [F.pad(i, side, geometry.padding_mode).reshape(-1).numpy() for i, side in zip(index, sides, strict=True)]
    emit_gather(builder, x, y, axis, sources)
    return y


# -- functions and operators --------------------------------------------------------------------------------------------------------


def max_pool(lowering: Lowering, i: int, ref: Ref, dims: int, call: dict[str, Any]) -> View | None:
    """`torch.nn.functional.max_pool2d` and the like; those with dilation or indices are left to PyTorch."""
    shape = lowering.metas[ref.value].shape
    if any(d != 1 for d in as_tuple(call.get("dilation", 1), dims)) or call.get("return_indices"):
        return None
    kernel = as_tuple(call["kernel_size"], dims)
    steps = as_tuple(call.get("stride") or kernel, dims)
    pads = as_tuple(call.get("padding", 0), dims)
    ceil_mode = call.get("ceil_mode", False)
    found = [pooling.windows(*one, ceil_mode) for one in zip(shape[-dims:], kernel, steps, pads, strict=True)]
    return _pool(lowering, i, ref, dims, "max_pool", [(w.start.numpy(), w.stop.numpy()) for w in found], None)


def adaptive_max_pool(lowering: Lowering, i: int, ref: Ref, dims: int, size: Any) -> View | None:
    shape = lowering.metas[ref.value].shape
    found = pooling.adaptive_windows(shape[-dims:], size)
    return _pool(lowering, i, ref, dims, "max_pool", [(w.start.numpy(), w.stop.numpy()) for w in found], None)


def average(lowering: Lowering, i: int, step: Step, name: str, options: dict[str, Any]) -> View | None:
    """`AvgPool`, `AdaptiveAvgPool`, and a `Mean` over all spatial dimensions."""
    ref = step.args[0]
    meta = lowering.metas[ref.value]
    if not isinstance(ref, Ref) or meta.scale.dim() or lowering.metas[lowering.value(i)].scale.dim():
        return None
    if name == "Mean":
        over = sorted(d % meta.dim() for d in options["dim"])
        dims = len(over)
        if dims > 3 or meta.dim() < 3 or over != list(range(meta.dim() - dims, meta.dim())) or dims + 2 != meta.dim():
            return None
        found = [
            pooling.Windows(torch.zeros(1, dtype=torch.int64), *(torch.tensor([n]),) * 2) for n in meta.shape[-dims:]
        ]
        n = pooling.places([w.padded for w in found])
    elif name == "AdaptiveAvgPool":
        dims = options["dims"]
        found = pooling.adaptive_windows(meta.shape[-dims:], options["output_size"])
        n = pooling.places([w.padded for w in found])
    else:
        dims = options["dims"]
        kernel = as_tuple(options["kernel_size"], dims)
        steps = kernel if options["stride"] is None else as_tuple(options["stride"], dims)
        pads = as_tuple(options["padding"], dims)
        found = [
            pooling.windows(*one, options["ceil_mode"])
            for one in zip(meta.shape[-dims:], kernel, steps, pads, strict=True)
        ]
        n = pooling.divisors(found, options["count_include_pad"], options["divisor_override"])
    scale = lowering.constants[step.params["scale"].name]
    m = pooling.ratio(meta.scale, n, scale)
    sizes = [len(w.start) for w in found]
    m = m.expand(sizes) if m.dim() <= 1 else m.reshape(sizes)
    largest = np.prod([int((w.stop - w.start).max()) for w in found]) * 255
    if largest >= 2**31:
        return None
    return _pool(lowering, i, ref, dims, "avg_pool", [(w.start.numpy(), w.stop.numpy()) for w in found], m)


def upsample(lowering: Lowering, i: int, ref: Ref, call: dict[str, Any]) -> View | None:
    """`torch.nn.functional.interpolate` of integers."""
    shape = lowering.metas[ref.value].shape
    if len(shape) < 3 or len(shape) > 5:
        return None
    targets = reference.layout.upsampled(shape[2:], call.get("size"), call.get("scale_factor"))
    x = lowering.operand(ref, 1)
    if x is None or x.dtype == "float32":
        return None
    y = lowering.new(lowering.value(i), 1)
    mode = call.get("mode", "nearest")
    if "linear" in mode:
        emit_linear(lowering.builder, x, y, targets, bool(call.get("align_corners")))
        return y
    exact = mode == "nearest-exact"
    sources = [
        reference.layout.nearest_sources(len(targets), length, out, factor, exact).numpy()
        for length, (out, factor) in zip(shape[2:], targets, strict=True)
    ]
    emit_gather(lowering.builder, x, y, 1, sources)
    return y


def _pool(
    lowering: Lowering, i: int, ref: Ref, dims: int, kind: str, edges: list[Edges], m: Tensor | None
) -> View | None:
    axis = lowering.metas[ref.value].dim() - 1 - dims
    if axis not in (0, 1):
        return None
    x = lowering.operand(ref, axis)
    if x is None or x.dtype == "float32":
        return None
    shape = (*x.shape[: axis + 1], *(len(start) for start, _ in edges))
    result = tuple(lowering.metas[lowering.value(i)].shape)
    y = lowering.new(lowering.value(i), axis if len(result) == len(shape) else None)
    # a mean without its dimensions kept: they have size 1
    images = y if len(result) == len(shape) else y.reshaped(shape, (*y.strides, *(0,) * dims))
    if not images.channels_last(axis):
        return None
    emit_pool(lowering.builder, kind, x, images, axis, edges, m)
    return y
