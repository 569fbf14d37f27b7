"""Symbolic tracing that keeps whole what it cannot or need not look into.

A module in whose body nothing could fuse stays one call (so it keeps its hooks, its names and its behaviour in training), and so
does one that cannot be traced: the road around it is still traced, and its own parts are then looked at one by one.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from horizon_plugin_pytorch.fusion import calls, operators, patterns
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup, Handoff
from horizon_plugin_pytorch.nn.intrinsic.handoff import AnchorInput, refuse_escaped

_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


def expect_default(value: Any, default: Any, name: str) -> None:
    """A traced forward was specialized to an argument's default; raise if it is called with something else."""
    if isinstance(value, fx.Proxy):  # traced again, as PyTorch does when it loads a graph module
        value.tracer.create_proxy("call_function", expect_default, (value, default, name), {})
    elif value is not default and (isinstance(value, torch.Tensor) or value != default):
        raise ValueError(
            f"forward was traced with {name}={default!r}. To pass it, give fuse_fx example_inputs that contain it."
        )


@dataclass
class Traced:
    """The graph of one module, the modules inside that were left whole, with the reason, and the nodes that are not the same
    in the other training mode (None: it cannot be traced there)."""

    root: nn.Module
    graph: fx.Graph
    left_whole: dict[str, str] = field(default_factory=dict)
    of_this_mode: set[fx.Node] | None = field(default_factory=set)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that stand in the forward itself, by the names the graph reads."""


class FusionTracer(fx.Tracer):
    """`fx.Tracer` with buffers as graph values, source lines and modules left whole; see the module docstring.

    Args:
        given: names of forward's arguments that are passed; the others are specialized to their defaults.
    """

    def __init__(self, given: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.given = given
        self.left_whole: dict[str, str] = {}
        self._interesting = 0
        self._attributes: dict[str, fx.Proxy] = {}

    # -- leaves -------------------------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Handoff):
            return False
        return (
            isinstance(m, FusedGroup) or is_known(m) or super().is_leaf_module(m, module_qualified_name) or is_stub(m)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if any(isinstance(a, AnchorInput) for a in args) or isinstance(m, Handoff):
            return forward(*args, **kwargs)
        if (
            type(m).__call__ is not nn.Module.__call__
        ):  # what it does around its forward is recorded, and must not run twice
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            if is_known(m) or isinstance(m, FusedGroup):
                self._interesting += 1
            return super().call_module(m, forward, args, kwargs)
        if hooks := [t for t in patterns.HOOK_TABLES if any(h is not refuse_escaped for h in getattr(m, t).values())]:
            self.left_whole[path] = f"it has {hooks[0].strip('_').replace('_', ' ')}, which see its inputs or outputs"
            return self._call_whole(path, args, kwargs, overwrites=True)

        mark, stack, interesting = self.graph._root.prev, dict(self.module_stack), self._interesting
        whole = dict(self.left_whole)
        check, m.__dict__["_check_input_dim"] = (
            m.__dict__.get("_check_input_dim"),
            _no_check,
        )  # compares a rank with a number
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self._roll_back(mark)
            self.module_stack.clear()
            self.module_stack.update(stack)
            self._interesting = interesting
            self.left_whole = whole
            self.left_whole[path] = _explain(error)
            return self._call_whole(path, args, kwargs, overwrites=True)
        finally:
            del m.__dict__["_check_input_dim"]
            if check is not None:
                m.__dict__["_check_input_dim"] = check
        nothing_inside = self._interesting == interesting and self.left_whole == whole
        if nothing_inside and isinstance(result, fx.Proxy) and self.graph._root.prev is not mark:
            try:
                self.create_arg((args, kwargs))
            except Exception:
                return result  # the call cannot be written down as one
            overwrites = self._overwrites_since(mark)
            self._roll_back(mark)
            if any(patterns.anchor_of(child) is not None for child in m.modules()):
                self.left_whole[path] = "its convolutions are called from where tracing does not see them"
            return self._call_whole(path, args, kwargs, overwrites)
        return result

    def _call_whole(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], overwrites: bool) -> fx.Proxy:
        proxy = self.create_proxy("call_module", path, args, kwargs)
        proxy.node.meta |= {"opaque": True, "overwrites": overwrites}
        return proxy

    def _overwrites_since(self, mark: fx.Node) -> bool:
        node = self.graph._root.prev
        while node is not mark:
            if operators.overwritten(node, self._modules):
                return True
            node = node.prev
        return False

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.root.named_modules(remove_duplicate=False))

    def _roll_back(self, mark: fx.Node) -> None:
        gone = set()
        while (node := self.graph._root.prev) is not mark:
            gone.add(node)
            self.graph.erase_node(node)
        for name, proxy in list(self._attributes.items()):
            if proxy.node in gone:
                del self._attributes[name]

    # -- what tracing records -------------------------------------------------------------------------------------------------

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self._attributes = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method") and operators.is_interesting(target):
            self._interesting += 1
        if kind != "placeholder" and (source := _user_line()):
            node.meta["source"] = source
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        for i, arg in enumerate(args):
            if not isinstance(arg, fx.Proxy):
                continue
            name = str(arg.node.target).lstrip("*")
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            if default is not inspect.Parameter.empty and name not in self.given:
                self.create_proxy("call_function", expect_default, (arg, default, name), {})
                args[i] = default
        return fn, args


class _Proxy(fx.Proxy):
    """A traced value on which ``a += b`` is recorded as working in place."""


def _assignment(operation: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operators.assign, (self, other, operation), {}, name=operation)

    return assign


for _name in operators.ASSIGNMENTS:
    setattr(_Proxy, f"__{_name}__", _assignment(_name))


def _no_check(*_: Any) -> None: ...


def is_known(m: nn.Module) -> bool:
    """A module that a group could hold."""
    return patterns.anchor_of(m) is not None or patterns.is_norm(m) or patterns.activation_of(m) is not None


def is_stub(m: nn.Module) -> bool:
    return any(t.__name__ in ("QuantStub", "DeQuantStub") for t in type(m).__mro__)


def _explain(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


def _user_line() -> str | None:
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "trace":  # above it, the code that asked for the trace
        filename = frame.f_code.co_filename
        if not filename.startswith(_LIBRARIES) and not filename.startswith("<"):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


# ---------------------------------------------------------------------------------------------------------------------------
# The largest traceable parts


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
            whole[path] = (module, _explain(error))
            todo.extendleft(reversed(list(_parts(path, module))))
            continue
        traced[path] = Traced(module, graph, tracer.left_whole, _of_this_mode(module, graph, names), constants)
        for inner, reason in tracer.left_whole.items():
            child = module.get_submodule(inner)
            if _has_anchor(child):
                whole[_join(path, inner)] = (child, reason)
                todo.extend(_parts(_join(path, inner), child, _uses_inside(graph, inner)))
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


def _uses_inside(graph: fx.Graph, path: str) -> frozenset[calls.Use]:
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


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Undo what a traced forward stores on modules (``self.features = x``): it would be the tracer's values.

    Yields a dict that has, afterwards, the constant tensors that the tracer stored on `module` for its graph.
    """
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    constants: dict[str, torch.Tensor] = {}
    try:
        yield constants
    finally:
        constants |= {n: t for n, t in module.__dict__.items() if n.startswith("_tensor_constant")}
        for m, attributes in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)


