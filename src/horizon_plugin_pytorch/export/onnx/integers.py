"""Groups and operators on integers, for the form ``qoperator``.

A convolution without residual is a QLinearConv; its ReLU is the lower end of uint8, its ReLU6 a Min on the integers, both exact because
rounding keeps order. QLinearConv and QLinearMatMul have no second summand, and QLinearMatMul no bias, so a group with a residual,
a Linear, and a group whose output is float32 are written as the arithmetic itself: ConvInteger or MatMulInteger, the int32 bias, the
plan's multipliers, the residual, one QuantizeLinear with scale 1. A fused multiply-add is one in float64, rounded to float32; the sum
in float64 could only go wrong in its 53rd bit. Add, Mul, Cat and averages are written in the same way, so that integers come out as the
plan's do. ONNX has no integer transposed convolution: there the same integers are summed in float32, which is exact up to 2^24.

QLinearConv multiplies three scales in float32. Where no weight's scale makes that the plan's multiplier, to the bit, the multiplier
itself stands there and the activations' scales are 1, which is the same sum and the same rounding.

Runtimes' QLinearConv takes one dtype for input and output, so int8 is written as uint8 with zero point 128, the same integers shifted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from horizon_plugin_pytorch.backends.reference.layout import LINEAR_BITS, linear_sources
from horizon_plugin_pytorch.export.onnx import pools
from horizon_plugin_pytorch.export.onnx.graph import Array
from horizon_plugin_pytorch.export.onnx.groups import Group, conv_attributes, output_padding, pad_by_mode, read
from horizon_plugin_pytorch.export.onnx.lowering import Lowering, Quantized
from horizon_plugin_pytorch.export.onnx.scales import FLOAT32, Units
from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize, Sizes
from horizon_plugin_pytorch.plan import Step

_FLOAT, _INT32, _DOUBLE = 1, 6, 11  # of onnx.TensorProto


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
    if g.geometry.dims and not g.geometry.transposed and g.y is not None and not others:
        y = _convolution(low, g, q)
    else:
        acc = _transposed(low, g, q, step) if g.geometry.transposed else _accumulator(low, g, q)
        y = _epilogue(low, g, acc, others)
    if not batched:
        y = low.graph.op("Squeeze", y, low.graph.constant([0]))
    return y if g.y is None else Quantized(g.y, g.path, integers=y)


def _convolution(low: Lowering, g: Group, x: str) -> str:
    graph = low.graph
    assert g.y is not None
    bias = [graph.initializer(f"{g.path}.bias", g.bias)] if g.bias.any() else []
    s_x, s_w, s_y = low.scale_tensor(g.x), g.scales, low.scale_tensor(g.y)
    if not np.array_equal(g.x.scale * s_w / g.y.scale, g.m):
        s_x, s_w, s_y = graph.scalar(1.0), g.m, graph.scalar(1.0)
    y = graph.op(
        "QLinearConv", x, s_x, low.zero_point(g.x), graph.initializer(f"{g.path}.weight", g.weight),
        graph.initializer(f"{g.path}.weight_scale", s_w), graph.initializer("zero_point.int8", 0, np.int8),
        s_y, low.zero_point(g.y), *bias, name=g.path, **conv_attributes(g.geometry),
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
    """``sum x_q * w_q + bias_q``: int32, then as float32."""
    graph, zero = low.graph, low.zero_point(g.x)
    if g.geometry.dims:
        w = graph.initializer(f"{g.path}.weight", g.weight)
        acc = graph.op("ConvInteger", x, w, zero, name=g.path, **conv_attributes(g.geometry))
    else:
        w = graph.initializer(f"{g.path}.weight", np.ascontiguousarray(g.weight.T))
        acc = graph.op("MatMulInteger", x, w, zero, name=g.path)
    if g.bias.any():
        acc = graph.op("Add", acc, graph.initializer(f"{g.path}.bias", _channels(g.bias, g)), name=f"{g.path}.bias_add")
    return graph.op("Cast", acc, to=_FLOAT)


def _transposed(low: Lowering, g: Group, x: str, step: Step) -> str:
    """The same sum of a transposed convolution, in float32."""
    graph = low.graph
    sizes = low.sizes(step.args[0])
    extra = output_padding(low, g.geometry, sizes if len(sizes) == g.geometry.dims + 2 else (1, *sizes), step)
    ints = graph.op("DequantizeLinear", x, graph.scalar(1.0), low.zero_point(g.x))
    w = graph.op("Cast", graph.initializer(f"{g.path}.weight", g.weight), to=_FLOAT)
    attributes = {**conv_attributes(g.geometry), "output_padding": extra if any(extra) else None}
    acc = graph.op("ConvTranspose", ints, w, name=g.path, **attributes)
    if g.bias.any():
        bias = graph.op("Cast", graph.initializer(f"{g.path}.bias", _channels(g.bias, g)), to=_FLOAT)
        acc = graph.op("Add", acc, bias, name=f"{g.path}.bias_add")
    return acc


def _epilogue(low: Lowering, g: Group, acc: str, others: list[Any]) -> str:
    """``acc * m``, the residual, the activation, in units of the output, and its integers."""
    graph = low.graph
    m = graph.initializer(f"{g.path}.multiplier", _channels(g.m, g))
    y = graph.op("Mul", acc, m, name=f"{g.path}.scale")
    if others:
        assert g.residual_ratio is not None
        ratio = graph.initializer(f"{g.path}.residual_ratio", _channels(g.residual_ratio.astype(np.float64), g))
        y = fma(low, counted(low, others[0]), ratio, y, g.path)
    if g.activation is not None:
        y = graph.op("Relu", y, name=f"{g.path}.relu")
    if g.activation == "relu6":
        y = graph.op(
            "Min", y, graph.initializer(f"{g.path}.bound", _channels(g.bound.astype(FLOAT32), g)), name=f"{g.path}.min"
        )
    if g.y is None:
        return y
    return graph.op("QuantizeLinear", y, graph.scalar(1.0), low.zero_point(g.y), name=f"{g.path}.quantize")


def counted(low: Lowering, value: Quantized) -> str:
    """The integers of a value as float32 numbers."""
    return low.graph.op("DequantizeLinear", low.integers(value), low.graph.scalar(1.0), low.zero_point(value.units))


def rounded(low: Lowering, y: str, units: Units, path: str) -> Quantized:
    """Numbers that count `units`, rounded and cut off to integers."""
    q = low.graph.op("QuantizeLinear", y, low.graph.scalar(1.0), low.zero_point(units), name=f"{path}.quantize")
    return Quantized(units, path, integers=q)


def fma(low: Lowering, a: str, b: str, c: str, path: str) -> str:
    """``a * b + c`` rounded once to float32; `b` is float64, the others float32."""
    graph = low.graph
    product = graph.op("Mul", graph.op("Cast", a, to=_DOUBLE), b)
    return graph.op("Cast", graph.op("Add", product, graph.op("Cast", c, to=_DOUBLE), name=f"{path}.add"), to=_FLOAT)


# -- operators outside groups -------------------------------------------------------------------------------------------------


def operator(low: Lowering, step: Step, units: Units, operands: list[Any]) -> Any:
    """An operator in the plan's own arithmetic; None where scales per channel or unequal windows leave it to float32."""
    rule = _OPERATORS.get(step.params["name"])
    known = [v.units for v in operands if isinstance(v, Quantized)]
    if rule is None or len(known) < len(operands) or any(u.channels is not None for u in (units, *known)):
        return None
    y = rule(low, step, units, operands, **step.params["options"])
    if y is None:
        return None
    return rounded(low, y, units, step.name)


