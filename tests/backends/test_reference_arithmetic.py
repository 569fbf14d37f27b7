"""The reference's numbers against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from horizon_plugin_pytorch.backends import reference as ref
from horizon_plugin_pytorch.backends.reference import arithmetic

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.int8, torch.uint8])
scales = st.floats(2**-20, 2**10, width=32)


def float32(value: Fraction) -> float:
    """`value` rounded to the nearest float32, ties to even, by integers alone."""
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(value / ulp) * ulp
    if abs(rounded) >= 2**128:
        return float("inf") if rounded > 0 else float("-inf")
    return float(rounded)


def integer(value: float, dtype: torch.dtype) -> int:
    lo, hi = (-128, 127) if dtype == torch.int8 else (0, 255)
    if value in (float("inf"), float("-inf")):
        return hi if value > 0 else lo
    return min(max(round(Fraction(value)), lo), hi)


def any_float32(rng: np.random.Generator, size: int) -> np.ndarray:
    """Finite float32 of every exponent, the subnormal ones included."""
    values = rng.integers(0, 2**32, size=size, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0))


def differing(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype
    return int((a != b).sum())


def test_float32_oracle_agrees_with_numpy() -> None:
    values = any_float32(np.random.default_rng(0), 500).astype(np.float64) * (1 + 2.0**-30)
    with np.errstate(over="ignore"):
        assert [float32(Fraction(float(v))) for v in values] == values.astype(np.float32).tolist()


@given(seed=seeds, scale=scales, dtype=dtypes)
def test_quantize_is_one_true_division_and_one_rounding(seed: int, scale: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    near_ties = (rng.integers(-300, 300, 60) + 0.5) * scale
    x = np.concatenate([any_float32(rng, 60), rng.normal(0, 100 * scale, 60), near_ties]).astype(np.float32)
    expected = [integer(float32(Fraction(float(v)) / Fraction(scale)), dtype) for v in x]
    result = ref.quantize(torch.from_numpy(x), torch.tensor(scale), dtype)
    assert differing(result, torch.tensor(expected, dtype=dtype)) == 0


def test_quantize_breaks_ties_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5]) / 8
    expected = torch.tensor([-2, -2, 0, 0, 2, 2, 126, 127], dtype=torch.int8)
    assert differing(ref.quantize(x, torch.tensor(0.125), torch.int8), expected) == 0


@given(seed=seeds, axis=st.integers(-3, 2), dtype=dtypes)
def test_quantize_and_dequantize_per_channel_are_the_channels_one_by_one(
    seed: int, axis: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, generator=generator)
    scale = torch.rand(x.shape[axis], generator=generator) * 0.05 + 1e-3
    q = ref.quantize(x, scale, dtype, axis)
    back = ref.dequantize(q, scale, axis)
    for c in range(x.shape[axis]):
        one = ref.quantize(x.select(axis, c), scale[c], dtype)
        assert differing(q.select(axis, c), one) == 0
        assert differing(back.select(axis, c), one.float() * scale[c]) == 0


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_go_through_float32(precision: torch.dtype) -> None:
    x = (torch.randn(1000, dtype=torch.float64) * 3).to(precision)
    scale = torch.tensor(0.037)
    result = ref.quantize(x, scale, torch.int8)
    assert differing(result, ref.quantize(x.float(), scale, torch.int8)) == 0
    # a float64 just above a tie that float32 cannot tell from the tie
    tie = torch.tensor([0.5 + 1e-12], dtype=torch.float64)
    assert ref.quantize(tie, torch.tensor(1.0), torch.int8).item() == 0


def test_infinities_clamp_and_nan_is_an_error() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 3e38, -3e38])
    tiny = torch.tensor(1e-30)
    assert ref.quantize(x, tiny, torch.int8).tolist() == [127, -128, 127, -128]
    assert ref.quantize(x, tiny, torch.uint8).tolist() == [255, 0, 255, 0]
    x[1] = float("nan")
    with pytest.raises(ValueError, match=r"shape \(4,\), holds NaN"):
        ref.quantize(x, tiny, torch.int8)
    assert ref.quantize(x, tiny, torch.int8, check=False)[0] == 127


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="a scale is zero, negative or not finite"):
        ref.quantize(torch.ones(3), torch.tensor(scale), torch.int8)


def test_arguments_that_do_not_fit() -> None:
    x, scale = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(TypeError, match=r"scale must be float32, not torch\.float64"):
        ref.quantize(x, scale.double(), torch.int8, 1)
    with pytest.raises(ValueError, match="the axis they run along"):
        ref.quantize(x, scale, torch.int8)
    with pytest.raises(ValueError, match="scale has 3 values"):
        ref.quantize(x, scale, torch.int8, 0)
    with pytest.raises(ValueError, match=r"not torch\.int16"):
        ref.quantize(x, scale, torch.int16, 1)


def hard_fma_operands(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a * b close to half an ulp of c, off by less than float64 sees: the sum seems a tie between two float32."""
    exponent = rng.integers(-40, 40, size)
    odd = rng.integers(0, 2**23, size) | 1
    c = np.ldexp((2**23 + odd).astype(np.float64), exponent)
    # (2^23 + i)(2^23 - i) = 2^46 - i^2, and i * i is far below the last bit of the sum in float64
    i = rng.integers(0, 2, size) * rng.integers(1, 2**5, size)
    a = np.ldexp((2**23 + i).astype(np.float64), -23) * rng.choice([-1, 1], size)
    b = np.ldexp((2**23 - i).astype(np.float64), exponent - 24)
    b, c = b * rng.choice([-1, 1], size), c * rng.choice([-1, 1], size)
    return a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Tensor:
    triples = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return torch.tensor([float32(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in triples], dtype=torch.float32)


@given(seed=seeds)
def test_fma_rounds_once_for_operands_of_every_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (any_float32(rng, 100) for _ in range(3))
    # and such where product and addend are of similar size, down to subnormal results
    near = [any_float32(rng, 100) for _ in range(2)]
    with np.errstate(over="ignore", under="ignore"):
        close = (near[0] * near[1] * -rng.integers(1, 2**20, 100).astype(np.float32)).astype(np.float32)
    close = np.where(np.isfinite(close), close, np.float32(1))
    a, b, c = np.concatenate([a, near[0]]), np.concatenate([b, near[1]]), np.concatenate([c, close])
    assert differing(ref.fma(*map(torch.from_numpy, (a, b, c))), exact_fma(a, b, c)) == 0


@given(seed=seeds)
def test_fma_where_rounding_twice_goes_wrong(seed: int) -> None:
    a, b, c = hard_fma_operands(np.random.default_rng(seed), 100)
    assert differing(ref.fma(*map(torch.from_numpy, (a, b, c))), exact_fma(a, b, c)) == 0


def test_the_hard_operands_are_hard() -> None:
    a, b, c = hard_fma_operands(np.random.default_rng(0), 1000)
    twice = torch.from_numpy((a.astype(np.float64) * b + c).astype(np.float32))
    assert differing(twice, exact_fma(a, b, c)) > 100


def test_fma_of_subnormal_results() -> None:
    # half way between two subnormal float32, and a little above
    ulp = 2.0**-149
    a = np.array([0.5, 0.5 + 2**-24, -0.5, 1.5], dtype=np.float32)
    b = np.full(4, ulp, dtype=np.float32)
    c = np.full(4, 3 * ulp, dtype=np.float32)
    result = ref.fma(*map(torch.from_numpy, (a, b, c)))
    assert differing(result, exact_fma(a, b, c)) == 0
    # a product far below the subnormal range breaks the tie
    small = np.array([2.0**-80, -(2.0**-80)], dtype=np.float32)
    half = np.array([2.0**-100, 2.0**-100], dtype=np.float32)
    c = np.array([1.0, 1.0], dtype=np.float32)
    assert differing(ref.fma(*map(torch.from_numpy, (small, half, c))), exact_fma(small, half, c)) == 0


def test_fma_of_infinities_broadcasting_and_layout() -> None:
    inf, one = torch.tensor([float("inf")]), torch.tensor([1.0])
    assert ref.fma(inf, one, one).item() == float("inf")
    assert ref.fma(one, one, -inf).item() == float("-inf")
    assert ref.fma(torch.tensor([3e38]), torch.tensor([3e38]), one).item() == float("inf")
    assert ref.fma(inf, one, -inf).isnan().item()
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y = ref.fma(x, torch.rand(3, 1, 1), x)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)


