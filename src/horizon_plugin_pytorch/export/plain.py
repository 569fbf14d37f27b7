"""A plan's steps on plain tensors: integers and their scale side by side, where the reference has a `QTensor`.

`torch.export` cannot trace a subclass made on the way. What a function does to integers is `nn.quantized.qtensor`'s rule for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.nn.quantized.qtensor import KEEPS, MOVES
from horizon_plugin_pytorch.plan.program import Step
from horizon_plugin_pytorch.plan.steps import fill, run_function, run_step


@dataclass(frozen=True, eq=False)
class Integers:
    """int8 or uint8, and float32: one scale, or one per channel (dim 1)."""

    payload: Tensor
    scale: Tensor

    @classmethod
    def make(cls, payload: Tensor, scale: Tensor, dtype8: torch.dtype) -> Integers:
        return cls(payload, scale)

    def dequantize(self) -> Tensor:
        return reference.dequantize(self.payload, self.scale, 1 if self.per_channel else None)

    @property
    def per_channel(self) -> bool:
        return self.scale.dim() > 0


def run_plain_step(step: Step, values: Callable[[int], Any], constants: dict[str, Tensor]) -> Any:
    """The result of a step: as `plan.steps.run_step`, with `Integers` for each QTensor."""
    if step.kind != "function":
        return run_step(step, values, constants, Integers.make)
    args, kwargs = fill(step.args, values, constants), fill(step.kwargs, values, constants)
    if any(isinstance(a, Integers) for a in tree_leaves((args, kwargs))):
        result = _on_integers(step.target, args, kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = floats((args, kwargs))
    return run_function(step.target, args, kwargs)


def floats(values: Any) -> Any:
    """Nested values with what integers stand for in their place."""
    return tree_map(lambda x: x.dequantize() if isinstance(x, Integers) else x, values)


def _on_integers(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function's result where it has a rule for these integers, else NotImplemented."""
    name = target.rpartition(".")[2]
    if name == "getitem" and isinstance(args[0], (tuple, list)):
        return args[0][args[1]]
    if name in ("cat", "concat", "stack"):
        return _join(target, *args, **kwargs)
    if not isinstance(q := args[0] if args else kwargs.get("input"), Integers):
        return NotImplemented
    rest, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
    if target == "attribute":
        return _attribute(q, *rest)
    if name in _QUERIES:
        return run_function(target, (q.payload, *rest), kwargs)
    if name in _RULES:
        return _RULES[name](q, *rest, **kwargs)
    if name in _MOVES:
        return _move(target, q, rest, kwargs)
    return NotImplemented


_QUERIES = frozenset("size dim numel ndimension".split())
_MOVES = frozenset([*MOVES.split(), *KEEPS.split(), "getitem", "to"])
_ANYWHERE = frozenset([*KEEPS.split(), "to"])  # every element stays with its channel


def _move(target: str, q: Integers, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = target.rpartition(".")[2]
    leaves = tree_leaves((rest, kwargs))
    if any(isinstance(a, torch.dtype) for a in leaves) or (q.per_channel and name not in _ANYWHERE):
        return NotImplemented
    if not name.endswith("_as") and any(isinstance(a, Integers) for a in leaves):
        return NotImplemented
    if name == "to" and any(isinstance(a, Tensor) for a in leaves):
        return NotImplemented
    result = run_function(target, (q.payload, *_payloads(rest)), _payloads(kwargs))
    return tree_map(lambda y: Integers(y, q.scale), result)


def _payloads(values: Any) -> Any:
    return tree_map(lambda x: x.payload if isinstance(x, Integers) else x, values)


def _attribute(q: Integers, name: str) -> Any:
    if name == "dtype":
        return torch.float32
    if name not in ("T", "mT"):
        return getattr(q.payload, name)
    return NotImplemented if q.per_channel else Integers(getattr(q.payload, name), q.scale)


def _join(target: str, tensors: Any, *rest: Any, **kwargs: Any) -> Any:
    """Integers of one scale are copied."""
    first = tensors[0]
    if not all(isinstance(t, Integers) and t.scale is first.scale and not t.per_channel for t in tensors):
        return NotImplemented
    if len({t.payload.dtype for t in tensors}) > 1:
        return NotImplemented
    return Integers(run_function(target, ([t.payload for t in tensors], *rest), kwargs), first.scale)


# -- functions with a rule of their own; each has the arguments of PyTorch's --------------------------------------------------


def _relu(q: Integers, inplace: bool = False) -> Any:
    return Integers(q.payload.clamp_(min=0) if inplace else q.payload.clamp(min=0), q.scale)


def _dropout(q: Integers, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return q if not training or p == 0 else NotImplemented


def _channels_elsewhere(q: Integers, dims: int) -> bool:
    return q.per_channel and q.payload.dim() != dims + 2


def _max_pool(dims: int) -> Callable[..., Any]:
    def pool(
        q: Integers,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices or _channels_elsewhere(q, dims):
            return NotImplemented
        y = reference.max_pool(q.payload, kernel_size, stride or None, padding, dilation, ceil_mode, dims=dims)
        return Integers(y, q.scale)

    return pool


def _adaptive_max_pool(dims: int) -> Callable[..., Any]:
    def pool(q: Integers, output_size: Any, return_indices: bool = False) -> Any:
        if return_indices or _channels_elsewhere(q, dims):
            return NotImplemented
        return Integers(reference.adaptive_max_pool(q.payload, output_size, dims=dims), q.scale)

    return pool


def _interpolate(
    q: Integers,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Any:
    if not mode.startswith("nearest") or recompute_scale_factor:
        return NotImplemented
    y = reference.upsample_nearest(q.payload, size, scale_factor, exact=mode == "nearest-exact")
    return Integers(y, q.scale)


def _pad(q: Integers, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    pad = list(pad)
    if q.per_channel and any(pad[2 * (q.payload.dim() - 2) :]):
        return NotImplemented
    if mode == "constant":
        return NotImplemented if value else Integers(F.pad(q.payload, pad), q.scale)
    return Integers(reference.pad(q.payload, pad, mode), q.scale)


def _shuffle(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """In float32, which holds these integers: there is no kernel for them."""

    def shuffle(q: Integers, *args: Any, **kwargs: Any) -> Any:
        if q.per_channel:
            return NotImplemented
        return Integers(function(q.payload.float(), *args, **kwargs).to(q.payload.dtype), q.scale)

    return shuffle


_RULES: dict[str, Callable[..., Any]] = {
    "relu": _relu,
    "relu_": lambda q: _relu(q, inplace=True),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _dropout),
    **{f"max_pool{d}d": _max_pool(d) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": _adaptive_max_pool(d) for d in (1, 2, 3)},
    "interpolate": _interpolate,
    "pad": _pad,
    **{f.__name__: _shuffle(f) for f in (torch.pixel_shuffle, torch.pixel_unshuffle, torch.channel_shuffle)},
}
