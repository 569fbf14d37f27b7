"""Plans made by hand for export: with recorded shapes, which hand-made plans elsewhere leave open on purpose."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from horizon_plugin_pytorch.plan import Plan, Step, Value
from horizon_plugin_pytorch.plan.program import Const, Ref, refs
from horizon_plugin_pytorch.plan.steps import run_step
from plan.native import plans


def recorded(made: plans.Maker, outputs: Any, *inputs: Tensor) -> Plan:
    """The plan, as if it had been recorded with these inputs."""
    plan = made.plan(outputs)
    found: list[Any] = list(inputs)
    for step in plan.steps:
        found.append(run_step(step, found.__getitem__, plan.constants))
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in found]
    values = [dataclasses.replace(value, shape=shape) for value, shape in zip(plan.values, shapes, strict=True)]
    return dataclasses.replace(plan, values=tuple(values))


def apart(plan: Plan, *inputs: Tensor) -> tuple[Plan, tuple[Tensor, ...]]:
    """Every step that rounds, fed with the integers it has in the plan: what each of them does by itself, not what becomes of it after.

    Returns:
        a plan whose inputs are the operands of those steps and whose outputs are their integers, and its inputs, as float32.
    """
    values: list[Any] = list(inputs)
    for step in plan.steps:
        values.append(run_step(step, values.__getitem__, plan.constants))
    feeds: dict[int, Tensor] = {}
    wanted: list[tuple[Step, Value]] = []
    for i, step in enumerate(plan.steps):
        result = plan.result(i)
        if (
            step.kind in ("group", "operator", "table")
            and result.scale is not None
            and not step.params.get("output_size")
        ):
            wanted.append((step, result))
            feeds |= {r.value: values[r.value].dequantize() for r in refs(step.args)}
    order = list(feeds)
    made_values = [Value(f"input{v}", "float32", tuple(feeds[v].shape)) for v in order]
    steps = []
    for n, v in enumerate(order):
        known = plan.values[v]
        assert known.scale is not None
        params = {"scale": Const(known.scale), "dtype": known.dtype}
        steps.append(Step("quantize", f"operand{v}", (Ref(n),), params=params))
        made_values.append(known)
    at = {v: len(order) + n for n, v in enumerate(order)}
    for step, result in wanted:
        steps.append(dataclasses.replace(step, args=tuple(Ref(at[r.value]) for r in refs(step.args))))
        made_values.append(result)
    outputs = tuple(Ref(2 * len(order) + n) for n in range(len(wanted)))
    cut = Plan(
        plan.model,
        tuple(v.name for v in made_values[: len(order)]),
        tuple(made_values),
        tuple(steps),
        outputs,
        plan.constants,
    )
    return cut, tuple(feeds[v] for v in order)
