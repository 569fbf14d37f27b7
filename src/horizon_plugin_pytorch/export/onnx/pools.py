"""Pools and reductions on float32 tensors; `sizes` are theirs, None where a size varies.

ONNX's `ceil_mode` counts a last window that begins in the padding, which PyTorch leaves out, and older runtimes disagree about what it
divides by. So it is used only where no such window can be, and otherwise the padding at the end is written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from horizon_plugin_pytorch.backends.reference import pooling
from horizon_plugin_pytorch.backends.reference.shapes import as_tuple
from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx.graph import Graph
from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize, Sizes


def _batched(graph: Graph, x: str, sizes: Sizes, dims: int) -> tuple[str, Sizes, bool]:
    if len(sizes) == dims + 2:
        return x, sizes, False
    return graph.op("Unsqueeze", x, graph.constant([0])), (1, *sizes), True


def _unbatched(graph: Graph, y: str, added: bool) -> str:
    return graph.op("Squeeze", y, graph.constant([0])) if added else y


def _ends(sizes: Sizes, reach: Sequence[int], steps: Sequence[int], pads: Sequence[int], what: str) -> list[int] | None:
    """The padding at the end that gives `ceil_mode`'s windows without it; None where `ceil_mode` itself does."""
    if all(s + p <= r for r, s, p in zip(reach, steps, pads, strict=True)):
        return None
    ends = []
    for n, r, s, p in zip(sizes[-len(reach) :], reach, steps, pads, strict=True):
        if n is None:
            raise NeedsFixedSize(f"{what} with ceil_mode, a kernel of {r}, stride {s} and padding {p}")
        count = len(pooling.windows(n, r, s, p, True).start)
        ends.append(max((count - 1) * s + r - n - p, 0))
    return ends


def maximum(
    graph: Graph, x: str, sizes: Sizes, path: str, dims: int, kernel_size: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> str:  # fmt: skip
    """`torch.nn.functional.max_pool2d` and its kin."""
    if return_indices:
        raise ExportError("the indices of a max pool have no form here: let the model use the values alone")
    kernel, dilated, pads = as_tuple(kernel_size, dims), as_tuple(dilation, dims), as_tuple(padding, dims)
    steps = as_tuple(stride or kernel, dims)
    x, sizes, added = _batched(graph, x, sizes, dims)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilated, strict=True)]
    ends = _ends(sizes, reach, steps, pads, "a max pool") if ceil_mode else list(pads)
    y = graph.op(
        "MaxPool", x, kernel_shape=list(kernel), strides=list(steps), pads=[*pads, *(pads if ends is None else ends)],
        dilations=list(dilated) if any(d > 1 for d in dilated) else None, ceil_mode=1 if ends is None else None, name=path,
    )  # fmt: skip
    return _unbatched(graph, y, added)


