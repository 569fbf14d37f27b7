"""Symbolic tracing that keeps whole what it cannot or need not look into.

A module in whose body nothing could fuse stays one call (so it keeps its hooks, its names and its behaviour in training), and so
does one that cannot be traced: the road around it is still traced, and its own parts are then looked at one by one.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from horizon_plugin_pytorch.fusion import operators, patterns
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
            self.left_whole[path] = explain(error)
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


def explain(error: BaseException) -> str:
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
