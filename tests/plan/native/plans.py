"""Plans made by hand, of few steps on random integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan import Plan, Step, Value
from horizon_plugin_pytorch.plan.native import tuning
from horizon_plugin_pytorch.plan.native.constants import Constants
from horizon_plugin_pytorch.plan.native.execution import NativeProgram
from horizon_plugin_pytorch.plan.program import Const, Ref
from horizon_plugin_pytorch.plan.steps import fill, run_step

RANGES = {"int8": (-128, 128), "uint8": (0, 256)}


class Maker:
    """Adds steps one by one; values are `Ref`."""

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        self.inputs = tuple(inputs)
        # recorded at another size, so that no recorded shape is taken for granted
        self.values = [Value(name, "float32", (0,) * len(shape)) for name, shape in inputs.items()]
        self.steps: list[Step] = []
        self.constants: dict[str, Tensor] = {}

    def constant(self, tensor: Tensor) -> Const:
        name = f"c{len(self.constants)}.weight" if tensor.dtype == torch.int8 else f"c{len(self.constants)}"
        self.constants[name] = tensor
        return Const(name)

    def add(self, step: Step, dtype: str, scale: Const | None = None) -> Ref:
        self.steps.append(step)
        self.values.append(Value(step.name, dtype, (0,), None if scale is None else scale.name))
        return Ref(len(self.values) - 1)

    def quantize(self, x: int, dtype: str, scale: Tensor | float = 1.0) -> Ref:
        s = self.constant(torch.as_tensor(scale, dtype=torch.float32))
        return self.add(Step("quantize", f"quantize{x}", (Ref(x),), params={"scale": s, "dtype": dtype}), dtype, s)

    def group(
        self,
        x: Ref,
        geometry: Geometry,
        weight: Tensor,
        *,
        residual: Ref | None = None,
        activation: str | None = None,
        dtype: str | None = "int8",
        spread: float = 1.0,
        output_size: Any = None,
        scale: Tensor | None = None,
    ) -> Ref:
        channels = weight.shape[geometry.weight_axis] * (geometry.groups if geometry.transposed else 1)
        terms = weight.numel() / channels
        params: dict[str, Any] = {
            "geometry": dataclasses.asdict(geometry),
            "activation": activation,
            "weight": self.constant(weight),
            "bias": self.constant(torch.randint(-3000, 3000, (channels,), dtype=torch.int32)),
            "m": self.constant((torch.rand(channels) + 0.5) * spread / (80 * terms**0.5)),
            "bound": self.constant(
                torch.tensor(90.3) if scale is None else torch.full((channels,), 90.3) + torch.rand(channels)
            ),
        }
        if residual is not None:
            params["residual_ratio"] = self.constant(torch.tensor(0.7303))
        s = None
        if dtype is not None:
            s = self.constant(torch.tensor(0.05) if scale is None else scale)
            params |= {"scale": s, "dtype": dtype}
        if output_size is not None:
            params["output_size"] = output_size
        args = (x,) if residual is None else (x, residual)
        return self.add(Step("group", f"group{len(self.steps)}", args, params=params), dtype or "float32", s)

    def operator(self, name: str, args: tuple[Ref, ...], dtype: str, scale: float = 1.0, **options: Any) -> Ref:
        s = self.constant(torch.tensor(scale))
        params = {"name": name, "options": options, "scale": s, "dtype": dtype}
        return self.add(Step("operator", f"{name}{len(self.steps)}", args, params=params), dtype, s)

    def function(self, target: str, *args: Any, of: Ref | None = None, **kwargs: Any) -> Ref:
        """`of`: the value whose integers it moves; None for a float or host result."""
        v = None if of is None else self.values[of.value]
        step = Step("function", f"{target}{len(self.steps)}", args, kwargs, target)
        return self.add(
            step, "float32" if v is None else v.dtype, None if v is None or v.scale is None else Const(v.scale)
        )

    def plan(self, outputs: Any) -> Plan:
        return Plan("Made", self.inputs, tuple(self.values), tuple(self.steps), outputs, self.constants)


def reference(plan: Plan, *inputs: Tensor) -> Any:
    values: list[Any] = list(inputs)
    for step in plan.steps:
        values.append(run_step(step, values.__getitem__, plan.constants))
    return fill(plan.outputs, values.__getitem__, plan.constants)


def program(plan: Plan, *inputs: Tensor, isa: int = 0, **how: Any) -> NativeProgram:
    return NativeProgram(plan, Constants(plan), inputs, isa, **how)


def native(
    plan: Plan, *inputs: Tensor, isa: int, threads: int = 1, way: tuning.Way | None = None
) -> tuple[Any, list[int]]:
    """The plan's outputs by the kernels, and the steps that ran in PyTorch; run twice, for an arena that holds old values.

    `way`: how its convolutions are done; None: as is usual.
    """
    made = program(plan, *inputs, isa=isa)
    for operation in made.lowered.builder.operations:
        if operation.kind == "conv" and way is not None:
            tuning.apply(operation, way)
    made(tuple(-x for x in inputs), threads)
    return made(inputs, threads), made.steps_in_torch


def differing(a: Any, b: Any) -> int:
    """Elements that differ; a shape or dtype that does counts as all of them."""
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        return sum(map(differing, a, b))
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return sum(differing(a[k], b[k]) for k in a)
    if not isinstance(a, torch.Tensor):
        return int(a != b)
    assert isinstance(a, QTensor) == isinstance(b, QTensor)
    if isinstance(a, QTensor):
        assert a.dtype8 == b.dtype8 and torch.equal(a.scale, b.scale)
        a, b = a.payload, b.payload
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), 1)
    return int((a != b).sum())


def integers(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Random integers of a dtype as float32: with scale 1 they are quantized to themselves."""
    lo, hi = RANGES[dtype]
    return torch.randint(lo, hi, shape).to(torch.float32)
