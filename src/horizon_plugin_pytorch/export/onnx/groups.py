"""Fused groups as a convolution or matrix product on dequantized values, an add, an activation and one quantization.

    x ─ DequantizeLinear ┐
    weight ─ Dequant… ───┼─ Conv ─ [Add] ─ [Relu | Clip] ─ QuantizeLinear
    bias ─ Dequant… ─────┘            │
    residual ─ DequantizeLinear ──────┘

There is no pair of QuantizeLinear and DequantizeLinear between convolution and add: the sum is not rounded to 8 bits before it, and a
runtime that fuses keeps it as wide as the plan does.

Weights have one scale per output channel. In ONNX's Conv and Gemm that is axis 0 of the weight, in MatMul axis 1. ConvTranspose's
weight is ``[C_in, C_out / groups, ...]``: without groups the axis is 1. With groups no axis of it is the output channel; where each
group has one output channel (depthwise) all weights of an input channel have one scale, and the axis is 0. Otherwise the weight is
stored as ``[C_out, C_in / groups, ...]``, dequantized along axis 0, and brought into ConvTranspose's order by Reshape and Transpose of
constants, which runtimes fold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from horizon_plugin_pytorch.export.onnx import padding
from horizon_plugin_pytorch.export.onnx.graph import Array, Graph
from horizon_plugin_pytorch.export.onnx.lowering import Dim, Lowering
from horizon_plugin_pytorch.export.onnx.scales import FLOAT32, Units, weight_scales
from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize, Sizes
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan import Step

SIX = 6.0


@dataclass(frozen=True)
class Group:
    """A group's step, with its constants as arrays.

    Attributes:
        scales: of the weight, float32 ``[C_out]``, for activations in units of the one scale.
        m, residual_ratio, bound: the plan's; float32, one value or one per output channel.
        x, y, r: units of the input, the output (None: float32) and the residual (None: there is none).
    """

    path: str
    geometry: Geometry
    weight: Array
    bias: Array
    scales: Array
    m: Array
    residual_ratio: Array | None
    bound: Array
    activation: str | None
    x: Units
    y: Units | None
    r: Units | None

    @property
    def behind(self) -> int:
        """Dimensions behind the channels."""
        return self.geometry.dims


def read(low: Lowering, step: Step) -> Group:
    params = step.params
    arrays = {
        n: low.constant(params[n].name) for n in ("weight", "bias", "m", "bound", "residual_ratio") if n in params
    }
    x, *others = (_units(low, ref.value) for ref in step.args)
    y = low.units(params["scale"], params["dtype"]) if "scale" in params else None
    geometry = Geometry(**params["geometry"])
    m = np.broadcast_to(arrays["m"].astype(FLOAT32), arrays["bias"].shape)
    used = _per_channel(np.abs(arrays["weight"].astype(np.int16)), geometry).any(1) | (arrays["bias"] != 0)
    scales = weight_scales(m, x.scale, None if y is None else y.scale, used)
    return Group(
        step.name, geometry, arrays["weight"], arrays["bias"], scales, m, arrays.get("residual_ratio"), arrays["bound"],
        params["activation"], x, y, others[0] if others else None,
    )  # fmt: skip


def _units(low: Lowering, value: int) -> Units:
    known = low.plan.values[value]
    assert known.scale is not None  # a plan is checked when it is made or loaded
    return low.units(known.scale, known.dtype)


def _per_channel(weight: Array, geometry: Geometry) -> Array:
    """``[C_out, weights of that channel]``."""
    if geometry.transposed:
        weight = _output_channels_first(weight, geometry.groups)
    return weight.reshape(len(weight), -1)


def _output_channels_first(weight: Array, groups: int) -> Array:
    """ConvTranspose's ``[C_in, C_out / groups, ...]`` as ``[C_out, C_in / groups, ...]``."""
    inputs, outputs, *kernel = weight.shape
    parts = weight.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(parts).reshape(groups * outputs, inputs // groups, *kernel)


# -- the group ----------------------------------------------------------------------------------------------------------------


def group(low: Lowering, step: Step) -> Any:
    """The group as float operators between DequantizeLinear and QuantizeLinear; in the form ``float`` without these."""
    g = read(low, step)
    x, *others = (low.argument(a) for a in step.args)
    sizes = low.sizes(step.args[0])
    y = anchor(low, g, low.scaled(x), sizes, step)
    if others:
        y = low.graph.op("Add", y, residual(low, g, others[0]), name=f"{g.path}.add")
    y = activate(low, g, y)
    return y if g.y is None else low.quantize(y, g.y, g.path)


def residual(low: Lowering, g: Group, other: Any) -> str:
    """The other operand of the add, in units of the output's one scale."""
    assert g.r is not None and g.residual_ratio is not None
    if low.form == "float" or g.y is None:
        return low.tensor(other)
    factor: Array = g.residual_ratio.astype(np.float64) * float(g.y.scale) / float(g.r.scale)
    r = low.scaled(other)
    if np.all(np.abs(factor - 1) < 1e-6):
        return r
    factor = factor.astype(FLOAT32).reshape(-1, *[1] * g.behind) if factor.ndim else factor.astype(FLOAT32)
    return low.graph.op("Mul", r, low.graph.initializer(f"{g.path}.residual_factor", factor))


def activate(low: Lowering, g: Group, y: str) -> str:
    """Relu; ReLU6 as Clip, or, where a channel's 6 is not 6 in units of the one scale, as Relu and Min with a vector.

    The Min is left out where the output's quantization cuts off below it in every channel.
    """
    graph = low.graph
    if g.activation is None:
        return y
    if g.activation == "relu":
        return graph.op("Relu", y, name=f"{g.path}.relu")
    scale = np.float64(1) if g.y is None else g.y.exact if low.form == "float" else np.float64(g.y.scale)
    bound = np.atleast_1d(np.float64(g.bound) * scale)
    bound = np.where(np.isclose(bound, SIX, rtol=1e-6, atol=0), SIX, bound).astype(FLOAT32)
    if np.all(bound == bound[0]):
        return graph.op("Clip", y, graph.scalar(0.0), graph.scalar(float(bound[0])), name=f"{g.path}.clip")
    y = graph.op("Relu", y, name=f"{g.path}.relu")
    if low.form != "float" and g.y is not None and (g.bound > g.y.range[1] - 0.5).all():
        return y
    vector = graph.initializer(f"{g.path}.bound", bound.reshape(-1, *[1] * g.behind))
    return graph.op("Min", y, vector, name=f"{g.path}.min")


# -- its anchor ---------------------------------------------------------------------------------------------------------------


def anchor(low: Lowering, g: Group, x: str, sizes: Sizes, step: Step) -> str:
    graph, geometry = low.graph, g.geometry
    if geometry.dims == 0:
        return _linear(low, g, x, len(sizes))
    batched = len(sizes) == geometry.dims + 2
    if not batched:
        x, sizes = graph.op("Unsqueeze", x, graph.constant([0])), (1, *sizes)
    x = pad_by_mode(graph, geometry, x)
    attributes = conv_attributes(geometry)
    if geometry.transposed:
        extra = output_padding(low, geometry, sizes, step)
        if low.form == "qdq":
            g = dense(g)
            behind = [a - b for a, b in zip(reach(g.geometry), reach(geometry), strict=True)]
            ends = [p + n for p, n in zip(attributes["pads"][geometry.dims :], behind, strict=True)]
            attributes = conv_attributes(g.geometry) | {"pads": [*attributes["pads"][: geometry.dims], *ends]}
        attributes["output_padding"] = extra if any(extra) else None
    inputs = [x, weight(low, g), *bias(low, g)]
    y = graph.op("ConvTranspose" if geometry.transposed else "Conv", *inputs, name=g.path, **attributes)
    return y if batched else graph.op("Squeeze", y, graph.constant([0]))


def reach(geometry: Geometry) -> list[int]:
    """How many elements a kernel spans along each dimension."""
    return [(k - 1) * d + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]


def dense(g: Group) -> Group:
    """A transposed convolution that reaches each place of its output, by zeros in its kernel: the same sums.

    OpenVINO (2026.4) computes wrong integers where a transposed convolution without groups leaves places out, which a stride does
    that is larger than the kernel, or comes with a dilation.
    """
    walk = g.geometry
    gaps = [s > 1 and (d > 1 or s > k) for k, s, d in zip(walk.kernel_size, walk.stride, walk.dilation, strict=True)]
    if walk.groups > 1 or not any(gaps):
        return g
    size = tuple(max(r, s) for r, s in zip(reach(walk), walk.stride, strict=True))
    weight = np.zeros((*g.weight.shape[:2], *size), np.int8)
    taps = [slice(0, r, d) for r, d in zip(reach(walk), walk.dilation, strict=True)]
    weight[tuple([slice(None)] * 2 + taps)] = g.weight
    return replace(g, weight=weight, geometry=replace(walk, kernel_size=size, dilation=(1,) * walk.dims))


def conv_attributes(geometry: Geometry) -> dict[str, Any]:
    return {
        "kernel_shape": list(geometry.kernel_size), "strides": list(geometry.stride), "dilations": list(geometry.dilation),
        "group": geometry.groups, "pads": pads(geometry),
    }  # fmt: skip


def pads(geometry: Geometry) -> list[int]:
    """Zeros around the input, ``[begin…, end…]``; none where another padding mode puts its own there."""
    if geometry.padding_mode != "zeros" or geometry.padding == "valid":
        return [0] * 2 * geometry.dims
    if isinstance(geometry.padding, str):  # same
        totals = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True)]
        return [t // 2 for t in totals] + [t - t // 2 for t in totals]
    return [int(p) for p in geometry.padding] * 2


def pad_by_mode(graph: Graph, geometry: Geometry, x: str) -> str:
    """Pad with what `padding_mode` says, if that is not zeros."""
    if geometry.padding_mode == "zeros":
        return x
    listed = geometry._pads()  # last dimension first, as torch.nn.functional.pad
    return padding.pad(graph, x, [0, 0, *listed[0::2][::-1]], [0, 0, *listed[1::2][::-1]], geometry.padding_mode)


def output_padding(low: Lowering, geometry: Geometry, sizes: Sizes, step: Step) -> list[int]:
    wanted = low.argument(step.params.get("output_size"))
    if wanted is None:
        return list(geometry.output_padding)
    wanted, inputs = list(wanted)[-geometry.dims :], sizes[-geometry.dims :]
    if any(isinstance(n, (Dim, str)) for n in wanted) or None in inputs:
        raise NeedsFixedSize("a transposed convolution whose output_size depends on the input's")
    x = torch.empty((1, 1, *(int(n or 0) for n in inputs)), device="meta")
    return list(geometry._extra(x, wanted))


def weight(low: Lowering, g: Group) -> str:
    """The weight as float32: int8 and DequantizeLinear, or already float in the form ``float``."""
    graph, groups, transposed = low.graph, g.geometry.groups, g.geometry.transposed
    if low.form == "float":
        first = _output_channels_first(g.weight, groups) if transposed else g.weight
        real = first * true_weight_scales(g).reshape(-1, *[1] * (first.ndim - 1))
        return graph.initializer(
            f"{g.path}.weight", (_transposed_order(real, groups) if transposed else real).astype(FLOAT32)
        )
    if not transposed:
        return dequantized(low, g, "weight", g.weight, g.scales, 0)
    inputs, outputs, *kernel = g.weight.shape
    if groups == 1:
        return dequantized(low, g, "weight", g.weight, g.scales, 1)
    if outputs == 1:
        return dequantized(low, g, "weight", g.weight, np.repeat(g.scales, inputs // groups), 0)
    w = dequantized(low, g, "weight", _output_channels_first(g.weight, groups), g.scales, 0)
    w = graph.op("Reshape", w, graph.constant([groups, outputs, inputs // groups, *kernel]))
    w = graph.op("Transpose", w, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
    return graph.op("Reshape", w, graph.constant([inputs, outputs, *kernel]))


def _transposed_order(w: Array, groups: int) -> Array:
    """``[C_out, C_in / groups, ...]`` as ConvTranspose's ``[C_in, C_out / groups, ...]``."""
    outputs, inputs, *kernel = w.shape
    parts = w.reshape(groups, outputs // groups, inputs, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(parts).reshape(groups * inputs, outputs // groups, *kernel)


def true_weight_scales(g: Group) -> Array:
    """The scales of the weights as the plan means them, float64 ``[C_out]``: without the factors of activations' channels."""
    s_x, s_y = g.x.exact, np.float64(1) if g.y is None else g.y.exact
    if s_x.ndim:
        s_x = np.repeat(s_x, len(g.bias) // len(s_x))
    return g.m.astype(np.float64) * s_y / s_x


def dequantized(low: Lowering, g: Group, what: str, array: Array, scales: Array, axis: int) -> str:
    """Integers of the model with their scales."""
    graph = low.graph
    integers = graph.initializer(f"{g.path}.{what}", array)
    return graph.op(
        "DequantizeLinear", integers, graph.initializer(f"{g.path}.{what}_scale", scales), axis=axis,
        name=f"{g.path}.{what}.dequantize",
    )  # fmt: skip


def bias(low: Lowering, g: Group) -> list[str]:
    """The bias as float32, int32 with the scale ``s_x * s_w``; none where it is zero."""
    if not g.bias.any():
        return []
    if low.form == "float":
        s_y = np.float64(1) if g.y is None else g.y.exact
        return [low.graph.initializer(f"{g.path}.bias", (g.bias * (g.m.astype(np.float64) * s_y)).astype(FLOAT32))]
    return [dequantized(low, g, "bias", g.bias, (g.x.scale * g.scales).astype(FLOAT32), 0)]


def _linear(low: Lowering, g: Group, x: str, rank: int) -> str:
    """Gemm for a matrix; else MatMul with the weight's transpose, and Add."""
    graph = low.graph
    if rank == 2:
        return graph.op("Gemm", x, weight(low, g), *bias(low, g), transB=1, name=g.path)
    if low.form == "float":
        w = graph.initializer(
            f"{g.path}.weight", np.ascontiguousarray((g.weight * true_weight_scales(g)[:, None]).T).astype(FLOAT32)
        )
    else:
        w = dequantized(low, g, "weight", np.ascontiguousarray(g.weight.T), g.scales, 1)
    y = graph.op("MatMul", x, w, name=g.path)
    added = bias(low, g)
    return graph.op("Add", y, *added, name=f"{g.path}.bias_add") if added else y
