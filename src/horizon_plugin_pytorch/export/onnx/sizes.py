"""Values that are no tensors: sizes, and what a model computes with them.

What depends on no size that varies is a Python value, computed here. A size that varies is a `Dim`, and arithmetic on it becomes nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx.graph import Graph
from horizon_plugin_pytorch.export.onnx.lowering import Dim
from horizon_plugin_pytorch.export.onnx.shapes import Sizes

Size = int | Dim


def is_dynamic(arguments: Any) -> bool:
    """Whether a `Dim` is among nested arguments."""
    if isinstance(arguments, slice):
        return is_dynamic((arguments.start, arguments.stop, arguments.step))
    return any(
        isinstance(leaf, Dim) or (isinstance(leaf, slice) and is_dynamic(leaf)) for leaf in tree_leaves(arguments)
    )


def size_of(graph: Graph, tensor: str, sizes: Sizes) -> tuple[Size, ...]:
    """The sizes of a tensor: numbers, and a `Dim` for each that varies."""
    shape: list[str] = []

    def dim(d: int) -> Dim:
        if not shape:
            shape.append(graph.op("Shape", tensor))
        return Dim(graph.op("Gather", shape[0], graph.constant([d]), axis=0))

    return tuple(dim(d) if n is None else n for d, n in enumerate(sizes))


def as_vector(graph: Graph, sizes: Sequence[Any]) -> str:
    """Numbers and `Dim`s as one int64 tensor; neighbouring numbers are one initializer."""
    parts: list[str] = []
    numbers: list[int] = []
    for n in (*sizes, None):
        if isinstance(n, (bool, int)):
            numbers.append(int(n))
            continue
        if numbers:
            parts.append(graph.constant(numbers))
            numbers = []
        if isinstance(n, Dim):
            parts.append(n.tensor)
        elif n is not None:
            raise ExportError(f"{n!r} is not a size")
    if not parts:
        return graph.constant(np.zeros(0, np.int64))
    return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=0)


def shape_vector(graph: Graph, sizes: Sequence[Any]) -> str:
    """As `as_vector`, for Reshape: the only size that varies, if there is no other unknown, is what is left, -1."""
    unknown = [i for i, n in enumerate(sizes) if isinstance(n, Dim) or n == -1]
    if len(unknown) == 1:
        sizes = [-1 if i == unknown[0] else n for i, n in enumerate(sizes)]
    return as_vector(graph, sizes)


def _node(kind: str) -> Callable[[Graph, Any, Any], Dim]:
    def emit(graph: Graph, a: Any, b: Any) -> Dim:
        return Dim(graph.op(kind, *(x.tensor if isinstance(x, Dim) else graph.constant([_whole(x)]) for x in (a, b))))

    return emit


def _whole(x: Any) -> int:
    if isinstance(x, float) and not x.is_integer():
        raise ExportError(
            f"a size is computed with {x}: write it with whole numbers, or export with dynamic_size=False"
        )
    return int(x)


def _floor_division(graph: Graph, a: Any, b: Any) -> Dim:
    """Sizes are not negative, and there ONNX's division, towards zero, is Python's; of numbers that are, it is not."""
    if not isinstance(b, int) or b <= 0:
        raise ExportError("a size is divided by what is no positive number: export with dynamic_size=False")
    # floor(a / b) = (a - (a mod b)) / b, with Python's sign of mod, which is ONNX's
    rest = _node("Mod")(graph, a, b)
    return _node("Div")(graph, _node("Sub")(graph, a, rest), b)


ARITHMETIC: dict[str, Callable[[Graph, Any, Any], Dim]] = {
    "operator.add": _node("Add"),
    "operator.iadd": _node("Add"),
    "operator.sub": _node("Sub"),
    "operator.isub": _node("Sub"),
    "operator.mul": _node("Mul"),
    "operator.imul": _node("Mul"),
    "operator.floordiv": _floor_division,
    "operator.mod": _node("Mod"),
    "torch.add": _node("Add"),
    "torch.sub": _node("Sub"),
    "torch.mul": _node("Mul"),
}