@given(seed=seeds, over=st.sampled_from([None, 1, 50]), two=st.booleans())
def test_scale_ratios_are_float64_rounded_once(seed: int, over: int | None, two: bool) -> None:
    rng = np.random.default_rng(seed)
    s, t, y = (np.exp(rng.normal(-3, 3, n)).astype(np.float32) for n in (50, 1, over or 1))
    exact = [Fraction(a) * (Fraction(t.item()) if two else 1) for a in s.tolist()]
    if over:  # the quotient of exact values rounds to float64 first
        exact = [Fraction(float(v / Fraction(d))) for v, d in zip(exact, np.resize(y, 50).tolist(), strict=True)]
    one_value = (torch.from_numpy(v).squeeze() for v in (t, y))
    t_, y_ = (v if wanted else None for v, wanted in zip(one_value, (two, over), strict=True))
    result = ref.scale_ratio(torch.from_numpy(s), t_, over=y_)
    assert differing(result, torch.tensor([float32(v) for v in exact])) == 0


def test_group_multipliers() -> None:
    s_x, s_w, s_y, s_r = torch.tensor(0.03), torch.tensor([0.01, 0.002, 0.5]), torch.tensor(0.07), torch.tensor(0.04)
    m, ratio, bound = ref.group_multipliers(s_x, s_w, s_y, s_r)
    assert differing(m, ref.scale_ratio(s_x, s_w, over=s_y)) == 0
    assert ratio is not None and differing(ratio, (s_r.double() / s_y.double()).float()) == 0
    assert differing(bound, (6 / s_y.double()).float()) == 0
    m, ratio, bound = ref.group_multipliers(s_x, s_w, None, s_r)
    assert differing(m, (s_x.double() * s_w.double()).float()) == 0
    assert ratio is not None and ratio == s_r and bound == 6.0
    # depthwise with a channel multiplier of 2: outputs 0, 1 read input 0, outputs 2, 3 read input 1
    m, ratio, _ = ref.group_multipliers(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor(2.0))
    assert m.tolist() == [0.5, 1.0, 6.0, 10.0] and ratio is None
    with pytest.raises(ValueError, match="do not divide 3 output channels"):
        ref.group_multipliers(torch.ones(2), torch.ones(3), s_y)