def _ratio(*scales: float, over: np.float32) -> np.float32:
    """Float64, rounded once to float32."""
    return FLOAT32(np.prod([np.float64(s) for s in scales]) / np.float64(over))


def _times(low: Lowering, x: str, factor: np.float32) -> str:
    return x if factor == 1 else low.graph.op("Mul", x, low.graph.constant(factor, FLOAT32))


def _add(low: Lowering, step: Step, units: Units, operands: list[Any], activation: str | None = None) -> str:
    graph, (a, b) = low.graph, operands
    first = _times(low, counted(low, a), _ratio(a.units.scale, over=units.scale))
    ratio = graph.constant(_ratio(b.units.scale, over=units.scale), np.float64)
    y = fma(low, counted(low, b), ratio, first, step.name)
    if activation is not None:
        y = graph.op("Relu", y, name=f"{step.name}.relu")
    return graph.op("Min", y, graph.constant(_ratio(6.0, over=units.scale), FLOAT32)) if activation == "relu6" else y


def _mul(low: Lowering, step: Step, units: Units, operands: list[Any]) -> str:
    a, b = operands
    product = low.graph.op("Mul", counted(low, a), counted(low, b), name=step.name)
    return _times(low, product, _ratio(a.units.scale, b.units.scale, over=units.scale))


