"""A plan as a `torch.export.ExportedProgram`, the ``.pt2`` of PyTorch: on ATen operators alone, or on ours."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.traced import TracedQTensor
from horizon_plugin_pytorch.nn.quantized.qtensor import dequantize
from horizon_plugin_pytorch.plan.module import require_tensors
from horizon_plugin_pytorch.plan.program import Plan, PlanError
from horizon_plugin_pytorch.plan.steps import fill, run_step

Ops = Literal["aten", "horizon"]


def to_torch_export(
    plan: Plan, *, ops: Ops = "aten", dynamic_batch: bool = True, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """The plan as an exported program. It takes the model's arguments and returns its outputs, integers as the float32 values they
    stand for, with 0 elements that differ from the plan's on the reference.

    `torch.export.save` writes it to a ``.pt2`` file; ``torch.export.load(path).module()`` is callable.

    Args:
        plan: from `horizon.plan.record` or `load`.
        ops: ``aten``: PyTorch's own operators, so that it runs, and can be compiled further, where this package is not installed.
            Weights are stored as int8; a convolution sums them in float64, which is exact, on any device and by any algorithm.
            ``horizon``: one operator, `horizon::run_plan`, on this package's kernels: the fast one. Who loads it imports
            `horizon_plugin_pytorch.plan.module` first.
        dynamic_batch: the first dimension of every input may have another size when it runs.
        dynamic_shapes: which sizes may be others, as `torch.export.export` takes them (a dict by names of inputs, or a tuple);
            then `dynamic_batch` does not count.

    Raises:
        ExportError: a step that cannot be exported, or not with these sizes left open, naming it; an output that is not a tensor.
    """
    if ops not in ("aten", "horizon"):
        raise ExportError(f"ops is 'aten' or 'horizon', not {ops!r}")
    fixed: list[str] = []  # the steps after which a size that was to stay open has a fixed value
    try:
        module = _Steps(plan, fixed.append) if ops == "aten" else plan.as_module()
    except PlanError as error:  # an output
        raise ExportError(f"{plan.model} cannot be exported: {error}") from None
    module.forward = _named(module.forward, plan.inputs)
    dynamic = _dynamic(plan, dynamic_batch) if dynamic_shapes is None else dynamic_shapes
    try:
        with torch.no_grad():
            program = torch.export.export(module, _examples(plan, dynamic), dynamic_shapes=dynamic, strict=False)
    except ExportError:
        raise
    except Exception as error:
        why = f"step {fixed[0]} fixes a size of an input: " if fixed else ""
        raise ExportError(f"{plan.model} cannot be exported with these sizes left open: {why}{error}") from error
    return _without_conversions(program)


def save(plan: Plan, path: str | Path, *, ops: Ops = "aten", dynamic_batch: bool = True) -> None:
    """Write `to_torch_export` of the plan to a file; one that is there is replaced only when the new one is complete.

    Raises:
        ExportError: see `to_torch_export`.
    """
    path = Path(path)
    part = path.with_name(f"{path.stem}.part.pt2")
    try:
        torch.export.save(to_torch_export(plan, ops=ops, dynamic_batch=dynamic_batch), part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Steps(nn.Module):
    """The plan's steps, one after the other; buffers are its constants, ``.`` in their names written ``/``.

    Args:
        say_fixed: called with every step after which a size that is a symbol in some input is fixed.
    """

    def __init__(self, plan: Plan, say_fixed: Callable[[str], None]) -> None:
        super().__init__()
        require_tensors(plan)
        self.plan = plan
        self.say_fixed = say_fixed
        self.constants = nn.Module()
        for name, tensor in plan.constants.items():
            self.constants.register_buffer(_key(name), tensor)

    def forward(self, *inputs: Tensor) -> Any:
        constants = {name: getattr(self.constants, _key(name)) for name in self.plan.constants}
        values: list[Any] = list(inputs)
        open_sizes = [(x, d) for x in inputs for d, size in enumerate(x.shape) if isinstance(size, torch.SymInt)]
        for i, step in enumerate(self.plan.steps):
            where = f"{i} ({step.name!r}, {step.target or step.kind})"
            try:
                values.append(run_step(step, values.__getitem__, constants, TracedQTensor.make))
            except Exception as error:
                raise ExportError(f"step {where} cannot be exported: {error}") from error
            if any(_is_fixed(x.shape[d]) for x, d in open_sizes):
                self.say_fixed(where)
        return dequantize(fill(self.plan.outputs, values.__getitem__, constants))


def _key(constant: str) -> str:
    return constant.replace(".", "/")


def _is_fixed(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) or size.node.expr.is_number


def _without_conversions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without what conversions that change nothing leave behind: half of the nodes, and they name the device of the export."""
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif getattr(node.target, "overloadpacket", None) is aten.to and not {"copy", "memory_format"} & set(
            node.kwargs
        ):
            x = node.args[0]
            before, after = x.meta["val"], node.meta["val"]
            if before.dtype == after.dtype and before.device == after.device:
                node.replace_all_uses_with(x)
                program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _named(forward: Callable[..., Any], inputs: Sequence[str]) -> Callable[..., Any]:
    """`forward` with the model's names of its inputs, which become the program's."""
    names: list[str] = []
    for name in inputs:
        name = re.sub(r"\W", "_", name) if not name.isidentifier() else name
        while keyword.iskeyword(name) or name[:1].isdigit() or name in names:
            name = f"_{name}"
        names.append(name)

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*signature.bind(*args, **kwargs).args)

    signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    named.__signature__ = signature  # type: ignore[attr-defined]
    return named


def _dynamic(plan: Plan, batch: bool) -> Any:
    shapes = [value.shape for value in plan.values[: len(plan.inputs)]]
    return tuple({0: torch.export.Dim("batch")} if batch and shape else {} for shape in shapes)


def _examples(plan: Plan, dynamic: Any) -> tuple[Tensor, ...]:
    """Inputs as recorded; a size of 1 that is to stay open is 2, for `torch.export` takes 0 and 1 for fixed."""
    examples = []
    for i, value in enumerate(plan.values[: len(plan.inputs)]):
        open_sizes = dynamic.get(plan.inputs[i]) if isinstance(dynamic, dict) else dynamic[i]
        wanted = dict(enumerate(open_sizes)) if isinstance(open_sizes, (tuple, list)) else open_sizes or {}
        shape = [2 if size == 1 and wanted.get(d) is not None else size for d, size in enumerate(value.shape)]
        examples.append(torch.zeros(shape, dtype=getattr(torch, value.dtype)))
    return tuple(examples)
