"""Small things about shapes and layouts that several operators share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ints = int | Sequence[int]


def as_tuple(value: Ints, dims: int) -> tuple[int, ...]:
    """One value per spatial dimension, from one for all or one each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    values = values * dims if len(values) == 1 else values
    if len(values) != dims:
        raise ValueError(f"{value} is not one value, nor one for each of {dims} dimensions")
    return values


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """`y` in channels_last if `x` has that layout."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return y.contiguous(memory_format=layout)
    return y
