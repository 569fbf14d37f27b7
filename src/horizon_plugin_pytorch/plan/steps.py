"""What each kind of step computes, on the reference: the definition that other backends equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.nn.quantized import operators
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.functions import resolve
from horizon_plugin_pytorch.plan.program import Const, Ref, Step

Make = Callable[[Tensor, Tensor, torch.dtype], Any]
INTEGER_DTYPES = {"int8": torch.int8, "uint8": torch.uint8}
OPERATORS: dict[str, type[operators.Operator]] = {
    c.__name__: c
    for c in (operators.Add, operators.Mul, operators.Cat, operators.AvgPool, operators.AdaptiveAvgPool, operators.Mean)
}


def fill(arguments: Any, values: Callable[[int], Any], constants: Any) -> Any:
    """Nested arguments with the values and constants they refer to."""
    if isinstance(arguments, Ref):
        return values(arguments.value)
    if isinstance(arguments, Const):
        return constants[arguments.name]
    if isinstance(arguments, dict):
        return {k: fill(a, values, constants) for k, a in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(fill(a, values, constants) for a in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(fill(a, values, constants) for a in arguments)
    return arguments


def run_step(step: Step, values: Callable[[int], Any], constants: Any, make: Make = QTensor.make) -> Any:
    """The result of one step.

    Args:
        values: from the index of a value to what it is.
        constants: the plan's, by name, on the device of the values.
        make: integers with a scale, from their tensor, the scale and the dtype.
    """
    args = fill(step.args, values, constants)
    if step.kind == "function":
        return run_function(step.target, args, fill(step.kwargs, values, constants))
    return _KINDS[step.kind](make, args, **fill(step.params, values, constants))


def run_function(target: str, args: Any, kwargs: Any) -> Any:
    function = resolve(target)
    assert function is not None  # a plan is checked when it is made or loaded
    return function(*args, **kwargs)


def _quantize(make: Make, args: Any, scale: Tensor, dtype: str) -> Any:
    dtype8 = INTEGER_DTYPES[dtype]
    axis = None if scale.dim() == 0 else 1
    return make(reference.quantize(args[0], scale, dtype8, axis), scale, dtype8)


def _dequantize(make: Make, args: Any) -> Tensor:
    return args[0].dequantize()


def _group(
    make: Make,
    args: Any,
    geometry: dict[str, Any],
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    bound: Tensor,
    residual_ratio: Tensor | None = None,
    activation: str | None = None,
    scale: Tensor | None = None,
    dtype: str = "float32",
    output_size: Any = None,
) -> Any:
    walk = Geometry(**geometry)
    acc = walk.accumulate(args[0].payload, weight, bias, output_size)
    y = reference.epilogue(
        acc, m, residual=args[1].payload if len(args) > 1 else None, residual_ratio=residual_ratio, activation=activation,
        bound=bound, dtype=INTEGER_DTYPES.get(dtype, torch.float32), axis=walk.channel_axis(acc),
    )  # fmt: skip
    return y if scale is None else make(y, scale, INTEGER_DTYPES[dtype])


def _operator(make: Make, args: Any, name: str, options: dict[str, Any], scale: Tensor, dtype: str) -> Any:
    dtype8 = INTEGER_DTYPES[dtype]
    return make(OPERATORS[name](**options).integer(args, scale, dtype8), scale, dtype8)


def _table(make: Make, args: Any, table: Tensor, scale: Tensor, dtype: str) -> Any:
    return make(reference.lookup(args[0].payload, table), scale, INTEGER_DTYPES[dtype])


_KINDS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "group": _group,
    "operator": _operator,
    "table": _table,
}
