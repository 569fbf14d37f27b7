"""The reference's add, mul, tables, cat, up-sampling and padding against numpy and PyTorch's float operators."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from horizon_plugin_pytorch.backends import reference as ref

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.int8, torch.uint8])
scales = st.floats(2**-10, 1, width=32)
activations = st.sampled_from([None, "relu", "relu6"])
shape_pairs = st.sampled_from(
    [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((4,), (2, 3, 4)), ((2, 1, 4), (3, 1)), ((), (2, 3))]
)


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    lo, hi = ref.integer_range(dtype)
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).integers(lo, hi + 1, shape))).to(dtype)


def differing(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype
    return int((a != b).sum())


def ratio(*above: float, over: float) -> np.float32:
    value = np.float64(1)
    for scale in above:
        value *= np.float64(scale)
    return np.float32(value / np.float64(over))


def rounded(y: np.ndarray, activation: str | None, s_y: float, dtype: torch.dtype) -> Tensor:
    if activation is not None:
        y = np.maximum(y, np.float32(0))
    if activation == "relu6":
        y = np.minimum(y, ratio(6.0, over=s_y))
    return torch.from_numpy(np.asarray(np.rint(y).clip(*ref.integer_range(dtype)))).to(dtype)


def nearest_float32(value: Fraction) -> np.float32:
    """Correctly rounded: of the float64 nearest to `value` its two float32 neighbours, whichever is nearer."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


@given(seeds, dtypes, dtypes, dtypes, shape_pairs, activations, scales, scales, scales)
def test_add(seed, a_dtype, b_dtype, dtype, shapes, activation, s_a, s_b, s_y) -> None:  # type: ignore[no-untyped-def]
    a, b = integers(shapes[0], a_dtype, seed), integers(shapes[1], b_dtype, seed + 1)
    first = a.numpy().astype(np.float32) * ratio(s_a, over=s_y)
    second, first = np.broadcast_arrays(b.numpy().astype(np.int64), first)
    factor = Fraction(float(ratio(s_b, over=s_y)))
    pairs = zip(second.flatten().tolist(), first.flatten().tolist(), strict=True)
    y = np.array([nearest_float32(q * factor + Fraction(f)) for q, f in pairs], dtype=np.float32).reshape(first.shape)
    result = ref.add(a, torch.tensor(s_a), b, torch.tensor(s_b), torch.tensor(s_y), dtype, activation)
    assert differing(result, rounded(y, activation, s_y, dtype)) == 0


@given(seeds, dtypes, dtypes, dtypes, shape_pairs, activations, scales, scales, scales)
def test_mul(seed, a_dtype, b_dtype, dtype, shapes, activation, s_a, s_b, s_y) -> None:  # type: ignore[no-untyped-def]
    a, b = integers(shapes[0], a_dtype, seed), integers(shapes[1], b_dtype, seed + 1)
    product = a.numpy().astype(np.int64) * b.numpy().astype(np.int64)
    y = product.astype(np.float32) * ratio(s_a, s_b, over=s_y)
    result = ref.mul(a, torch.tensor(s_a), b, torch.tensor(s_b), torch.tensor(s_y), dtype, activation)
    assert differing(result, rounded(y, activation, s_y, dtype)) == 0


@given(
    st.lists(st.tuples(dtypes, scales, st.integers(1, 4)), min_size=1, max_size=4), st.integers(-4, 3), scales, dtypes
)
def test_cat(operands: list[tuple[torch.dtype, float, int]], dim: int, s_y: float, dtype: torch.dtype) -> None:
    tensors, expected = [], []
    for seed, (in_dtype, scale, length) in enumerate(operands):
        shape = [2, 2, 3, 3]
        shape[dim] = length
        tensors.append(integers(tuple(shape), in_dtype, seed))
        expected.append(rounded(tensors[-1].numpy().astype(np.float32) * ratio(scale, over=s_y), None, s_y, dtype))
    s = [torch.tensor(scale) for _, scale, _ in operands]
    assert differing(ref.cat(tensors, s, torch.tensor(s_y), dim, dtype), torch.cat(expected, dim)) == 0


def test_cat_copies_an_operand_of_the_same_scale() -> None:
    s, q = torch.tensor(0.0123), integers((1, 4, 16, 16), torch.int8)
    q = q.contiguous(memory_format=torch.channels_last)
    y = ref.cat([q, q], [s, s * 2], s, 1, torch.int8)
    assert differing(y[:, :4], q) == 0 and y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="zip"):
        ref.cat([q, q], [s], s, 1, torch.int8)


