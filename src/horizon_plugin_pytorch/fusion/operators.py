"""How the stages of a group are written in a graph: every function and method that is an add, an activation or a batch norm."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from horizon_plugin_pytorch.fusion import patterns
from horizon_plugin_pytorch.fusion.patterns import Activation


def assign(target: Any, value: Any, operation: str) -> Any:
    """``target += value`` and the like, as a function: `operation` is the operator's name, e.g. ``iadd``.

    PyTorch's own tracing records ``a += b`` as ``a = a + b``, which other names of the same tensor do not see; and a call of
    ``operator.iadd`` is printed as the statement ``a += b``, which rebinds a name of an int that is read again later.
    """
    if isinstance(target, fx.Proxy):  # traced again, as PyTorch does when it loads a graph module
        return target.tracer.create_proxy("call_function", assign, (target, value, operation), {})
    return getattr(operator, operation)(target, value)


ASSIGNMENTS = tuple(
    f"i{name}" for name in "add sub mul truediv floordiv mod pow and or xor matmul lshift rshift".split()
)

ADDS: frozenset[Any] = frozenset(
    {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_, "add", "add_", "__add__", "__iadd__"}
)
INPLACE_ADDS: frozenset[Any] = frozenset({operator.iadd, torch.Tensor.add_, "add_", "__iadd__", assign})

# Every clamp is read as (lower, upper); the arguments after the tensor, by name with their defaults.
_ReadBounds = Callable[..., tuple[Any, Any]]
_relu: _ReadBounds = lambda inplace=False: (0, None)  # noqa: E731
_relu6: _ReadBounds = lambda inplace=False: (0, 6)  # noqa: E731
_hardtanh: _ReadBounds = lambda min_val=-1.0, max_val=1.0, inplace=False: (min_val, max_val)  # noqa: E731
_clamp: _ReadBounds = lambda min=None, max=None: (min, max)  # noqa: E731
_clamp_min: _ReadBounds = lambda min: (min, None)  # noqa: E731

ACTIVATIONS: dict[Any, _ReadBounds] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    torch.Tensor.relu: _relu,
    "relu": _relu,
    "relu_": _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh,
    torch.clamp: _clamp,
    torch.clip: _clamp,
    "clamp": _clamp,
    "clamp_": _clamp,
    "clip": _clamp,
    "clip_": _clamp,
    torch.clamp_min: _clamp_min,
    "clamp_min": _clamp_min,
    "clamp_min_": _clamp_min,
}

BATCH_NORMS: dict[Any, inspect.Signature] = {
    F.batch_norm: inspect.signature(F.batch_norm),
    torch.batch_norm: inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()
        ]
    ),
}


def is_interesting(target: Any) -> bool:
    return target in ADDS or target is assign or target in ACTIVATIONS or target in BATCH_NORMS


@dataclass(frozen=True)
class Add:
    left: Any
    right: Any
    inplace: bool
    refused: str | None = None


def read_add(node: fx.Node) -> Add | None:
    """The operands of an add node, and why it cannot be part of a group, if so."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target not in ADDS and not (node.target is assign and node.args[2] == "iadd"):
        return None
    arguments = dict(zip(("input", "other"), node.args, strict=False)) | node.kwargs
    left, right = arguments.get("input"), arguments.get("other")
    refused = None
    if arguments.get("alpha", 1) != 1:
        refused = f"it scales its second operand (alpha={arguments['alpha']})"
    elif arguments.get("out") is not None:
        refused = "it writes into a tensor given as out="
    elif not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        constant = right if isinstance(left, fx.Node) else left
        refused = f"it adds a constant ({constant!r})"
    elif left is right:
        refused = "both operands are the same tensor"
    return Add(left, right, node.target in INPLACE_ADDS, refused)


def read_activation(node: fx.Node) -> Activation | None:
    """The activation row of a function or method node, ``None`` if it is none of the rows."""
    if node.op not in ("call_function", "call_method") or node.target not in ACTIVATIONS:
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
    try:
        low, high = ACTIVATIONS[node.target](*node.args[1:], **kwargs)
    except TypeError:
        return None
    if isinstance(low, (fx.Node, type(None))) or low != 0 or isinstance(high, fx.Node):
        return None
    bound = None if high is None or high == float("inf") else high
    return next((row for row in patterns.ACTIVATIONS if row.bound == bound and row.type in _CLAMPS), None)


_CLAMPS = (patterns.RELU.type, patterns.RELU6.type)


def read_batch_norm(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a functional batch norm by name."""
    if node.op != "call_function" or node.target not in BATCH_NORMS:
        return None
    bound = BATCH_NORMS[node.target].bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def overwritten(node: fx.Node, modules: dict[str, Any]) -> list[fx.Node]:
    """The nodes whose value this one overwrites."""
    if node.meta.get("overwrites"):  # a module left whole that does, or may
        return list(node.all_input_nodes)
    first = node.args[0] if node.args else node.kwargs.get("input")
    out = node.kwargs.get("out")
    values = [first] if _in_place(node, modules) else []
    return [value for value in (*values, out) if isinstance(value, fx.Node)]


def _in_place(node: fx.Node, modules: dict[str, Any]) -> bool:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return (name.endswith("_") and not name.endswith("__")) or name.strip("_") in ASSIGNMENTS
    return node.op == "call_function" and (
        node.target is assign
        or (name in ASSIGNMENTS and getattr(operator, name) is node.target)
        or node.kwargs.get("inplace") is True
        or (node.target in ACTIVATIONS and any(a is True for a in node.args[1:]))
        or name == "setitem"
        or (name.endswith("_") and name[0] != "_")
    )


def may_alias(node: fx.Node) -> bool:
    """Whether the result can share memory with the first argument, apart from working in place."""
    if node.op == "call_module":
        return bool(node.meta.get("opaque"))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in VIEWS


VIEWS = frozenset(
    """
    as_strided broadcast_to chunk contiguous data detach diagonal dsplit expand expand_as flatten getattr getitem hsplit mT mH
    moveaxis movedim narrow permute positive ravel real imag reshape reshape_as resolve_conj resolve_neg select split
    split_with_sizes squeeze swapaxes swapdims t T H tensor_split to transpose type type_as unbind unflatten unfold unsqueeze
    view view_as view_as_complex view_as_real vsplit adjoint atleast_1d atleast_2d atleast_3d broadcast_tensors float half
    bfloat16 double cpu cuda dropout alpha_dropout feature_dropout requires_grad_ __getitem__
    """.split()
)
"""Functions, methods and attributes, by name, whose result can share memory with their first argument."""
