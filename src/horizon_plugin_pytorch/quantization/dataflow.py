"""What a prepared model's graph says about each operator: who reads its output, and so how it is quantized.

The graph is only read here. A model fused by name is traced for this and goes on running its own forward.
"""

from __future__ import annotations

import operator as python_operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup
from horizon_plugin_pytorch.nn.quantized import qtensor

PASSING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
"""Modules that hand integers on: they move data or take a maximum, so the scale stays."""

PASSING_FUNCTIONS: frozenset[Any] = frozenset(
    f for f in qtensor._RULES if f not in (torch.cat, torch.concat, torch.concatenate)
) | {python_operator.getitem, F.max_pool1d, F.max_pool2d, F.max_pool3d}
PASSING_METHODS: frozenset[str] = frozenset(
    "view reshape flatten unflatten permute transpose squeeze unsqueeze expand expand_as chunk split select narrow index_select roll "
    "flip unbind repeat view_as reshape_as movedim t swapaxes tile contiguous clone detach relu relu_".split()
)
CHANNEL_KEEPING: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Passing modules through which one scale per channel survives."""

QUERY_METHODS = frozenset(("size", "dim", "numel", "stride", "is_contiguous", "ndimension"))


def is_stub(module: nn.Module, name: str) -> bool:
    return any(t.__name__ == name for t in type(module).__mro__)


def is_query(node: fx.Node) -> bool:
    """Reads a shape or the like, not the values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype", "ndim", "is_cuda")
    return node.op == "call_method" and node.target in QUERY_METHODS


def passes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Hands the integers of its first argument on."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            return not module.return_indices
        if isinstance(module, nn.Upsample):
            return module.mode.startswith("nearest")
        return isinstance(module, PASSING_MODULES)
    if node.op == "call_function":
        if node.target is F.interpolate:
            arguments = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False)) | node.kwargs
            return str(arguments.get("mode", "nearest")).startswith("nearest")
        if node.target is F.pad:
            arguments = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
            return arguments.get("mode", "constant") != "constant" or arguments.get("value") in (None, 0, 0.0)
        return node.target in PASSING_FUNCTIONS
    return node.op == "call_method" and node.target in PASSING_METHODS


@dataclass(frozen=True)
class OutputPlan:
    """How the output of one operator is quantized.

    Attributes:
        high_precision: it is read only where values are float, so it is not rounded.
        per_channel: it is read only by depthwise convolutions, so each channel has its own scale.
        nonnegative: none of its values can be negative.
    """

    high_precision: bool = False
    per_channel: bool = False
    nonnegative: bool = False


def readers(node: fx.Node, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, fx.Node, bool]]:
    """``(reader, the node it reads, channels kept on the way)`` behind everything that passes integers on."""
    found = []
    todo = [(node, True)]
    seen = set()
    while todo:
        current, kept = todo.pop()
        for user in current.users:
            if is_query(user) or (user, current) in seen:
                continue
            seen.add((user, current))
            if passes(user, modules) and user.args and user.args[0] is current:
                keeps = user.op == "call_module" and isinstance(modules[str(user.target)], CHANNEL_KEEPING)
                todo.append((user, kept and keeps))
            else:
                found.append((user, current, kept))
    return found


def is_depthwise_input(reader: fx.Node, read: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """`reader` is a depthwise convolution and reads `read` as its input (not as the other operand of its add)."""
    if reader.op != "call_module" or not reader.args or reader.args[0] is not read or read in reader.args[1:]:
        return False
    module = modules[str(reader.target)]
    anchor = module.anchor if isinstance(module, FusedGroup) else module
    row = p.anchor_of(anchor)
    if row is None or row.child == "linear":
        return False
    groups: Any = anchor.groups
    return groups > 1 and groups == anchor.in_channels