@given(
    fn=st.sampled_from([torch.sigmoid, torch.tanh, F.silu, F.hardswish, F.gelu, torch.abs, torch.exp]),
    in_dtype=dtypes,
    out_dtype=dtypes,
    s_x=scales,
    s_y=scales,
    channels_last=st.booleans(),
    seed=seeds,
)
def test_a_table_is_the_quantized_function(  # type: ignore[no-untyped-def]
    fn, in_dtype, out_dtype, s_x, s_y, channels_last, seed
) -> None:
    table = ref.lookup_table(fn, torch.tensor(s_x), in_dtype, torch.tensor(s_y), out_dtype)
    assert table.shape == (256,) and table.dtype == out_dtype
    lo, hi = ref.integer_range(in_dtype)
    values = fn(torch.from_numpy(np.arange(lo, hi + 1).astype(np.float32) * np.float32(s_x)))
    with np.errstate(over="ignore"):
        quotients = values.numpy() / np.float32(s_y)
    assert differing(table, rounded(quotients, None, s_y, out_dtype)) == 0
    q = integers((2, 3, 4, 5), in_dtype, seed)
    expected = torch.tensor([table[v - lo].item() for v in q.flatten().tolist()], dtype=out_dtype).view(q.shape)
    if channels_last:
        q = q.contiguous(memory_format=torch.channels_last)
    y = ref.lookup(q, table)
    assert differing(y, expected) == 0
    assert not channels_last or y.is_contiguous(memory_format=torch.channels_last)


def test_a_table_does_not_depend_on_autocast_or_gradients() -> None:
    layer, s = torch.nn.PReLU(), torch.tensor(0.05)
    table = ref.lookup_table(layer, s, torch.int8, s, torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert differing(ref.lookup_table(layer, s, torch.int8, s, torch.int8), table) == 0
    assert not table.requires_grad and table[0] == -32 and table[255] == 127


def test_functions_that_make_no_table() -> None:
    s = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"NaN at -64, which torch\.int8 can hold"):
        ref.lookup_table(torch.sqrt, s, torch.int8, s, torch.int8)
    assert ref.lookup_table(torch.sqrt, s, torch.uint8, s, torch.uint8)[200] == 20
    with pytest.raises(ValueError, match=r"\(256,\) became \(\)"):
        ref.lookup_table(torch.sum, s, torch.int8, s, torch.int8)


@given(
    length=st.integers(1, 40),
    out=st.integers(1, 90),
    factor=st.one_of(st.none(), st.floats(0.3, 4), st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0, 1 / 3])),
    exact=st.booleans(),
)
@example(length=4, out=82, factor=None, exact=True)
@example(length=6, out=321, factor=None, exact=True)
@example(length=16, out=376, factor=None, exact=True)
def test_upsample_follows_pytorchs_rule(length: int, out: int, factor: float | None, exact: bool) -> None:
    if factor is not None and int(length * factor) < 1:
        return
    # PyTorch's kernel for many channels in channels_last: what the others do to "nearest-exact" depends on the CPU.
    x = torch.arange(length).expand(1, 16, 2, length).contiguous(memory_format=torch.channels_last)
    target: dict[str, Any] = {"size": (2, out)} if factor is None else {"scale_factor": (1.0, factor)}
    expected = F.interpolate(x.float(), **target, mode="nearest-exact" if exact else "nearest").to(torch.uint8)
    assert differing(ref.upsample_nearest(x.to(torch.uint8), **target, exact=exact), expected) == 0
    if not exact:
        line: dict[str, Any] = {"size": out} if factor is None else {"scale_factor": factor}
        expected = F.interpolate(x[:, :1, 0].float(), **line).to(torch.uint8)
        assert differing(ref.upsample_nearest(x[:, :1, 0].to(torch.uint8), **line), expected) == 0


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_upsample_in_every_dimension(dims: int, exact: bool, dtype: torch.dtype) -> None:
    x = integers((2, 3, 5, 4, 6)[: 2 + dims], dtype)
    mode = "nearest-exact" if exact else "nearest"
    for target in (
        {"scale_factor": 2},
        {"size": (7, 9, 4)[:dims]},
        {"scale_factor": (1.7, 2.3, 0.6)[:dims]},
        {"scale_factor": 1.1},
        {"size": 8},
    ):
        expected = F.interpolate(x.float(), **target, mode=mode).to(dtype)
        assert differing(ref.upsample_nearest(x, **target, exact=exact), expected) == 0
    if dims == 2:
        y = ref.upsample_nearest(x.contiguous(memory_format=torch.channels_last), scale_factor=2)
        assert y.is_contiguous(memory_format=torch.channels_last)


