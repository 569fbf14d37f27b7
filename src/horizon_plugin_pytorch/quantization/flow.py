"""Where integers flow in a graph, and how the output of each operator is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup
from horizon_plugin_pytorch.nn.quantized.operators import Operator
from horizon_plugin_pytorch.quantization import dataflow
from horizon_plugin_pytorch.quantization.dataflow import Modules, is_stub, module_of
from horizon_plugin_pytorch.quantization.qconfig import QConfig


@dataclass(frozen=True)
class OutputPlan:
    """How the output of one operator is quantized.

    Attributes:
        high_precision: it is read only where values are float, so it is not rounded.
        per_channel: it is read only by depthwise convolutions, so each channel has its own scale.
        nonnegative: none of its values can be negative.
    """

    high_precision: bool = False
    per_channel: bool = False
    nonnegative: bool = False


@dataclass(frozen=True)
class Candidate:
    """A node that has an integer form: its qconfig, and its operator if it is not an anchor with its group."""

    qconfig: QConfig | None
    operator: Operator | None = None

    @property
    def is_anchor(self) -> bool:
        return self.operator is None


@dataclass
class Flow:
    """The result.

    Attributes:
        quantized: nodes that compute on integers or make them.
        integer: nodes whose value is integers, passing ones included.
        plans: for each of `quantized`, how its output is quantized.
        reasons: for each node that computes in float, why.
    """

    quantized: set[fx.Node] = field(default_factory=set)
    integer: set[fx.Node] = field(default_factory=set)
    plans: dict[fx.Node, OutputPlan] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def flow_of(
    graph: fx.Graph,
    modules: Modules,
    candidates: Mapping[fx.Node, Candidate],
    floats: set[fx.Node],
    held: Mapping[fx.Node, str],
    *,
    has_stubs: bool,
    resumes: bool = True,
) -> Flow:
    """Follow integers through a graph.

    Args:
        candidates: every node that has an integer form.
        floats: nodes whose value is a float tensor.
        held: nodes whose value must stay float, and why.
        has_stubs: the user placed QuantStubs: integers are between those and the DeQuantStubs. Otherwise they start before
            every anchor.
        resumes: behind an operator that runs in float, the next one quantizes its input again.
    """
    flow = Flow()
    region: set[fx.Node] = set()  # between the user's stubs
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in floats]
        module = module_of(node, modules)
        within = region if resumes else flow.integer
        if module is not None and is_stub(module, "QuantStub"):
            flow.quantized.add(node)
            flow.integer.add(node)
            region.add(node)
            continue
        if module is not None and is_stub(module, "DeQuantStub"):
            continue
        if any(n in region for n in inputs):
            region.add(node)
        if node in candidates:
            own = candidates[node]
            if has_stubs:
                starts = any(n in within for n in inputs) and all(
                    n in within or (resumes and n.op == "get_attr") for n in inputs
                )
            else:
                starts = own.is_anchor or any(n in flow.integer for n in inputs)
            if reason := _refusal(own, starts, has_stubs, held.get(node)):
                flow.reasons[node] = reason
                continue
            flow.quantized.add(node)
            if node not in held and own.qconfig is not None and own.qconfig.activation is not None:
                flow.integer.add(node)
        elif dataflow.passes(node, modules):
            if dataflow.first_argument(node) in flow.integer and node not in held:
                flow.integer.add(node)
        elif inputs and node.op != "output" and not dataflow.is_query(node):
            flow.reasons[node] = held.get(node) or _no_form(module)
    _plan_outputs(flow, graph, modules, candidates)
    _find_nonnegative(flow, graph, modules, candidates)
    return flow


def _refusal(own: Candidate, starts: bool, has_stubs: bool, held: str | None) -> str | None:
    if own.qconfig is None:
        return "its qconfig is None"
    if not starts:
        return "it is not between a QuantStub and a DeQuantStub" if has_stubs else "its input is float"
    if own.is_anchor:
        return None
    return held or ("its qconfig quantizes no output" if own.qconfig.activation is None else None)


def _no_form(module: nn.Module | None) -> str:
    if module is not None and p.is_norm(module):
        return "a batch norm that no convolution absorbed has no integer form"
    return "it has no integer form"


def _plan_outputs(flow: Flow, graph: fx.Graph, modules: Modules, candidates: Mapping[fx.Node, Candidate]) -> None:
    for node in reversed(list(graph.nodes)):
        if node not in flow.quantized:
            continue
        own = candidates.get(node)  # None: a QuantStub
        if node not in flow.integer:  # held, or without a quantizer
            flow.plans[node] = OutputPlan(high_precision=True)
            continue
        readers = dataflow.readers(node, modules, flow.integer)
        if own is not None and not any(reader in flow.quantized for reader, _, _ in readers):
            if not own.is_anchor:
                flow.quantized.discard(node)
                flow.reasons[node] = "it is read only where values are float"
            flow.plans[node] = OutputPlan(high_precision=True)
            _forget(flow, node)
            continue
        dims = {
            dataflow.is_depthwise_input(reader, read, modules) if kept and reader in flow.quantized else None
            for reader, read, kept in readers
        }
        flow.plans[node] = OutputPlan(per_channel=len(dims) == 1 and _has_channels(node, modules, own, dims.pop()))


def _has_channels(node: fx.Node, modules: Modules, own: Candidate | None, dims: int | None) -> bool:
    """The value's channels are those of a convolution with `dims` spatial dimensions, after the batch."""
    if dims is None or len(node.meta.get("shape", [0] * (dims + 2))) != dims + 2:
        return False
    if own is None:
        return True
    if not own.is_anchor:
        return False
    module = modules[str(node.target)]
    anchor = module.anchor if isinstance(module, FusedGroup) else module
    return len(getattr(anchor, "kernel_size", ())) == dims


def _forget(flow: Flow, node: fx.Node) -> None:
    """The value of `node` is float after all, and what passes it on."""
    flow.integer.discard(node)
    for user in node.users:
        if user in flow.integer and user not in flow.quantized and dataflow.first_argument(user) is node:
            _forget(flow, user)


def _find_nonnegative(flow: Flow, graph: fx.Graph, modules: Modules, candidates: Mapping[fx.Node, Candidate]) -> None:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in flow.integer:
            continue
        if node not in flow.quantized:
            if dataflow.first_argument(node) in found:
                found.add(node)
        elif node in candidates and _is_nonnegative(node, modules, candidates[node].operator, found):
            found.add(node)
            flow.plans[node] = replace(flow.plans[node], nonnegative=True)


def _is_nonnegative(node: fx.Node, modules: Modules, operator: Operator | None, known: set[fx.Node]) -> bool:
    if operator is None:
        module = modules[str(node.target)]
        return isinstance(module, FusedGroup) and module.pattern.activation in (p.RELU, p.RELU6)
    if operator.nonnegative is None:
        return getattr(operator, "activation", None) is not None or all(n in known for n in node.all_input_nodes)
    return operator.nonnegative
