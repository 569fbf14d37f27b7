"""`Plan`: steps, values and constants, as plain data.

A step computes one value from others. Its arguments are nested lists of plain values in which `Ref` stands for another value and
`Const` for a tensor of the plan. Kinds of steps:

| kind | what it does | parameters |
|---|---|---|
| `quantize` | float to integers | `scale`, `dtype` |
| `group` | a fused group on integers | geometry, `weight`, `bias`, `m`, `residual_ratio`, `bound`, activation, `dtype` |
| `operator` | add, mul, cat or a pool on integers | its arguments, `scale`, `dtype` |
| `table` | an elementwise function on integers | `table`, `scale`, `dtype` |
| `dequantize` | integers to float32 | |
| `function` | a PyTorch function: moves integers, or computes in float, or on shapes | `target` |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from horizon_plugin_pytorch.plan.runner import Runner

Kind = Literal["quantize", "group", "operator", "table", "dequantize", "function"]
KINDS: tuple[Kind, ...] = ("quantize", "group", "operator", "table", "dequantize", "function")


class PlanError(ValueError):
    """A model that cannot be recorded, a plan that is not valid, or a call that does not fit one."""


@dataclass(frozen=True)
class Ref:
    """The value of this index, as an argument of a step."""

    value: int


@dataclass(frozen=True)
class Const:
    """The constant of this name, as an argument of a step."""

    name: str


@dataclass(frozen=True)
class Value:
    """What a step makes, or an input.

    Attributes:
        name: of the module or function it comes from.
        dtype: ``int8`` or ``uint8`` with a scale, another dtype's name, or ``host`` for what is no tensor (a size, a tuple).
        shape: as recorded; other shapes run, too.
        scale: name of the constant that holds its scale, for integers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    scale: str | None = None


@dataclass(frozen=True)
class Step:
    """One operation; its result is the value ``inputs + its position``."""

    kind: Kind
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Plan:
    """A program: `inputs` first among `values`, then one value per step.

    Attributes:
        inputs: names of the model's arguments, in order.
        outputs: nested tuples, lists and dicts of `Ref` as the model returns them.
        constants: tensors by name.
        model: name of the model's class.
    """

    model: str
    inputs: tuple[str, ...]
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: Any
    constants: dict[str, Tensor]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = all(getattr(self, n) == getattr(other, n) for n in ("model", "inputs", "values", "steps", "outputs"))
        a, b = self.constants, other.constants
        return same and a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)

    __hash__ = None  # type: ignore[assignment]

    def result(self, step: int) -> Value:
        """The value that a step makes."""
        return self.values[len(self.inputs) + step]

    @property
    def int8_bytes(self) -> int:
        """Bytes of the int8 weights."""
        return sum(t.numel() for n, t in self.constants.items() if t.dtype == torch.int8 and n.endswith(".weight"))

    def summary(self) -> str:
        """A line per step: what it is, its inputs, its output's dtype and shape."""
        lines = [f"{self.model}: {len(self.steps)} steps, {self.int8_bytes / 1e6:.2f} MB of int8 weights"]
        for i, name in enumerate(self.inputs):
            lines.append(f"  %{i} = input {name}: {_type(self.values[i])}")
        for i, step in enumerate(self.steps):
            used = ", ".join(f"%{r.value}" for r in refs((step.args, step.kwargs)))
            what = step.target or step.kind
            lines.append(f"  %{len(self.inputs) + i} = {what}({used})  # {step.name}: {_type(self.result(i))}")
        lines.append(f"  return {', '.join(f'%{r.value}' for r in refs(self.outputs))}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, with the program as JSON in its header."""
        from horizon_plugin_pytorch.plan.store import save

        save(self, path)

    def compile(self, backend: str = "auto", threads: int | None = None) -> Runner:
        """A callable that runs the plan.

        Args:
            backend: ``cpu`` for the native kernels, ``reference`` for PyTorch, or ``auto``: the kernels where they were built and the
                inputs are on the CPU, otherwise the reference; `Runner.report` says which, and why.
            threads: how many threads it uses; None: as many as PyTorch is set to.

        Raises:
            PlanError: no such backend here.
        """
        from horizon_plugin_pytorch.plan.runner import Runner

        return Runner(self, backend, threads)

    def as_module(self) -> nn.Module:
        """The plan as a module that `torch.compile` and `torch.export` see as one operator, `horizon::run_plan`.

        Its buffers are the constants. Integer outputs come as the float32 values they stand for. On the CPU it runs on the
        kernels of the backend ``auto``, with as many threads as PyTorch is set to.

        Raises:
            PlanError: an output is not a tensor.
        """
        from horizon_plugin_pytorch.plan.module import PlanModule

        return PlanModule(self)


def _type(value: Value) -> str:
    shape = "×".join(map(str, value.shape))
    return f"{value.dtype}[{shape}]" if value.dtype != "host" else "host"


def refs(arguments: Any) -> list[Ref]:
    """All references in nested arguments, in order."""
    if isinstance(arguments, Ref):
        return [arguments]
    if isinstance(arguments, dict):
        return [r for a in arguments.values() for r in refs(a)]
    if isinstance(arguments, slice):
        return refs((arguments.start, arguments.stop, arguments.step))
    if isinstance(arguments, (tuple, list)):
        return [r for a in arguments for r in refs(a)]
    return []