def _join(path: str, name: str) -> str:
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
        yield _join(path, name), part, given


# ---------------------------------------------------------------------------------------------------------------------------
# Shapes


def record_shapes(traced: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Put ``meta["shape"]`` and ``meta["dtype"]`` on every node, computed without computing (fake tensors).

    A module left whole is seen to overwrite its inputs, or not to: ``meta["overwrites"]`` then says so.

    Returns:
        why it stopped, if it did.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            inputs = tree_leaves([self.env[i] for i in n.all_input_nodes]) if n.meta.get("opaque") else []
            before = [(t, t._version) for t in inputs if isinstance(t, torch.Tensor)]
            value = super().run_node(n)
            if n.meta.get("opaque"):
                n.meta["overwrites"] = any(t._version != version for t, version in before)
            if isinstance(value, torch.Tensor):
                n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
            return value

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = bind(traced.graph, args, kwargs)
    try:
        root = _without_data(traced, mode)  # outside of the mode: tensors that are plain attributes are copied, too
        with mode, torch.no_grad():
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, values)
            Recorder(root, graph=traced.graph).run(*fakes)
    except Exception as error:
        return _explain(error)
    return None


def _without_data(traced: Traced, mode: Any) -> nn.Module:
    """A copy to run on fake tensors: the model's own batch norms must not count, nor its hooks see anything."""
    root = traced.root
    memo = {id(t): mode.from_tensor(t) for t in (*root.parameters(), *root.buffers())}
    result = copy.deepcopy(root, memo)
    result.__dict__.update(traced.constants)
    for module in result.modules():
        for table in patterns.HOOK_TABLES:
            getattr(module, table).clear()
    return result


def bind(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of the graph's placeholders, defaults where not given."""
    values: list[Any] = []
    rest = list(args)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if str(node.target).startswith("**"):
            values.append({k: v for k, v in kwargs.items() if k not in {str(n.target) for n in graph.nodes}})
        elif str(node.target).startswith("*"):
            values.append(tuple(rest))
            rest = []
        elif rest:
            values.append(rest.pop(0))
        elif node.target in kwargs:
            values.append(kwargs[node.target])
        elif node.args:
            values.append(node.args[0])
        else:
            raise ValueError(f"example_inputs have no value for the argument {node.target!r}")
    return values


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model call from what a user gives: a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def given_names(model: nn.Module, example_inputs: Any) -> frozenset[str]:
    """Names of forward's arguments that `example_inputs` fill."""
    if example_inputs is None:
        return frozenset()
    args, kwargs = call_arguments(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"example_inputs do not fit the forward of {type(model).__name__}: {error}") from None
    return frozenset(bound.arguments)
