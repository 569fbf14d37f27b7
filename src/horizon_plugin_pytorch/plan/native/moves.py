"""Steps that call a PyTorch function on integers: those that move them are views or copies, a few have kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from horizon_plugin_pytorch.nn.quantized.qtensor import KEEPS, MOVES, QTensor
from horizon_plugin_pytorch.plan.native import elementwise, windows
from horizon_plugin_pytorch.plan.native.layout import View, fresh
from horizon_plugin_pytorch.plan.native.shapes import call_of
from horizon_plugin_pytorch.plan.program import Ref, Step, refs
from horizon_plugin_pytorch.plan.steps import fill, run_function

if TYPE_CHECKING:
    from horizon_plugin_pytorch.plan.native.lowering import Lowering

_MOVES = frozenset(MOVES.split()) | {"getitem"}
_KEEPS = frozenset(KEEPS.split()) | {"dropout", "dropout1d", "dropout2d", "dropout3d"}
_RESHAPES = frozenset("reshape flatten view unflatten ravel view_as reshape_as".split())
_JOINS = frozenset("cat concat concatenate".split())


def _name(target: str) -> str:
    return target.rpartition(".")[2]


def keeps(target: str) -> bool:
    """Whether a function hands its first argument on as it is, in evaluation."""
    return _name(target) in _KEEPS


def lower(lowering: Lowering, i: int, step: Step) -> Any:
    """The step's result as views, or None for a function that is left to PyTorch."""
    meta = lowering.metas[lowering.value(i)]
    if not all(isinstance(leaf, QTensor) for leaf in tree_leaves(meta) if isinstance(leaf, Tensor)):
        return None
    name = _name(step.target)
    args = fill(step.args, lambda n: lowering.metas[n], lowering.constants)
    kwargs = fill(step.kwargs, lambda n: lowering.metas[n], lowering.constants)
    if name in _JOINS:
        return _join(lowering, i, step, meta)
    first = step.args[0] if step.args else step.kwargs.get("input")
    if not isinstance(first, Ref):
        return None
    if name == "getitem" and isinstance(lowering.env[first.value], tuple):
        part = lowering.env[first.value][args[1]]
        return part if isinstance(part, View) else None
    source = lowering.metas[first.value]
    if not isinstance(source, QTensor) or not isinstance(meta, (QTensor, tuple, list)):
        return None
    if name in _KEEPS:
        return lowering.view(first)
    if name in ("relu", "relu_"):
        return _relu(lowering, i, first)
    call = call_of(step.target, args, kwargs)
    if call is not None:
        family, dims, named = call
        if family == "interpolate":
            return windows.upsample(lowering, i, first, named)
        if family == "max_pool":
            return windows.max_pool(lowering, i, first, dims, named)
        return windows.adaptive_max_pool(lowering, i, first, dims, named["output_size"])
    if name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        amount = args[1] if len(args) > 1 else next(v for k, v in kwargs.items() if k != "input")
        return _shuffle(lowering, i, first, name, amount)
    if name in _MOVES and len([r for r in refs((step.args, step.kwargs)) if _is_tensor(lowering, r)]) == 1:
        return _move(lowering, i, step, first, name)
    return None


def _is_tensor(lowering: Lowering, ref: Ref) -> bool:
    return isinstance(lowering.metas[ref.value], Tensor)


def _move(lowering: Lowering, i: int, step: Step, first: Ref, name: str) -> Any:
    """A view of the same memory where PyTorch's own strides allow it; a reshape that they do not allow copies."""
    x = lowering.view(first)
    if x is None:
        return None
    for attempt in range(2):
        memory = x.meta()
        given = {first.value: memory}
        values = lambda n: given.get(n, lowering.metas[n])  # noqa: B023, E731
        try:
            result = run_function(
                step.target, *(fill(a, values, lowering.plan.constants) for a in (step.args, step.kwargs))
            )
        except RuntimeError:  # view() of memory that has to be copied
            result = None
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if leaves and all(leaf.untyped_storage()._cdata == memory.untyped_storage()._cdata for leaf in leaves):
            here = x
            return tree_map(lambda leaf: _view_of(here, leaf) if isinstance(leaf, Tensor) else leaf, result)  # noqa: B023
        if name not in _RESHAPES or attempt:
            return None
        rows = fresh(x.shape, x.dtype, None, None, x.scale)
        if not elementwise.emit(lowering.builder, "copy", rows, x):
            return None
        x = rows
    return None


