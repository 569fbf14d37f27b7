"""A model fused by name keeps its own forward: its graph is traced only to see who reads what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.tracing import FusionTracer, attributes_kept
from horizon_plugin_pytorch.nn.quantized.operators import Add, Cat, Elementwise, Mul, Operator
from horizon_plugin_pytorch.quantization import dataflow, forms, mutation
from horizon_plugin_pytorch.quantization.dataflow import Modules
from horizon_plugin_pytorch.quantization.flow import Candidate, OutputPlan, flow_of
from horizon_plugin_pytorch.quantization.qconfig import QConfig

_UNKNOWN = Elementwise(nn.Identity())  # nothing is known about the sign of its result
_METHODS: dict[str, Operator] = {
    "add": Add(), "add_relu": Add("relu"), "mul": Mul(), "cat": Cat(),
    **dict.fromkeys(("sub", "matmul", "add_scalar", "mul_scalar"), _UNKNOWN),
}  # fmt: skip


class _NameTracer(FusionTracer):
    """Records a call of a FloatFunctional's method as a call of the FloatFunctional."""

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with attributes_kept(root):
            for path, module in root.named_modules():
                if p.is_float_functional(module):
                    for method in _METHODS:
                        module.__dict__[method] = partial(self._call_functional, path, method)
            return super().trace(root, concrete_args)

    def _call_functional(self, path: str, method: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._interesting += 1
        proxy = self.create_proxy("call_module", path, args, kwargs)
        proxy.node.meta["method"] = method
        return proxy


@dataclass
class Outputs:
    """How the outputs of a model's modules are quantized.

    Attributes:
        plans: by path.
        left: modules that stay in float, and why.
        note: why nothing is known, if the forward cannot be traced.
    """

    plans: dict[str, OutputPlan] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    note: str | None = None


def outputs_of(model: nn.Module, qconfigs: Mapping[str, QConfig | None]) -> Outputs:
    """Trace a model to see how the outputs of its modules are to be quantized.

    Args:
        qconfigs: of every module with an integer form, by path.

    Raises:
        QuantizationError: a convolution or linear layer gets a float tensor, or a module works in place on a value that is read
            again later.
    """
    tracer = _NameTracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        name = type(model).__name__
        return Outputs(
            note=f"the forward of {name} cannot be traced, so outputs before a DeQuantStub are quantized, too: {reason}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates: dict[fx.Node, Candidate] = {}
    for node in graph.nodes:
        module = dataflow.module_of(node, modules)
        if module is None:
            continue
        path = str(node.target)
        if "method" in node.meta:
            candidates[node] = Candidate(qconfigs.get(path), _METHODS[node.meta["method"]])
        elif forms.quantizable(module):
            candidates[node] = Candidate(qconfigs.get(path), forms.operator_of(module))
    floats = dataflow.float_values(graph, modules)
    flow = flow_of(graph, modules, candidates, floats, {}, has_stubs=True, resumes=False)
    _refuse_late_reads(graph, modules, flow.integer)
    plans: dict[str, OutputPlan] = {}
    for node in (*candidates, *flow.quantized):
        path, plan = str(node.target), flow.plans.get(node, OutputPlan())
        # Called in several ways: nothing is assumed.
        plans[path] = plan if plans.get(path, plan) == plan else OutputPlan()
    called = {id(modules[str(n.target)]) for n in graph.nodes if n.op == "call_module"}
    whole = tuple(f"{path}." for path in tracer.left_whole)
    unused = [path for path in qconfigs if id(modules[path]) not in called and not path.startswith(whole)]
    left = dict.fromkeys(unused, "the forward does not call it")
    for node, own in candidates.items():
        path = str(node.target)
        if node in flow.quantized or own.qconfig is None:
            continue
        if own.is_anchor:
            raise QuantizationError(
                f"prepare_qat: {path!r} gets a float tensor, but computes in integers: put a QuantStub before it, or leave it in float "
                "with qconfig None"
            )
        if not any(str(n.target) == path for n in flow.quantized):
            left[path] = flow.reasons[node]
    return Outputs(plans, left)


def _refuse_late_reads(graph: fx.Graph, modules: Modules, integer: set[fx.Node]) -> None:
    for reads in mutation.late_reads(graph, modules).values():
        for read in reads:
            if read.value in integer and read.writer.op == "call_module" and not read.writer.meta.get("overwrites"):
                raise QuantizationError(
                    f"prepare_qat: {str(read.writer.target)!r} works in place on a value that {read.reader.name!r} reads afterwards; "
                    "integers are not changed in place, so construct it with inplace=False"
                )
