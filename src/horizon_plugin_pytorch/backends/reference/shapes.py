"""Small things that several operators share: arguments per dimension, layouts, arithmetic without gradients and autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
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


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.no_grad`, where gradients are on: `torch.export` writes down every switch, needed or not."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """The precision as written; likewise, where autocast is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