def average(
    graph: Graph, x: str, sizes: Sizes, path: str, dims: int, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> str:  # fmt: skip
    """`torch.nn.functional.avg_pool2d` and its kin."""
    kernel, pads = as_tuple(kernel_size, dims), as_tuple(padding, dims)
    steps = as_tuple(stride or kernel, dims)
    x, sizes, added = _batched(graph, x, sizes, dims)
    counted = count_include_pad or divisor_override is not None
    if ceil_mode and counted and any(pads):
        # the padding counts, what lies behind it does not: the padding is written out, and then there is none
        if any(s + p > k for k, s, p in zip(kernel, steps, pads, strict=True)):
            raise ExportError(
                "an average pool with ceil_mode whose last window could begin in the padding: pad its input instead"
            )
        x = graph.op("Pad", x, graph.constant([0, 0, *pads, 0, 0, *pads]))
        pads = (0,) * dims
    ends = _ends(sizes, kernel, steps, pads, "an average pool") if ceil_mode else list(pads)
    if divisor_override is not None and ceil_mode:
        raise ExportError("an average pool with both ceil_mode and divisor_override has no form in ONNX: leave one out")
    y = graph.op(
        "AveragePool", x, kernel_shape=list(kernel), strides=list(steps), pads=[*pads, *(pads if ends is None else ends)],
        ceil_mode=1 if ends is None else None, count_include_pad=1 if counted and any(pads) else None, name=path,
    )  # fmt: skip
    if divisor_override is not None:
        y = graph.op("Mul", y, graph.scalar(prod(kernel) / divisor_override))
    return _unbatched(graph, y, added)


def _parts(sizes: Sizes, dims: int, output_size: Any) -> list[int]:
    """How many parts an adaptive pool makes along each dimension; 0 for as many as there are elements."""
    wanted = (output_size,) * dims if isinstance(output_size, int) else tuple(output_size)
    parts = [0 if w is None or w == n else int(w) for w, n in zip(wanted, sizes[-dims:], strict=True)]
    for n, w in zip(sizes[-dims:], parts, strict=True):
        if n is None and w > 1:
            raise NeedsFixedSize(f"an adaptive pool to {wanted}")
    return parts


def adaptive_average(graph: Graph, x: str, sizes: Sizes, path: str, dims: int, output_size: Any) -> str:
    """The whole as GlobalAveragePool, equal parts as AveragePool, others as products with matrices that average."""
    parts = _parts(sizes, dims, output_size)
    x, sizes, added = _batched(graph, x, sizes, dims)
    spatial = sizes[-dims:]
    y = _equal_parts(graph, x, spatial, parts, path, "Average")
    if y is None:
        y = x
        for axis, (n, w) in enumerate(zip(spatial, parts, strict=True), start=2):
            if w == 0:
                continue
            if w == 1:
                y = reduce(graph, "ReduceMean", y, dims + 2, (axis,), True)
                continue
            assert n is not None
            y = _matrix_along(graph, y, _averages(n, w), axis, dims + 2)
    return _unbatched(graph, y, added)


def _equal_parts(graph: Graph, x: str, spatial: Sizes, parts: list[int], path: str, kind: str) -> str | None:
    """The pool of the whole, of nothing, or of parts of one size; None for others."""
    if all(w == 1 or (w == 0 and n == 1) for n, w in zip(spatial, parts, strict=True)):
        return graph.op(f"Global{kind}Pool", x, name=path)
    if not any(parts):
        return graph.op("Identity", x, name=path)
    if None in spatial or any(n % (w or n) for n, w in zip(spatial, parts, strict=True)):  # type: ignore[operator]
        return None
    kernel = [n // (w or n) for n, w in zip(spatial, parts, strict=True)]  # type: ignore[operator]
    return graph.op(f"{kind}Pool", x, kernel_shape=kernel, strides=kernel, name=path)


def _averages(n: int, parts: int) -> Any:
    """``[parts, n]``: each row averages one part."""
    (window,) = pooling.adaptive_windows([n], parts)
    rows = np.zeros((parts, n), np.float32)
    for row, start, stop in zip(rows, window.start.tolist(), window.stop.tolist(), strict=True):
        row[start:stop] = 1 / (stop - start)
    return rows


def _matrix_along(graph: Graph, x: str, matrix: Any, axis: int, rank: int) -> str:
    """``matrix @ x`` along one dimension."""
    order = [d for d in range(rank) if d != axis] + [axis]
    moved = graph.op("Transpose", x, perm=order) if axis != rank - 1 else x
    y = graph.op("MatMul", moved, graph.constant(matrix.T, np.float32))
    return graph.op("Transpose", y, perm=list(np.argsort(order))) if axis != rank - 1 else y


def adaptive_maximum(
    graph: Graph, x: str, sizes: Sizes, path: str, dims: int, output_size: Any, return_indices: bool = False
) -> str:
    parts = _parts(sizes, dims, output_size)
    if return_indices:
        raise ExportError("the indices of a max pool have no form here: let the model use the values alone")
    x, sizes, added = _batched(graph, x, sizes, dims)
    spatial = sizes[-dims:]
    y = _equal_parts(graph, x, spatial, parts, path, "Max")
    if y is None:
        raise (
            NeedsFixedSize(f"an adaptive max pool of {spatial} to {output_size}")
            if None in spatial
            else ExportError(
                f"an adaptive max pool of {spatial} to {output_size}, parts of several sizes, has no form in ONNX: choose a size that divides"
            )
        )
    return _unbatched(graph, y, added)


def reduce(
    graph: Graph, kind: str, x: str, rank: int, dim: Any, keepdim: bool = False, *, name: str | None = None
) -> str:
    """A reduction over dimensions; over all of them where `dim` is None."""
    if dim is None:
        axes = list(range(rank))
    else:
        axes = sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim)) or list(range(rank))
    if kind == "ReduceMean" and keepdim and rank > 2 and axes == list(range(2, rank)):
        return graph.op("GlobalAveragePool", x, name=name)
    as_input = graph.opset >= (13 if kind == "ReduceSum" else 18)
    if as_input:
        return graph.op(kind, x, graph.constant(axes), keepdims=int(keepdim), name=name)
    return graph.op(kind, x, axes=axes, keepdims=int(keepdim), name=name)
