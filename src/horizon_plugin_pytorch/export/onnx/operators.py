"""Steps outside groups that make integers: quantize, the operators, tables.

An operator is its float form between DequantizeLinear and QuantizeLinear, which is how runtimes know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from horizon_plugin_pytorch.export.onnx import integers, pools
from horizon_plugin_pytorch.export.onnx.lowering import Lowering, Quantized
from horizon_plugin_pytorch.export.onnx.scales import FLOAT32, Units
from horizon_plugin_pytorch.export.onnx.tables import recognize
from horizon_plugin_pytorch.plan import Step


def quantize(low: Lowering, step: Step) -> Any:
    x = low.tensor(low.argument(step.args[0]))
    return _rounded(low, x, low.units(step.params["scale"], step.params["dtype"]), step.name)


def _rounded(low: Lowering, y: str, units: Units, path: str) -> Any:
    """A float32 tensor as integers of these units."""
    if units.channels is not None and low.form != "float":
        factors = (float(units.scale) / units.exact).astype(FLOAT32)
        y = low.multiply_channels(y, factors, low.index, f"{path}.quantize")
    return low.quantize(y, units, path)


def dequantize(low: Lowering, step: Step) -> Any:
    return low.tensor(low.argument(step.args[0]))


def operator(low: Lowering, step: Step) -> Any:
    units = low.units(step.params["scale"], step.params["dtype"])
    if low.form == "qoperator" and not _joins(low, step, units):
        exact = integers.operator(low, step, units, [low.argument(a) for a in step.args])
        if exact is not None:
            return exact
    y = _OPERATORS[step.params["name"]](low, step, units, **step.params["options"])
    return y if isinstance(y, Quantized) else _rounded(low, y, units, step.name)


def _add(low: Lowering, step: Step, units: Units, activation: str | None = None) -> str:
    y = low.graph.op("Add", *(low.tensor(low.argument(a)) for a in step.args), name=step.name)
    if activation == "relu":
        return low.graph.op("Relu", y, name=f"{step.name}.relu")
    if activation == "relu6":
        return low.graph.op("Clip", y, low.graph.scalar(0.0), low.graph.scalar(6.0), name=f"{step.name}.clip")
    return y


def _mul(low: Lowering, step: Step, units: Units) -> str:
    return low.graph.op("Mul", *(low.tensor(low.argument(a)) for a in step.args), name=step.name)


def _joins(low: Lowering, step: Step, units: Units) -> bool:
    """Whether it is a Cat of operands that all have the output's units, which are joined as they are."""
    if step.params["name"] != "Cat":
        return False
    found = [v.units if isinstance(v, Quantized) else None for v in map(low.argument, step.args)]
    return all(u is not None and (u.scale, u.dtype, u.channels) == (units.scale, units.dtype, None) for u in found)


def _cat(low: Lowering, step: Step, units: Units, dim: int = 0) -> Any:
    operands = [low.argument(a) for a in step.args]
    axis = dim % len(low.sizes(step.args[0]))
    if low.form == "float" or not _joins(low, step, units):
        return low.graph.op("Concat", *map(low.tensor, operands), axis=axis, name=step.name)
    if low.form == "qoperator":
        joined = low.graph.op("Concat", *map(low.integers, operands), axis=axis, name=step.name)
        return Quantized(units, step.name, integers=joined)
    return Quantized(
        units, step.name, scaled=low.graph.op("Concat", *map(low.tensor, operands), axis=axis, name=step.name)
    )


def _average(low: Lowering, step: Step, units: Units, **options: Any) -> str:
    x, sizes = low.tensor(low.argument(step.args[0])), low.sizes(step.args[0])
    return pools.average(low.graph, x, sizes, step.name, **options)


def _adaptive(low: Lowering, step: Step, units: Units, dims: int, output_size: Any) -> str:
    x, sizes = low.tensor(low.argument(step.args[0])), low.sizes(step.args[0])
    return pools.adaptive_average(low.graph, x, sizes, step.name, dims, output_size)


def _mean(low: Lowering, step: Step, units: Units, dim: Any, keepdim: bool = False) -> str:
    x, sizes = low.tensor(low.argument(step.args[0])), low.sizes(step.args[0])
    return pools.reduce(low.graph, "ReduceMean", x, len(sizes), dim, keepdim, name=step.name)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _add,
    "Mul": _mul,
    "Cat": _cat,
    "AvgPool": _average,
    "AdaptiveAvgPool": _adaptive,
    "Mean": _mean,
}


def table(low: Lowering, step: Step) -> Any:
    """A function that gives the same table, on float32; else, and in the form ``qoperator``, the table itself, on the integers."""
    graph, value = low.graph, low.argument(step.args[0])
    assert isinstance(value, Quantized)
    entries = low.constant(step.params["table"].name)
    units = low.units(step.params["scale"], step.params["dtype"])
    known = None if low.form == "qoperator" else recognize(entries, value.units, units)
    if known is not None:
        return low.quantize(known.emit(graph, low.tensor(value)), units, step.name)
    if low.form == "float":
        step_of = graph.op("Div", low.tensor(value), low.scale_tensor(value.units))
        index = graph.op("Clip", graph.op("Round", step_of), *map(graph.scalar, map(float, value.units.range)))
        looked = graph.initializer(f"{step.name}.table", (entries * units.scale).astype(FLOAT32))
        place = graph.op("Sub", index, graph.scalar(float(value.units.range[0])))
        y = graph.op("Gather", looked, graph.op("Cast", place, to=7), name=step.name)
        return low.quantize(y, units, step.name)
    if low.form == "qoperator" and units.dtype == "int8":
        entries = (entries.astype(np.int16) + 128).astype(np.uint8)
    least = 0 if low.form == "qoperator" else value.units.range[0]
    place = graph.op("Cast", low.integers(value), to=6)
    if least:
        place = graph.op("Sub", place, graph.constant(least, np.int32))
    y = graph.op("Gather", graph.initializer(f"{step.name}.table", entries), place, name=step.name)
    return Quantized(units, step.name, integers=y)
