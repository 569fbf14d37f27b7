"""A model fused by graph is rewritten: QAT forms, stubs where integers start, dequantization where they end."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator

from torch import fx, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion import calls, tracing
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.parts import uses_inside
from horizon_plugin_pytorch.fusion.report import FusionReport
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.qat.operation import DeQuantStub, QuantStub
from horizon_plugin_pytorch.quantization import dataflow, forms, mutation
from horizon_plugin_pytorch.quantization.dataflow import Modules, is_stub
from horizon_plugin_pytorch.quantization.flow import Candidate, Flow, OutputPlan, flow_of
from horizon_plugin_pytorch.quantization.modularize import modularize
from horizon_plugin_pytorch.quantization.qconfig import QConfig, Resolver, default_qat_qconfig


def prepare_parts(model: nn.Module, resolver: Resolver, report: FusionReport) -> nn.Module:
    """Prepare a fused model, in place: its traced parts, and the anchors and stubs that untraced code calls."""
    names = {group.name: group.modules for group in report.groups}
    for path, part in {id(part): (path, part) for path, part in graph_parts(model)}.values():
        prepare_graph(part, path, resolver, names)
    for path, module in list(_called_by_untraced(model, report)):
        qconfig = resolver((path,), forms.types_of(module))
        if qconfig is None:
            continue
        form = (
            forms.to_qat(module, module.__dict__.get("qconfig") or qconfig, path, OutputPlan())
            if tracing.is_stub(module)
            else forms.alone(module, qconfig, path)
        )
        if not path:
            return form
        replace_module(model, path, form)
    return model


def graph_parts(model: nn.Module, path: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """The traced parts of a fused model, by path: graphs that run, and within them only what they call."""
    if isinstance(model, fx.GraphModule):
        yield path, model
        children = {
            str(n.target): model.get_submodule(str(n.target)) for n in model.graph.nodes if n.op == "call_module"
        }
    else:
        children = dict(model.named_children())
    for name, child in children.items():
        if not isinstance(child, FusedGroup):
            yield from graph_parts(child, f"{path}.{name}" if path else name)


def _called_by_untraced(model: nn.Module, report: FusionReport) -> Iterator[tuple[str, nn.Module]]:
    """Anchors and stubs that no graph calls, but code that could not be traced."""
    if p.anchor_of(model) is not None:
        yield "", model
    for entry in report.untraced:
        outside = model.get_submodule(entry.module)
        if isinstance(outside, fx.GraphModule):
            continue
        for name, part, _ in calls.parts_of(outside, _uses_of(model, entry.module)):
            if p.anchor_of(part) is not None or tracing.is_stub(part):
                yield f"{entry.module}.{name}" if entry.module else name, part


def _uses_of(model: nn.Module, path: str) -> frozenset[calls.Use]:
    """Uses, by the graph around it, of what is inside the module at `path`."""
    found: frozenset[calls.Use] = frozenset()
    for place, part in graph_parts(model):
        if not place or path.startswith(f"{place}."):
            found |= uses_inside(part.graph, path.removeprefix(f"{place}."))
    return found


# ---------------------------------------------------------------------------------------------------------------------------


def prepare_graph(gm: fx.GraphModule, path: str, resolver: Resolver, parts: dict[str, tuple[str, ...]]) -> None:
    """Prepare one fused graph, in place.

    Args:
        path: where it stands in the model.
        parts: for a group's name, the names of its parts in the float model.
    """
    graph = gm.graph
    modules = dict(gm.named_modules(remove_duplicate=False))
    held = mutation.settle(graph, modules)
    floats = modularize(gm, held)
    _unshare(gm)
    modules = dict(gm.named_modules(remove_duplicate=False))
    candidates: dict[fx.Node, Candidate] = {}
    for node in graph.nodes:
        module = dataflow.module_of(node, modules)
        if module is None or not forms.quantizable(module):
            continue
        name = f"{path}.{node.target}" if path else str(node.target)
        own_names = (name, *parts.get(name, ()), *node.meta.get("names", ()))
        candidates[node] = Candidate(resolver(own_names, forms.types_of(module)), forms.operator_of(module))
    stubs = [n for n in graph.nodes if n.op == "call_module" and is_stub(modules[str(n.target)], "QuantStub")]
    for stub in stubs:
        if stub in held:
            raise QuantizationError(
                f"prepare_qat_fx: the output of {str(stub.target)!r}: {held[stub]}; write it without working in place"
            )
    flow = flow_of(graph, modules, candidates, floats, held, has_stubs=bool(stubs))

    _insert_stubs(gm, path, flow, modules, candidates, floats, set(held))
    _insert_dequantization(gm, flow, modules)
    for node in list(graph.nodes):
        module = dataflow.module_of(node, modules)
        if module is None or isinstance(module, (QuantStub, DeQuantStub)):
            continue
        target = str(node.target)
        name = f"{path}.{target}" if path else target
        if tracing.is_stub(module):
            qconfig = module.__dict__.get("qconfig") or resolver((name,), (type(module),)) or default_qat_qconfig
        elif node in flow.quantized:
            qconfig = candidates[node].qconfig
        else:
            continue
        form = forms.to_qat(module, qconfig, name, flow.plans.get(node, OutputPlan()))
        replace_module(gm, target, form)
    gm.float_reasons = {node.name: reason for node, reason in flow.reasons.items()}  # type: ignore[assignment]
    graph.lint()
    gm.recompile()


def _unshare(gm: fx.GraphModule) -> None:
    """Give every call of a shared module a module of its own, on the same parameters: each output gets its own scale."""
    seen: dict[int, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if not forms.quantizable(module):
            continue
        count = seen.get(id(module), 0)
        if count:
            name = f"{str(node.target).replace('.', '_')}_call_{count}"
            gm.add_module(name, _twin(module))
            node.meta["names"] = (str(node.target),)
            node.target = name
        elif p.anchor_of(module) is not None:
            shared = [
                n for n in node.graph.nodes if n.op == "call_module" and gm.get_submodule(str(n.target)) is module
            ]
            if len(shared) > 1:
                group = forms.as_group(module)
                for name in {str(n.target) for n in shared}:
                    replace_module(gm, name, group)
                module = group
        seen[id(module)] = count + 1


_CHECKPOINT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _twin(module: nn.Module) -> nn.Module:
    """A second module on the same parameters, whose checkpoint keys are those of the first."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(module.__dict__[table])
    if isinstance(twin, FusedGroup):
        twin.keys_elsewhere = tuple(module._modules)
        for table in _CHECKPOINT_HOOKS:
            twin.__dict__[table] = OrderedDict()
    return twin


