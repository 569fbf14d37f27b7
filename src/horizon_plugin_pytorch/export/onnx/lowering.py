"""From a plan to an ONNX graph: a walk over the steps.

Each value of the plan becomes, as its readers ask for them, up to three tensors of the graph: its integers, their float32 value, and for
scales per channel the value in units of the one scale that ONNX knows (`scales`). In the form ``float`` there are no integers at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx.graph import Array, Graph, NeedsOpset
from horizon_plugin_pytorch.export.onnx.scales import FLOAT32, Units, units_of
from horizon_plugin_pytorch.export.onnx.shapes import Shapes, Sizes
from horizon_plugin_pytorch.plan import Plan, Step
from horizon_plugin_pytorch.plan.program import Const, Ref


@dataclass(eq=False)
class Quantized:
    """A value of integers; names of the tensors of the graph that hold it, made when first asked for."""

    units: Units
    path: str
    integers: str | None = None
    scaled: str | None = None
    true: str | None = None


@dataclass(frozen=True)
class Dim:
    """A size that is known when the graph runs: an int64 tensor of one element, ``[1]``."""

    tensor: str


class Lowering:
    """One attempt to write `plan` for the opset of `graph`; raises `NeedsOpset` if that is too low."""

    def __init__(self, plan: Plan, shapes: Shapes, form: str, graph: Graph) -> None:
        self.plan, self.shapes, self.form, self.graph = plan, shapes, form, graph
        self.env: list[Any] = []
        self.index = 0
        self._units: dict[tuple[str, str], Units] = {}

    # -- values -------------------------------------------------------------------------------------------------------------

    def constant(self, name: str) -> Array:
        return self.plan.constants[name].numpy()

    def units(self, constant: Const | str, dtype: str) -> Units:
        name = constant.name if isinstance(constant, Const) else constant
        if (name, dtype) not in self._units:
            self._units[name, dtype] = units_of(self.plan, name, dtype)
        return self._units[name, dtype]

    def scale_tensor(self, units: Units) -> str:
        return self.graph.initializer(units.name, units.scale, FLOAT32)

    def zero_point(self, units: Units) -> str:
        """The integer that stands for 0. Operators on integers want one dtype, uint8, in which int8 is shifted by 128."""
        shifted = self.form == "qoperator" and units.dtype == "int8"
        return self.graph.initializer(
            f"zero_point.{'shifted' if shifted else units.dtype}",
            128 if shifted else 0,
            np.uint8 if shifted or units.dtype == "uint8" else np.int8,
        )

    def quantize(self, y: str, units: Units, path: str) -> Any:
        """A float32 tensor, in units of the one scale, as a value of integers; in the form ``float`` it stays one."""
        if self.form == "float":
            return Quantized(units, path, scaled=y, true=y)
        integers = self.graph.op(
            "QuantizeLinear", y, self.scale_tensor(units), self.zero_point(units), name=f"{path}.quantize"
        )
        return Quantized(units, path, integers=integers)

    def integers(self, value: Quantized) -> str:
        if value.integers is None:
            assert value.scaled is not None and self.form != "float"
            value.integers = self.quantize(value.scaled, value.units, value.path).integers
        assert value.integers is not None
        return value.integers

    def scaled(self, value: Any) -> str:
        """The value in units of the one scale: ``q * S``."""
        if not isinstance(value, Quantized):
            return self.tensor(value)
        if value.scaled is None:
            assert value.integers is not None
            value.scaled = self.graph.op(
                "DequantizeLinear", value.integers, self.scale_tensor(value.units), self.zero_point(value.units),
                name=f"{value.path}.dequantize",
            )  # fmt: skip
        return value.scaled

    def tensor(self, value: Any) -> str:
        """The value as a tensor of the graph: integers by their float32 value, numbers and constants as initializers."""
        if isinstance(value, str):
            return value
        if isinstance(value, Dim):
            return self.graph.op("Squeeze", value.tensor)
        if isinstance(value, Quantized):
            if value.units.channels is None or self.form == "float":
                return self.scaled(value)
            if value.true is None:
                factors = (value.units.exact / float(value.units.scale)).astype(FLOAT32)
                index = next(i for i, known in enumerate(self.env) if known is value)
                value.true = self.multiply_channels(self.scaled(value), factors, index, f"{value.path}.channels")
            return value.true
        if isinstance(value, Tensor):
            return self.graph.constant(value.numpy(), None)
        if isinstance(value, (bool, int, float)):
            return self.graph.constant(value, np.float32 if isinstance(value, float) else None)
        raise ExportError(f"a {type(value).__name__} where a tensor is needed")

    def multiply_channels(self, x: str, factors: Array, value: int, path: str) -> str:
        """`x`, which has the shape of a value of the plan, times one factor per channel, along dimension 1."""
        shape = (-1, *[1] * (len(self.shapes.of(value)) - 2))
        return self.graph.op("Mul", x, self.graph.initializer(f"{path}.factors", factors.reshape(shape)))

    def argument(self, x: Any) -> Any:
        """An argument of a step with what it refers to: values of the graph, tensors of the plan."""
        if isinstance(x, Ref):
            return self.env[x.value]
        if isinstance(x, Const):
            name = self.graph.initializer(x.name, self.constant(x.name))
            return name
        if isinstance(x, dict):
            return {k: self.argument(v) for k, v in x.items()}
        if isinstance(x, slice):
            return slice(*(self.argument(v) for v in (x.start, x.stop, x.step)))
        if isinstance(x, (tuple, list)):
            return type(x)(self.argument(v) for v in x)
        return x

    def sizes(self, ref: Any, item: int | None = None) -> Sizes:
        """The shape of what an argument refers to, None where it varies."""
        if isinstance(ref, Const):
            return tuple(self.constant(ref.name).shape)
        return self.shapes.of(ref.value, item)

    # -- the walk -----------------------------------------------------------------------------------------------------------

    def run(self, input_names: list[str], output_names: list[str] | None) -> list[str]:
        """Write everything; the names of the outputs."""
        for name in input_names:
            self.env.append(self.graph.reserve(name))
        for i, step in enumerate(self.plan.steps):
            self.index = len(self.plan.inputs) + i
            self.graph.scope = step.name
            try:
                self.env.append(self._step(step))
            except NeedsOpset:
                raise
            except ExportError as error:
                what = step.params.get("name", step.target or step.kind)
                raise type(error)(f"step {i} ({step.name!r}, {what}): {error}") from error.__cause__
        return self._outputs(output_names)

    def _step(self, step: Step) -> Any:
        from horizon_plugin_pytorch.export.onnx import functions, groups, integers, operators

        rules: dict[str, Callable[[Lowering, Step], Any]] = {
            "group": integers.group if self.form == "qoperator" else groups.group,
            "quantize": operators.quantize,
            "dequantize": operators.dequantize,
            "operator": operators.operator,
            "table": operators.table,
            "function": functions.function,
        }
        return rules[step.kind](self, step)

    def _outputs(self, names: list[str] | None) -> list[str]:
        """Give the outputs their names; one that is an input, or is returned twice, is copied."""
        found = named_outputs(self.plan, self.shapes)
        if names is None:
            names = unique([name for name, _, _ in found])
        if len(names) != len(found):
            raise ExportError(f"{self.plan.model} has {len(found)} outputs, but there are {len(names)} names for them")
        taken = set(self.env[: len(self.plan.inputs)]) | set(self.graph.initializers)
        done: list[str] = []
        for name, (_, ref, item) in zip(names, found, strict=True):
            self.graph.scope = name
            value = self.argument(ref)
            tensor = self.tensor(value if item is None else tree_leaves(value)[item])
            if name in self.env[: len(self.plan.inputs)]:
                raise ExportError(f"an output and an input cannot both be named {name!r}: give output_names")
            if tensor in taken:
                tensor = self.graph.op("Identity", tensor, name=f"{name}.identity")
            done.append(tensor)
            taken.add(tensor)
        for i, (tensor, name) in enumerate(zip(done, names, strict=True)):
            if tensor == name:
                continue
            if any(name in (*node.input, *node.output) for node in self.graph.nodes):
                self.graph.rename(name, self.graph.reserve(f"{name}.value"))
                done = [self.graph.reserve(name) if t == name else t for t in done]
            self.graph.rename(done[i], name)
        return names


def named_outputs(plan: Plan, shapes: Shapes) -> list[tuple[str, Ref, int | None]]:
    """For each tensor the model returns a name, the value that holds it, and its place there if that is a tuple.

    The name is its key in a dict, else the step that makes it.

    Raises:
        ExportError: an output is not a tensor.
    """
    found: list[tuple[str, Ref, int | None]] = []
    for path, leaf in tree_flatten_with_path(plan.outputs)[0]:
        parts = tree_leaves(shapes.meta(leaf.value)) if isinstance(leaf, Ref) else [leaf]
        if not all(isinstance(part, Tensor) for part in parts):
            if leaf is None:
                continue
            where = "".join(map(str, path)) or "the output"
            raise ExportError(
                f"{plan.model} returns what is not a tensor: {where}; only tensors can be outputs of an ONNX model"
            )
        keys = [str(k.key) for k in path if isinstance(k, torch.utils._pytree.MappingKey)]
        name = ".".join(keys) or plan.values[leaf.value].name.removesuffix(".dequantize")
        several = not isinstance(shapes.meta(leaf.value), Tensor)
        found += [(name, leaf, i if several else None) for i in range(len(parts))]
    return found


def unique(names: list[str]) -> list[str]:
    """The names, with numbers behind those that stand there again."""
    graph = Graph()
    return [graph.reserve(name) for name in names]


def element_type(meta: Any) -> int:
    """ONNX's number for a tensor's dtype; integers with a scale go out as float32."""
    from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor

    dtype = torch.float32 if isinstance(meta, QTensor) else meta.dtype
    if dtype == torch.bfloat16:
        return int(onnx.TensorProto.BFLOAT16)
    return int(onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype))
