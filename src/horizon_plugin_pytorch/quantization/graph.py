"""Deciding, on a graph, where integers flow and how each output is quantized; and putting it there."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.report import FusionReport
from horizon_plugin_pytorch.fusion.tracing import FusionTracer
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.operation import DeQuantStub, QuantStub
from horizon_plugin_pytorch.nn.quantized.functional import FloatOperator
from horizon_plugin_pytorch.quantization import dataflow
from horizon_plugin_pytorch.quantization.dataflow import OutputPlan, is_stub
from horizon_plugin_pytorch.quantization.modularize import modularize
from horizon_plugin_pytorch.quantization.prepare import operator_of, quantizable, to_qat
from horizon_plugin_pytorch.quantization.qconfig import QConfig, Resolver, default_qat_qconfig


@dataclass
class Flow:
    """Where integers flow in one graph.

    Attributes:
        quantized: nodes that compute on integers or make them.
        integer: nodes whose value is integers, passing ones included.
        plans: for each of `quantized`, how its output is quantized.
    """

    quantized: set[fx.Node] = field(default_factory=set)
    integer: set[fx.Node] = field(default_factory=set)
    plans: dict[fx.Node, OutputPlan] = field(default_factory=dict)


def flow_of(graph: fx.Graph, modules: dict[str, nn.Module], qconfigs: dict[fx.Node, QConfig | None], has_stubs: bool) -> Flow:
    """Follow integers through a graph.

    Args:
        qconfigs: for every node that has an integer form, its qconfig.
        has_stubs: the user placed QuantStubs: integers start there and nowhere else. Otherwise they start before every anchor.
    """
    flow = Flow()
    anchors = {n for n in qconfigs if n.op == "call_module" and operator_of(modules[str(n.target)]) is None}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        inputs = [n for n in node.all_input_nodes if not dataflow.is_query(n)]
        if module is not None and is_stub(module, "QuantStub"):
            flow.quantized.add(node)
            flow.integer.add(node)
        elif module is not None and is_stub(module, "DeQuantStub"):
            continue
        elif node in qconfigs:
            if qconfigs[node] is None:
                continue
            arrives = [n in flow.integer for n in inputs]
            if all(arrives) if has_stubs else (any(arrives) or node in anchors):
                flow.quantized.add(node)
                flow.integer.add(node)
        elif dataflow.passes(node, modules) and inputs and inputs[0] in flow.integer:
            flow.integer.add(node)

    for node in reversed(list(graph.nodes)):
        if node not in flow.quantized:
            continue
        readers = dataflow.readers(node, modules)
        module = modules[str(node.target)] if node.op == "call_module" else None
        stub = module is not None and is_stub(module, "QuantStub")
        if not stub and not any(reader in flow.quantized for reader, _, _ in readers):
            if node in anchors:
                flow.plans[node] = OutputPlan(high_precision=True)
            else:  # nobody needs its integers: it computes in float
                flow.quantized.discard(node)
                flow.plans[node] = OutputPlan(high_precision=True)
            _forget(flow, node, modules)
            continue
        depthwise = bool(readers) and all(
            kept and reader in flow.quantized and dataflow.is_depthwise_input(reader, read, modules) for reader, read, kept in readers
        )
        flow.plans[node] = OutputPlan(per_channel=depthwise and (node in anchors or stub))

    nonnegative: set[fx.Node] = set()
    for node in graph.nodes:
        if node in flow.quantized and node in flow.plans and not flow.plans[node].high_precision:
            if _is_nonnegative(node, modules, nonnegative):
                nonnegative.add(node)
                plan = flow.plans[node]
                flow.plans[node] = OutputPlan(plan.high_precision, plan.per_channel, True)
        elif node in flow.integer and dataflow.passes(node, modules) and node.args[0] in nonnegative:
            nonnegative.add(node)
    return flow


def _forget(flow: Flow, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """The value of `node` is float after all, and what passes it on."""
    flow.integer.discard(node)
    for user in node.users:
        if user in flow.integer and user not in flow.quantized and user.args and user.args[0] is node:
            _forget(flow, user, modules)


def _is_nonnegative(node: fx.Node, modules: dict[str, nn.Module], known: set[fx.Node]) -> bool:
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    if isinstance(module, FusedGroup):
        return module.pattern.activation in (p.RELU, p.RELU6)
    operator = operator_of(module)
    if operator is None:
        return False
    if operator.nonnegative is None:
        if getattr(operator, "activation", None):
            return True
        return all(n in known for n in node.all_input_nodes)
    return operator.nonnegative


# ---------------------------------------------------------------------------------------------------------------------------
# A model fused by name: its graph only tells


def output_plans(model: nn.Module) -> tuple[dict[str, OutputPlan], str | None]:
    """For the modules of a model with its own forward, by path; and a note if its graph is not known."""
    try:
        graph = FusionTracer().trace(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        note = f"the forward of {type(model).__name__} cannot be traced, so outputs before DeQuantStub are quantized, too: {reason}"
        return {}, note
    modules = dict(model.named_modules(remove_duplicate=False))
    qconfigs: dict[fx.Node, QConfig | None] = {}
    functional: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        owner, _, leaf = str(node.target).rpartition(".")
        if leaf == "activation_post_process" and p.is_float_functional(modules[owner]):
            # The functional's result: it computes what its argument node says.
            functional[node] = owner
            source: Any = node.args[0]
            node.args = (source,)
            qconfigs[node] = default_qat_qconfig
        elif quantizable(module):
            qconfigs[node] = default_qat_qconfig
    for node in functional:  # the function itself is part of it: let the observer's place read the operands
        source = node.args[0]
        operands = [n for n in source.all_input_nodes]
        if len(source.users) == 1:
            node.args = tuple(operands)
            graph.erase_node(source)
    shown = {**modules, **{str(n.target): FloatOperator(_ANY) for n in functional}}
    flow = flow_of(graph, shown, qconfigs, has_stubs=True)
    plans: dict[str, OutputPlan] = {}
    for node, plan in flow.plans.items():
        path = functional.get(node, str(node.target))
        plans[path] = plan if path not in plans else OutputPlan()  # called twice: no assumptions
    return plans, None


class _Any:
    """Stands for whichever operator a FloatFunctional computes: nothing is known about its sign."""

    nonnegative = None
    name = "functional"


_ANY: Any = _Any()


# ---------------------------------------------------------------------------------------------------------------------------
# A model fused by graph: it is rewritten


def prepare_graph(gm: fx.GraphModule, path: str, resolver: Resolver, report: FusionReport) -> list[str]:
    """Give a fused graph module its QAT forms, stubs where integers start and dequantization where they end.

    Returns:
        notes for the quantization report.
    """
    modularize(gm)
    _unshare(gm)
    graph = gm.graph
    modules = dict(gm.named_modules(remove_duplicate=False))
    parts = {group.name: group.modules for group in report.groups}
    qconfigs: dict[fx.Node, QConfig | None] = {}
    for node in graph.nodes:
        if node.op == "call_module" and quantizable(modules[str(node.target)]):
            module = modules[str(node.target)]
            name = f"{path}.{node.target}" if path else str(node.target)
            types = (type(module), *(type(m) for m in module.children()))
            qconfigs[node] = resolver((name, *parts.get(name, ())), types)
    has_stubs = any(n.op == "call_module" and is_stub(modules[str(n.target)], "QuantStub") for n in graph.nodes)
    flow = flow_of(graph, modules, qconfigs, has_stubs)
    default = next((q for q in qconfigs.values() if q is not None and q.activation is not None), default_qat_qconfig)

    if not has_stubs:
        _insert_stubs(gm, flow, modules, default)
    _insert_dequantization(gm, flow, modules)

    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        target = str(node.target)
        module = gm.get_submodule(target)
        full = f"{path}.{target}" if path else target
        stub = is_stub(module, "QuantStub") or is_stub(module, "DeQuantStub")
        if isinstance(module, (QuantStub, DeQuantStub)):
            continue
        if not stub and node not in flow.quantized:
            continue
        qconfig = (qconfigs.get(node) or default) if not stub else (module.__dict__.get("qconfig") or default)
        form = to_qat(module, qconfig, full, flow.plans.get(node, OutputPlan()))
        if form is not module:
            replace_module(gm, target, form)
    graph.lint()
    gm.recompile()
    return []


def _unshare(gm: fx.GraphModule) -> None:
    """Give every call of a shared module a module of its own, on the same parameters: each output gets its own scale."""
    seen: dict[int, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if not quantizable(module):
            continue
        count = seen.get(id(module), 0)
        seen[id(module)] = count + 1
        if count:
            twin = copy.copy(module)
            for table in ("_modules", "_parameters", "_buffers"):
                twin.__dict__[table] = dict(module.__dict__[table])
            name = f"{str(node.target).replace('.', '_')}_call_{count}"
            gm._modules[name] = twin
            node.target = name


def _insert_stubs(gm: fx.GraphModule, flow: Flow, modules: dict[str, nn.Module], qconfig: QConfig) -> None:
    """A QuantStub behind every float value that an operator on integers reads."""
    graph = gm.graph
    stubs: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node not in flow.quantized:
            continue
        for source in list(node.all_input_nodes):
            if source in flow.integer or dataflow.is_query(source):
                continue
            if source not in stubs:
                name = f"_quant_{len(stubs)}"
                while hasattr(gm, name):
                    name += "_"
                assert qconfig.activation is not None
                per_channel = all(
                    u in flow.quantized and dataflow.is_depthwise_input(u, source, modules) for u in source.users if not dataflow.is_query(u)
                )
                quant: FakeQuantize = qconfig.activation()
                quant.open = True
                if per_channel:
                    quant.per_channel(1)
                gm.add_module(name, QuantStub(quant, name).train(gm.training))
                modules[name] = gm.get_submodule(name)
                with graph.inserting_after(source):
                    stubs[source] = graph.call_module(name, (source,))
                flow.quantized.add(stubs[source])
                flow.integer.add(stubs[source])
            node.replace_input_with(source, stubs[source])


def _insert_dequantization(gm: fx.GraphModule, flow: Flow, modules: dict[str, nn.Module]) -> None:
    """A DeQuantStub before every float operator and output that reads integers."""
    graph = gm.graph
    stubs: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if node in flow.quantized or node in flow.integer or dataflow.is_query(node):
            continue
        if module is not None and (is_stub(module, "DeQuantStub") or is_stub(module, "QuantStub")):
            continue
        for source in list(node.all_input_nodes):
            if source not in flow.integer:
                continue
            if source not in stubs:
                if "_dequant" not in gm._modules:
                    gm.add_module("_dequant", DeQuantStub())
                with graph.inserting_after(source):
                    stubs[source] = graph.call_module("_dequant", (source,))
            node.replace_input_with(source, stubs[source])
