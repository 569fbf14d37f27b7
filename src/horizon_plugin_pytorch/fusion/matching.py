"""Finding groups along the data flow of a traced graph, with a reason for everything that was left out.

From each anchor, the latest in execution order first (so of two convolutions that meet in an add the later takes it), the only
consumer of a value is followed: a batch norm, an add, an activation, each optional, in this order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import operators as ops
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.absorb_bn import absorbed_values_reason
from horizon_plugin_pytorch.fusion.graph_view import GraphView
from horizon_plugin_pytorch.fusion.patterns import Activation, Anchor
from horizon_plugin_pytorch.fusion.report import Kind, Miss
from horizon_plugin_pytorch.fusion.tracing import Traced


@dataclass
class Norm:
    """A batch norm in a graph: a module, or the module that the tensors of a functional call describe."""

    node: fx.Node
    module: nn.Module
    owner: str
    names: dict[str, str] | None = None  # tensor names of the module that are called otherwise at the owner


@dataclass
class Match:
    """One group: its nodes, in order, and what they are."""

    row: Anchor
    anchor: fx.Node
    module: nn.Module
    norm: Norm | None = None
    add: fx.Node | None = None
    functional: str | None = None  # the FloatFunctional that does the add
    activation: fx.Node | None = None
    activation_row: Activation | None = None
    nodes: list[fx.Node] = field(default_factory=list)  # all of them, stepped-over ones included
    target: str = ""  # where the group will stand

    @property
    def other(self) -> fx.Node | None:
        """The add's other operand."""
        add = ops.read_add(self.add) if self.add is not None else None
        return None if add is None else add.right if add.left in self.nodes else add.left

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


