"""Fused groups on ONNX's integer operators, for the form ``qoperator``.

A convolution without residual is a QLinearConv; its ReLU is the lower end of uint8, its ReLU6 a Min on the integers, both exact because
rounding keeps order. QLinearConv and QLinearMatMul have no second summand, and QLinearMatMul no bias, so a group with a residual,
a Linear, and a group whose output is float32 are written as the arithmetic itself: ConvInteger or MatMulInteger, the int32 bias, the
plan's multipliers, the residual, one QuantizeLinear with scale 1. ONNX has no integer transposed convolution: those stay as in ``qdq``.

Runtimes' QLinearConv takes one dtype for input and output, so int8 is written as uint8 with zero point 128, the same integers shifted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from horizon_plugin_pytorch.export.onnx.graph import Array
from horizon_plugin_pytorch.export.onnx.groups import Group, conv_attributes, pad_by_mode, read
from horizon_plugin_pytorch.export.onnx.lowering import Lowering, Quantized
from horizon_plugin_pytorch.export.onnx.scales import FLOAT32
from horizon_plugin_pytorch.plan import Step

_FLOAT = 1  # onnx.TensorProto.FLOAT


def applies(step: Step) -> bool:
    return not step.params["geometry"]["transposed"]


def group(low: Lowering, step: Step) -> Any:
    g = read(low, step)
    x, *others = (low.argument(a) for a in step.args)
    rank = len(low.sizes(step.args[0]))
    batched = g.geometry.dims == 0 or rank == g.geometry.dims + 2
    q = low.integers(x)
    if not batched:
        q = low.graph.op("Unsqueeze", q, low.graph.constant([0]))
    if g.geometry.dims:
        q = pad_by_mode(low.graph, g.geometry, q)
    if g.geometry.dims and g.y is not None and not others:
        y = _convolution(low, g, q)
    else:
        y = _epilogue(low, g, _accumulator(low, g, q), others)
    if not batched:
        y = low.graph.op("Squeeze", y, low.graph.constant([0]))
    return y if g.y is None else Quantized(g.y, g.path, integers=y)


def _convolution(low: Lowering, g: Group, x: str) -> str:
    graph = low.graph
    assert g.y is not None
    bias = [graph.initializer(f"{g.path}.bias", g.bias)] if g.bias.any() else []
    y = graph.op(
        "QLinearConv", x, low.scale_tensor(g.x), low.zero_point(g.x), graph.initializer(f"{g.path}.weight", g.weight),
        graph.initializer(f"{g.path}.weight_scale", g.scales), graph.initializer("zero_point.int8", 0, np.int8),
        low.scale_tensor(g.y), low.zero_point(g.y), *bias, name=g.path, **conv_attributes(g.geometry),
    )  # fmt: skip
    if g.activation is None:
        return y
    zero = 128 if g.y.dtype == "int8" else 0
    if zero:
        y = graph.op("Max", y, graph.constant(zero, np.uint8), name=f"{g.path}.relu")
    six = np.minimum(np.round(g.bound) + zero, 255)
    if g.activation == "relu6" and (six < 255).any():
        y = graph.op(
            "Min", y, graph.initializer(f"{g.path}.bound", _channels(six, g).astype(np.uint8)), name=f"{g.path}.min"
        )
    return y


def _channels(values: Array, g: Group) -> Array:
    """One value, or one per output channel in a shape that broadcasts against the output."""
    return values.reshape(-1, *[1] * g.behind) if values.ndim else values


def _accumulator(low: Lowering, g: Group, x: str) -> str:
    """``sum x_q * w_q + bias_q``, int32."""
    graph, zero = low.graph, low.zero_point(g.x)
    if g.geometry.dims:
        w = graph.initializer(f"{g.path}.weight", g.weight)
        acc = graph.op("ConvInteger", x, w, zero, name=g.path, **conv_attributes(g.geometry))
    else:
        w = graph.initializer(f"{g.path}.weight", np.ascontiguousarray(g.weight.T))
        acc = graph.op("MatMulInteger", x, w, zero, name=g.path)
    if g.bias.any():
        acc = graph.op("Add", acc, graph.initializer(f"{g.path}.bias", _channels(g.bias, g)), name=f"{g.path}.bias_add")
    return acc


def _epilogue(low: Lowering, g: Group, acc: str, others: list[Any]) -> str:
    """``acc * m``, the residual, the activation, in units of the output, and its integers."""
    graph = low.graph
    m = graph.initializer(f"{g.path}.multiplier", _channels(g.m, g))
    y = graph.op("Mul", graph.op("Cast", acc, to=_FLOAT), m, name=f"{g.path}.scale")
    if others:
        assert g.residual_ratio is not None and g.r is not None
        r, ratio = low.integers(others[0]), g.residual_ratio.astype(FLOAT32)
        if ratio.ndim:
            r = graph.op("DequantizeLinear", r, graph.scalar(1.0), low.zero_point(g.r))
            r = graph.op("Mul", r, graph.initializer(f"{g.path}.residual_ratio", _channels(ratio, g)))
        else:
            scale = graph.initializer(f"{g.path}.residual_ratio", ratio)
            r = graph.op("DequantizeLinear", r, scale, low.zero_point(g.r))
        y = graph.op("Add", y, r, name=f"{g.path}.add")
    if g.activation is not None:
        y = graph.op("Relu", y, name=f"{g.path}.relu")
    if g.activation == "relu6":
        y = graph.op(
            "Min", y, graph.initializer(f"{g.path}.bound", _channels(g.bound.astype(FLOAT32), g)), name=f"{g.path}.min"
        )
    if g.y is None:
        return y
    return graph.op("QuantizeLinear", y, graph.scalar(1.0), low.zero_point(g.y), name=f"{g.path}.quantize")
