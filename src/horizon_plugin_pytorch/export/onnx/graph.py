"""An ONNX graph being written: nodes, initializers, names, and the lowest opset that has everything used so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

LOWEST_OPSET, HIGHEST_OPSET = 13, 21


class NeedsOpset(Exception):
    """Something needs a higher opset than the one being written for; the graph is then written again."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset)
        self.opset = opset


class Graph:
    """Nodes in the order they are added; a tensor has the name of the node that makes it.

    Attributes:
        opset: the version of the operators that nodes are written for.
        scope: the step being written; names begin with it.
    """

    def __init__(self, opset: int = LOWEST_OPSET) -> None:
        self.opset = opset
        self.scope = ""
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Array] = {}
        self._names: set[str] = set()
        self._helpers: dict[Any, str] = {}

    def require(self, opset: int) -> None:
        """Raise `NeedsOpset` if operators of `opset` cannot be used yet."""
        if opset > self.opset:
            raise NeedsOpset(opset)

    def reserve(self, name: str) -> str:
        """`name`, or with a number behind it where it is taken."""
        unique, n = name, 1
        while unique in self._names:
            unique, n = f"{name}_{n}", n + 1
        self._names.add(unique)
        return unique

    def ops(
        self, kind: str, inputs: Sequence[str], outputs: int, *, name: str | None = None, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs and return their names; an attribute that is None is left out."""
        base = self.reserve(name or f"{self.scope}.{kind.lower()}")
        made = [base] if outputs == 1 else [self.reserve(f"{base}.{i}") for i in range(outputs)]
        given = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=base, **given))
        return made

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.ops(kind, inputs, 1, name=name, **attributes)[0]

    def initializer(self, name: str, value: ArrayLike, dtype: Any = None) -> str:
        """A tensor of the model under its own name; the same one again is the same initializer."""
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        known = self.initializers.get(name)
        if (
            known is not None
            and known.dtype == array.dtype
            and known.shape == array.shape
            and known.tobytes() == array.tobytes()
        ):
            return name
        unique = self.reserve(name)
        self.initializers[unique] = array
        return unique

    def constant(self, value: ArrayLike, dtype: Any = np.int64) -> str:
        """A tensor that belongs to no module, e.g. a shape; one initializer per content."""
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._helpers:
            text = "_".join(map(str, array.ravel().tolist())) if array.size <= 4 else str(len(self._helpers))
            kind = f"{array.dtype}" + (f"[{len(array)}]" if array.ndim == 1 else "")
            self._helpers[key] = self.initializer(f"constant.{kind}.{text}", array)
        return self._helpers[key]

    def scalar(self, value: float) -> str:
        """A float32 number."""
        return self.constant(value, np.float32)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name everywhere; the node that makes it keeps its own."""
        self._names.add(new)
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new

    def prune(self, outputs: Sequence[str]) -> None:
        """Drop the nodes that no output needs."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        self.nodes = kept[::-1]

    def tensors(self) -> list[onnx.TensorProto]:
        """The initializers that a node reads."""
        used = {name for node in self.nodes for name in node.input}
        return [numpy_helper.from_array(a, n) for n, a in self.initializers.items() if n in used]
