"""The reference's convolutions against sums of int64 products, tap by tap, in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horizon_plugin_pytorch.backends import reference as ref
from horizon_plugin_pytorch.backends.reference import convolution as convolution_module

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN", "ignore:Using padding='same'")

dtypes = st.sampled_from([torch.int8, torch.uint8])


def slow_conv(x: np.ndarray, w: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int) -> np.ndarray:
    n, dims = x.shape[0], w.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding])
    kernel = w.shape[2:]
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dims)]
    acc = np.zeros((n, groups, w.shape[0] // groups, *out), dtype=np.int64)
    x = x.reshape(n, groups, -1, *x.shape[2:])
    w = w.reshape(groups, -1, *w.shape[1:])
    for tap in product(*map(range, kernel)):
        at = [slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilation, out, stride, strict=True)]
        acc += np.einsum("ngi...,goi->ngo...", x[(..., *at)], w[(..., *tap)])
    return acc.reshape(n, -1, *out)


def slow_conv_transpose(
    x: np.ndarray, w: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any
) -> np.ndarray:
    n, dims = x.shape[0], w.ndim - 2
    kernel, size = w.shape[2:], x.shape[2:]
    full = [(size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 + output_padding[i] for i in range(dims)]
    acc = np.zeros((n, groups, w.shape[1], *full), dtype=np.int64)
    x = x.reshape(n, groups, -1, *size)
    w = w.reshape(groups, -1, *w.shape[1:])
    for tap in product(*map(range, kernel)):
        at = [slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilation, size, stride, strict=True)]
        acc[(..., *at)] += np.einsum("ngi...,gio->ngo...", x, w[(..., *tap)])
    acc = acc[(..., *[slice(p, f - p) for p, f in zip(padding, full, strict=True)])]
    return acc.reshape(n, -1, *acc.shape[3:])


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, extreme: bool = False) -> Tensor:
    """Integers over the whole range, or only at its two ends."""
    lo, hi = ref.integer_range(dtype)
    rng = np.random.default_rng(seed)
    values = rng.choice([lo, hi], shape, p=[0.1, 0.9]) if extreme else rng.integers(lo, hi + 1, shape)
    return torch.from_numpy(values).to(dtype)


def weights(shape: tuple[int, ...], seed: int = 1, extreme: bool = False) -> Tensor:
    rng = np.random.default_rng(seed)
    values = rng.choice([-127, 127], shape, p=[0.1, 0.9]) if extreme else rng.integers(-127, 128, shape)
    return torch.from_numpy(values).to(torch.int8)


def differing(result: Tensor, expected: np.ndarray) -> int:
    assert result.dtype == torch.int32 and tuple(result.shape) == expected.shape
    return int((result.numpy() != expected).sum())


def wide(*tensors: Tensor) -> Iterator[np.ndarray]:
    return (t.numpy().astype(np.int64) for t in tensors)


def sides(bias: Tensor, dims: int) -> np.ndarray:
    return bias.numpy().astype(np.int64).reshape(-1, *[1] * dims)


@st.composite
def cases(draw: st.DrawFn, transposed: bool) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    groups, c_in, c_out = draw(small), draw(st.integers(1, 12)), draw(small)
    if draw(st.booleans()):
        c_in = 1
    kernel, stride, dilation = (tuple(draw(small) for _ in range(dims)) for _ in range(3))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    # room for one output at least
    need = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if transposed:
        size = [1 + -(-max(0, 2 * p - n + 1) // s) for p, n, s in zip(padding, need, stride, strict=True)]
    else:
        size = [max(1, n - 2 * p) for p, n in zip(padding, need, strict=True)]
    size = [s + draw(st.integers(0, 5)) for s in size]
    limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    seed, extreme = draw(st.integers(0, 10**6)), draw(st.booleans())
    shape = (c_in * groups, c_out, *kernel) if transposed else (c_out * groups, c_in, *kernel)
    return {
        "x": integers((draw(st.sampled_from([1, 2, 17])), c_in * groups, *size), draw(dtypes), seed, extreme),
        "w": weights(shape, seed, extreme),
        "bias": torch.from_numpy(np.random.default_rng(seed).integers(-(2**30), 2**30, c_out * groups)).int(),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "output_padding": tuple(draw(st.integers(0, limit)) for limit in limits),
        "channels_last": draw(st.booleans()) and dims > 1,
    }


def in_drawn_layout(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@given(case=cases(transposed=False))
@settings(max_examples=150)
def test_conv_is_the_integer_sum(case: dict[str, Any]) -> None:
    x, w, bias = case["x"], case["w"], case["bias"]
    geometry = [case[name] for name in ("stride", "padding", "dilation", "groups")]
    expected = slow_conv(*wide(x, w), *geometry) + sides(bias, w.dim() - 2)
    assert differing(ref.conv(in_drawn_layout(x, case["channels_last"]), w, bias, *geometry), expected) == 0


@given(case=cases(transposed=True))
@settings(max_examples=150)
def test_transposed_conv_is_the_integer_sum(case: dict[str, Any]) -> None:
    x, w, bias, output_padding = case["x"], case["w"], case["bias"], case["output_padding"]
    geometry = [case[name] for name in ("stride", "padding", "dilation", "groups")]
    expected = slow_conv_transpose(*wide(x, w), *geometry, output_padding) + sides(bias, w.dim() - 2)
    x = in_drawn_layout(x, case["channels_last"])
    result = ref.conv(x, w, bias, *geometry, transposed=True, output_padding=output_padding)
    assert differing(result, expected) == 0


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    features=st.integers(1, 700),
    dtype=dtypes,
    extreme=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_linear_is_the_integer_sum(
    lead: list[int], features: int, dtype: torch.dtype, extreme: bool, seed: int
) -> None:
    x, w = integers((*lead, features), dtype, seed, extreme), weights((5, features), seed, extreme)
    bias = torch.from_numpy(np.random.default_rng(seed).integers(-(2**30), 2**30, 5)).int()
    a, b = wide(x, w)
    assert differing(ref.linear(x, w, bias), a @ b.T + bias.numpy()) == 0
    assert differing(ref.linear(x, w), a @ b.T) == 0


@contextmanager
def without_onednn() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@contextmanager
def low_precision(mode: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def onednn_bfloat16() -> Iterator[None]:
    settings = [torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = "bf16"
    try:
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What a user may have set, and what must not change a sum.
SURROUNDINGS = {
    "as it is": torch.no_grad,
    "oneDNN off": without_onednn,
    "matmul precision high": lambda: low_precision("high"),
    "matmul precision medium": lambda: low_precision("medium"),
    "oneDNN in bfloat16": onednn_bfloat16,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "two threads": two_threads,
    "inference mode": torch.inference_mode,
}

# name: (x shape, w shape, keyword arguments); what PyTorch would hand to its various algorithms
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3, one image": ((1, 64, 14, 14), (64, 64, 3, 3), {"padding": 1}),
    "3x3, a batch of 16": ((16, 32, 12, 12), (32, 32, 3, 3), {"padding": 1}),
    "3x3, saturating": ((1, 256, 7, 7), (64, 256, 3, 3), {"padding": 1}),
    "5x5": ((16, 16, 14, 14), (16, 16, 5, 5), {"padding": 2}),
    "7x7 stride 2": ((1, 3, 64, 64), (32, 3, 7, 7), {"padding": 3, "stride": 2}),
    "1x1": ((2, 512, 7, 7), (64, 512, 1, 1), {}),
    "depthwise": ((1, 64, 28, 28), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    "grouped, over 2^24": ((1, 1200, 3, 3), (8, 600, 3, 3), {"padding": 1, "groups": 2}),
    "1d, a batch of 16": ((16, 32, 50), (32, 32, 3), {"padding": 1}),
    "3d": ((1, 16, 6, 8, 8), (16, 16, 3, 3, 3), {"padding": 1}),
    "transposed": ((2, 128, 7, 7), (128, 32, 4, 4), {"padding": 1, "stride": 2, "transposed": True}),
    "transposed, saturating": ((1, 300, 5, 5), (300, 8, 3, 3), {"transposed": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=["u8", "s8"])
def test_no_algorithm_and_no_setting_changes_a_sum(shape: str, dtype: torch.dtype) -> None:
    x_shape, w_shape, arguments = SHAPES[shape]
    extreme = "saturating" in shape or "over" in shape
    x, w = integers(x_shape, dtype, extreme=extreme), weights(w_shape, extreme=extreme)
    dims, geometry = w.dim() - 2, {"stride": 1, "padding": 0, "dilation": 1} | arguments
    slow = slow_conv_transpose if geometry.pop("transposed", False) else slow_conv
    stride, padding, dilation = ((geometry[name],) * dims for name in ("stride", "padding", "dilation"))
    last = ((0,) * dims,) if slow is slow_conv_transpose else ()
    expected = slow(*wide(x, w), stride, padding, dilation, geometry.get("groups", 1), *last)
    assert not extreme or np.abs(expected).max() > 2**24
    for name, surrounding in SURROUNDINGS.items():
        for channels_last in (False, True) if dims > 1 else (False,):
            with surrounding():
                result = ref.conv(in_drawn_layout(x, channels_last), w, **arguments)
            assert differing(result, expected) == 0, name


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_no_setting_changes_a_linear_sum(surrounding: str) -> None:
    x, w = integers((33, 2000), torch.uint8, extreme=True), weights((64, 2000), extreme=True)
    with SURROUNDINGS[surrounding]():
        result = ref.linear(x, w)
    a, b = wide(x, w)
    assert differing(result, a @ b.T) == 0


@pytest.mark.skipif(not torch._nnpack_available(), reason="this PyTorch has no NNPACK")
def test_the_algorithm_to_avoid_is_really_there() -> None:
    x, w = integers((32, 64, 14, 14), torch.uint8), weights((64, 64, 3, 3))
    with without_onednn():
        inexact = torch.nn.functional.conv2d(x.float(), (w // 8).float(), padding=1)
        exact = ref.conv(x, w // 8, padding=1)
    assert (inexact != exact).any()


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9)),
    dtype=dtypes,
    spread=st.sampled_from([10, 127]),
    uneven=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_runs_of_input_channels_stay_exact(
    shape: tuple[int, int, int], dtype: torch.dtype, spread: int, uneven: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(-spread, spread + 1, shape)
    if uneven:
        w[:, : shape[1] // 2] = 127
    run = convolution_module._exact_run(torch.from_numpy(w).float(), dtype, splits=True)
    lo, hi = ref.integer_range(dtype)
    reached = [
        max(
            (np.maximum(part * hi, part * lo).clip(0)).sum((1, 2)).max(),
            -(np.minimum(part * hi, part * lo).clip(None, 0)).sum((1, 2)).min(),
        )
        for part in np.split(w, range(run or 1, shape[1], run or 1), axis=1)
    ]
    assert run is not None and max(reached) <= 2**24


def test_a_sum_of_exactly_two_to_the_24_fits() -> None:
    # 131072 = 2^24 / 128 as a sum of |w|, and one more
    w = torch.full((1, 1033, 1), 127.0)
    w[0, -1] = 131072 - 1032 * 127
    assert convolution_module._exact_run(w, torch.int8, splits=False) == 1033
    w[0, -1] += 1
    assert convolution_module._exact_run(w, torch.int8, splits=False) is None
    assert convolution_module._exact_run(w, torch.int8, splits=True) == 517


def test_padding_by_name() -> None:
    x = integers((2, 3, 9, 8), torch.uint8)
    for kernel, dilation in [((3, 3), 1), ((2, 4), 1), ((4, 3), 2)]:
        w = weights((4, 3, *kernel))
        expected = torch.nn.functional.conv2d(x.double(), w.double(), padding="same", dilation=dilation)
        assert differing(ref.conv(x, w, padding="same", dilation=dilation), expected.numpy().astype(np.int64)) == 0
        expected = torch.nn.functional.conv2d(x.double(), w.double(), padding="valid", dilation=dilation)
        assert differing(ref.conv(x, w, padding="valid", dilation=dilation), expected.numpy().astype(np.int64)) == 0
    with pytest.raises(ValueError, match="'same' with stride"):
        ref.conv(x, w, padding="same", stride=2)
    with pytest.raises(ValueError, match="padding 'full'"):
        ref.conv(x, w, padding="full")


def test_without_a_batch_and_with_an_empty_one() -> None:
    x, w = integers((2, 3, 9, 8), torch.uint8), weights((4, 3, 3, 3))
    assert int((ref.conv(x[0], w, padding=1) != ref.conv(x, w, padding=1)[0]).sum()) == 0
    assert ref.conv(x[:0], w).shape == (0, 4, 7, 6)
    assert ref.linear(integers((0, 3), torch.int8), weights((4, 3))).shape == (0, 4)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("groups", [1, 16])
def test_channels_last_stays(batch: int, groups: int) -> None:
    x = integers((batch, 16, 20, 20), torch.uint8).contiguous(memory_format=torch.channels_last)
    acc = ref.conv(x, weights((16, 16 // groups, 3, 3)), torch.ones(16, dtype=torch.int32), padding=1, groups=groups)
    assert acc.is_contiguous(memory_format=torch.channels_last)
    y = ref.epilogue(acc, torch.rand(16), dtype=torch.uint8)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_only_integers_are_taken() -> None:
    x, w = integers((1, 3, 5, 5), torch.uint8), weights((4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        ref.conv(x.float(), w)
    with pytest.raises(ValueError, match=r"weights are torch\.int8, not torch\.float32"):
        ref.conv(x, w.float())
    with pytest.raises(ValueError, match="one value, nor one for each of 2"):
        ref.conv(x, w, stride=(1, 2, 3))