@st.composite
def groups(draw: st.DrawFn) -> dict:
    """An accumulator with all that `epilogue` can take beside it."""
    rng = np.random.default_rng(draw(seeds))
    axis = draw(st.sampled_from([1, -1]))
    shape = (2, 3, 4, 5) if axis == 1 else (2, 4, 3)
    channels = shape[axis]
    per_channel = draw(st.booleans())

    def ratio(low: float, high: float) -> Tensor:
        values = rng.uniform(low, high, channels if per_channel else 1).astype(np.float32)
        return torch.from_numpy(values) if per_channel else torch.tensor(values[0])

    residual_dtype = draw(st.sampled_from([None, torch.int8, torch.uint8]))
    lo, hi = (0, 256) if residual_dtype == torch.uint8 else (-128, 128)
    return {
        "acc": torch.from_numpy(rng.integers(-(2**31), 2**31, shape) // 2 ** int(rng.integers(0, 20))).int(),
        "m": ratio(1e-6, 1e-2),
        "residual": None
        if residual_dtype is None
        else torch.from_numpy(rng.integers(lo, hi, shape)).to(residual_dtype),
        "residual_ratio": None if residual_dtype is None else ratio(0.01, 3),
        "activation": draw(st.sampled_from([None, "relu", "relu6"])),
        "bound": ratio(20, 200),
        "dtype": draw(st.sampled_from([torch.int8, torch.uint8, torch.float32])),
        "axis": axis,
    }


@given(group=groups())
@hypothesis_settings(max_examples=60)
def test_epilogue_is_the_five_lines(group: dict) -> None:
    acc, axis, dtype = group["acc"], group["axis"], group["dtype"]

    def at(vector: Tensor, index: tuple[int, ...]) -> Fraction:
        return Fraction(vector[index[axis]].item() if vector.dim() else vector.item())

    expected = torch.empty(acc.shape, dtype=dtype)
    for index in np.ndindex(*acc.shape):
        y = float32(Fraction(float32(Fraction(acc[index].item()))) * at(group["m"], index))
        if group["residual"] is not None:
            y = float32(Fraction(group["residual"][index].item()) * at(group["residual_ratio"], index) + Fraction(y))
        if group["activation"] is not None:
            y = max(y, 0.0)
        if group["activation"] == "relu6":
            y = min(y, float(at(group["bound"], index)))
        expected[index] = y if dtype == torch.float32 else integer(y, dtype)
    assert differing(ref.epilogue(**group), expected) == 0


@given(group=groups(), channels_last=st.booleans(), block=st.integers(1, 50))
def test_epilogue_in_blocks_is_the_epilogue(group: dict, channels_last: bool, block: int) -> None:
    whole = ref.epilogue(**group)
    if channels_last and group["acc"].dim() == 4:
        group["acc"] = group["acc"].contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "BLOCK", block)
        assert differing(ref.epilogue(**group), whole) == 0
        # an operand that broadcasts
        group["acc"] = group["acc"][..., :1]
        for name in ("m", "residual_ratio", "bound"):
            group[name] = None if group[name] is None else group[name].flatten()[0]
        in_blocks = ref.epilogue(**group)
    assert differing(in_blocks, ref.epilogue(**group)) == 0


