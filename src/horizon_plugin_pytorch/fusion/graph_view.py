"""Reading a traced graph: what its nodes are and are called, who reads a value, and which values may share memory.

What stands between two nodes without computing anything (Identity, in eval mode Dropout) is stepped over.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from horizon_plugin_pytorch.fusion import operators as ops
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.patterns import Activation, Anchor
from horizon_plugin_pytorch.fusion.report import Kind
from horizon_plugin_pytorch.fusion.tracing import Traced, is_stub

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, *_DROPOUTS)


def _is_dropout(module: nn.Module) -> bool:
    """One of PyTorch's, or torchvision's StochasticDepth: in eval mode they hand their input on."""
    stochastic_depth = type(module).__name__ == "StochasticDepth" and type(module).__module__.startswith("torchvision.")
    return stochastic_depth or any(p.computes_as(module, base) for base in _DROPOUTS)


class GraphView:
    """One traced graph and the modules it calls. Changes nothing.

    Args:
        traced: the graph and the module it was traced from.
        prefix: path of that module in the user's model, for the names in the report.
        keep_bn: batch norms stay inside their group, so Dropout is not stepped over.
        places: every path of every module in the user's model, by identity; by default the traced module is all of it.
    """

    def __init__(self, traced: Traced, prefix: str, keep_bn: bool, places: dict[int, list[str]] | None = None) -> None:
        self.root, self.graph, self.prefix, self.keep_bn = traced.root, traced.graph, prefix, keep_bn
        self.of_this_mode, self.constants = traced.of_this_mode, traced.constants
        self.nodes = list(self.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.modules = dict(self.root.named_modules(remove_duplicate=False))
        self.paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            self.paths.setdefault(id(module), []).append(path)
        self.places = places or self.paths
        self.inside = tuple(f"{place}." if place else "" for place in self.places[id(self.root)])
        self.calls: dict[int, list[fx.Node]] = {}
        self.reads: Counter[str] = Counter()
        for node in self.nodes:
            if node.op == "call_module":
                self.calls.setdefault(id(self.modules[str(node.target)]), []).append(node)
            elif node.op == "get_attr":
                self.reads[str(node.target).rpartition(".")[0]] += 1
        self.aliases: dict[fx.Node, fx.Node] = {}
        self._by_storage: dict[fx.Node, list[fx.Node]] = {}

    # -- names --------------------------------------------------------------------------------------------------------------

    def name(self, node: fx.Node) -> str:
        """A node as the user knows it: the module's path, or the function's node name."""
        local = str(node.target) if node.op == "call_module" else node.name
        return f"{self.prefix}.{local}" if self.prefix else local

    def names(self, nodes: Any) -> str:
        shown = [repr(self.name(n)) if n.op != "output" else "the model's output" for n in nodes]
        return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")

    def is_shared(self, node: fx.Node) -> bool:
        """An anchor or norm that is called, or at least there, more than once."""
        module = self.module_of(node)
        if module is None or (self.anchor_row(node) is None and self.kind(node) != "norm"):
            return False
        return len(self.calls[id(module)]) > 1 or len(self.paths[id(module)]) > 1 or bool(self.places_outside(module))

    def places_outside(self, module: nn.Module) -> list[str]:
        return [place for place in self.places[id(module)] if not place.startswith(self.inside)]

    # -- kinds of nodes -----------------------------------------------------------------------------------------------------

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def anchor_row(self, node: fx.Node) -> Anchor | None:
        module = self.module_of(node)
        return p.anchor_of(module) if module is not None else None

    def kind(self, node: fx.Node) -> Kind | None:
        module = self.module_of(node)
        if (module is not None and p.is_norm(module)) or ops.read_batch_norm(node):
            return "norm"
        if ops.read_add(node):
            return "add"
        if self.activation_row(node):
            return "activation"
        return None

    def activation_row(self, node: fx.Node) -> Activation | None:
        module = self.module_of(node)
        return p.activation_of(module) if module is not None else ops.read_activation(node)

    def functional_of(self, node: fx.Node) -> str | None:
        """The path of the FloatFunctional whose result goes through this node (its ``activation_post_process``)."""
        owner, _, leaf = str(node.target).rpartition(".")
        if (
            node.op == "call_module"
            and leaf == "activation_post_process"
            and p.is_float_functional(self.modules[owner])
        ):
            return owner
        return None

    def passes(self, node: fx.Node) -> bool:
        """Computes nothing: hands its first argument on."""
        if node.op == "call_function":
            return node.target is F.dropout and node.kwargs.get("training") is False and not self.keep_bn
        module = self.module_of(node)
        if module is None or p.has_hooks(module):
            return False
        if p.computes_as(module, nn.Identity):
            return True
        return _is_dropout(module) and not module.training and not self.keep_bn

    def consumer(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node], str | None]:
        """The only reader of a value, the nodes stepped over on the way, and the reason if there is no such reader."""
        over: list[fx.Node] = []
        while True:
            users = list(node.users)
            if len(users) != 1:
                reason = (
                    f"the output of {self.name(node)!r} is used by {len(users)} consumers: {self.names(users)}"
                    if users
                    else None
                )
                return None, over, reason
            if not self.passes(users[0]):
                return users[0], over, None
            node = users[0]
            over.append(node)

    def storage(self, node: fx.Node) -> fx.Node:
        """The node whose memory this one's value may share."""
        chain = []
        current = node
        while current not in self.aliases:
            chain.append(current)
            sources = ops.overwritten(current, self.modules)
            if not sources and (self.passes(current) or self._is_view(current)):
                sources = current.all_input_nodes
            if not sources:
                self.aliases[current] = current
                break
            current = sources[0]
        for n in chain:
            self.aliases[n] = self.aliases[current]
        return self.aliases[node]

    def _is_view(self, node: fx.Node) -> bool:
        module = self.module_of(node)
        return ops.may_alias(node) or (module is not None and (isinstance(module, _VIEW_MODULES) or is_stub(module)))

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """All nodes whose memory `node`'s value may share."""
        if not self._by_storage:
            for n in self.nodes:
                self._by_storage.setdefault(self.storage(n), []).append(n)
        return self._by_storage[self.storage(node)]
