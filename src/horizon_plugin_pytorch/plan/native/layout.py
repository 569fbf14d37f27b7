"""How values lie in memory: buffers, and strided views of them.

A value with channels lies channels-last: its channels are neighbours, and nothing lies between pixels. One that a convolution
reads with padding has a *halo*: zeros around it, as wide as the widest padding. The zeros to the right of a row are those to the
left of the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ITEM = {"int8": 1, "uint8": 1, "float32": 4}
ALIGN = 64
OWN = -2
"""In place of a slot's number: memory that each thread has of its own."""
Halo = Mapping[int, tuple[int, int]]
"""Zeros before and after a value, by dimension."""


@dataclass(eq=False)
class Buffer:
    """Memory that one value, or several that share it, lives in.

    Attributes:
        bytes: its size.
        slot: 0 for the arena, `OWN`, otherwise a tensor of the call's.
        begin, end: the stretches of the program from the first to the last use, for buffers in the arena.
        offset: bytes from the slot's start, once the arena is laid out.
    """

    bytes: int
    slot: int = 0
    begin: int = -1
    end: int = -1
    offset: int = 0

    def use(self, time: int) -> None:
        self.begin = time if self.begin < 0 else min(self.begin, time)
        self.end = max(self.end, time)


@dataclass(frozen=True, eq=False)
class View:
    """A tensor in a buffer; `strides` and `offset` in bytes."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    offset: int = 0
    scale: Tensor | None = None
    halo: Halo = field(default_factory=dict)

    @property
    def item(self) -> int:
        return ITEM[self.dtype]

    def channels_last(self, axis: int) -> bool:
        """Whether the dimension `axis` is the one whose elements are neighbours."""
        return self.strides[axis] == self.item or self.shape[axis] == 1

    def fits_halo(self, need: Halo) -> bool:
        return all(
            have >= least
            for dim, wanted in need.items()
            for have, least in zip(self.halo.get(dim, (0, 0)), wanted, strict=True)
        )

    def reshaped(self, shape: Sequence[int], strides: Sequence[int], offset: int | None = None) -> View:
        """The same memory as another tensor, without a halo."""
        return replace(
            self, shape=tuple(shape), strides=tuple(strides), offset=self.offset if offset is None else offset, halo={}
        )

    def unsqueezed(self) -> View:
        """With a batch dimension of 1 in front."""
        halo = {dim + 1: sides for dim, sides in self.halo.items()}
        return replace(self, shape=(1, *self.shape), strides=(0, *self.strides), halo=halo)

    def narrowed(self, dim: int, start: int, length: int) -> View:
        shape = list(self.shape)
        shape[dim] = length
        return self.reshaped(shape, self.strides, self.offset + start * self.strides[dim])

    def meta(self) -> Tensor:
        """A tensor without data that lies as this one does, in elements of one byte or four."""
        steps = [s // self.item for s in self.strides]
        size = self.offset // self.item + sum((n - 1) * s for n, s in zip(self.shape, steps, strict=True)) + 1
        dtype = getattr(torch, self.dtype)
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        return torch.empty(size, dtype=dtype, device="meta").as_strided(self.shape, steps, self.offset // self.item)


def fresh(
    shape: Sequence[int], dtype: str, axis: int | None, halo: Halo | None = None, scale: Tensor | None = None
) -> View:
    """A new value, with its channels along `axis` (None: rows as PyTorch lays them)."""
    halo = {dim: sides for dim, sides in (halo or {}).items() if any(sides)}
    item = ITEM[dtype]
    order = [d for d in range(len(shape)) if d != axis] + ([] if axis is None else [axis])
    strides = [0] * len(shape)
    first_spatial = min(halo, default=len(shape))
    step, offset = item, 0
    gap_used = False
    tail = 0
    for dim in reversed(order):
        strides[dim] = step
        before, after = halo.get(dim, (0, 0))
        offset += before * step
        if dim in halo and not gap_used:  # rows share their zeros
            gap = max(before, after)
            tail = (before + after - gap) * step
            step *= shape[dim] + gap
            gap_used = True
        else:
            step *= before + shape[dim] + after
        if dim == first_spatial:  # one image is complete
            step = -(-(step + tail) // ALIGN) * ALIGN
    return View(Buffer(max(step, 1)), tuple(shape), tuple(strides), dtype, offset, scale, halo)


def zero_ranges(view: View, axis: int | None) -> tuple[int, int, NDArray[np.int64]]:
    """What of a fresh view with a halo is not data: number of images, bytes of an image, and [begin, length] within an image."""
    first = min(view.halo)
    images = prod(n for dim, n in enumerate(view.shape[:first]) if dim != axis)
    image = view.buffer.bytes // max(images, 1)
    dims = [d for d in range(len(view.shape)) if d >= first or d == axis]
    run = view.item  # the innermost dimensions without gaps are one run of bytes
    starts = np.array([view.offset], dtype=np.int64)
    for dim in sorted(dims, key=lambda d: (view.strides[d], -d)):
        if view.strides[dim] == run:
            run *= view.shape[dim]
        else:
            starts = (starts[:, None] + np.arange(view.shape[dim], dtype=np.int64) * view.strides[dim]).reshape(-1)
    starts = np.sort(starts)
    edges = np.concatenate([[0], starts + run])
    until = np.concatenate([starts, [image]])
    keep = until > edges
    return images, image, np.ascontiguousarray(np.stack([edges, until - edges], 1)[keep])