def linear_by_definition(row: list[int], out: int, r: float, align_corners: bool, bits: int) -> list[Fraction]:
    """`row` at `out` places, exactly, but for weights that are rounded to `bits` bits."""
    values = []
    for i in range(out):
        p = i * r if align_corners else max((i + 0.5) * r - 0.5, 0.0)
        low = min(int(p), len(row) - 1)
        w = Fraction(round(min(p - low, 1.0) * 2**bits), 2**bits)
        values.append((1 - w) * row[low] + w * row[min(low + 1, len(row) - 1)])
    return values


@given(
    length=st.integers(1, 20),
    out=st.integers(1, 40),
    factor=st.one_of(st.none(), st.floats(0.3, 4), st.sampled_from([1.0, 1.5, 2.0, 3.0, 1 / 3])),
    align_corners=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_linear_upsample_is_its_definition(
    length: int, out: int, factor: float | None, align_corners: bool, dtype: torch.dtype, seed: int
) -> None:
    if factor is not None:
        out = int(length * factor)
        if out < 1:
            return
    x = integers((1, 1, length), dtype, seed)
    r = (length - 1) / max(out - 1, 1) if align_corners else length / out if factor is None else 1 / factor
    exact = linear_by_definition(x.flatten().tolist(), out, r, align_corners, 22)
    expected = torch.tensor([round(np.float32(float(v))) for v in exact], dtype=dtype).view(1, 1, -1)
    target: dict[str, Any] = {"size": out} if factor is None else {"scale_factor": factor}
    assert differing(ref.upsample_linear(x, **target, align_corners=align_corners), expected) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_upsample_of_pytorch(dtype: torch.dtype, align_corners: bool) -> None:
    """In float64: equal where weights are powers of two, within an eighth of a step where they are not."""
    x = integers((2, 3, 7, 9), dtype)
    for factor in (2, 4, 8, 0.5):
        smooth = F.interpolate(x.double(), scale_factor=factor, mode="bilinear", align_corners=False)
        assert differing(ref.upsample_linear(x, scale_factor=factor), smooth.round().to(torch.int16).to(dtype)) == 0
    for target in ({"size": (23, 4)}, {"size": 1}, {"scale_factor": (1.7, 2.3)}, {"size": (7, 9)}, {"scale_factor": 3}):
        smooth = F.interpolate(x.double(), **target, mode="bilinear", align_corners=align_corners)
        result = ref.upsample_linear(x, **target, align_corners=align_corners)
        assert result.shape == smooth.shape and (result - smooth).abs().max() <= 0.5 + 1 / 8
        last = ref.upsample_linear(
            x.contiguous(memory_format=torch.channels_last), **target, align_corners=align_corners
        )
        assert differing(last, result) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_bilinear_upsample_of_a_constant_is_constant(dtype: torch.dtype) -> None:
    for q in ref.integer_range(dtype):
        x = torch.full((1, 2, 5, 6), q, dtype=dtype)
        assert int((ref.upsample_linear(x, size=(13, 17)) != q).sum()) == 0


def test_trilinear_upsampling_has_no_integer_form() -> None:
    with pytest.raises(ValueError, match="one or two dimensions, not 3"):
        ref.upsample_linear(integers((1, 1, 2, 2, 2), torch.int8), scale_factor=2)


def test_upsample_needs_one_target() -> None:
    x = integers((1, 1, 2, 2), torch.int8)
    for target in ({}, {"size": 4, "scale_factor": 2}):
        with pytest.raises(ValueError, match="one of size and scale_factor"):
            ref.upsample_nearest(x, **target)
        with pytest.raises(ValueError, match="one of size and scale_factor"):
            ref.upsample_linear(x, **target)
    with pytest.raises(ValueError, match="nor one for each of 2"):
        ref.upsample_nearest(x, size=(1, 2, 3))


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_pad(mode: str, dtype: torch.dtype) -> None:
    x = integers((2, 3, 5, 6), dtype)
    numpy_mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (3, 0), (1, 2)], mode=numpy_mode)
    for layout in (torch.contiguous_format, torch.channels_last):
        result = ref.pad(x.contiguous(memory_format=layout), (1, 2, 3, 0), mode)
        assert differing(result, torch.from_numpy(expected)) == 0
        assert result.is_contiguous(memory_format=layout)
