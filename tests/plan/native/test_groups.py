"""Every fused group that can be drawn, on every instruction set of this machine, equals the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.native import tuning
from plan.native import plans

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="the CPU kernels were not built")
ISAS = range(library.best_isa() + 1) if library.why_not() is None else range(1)


@dataclass
class Case:
    geometry: Geometry
    shape: tuple[int, ...]
    channels: int
    in_dtype: str
    out_dtype: str | None
    activation: str | None
    residual: str | None
    spread: float
    per_channel: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(0, 3))
    activation = draw(st.sampled_from([None, "relu", "relu6"]))
    common = {
        "in_dtype": draw(st.sampled_from(["int8", "uint8"])),
        "out_dtype": draw(st.sampled_from(["int8", "uint8", None])),
        "activation": activation,
        "residual": draw(st.sampled_from([None, None, "int8", "uint8"])),
        "spread": draw(st.sampled_from([1.0, 1.0, 1.0, 1e9])),
        "per_channel": draw(st.booleans()) and dims > 0,
        "seed": draw(st.integers(0, 2**16)),
    }
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8, 32])) if dims else 1
    into = draw(st.sampled_from([1, 2, 3, 4, 7, 16, 17, 48, 70])) if groups < 8 else draw(st.sampled_from([1, 1, 4, 6]))
    out = draw(st.sampled_from([1, 2, 5, 16, 20, 37, 66])) if groups < 8 else draw(st.sampled_from([1, 1, 2, 4, 20]))
    if not dims:
        leading = draw(st.sampled_from([(1,), (5,), (2, 3), (17,), (40,)]))
        return Case(Geometry(0), (*leading, into), out, **common)
    of = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = of(1, 4 if dims < 3 else 3), of(1, 3), of(1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    transposed = draw(st.booleans())
    padding: tuple[int, ...] | str = tuple(draw(st.integers(0, r + 1)) for r in reach)
    mode, output_padding = "zeros", (0,) * dims
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    else:
        special = draw(st.sampled_from(["", "", "", "same", "valid", "reflect", "replicate", "circular"]))
        if special == "same":
            padding, stride = "same", (1,) * dims
        elif special == "valid":
            padding = "valid"
        elif special:
            mode, padding = special, tuple(draw(st.integers(0, 2)) for _ in range(dims))
    size = tuple(
        max(n, r + 1, 3) + (1 if not isinstance(padding, str) and p == 0 else 0)
        for n, r, p in zip(
            of(1, 9 if dims < 3 else 4), reach, padding if not isinstance(padding, str) else reach, strict=True
        )
    )
    if transposed:
        assert not isinstance(padding, str)
        steps = zip(size, stride, padding, reach, output_padding, strict=True)
        padding = tuple(p if (n - 1) * s - 2 * p + r + o + 1 > 0 else 0 for n, s, p, r, o in steps)
    batch = draw(st.sampled_from([1, 2, 3]))
    geometry = Geometry(dims, transposed, kernel, stride, padding, dilation, output_padding, groups, mode)
    return Case(geometry, (batch, into * groups, *size), out * groups, **common)


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    geometry, shape = case.geometry, case.shape
    axis = len(shape) - 1 - geometry.dims
    into, out, groups = shape[axis], case.channels, geometry.groups
    first, second = (into, out // groups) if geometry.transposed else (out, into // groups)
    weight = torch.randint(-127, 128, (first, second, *geometry.kernel_size), dtype=torch.int8)
    probe = torch.zeros(shape, dtype=torch.int8)
    with torch.no_grad():
        result = tuple(geometry.accumulate(probe, weight, None).shape)
    made = plans.Maker(x=shape, **({} if case.residual is None else {"r": result}))
    inputs = [plans.integers(shape, case.in_dtype)]
    x = made.quantize(0, case.in_dtype)
    r = None
    if case.residual is not None:
        inputs.append(plans.integers(result, case.residual))
        r = made.quantize(1, case.residual)
    scale = torch.rand(out) + 0.5 if case.per_channel and case.out_dtype else None
    y = made.group(
        x,
        geometry,
        weight,
        residual=r,
        activation=case.activation,
        dtype=case.out_dtype,
        spread=case.spread,
        scale=scale,
    )
    plan = made.plan(y)
    expected = plans.reference(plan, *inputs)
    for isa in ISAS:
        blocks = tuning.BLOCKS[library.ISAS[isa]]
        rows, columns = blocks[case.seed % len(blocks)]
        for threads, way in ((1, None), (3, None), (2, (0, rows, columns, case.seed // 7 % 2, 0))):
            got, in_torch = plans.native(plan, *inputs, isa=isa, threads=threads, way=way)
            assert in_torch == []
            assert plans.differing(expected, got) == 0, f"{library.ISAS[isa]}, {threads} threads, {way}"


@settings(max_examples=150)
@given(cases())
def test_groups(case: Case) -> None:
    check(case)


def conv(
    dims: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1, **more: object
) -> Geometry:
    of = lambda n: (n,) * dims  # noqa: E731
    return Geometry(dims, False, of(kernel), of(stride), of(padding), of(dilation), of(0), groups)


def up(kernel: int, stride: int, padding: int, output_padding: int = 0, groups: int = 1) -> Geometry:
    of = lambda n: (n,) * 2  # noqa: E731
    return Geometry(2, True, of(kernel), of(stride), of(padding), of(1), of(output_padding), groups)


KNOWN = {
    "stem": (conv(2, 7, 2, 3), (2, 3, 38, 45), 64),
    "stem 3x3": (conv(2, 3, 2, 1), (1, 3, 33, 40), 32),
    "3x3": (conv(2, 3, 1, 1), (2, 64, 14, 14), 64),
    "3x3, odd": (conv(2, 3, 1, 1), (2, 24, 13, 17), 40),
    "3x3, one pixel": (conv(2, 3, 1, 1), (1, 17, 1, 1), 5),
    "3x3, one row": (conv(2, 3, 1, 0), (3, 40, 3, 9), 16),
    "3x3 stride 2": (conv(2, 3, 2, 1), (1, 72, 28, 28), 130),
    "1x1 stride 2": (conv(2, 1, 2), (2, 256, 14, 14), 100),
    "7x7 map": (conv(2, 3, 1, 1), (1, 160, 7, 7), 512),
    "depthwise": (conv(2, 3, 1, 1, groups=96), (2, 96, 15, 17), 96),
    "depthwise stride 2": (conv(2, 3, 2, 1, groups=144), (1, 144, 20, 20), 144),
    "depthwise 5x5 dilated": (conv(2, 5, 1, 4, 2, groups=40), (1, 40, 12, 12), 40),
    "channel multiplier": (conv(2, 3, 1, 1, groups=20), (1, 20, 9, 9), 60),
    "4 channels in each of 32 groups": (conv(2, 3, 1, 1, groups=32), (1, 128, 14, 14), 128),
    "24 channels in each of 3 groups": (conv(2, 3, 1, 1, groups=3), (1, 72, 14, 14), 72),
    "80 channels in each of 2 groups": (conv(2, 3, 1, 1, groups=2), (1, 160, 8, 8), 160),
    "deconvolution 4x4": (up(4, 2, 1), (1, 96, 8, 8), 256),
    "deconvolution 2x2": (up(2, 2, 0), (2, 64, 9, 7), 32),
    "deconvolution 3x3, output padding": (up(3, 2, 1, 1), (1, 24, 8, 8), 24),
    "deconvolution with holes": (up(1, 3, 0, 2), (1, 8, 5, 5), 17),
    "depthwise deconvolution": (up(4, 2, 1, groups=64), (1, 64, 6, 6), 64),
    "linear": (Geometry(0), (3, 2048), 1000),
    "linear on tokens": (Geometry(0), (2, 50, 96), 192),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("residual", [None, "int8"])
def test_known_layers(name: str, residual: str | None) -> None:
    geometry, shape, channels = KNOWN[name]
    for in_dtype, out_dtype, activation in (
        ("uint8", "uint8", "relu"),
        ("int8", "int8", None),
        ("int8", None, "relu6"),
    ):
        check(Case(geometry, shape, channels, in_dtype, out_dtype, activation, residual, 1.0, False, 0))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("channels", [1840, 1844])
def test_largest_sums(channels: int, dtype: str) -> None:
    """Nine times 1842 products of 255 and 127 are the most that fit in int32 when they come out four times as large."""
    least, most = plans.RANGES[dtype]
    shape = (1, channels, 3, 4)
    made = plans.Maker(x=shape)
    weight = torch.full((3, channels, 3, 3), 127, dtype=torch.int8)
    weight[1] = -127
    weight[2] = torch.where(torch.rand(channels, 3, 3) < 0.5, 127, -127)
    plan = made.plan(made.group(made.quantize(0, dtype), conv(2, 3, 1, 1), weight, dtype=None))
    for x in (torch.full(shape, most - 1.0), torch.full(shape, float(least)), plans.integers(shape, dtype)):
        expected = plans.reference(plan, x)
        for isa in ISAS:
            for rows, columns in tuning.BLOCKS[library.ISAS[isa]]:
                got, _ = plans.native(plan, x, isa=isa, way=(0, rows, columns, 0, 0))
                assert plans.differing(expected, got) == 0, f"{library.ISAS[isa]}, {rows} rows, {columns} columns"
