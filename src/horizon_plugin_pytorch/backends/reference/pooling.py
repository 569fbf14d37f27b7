"""Pools: the maximum is taken on the integers, the average is an exact integer sum and one rounding.

``y_q = clamp(round_half_even(float32(sum of q) * float32(s_x / (n * s_y))))``, where n is the divisor that PyTorch uses
at that place: at a border, or in an adaptive pool, it differs from place to place, and so does the ratio.
A result dtype of torch.float32 leaves out the rounding, as in `epilogue`.

``dims`` is the number of spatial dimensions, 1, 2 or 3; inputs are ``[N, C, *size]`` or ``[C, *size]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import epilogue, integer_range, scale_ratio
from .shapes import Ints, as_tuple, in_layout_of

_MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE_MAX_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


def max_pool(
    x_q: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    dims: int = 2,
) -> Tensor:
    """``y_q = max of x_q over the window``; dtype and scale unchanged.

    Arguments as `torch.nn.functional.max_pool2d`. Padding is never the maximum; a window of nothing but padding, which
    dilation makes possible, gives the dtype's least value where floating point has -inf.
    """
    lo, _ = integer_range(x_q.dtype)
    stride = kernel_size if stride is None else stride
    # In float32, which holds these integers: PyTorch's own pools refuse some of them in some layouts.
    y = _MAX_POOL[dims](x_q.to(torch.float32), kernel_size, stride, padding, dilation, ceil_mode)
    return y.clamp_(min=lo).to(torch.int16).to(x_q.dtype)


def adaptive_max_pool(x_q: Tensor, output_size: int | Sequence[int | None], *, dims: int = 2) -> Tensor:
    """``y_q = max of x_q over each of output_size parts``; dtype and scale unchanged."""
    integer_range(x_q.dtype)
    return _ADAPTIVE_MAX_POOL[dims](x_q.to(torch.float32), output_size).to(torch.int16).to(x_q.dtype)


def avg_pool(
    x_q: Tensor,
    s_x: Tensor,
    s_y: Tensor,
    dtype: torch.dtype,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dims: int = 2,
) -> Tensor:
    """The average over windows; see the module for the formula.

    Args:
        x_q, s_x: int8 or uint8 and its scale.
        s_y, dtype: the result's.
        kernel_size and the rest: as in `torch.nn.functional.avg_pool2d`. n is `divisor_override`, or the size of the
            window within the padded input, or with ``count_include_pad=False`` within the input itself.

    Raises:
        ValueError: a padding larger than half the kernel, a divisor of 0, or a window that fits nowhere.
    """
    size = x_q.shape[-dims:]
    kernel = as_tuple(kernel_size, dims)
    steps = kernel if stride is None else as_tuple(stride, dims)
    pads = as_tuple(padding, dims)
    if divisor_override == 0:
        raise ValueError("divisor_override must not be 0")
    found = [windows(*one, ceil_mode) for one in zip(size, kernel, steps, pads, strict=True)]
    return _average(x_q, found, divisors(found, count_include_pad, divisor_override), s_x, s_y, dtype)


def adaptive_avg_pool(
    x_q: Tensor, s_x: Tensor, s_y: Tensor, dtype: torch.dtype, output_size: int | Sequence[int | None], *, dims: int = 2
) -> Tensor:
    """The average over ``output_size`` parts per dimension, ``[floor(i L / o), ceil((i + 1) L / o))``, n its size."""
    found = adaptive_windows(x_q.shape[-dims:], output_size)
    return _average(x_q, found, places([w.padded for w in found]), s_x, s_y, dtype)


def mean(
    x_q: Tensor,
    s_x: Tensor,
    s_y: Tensor,
    dtype: torch.dtype,
    dim: int | tuple[int, ...] | None = None,
    keepdim: bool = False,
) -> Tensor:
    """The average over whole dimensions, n the number of elements; over the spatial ones it is global pooling."""
    integer_range(x_q.dtype)
    total = x_q.sum(dim, keepdim=keepdim, dtype=torch.int64)
    n = torch.tensor(x_q.numel() / max(total.numel(), 1), dtype=torch.float64, device="cpu")
    return epilogue(total, ratio(s_x, n, s_y), dtype=dtype)


class Windows(NamedTuple):
    """Where the windows along one dimension begin and end within the input, and how long they are with padding."""

    start: Tensor
    stop: Tensor
    padded: Tensor


def windows(length: int, kernel: int, step: int, pad: int, ceil_mode: bool) -> Windows:
    """Those of a pool along one dimension, counted as PyTorch does.

    Raises:
        ValueError: a padding larger than half the kernel, or a window that fits nowhere.
    """
    if pad > kernel // 2:
        raise ValueError(f"padding {pad} is more than half of the kernel {kernel}")
    room = length + 2 * pad - kernel + (step - 1 if ceil_mode else 0)
    count = room // step + 1
    if (count - 1) * step >= length + pad:  # the last window must begin in the input or before it
        count -= 1
    if count < 1:
        raise ValueError(f"a window of {kernel} does not fit into {length} with padding {pad}")
    start = torch.arange(count, device="cpu") * step - pad
    stop = (start + kernel).clamp(max=length + pad)
    return Windows(start.clamp(min=0), stop.clamp(max=length), stop - start)


def adaptive_windows(size: Sequence[int], output_size: int | Sequence[int | None]) -> list[Windows]:
    """Those of an adaptive pool along each dimension: `output_size` parts, ``[floor(i L / o), ceil((i + 1) L / o))``."""
    wanted = (output_size,) * len(size) if isinstance(output_size, int) else output_size
    found = []
    for length, parts in zip(size, wanted, strict=True):
        index = torch.arange(length if parts is None else parts, device="cpu")
        start = index * length // len(index)
        stop = -(-(index + 1) * length // len(index))
        found.append(Windows(start, stop, stop - start))
    return found


def divisors(found: Sequence[Windows], count_include_pad: bool, divisor_override: int | None) -> Tensor:
    """What an average over these windows divides by, float64: one value, or one per place."""
    if divisor_override is not None:
        return torch.tensor(divisor_override, dtype=torch.float64, device="cpu")
    return places([w.padded if count_include_pad else w.stop - w.start for w in found])


def places(lengths: Sequence[Tensor]) -> Tensor:
    """The sizes of the windows, ``[1, *out]``, from their lengths along each dimension; exact in float64."""
    total = torch.ones(1, dtype=torch.float64, device="cpu")
    for length in lengths:
        total = total.unsqueeze(-1) * length
    return total


def _average(x_q: Tensor, found: Sequence[Windows], n: Tensor, s_x: Tensor, s_y: Tensor, dtype: torch.dtype) -> Tensor:
    lo, hi = integer_range(x_q.dtype)
    # Differences of running sums: exact in integers, where those may wrap around as long as the difference fits.
    total = x_q.to(torch.int32 if _sums_fit(found, max(-lo, hi)) else torch.int64)
    for dim, window in enumerate(found, start=-len(found)):
        running = F.pad(total.movedim(dim, -1).cumsum(-1, dtype=total.dtype), (1, 0)).movedim(-1, dim)
        stop, start = (running.index_select(dim, edge.to(running.device)) for edge in (window.stop, window.start))
        total = stop.sub_(start)
    y = epilogue(total, ratio(s_x, n, s_y), dtype=dtype)
    return in_layout_of(x_q, y)


def _sums_fit(found: Sequence[Windows], largest: int) -> bool:
    """Whether sums over these windows fit into int32; a graph is made without knowing its windows."""
    if torch.compiler.is_exporting():
        return False
    return prod(int((w.stop - w.start).max()) for w in found) * largest < 2**31


def ratio(s_x: Tensor, n: Tensor, s_y: Tensor) -> Tensor:
    """``float32(s_x / (n * s_y))``, one value per place; n and its product with a float32 are exact in float64."""
    return scale_ratio(s_x, over=s_y.to(torch.float64) * n.to(s_y.device))
