"""Functions that make fewer elements of many, or new ones from none."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx import pools
from horizon_plugin_pytorch.export.onnx.functions.call import Call, numpy_type
from horizon_plugin_pytorch.export.onnx.lowering import Dim
from horizon_plugin_pytorch.export.onnx.sizes import as_vector
from horizon_plugin_pytorch.plan.program import Const, Ref


def _reduction(kind: str) -> Callable[..., str]:
    def rule(c: Call, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
        after = c.low.shapes.meta(c.low.index).dtype
        x = c.cast(c.tensor(input), c.dtype(input) or after, after)
        return pools.reduce(c.graph, kind, x, c.rank(input), dim, keepdim, name=c.path)

    return rule


def _extreme(kind: str, argument: str, elementwise: str) -> Callable[..., Any]:
    """``max(x)``, ``max(x, other)``, and ``max(x, dim)``, which gives values and places."""

    def rule(c: Call, input: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
        if isinstance(dim, (Ref, Const)) or other is not None:
            return c.op(elementwise, *c.promoted(input, dim if other is None else other))
        values = pools.reduce(c.graph, kind, c.tensor(input), c.rank(input), dim, keepdim, name=c.path)
        return values if dim is None else (values, _places(argument)(c, input, dim, keepdim))

    return rule


def _places(kind: str) -> Callable[..., str]:
    def rule(c: Call, input: Any, dim: Any = None, keepdim: bool = False) -> str:
        x = c.tensor(input)
        if dim is None:
            flat = c.graph.op("Reshape", x, c.graph.constant([-1]))
            return c.graph.op(kind, flat, axis=0, keepdims=0)
        return c.graph.op(kind, x, axis=dim % c.rank(input), keepdims=int(keepdim))

    return rule


def var(
    c: Call, input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> str:
    """The mean of squares around the mean, times ``n / (n - correction)``."""
    x, rank, sizes = c.tensor(input), c.rank(input), c.sizes(input)
    dims = list(range(rank)) if dim is None else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    center = c.graph.op("Sub", x, pools.reduce(c.graph, "ReduceMean", x, rank, dims, True))
    y = pools.reduce(c.graph, "ReduceMean", c.graph.op("Mul", center, center), rank, dims, keepdim)
    away = (1 if unbiased else 0) if correction is None else correction
    if not away:
        return y
    if any(sizes[d] is None for d in dims):
        from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize

        raise NeedsFixedSize("an unbiased variance over a dimension that varies")
    n = prod(int(sizes[d] or 0) for d in dims)
    return c.graph.op("Mul", y, c.graph.scalar(n / (n - away)))


def std(
    c: Call, input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> str:
    return c.op("Sqrt", var(c, input, dim, unbiased, keepdim, correction=correction))


def norm(c: Call, input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
    kinds = {1: "ReduceL1", 2: "ReduceL2", "fro": "ReduceL2"}
    if p not in kinds:
        raise ExportError(f"a norm with p={p} has no form in ONNX: use 1 or 2")
    return pools.reduce(c.graph, kinds[p], c.tensor(input), c.rank(input), dim, keepdim, name=c.path)


def normalize(c: Call, input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> str:
    length = norm(c, input, int(p) if float(p).is_integer() else p, dim, True)
    return c.graph.op("Div", c.tensor(input), c.graph.op("Max", length, c.graph.scalar(eps)))


def cumsum(c: Call, input: Any, dim: int, dtype: Any = None) -> str:
    after = c.low.shapes.meta(c.low.index).dtype
    x = c.cast(c.tensor(input), c.dtype(input) or after, after)
    return c.op("CumSum", x, c.graph.constant(dim % c.rank(input)))


def topk(c: Call, input: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[str, ...]:
    count = c.fixed(k, "topk")
    axis = dim % c.rank(input)
    made = c.graph.ops(
        "TopK", [c.tensor(input), c.graph.constant([count])], 2, name=c.path, axis=axis, largest=int(largest), sorted=1
    )
    return tuple(made)


def sort(c: Call, input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[str, ...]:
    size = c.sizes(input)[dim]
    if size is None:
        from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize

        raise NeedsFixedSize("a sort along a dimension that varies")
    return topk(c, input, size, dim, largest=descending)


def arange(c: Call, *bounds: Any, dtype: Any = None, device: Any = None, **_: Any) -> str:
    start, stop, step = (0, *c.value(bounds), 1) if len(bounds) == 1 else (*c.value(bounds), 1)[:3]
    after = c.low.shapes.meta(c.low.index).dtype
    ends = [
        c.cast(c.low.tensor(n), torch.int64, after) if isinstance(n, Dim) else c.graph.constant(n, numpy_type(after))
        for n in (start, stop, step)
    ]
    return c.op("Range", *ends)


def _filled(value: float) -> Callable[..., str]:
    def rule(c: Call, *size: Any, **_: Any) -> str:
        return _constant(c, size, value)

    return rule


def full(c: Call, size: Any, fill_value: float, **_: Any) -> str:
    return _constant(c, (size,), fill_value)


def _new(value: float) -> Callable[..., str]:
    def rule(c: Call, input: Any, *size: Any, **_: Any) -> str:
        return _constant(c, size, value)

    return rule


def _constant(c: Call, size: Any, value: float) -> str:
    given = c.value(size)
    given = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    dtype = c.low.shapes.meta(c.low.index).dtype
    return c.op("Expand", c.graph.constant(value, numpy_type(dtype)), as_vector(c.graph, list(given)))


def meshgrid(c: Call, *tensors: Any, indexing: str = "ij") -> tuple[str, ...]:
    listed = list(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else list(tensors)
    if indexing == "xy" and len(listed) == 2:
        x, y = meshgrid(c, listed[1], listed[0])
        return y, x
    rank = len(listed)
    shaped = []
    for d, one in enumerate(listed):
        others = [i for i in range(rank) if i != d]
        shaped.append(c.graph.op("Unsqueeze", c.tensor(one), c.graph.constant(others)))
    shape = c.graph.op("Concat", *(c.graph.op("Shape", c.tensor(one)) for one in listed), axis=0)
    return tuple(c.graph.op("Expand", x, shape) for x in shaped)


RULES: dict[str, Callable[..., Any]] = {
    "mean": _reduction("ReduceMean"), "sum": _reduction("ReduceSum"), "amax": _reduction("ReduceMax"), "amin": _reduction("ReduceMin"),
    "max": _extreme("ReduceMax", "ArgMax", "Max"), "min": _extreme("ReduceMin", "ArgMin", "Min"), "argmax": _places("ArgMax"),
    "argmin": _places("ArgMin"), "var": var, "std": std, "norm": norm, "normalize": normalize, "cumsum": cumsum, "topk": topk, "sort": sort,
    "arange": arange, "zeros": _filled(0), "ones": _filled(1), "full": full, "new_zeros": _new(0), "new_ones": _new(1), "meshgrid": meshgrid,
}  # fmt: skip
