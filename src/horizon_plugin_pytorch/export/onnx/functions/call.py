"""What a rule for a function works with: the step it writes, and its arguments as tensors, sizes and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx.graph import Graph
from horizon_plugin_pytorch.export.onnx.lowering import Dim, Lowering, Quantized
from horizon_plugin_pytorch.export.onnx.scales import Units
from horizon_plugin_pytorch.export.onnx.shapes import Sizes
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan import Step
from horizon_plugin_pytorch.plan.program import Const, Ref


class Call:
    """One step; arguments are as the plan has them, `Ref` and `Const` for tensors.

    Attributes:
        units: those of the result where it is integers, whose operands then have them, too.
        in_integers: its nodes get the integers, not their value.
    """

    def __init__(self, low: Lowering, step: Step, units: Units | None, in_integers: bool) -> None:
        self.low, self.step, self.units, self.in_integers = low, step, units, in_integers
        self.graph: Graph = low.graph
        self.path = step.name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The node that bears the step's name."""
        return self.graph.op(kind, *inputs, name=self.path, **attributes)

    def tensor(self, argument: Any) -> str:
        return self.of(self.low.argument(argument))

    def of(self, value: Any) -> str:
        """What a value is here as a tensor of the graph."""
        if isinstance(value, Quantized) and self.units is not None:
            return self.low.integers(value) if self.in_integers else self.low.scaled(value)
        return self.low.tensor(value)

    def value(self, argument: Any) -> Any:
        """Numbers, `Dim`s, and lists of these."""
        return self.low.argument(argument)

    def fixed(self, argument: Any, what: str) -> Any:
        """A number or several that have to be known now."""
        from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize
        from horizon_plugin_pytorch.export.onnx.sizes import is_dynamic

        value = self.value(argument)
        if is_dynamic(value):
            raise NeedsFixedSize(what)
        return value

    def maker(self, argument: Any) -> Step | None:
        """The step that makes a value; None for an input or a constant."""
        first = len(self.low.plan.inputs)
        made = isinstance(argument, Ref) and argument.value >= first
        return self.low.plan.steps[argument.value - first] if made else None

    def meta(self, argument: Any) -> Any:
        if isinstance(argument, Const):
            return self.low.plan.constants[argument.name]
        return self.low.shapes.meta(argument.value)

    def sizes(self, argument: Any) -> Sizes:
        return self.low.sizes(argument)

    def rank(self, argument: Any) -> int:
        return len(self.sizes(argument))

    @property
    def result(self) -> Sizes:
        """The shape of the result."""
        return self.low.shapes.of(self.low.index)

    def dtype(self, argument: Any) -> torch.dtype | None:
        """Of a tensor, float32 for integers with a scale; None for a number."""
        if not isinstance(argument, (Ref, Const)) or not isinstance(self.meta(argument), Tensor):
            return None
        meta = self.meta(argument)
        return torch.float32 if isinstance(meta, QTensor) else meta.dtype

    def cast(self, tensor: str, of: torch.dtype, to: torch.dtype) -> str:
        return tensor if of == to else self.graph.op("Cast", tensor, to=onnx_type(to))

    def promoted(self, *arguments: Any, into: torch.dtype | None = None) -> list[str]:
        """Operands of one dtype: `into`, or the one that PyTorch computes in."""
        if into is None:
            into = _result_type([self._sample(a) for a in arguments])
        made = []
        for a in arguments:
            dtype = self.dtype(a)
            if dtype is not None:
                made.append(self.cast(self.tensor(a), dtype, into))
                continue
            value = self.value(a)
            if isinstance(value, Dim):
                made.append(self.cast(self.low.tensor(value), torch.int64, into))
            elif isinstance(value, (bool, int, float)):
                made.append(self.graph.constant(value, numpy_type(into)))
            else:
                raise ExportError(f"a {type(value).__name__} where a tensor or a number is needed")
        return made

    def _sample(self, argument: Any) -> Any:
        dtype = self.dtype(argument)
        if dtype is not None:
            return torch.empty((0,) * min(self.rank(argument), 1), dtype=dtype)
        value = self.value(argument)
        return 1 if isinstance(value, Dim) else value


def _result_type(samples: list[Any]) -> torch.dtype:
    result = samples[0]
    for other in samples[1:]:
        dtype = torch.result_type(result, other)
        dims = max(s.dim() if isinstance(s, Tensor) else -1 for s in (result, other))
        result = torch.empty((0,) * max(dims, 0), dtype=dtype)
    return result.dtype if isinstance(result, Tensor) else torch.tensor(result).dtype


def onnx_type(dtype: torch.dtype) -> int:
    if dtype == torch.bfloat16:
        return int(onnx.TensorProto.BFLOAT16)
    return int(onnx.helper.np_dtype_to_tensor_dtype(numpy_type(dtype)))


def numpy_type(dtype: torch.dtype) -> Any:
    return np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)
