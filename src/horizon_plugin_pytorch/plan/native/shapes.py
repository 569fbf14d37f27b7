"""What each value of a plan is for given inputs: shapes and dtypes of tensors, and the values that are no tensors.

The plan runs once on tensors without data (PyTorch's "meta" device). Kinds of steps, and the functions that quantized networks are made
of, have rules of their own here: PyTorch computes most shapes in Python, and the first time imports for seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from horizon_plugin_pytorch.backends.reference import layout, pooling
from horizon_plugin_pytorch.backends.reference.shapes import as_tuple
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import INTERPOLATE, QTensor, interpolates_integers
from horizon_plugin_pytorch.plan.program import Plan, PlanError, Step, Value
from horizon_plugin_pytorch.plan.steps import INTEGER_DTYPES, fill, run_function

Shape = tuple[int, ...]

META = torch.device("meta")
CPU = torch.device("cpu")


def infer(plan: Plan, inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Any]:
    """Every value of `plan` for inputs of these shapes and dtypes: tensors without data, and host values.

    Integers are a `QTensor` whose scale is the plan's own tensor.

    Raises:
        PlanError: a step that does not accept its inputs, or whose result's shape depends on data, naming the step.
    """
    constants = {name: t.to(META) if t.dim() else t for name, t in plan.constants.items()}
    values: list[Any] = [torch.empty(shape, dtype=dtype, device=META) for shape, dtype in inputs]
    recorded = all(tuple(x.shape) == v.shape for x, v in zip(values, plan.values, strict=False))
    with torch.no_grad():
        for i, step in enumerate(plan.steps):
            try:
                values.append(_result(plan, step, plan.result(i), values, constants, recorded))
            except Exception as error:
                raise PlanError(f"step {i} ({step.name!r}, {step.target or step.kind}): {error}") from error
    return values


def _result(
    plan: Plan, step: Step, value: Value, values: list[Any], constants: dict[str, Tensor], recorded: bool
) -> Any:
    args = fill(step.args, values.__getitem__, constants)
    if step.kind == "function":
        kwargs = fill(step.kwargs, values.__getitem__, constants)
        return _function(plan, step, value, args, kwargs, recorded)
    if step.kind == "group":
        output_size = fill(step.params.get("output_size"), values.__getitem__, constants)
        return _typed(plan, value, _group(step, args, constants, output_size))
    if step.kind == "operator":
        shapes = [tuple(a.shape) for a in args]
        return _typed(plan, value, _OPERATORS[step.params["name"]](*shapes, **step.params["options"]))
    return _typed(plan, value, tuple(args[0].shape))


def _typed(plan: Plan, value: Value, shape: Shape) -> Tensor:
    if value.scale is None:
        return torch.empty(shape, dtype=getattr(torch, value.dtype), device=META)
    dtype = INTEGER_DTYPES[value.dtype]
    return QTensor.make(torch.empty(shape, dtype=dtype, device=META), plan.constants[value.scale], dtype)


# -- groups -------------------------------------------------------------------------------------------------------------------


def _group(step: Step, args: Any, constants: dict[str, Tensor], output_size: Any) -> Shape:
    geometry = Geometry(**step.params["geometry"])
    weight, channels = constants[step.params["weight"].name], constants[step.params["bias"].name].numel()
    shape = tuple(args[0].shape)
    axis = len(shape) - 1 - geometry.dims
    inputs = weight.shape[0] if geometry.transposed else weight.shape[1] * geometry.groups
    if axis < 0 or (geometry.dims and axis > 1) or shape[axis] != inputs:
        raise ValueError(f"an input of shape {shape} does not have the {inputs} channels it needs")
    size = [_along(geometry, d, n, output_size) for d, n in enumerate(shape[axis + 1 :])]
    if any(n < 1 for n in size):
        raise ValueError(f"an input of shape {shape} is too small for a kernel of {geometry.kernel_size}")
    return _broadcast((*shape[:axis], channels, *size), *(tuple(a.shape) for a in args[1:]))


def _along(geometry: Geometry, d: int, n: int, output_size: Any) -> int:
    """The output's size along a dimension, as `torch.nn.functional.conv2d` and `conv_transpose2d` have it."""
    reach = geometry.dilation[d] * (geometry.kernel_size[d] - 1)
    if geometry.padding == "same":
        return n
    padding = 0 if isinstance(geometry.padding, str) else 2 * geometry.padding[d]
    if not geometry.transposed:
        return (n + padding - reach - 1) // geometry.stride[d] + 1
    least = (n - 1) * geometry.stride[d] - padding + reach + 1
    if output_size is None:
        return least + geometry.output_padding[d]
    wanted = int(list(output_size)[d - geometry.dims])
    if not least <= wanted < least + max(geometry.stride[d], geometry.dilation[d]):
        raise ValueError(f"an output of {wanted} is not possible from an input of {n}")
    return wanted


