"""Values of a graph that are overwritten in place.

Integers are not changed in place: an operator on integers makes new ones. That is the same unless somebody reads the old value, or
a view of it, after it was overwritten. So before a graph is quantized, such readers are given the overwriting node instead, and
where that is not the same (a view or a part was overwritten), everything that shares this memory stays float and as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from horizon_plugin_pytorch.fusion import operators
from horizon_plugin_pytorch.quantization.dataflow import DROPOUTS, Modules, is_query, is_stub, module_of


@dataclass(frozen=True)
class LateRead:
    """`reader` reads `value` after `writer` overwrote memory that it shares.

    Attributes:
        exact: all of `value` was overwritten, and with the writer's result, so that this can be read instead.
    """

    reader: fx.Node
    value: fx.Node
    writer: fx.Node
    exact: bool


def late_reads(graph: fx.Graph, modules: Modules) -> dict[frozenset[fx.Node], list[LateRead]]:
    """For every set of nodes that share memory and are read after one of them was overwritten: those reads, in order."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # by the node that made it
    whole: dict[fx.Node, fx.Node] = {}  # likewise, of the nodes that are all of it
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        changed = operators.overwritten(node, modules)
        writes += [(node, value) for value in changed]
        sources = changed or (node.all_input_nodes[:1] if _is_view(node, modules) else [])
        memory[node] = memory[sources[0]] if sources else node
        whole[node] = whole[changed[0]] if changed and _returns_it(node) else node
    found: dict[frozenset[fx.Node], list[LateRead]] = {}
    for writer, changed_value in writes:
        shared = frozenset(node for node in order if memory[node] is memory[changed_value])
        for node in shared:
            if order[node] >= order[writer]:
                continue
            exact = whole[node] is whole[writer]
            late = [u for u in node.users if order[u] > order[writer] and not is_query(u)]
            if late:
                found.setdefault(shared, []).extend(LateRead(reader, node, writer, exact) for reader in late)
    return found


def _returns_it(writer: fx.Node) -> bool:
    """Whether the result is all of what was overwritten."""
    name = getattr(writer.target, "__name__", str(writer.target))
    return not writer.meta.get("overwrites") and name != "setitem" and "out" not in writer.kwargs


def _is_view(node: fx.Node, modules: Modules) -> bool:
    module = module_of(node, modules)
    if module is None:
        return operators.may_alias(node)
    views = isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, *DROPOUTS))
    return operators.may_alias(node) or views or is_stub(module, "QuantStub") or is_stub(module, "DeQuantStub")


def settle(graph: fx.Graph, modules: Modules) -> dict[fx.Node, str]:
    """Give readers of overwritten values the new value.

    Returns:
        the nodes for which that is not possible, and the reason: they must stay as they are.
    """
    held: dict[fx.Node, str] = {}
    for shared, reads in late_reads(graph, modules).items():
        if all(read.exact for read in reads):
            last = {(read.reader, read.value): read.writer for read in reads}
            for (reader, value), writer in last.items():
                reader.replace_input_with(value, writer)
        else:
            first = next(read for read in reads if not read.exact)
            reason = f"{first.writer.name!r} overwrites it or a view of it in place, and {first.reader.name!r} reads it afterwards"
            held |= dict.fromkeys(shared, reason)
    return held
