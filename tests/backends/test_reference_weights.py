"""The reference's weights: scales, BatchNorm absorbed, biases, against rational arithmetic channel by channel."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horizon_plugin_pytorch.backends import reference as ref

seeds = st.integers(0, 2**32 - 1)


def differing(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype
    return int((a != b).sum())


def channel(w: Tensor, c: int, axis: int, groups: int) -> Tensor:
    """The weights of output channel c, a view."""
    if axis == 0:
        return w[c]
    outputs, inputs = w.shape[1], w.shape[0] // groups
    group = c // outputs
    return w[group * inputs : (group + 1) * inputs, c % outputs]


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    axis, groups, outputs, inputs = (draw(st.integers(*r)) for r in ((0, 1), (1, 3), (1, 3), (1, 3)))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    if not kernel:
        axis, groups = 0, 1
    shape = (groups * inputs, outputs) if axis else (groups * outputs, inputs)
    generator = torch.Generator().manual_seed(draw(seeds))
    channels = groups * outputs
    k = torch.randn(channels, generator=generator, dtype=torch.float64) * 10 ** draw(st.integers(-6, 2))
    for c in range(channels):
        k[c] *= draw(st.sampled_from([1.0, 1.0, 0.0, -1.0, 1e-30, 1e-44]))
    bias = torch.randn(channels, generator=generator, dtype=torch.float64) * 10 ** draw(st.integers(-3, 3))
    bias *= torch.randint(0, 2, (channels,), generator=generator)
    w = torch.randn(*shape, *kernel, generator=generator)
    if draw(st.booleans()):
        channel(w, channels - 1, axis, groups).zero_()
    return {
        "w": w,
        "k": draw(st.sampled_from([k, None])),
        "bias": draw(st.sampled_from([bias, None])),
        "s_x": torch.rand((), generator=generator) * 0.1 + 1e-4,
        "axis": axis,
        "groups": groups,
    }


@given(layer=layers())
def test_a_weight_scale_is_the_largest_weight_over_127(layer: dict[str, Any]) -> None:
    w, where = layer["w"], (layer["axis"], layer["groups"])
    s_w = ref.weight_scale(w, *where)
    w_q = ref.quantize_weight(w, s_w, *where)
    assert s_w.dtype == torch.float32 and w_q.dtype == torch.int8 and w_q.shape == w.shape
    for c in range(len(s_w)):
        one = channel(w, c, *where)
        peak = max(map(abs, one.flatten().tolist()))
        assert s_w[c].item() == max(np.float32(peak / 127), 2.0**-126)
        expected = ref.quantize(one, s_w[c], torch.int8).clamp(-127, 127)
        assert differing(channel(w_q, c, *where), expected) == 0
        assert peak == 0 or channel(w_q, c, *where).abs().max() == 127


def expected_channel(w_q: Tensor, s_w: float, k: Fraction, bias: Fraction, s_x: Fraction) -> tuple[list, float, int]:
    """One channel of `absorb`, in rational numbers but where float64 and float32 are prescribed."""
    wanted = abs(float(k)) * s_w
    exact = float(np.float32(wanted))
    s = max(exact, 2.0**-126)
    if abs(bias) > s_x * Fraction(s) * 2**30:
        s = max(float(np.float32(float(abs(bias) / (s_x * 2**30)))), 2.0**-126)
    ratio = np.float32(1) if s == exact else np.float32(wanted / s)
    sign = (k > 0) - (k < 0)
    weights = [int(np.rint(np.float32(sign * q) * ratio)) for q in w_q.flatten().tolist()]
    # the float64 quotient is what gets rounded
    quotient = float(bias / (s_x * Fraction(s)))
    return weights, s, min(max(round(Fraction(quotient)), -(2**30)), 2**30)


@given(layer=layers())
@settings(max_examples=200)
def test_absorb_channel_by_channel(layer: dict[str, Any]) -> None:
    where = (layer["axis"], layer["groups"])
    s_w = ref.weight_scale(layer["w"], *where)
    w_q = ref.quantize_weight(layer["w"], s_w, *where)
    weight, scale, bias_q = ref.absorb(w_q, s_w, layer["k"], layer["bias"], layer["s_x"], *where)
    assert (weight.dtype, scale.dtype, bias_q.dtype) == (torch.int8, torch.float32, torch.int32)
    for c in range(len(s_w)):
        k = Fraction(1) if layer["k"] is None else Fraction(layer["k"][c].item())
        bias = Fraction(0) if layer["bias"] is None else Fraction(layer["bias"][c].item())
        one = channel(w_q, c, *where)
        weights, s, b = expected_channel(one, s_w[c].item(), k, bias, Fraction(layer["s_x"].item()))
        assert (channel(weight, c, *where).flatten().tolist(), scale[c].item(), bias_q[c].item()) == (weights, s, b)
    together = ref.weight_qparams(layer["w"], layer["k"], layer["bias"], layer["s_x"], *where)
    assert [differing(a, b) for a, b in zip(together, (weight, scale, bias_q), strict=True)] == [0, 0, 0]


@given(layer=layers())
def test_what_absorb_returns_stands_for_the_scaled_layer(layer: dict[str, Any]) -> None:
    where = (layer["axis"], layer["groups"])
    weight, scale, bias_q = ref.weight_qparams(layer["w"], layer["k"], layer["bias"], layer["s_x"], *where)
    assert bool((scale > 0).all()) and bool(scale.isfinite().all())
    assert int(bias_q.abs().max()) <= 2**30
    k = torch.ones(len(scale), dtype=torch.float64) if layer["k"] is None else layer["k"]
    for c in range(len(scale)):
        float_weight = channel(layer["w"], c, *where).double() * k[c]
        back = channel(weight, c, *where).double() * scale[c].double()
        # half a step; a step where a nearly dead channel was rounded a second time
        assert bool(((back - float_weight).abs() <= 1.001 * scale[c].double()).all())
        bias = 0.0 if layer["bias"] is None else layer["bias"][c].item()
        step = layer["s_x"].double().item() * scale[c].double().item()
        assert abs(bias_q[c].item() * step - bias) <= 0.5 * step + 1e-7 * abs(bias)


@given(seed=seeds, exponent=st.integers(-8, 8), sign=st.sampled_from([-1, 1]))
def test_scaling_before_and_after_quantizing_is_the_same(seed: int, exponent: int, sign: int) -> None:
    w = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    s_w, k = ref.weight_scale(w), torch.full((4,), sign * 2.0**exponent)
    weight, scale, _ = ref.absorb(ref.quantize_weight(w, s_w), s_w, k, None, torch.tensor(1.0))
    scaled = w * k[0]
    assert differing(scale, ref.weight_scale(scaled)) == 0
    assert differing(weight, ref.quantize_weight(scaled, scale)) == 0


def test_a_channel_with_gamma_zero_is_its_bias() -> None:
    w, s_x, s_y = torch.randn(3, 2, 3, 3), torch.tensor(0.02), torch.tensor(0.05)
    k, bias = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([2.4, 0.3, 0.0])
    weight, scale, bias_q = ref.weight_qparams(w, k, bias, s_x)
    assert not weight[0].any() and not weight[2].any() and weight[1].any()
    assert bias_q.tolist()[0] in range(2**30 - 64, 2**30 + 1) and bias_q[2] == 0
    x = torch.randint(0, 256, (1, 2, 5, 5), dtype=torch.uint8)
    m = ref.group_multipliers(s_x, scale, s_y).m
    y = ref.epilogue(ref.conv(x, weight, bias_q), m, dtype=torch.int8)
    assert bool((y[:, 0] == 48).all()) and bool((y[:, 2] == 0).all())


def test_a_channel_of_zeros_keeps_its_bias() -> None:
    w, s_x = torch.zeros(2, 2, 1, 1), torch.tensor(0.02)
    weight, scale, bias_q = ref.weight_qparams(w, None, torch.tensor([1e-3, 0.0]), s_x)
    assert not weight.any() and bool((scale > 0).all())
    assert bias_q[0].item() * scale[0].item() * s_x.item() == pytest.approx(1e-3, rel=1e-7) and bias_q[1] == 0


def test_a_nearly_dead_channel_quantizes_its_weights_again() -> None:
    w_q = torch.tensor([[127, -127, 64, 1]], dtype=torch.int8)
    s_w, s_x = torch.tensor([1e-3]), torch.tensor(1.0)
    # the bias needs a scale four times as large as the weights have
    bias = torch.tensor([4 * 1e-3 * 2.0**30], dtype=torch.float64)
    weight, scale, bias_q = ref.absorb(w_q, s_w, None, bias, s_x)
    assert weight.tolist() == [[32, -32, 16, 0]]
    assert scale.item() == pytest.approx(4e-3) and 2**30 - 64 <= bias_q.item() <= 2**30


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_with_one_input_scale_per_channel(axis: int, multiplier: int) -> None:
    c_in, channels = 4, 4 * multiplier
    shape = (c_in, multiplier, 3, 3) if axis else (channels, 1, 3, 3)
    w, bias, k = torch.randn(shape), torch.randn(channels), torch.randn(channels)
    s_x = torch.tensor([0.01, 0.5, 0.03, 0.2])
    weight, scale, bias_q = ref.weight_qparams(w, k, bias, s_x, axis, c_in)
    for c in range(channels):
        # the same layer with one scale for all: that of the input channel that output c reads
        one = ref.weight_qparams(w, k, bias, s_x[c // multiplier], axis, c_in)
        assert differing(channel(weight, c, axis, c_in), channel(one[0], c, axis, c_in)) == 0
        assert (scale[c], bias_q[c]) == (one[1][c], one[2][c])
    # and the integers, multiplied out, are the float convolution within rounding
    x_q = torch.randint(-128, 128, (2, c_in, 6, 6)).to(torch.int8)
    acc = ref.conv(x_q, weight, bias_q, groups=c_in, transposed=bool(axis))
    y = ref.epilogue(acc, ref.group_multipliers(s_x, scale).m, dtype=torch.float32)
    conv = torch.nn.functional.conv_transpose2d if axis else torch.nn.functional.conv2d
    x = ref.dequantize(x_q, s_x, 1).double()
    shaped = torch.stack([channel(weight, c, axis, c_in).double() * scale[c].double() for c in range(channels)])
    dequantized = shaped.view(shape) if axis else shaped
    exact = conv(x, dequantized, groups=c_in) + (bias_q.double() * scale * s_x.repeat_interleave(multiplier)).view(
        -1, 1, 1
    )
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_input_scales_per_channel_are_for_depthwise_only() -> None:
    w = torch.randn(4, 2, 3, 3)
    with pytest.raises(ValueError, match="4 input channels in 2 groups"):
        ref.weight_qparams(w, None, None, torch.rand(4), groups=2)
    with pytest.raises(ValueError, match="only a depthwise convolution"):
        ref.weight_qparams(w, None, None, torch.rand(2))


def test_what_is_not_finite_is_named() -> None:
    w, s_x = torch.randn(3, 2), torch.tensor(0.1)
    bad = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(ValueError, match=r"BatchNorm factor is not finite in output channels \[1, 2\]"):
        ref.weight_qparams(w, bad, None, s_x)
    with pytest.raises(ValueError, match=r"bias is not finite in output channels \[1, 2\]"):
        ref.weight_qparams(w, None, bad, s_x)
    with pytest.raises(ValueError, match=r"scale of the weight is not finite in output channels \[0, 1, 2\]"):
        ref.weight_qparams(w, torch.full((3,), 1e45, dtype=torch.float64), None, s_x)
    w[2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight is not finite in output channels \[2\]"):
        ref.weight_scale(w)
    with pytest.raises(ValueError, match="3 output channels, but there are 2 scales"):
        ref.quantize_weight(w, torch.ones(2))
    with pytest.raises(TypeError, match="scale must be float32"):
        ref.quantize_weight(w, torch.ones(3, dtype=torch.float64))


@given(layer=layers(), dtype=st.sampled_from([torch.int8, torch.uint8]))
def test_accumulator_bound(layer: dict[str, Any], dtype: torch.dtype) -> None:
    where = (layer["axis"], layer["groups"])
    weight, scale, bias_q = ref.weight_qparams(layer["w"], layer["k"], layer["bias"], layer["s_x"], *where)
    largest = 128 if dtype == torch.int8 else 255
    sums = [sum(map(abs, channel(weight, c, *where).flatten().tolist())) for c in range(len(scale))]
    expected = max(largest * s + abs(b) for s, b in zip(sums, bias_q.tolist(), strict=True))
    assert ref.accumulator_bound(weight, bias_q, dtype, *where) == expected
    assert ref.accumulator_bound(weight, None, dtype, *where) == largest * max(sums)


def test_accumulator_bound_beyond_int32() -> None:
    w = torch.full((1, 70000), -127, dtype=torch.int8)
    assert ref.accumulator_bound(w, torch.tensor([-5], dtype=torch.int32), torch.uint8) == 255 * 127 * 70000 + 5