def _cat(low: Lowering, step: Step, units: Units, operands: list[Any], dim: int = 0) -> str:
    scaled = [_times(low, counted(low, v), _ratio(v.units.scale, over=units.scale)) for v in operands]
    return low.graph.op("Concat", *scaled, axis=dim % len(low.sizes(step.args[0])), name=step.name)


def _average(
    low: Lowering, step: Step, units: Units, operands: list[Any], dims: int, kernel_size: Any, **options: Any
) -> Any:
    """The windows' sums, which are whole numbers, where each is divided by the same number."""
    padded = np.any(np.asarray(options.get("padding", 0)))
    override = options.pop("divisor_override", None)
    if options.get("ceil_mode") or (padded and not (options.get("count_include_pad", True) or override)):
        return None
    count = float(np.prod(np.broadcast_to(kernel_size, (dims,))))
    options["count_include_pad"] = True
    mean = pools.average(
        low.graph, counted(low, operands[0]), low.sizes(step.args[0]), step.name, dims, kernel_size, **options
    )
    total = low.graph.op("Round", _times(low, mean, FLOAT32(count)))
    scale = np.float64(operands[0].units.scale) / (np.float64(units.scale) * (override or count))
    return _times(low, total, FLOAT32(scale))


def _adaptive(low: Lowering, step: Step, units: Units, operands: list[Any], dims: int, output_size: Any) -> Any:
    wanted = (output_size,) * dims if isinstance(output_size, int) else tuple(output_size)
    return _whole(low, step, units, operands[0], tuple(range(-dims, 0)), True) if set(wanted) == {1} else None


def _mean(low: Lowering, step: Step, units: Units, operands: list[Any], dim: Any, keepdim: bool = False) -> str:
    return _whole(low, step, units, operands[0], dim, keepdim)


def _whole(low: Lowering, step: Step, units: Units, value: Quantized, dim: Any, keepdim: bool) -> str:
    """A sum over whole dimensions times ``s_x / (n * s_y)``, where n may be known only when the graph runs."""
    graph, sizes = low.graph, low.sizes(step.args[0])
    x = counted(low, value)
    total = pools.reduce(graph, "ReduceSum", x, len(sizes), dim, keepdim, name=step.name)
    axes = [d % len(sizes) for d in ([dim] if isinstance(dim, int) else dim)] or list(range(len(sizes)))
    numbers = [sizes[d] for d in axes]
    if None not in numbers:
        n = np.float64(np.prod(numbers))  # type: ignore[arg-type]
        return _times(low, total, FLOAT32(np.float64(value.units.scale) / (np.float64(units.scale) * n)))
    lengths = graph.op("Gather", graph.op("Shape", x), graph.constant(axes), axis=0)
    n = graph.op("Cast", graph.op("ReduceProd", lengths, keepdims=0), to=_DOUBLE)
    below = graph.op("Mul", n, graph.constant(units.scale, np.float64))
    ratio = graph.op("Div", graph.constant(value.units.scale, np.float64), below)
    return graph.op("Mul", total, graph.op("Cast", ratio, to=_FLOAT))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _add,
    "Mul": _mul,
    "Cat": _cat,
    "AvgPool": _average,
    "AdaptiveAvgPool": _adaptive,
    "Mean": _mean,
}


def linear_upsampled(
    low: Lowering, value: Quantized, sizes: Sizes, result: Sizes, scale_factor: Any, align_corners: bool, path: str
) -> Quantized:
    """`reference.upsample_linear`: along each dimension two inputs times their integer weights, in int32."""
    if None in (*sizes[2:], *result[2:]):
        raise NeedsFixedSize("linear up-sampling of integers by a factor that is no power of two")
    graph, dims = low.graph, len(sizes) - 2
    bits = LINEAR_BITS[dims]
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else [scale_factor] * dims
    acc = graph.op("Cast", counted(low, value), to=_INT32)
    for axis, (length, out, factor) in enumerate(zip(sizes[2:], result[2:], factors, strict=True), start=2):
        assert length is not None and out is not None
        *places, w = linear_sources(length, out, factor, align_corners, bits)
        weights = [t.view(-1, *[1] * (dims + 1 - axis)).numpy() for t in (2**bits - w, w)]
        parts = [
            graph.op("Mul", graph.op("Gather", acc, graph.constant(place), axis=axis), graph.constant(weight, np.int32))
            for place, weight in zip(places, weights, strict=True)
        ]
        acc = graph.op("Add", *parts)
    y = _times(low, graph.op("Cast", acc, to=_FLOAT), FLOAT32(0.5 ** (dims * bits)))
    return rounded(low, y, value.units, path)