def _view_of(x: View, leaf: Tensor) -> View:
    strides = tuple(s * x.item for s in leaf.stride())
    offset = int(leaf.storage_offset()) * x.item
    view = x.reshaped(tuple(leaf.shape), strides, offset)
    if not x.halo or len(leaf.shape) != len(x.shape):
        return view
    same = all(view.shape[d] == x.shape[d] and view.strides[d] == x.strides[d] for d in x.halo)
    # only whole images and channels are left out, so that the zeros around stay
    moved = offset - x.offset
    inner = moved % x.strides[0] if x.strides[0] else moved
    if same and view.strides == x.strides and 0 <= inner < min(x.strides[d] for d in x.halo):
        return View(view.buffer, view.shape, view.strides, view.dtype, view.offset, view.scale, x.halo)
    return view


def _relu(lowering: Lowering, i: int, ref: Ref) -> View | None:
    x = lowering.view(ref)
    if x is None:
        return None
    y = lowering.new(lowering.value(i), _axis_of(lowering, i, x))
    lo = -128 if x.dtype == "int8" else 0
    table = torch.arange(lo, lo + 256).clamp(min=0).to(torch.int8 if x.dtype == "int8" else torch.uint8)
    return y if elementwise.emit(lowering.builder, "table", y, x, table=table) else None


def _axis_of(lowering: Lowering, i: int, x: View) -> int:
    default = min(range(len(x.shape)), key=lambda d: (x.strides[d] if x.shape[d] > 1 else 2**62, -d), default=0)
    return lowering.ahead.axes.get(lowering.value(i), default)


def _join(lowering: Lowering, i: int, step: Step, meta: QTensor) -> View | None:
    """Operands of one scale, copied next to each other."""
    tensors = step.args[0] if step.args else step.kwargs["tensors"]
    dim = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", step.kwargs.get("axis", 0))
    views = [lowering.view(ref) for ref in tensors if isinstance(ref, Ref)]
    if len(views) != len(tensors) or any(v is None or v.scale is None for v in views) or not isinstance(dim, int):
        return None
    assert views[0] is not None
    y = lowering.new(lowering.value(i), _axis_of(lowering, i, views[0]))
    begin = 0
    for view in views:
        assert view is not None
        length = view.shape[dim]
        if not elementwise.emit(lowering.builder, "copy", y.narrowed(dim % meta.dim(), begin, length), view):
            return None
        begin += length
    return y


def _shuffle(lowering: Lowering, i: int, ref: Ref, name: str, amount: int) -> View | None:
    """Pixel shuffles and channel shuffles of ``[N, C, H, W]`` (or ``[N, C, ...]``): one copy between two views of six dimensions."""
    x = lowering.operand(ref, 1)
    shape = lowering.metas[ref.value].shape
    if x is None or len(shape) != 4:
        return None
    y = lowering.new(lowering.value(i), 1)
    _, c, h, w = shape
    if name == "channel_shuffle":
        a = _split(x, {1: (amount, c // amount)})
        b = _split(y, {1: (c // amount, amount)})
        b = _permuted(b, (0, 2, 1, 3, 4))
    elif name == "pixel_shuffle":
        a = _split(x, {1: (c // amount**2, amount, amount)})  # n c r s h w
        b = _permuted(_split(y, {2: (h, amount), 3: (w, amount)}), (0, 1, 3, 5, 2, 4))
    else:
        a = _permuted(_split(x, {2: (h // amount, amount), 3: (w // amount, amount)}), (0, 1, 3, 5, 2, 4))
        b = _split(y, {1: (c, amount, amount)})
    return y if elementwise.emit(lowering.builder, "copy", b, a) else None


def _split(x: View, dims: dict[int, tuple[int, ...]]) -> View:
    """Dimensions cut into several, each by the sizes given."""
    shape: list[int] = []
    strides: list[int] = []
    for dim, (size, stride) in enumerate(zip(x.shape, x.strides, strict=True)):
        parts = dims.get(dim, (size,))
        shape += parts
        strides += [stride * math.prod(parts[j + 1 :]) for j in range(len(parts))]
    return x.reshaped(shape, strides)


def _permuted(x: View, order: tuple[int, ...]) -> View:
    return x.reshaped([x.shape[d] for d in order], [x.strides[d] for d in order])