# -- operators and functions ------------------------------------------------------------------------------------------------------


def _broadcast(*shapes: Shape) -> Shape:
    return np.broadcast_shapes(*shapes)  # PyTorch's own imports for seconds


def _cat(*shapes: Shape, dim: int) -> Shape:
    first = list(shapes[0])
    dim %= len(first)
    if any((*s[:dim], *s[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) or len(s) != len(first) for s in shapes):
        raise ValueError(f"tensors of shapes {shapes} cannot be joined along dimension {dim}")
    first[dim] = sum(s[dim] for s in shapes)
    return tuple(first)


def _pool(
    shape: Shape,
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    dilation: Any = 1,
    **_: Any,
) -> Shape:
    kernel = as_tuple(kernel_size, dims)
    steps = as_tuple(stride or kernel, dims)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, as_tuple(dilation, dims), strict=True)]
    found = [
        pooling.windows(n, r, s, p, ceil_mode)
        for n, r, s, p in zip(shape[-dims:], reach, steps, as_tuple(padding, dims), strict=True)
    ]
    return (*shape[:-dims], *(len(w.start) for w in found))


def _adaptive_pool(shape: Shape, dims: int, output_size: Any) -> Shape:
    wanted = (output_size,) * dims if isinstance(output_size, int) else output_size
    return (*shape[:-dims], *(n if w is None else w for n, w in zip(shape[-dims:], wanted, strict=True)))


def _mean(shape: Shape, dim: Any, keepdim: bool = False) -> Shape:
    over = {d % len(shape) for d in dim}
    return tuple(1 if d in over else n for d, n in enumerate(shape) if keepdim or d not in over)


def _upsampled(shape: Shape, size: Any = None, scale_factor: Any = None, **_: Any) -> Shape:
    return (*shape[:2], *(out for out, _ in layout.upsampled(shape[2:], size, scale_factor)))


_OPERATORS: dict[str, Callable[..., Shape]] = {
    "Add": lambda a, b, activation=None: _broadcast(a, b),
    "Mul": _broadcast,
    "Cat": _cat,
    "AvgPool": _pool,
    "AdaptiveAvgPool": _adaptive_pool,
    "Mean": _mean,
}


def _function(plan: Plan, step: Step, value: Value, args: Any, kwargs: Any, recorded: bool) -> Any:
    if step.target == "attribute" and args[1] == "device":
        return CPU
    x = args[0] if args else kwargs.get("input")
    if isinstance(x, QTensor) and value.scale is not None:
        call = call_of(step.target, args, kwargs)
        name = step.target.rpartition(".")[2]
        if name in ("relu", "relu_"):
            return x
        if call is not None:
            family, dims, named = call
            if family == "interpolate" and interpolates_integers(**named):
                return _typed(plan, value, _upsampled(tuple(x.shape), **named))
            if family == "max_pool":
                return _typed(plan, value, _pool(tuple(x.shape), dims, **named))
            if family == "adaptive_max_pool":
                return _typed(plan, value, _adaptive_pool(tuple(x.shape), dims, named["output_size"]))
    if isinstance(x, (tuple, list)) and all(isinstance(t, QTensor) for t in x) and value.scale is not None:
        named = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
        if step.target in ("torch.cat", "torch.concat") and isinstance(named.get("dim", 0), int):
            return _typed(plan, value, _cat(*(tuple(t.shape) for t in x), dim=named.get("dim", 0)))
    if recorded and value.dtype != "host" and not (isinstance(x, QTensor) and value.scale is not None):
        return _typed(plan, value, value.shape)
    on_meta = tree_map(lambda a: META if isinstance(a, torch.device) else a, (args, kwargs))
    return run_function(step.target, *on_meta)


_ARGUMENTS = {
    "max_pool": "input kernel_size stride padding dilation ceil_mode return_indices",
    "adaptive_max_pool": "input output_size return_indices",
    "interpolate": INTERPOLATE,
}


def call_of(target: str, args: Any, kwargs: Any) -> tuple[str, int, dict[str, Any]] | None:
    """A call of a pool or of `interpolate`: its family, its dimensions (0: by its input) and its arguments but the input."""
    name = target.rpartition(".")[2]
    family, dims = (name[:-2], int(name[-2])) if name[-2:] in ("1d", "2d", "3d") else (name, 0)
    if family not in _ARGUMENTS:
        return None
    named = dict(zip(_ARGUMENTS[family].split(), args, strict=False)) | kwargs
    named.pop("input", None)
    return family, dims, named
