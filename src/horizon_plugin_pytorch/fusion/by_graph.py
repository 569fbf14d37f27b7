"""Fusing what the project finds: trace, match along the data flow, rewrite.

The result is a graph module that has every attribute of the model it came from. A group stands where its anchor stood or, with an
add, at the FloatFunctional or under a new name ``_generated_add_<n>``; the places of the others hold modules that keep their
checkpoint keys and are not called.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import examples
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.matching import Match, Matcher
from horizon_plugin_pytorch.fusion.parts import join, trace_parts
from horizon_plugin_pytorch.fusion.patterns import Pattern
from horizon_plugin_pytorch.fusion.report import FusionReport, Group, Miss, Untraced
from horizon_plugin_pytorch.nn.intrinsic.assemble import Parts, assemble, replace_module
from horizon_plugin_pytorch.nn.intrinsic.group import FusedGroup, Identity, move_hooks
from horizon_plugin_pytorch.nn.intrinsic.handoff import Handoff
from horizon_plugin_pytorch.qat_mode import keeps_bn


class FusedGraphModule(fx.GraphModule):
    """A graph module that keeps the attributes of the model it was made from, also through deepcopy and pickle."""

    other_mode: str | None = None
    """What the forward does differently in the other training mode; the graph has only the mode it was traced in."""

    def train(self, mode: bool = True) -> FusedGraphModule:
        if mode != self.training and self.other_mode is not None:
            now, wanted = ("training", "eval") if self.training else ("eval", "training")
            raise FusionError(
                f"{self._get_name()} was fused in {now} mode and its forward is another one in {wanted} mode ({self.other_mode}). "
                f"Call model.{'train' if mode else 'eval'}() before fusing, or move what depends on self.training into a module."
            )
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedGraphModule:
        result = super().__deepcopy__(memo)
        type(result).__name__ = type(self).__name__
        _adopt(
            result,
            {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in result.__dict__ or k in _HOOKS},
        )
        return result  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        _, (body, imports) = super().__reduce__()
        return _rebuild, (body, imports, type(self).__name__)


_HOOKS = tuple(
    name
    for name, value in nn.Module().__dict__.items()
    if name.endswith(("hooks", "with_kwargs", "always_called")) and isinstance(value, dict)
)


def _adopt(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        module.__dict__[name] = value


def _rebuild(body: dict[str, Any], imports: str, class_name: str) -> FusedGraphModule:
    plain = reduce_graph_module(dict(body), imports)
    graph: Any = plain.graph
    result = FusedGraphModule(plain, graph, class_name)
    skip = {"_graph", "_code", "_modules", "_parameters", "_buffers"}
    _adopt(result, {k: v for k, v in body.items() if k not in skip})
    for table in ("_modules", "_parameters", "_buffers"):
        result.__dict__[table].clear()  # what the graph calls is there already, in its order
        result.__dict__[table].update(body[table])
    return result


def _graph_module(root: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> FusedGraphModule:
    """`graph` as the forward of a module that has all of `root`'s modules, tensors, hooks and attributes.

    Args:
        constants: tensors that stood in the forward itself; they move with the module and are no part of its checkpoint.
    """
    result = FusedGraphModule(nn.Module(), fx.Graph(), class_name=type(root).__name__)
    for table in ("_modules", "_parameters", "_buffers"):
        result.__dict__[table].update(root.__dict__[table])
    _adopt(result, {k: v for k, v in root.__dict__.items() if k not in result.__dict__ or k in _HOOKS})
    result._non_persistent_buffers_set |= root._non_persistent_buffers_set
    for name, tensor in constants.items():
        result.register_buffer(name, tensor, persistent=False)
    result.training = root.training
    hook: Any
    for hook in result._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(result)  # it is called with the module it was registered on
    graph._tracer_cls = fx.Tracer  # the graph is only calls of modules and functions now
    result.graph = graph
    return result


# ---------------------------------------------------------------------------------------------------------------------------


def analyze(model: nn.Module, example_inputs: Any = None, *, is_qat: bool = False) -> FusionReport:
    """What `fuse_fx` would fuse in `model`, and what it would leave out and why. Changes nothing.

    Args:
        model: the float model.
        example_inputs: a tensor, a tuple of the model's arguments or a dict of keyword arguments. Tells which optional
            arguments are passed and lets shapes be known (an add that broadcasts is refused only then).
        is_qat: as for `fuse_fx`.

    Returns:
        a `FusionReport` with `groups` and `missed`.

    Raises:
        FusionError: a batch norm's statistics are not finite, or a lazy module has not seen data yet.
        ValueError: `example_inputs` do not fit the model's forward.
    """
    _refuse_lazy(model)
    return _match(model, example_inputs, keeps_bn(is_qat))[1]


def fuse_fx(
    model: nn.Module,
    fuse_custom_config_dict: dict[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    is_qat: bool = False,
) -> fx.GraphModule:
    """Find and fuse every group of a model.

    Args:
        model: the float model; it is copied and stays as it is.
        fuse_custom_config_dict: accepted for compatibility; ``preserved_attributes`` is not needed, all are preserved.
        example_inputs: see `analyze`.
        is_qat: keep BN, trainable, inside the groups until `absorb_bn` or convert.

    Returns:
        the fused model; its `fusion_report` says what fused and what did not. It is an ``fx.GraphModule``; a model that
        symbolic tracing refuses comes back as its own class, fused in its largest traceable parts.

    Raises:
        FusionError: a batch norm's statistics are not finite, or a lazy module has not seen data yet.
        ValueError: `example_inputs` do not fit the model's forward.
    """
    unknown = set(fuse_custom_config_dict or {}) - {"preserved_attributes"}
    if unknown:
        raise ValueError(f"fuse_fx: unknown keys in fuse_custom_config_dict: {sorted(unknown)}")
    keep_bn = keeps_bn(is_qat)
    _refuse_lazy(model)
    model = copy.deepcopy(model)
    matchers, report = _match(model, example_inputs, keep_bn)
    result = model
    places = _places(model)
    # Inner parts first: an outer part takes its children as they are then.
    for path, matcher in sorted(matchers.items(), key=lambda item: -item[0].count(".") - bool(item[0])):
        other_mode = _other_mode(matcher)
        _rewrite(matcher, keep_bn)
        part = _graph_module(matcher.root, matcher.graph, matcher.constants)
        part.other_mode = other_mode
        if path:
            for place in places[id(matcher.root)]:
                replace_module(model, place, part)
        else:
            result = part
    result.fusion_report = report  # type: ignore[assignment]
    return result  # type: ignore[return-value]


def _refuse_lazy(model: nn.Module) -> None:
    if reason := p.lazy_reason(model):
        raise FusionError(f"{type(model).__name__}: {reason}")


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every path of every module, by identity."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return places


def _match(model: nn.Module, example_inputs: Any, keep_bn: bool) -> tuple[dict[str, Matcher], FusionReport]:
    given = examples.given_names(model, example_inputs)
    traced, whole = trace_parts(model, given)
    report = FusionReport(type(model).__name__)
    report.untraced += [Untraced(path, type(module).__name__, reason) for path, (module, reason) in whole.items()]
    matchers, places = {}, _places(model)
    for path, part in traced.items():
        if not path and example_inputs is not None:
            args, kwargs = examples.call_arguments(example_inputs)
            if stopped := examples.record_shapes(part, args, kwargs):
                report.notes.append(f"shapes are known only in part, so broadcasting adds may not be seen: {stopped}")
        matcher = Matcher(part, path, keep_bn, places)
        matcher.run()
        matchers[path] = matcher
        name_groups(matcher)
        report.groups += [_describe(matcher, match, keep_bn) for match in matcher.matches]
        report.missed += matcher.misses
        skipped = [n for m in matcher.matches for n in m.nodes if matcher.passes(n) and not _is_identity(matcher, n)]
        if other_mode := _other_mode(matcher):
            mode = "training" if part.root.training else "eval"
            report.notes.append(f"{path or report.model} is fused for {mode} mode only: {other_mode}")
        if skipped:
            report.notes.append(f"left out, as the model is in eval mode: {matcher.names(skipped)}")
    report.missed += _out_of_sight(model, report, whole)
    return matchers, report


def _out_of_sight(model: nn.Module, report: FusionReport, whole: dict[str, tuple[nn.Module, str]]) -> list[Miss]:
    """Batch norms that no traced graph calls, inside modules left whole."""
    told = {name for group in report.groups for name in group.modules}
    told |= {name for miss in report.missed for name in miss.modules}
    misses = []
    for name, module in model.named_modules():
        inside = [path for path in whole if not path or name.startswith(f"{path}.")]
        if p.is_norm(module) and name not in told and inside and not _in_group(model, name):
            path = max(inside, key=len)
            where = f"{path!r} ({type(whole[path][0]).__name__})" if path else "the model"
            misses.append(Miss("norm", (name,), f"it is inside {where}, which was left whole: {whole[path][1]}"))
    return misses


def _in_group(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), FusedGroup)


DROPOUT_FUNCTIONS = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
}


def _other_mode(matcher: Matcher) -> str | None:
    """What the graph does differently in the other training mode, groups and dropout functions apart: those become modules."""
    if matcher.of_this_mode is None:
        return "it cannot be traced there"
    fused = {n for match in matcher.matches for n in match.nodes}
    fused |= {n for node in list(fused) for n in node.all_input_nodes if n.op == "get_attr"}
    counters = {
        n for n in matcher.of_this_mode if any("num_batches_tracked" in str(a.target) for a in (n, *n.all_input_nodes))
    }
    left = [
        n for n in matcher.nodes if n in matcher.of_this_mode - fused - counters and n.target not in DROPOUT_FUNCTIONS
    ]
    return f"it differs at {matcher.names(left)}" if left else None


def _dropouts_to_modules(matcher: Matcher) -> None:
    """``F.dropout(x, p, training=self.training)`` is traced with the value of the flag: make it a module, which has its own."""
    for node in list(matcher.graph.nodes):
        kind = DROPOUT_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if kind is None or node not in (matcher.of_this_mode or ()):
            continue
        call = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
        count = sum(name.startswith("_generated_dropout_") for name in matcher.root._modules)
        name = f"_generated_dropout_{count}"
        matcher.root.add_module(
            name, kind(call.get("p", 0.5), bool(call.get("inplace", False))).train(matcher.root.training)
        )
        with matcher.graph.inserting_before(node):
            module_call = matcher.graph.call_module(name, (call["input"],))
        node.replace_all_uses_with(module_call)
        matcher.graph.erase_node(node)


def _is_identity(matcher: Matcher, node: fx.Node) -> bool:
    return isinstance(matcher.module_of(node), nn.Identity)


def name_groups(matcher: Matcher) -> None:
    """Decide where each group stands: the anchor's place, the FloatFunctional's, or a new name."""
    taken = {name for name, _ in matcher.root.named_children()}
    uses: dict[str, int] = {}
    for node in matcher.nodes:
        if functional := matcher.functional_of(node):
            uses[functional] = uses.get(functional, 0) + 1
    count = 0
    for match in matcher.matches:
        if match.add is None:
            match.target = str(match.anchor.target)
        elif match.functional is not None and uses[match.functional] == 1:
            match.target = match.functional
        else:
            while f"_generated_add_{count}" in taken:
                count += 1
            match.target = f"_generated_add_{count}"
            taken.add(match.target)


def _describe(matcher: Matcher, match: Match, keep_bn: bool) -> Group:
    pattern = Pattern(match.row, match.norm is not None, match.add is not None, match.activation_row)
    stages = [match.anchor, match.norm.node if match.norm else None, match.add, match.activation]
    names = [matcher.name(n) for n in stages if n is not None]
    if match.functional is not None:
        names[1 + (match.norm is not None)] = join(matcher.prefix, match.functional)
    target = join(matcher.prefix, match.target)
    return Group(pattern, tuple(names), target, not keep_bn, match.anchor.meta.get("source"))


def _rewrite(matcher: Matcher, keep_bn: bool) -> None:
    """Make the groups, put them in the tree and call them in the graph."""
    for match in matcher.matches:
        _fuse_one(matcher, match, keep_bn)
    _dropouts_to_modules(matcher)
    called = {str(n.target) for n in matcher.graph.nodes if n.op == "call_module"}
    for match in matcher.matches:  # activations can be shared: their place is free only when nobody calls it any more
        node = match.activation
        if node is not None and node.op == "call_module" and str(node.target) not in called:
            place = matcher.root.get_submodule(str(node.target))
            replace_module(matcher.root, str(node.target), Identity().train(place.training))
    matcher.graph.lint()


def _fuse_one(matcher: Matcher, match: Match, keep_bn: bool) -> None:
    root, graph = matcher.root, matcher.graph
    activation = None
    if match.activation is not None:
        assert match.activation_row is not None
        module = matcher.module_of(match.activation)
        inplace = module is None or bool(getattr(module, "inplace", False))
        activation = match.activation_row.make(inplace).train(match.module.training)
        if module is not None and not isinstance(
            module, (nn.ReLU, nn.Hardtanh)
        ):  # a registered activation of the user's
            activation = module if len(matcher.calls[id(module)]) == 1 else copy.deepcopy(module)
    parts = Parts(
        match.row,
        match.module,
        match.norm.module if match.norm else None,
        match.add is not None,
        match.activation_row,
        activation,
    )

    norm_place = norm_names = anchor_place = None
    if match.norm is not None:
        norm_place, norm_names = _vacate_norm(root, match), match.norm.names
    if match.add is not None:
        anchor_place = Handoff().train(match.module.training)
        replace_module(root, str(match.anchor.target), anchor_place)
    group = assemble(parts, keep_bn=keep_bn, anchor_place=anchor_place, norm_place=norm_place, norm_names=norm_names)
    if anchor_place is not None:
        assert isinstance(group, FusedGroup)
        group.handoff = anchor_place.token
    last = matcher.module_of(match.activation or (match.norm.node if match.norm else match.anchor))
    if last is not None and last is not group and last._forward_hooks:
        move_hooks(last, group, "_forward_hooks")
    root.get_submodule(match.target.rpartition(".")[0])._modules[match.target.rpartition(".")[2]] = group

    with graph.inserting_before(match.add or match.anchor):
        operands = () if match.other is None else (match.other,)
        arguments = dict(zip(("input", "output_size"), match.anchor.args, strict=False)) | match.anchor.kwargs
        call = graph.call_module(match.target, (arguments.pop("input"), *operands), arguments)
    call.meta = {k: v for k, v in match.anchor.meta.items() if k in ("source", "nn_module_stack")}
    match.end.replace_all_uses_with(call)
    for node in reversed(match.nodes):
        tensors = [n for n in node.all_input_nodes if n.op == "get_attr"]
        graph.erase_node(node)
        for tensor in tensors:
            if not tensor.users:
                graph.erase_node(tensor)


def _vacate_norm(root: nn.Module, match: Match) -> nn.Module:
    """The module that keeps the norm's checkpoint keys: an Identity in the norm's place, or the owner of its tensors."""
    assert match.norm is not None
    path, names = match.norm.owner, match.norm.names
    owner = root.get_submodule(path)
    if names is not None:  # the tensors of a functional call leave their owner
        for attr in names.values():
            owner._parameters.pop(attr, None)
            owner._buffers.pop(attr, None)
        if "num_batches_tracked" not in names:
            return owner
        graph = match.norm.node.graph
        for node in graph.find_nodes(op="get_attr", target=f"{path}.num_batches_tracked"):
            for user in list(node.users):
                graph.erase_node(user)  # the count that a batch norm in training keeps
            graph.erase_node(node)
        if list(owner.state_dict(keep_vars=True)):
            return owner
    place = Identity().train(owner.training)
    for name, child in owner.named_children():
        place.add_module(name, child)
    if path:
        replace_module(root, path, place)
    return place
