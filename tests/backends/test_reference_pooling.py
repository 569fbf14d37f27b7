"""The reference's pools, against windows taken one by one and the divisors that PyTorch's own pools show."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from horizon_plugin_pytorch.backends import reference as ref

dtypes = st.sampled_from([torch.int8, torch.uint8])
scales = st.floats(2**-10, 1, width=32)
AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
ADAPTIVE_AVG = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    lo, hi = ref.integer_range(dtype)
    return torch.from_numpy(np.random.default_rng(seed).integers(lo, hi + 1, shape)).to(dtype)


def differing(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype
    return int((a != b).sum())


def average(total: Tensor, n: Tensor, s_x: float, s_y: float, dtype: torch.dtype) -> Tensor:
    """The formula, in numpy."""
    ratio = (np.float64(s_x) / (n.double().numpy() * np.float64(s_y))).astype(np.float32)
    lo, hi = ref.integer_range(dtype)
    return torch.from_numpy(np.asarray(np.rint(total.numpy().astype(np.float32) * ratio).clip(lo, hi))).to(dtype)


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel = each(1, 4)
    return {
        "dims": dims,
        "x": integers((2, 3, *each(3, 9)), draw(dtypes), draw(st.integers(0, 10**6))),
        "kernel_size": kernel,
        "stride": draw(st.sampled_from([None, each(1, 4)])),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": each(1, 3),
        "ceil_mode": draw(st.booleans()),
        "channels_last": draw(st.booleans()) and dims > 1,
    }


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@given(
    pool=pools(), include=st.booleans(), override=st.sampled_from([None, 1, 7]), s_x=scales, s_y=scales, dtype=dtypes
)
@settings(max_examples=150)
def test_avg_pool_divides_by_what_pytorch_divides_by(
    pool: dict[str, Any], include: bool, override: int | None, s_x: float, s_y: float, dtype: torch.dtype
) -> None:
    x, dims = pool["x"], pool["dims"]
    window = [pool[name] for name in ("kernel_size", "stride", "padding", "ceil_mode")] + [include]
    override = override if dims > 1 else None
    divisor = () if dims == 1 else (override,)
    try:
        torch_average = AVG[dims](x.double(), *window, *divisor)
    except RuntimeError:  # no window fits
        assume(False)
    # PyTorch's average over ones is (elements in the window) / n, over ones and zeros beside it tells the two apart
    ones = AVG[dims](torch.ones_like(x).double(), *window, *divisor)
    if dims == 1:
        elements = AVG[2](torch.ones_like(x).double().unsqueeze(-2), *pair_1d(window), 1).squeeze(-2)
        total = AVG[2](x.double().unsqueeze(-2), *pair_1d(window), 1).squeeze(-2)
    else:
        elements = AVG[dims](torch.ones_like(x).double(), *window, 1)
        total = AVG[dims](x.double(), *window, 1)
    n = (elements / ones).round()
    assert torch.allclose(total / n, torch_average, atol=1e-9)
    result = ref.avg_pool(
        laid_out(x, pool["channels_last"]), torch.tensor(s_x), torch.tensor(s_y), dtype, *window, override, dims=dims
    )
    assert differing(result, average(total, n, s_x, s_y, dtype)) == 0
    assert not pool["channels_last"] or result.shape[2:].numel() == 1 or laid_out(result, True) is result


def pair_1d(window: list[Any]) -> list[Any]:
    kernel, stride, padding, *rest = window
    return [(1, *kernel), None if stride is None else (1, *stride), (0, *padding), *rest]


@given(pool=pools(), parts=st.lists(st.integers(1, 12), min_size=3, max_size=3), s_x=scales, s_y=scales, dtype=dtypes)
def test_adaptive_avg_pool(pool: dict[str, Any], parts: list[int], s_x: float, s_y: float, dtype: torch.dtype) -> None:
    x, dims = pool["x"], pool["dims"]
    wanted, size = parts[:dims], x.shape[2:]
    total = torch.zeros(*x.shape[:2], *wanted, dtype=torch.int64)
    n = torch.zeros(wanted, dtype=torch.int64)
    for place in product(*map(range, wanted)):
        at = [slice(i * s // o, -(-((i + 1) * s) // o)) for i, s, o in zip(place, size, wanted, strict=True)]
        part = x[(..., *at)].long()
        total[(..., *place)], n[place] = part.flatten(2).sum(2), part[0, 0].numel()
    assert torch.allclose(total / n.double(), ADAPTIVE_AVG[dims](x.double(), wanted), atol=1e-9)
    scales_ = torch.tensor(s_x), torch.tensor(s_y)
    result = ref.adaptive_avg_pool(laid_out(x, pool["channels_last"]), *scales_, dtype, wanted, dims=dims)
    assert differing(result, average(total, n, s_x, s_y, dtype)) == 0


def test_adaptive_pools_take_pytorchs_sizes() -> None:
    x, s = integers((2, 3, 8, 6), torch.uint8), torch.tensor(0.5)
    for size in (2, (3, None), (None, 4), 1):
        shape = F.adaptive_avg_pool2d(x.float(), size).shape
        assert ref.adaptive_avg_pool(x, s, s, torch.uint8, size).shape == shape
        largest = F.adaptive_max_pool2d(x.double(), size).to(torch.uint8)
        assert differing(ref.adaptive_max_pool(x, size), largest) == 0
    assert differing(ref.adaptive_max_pool(x[0], 2), ref.adaptive_max_pool(x, 2)[0]) == 0
    assert ref.adaptive_max_pool(x[:, :, 0], 2, dims=1).shape == (2, 3, 2)


@given(pool=pools())
@settings(max_examples=150)
def test_max_pool_window_by_window(pool: dict[str, Any]) -> None:
    x, dims, kernel, dilation = pool["x"], pool["dims"], pool["kernel_size"], pool["dilation"]
    arguments = [pool[name] for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
    try:
        shape = MAX[dims](x.double(), *arguments).shape
    except RuntimeError:
        assume(False)
    expected = torch.empty(shape, dtype=x.dtype)
    stride = kernel if pool["stride"] is None else pool["stride"]
    lo, _ = ref.integer_range(x.dtype)
    for place in product(*map(range, shape[2:])):
        at = [
            [p for t in range(k) if 0 <= (p := i * s - pad + t * d) < size]
            for i, s, pad, k, d, size in zip(place, stride, pool["padding"], kernel, dilation, x.shape[2:], strict=True)
        ]
        window = x[(slice(None), slice(None), *np.ix_(*at))].flatten(2)
        expected[(..., *place)] = window.amax(2) if window.shape[2] else lo
    result = ref.max_pool(laid_out(x, pool["channels_last"]), *arguments, dims=dims)
    assert differing(result, expected) == 0


def test_a_window_of_nothing_but_padding_is_the_least_value() -> None:
    x = torch.full((1, 1, 1), 5, dtype=torch.int8)
    assert ref.max_pool(x, 2, 1, 1, 2, dims=1).tolist() == [[[-128]]]
    assert ref.max_pool(x.to(torch.uint8), 2, 1, 1, 2, dims=1).tolist() == [[[0]]]


@given(
    dim=st.sampled_from([None, 0, -1, (2, 3), (0, 1, 2, 3)]), keep=st.booleans(), s_x=scales, s_y=scales, dtype=dtypes
)
def test_mean(dim: Any, keep: bool, s_x: float, s_y: float, dtype: torch.dtype) -> None:
    x = integers((2, 3, 5, 7), torch.uint8)
    total = x.long().sum(dim, keepdim=keep)
    n = torch.tensor(x.numel() // total.numel())
    result = ref.mean(x, torch.tensor(s_x), torch.tensor(s_y), dtype, dim, keep)
    assert differing(result, average(total, n, s_x, s_y, dtype)) == 0
    if dim == (2, 3):
        pooled = ref.adaptive_avg_pool(x, torch.tensor(s_x), torch.tensor(s_y), dtype, 1).view(result.shape)
        assert differing(result, pooled) == 0


@pytest.mark.parametrize("size", [(300, 301), (2910, 2900)], ids=["over 2^24", "over 2^31"])
def test_sums_are_exact_and_rounded_once_to_float32(size: tuple[int, int]) -> None:
    x = integers((1, 1, *size), torch.uint8) | 254
    total, n = x.long().sum((2, 3), keepdim=True), x.numel()
    assert total.item() > (2**24 if n < 2**20 else 2**31)
    s_x, s_y = torch.tensor(0.013), torch.tensor(0.0131)
    ratio = np.float32(np.float64(s_x.item()) / (n * np.float64(s_y.item())))
    expected = torch.from_numpy(total.numpy().astype(np.float32) * ratio)
    for result in (
        ref.avg_pool(x, s_x, s_y, torch.float32, size),
        ref.adaptive_avg_pool(x, s_x, s_y, torch.float32, 1),
        ref.mean(x, s_x, s_y, torch.float32, (2, 3), True),
    ):
        assert differing(result, expected) == 0


def test_pools_without_a_batch() -> None:
    x, s = integers((2, 3, 8, 6), torch.int8), torch.tensor(0.1)
    assert differing(ref.max_pool(x[0], 3, 2, 1), ref.max_pool(x, 3, 2, 1)[0]) == 0
    assert differing(ref.avg_pool(x[0], s, s, torch.int8, 2), ref.avg_pool(x, s, s, torch.int8, 2)[0]) == 0


def test_max_pool_keeps_channels_last() -> None:
    x = integers((1, 16, 20, 20), torch.int8).contiguous(memory_format=torch.channels_last)
    assert ref.max_pool(x, 3, 2, 1).is_contiguous(memory_format=torch.channels_last)


def test_windows_that_cannot_be() -> None:
    x, s = integers((1, 1, 4, 4), torch.int8), torch.tensor(0.1)
    with pytest.raises(ValueError, match="padding 2 is more than half of the kernel 3"):
        ref.avg_pool(x, s, s, torch.int8, 3, padding=2)
    with pytest.raises(ValueError, match="a window of 5 does not fit into 4"):
        ref.avg_pool(x, s, s, torch.int8, 5)
    with pytest.raises(ValueError, match="must not be 0"):
        ref.avg_pool(x, s, s, torch.int8, 2, divisor_override=0)
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        ref.max_pool(x.float(), 2)
