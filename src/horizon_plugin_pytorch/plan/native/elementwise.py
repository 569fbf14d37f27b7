"""Operations that go element by element over strided views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library, packing
from horizon_plugin_pytorch.plan.native.layout import View
from horizon_plugin_pytorch.plan.native.program import Builder, Operation


def broadcast(view: View, shape: Sequence[int]) -> View:
    """`view` as a tensor of `shape`; repeated elements are one in memory."""
    missing = len(shape) - len(view.shape)
    sizes, strides = (1,) * missing + view.shape, (0,) * missing + view.strides
    return view.reshaped(shape, [0 if n == 1 and m != 1 else s for n, m, s in zip(sizes, shape, strides, strict=True)])


def emit(
    builder: Builder,
    kind: str,
    out: View,
    a: View,
    b: View | None = None,
    *,
    m: Tensor | None = None,
    ratio: Tensor | None = None,
    bound: Tensor | None = None,
    axis: int = 1,
    activation: str | None = None,
    table: Tensor | None = None,
    barrier: bool = True,
) -> Operation | None:
    """Append an operation over all elements of `out`, whose shape the operands broadcast to.

    Args:
        m, ratio, bound: one value, or one per index of `axis`.

    Returns:
        the operation; None, and nothing is appended, where the views have more dimensions than an operation can.
    """
    views = [out, *(broadcast(v, out.shape) for v in (a, b) if v is not None)]
    vectors = {"m": m, "ratio": ratio, "bound": bound}
    channels = out.shape[axis] if any(t is not None and t.numel() > 1 for t in vectors.values()) else None
    dims = _merged(views, None if channels is None else axis % len(out.shape))
    if len(dims) > library.DIMS:
        return None
    params = library.Elementwise(
        per_channel=channels is not None, activation=library.ACTIVATIONS[activation],
        **{n: builder.array(packing.pad_channels(t, channels or 1)) for n, t in vectors.items() if t is not None},
        **({} if table is None else {"table": builder.array(table.contiguous().view(torch.uint8))}),
    )  # fmt: skip
    structures = [params.out, params.a, params.b]
    missing = library.DIMS - len(dims)
    params.size[:] = [1] * missing + [size for size, _ in dims]
    for i, _ in enumerate(views):
        structures[i].stride[:] = [0] * missing + [strides[i] for _, strides in dims]
    refs: list[tuple[library.Ref, View | None]] = [(s.ref, v) for s, v in zip(structures, views, strict=False)]
    if b is None:
        refs.append((params.b.ref, None))
    return builder.add(kind, params, refs, barrier)


def _merged(views: Sequence[View], axis: int | None) -> list[tuple[int, tuple[int, ...]]]:
    """Sizes and the views' strides of as few dimensions as cover all elements, the one along memory last (or `axis`, unmerged)."""
    shape = views[0].shape
    order = sorted((d for d in range(len(shape)) if d != axis and shape[d] != 1), key=lambda d: -views[0].strides[d])
    dims: list[tuple[int, tuple[int, ...]]] = []
    for d in order:
        size, strides = shape[d], tuple(v.strides[d] for v in views)
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if axis is not None:
        dims.append((shape[axis], tuple(v.strides[axis] for v in views)))
    return dims