class Matcher(GraphView):
    """Matches one traced graph.

    Args:
        keep_bn: batch norms stay inside their group, so Dropout is not stepped over.
        traced, prefix, places: as of `GraphView`.
    """

    def __init__(self, traced: Traced, prefix: str, keep_bn: bool, places: dict[int, list[str]] | None = None) -> None:
        super().__init__(traced, prefix, keep_bn, places)
        self.whole = tuple(f"{path}." for path in traced.left_whole)
        self.matches: list[Match] = []
        self.misses: list[Miss] = []
        self.notes: list[str] = []
        self._taken: dict[fx.Node, Match] = {}
        self._told: set[fx.Node] = set()

    def miss(self, kind: Kind, node: fx.Node, reason: str, anchor: fx.Node | None = None) -> None:
        if node in self._told:
            return
        self._told.add(node)
        nodes = [n for n in (anchor, node) if n is not None]
        shared = next((self.name(n) for n in nodes if self.is_shared(n)), None)
        self.misses.append(Miss(kind, tuple(map(self.name, nodes)), reason, node.meta.get("source"), shared))

    # -- matching -----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for node in reversed(self.nodes):
            if self.anchor_row(node) is not None:
                match = self._grow(node)
                if match is not None and len(match.nodes) > 1:
                    self.matches.append(match)
                    self._taken.update(dict.fromkeys(match.nodes, match))
        self.matches.reverse()
        for node in self.nodes:
            if node not in self._taken:
                self._explain(node)
        self.misses.sort(key=lambda m: m.modules)

    def _grow(self, node: fx.Node) -> Match | None:
        row, module = self.anchor_row(node), self.module_of(node)
        assert row is not None and module is not None
        match = Match(row, node, module, nodes=[node])
        refused = self._module_reason(node, module, "anchor")

        user, over, reason = self.consumer(node)
        if user is not None and self.kind(user) == "norm":
            norm = self._norm(match, user, refused)
            if norm is None:
                return None
            match.norm = norm
            match.nodes += [*over, user]
            user, over, reason = self.consumer(user)
        if user is None:
            self._blocked(match, reason)
            return match

        if self.kind(user) == "add":
            add = ops.read_add(user)
            assert add is not None
            why = refused or self._add_reason(match, user, add, over)
            if why:
                self.miss("add", user, why, node)
                return match
            match.add = user
            match.nodes += [*over, user]
            match.functional = self._swallow(match)
            user, over, reason = self.consumer(match.end)
            if user is None:
                self._blocked(match, reason)
                return match

        row_of_activation = self.activation_row(user) if self.kind(user) == "activation" else None
        if row_of_activation is not None:
            why = refused or self._activation_reason(match, user)
            if why:
                self.miss("activation", user, why, node)
                return match
            match.activation, match.activation_row = user, row_of_activation
            match.nodes += [*over, user]
            functional = self._swallow(match)
            match.functional = match.functional or (functional if match.add is not None else None)
        return match

    def _leads(self, over: list[fx.Node], match: Match, operand: Any) -> bool:
        return operand is (over[-1] if over else match.end)

    def _swallow(self, match: Match) -> str | None:
        """Take in the FloatFunctional's own observer place behind its operator."""
        users = list(match.end.users)
        if len(users) == 1 and (functional := self.functional_of(users[0])) and self.passes(users[0]):
            match.nodes.append(users[0])
            return functional
        return None

    def _blocked(self, match: Match, reason: str | None) -> None:
        """The value ends the group because several read it: tell every reader that would have fitted."""
        if reason is None:
            return
        for user in match.end.users:
            kind = self.kind(user)
            if kind is not None and not (kind == "add" and user in self._taken):
                self.miss(kind, user, reason, match.anchor)

    def _norm(self, match: Match, node: fx.Node, refused: str | None) -> Norm | None:
        norm, reason = self._read_norm(match.row, node)
        if refused is None and norm is not None:
            reason = self._module_reason(node, norm.module, "norm", norm.owner)
            reason = reason or p.norm_reason(match.row, match.module, norm.module)
            reason = reason or self._rank_reason(match) or self._hooks(match.anchor, node)
            if reason is None and (bad := p.norm_values_reason(norm.module)):
                raise FusionError(f"cannot absorb the batch norm {self.name(node)!r}: {bad}")
            if not self.keep_bn:
                reason = reason or absorbed_values_reason(match.row, match.module, norm.module)
        if refused or reason:
            self.miss("norm", node, refused or reason or "", match.anchor)
            return None
        return norm

    def _read_norm(self, row: Anchor, node: fx.Node) -> tuple[Norm | None, str | None]:
        module = self.module_of(node)
        if module is not None:
            return Norm(node, module, str(node.target)), None
        call = ops.read_batch_norm(node)
        assert call is not None
        tensors = {n: call[n] for n in ("weight", "bias", "running_mean", "running_var") if call[n] is not None}
        if any(not isinstance(t, fx.Node) or t.op != "get_attr" for t in tensors.values()):
            return None, "its statistics or affine values are computed in the forward, not held by a module"
        if "running_mean" not in tensors or "running_var" not in tensors:
            return None, "it has no running statistics, so there is nothing constant to absorb"
        places = {n: str(t.target).rpartition(".") for n, t in tensors.items()}
        owners = {owner for owner, _, _ in places.values()}
        if len(owners) > 1:
            return None, f"its tensors belong to different modules: {', '.join(sorted(repr(o) for o in owners))}"
        users = {user for t in tensors.values() for user in t.users} - {node}
        if users:
            return None, f"its tensors are read by {self.names(users)}, too"
        owner = self.modules[owners.pop()]
        if call["training"] is not owner.training:
            if call["training"]:
                return None, "it normalizes with the statistics of the batch, also in eval mode"
            if self.keep_bn or not isinstance(call["training"], bool):
                return None, "it normalizes with its running statistics, also in training mode"
        values = {n: getattr(owner, attr) for n, (_, _, attr) in places.items()}
        path = places["running_mean"][0]
        stack: Any = node.meta.get("nn_module_stack")
        own = (
            isinstance(owner, nn.modules.batchnorm._BatchNorm)
            and bool(stack)
            and stack[next(reversed(stack))][0] == path
        )
        momentum = owner.momentum if own else call["momentum"]  # in eval mode a module may pass something else
        norm: Any = row.norm(values["running_mean"].numel(), eps=call["eps"], momentum=momentum, affine=False)
        for n, value in values.items():
            if isinstance(value, nn.Parameter):
                norm.register_parameter(n, value)
            else:
                norm.__dict__.pop(n, None)
                norm._parameters.pop(n, None)
                norm.register_buffer(n, value)
        norm.affine = "weight" in values
        norm.register_buffer("num_batches_tracked", owner.num_batches_tracked if own else None)
        norm.train(owner.training)
        names = {n: attr for n, (_, _, attr) in places.items()}
        if own:
            names["num_batches_tracked"] = "num_batches_tracked"
        return Norm(node, norm, path, names), None

    # -- reasons ------------------------------------------------------------------------------------------------------------

    def _module_reason(self, node: fx.Node, module: nn.Module, role: str, owner: str | None = None) -> str | None:
        """Why a module with tensors cannot move into a group: shared, or its tensors are read elsewhere."""
        path = str(node.target) if owner is None else owner
        if node.op == "call_module":
            calls = self.calls[id(module)]
            if len(calls) > 1:
                where = ", ".join(sorted({n.meta.get("source", "?") for n in calls}))
                return f"{self.name(node)!r} is called {len(calls)} times ({where}): it is shared"
            names = self.paths[id(module)]
            if len(names) > 1:
                return f"{self.name(node)!r} is the same module as {', '.join(repr(n) for n in names if n != path)}: it is shared"
            if outside := self.places_outside(module):
                return f"{self.name(node)!r} is the same module as {outside[0]!r}: it is shared"
            if path.startswith(self.whole):
                return f"{self.name(node)!r} is inside a module that was left whole and may call it, too"
            if self.reads[path]:
                return f"the parameters of {self.name(node)!r} are read by the forward, too"
        if role == "anchor":
            if reason := p.anchor_reason(module):
                return f"{self.name(node)!r}: {reason}"
        return None

    def _hooks(self, first: fx.Node, last: fx.Node) -> str | None:
        """Hooks between two nodes of a group; those on its ends move to the group."""
        a, b = self.module_of(first), self.module_of(last)
        if a is None:
            return None
        return p.hook_reason(a, [], b if b is not None else nn.Identity())

    def _rank_reason(self, match: Match) -> str | None:
        shape = match.anchor.meta.get("shape")
        rank = match.row.norm_input_dim
        if rank is not None and shape is not None and len(shape) != rank:
            return f"the output of {self.name(match.anchor)!r} has {len(shape)} dimensions, so it does not normalize its channels"
        return None

    def _add_reason(self, match: Match, node: fx.Node, add: ops.Add, over: list[fx.Node]) -> str | None:
        if add.refused:
            return add.refused
        if node in self._taken:
            return f"the add takes the later of two convolutions, {self.name(self._taken[node].anchor)!r}"
        left_is_ours = self._leads(over, match, add.left)
        other: fx.Node = add.right if left_is_ours else add.left
        ours, theirs = match.end.meta, other.meta
        if ours.get("shape") and theirs.get("shape") is not None and ours["shape"] != theirs["shape"]:
            return f"it broadcasts {theirs['shape']} ({self.name(other)!r}) and {ours['shape']}"
        if ours.get("dtype") and theirs.get("dtype") and ours["dtype"] != theirs["dtype"]:
            return f"its operands differ in dtype: {ours['dtype']} and {theirs['dtype']} ({self.name(other)!r})"
        for part in (match.anchor, match.norm.node if match.norm else None):
            module = self.module_of(part) if part is not None else None
            if module is not None and p.has_hooks(module):
                return f"a hook on {self.name(part)!r} observes a value inside the group"  # type: ignore[arg-type]
        # The anchor will run where the add is: nothing may overwrite its input before.
        storages = {self.storage(source) for source in match.anchor.all_input_nodes}
        for between in self.nodes[self.order[match.anchor] + 1 : self.order[node]]:
            if any(self.storage(changed) in storages for changed in ops.overwritten(between, self.modules)):
                return f"{self.name(between)!r} overwrites the input of {self.name(match.anchor)!r} before the add"
        # An add in place into the other operand: nobody may read that one afterwards.
        if add.inplace and not left_is_ours:
            for earlier in self.sharing(other):
                if self.order[earlier] < self.order[node] and any(
                    self.order[u] > self.order[node] for u in earlier.users
                ):
                    return f"it adds in place into {self.name(other)!r}, which is read again later"
        return None

    def _activation_reason(self, match: Match, node: fx.Node) -> str | None:
        module = self.module_of(node)
        tables = set(p.HOOK_TABLES) - {"_forward_hooks"}
        if module is not None and any(getattr(module, table, None) for table in tables):
            return f"a hook on {self.name(node)!r} observes a value inside the group"
        if module is not None and module._forward_hooks and len(self.calls[id(module)]) > 1:
            return f"{self.name(node)!r} has a hook and is called several times"
        before = match.norm.node if match.norm and match.add is None else match.anchor if match.add is None else None
        inner = self.module_of(before) if before is not None else None
        if inner is not None:
            inner_tables = {"_forward_hooks", "_backward_hooks", "_backward_pre_hooks"}
            if any(getattr(inner, table, None) for table in inner_tables):
                return f"a hook on {self.name(before)!r} observes a value inside the group"  # type: ignore[arg-type]
        return None

    def _explain(self, node: fx.Node) -> None:
        """A norm or an add that no anchor took."""
        if node in self._told:
            return
        if add := ops.read_add(node):
            if not add.refused:
                operands = self.names([add.left, add.right])
                self.miss("add", node, f"neither operand is a convolution's or linear layer's output: {operands}")
            return
        if self.kind(node) != "norm":
            return
        source: Any = node.args[0] if node.args else node.kwargs.get("input")
        while isinstance(source, fx.Node) and self.passes(source):
            source = source.args[0]
        if not isinstance(source, fx.Node):
            return
        row = self.anchor_row(source)
        if row is not None:
            users = [u for u in source.users]
            if len(users) > 1:
                reason = f"the output of {self.name(source)!r} is used by {len(users)} consumers: {self.names(users)}"
            else:
                reason = "the convolution before it is part of another group"
            self.miss("norm", node, reason, source)
        elif (inside := self._unusual_anchor(source)) is not None:
            path, kind = inside
            self.misses.append(
                Miss(
                    "norm",
                    (path, self.name(node)),
                    f"{kind} {path!r} has a forward of its own",
                    node.meta.get("source"),
                )
            )
        else:
            self.miss("norm", node, f"its input is {self.name(source)!r}, not a convolution's or linear layer's output")

    def _unusual_anchor(self, node: fx.Node) -> tuple[str, str] | None:
        """The path and type of the subclass of an anchor, with a forward of its own, that a node is or is inside of."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            node = node.args[0]  # it returns more than its output
        paths = (
            [str(node.target)]
            if node.op == "call_module"
            else [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        )
        for path in reversed(paths):
            module = self.modules.get(path)
            if isinstance(module, p.anchor_types()):
                return (f"{self.prefix}.{path}" if self.prefix else path), type(module).__name__
        return None
