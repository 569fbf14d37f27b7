"""A model in as few traced parts as possible: itself, or the largest parts of it that can be traced."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.fusion import calls, patterns
from horizon_plugin_pytorch.fusion.tracing import FusionTracer, Traced, attributes_kept, explain, is_known
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup


def trace_parts(model: nn.Module, given: frozenset[str]) -> tuple[dict[str, Traced], dict[str, tuple[nn.Module, str]]]:
    """Trace `model` in as few parts as possible.

    Returns:
        the traced parts by their path in the model (``""``: the model itself), and the modules that could not be traced with
        the reason, likewise.
    """
    traced: dict[str, Traced] = {}
    whole: dict[str, tuple[nn.Module, str]] = {}
    todo: deque[tuple[str, nn.Module, frozenset[str] | None]] = deque([("", model, given)])
    seen: set[int] = set()
    while todo:
        path, module, names = todo.popleft()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if is_known(module) or isinstance(module, FusedGroup) or not _has_anchor(module):
            continue
        if type(module).forward is nn.Module.forward or not callable(getattr(type(module), "forward", None)):
            todo.extendleft(reversed(list(_parts(path, module))))
            continue
        if reason := calls.own_call(module):
            whole[path] = (module, reason)
            continue
        if names is None and (optional := _optional(module)):
            whole[path] = (module, f"its calls do not all pass the same of its optional arguments {optional}")
            todo.extendleft(reversed(list(_parts(path, module))))
            continue
        names = names or frozenset()
        tracer = FusionTracer(names)
        try:
            with attributes_kept(module) as constants:
                graph = tracer.trace(module)
        except Exception as error:
            whole[path] = (module, explain(error))
            todo.extendleft(reversed(list(_parts(path, module))))
            continue
        traced[path] = Traced(module, graph, tracer.left_whole, _of_this_mode(module, graph, names), constants)
        for inner, reason in tracer.left_whole.items():
            child = module.get_submodule(inner)
            if _has_anchor(child):
                whole[join(path, inner)] = (child, reason)
                todo.extend(_parts(join(path, inner), child, uses_inside(graph, inner)))
    return traced, whole


def _of_this_mode(module: nn.Module, graph: fx.Graph, given: frozenset[str]) -> set[fx.Node] | None:
    """The nodes of `graph` that a trace in the other training mode does not have."""
    modes = {m: m.training for m in module.modules()}
    other_mode = not module.training
    try:
        with attributes_kept(module):
            for m in modes:
                m.training = other_mode
            other = FusionTracer(given).trace(module)
    except Exception:
        return None
    finally:
        for m, mode in modes.items():
            m.training = mode

    def describe(node: fx.Node) -> tuple[Any, ...]:
        return node.op, str(node.target), str(node.args), str(node.kwargs)

    there = {node.name: describe(node) for node in other.nodes}
    return {node for node in graph.nodes if there.get(node.name) != describe(node)}


def uses_inside(graph: fx.Graph, path: str) -> frozenset[calls.Use]:
    """Uses of what is inside the module at `path` by the graph itself."""
    inside = [
        (n, str(n.target))
        for n in graph.nodes
        if n.op in ("call_module", "get_attr") and str(n.target).startswith(f"{path}.")
    ]
    uses = set()
    for node, target in inside:
        names = tuple(target[len(path) + 1 :].split("."))
        if node.op == "call_module":
            uses.add(calls.Use(names, True, (len(node.args), frozenset(node.kwargs))))
        else:
            uses.add(calls.Use(names[:-1], False))
    return frozenset(uses)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _optional(module: nn.Module) -> list[str]:
    """Arguments of a forward that a call can leave out."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.default is not inspect.Parameter.empty]


def _has_anchor(module: nn.Module) -> bool:
    """There is something to fuse inside, or something that looks as if it were."""
    return any(isinstance(m, patterns.anchor_types()) for m in module.modules())


def _parts(
    path: str, module: nn.Module, uses: frozenset[calls.Use] = frozenset()
) -> Iterator[tuple[str, nn.Module, frozenset[str] | None]]:
    """The parts of a module left whole that may be fused on their own: those that are called and nothing else.

    Args:
        uses: what is known of uses from outside the module.
    """
    for name, part, given in calls.parts_of(module, uses):
        yield join(path, name), part, given
