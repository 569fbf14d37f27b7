"""A model fused by name keeps its own forward: its graph is traced only to see who reads what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.tracing import FusionTracer
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
        with self._functionals_recorded(root):
            return super().trace(root, concrete_args)

    @contextmanager
    def _functionals_recorded(self, root: nn.Module) -> Iterator[None]:
        functionals = [(path, m) for path, m in root.named_modules() if p.is_float_functional(m)]
        for path, module in functionals:
            for method in _METHODS:
                module.__dict__[method] = partial(self._call_functional, path, method)
        try:
            yield
        finally:
            for _, module in functionals:
                for method in _METHODS:
                    del module.__dict__[method]

    def _call_functional(self, path: str, method: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._interesting += 1
        proxy = self.create_proxy("call_module", path, args, kwargs)
        proxy.node.meta["method"] = method
        return proxy


def output_plans(
    model: nn.Module, qconfigs: Mapping[str, QConfig | None]
) -> tuple[dict[str, OutputPlan], str | None]:
    """How the outputs of a model's modules are quantized, by path; and a note if its forward cannot be traced.

    Args:
        qconfigs: of every module with an integer form, by path.

    Raises:
        QuantizationError: a module works in place on a value that is read again later.
    """
    try:
        graph = _NameTracer().trace(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return {}, (
            f"the forward of {type(model).__name__} cannot be traced, so outputs before a DeQuantStub are quantized, too: {reason}"
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
        plans[path] = plan if plans.get(path, plan) == plan else OutputPlan()  # called in several ways: nothing is assumed
    return plans, None


def _refuse_late_reads(graph: fx.Graph, modules: Modules, integer: set[fx.Node]) -> None:
    for reads in mutation.late_reads(graph, modules).values():
        for read in reads:
            if read.value in integer and read.writer.op == "call_module" and not read.writer.meta.get("overwrites"):
                raise QuantizationError(
                    f"prepare_qat: {str(read.writer.target)!r} works in place on a value that {read.reader.name!r} reads afterwards; "
                    "integers are not changed in place, so construct it with inplace=False"
                )