def test_epilogue_leaves_its_arguments_alone_and_needs_no_default() -> None:
    acc, residual = (
        torch.randint(-1000, 1000, (2, 3, 4)).float().int(),
        torch.randint(-128, 128, (2, 3, 4)).to(torch.int8),
    )
    arguments = [acc, torch.rand(3).requires_grad_(), residual, torch.rand(3).requires_grad_(), torch.rand(3)]
    before = [a.detach().clone() for a in arguments]

    def run() -> Tensor:
        acc, m, residual, ratio, bound = arguments
        return ref.epilogue(
            acc, m, residual=residual, residual_ratio=ratio, activation="relu6", bound=bound, dtype=torch.float32
        )

    first = run()
    assert not first.requires_grad
    torch.set_default_dtype(torch.float64)
    try:
        assert differing(run(), first) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    assert [differing(a.detach(), b) for a, b in zip(arguments, before, strict=True)] == [0] * 5


def test_epilogue_names_what_is_missing() -> None:
    acc, m = torch.zeros(1, 3, 2, dtype=torch.int32), torch.tensor(0.1)
    with pytest.raises(ValueError, match="activation 'gelu'"):
        ref.epilogue(acc, m, activation="gelu", dtype=torch.int8)
    with pytest.raises(ValueError, match="relu6 needs bound"):
        ref.epilogue(acc, m, activation="relu6", dtype=torch.int8)
    with pytest.raises(ValueError, match="a residual needs residual_ratio"):
        ref.epilogue(acc, m, residual=acc.to(torch.int8), dtype=torch.int8)
    with pytest.raises(ValueError, match="m has 2 values"):
        ref.epilogue(acc, torch.ones(2), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        ref.epilogue(acc, m, dtype=torch.float16)


def test_quantize_takes_tensors_that_require_grad() -> None:
    x, scale = torch.randn(4, 3, requires_grad=True), torch.rand(3).add(0.1).requires_grad_()
    expected = ref.quantize(x.detach(), scale.detach(), torch.int8, 1)
    assert differing(ref.quantize(x, scale, torch.int8, 1), expected) == 0