def _insert_stubs(
    gm: fx.GraphModule,
    path: str,
    flow: Flow,
    modules: Modules,
    candidates: dict[fx.Node, Candidate],
    floats: set[fx.Node],
    held: set[fx.Node],
) -> None:
    """A QuantStub behind every float value that an operator on integers reads."""
    graph = gm.graph
    stubs: dict[tuple[fx.Node, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node not in flow.quantized or node not in candidates:
            continue
        for source in node.all_input_nodes:
            if source in flow.integer or source not in floats:
                continue
            # What is overwritten later is quantized where it is read.
            key = (source, node) if source in held else (source,)
            if key not in stubs:
                stubs[key] = _new_stub(gm, path, key, flow, modules, candidates[node].qconfig)
            node.replace_input_with(source, stubs[key])


def _new_stub(
    gm: fx.GraphModule, path: str, key: tuple[fx.Node, ...], flow: Flow, modules: Modules, qconfig: QConfig | None
) -> fx.Node:
    """A QuantStub for ``key[0]``, for all readers or only for ``key[1]``."""
    source, graph = key[0], gm.graph
    users = [key[1]] if len(key) > 1 else [u for u in source.users if u in flow.quantized]
    per_channel = all(dataflow.is_depthwise_input(u, source, modules) for u in users)
    name = f"_quant_{sum(n.startswith('_quant_') for n in gm._modules)}"
    while hasattr(gm, name):
        name += "_"
    assert qconfig is not None
    full = f"{path}.{name}" if path else name
    gm.add_module(name, forms.quant_stub(qconfig, full, per_channel=per_channel).train(gm.training))
    modules[name] = gm.get_submodule(name)
    with graph.inserting_before(key[1]) if len(key) > 1 else graph.inserting_after(source):
        stub = graph.call_module(name, (source,))
    flow.quantized.add(stub)
    flow.integer.add(stub)
    return stub


def _insert_dequantization(gm: fx.GraphModule, flow: Flow, modules: Modules) -> None:
    """A DeQuantStub before every float operator and output that reads integers."""
    graph = gm.graph
    stubs: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node in flow.quantized or node in flow.integer or dataflow.is_query(node):
            continue
        module = dataflow.module_of(node, modules)
        if module is not None and tracing.is_stub(module):
            continue
        for source in node.all_input_nodes:
            if source not in flow.integer:
                continue
            if source not in stubs:
                if "_dequant" not in gm._modules:
                    gm.add_module("_dequant", DeQuantStub().train(gm.training))
                    modules["_dequant"] = gm._modules["_dequant"]  # type: ignore[assignment]
                with graph.inserting_after(source):
                    stubs[source] = graph.call_module("_dequant", (source,))
            node.replace_input_with(source, stubs[source])
