"""Functions that move data: shapes, slices, joins, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx import padding
from horizon_plugin_pytorch.export.onnx.functions.call import Call, onnx_type
from horizon_plugin_pytorch.export.onnx.lowering import Dim
from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize
from horizon_plugin_pytorch.export.onnx.sizes import as_vector, is_dynamic, shape_vector, size_of
from horizon_plugin_pytorch.plan.program import Const, Ref

_LAST = 2**63 - 1


def _listed(arguments: Sequence[Any]) -> list[Any]:
    """``f(1, 2)`` and ``f((1, 2))`` alike."""
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return list(arguments[0])
    return list(arguments)


def _shape(c: Call, given: Any) -> list[Any]:
    """Sizes given one by one or as one list or value."""
    sizes = c.value(tuple(given))
    return _listed(sizes)


def current(c: Call, input: Any, dims: Sequence[int]) -> list[Any]:
    """The sizes of some dimensions: numbers, and a `Dim` where one varies."""
    sizes = c.sizes(input)
    wanted = tuple(n if d in dims else 0 for d, n in enumerate(sizes))
    found = size_of(c.graph, c.tensor(input), wanted)
    return [found[d] for d in dims]


# -- shapes -------------------------------------------------------------------------------------------------------------------


def reshape(c: Call, input: Any, *shape: Any, size: Any = None) -> str:
    wanted = _shape(c, shape if size is None else (size,))
    shuffled = _shuffle_of(c, input)
    if shuffled is not None:
        source, groups, channels = shuffled
        return _shuffled(c, c.tensor(source), groups, channels)
    wanted = [n if k is None else k for n, k in zip(wanted, c.result, strict=True)]
    return c.op("Reshape", c.tensor(input), shape_vector(c.graph, wanted))


def _shuffle_of(c: Call, input: Any) -> tuple[Ref, int, int] | None:
    """What ``view(b, g, c // g, h, w).transpose(1, 2).view(b, c, h, w)`` shuffles, into how many groups, and its channels.

    Written as `channel_shuffle`, through four dimensions: OpenVINO (2026.4) loses the order of elements in five of free size.
    """
    shapes, swap = c.low.shapes, c.maker(input)
    while swap is not None and swap.target == "method.contiguous":
        swap = c.maker(swap.args[0])
    if swap is None or swap.target not in ("torch.transpose", "method.transpose") or set(swap.args[1:]) != {1, 2}:
        return None
    view = c.maker(swap.args[0])
    if (
        view is None
        or view.target not in ("method.view", "method.reshape", "torch.reshape")
        or not isinstance(view.args[0], Ref)
    ):
        return None
    (source, apart), result = (view.args[0].value, swap.args[0].value), c.low.index
    if [len(shapes.of(v)) for v in (source, apart, result)] != [4, 5, 4]:
        return None
    groups, channels = shapes.of(apart)[1], shapes.of(source)[1]
    same = all(
        shapes.equal(source, d, result, d) and (d == 1 or shapes.equal(source, d, apart, d + (d > 1))) for d in range(4)
    )
    return (view.args[0], groups, channels) if same and groups is not None and channels is not None else None


def reshape_as(c: Call, input: Any, other: Any) -> str:
    return c.op("Reshape", c.tensor(input), c.graph.op("Shape", c.tensor(other)))


def flatten(c: Call, input: Any, start_dim: int = 0, end_dim: int = -1) -> str:
    rank = c.rank(input)
    start, end = start_dim % max(rank, 1), end_dim % max(rank, 1)
    if start == 1 and end == rank - 1:
        return c.op("Flatten", c.tensor(input), axis=1)
    if rank == 0:
        return c.op("Reshape", c.tensor(input), c.graph.constant([1]))
    behind = current(c, input, list(range(end + 1, rank)))
    return c.op("Reshape", c.tensor(input), as_vector(c.graph, [*[0] * start, -1, *behind]))


def unflatten(c: Call, input: Any, dim: int, sizes: Any) -> str:
    rank = c.rank(input)
    behind = current(c, input, list(range(dim % rank + 1, rank)))
    return c.op("Reshape", c.tensor(input), as_vector(c.graph, [*[0] * (dim % rank), *c.value(sizes), *behind]))


def permute(c: Call, input: Any, *dims: Any) -> str:
    return c.op("Transpose", c.tensor(input), perm=[d % c.rank(input) for d in _listed(dims)])


def transpose(c: Call, input: Any, dim0: int, dim1: int) -> str:
    order = list(range(c.rank(input)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return c.op("Transpose", c.tensor(input), perm=order)


def t(c: Call, input: Any) -> str:
    return c.op("Transpose", c.tensor(input), perm=list(range(c.rank(input)))[::-1])


def swap_last(c: Call, input: Any) -> str:
    return transpose(c, input, -1, -2)


def movedim(c: Call, input: Any, source: Any, destination: Any) -> str:
    rank = c.rank(input)
    moved, to = ([n] if isinstance(n, int) else list(n) for n in (source, destination))
    moved, to = [d % rank for d in moved], [d % rank for d in to]
    rest = iter(d for d in range(rank) if d not in moved)
    order = [moved[to.index(d)] if d in to else next(rest) for d in range(rank)]
    return c.op("Transpose", c.tensor(input), perm=order)


def squeeze(c: Call, input: Any, dim: Any = None) -> str:
    sizes = c.sizes(input)
    dims = range(len(sizes)) if dim is None else [d % len(sizes) for d in ([dim] if isinstance(dim, int) else dim)]
    return c.op("Squeeze", c.tensor(input), c.graph.constant([d for d in dims if sizes[d] == 1]))


def unsqueeze(c: Call, input: Any, dim: int) -> str:
    return c.op("Unsqueeze", c.tensor(input), c.graph.constant([dim % (c.rank(input) + 1)]))


def expand(c: Call, input: Any, *sizes: Any) -> str:
    return c.op("Expand", c.tensor(input), as_vector(c.graph, [1 if n == -1 else n for n in _shape(c, sizes)]))


def expand_as(c: Call, input: Any, other: Any) -> str:
    return c.op("Expand", c.tensor(input), c.graph.op("Shape", c.tensor(other)))


def repeat(c: Call, input: Any, *repeats: Any) -> str:
    times, x, rank = _shape(c, repeats), c.tensor(input), c.rank(input)
    if len(times) > rank:
        x = c.graph.op("Unsqueeze", x, c.graph.constant(list(range(len(times) - rank))))
    return c.op("Tile", x, as_vector(c.graph, [*[1] * (rank - len(times)), *times]))


# -- parts --------------------------------------------------------------------------------------------------------------------


def _slice(c: Call, x: str, axis: int, start: Any, stop: Any, step: int = 1, name: str | None = None) -> str:
    vectors = [
        as_vector(c.graph, [0 if start is None else start]),
        as_vector(c.graph, [_LAST if stop is None else stop]),
    ]
    return c.graph.op("Slice", x, *vectors, c.graph.constant([axis]), c.graph.constant([step]), name=name)


def narrow(c: Call, input: Any, dim: int, start: Any, length: Any) -> str:
    begin, count = c.fixed(start, "narrow"), c.fixed(length, "narrow")
    axis = dim % c.rank(input)
    begin = begin if begin >= 0 or c.sizes(input)[axis] is None else begin + c.sizes(input)[axis]
    return _slice(c, c.tensor(input), axis, begin, begin + count, name=c.path)


def select(c: Call, input: Any, dim: int, index: Any) -> str:
    at = c.value(index)
    where = c.graph.op("Squeeze", at.tensor) if isinstance(at, Dim) else c.graph.constant(at)
    return c.op("Gather", c.tensor(input), where, axis=dim % c.rank(input))


def getitem(c: Call, input: Any, index: Any) -> Any:
    if isinstance(c.value(input), tuple):
        return c.value(input)[c.value(index)]
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    if isinstance(index, list) or any(isinstance(p, (list, bool)) for p in parts):
        raise ExportError(
            "an index that is a list or a truth value has no form in ONNX here: use slices, numbers or one tensor"
        )
    used = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (c.rank(input) - used)
    x, axis = c.tensor(input), 0
    gone: list[int] = []
    new: list[int] = []
    place = 0  # of the result's dimension
    for part in parts:
        if part is None:
            new.append(place)
            place += 1
            continue
        if isinstance(part, slice):
            begin, end, step = (c.value(v) for v in (part.start, part.stop, part.step))
            if (begin, end, step) not in [(None, None, None), (None, None, 1), (0, None, None)]:
                if not isinstance(step, (int, type(None))):
                    raise NeedsFixedSize("a slice whose step varies")
                x = _slice(c, x, axis, begin, end, step or 1)
            axis, place = axis + 1, place + 1
            continue
        number = c.value(part)
        if isinstance(part, (Ref, Const)) and not isinstance(number, (int, Dim)):
            if sum(isinstance(p, (Ref, Const)) for p in parts) != 1 or gone or new:
                raise ExportError("an index of several tensors has no form in ONNX here: use index_select")
            if c.dtype(part) == torch.bool:
                raise ExportError(
                    "an index of truth values gives as many elements as it finds, which has no form here: use where"
                )
            x, axis, place = c.graph.op("Gather", x, c.tensor(part), axis=axis), axis + 1, place + c.rank(part)
            continue
        stop: Any = number
        if isinstance(number, Dim):
            stop = Dim(c.graph.op("Add", number.tensor, c.graph.constant([1])))
        else:
            stop = None if number == -1 else number + 1
        x = _slice(c, x, axis, number, stop)
        gone.append(axis)
        axis += 1
    if gone:
        x = c.graph.op("Squeeze", x, c.graph.constant(gone))
    if new:
        x = c.graph.op("Unsqueeze", x, c.graph.constant(new))
    return x


def split(
    c: Call, input: Any, split_size_or_sections: Any = None, dim: int = 0, split_size: Any = None
) -> tuple[str, ...]:
    wanted = c.fixed(split_size if split_size_or_sections is None else split_size_or_sections, "split")
    axis = dim % c.rank(input)
    total = c.sizes(input)[axis]
    if isinstance(wanted, int):
        if total is None:
            raise NeedsFixedSize("split along a dimension that varies")
        wanted = [min(wanted, total - at) for at in range(0, total, wanted)]
    return _parts(c, input, list(wanted), axis)


def chunk(c: Call, input: Any, chunks: int, dim: int = 0) -> tuple[str, ...]:
    axis = dim % c.rank(input)
    total = c.sizes(input)[axis]
    if total is None:
        raise NeedsFixedSize("chunk along a dimension that varies")
    return split(c, input, -(-total // chunks), axis)


def _parts(c: Call, input: Any, lengths: list[int], axis: int) -> tuple[str, ...]:
    x = c.tensor(input)
    if len(lengths) == 1:
        return (x,)
    return tuple(c.graph.ops("Split", [x, c.graph.constant(lengths)], len(lengths), name=c.path, axis=axis))


def unbind(c: Call, input: Any, dim: int = 0) -> tuple[str, ...]:
    axis = dim % c.rank(input)
    total = c.sizes(input)[axis]
    if total is None:
        raise NeedsFixedSize("unbind along a dimension that varies")
    x = c.tensor(input)
    return tuple(c.graph.op("Gather", x, c.graph.constant(i), axis=axis) for i in range(total))


def index_select(c: Call, input: Any, dim: int, index: Any) -> str:
    return c.op("Gather", c.tensor(input), c.tensor(index), axis=dim % c.rank(input))


def gather(c: Call, input: Any, dim: int, index: Any, sparse_grad: bool = False) -> str:
    return c.op("GatherElements", c.tensor(input), c.tensor(index), axis=dim % c.rank(input))


def flip(c: Call, input: Any, *dims: Any) -> str:
    x = c.tensor(input)
    for d in _listed(dims):
        x = _slice(c, x, d % c.rank(input), -1, -_LAST, -1)
    return x


def roll(c: Call, input: Any, shifts: Any, dims: Any = None) -> str:
    if dims is None:
        raise ExportError("roll without dims has no form in ONNX here: name the dimensions")
    x = c.tensor(input)
    for shift, dim in zip(*([n] if isinstance(n, int) else n for n in (c.fixed(shifts, "roll"), dims)), strict=True):
        axis = dim % c.rank(input)
        size = c.sizes(input)[axis]
        at = -shift if size is None else -shift % size
        if at:
            x = c.graph.op("Concat", _slice(c, x, axis, at, None), _slice(c, x, axis, None, at), axis=axis)
    return x


# -- joins and order of elements --------------------------------------------------------------------------------------------------


def _tensors(c: Call, tensors: Any) -> tuple[list[str], int]:
    """A list of tensors, or a value that is a tuple of them; and how many dimensions each has."""
    if isinstance(tensors, Ref):
        return [c.of(v) for v in c.value(tensors)], c.meta(tensors)[0].dim()
    names = [c.tensor(x) for x in tensors] if c.units is not None else c.promoted(*tensors)
    return names, c.rank(tensors[0])


def cat(c: Call, tensors: Any, dim: int = 0) -> str:
    names, rank = _tensors(c, tensors)
    return c.op("Concat", *names, axis=dim % rank)


def stack(c: Call, tensors: Any, dim: int = 0) -> str:
    names, rank = _tensors(c, tensors)
    axis = dim % (rank + 1)
    parts = [c.graph.op("Unsqueeze", x, c.graph.constant([axis])) for x in names]
    return c.op("Concat", *parts, axis=axis)


def pixel_shuffle(c: Call, input: Any, upscale_factor: int) -> str:
    return c.op("DepthToSpace", c.tensor(input), blocksize=upscale_factor, mode="CRD")


def pixel_unshuffle(c: Call, input: Any, downscale_factor: int) -> str:
    """SpaceToDepth puts the block's rows and columns before the channels; PyTorch behind them."""
    if c.rank(input) != 4:
        raise ExportError("pixel_unshuffle needs [N, C, H, W]")
    y = c.op("SpaceToDepth", c.tensor(input), blocksize=downscale_factor)
    return _shuffled(c, y, downscale_factor**2, c.result[1])


def channel_shuffle(c: Call, input: Any, groups: int) -> str:
    return _shuffled(c, c.tensor(input), groups, c.result[1])


def _shuffled(c: Call, x: str, groups: int, channels: int | None) -> str:
    """Channel ``g * n + i`` becomes ``i * groups + g``."""
    if channels is None:
        raise ExportError("it needs a known number of channels")
    apart = c.graph.op("Reshape", x, c.graph.constant([0, groups, channels // groups, -1]))
    return c.graph.op("Reshape", c.graph.op("Transpose", apart, perm=[0, 2, 1, 3]), c.graph.op("Shape", x))


def pad(c: Call, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> str:
    sizes, rank = list(c.value(pad)), c.rank(input)
    before = [0] * (rank - len(sizes) // 2)
    begin, end = [*before, *sizes[0::2][::-1]], [*before, *sizes[1::2][::-1]]
    if mode != "constant":
        if is_dynamic(sizes):
            raise NeedsFixedSize(f"padding by {mode} that depends on the input's size")
        return padding.pad(c.graph, c.tensor(input), begin, end, mode)
    filled = [c.graph.scalar(float(value))] if value else []
    return c.op("Pad", c.tensor(input), as_vector(c.graph, [*begin, *end]), *filled)


def identity(c: Call, input: Any, *_: Any, **__: Any) -> Any:
    return c.value(input)


def dropout(c: Call, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise ExportError(
            "dropout that is on in evaluation: a deployed model has none; put the model into eval mode before it is recorded"
        )
    return c.value(input)


def to(c: Call, input: Any, *_: Any, **__: Any) -> Any:
    """Conversions to another dtype; a device is none here."""
    if c.units is not None:
        return c.value(input)
    before, after = c.dtype(input), c.low.shapes.meta(c.low.index).dtype
    return c.value(input) if before == after else c.op("Cast", c.tensor(input), to=onnx_type(after))


RULES: dict[str, Callable[..., Any]] = {
    "reshape": reshape, "reshape_as": reshape_as, "flatten": flatten, "unflatten": unflatten, "permute": permute,
    "transpose": transpose, "t": t, "T": t, "mT": swap_last, "movedim": movedim, "squeeze": squeeze, "unsqueeze": unsqueeze, "expand": expand,
    "expand_as": expand_as, "repeat": repeat, "tile": repeat, "narrow": narrow, "select": select, "getitem": getitem, "split": split,
    "chunk": chunk, "unbind": unbind, "index_select": index_select, "gather": gather, "flip": flip, "roll": roll, "cat": cat,
    "stack": stack, "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_unshuffle, "channel_shuffle": channel_shuffle, "pad": pad,
    "contiguous": identity, "clone": identity, "detach": identity, "to": to, "float": to, "half": to, "int": to, "long": to, "bool": to,
    "type_as": to,
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), dropout),
}  # fmt: skip
ON_INTEGERS = {
    reshape, reshape_as, flatten, unflatten, permute, transpose, t, swap_last, movedim, squeeze, unsqueeze, expand, expand_as, narrow, select,
    getitem, split, chunk, unbind, index_select, flip, cat, stack, channel_shuffle, pixel_shuffle,
}  # fmt: skip
"""Rules whose nodes take 8-bit integers as well."""
