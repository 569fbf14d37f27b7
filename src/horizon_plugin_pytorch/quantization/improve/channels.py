"""Which tensors of a prepared graph share their channels, who makes them and who reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.qat.operation import Operation
from horizon_plugin_pytorch.nn.quantized.operators import AdaptiveAvgPool, Add, AvgPool, Mean
from horizon_plugin_pytorch.quantization import dataflow

HOMOGENEOUS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU)
"""Activations with ``f(e y) = e f(y)`` for every e > 0."""
ELEMENT_WISE = frozenset(
    (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout, F.relu, torch.relu, "relu", "contiguous", "clone")
)  # fmt: skip
"""What keeps every element where it is."""
SPATIAL = frozenset((
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Upsample, F.interpolate,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
))  # fmt: skip
"""What works on each channel alone."""
RESHAPING = frozenset(
    (nn.Flatten, torch.flatten, torch.reshape, torch.squeeze, "flatten", "reshape", "view", "squeeze")
)


@dataclass(frozen=True)
class Layout:
    """A tensor's channels: how many, and their dimension counted from the end."""

    channels: int
    axis: int


@dataclass(frozen=True)
class Shared:
    """The output of a module that has one scale for all channels.

    Attributes:
        axis: the dimension of the channels, counted from the end.
        readers: groups whose input it is.
    """

    name: str
    module: nn.Module
    axis: int
    readers: tuple[QATGroup, ...]


@dataclass(frozen=True)
class Space:
    """Tensors whose channels can be scaled, all of them together.

    Attributes:
        tensors: those for which it matters; one at least.
        producers: every group that makes a tensor of the space.
        readers: every group that has one as its input.
    """

    tensors: tuple[Shared, ...]
    producers: tuple[QATGroup, ...]
    readers: tuple[QATGroup, ...]


def spaces_of(model: nn.Module, gm: fx.GraphModule) -> list[Space]:
    """The spaces of a graph within `model`."""
    weights = Counter(id(m.weight) for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, QATGroup))
    return list(_Search(gm, weights).spaces())


class _Search:
    """Goes through a graph once; `pinned` nodes have channels that cannot be scaled."""

    def __init__(self, gm: fx.GraphModule, weights: Counter[int]) -> None:
        self.modules = dict(gm.named_modules(remove_duplicate=False))
        self.weights = weights
        self.nodes = list(gm.graph.nodes)
        self.layouts: dict[fx.Node, Layout] = {}
        self.parent = {node: node for node in self.nodes}
        self.pinned: set[fx.Node] = set()
        for node in self.nodes:
            self._look_at(node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return dataflow.module_of(node, self.modules)

    def _look_at(self, node: fx.Node) -> None:
        if dataflow.is_query(node):
            return
        module = self._module(node)
        if isinstance(module, QATGroup):
            self._group(node, module)
            return
        inputs = node.all_input_nodes
        given = {self.layouts.get(n) for n in inputs}
        before = given.pop() if len(given) == 1 else None
        after = None if before is None else self._after(node, module, before)
        if after is None or self._constants(node, module):
            self.pinned.update((node, *inputs))
            return
        self.layouts[node] = after
        for other in inputs:
            self._unite(node, other)

    def _group(self, node: fx.Node, group: QATGroup) -> None:
        weight, geometry = group.weight.shape, group.geometry
        out, into = (
            (weight[1] * geometry.groups, weight[0])
            if geometry.transposed
            else (weight[0], weight[1] * geometry.groups)
        )
        self.layouts[node] = Layout(out, geometry.dims + 1)
        source, other = node.args[0], node.args[1] if group.pattern.add else None
        free = group.norm is None and self.weights[id(group.weight)] == 1
        if not free or not (group.activation is None or isinstance(group.activation, HOMOGENEOUS)):
            self.pinned.add(node)
        if isinstance(source, fx.Node) and (not free or self.layouts.get(source) != Layout(into, geometry.dims + 1)):
            self.pinned.add(source)
        if not group.pattern.add:
            return
        if isinstance(other, fx.Node):
            if other is source or self.layouts.get(other) != self.layouts[node]:
                self.pinned.update((node, other))
            self._unite(node, other)
        else:
            self.pinned.add(node)

    def _after(self, node: fx.Node, module: nn.Module | None, before: Layout) -> Layout | None:
        """The layout of what is not a group and has inputs of one layout; None: it mixes channels, or nobody knows."""
        if isinstance(module, Operation):
            operator = module.operator
            if isinstance(operator, Add):
                return before
            if isinstance(operator, (AvgPool, AdaptiveAvgPool)):
                return before if before.axis == operator.dims + 1 else None
            if isinstance(operator, Mean) and sorted(operator.dim) == list(range(2, before.axis + 1)):
                return before if operator.keepdim else Layout(before.channels, 1)
            return None
        if not dataflow.passes(node, self.modules) or len(node.all_input_nodes) != 1:
            return None
        kind = node.target if module is None else type(module)
        if kind in ELEMENT_WISE:
            return before
        if kind in SPATIAL:
            return before if before.axis > 1 else None
        if kind in RESHAPING:  # [N, C, 1, 1] to [N, C]
            old, new = (n.meta.get("shape", ()) for n in (node.all_input_nodes[0], node))
            if len(new) == 2 and [*old] == [*new, *[1] * (before.axis - 1)]:
                return Layout(before.channels, 1)
        return None

    def _constants(self, node: fx.Node, module: nn.Module | None) -> bool:
        """An addition of something that is no tensor of the graph."""
        return (
            isinstance(module, Operation)
            and isinstance(module.operator, Add)
            and not all(isinstance(a, fx.Node) for a in node.args)
        )

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _unite(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self._root(a)] = self._root(b)

    # -- results ------------------------------------------------------------------------------------------------------------

    def spaces(self) -> Iterator[Space]:
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node in self.layouts or node in self.pinned:
                members.setdefault(self._root(node), []).append(node)
        for nodes in members.values():
            if self.pinned.isdisjoint(nodes):
                space = self._space(nodes)
                if space.tensors and space.readers:
                    yield space

    def _space(self, nodes: list[fx.Node]) -> Space:
        shared = []
        for node in nodes:
            quantizer = getattr(self._module(node), "output_quant", None)
            if quantizer is not None and quantizer.axis is None:
                module = self._module(node)
                assert module is not None
                shared.append(Shared(str(node.target), module, self.layouts[node].axis, tuple(self._behind(node))))
        groups = [m for n in nodes if isinstance(m := self._module(n), QATGroup)]
        return Space(tuple(shared), tuple(groups), tuple(r for n in nodes for r in self._readers(n)))

    def _readers(self, node: fx.Node) -> Iterator[QATGroup]:
        for user in node.users:
            module = self._module(user)
            if isinstance(module, QATGroup) and user.args[0] is node:
                yield module

    def _behind(self, node: fx.Node) -> Iterator[QATGroup]:
        """Readers of a node, also behind what hands its integers on."""
        yield from self._readers(node)
        for user in node.users:
            module = self._module(user)
            if user in self.layouts and not isinstance(module, (QATGroup, Operation)):
                yield from self._behind(user)
