"""Reading a graph: which values are float tensors, which nodes hand integers on, and who reads a value in the end.

Nothing here changes a graph or decides anything.
"""

from __future__ import annotations

import operator as python_operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup
from horizon_plugin_pytorch.nn.quantized import qtensor

Modules = dict[str, nn.Module]

DROPOUTS: tuple[type[nn.Module], ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
PASSING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, *DROPOUTS,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.Upsample,
)  # fmt: skip
"""Modules that hand integers on: they move data or take a maximum, so the scale stays."""
CHANNEL_KEEPING: tuple[type[nn.Module], ...] = (nn.Identity, *DROPOUTS)
"""Passing modules through which one scale per channel survives."""

_JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack}
PASSING_FUNCTIONS: frozenset[Any] = frozenset(qtensor.RULES) - _JOINS | {
    python_operator.getitem,
    python_operator.pos,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
}
PASSING_METHODS = frozenset([*qtensor.MOVES.split(), *qtensor.KEEPS.split(), "relu", "relu_", "cpu", "cuda"])
PASSING_ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real")

QUERY_METHODS = frozenset(
    "size dim numel stride is_contiguous ndimension get_device element_size is_floating_point storage_offset".split()
)
QUERY_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "is_cuda", "layout", "requires_grad")

NOT_FLOAT = frozenset(
    "eq ne lt le gt ge equal isnan isinf isfinite isclose allclose logical_and logical_or logical_not logical_xor any all "
    "argmax argmin argsort nonzero searchsorted bucketize bincount long int short bool byte char item tolist len arange".split()
)
"""Functions and methods, by name, whose result is no tensor of floating-point numbers."""
_PAIRS = frozenset("max min sort topk kthvalue mode median cummax cummin".split())
"""Functions that return values and indices."""


def is_stub(module: nn.Module, name: str) -> bool:
    return any(t.__name__ == name for t in type(module).__mro__)


def computes_as(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """One of these modules, or a subclass that computes the same."""
    return "forward" not in module.__dict__ and any(
        isinstance(module, t) and type(module).forward is t.forward for t in types
    )


def module_of(node: fx.Node, modules: Modules) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def is_query(node: fx.Node) -> bool:
    """Reads a shape or the like, not the values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in QUERY_ATTRIBUTES
    return node.op == "call_method" and node.target in QUERY_METHODS


_NUMBERS = (int, float, bool, str, "int", "float", "bool", "str")
"""Annotations, which can be strings."""


def float_values(graph: fx.Graph, modules: Modules) -> set[fx.Node]:
    """The nodes that are float tensors (or tuples of them): by their recorded dtype, or else by what they are computed from."""
    found: set[fx.Node] = set()
    recorded = any("dtype" in node.meta for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        if "dtype" in node.meta:
            is_float = node.meta["dtype"].is_floating_point
        elif node.op == "placeholder":
            is_float = not recorded and node.type not in _NUMBERS
        elif node.op == "get_attr":
            value: Any = modules[""]
            for name in str(node.target).split("."):
                value = getattr(value, name, None)
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        elif node.op == "call_module":
            is_float = True
        elif node.op == "output" or is_query(node):
            is_float = False
        else:
            is_float = any(n in found for n in node.all_input_nodes) and not _is_other(node)
        if is_float:
            found.add(node)
    return found


def _is_other(node: fx.Node) -> bool:
    """A function of float tensors whose result is something else."""
    if any(isinstance(a, torch.dtype) and not a.is_floating_point for a in (*node.args, *node.kwargs.values())):
        return True
    if node.target is python_operator.getitem and node.args[1] == 1:
        source: Any = node.args[0]
        return source.op in ("call_function", "call_method") and function_name(source) in _PAIRS
    return function_name(node).strip("_") in NOT_FLOAT


def passes(node: fx.Node, modules: Modules) -> bool:
    """Hands the integers of its first argument on."""
    module = module_of(node, modules)
    if module is not None:
        if node.meta.get("moves"):
            return True
        if not computes_as(module, PASSING_MODULES) or getattr(module, "return_indices", False):
            return False
        if isinstance(module, nn.Upsample):
            return qtensor.interpolates_integers(module.mode, module.recompute_scale_factor)
        return not getattr(module, "value", 0)  # what a ConstantPad pads with
    if node.op == "call_method":
        return node.target in PASSING_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in PASSING_ATTRIBUTES
    if node.target is F.interpolate:
        call: Any = dict(zip(qtensor.INTERPOLATE.split(), node.args, strict=False)) | node.kwargs
        return qtensor.interpolates_integers(**call)
    if node.target is F.pad:
        call = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        return call.get("mode", "constant") != "constant" or call.get("value") in (None, 0, 0.0)
    return node.target in PASSING_FUNCTIONS and not node.kwargs.get("return_indices", False)


def only_moves(module: nn.Module) -> bool:
    """A user's module whose forward does nothing but hand the integers of its one input on, e.g. a channel shuffle."""
    if type(module).__module__.startswith("torch.nn") or p.has_hooks(module):
        return False
    try:
        graph = fx.Tracer().trace(module)
    except Exception:
        return False
    modules = dict(module.named_modules())
    floats = float_values(graph, modules)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    body = [n for n in graph.nodes if n in floats and n.op != "placeholder"]
    return len(inputs) == 1 and bool(body) and all(passes(n, modules) for n in body)


def readers(node: fx.Node, modules: Modules, integer: set[fx.Node]) -> list[tuple[fx.Node, fx.Node, bool]]:
    """``(reader, the node it reads, channels kept on the way)`` behind everything that passes integers on.

    Args:
        integer: the nodes whose value is integers.
    """
    found = []
    todo = [(node, True)]
    seen = set()
    while todo:
        current, kept = todo.pop()
        for user in current.users:
            if is_query(user) or (user, current) in seen:
                continue
            seen.add((user, current))
            if user in integer and passes(user, modules) and first_argument(user) is current:
                module = module_of(user, modules)
                todo.append((user, kept and module is not None and computes_as(module, CHANNEL_KEEPING)))
            else:
                found.append((user, current, kept))
    return found


def is_depthwise_input(reader: fx.Node, read: fx.Node, modules: Modules) -> int | None:
    """The number of spatial dimensions, if `reader` is a depthwise convolution and `read` its input (and not the other operand of
    its add)."""
    module = module_of(reader, modules)
    if module is None or first_argument(reader) is not read or read in reader.args[1:]:
        return None
    anchor: Any = module.anchor if isinstance(module, FusedGroup) else module
    row = p.anchor_of(anchor)
    if row is None or row.child == "linear" or not anchor.groups == anchor.in_channels > 1:
        return None
    return len(anchor.kernel_size)
