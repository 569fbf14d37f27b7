"""Convolutions, transposed convolutions and Linear: exact int32 sums by floating-point hardware.

PyTorch has no convolution of integers, so the integers travel in floating point, where a sum is exact if no partial sum
can leave the range of consecutive integers: 2^24 in float32, 2^53 in float64. Which one is used is decided, and proven,
from the weights:

* On the CPU a sum that can reach more than 2^24 is split into runs of input channels that cannot, each summed in
  float32. Where that does not go (grouped convolutions) it is summed in float64. Only algorithms that add the products
  themselves are let in: `_direct`. Reduced precision of the operands (bfloat16, TF32) does no harm, they have 8 bits.
* Elsewhere, and in a graph of `torch.export`, which may run anywhere, it is float64, rounded to integers at its end. Of
  sums below 2^31 any algorithm, Winograd's and the FFT included, then makes an error far below one half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import integer_range
from .shapes import Ints, as_tuple, without_autocast, without_gradients
from .weights import largest_input, output_channels_first

EXACT = 2**24
NNPACK_BATCH = 16

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def conv(
    x_q: Tensor,
    w_q: Tensor,
    bias_q: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: Ints = 0,
) -> Tensor:
    """``acc = sum of x_q * w_q + bias_q``, exact, padded with zeros; 1d, 2d or 3d as the weight is.

    Args:
        x_q: int8 or uint8, ``[N, C_in, *size]`` or ``[C_in, *size]``.
        w_q: int8, ``[C_out, C_in / groups, *kernel]``, or ``[C_in, C_out / groups, *kernel]`` if `transposed`.
        bias_q: int32, ``[C_out]``.
        stride, padding, dilation, groups, output_padding: as in `torch.nn.functional.conv2d` and `conv_transpose2d`.
            Padding other than zeros: `pad` first.
        transposed: a transposed convolution.

    Returns:
        int32, ``[N, C_out, *out]`` or ``[C_out, *out]``. Whether the sum fits is for `accumulator_bound` to say.
    """
    dims = w_q.dim() - 2
    stride, dilation, output_padding = (as_tuple(v, dims) for v in (stride, dilation, output_padding))
    batched = x_q.dim() == w_q.dim()
    x_q = x_q if batched else x_q.unsqueeze(0)
    if isinstance(padding, str):
        x_q, padding = _pad_by_name(x_q, padding, w_q.shape[2:], stride, dilation)
    padding = as_tuple(padding, dims)

    def sum_products(x: Tensor, w: Tensor) -> Tensor:
        if transposed:
            return _CONV_TRANSPOSE[dims](x, w, None, stride, padding, output_padding, groups, dilation)
        return _direct(x, w, stride, padding, dilation, groups)

    axis, input_dims = (1, (1, 0)) if transposed else (0, (1, 1))
    acc = _accumulate(sum_products, x_q, w_q, input_dims, axis, groups)
    if bias_q is not None:
        acc.add_(bias_q.view(-1, *[1] * dims))
    return acc if batched else acc.squeeze(0)


def linear(x_q: Tensor, w_q: Tensor, bias_q: Tensor | None = None) -> Tensor:
    """``acc = x_q @ w_q.T + bias_q``, exact.

    Args:
        x_q: int8 or uint8, ``[..., C_in]``.
        w_q: int8, ``[C_out, C_in]``.
        bias_q: int32, ``[C_out]``.

    Returns:
        int32, ``[..., C_out]``.
    """
    acc = _accumulate(F.linear, x_q, w_q, (-1, 1))
    return acc if bias_q is None else acc.add_(bias_q)


@without_gradients
def _accumulate(
    sum_products: Callable[[Tensor, Tensor], Tensor],
    x_q: Tensor,
    w_q: Tensor,
    input_dims: tuple[int, int],
    axis: int = 0,
    groups: int = 1,
) -> Tensor:
    """``sum_products(x_q, w_q)`` as exact int32; `input_dims` are the dims of the input channels in both."""
    if w_q.dtype != torch.int8:
        raise ValueError(f"weights are torch.int8, not {w_q.dtype}")
    integer_range(x_q.dtype)
    with without_autocast(x_q.device.type):  # it would hand bfloat16 results back
        run = None
        if x_q.device.type == "cpu" and not torch.compiler.is_exporting():
            w = w_q.to(torch.float32)
            run = _exact_run(output_channels_first(w, axis, groups), x_q.dtype, splits=groups == 1)
        if run is None:
            return sum_products(x_q.to(torch.float64), w_q.to(torch.float64)).round_().to(torch.int32)
        run *= groups  # with several groups there is one run, of all channels
        parts = zip(x_q.split(run, input_dims[0]), w.split(run, input_dims[1]), strict=True)
        return reduce(Tensor.add_, (sum_products(x.to(torch.float32), w).to(torch.int32) for x, w in parts))


def _exact_run(w: Tensor, x_dtype: torch.dtype, splits: bool) -> int | None:
    """The number of input channels, dim 1 of `w`, that float32 sums exactly at a time; None if there is none.

    A partial sum, in whatever order, is the sum of a subset of the products. For x in [0, 255] it therefore lies in
    ``[-255 * sum of max(-w, 0), 255 * sum of max(w, 0)]``, whose larger side is ``255 * (sum |w| + |sum w|) / 2``; for
    x in [-128, 127] it lies within ``128 * sum |w|``. These sums are in float32 themselves, and exact where accepted.
    """
    channels = w.shape[1]
    w = w.reshape(*w.shape[:2], -1)

    def reach(part: Tensor) -> float:
        size = part.abs().sum((1, 2))
        if x_dtype == torch.uint8:
            size = (size + part.sum((1, 2)).abs()) / 2
        return largest_input(x_dtype) * float(size.max())

    run = channels
    while True:
        worst = max(reach(part) for part in w.split(run, dim=1))
        if worst <= EXACT:
            return run
        if not splits or run == 1:
            return None
        run = min(run - 1, ceil(channels / ceil(channels / run * worst / EXACT)))


def _direct(
    x: Tensor,
    w: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """A convolution by an algorithm that adds the products themselves, for float32 on the CPU.

    There PyTorch takes oneDNN's direct convolution or matrix products of patches, with two exceptions: NNPACK's
    Winograd, from a batch of 16 on where oneDNN is off, and a Winograd for 3x3 depthwise kernels on Arm. Neither exists
    in three dimensions, so a convolution that could meet one runs as one with extra dimensions of size 1.
    """
    dims = w.dim() - 2
    extra = 3 - dims
    if x.dtype == torch.float64 or not extra or (x.shape[0] < NNPACK_BATCH and _is_x86()):
        return _CONV[dims](x, w, None, stride, padding, dilation, groups)
    ones, zeros = (1,) * extra, (0,) * extra
    for _ in range(extra):
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    y = F.conv3d(x, w, None, ones + stride, zeros + padding, ones + dilation, groups)
    for _ in range(extra):
        y = y.squeeze(2)
    return y


def _is_x86() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _pad_by_name(
    x_q: Tensor, name: str, kernel: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, int]:
    """The input, padded as "same" or "valid" say, and the padding that remains; of an odd one the end gets more."""
    if name == "valid":
        return x_q, 0
    if name != "same" or set(stride) != {1}:
        raise ValueError(f"padding {name!r} with stride {stride}: there is 'valid', and with stride 1 'same'")
    sides: list[int] = []
    for k, d in zip(kernel, dilation, strict=True):
        total = d * (k - 1)
        sides = [total // 2, total - total // 2, *sides]  # F.pad wants the last dimension first
    return F.pad(x_q, sides), 0
