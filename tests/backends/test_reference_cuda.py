"""The reference on a CUDA device gives what it gives on the CPU, whatever precision floating point may have there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from horizon_plugin_pytorch.backends import reference as ref

pytestmark = pytest.mark.gpu


def integers(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    lo, hi = ref.integer_range(dtype)
    return torch.randint(lo, hi + 1, shape).to(dtype)


def weights(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape).to(torch.int8)


def scales(count: int) -> Tensor:
    return torch.rand(count) * 0.05 + 1e-4


def differing(on_cpu: Tensor, on_cuda: Tensor) -> int:
    assert on_cuda.is_cuda and on_cpu.dtype == on_cuda.dtype and on_cpu.shape == on_cuda.shape
    return int((on_cpu != on_cuda.cpu()).sum())


def compare(operator: Callable[..., Any], *tensors: Tensor) -> None:
    on_cpu, on_cuda = operator(*tensors), operator(*(t.cuda() for t in tensors))
    if isinstance(on_cpu, Tensor):
        on_cpu, on_cuda = [on_cpu], [on_cuda]
    assert [differing(a, b) for a, b in zip(on_cpu, on_cuda, strict=True)] == [0] * len(on_cpu)


@contextmanager
def reduced_precision() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = True, True, True
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((16, 64, 28, 28), (64, 64, 3, 3), {"padding": 1}),
    "3x3, deep": ((2, 512, 7, 7), (512, 512, 3, 3), {"padding": 1}),
    "5x5": ((4, 32, 28, 28), (32, 32, 5, 5), {"padding": 2}),
    "7x7 stride 2": ((2, 3, 96, 96), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    "1x1": ((4, 1024, 14, 14), (256, 1024, 1, 1), {}),
    "depthwise, dilated": ((4, 64, 28, 28), (64, 1, 3, 3), {"padding": 2, "groups": 64, "dilation": 2}),
    "grouped": ((4, 64, 14, 14), (32, 16, 3, 3), {"groups": 4}),
    "1d": ((4, 64, 500), (64, 64, 31), {"padding": 15}),
    "3d": ((1, 16, 8, 16, 16), (16, 16, 3, 3, 3), {"padding": 1}),
    "transposed": ((2, 128, 14, 14), (128, 32, 4, 4), {"padding": 1, "stride": 2, "transposed": True}),
    "transposed, grouped": (
        (2, 32, 9, 9),
        (32, 8, 3, 3),
        {"stride": 2, "transposed": True, "groups": 4, "output_padding": 1},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=["u8", "s8"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_convolutions(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x_shape, w_shape, arguments = CONVOLUTIONS[name]
    x, w = integers(*x_shape, dtype=dtype), weights(*w_shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    outputs = w_shape[1] * arguments.get("groups", 1) if arguments.get("transposed") else w_shape[0]
    bias = torch.randint(-(2**20), 2**20, (outputs,), dtype=torch.int32)
    operator = partial(ref.conv, **arguments)
    compare(operator, x, w, bias)
    with reduced_precision():
        compare(operator, x, w, bias)


def test_linear() -> None:
    for lead in ((1,), (64,), (4, 9)):
        arguments = integers(*lead, 2048), weights(1000, 2048), torch.randint(-1000, 1000, (1000,), dtype=torch.int32)
        compare(ref.linear, *arguments)
        with reduced_precision():
            compare(ref.linear, *arguments)


def test_quantize_divides() -> None:
    x = torch.randn(1_000_000) * 10
    for dtype in (torch.int8, torch.uint8):
        for s in scales(20):
            compare(partial(ref.quantize, dtype=dtype), x, s)
            # the scale left on the CPU: CUDA would multiply by its reciprocal
            assert differing(ref.quantize(x, s, dtype), ref.quantize(x.cuda(), s, dtype)) == 0
    compare(partial(ref.quantize, dtype=torch.int8, axis=1), x.view(-1, 50), scales(50))


def test_fma() -> None:
    bits = torch.randint(-(2**31), 2**31, (3, 1_000_000)).to(torch.int32).view(torch.float32).nan_to_num(0.0)
    compare(ref.fma, *bits)
    i = torch.randint(1, 32, (100_000,)).double()
    c = (2.0**23 + torch.randint(0, 2**22, (100_000,)) * 2 + 1).float()
    compare(ref.fma, (1 + i * 2**-23).float(), ((2**23 - i) * 2**-24).float(), c)


def test_weights_and_multipliers() -> None:
    w, k, bias = torch.randn(64, 32, 3, 3), torch.randn(64).double(), torch.randn(64).double()
    k[::7] = 0
    compare(ref.weight_qparams, w, k, bias, torch.tensor(0.013))
    compare(partial(ref.weight_qparams, axis=1, groups=2), w, k, bias, torch.tensor(0.013))
    s_x, s_w, s_y, s_r = torch.tensor(0.013), scales(10_000), scales(10_000), torch.tensor(0.021)
    compare(ref.group_multipliers, s_x, s_w, s_y, s_r)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float32])
def test_epilogue(activation: str | None, dtype: torch.dtype) -> None:
    def operator(acc: Tensor, m: Tensor, residual: Tensor, ratio: Tensor, bound: Tensor) -> Tensor:
        return ref.epilogue(
            acc, m, residual=residual, residual_ratio=ratio, activation=activation, bound=bound, dtype=dtype
        )

    acc = torch.randint(-(2**20), 2**20, (4, 64, 28, 28), dtype=torch.int32)
    compare(operator, acc, scales(64) * 0.01, integers(4, 64, 28, 28), scales(64) * 20, scales(64) * 4000)


def test_pools() -> None:
    s, x = torch.tensor([0.013, 0.011]), integers(2, 8, 19, 23, dtype=torch.int8)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        compare(partial(ref.max_pool, kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True), x)
        compare(partial(ref.adaptive_max_pool, output_size=(5, 7)), x)
        for include in (False, True):
            operator = partial(ref.avg_pool, dtype=torch.int8, kernel_size=3, stride=2, padding=1, ceil_mode=True)
            compare(partial(operator, count_include_pad=include), x, *s)
        compare(partial(ref.adaptive_avg_pool, dtype=torch.int8, output_size=(5, 7)), x, *s)
        compare(partial(ref.mean, dtype=torch.int8, dim=(2, 3)), x, *s)


def test_elementwise_and_layout() -> None:
    a, b, (s_a, s_b, s_y) = integers(2, 8, 19, 23), integers(2, 8, 19, 23, dtype=torch.int8), scales(3)
    for operator in (ref.add, ref.mul):
        compare(partial(operator, dtype=torch.int8, activation="relu6"), a, s_a, b, s_b, s_y)
    compare(lambda *t: ref.cat(t[:2], t[2:4], t[4], 1, torch.int8), a, b, s_a, s_b, s_y)
    compare(lambda s, t: ref.lookup_table(torch.sigmoid, s, torch.int8, t, torch.uint8), s_a, s_y)
    compare(ref.lookup, b, integers(256))
    compare(ref.dequantize, b, s_b)
    for exact in (False, True):
        for target in ({"scale_factor": 2}, {"scale_factor": 1.04}, {"size": (31, 12)}):
            compare(partial(ref.upsample_nearest, exact=exact, **target), b)
    for corners in (False, True):
        compare(partial(ref.upsample_linear, size=(31, 12), align_corners=corners), b)
    for mode in ("constant", "reflect", "replicate", "circular"):
        compare(partial(ref.pad, padding=(1, 2, 3, 0), mode=mode), b)
