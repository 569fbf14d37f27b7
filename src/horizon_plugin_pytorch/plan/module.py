"""A plan as an operator of PyTorch, and as a module that calls it.

`horizon::run_plan` takes everything it needs as arguments: the program as JSON, the constants and the inputs as tensors. So a graph that
calls it, from `torch.compile` or `torch.export`, can be saved and loaded in another process that imports this module.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import dequantize
from horizon_plugin_pytorch.plan.functions import resolve
from horizon_plugin_pytorch.plan.program import Plan, PlanError, Ref, Step, refs
from horizon_plugin_pytorch.plan.runner import Runner
from horizon_plugin_pytorch.plan.steps import OPERATORS, fill
from horizon_plugin_pytorch.plan.store import from_json, to_json

_MOST_RUNNERS = 8
_runners: OrderedDict[Any, Runner] = OrderedDict()
_lock = threading.Lock()


class PlanModule(nn.Module):
    """`plan` as a module; made by `Plan.as_module`.

    Attributes:
        program: the plan's JSON.
        structure: nested tuples, lists and dicts of the outputs' numbers.
        constants: the names of the constants, one a line.

    Buffers:
        constant_0, constant_1, …: the plan's constants, in the order of their names.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        require_tensors(plan)
        self.program = to_json(plan)
        for i, name in enumerate(sorted(plan.constants)):
            self.register_buffer(f"constant_{i}", plan.constants[name])
        self.constants = "\n".join(sorted(plan.constants))
        self.count = len(plan.constants)
        self.names = plan.inputs
        numbers = iter(range(len(refs(plan.outputs))))
        self.structure = tree_map(lambda leaf: next(numbers), plan.outputs)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Tensors in and out as the model's; floats in the place of integers with a scale."""
        constants = [getattr(self, f"constant_{i}") for i in range(self.count)]
        ordered = [*inputs, *(named[name] for name in self.names[len(inputs) :])]
        outputs = torch.ops.horizon.run_plan(ordered, constants, self.constants, self.program)
        return _filled(self.structure, outputs)

    def extra_repr(self) -> str:
        return f"inputs={', '.join(self.names)}, constants={self.count}"


def require_tensors(plan: Plan) -> None:
    """Raise PlanError if an output is not a tensor."""
    hosts = [plan.values[r.value].name for r in refs(plan.outputs) if plan.values[r.value].dtype == "host"]
    if hosts or not all(isinstance(leaf, Ref) for leaf in tree_leaves(plan.outputs)):
        raise PlanError(f"{plan.model} returns what is not a tensor{': ' * bool(hosts)}{', '.join(hosts)}")


def _filled(structure: Any, outputs: Sequence[Tensor]) -> Any:
    if isinstance(structure, dict):
        return {key: _filled(part, outputs) for key, part in structure.items()}
    if isinstance(structure, (tuple, list)):
        return type(structure)([_filled(part, outputs) for part in structure])
    return outputs[structure]


@torch.library.custom_op("horizon::run_plan", mutates_args=())
def run_plan(inputs: Sequence[Tensor], constants: Sequence[Tensor], names: str, program: str) -> list[Tensor]:
    """The outputs of a plan, in the order in which it names them.

    Args:
        inputs: as the model takes them.
        constants: the plan's.
        names: theirs, one a line.
        program: its JSON, from `plan.store.to_json`.

    Raises:
        PlanError: the program is not valid, or does not fit its constants or inputs.
    """
    outputs = []
    taken = {t.untyped_storage().data_ptr() for t in (*inputs, *constants)}
    for y in tree_leaves(_runner(names, program, constants)(*inputs)):
        # tensors of an operator's own, laid out as its callers are told, whatever the backend
        y = dequantize(y).contiguous()
        outputs.append(y.clone() if y.untyped_storage().data_ptr() in taken else y)
        taken.add(outputs[-1].untyped_storage().data_ptr())
    return outputs


def _runner(names: str, program: str, constants: Sequence[Tensor]) -> Runner:
    """The last few runners are kept. They hold on to their constants, whose addresses therefore name nothing else."""
    versions = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in constants)
    key = (names, program, versions)
    with _lock:
        if key not in _runners:
            _runners[key] = Runner(_plan(names, program, constants))
            while len(_runners) > _MOST_RUNNERS:
                _runners.popitem(last=False)
        _runners.move_to_end(key)
        return _runners[key]


@run_plan.register_fake
def _(inputs: Sequence[Tensor], constants: Sequence[Tensor], names: str, program: str) -> list[Tensor]:
    plan = _plan(names, program, constants, check=False)
    values: list[Any] = list(inputs)
    for i, step in enumerate(plan.steps):
        values.append(_shaped(plan, i, step, values))
    return [inputs[0].new_empty(values[r.value].shape, dtype=_dtype(plan, r.value)) for r in refs(plan.outputs)]


def _plan(names: str, program: str, constants: Sequence[Tensor], check: bool = True) -> Plan:
    return from_json(program, dict(zip(names.splitlines(), constants, strict=True)), check)


def _dtype(plan: Plan, value: int) -> torch.dtype:
    known = plan.values[value]
    return torch.float32 if known.scale is not None else getattr(torch, known.dtype)


def _shaped(plan: Plan, i: int, step: Step, values: list[Any]) -> Any:
    """The result of a step where only shapes count, and may be symbols: integers travel as float32."""
    args = fill(step.args, values.__getitem__, plan.constants)
    if step.kind == "function":
        function = resolve(step.target)
        assert function is not None
        return function(*args, **fill(step.kwargs, values.__getitem__, plan.constants))
    if step.kind == "group":
        weight = plan.constants[step.params["weight"].name]
        output_size = fill(step.params.get("output_size"), values.__getitem__, plan.constants)
        y = Geometry(**step.params["geometry"]).differentiable(args[0].float(), weight.float(), output_size)
        return y + args[1] if len(args) > 1 else y
    if step.kind == "operator":
        return OPERATORS[step.params["name"]](**step.params["options"]).float(*args)
    return args[0].float()
