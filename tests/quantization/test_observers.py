"""Observers: scales against brute force, what they remember, and that they neither wait for the device nor disagree."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization.observers import OBSERVERS, Observer, criteria, make_observer
from horizon_plugin_pytorch.quantization.observers import histogram as histograms

S8, U8 = (-128, 127), (0, 255)
RANGES = [S8, U8]
KINDS = [(name, axis) for name in OBSERVERS if name != "fixed_scale" for axis in (None, 1) if (name, axis) != ("kl", 1)]
CLIPPING = [kind for kind in KINDS if kind[0] != "min_max"]
every_kind = pytest.mark.parametrize(("name", "axis"), KINDS)
each_range = pytest.mark.parametrize("bounds", RANGES, ids=["s8", "u8"])


def observed(name: str, *batches: Tensor, running: bool = False, **kwargs: object) -> Observer:
    observer = make_observer(name, **kwargs)
    for batch in batches:
        observer.observe(batch, running)
    return observer


def quantized(x: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    s = scale.double()
    return (x.double() / s).round().clamp(*bounds) * s


def squared_error(x: Tensor, scale: Tensor, bounds: tuple[int, int]) -> float:
    return float((x.double() - quantized(x, scale, bounds)).square().mean())


def cosine(x: Tensor, scale: Tensor, bounds: tuple[int, int]) -> float:
    q = quantized(x, scale, bounds)
    return float((x.double() * q).sum() / (x.double().norm() * q.norm()))


def magnitudes(x: Tensor, bounds: tuple[int, int]) -> Tensor:
    return x.double().abs() if bounds[0] else x.double().clamp(min=0)


def samples() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    normal = torch.randn(40_000, generator=g)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "negative side longer": torch.where(normal > 0, normal / 100, 10 * normal),
        "heavy tails": normal / torch.rand(40_000, generator=g).sqrt(),
        "outlier": torch.cat((normal, torch.tensor([300.0]))),
        "two clusters": torch.cat((normal / 10, 20 + normal[:40])),
        "uniform": torch.rand(40_000, generator=g) * 5.7,
        "few": normal[:64],
    }


SAMPLES = samples()
each_sample = pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES.keys())


# -- formulas ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.data(),
    st.sampled_from(RANGES),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_min_max_formula(
    shape: list[int], data: st.DataObject, bounds: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    g = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(shape, generator=g) * 3 - 1).to(dtype) for _ in range(3)]
    laid_out = [b.permute(order).contiguous().permute(np.argsort(order).tolist()) for b in batches]
    scale = observed("min_max", *laid_out, axis=axis).scale(*bounds)
    x = torch.stack(batches).to(torch.float32).numpy().astype(np.float64)
    others = tuple(d for d in range(x.ndim) if axis is None or d != 1 + axis % len(shape))
    largest = np.maximum(np.abs(x).max(others) if bounds[0] else x.max(others), 0)
    overall = largest.max() or 1
    expected = (np.where(largest == 0, overall, largest) / bounds[1]).astype(np.float32)
    assert scale.dtype == torch.float32 and scale.shape == expected.shape
    assert np.count_nonzero(scale.numpy() != expected) == 0


@each_range
@each_sample
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99, 100.0])
def test_percentile_against_sorting(x: Tensor, bounds: tuple[int, int], percent: float) -> None:
    y = magnitudes(x, bounds)
    threshold = float(observed("percentile", x, percentile=percent).scale(*bounds)) * bounds[1]
    lower, higher = (np.percentile(y, percent, method=m) for m in ("lower", "higher"))
    if higher == 0:
        assert threshold == pytest.approx(float(y.max()) or 1)
    else:
        assert lower * (1 - 1 / 64) <= threshold <= higher * (1 + 1 / 64)
    if percent == 100:
        assert np.float32(y.max() / bounds[1]) == np.float32(threshold / bounds[1])


@each_range
@each_sample
def test_mse_is_as_good_as_trying_every_scale(x: Tensor, bounds: tuple[int, int]) -> None:
    largest = magnitudes(x, bounds).max()
    found = squared_error(x, observed("mse", x).scale(*bounds), bounds)
    best = min(squared_error(x, largest * k / 500 / bounds[1], bounds) for k in range(1, 501))
    # A histogram does not tell the few values apart that a scale may hit exactly.
    assert found <= (1.04 if len(x) > 100 else 1.3) * best


@each_range
@each_sample
@pytest.mark.parametrize("share", [1.0, 0.6, 0.05])
def test_integrals_against_sums(x: Tensor, bounds: tuple[int, int], share: float) -> None:
    observer = observed("mse", x, bins=4096)
    largest = observer._largest(bounds[0])
    histogram, threshold = observer.histogram(largest), largest * share
    error = float(criteria.squared_error(histogram, threshold.view(1), *bounds)) / len(x)
    constant = 0 if bounds[0] else float(x.double().clamp(max=0).square().mean())
    true_error = squared_error(x, threshold / bounds[1], bounds) - constant
    # Few values do not fill their bins evenly.
    assert error == pytest.approx(true_error, rel=0.04 if len(x) > 100 else 0.3)
    similar = float(criteria.cosine(histogram, threshold.view(1), *bounds)) / float(x.double().norm())
    assert similar == pytest.approx(cosine(x, threshold / bounds[1], bounds), rel=1e-3)


def relative_entropy(y: np.ndarray, edges: np.ndarray, threshold: float, levels: int) -> float:
    """The criterion from the values themselves."""
    y = np.sort(y[y > 0])
    inside = y[y < threshold]
    if len(inside) < len(y) / 2:
        return np.inf
    edges = edges[(edges * levels >= np.median(y)) & (edges <= threshold)]
    edges = np.concatenate(([0], edges))
    p = np.histogram(y, edges)[0] / len(y)
    p[-1] += 1 - p.sum()
    boundaries = np.linspace(0, threshold, levels + 1)
    q = np.diff(np.interp(edges, boundaries, np.searchsorted(inside, boundaries) / len(inside)))
    return float((p * np.log(np.where(p > 0, p, 1) / np.maximum(q, 1e-12), where=p > 0, out=np.zeros_like(p))).sum())


@each_range
@pytest.mark.parametrize("sample", ["normal", "negative side longer", "heavy tails", "two clusters"])
def test_kl_against_the_values_themselves(sample: str, bounds: tuple[int, int]) -> None:
    x = SAMPLES[sample]
    x = torch.cat((x, x[:20_000] * 1e-4))  # the distribution of tiny values must not matter
    y, levels = magnitudes(x, bounds).numpy(), bounds[1] + 1
    observer = observed("kl", x)
    histogram = observer.histogram(observer._largest(bounds[0]))
    edges = histogram.edges.numpy()
    first = np.searchsorted(edges, y.max())
    ends = [first - 8 * k for k in range(100)]
    counts = histogram.magnitudes(bounds[0] < 0)
    ours = criteria.relative_entropy(counts, histogram.edges, torch.tensor(ends), levels).tolist()
    theirs = [relative_entropy(y, edges, edges[end], levels) for end in ends]
    # A last bin with few values of its own depends on where in it they are.
    filled = [k for k, end in enumerate(ends) if k == 0 or counts[end - 1] > 20]
    assert [ours[k] for k in filled] == pytest.approx([theirs[k] for k in filled], rel=0.1, abs=1e-3)
    assert len(filled) > 20
    assert sample == "negative side longer" or 10 < np.isinf(theirs).sum() < 90
    assert float(observer.scale(*bounds)) * bounds[1] == pytest.approx(edges[ends[np.argmin(ours)]])


@each_range
def test_kl_gives_up_one_outlier_and_min_max_does_not(bounds: tuple[int, int]) -> None:
    x = torch.cat((SAMPLES["normal"], torch.tensor([1e6])))
    thresholds = {name: float(observed(name, x).scale(*bounds)) * bounds[1] for name in ("min_max", "percentile", "kl")}
    assert thresholds["min_max"] == pytest.approx(1e6)
    assert 2 < thresholds["percentile"] < 5
    assert 2 < thresholds["kl"] < 10


@each_range
@each_sample
def test_mix_takes_the_most_similar(x: Tensor, bounds: tuple[int, int]) -> None:
    found = 1 - cosine(x, observed("mix", x).scale(*bounds), bounds)
    others = [1 - cosine(x, observed(n, x).scale(*bounds), bounds) for n in ("min_max", "percentile", "mse", "kl")]
    assert found <= 1.04 * min(others)


@each_range
@pytest.mark.parametrize("name", ["percentile", "mse", "mix"])
def test_a_channel_is_like_a_tensor_of_its_own(name: str, bounds: tuple[int, int]) -> None:
    channels = [x[:64] * 2.0 ** (3 * i) for i, x in enumerate(SAMPLES.values())]
    x = torch.stack(channels, 1).reshape(4, 4, 4, len(channels))
    scales = observed(name, x, axis=-1).scale(*bounds)
    if name == "mix":  # which tries kl besides, without an axis
        return_to_tensor = [observed(name, c.unsqueeze(-1), axis=-1).scale(*bounds).squeeze() for c in channels]
    else:
        return_to_tensor = [observed(name, c).scale(*bounds) for c in channels]
    for channel, scale, own in zip(channels, scales, return_to_tensor, strict=True):
        if magnitudes(channel, bounds).max() > 0:
            # An own histogram has its own window, not finer bins.
            assert float(scale) == pytest.approx(float(own), rel=1e-6)


# -- histograms -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-140, 127), min_size=1, max_size=4), st.sampled_from([None, 0]), st.integers(0, 2**31))
def test_growing_loses_nothing(exponents: list[int], axis: int | None, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randn(3, 50, generator=g).clamp(-1, 1) * 2.0**e for e in exponents]
    observer = observed("mse", *batches, axis=axis, bins=64)
    together = observed("mse", torch.cat(batches, 1), axis=axis, bins=64)
    assert torch.equal(observer.top, together.top)
    assert torch.equal(observer.counts, together.counts)
    assert (observer.counts.sum((-2, -1)) == 150 * len(batches) // (1 if axis is None else 3)).all()


@given(st.integers(-149, 127), st.sampled_from([32, 512, 2048]), st.integers(0, 2**31))
def test_every_value_is_in_its_bin(exponent: int, bins: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=g).clamp(-1, 1) * 2.0 ** (exponent - 20 * torch.rand(200, generator=g))
    observer = observed("mse", x, bins=bins)
    edges = histograms.window_edges(observer.top, bins)
    assert (edges.diff() >= 0).all()
    for sign, counts in zip((~x.signbit(), x.signbit()), observer.counts, strict=True):
        place = torch.searchsorted(edges, x[sign].double().abs(), right=True) - 1
        expected = torch.bincount(place.clamp(0, bins - 1), minlength=bins)
        # Below float32's least normal number several edges may be the same.
        expected_edges, found_edges = (edges[c.nonzero().flatten()] for c in (expected, counts))
        assert torch.equal(expected_edges, found_edges)
        assert torch.equal(expected[expected > 0].double(), counts[counts > 0])


@pytest.mark.parametrize("axis", [None, 1])
def test_a_training_step_samples_evenly(axis: int | None) -> None:
    shape = (8, 32, 64, 64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    for dim, size in enumerate(shape):
        taken, taken_axis = histograms.sample(grid[dim], axis)
        assert taken.numel() == histograms.SAMPLE
        share = torch.bincount(taken.flatten().long(), minlength=size) / taken.numel()
        assert share.min() > 0.8 / size and share.max() < 1.25 / size
        if axis is not None and dim == axis:
            assert taken_axis == 0
            assert torch.equal(taken, torch.arange(32.0).unsqueeze(1).expand_as(taken))


@pytest.mark.parametrize(("name", "axis"), CLIPPING)
def test_training_on_a_sample_is_near_the_whole(name: str, axis: int | None) -> None:
    batches = [torch.randn(16, 8, 64, 64) for _ in range(20)]
    whole = observed(name, *batches, axis=axis).scale(*S8)
    moving = observed(name, *batches, running=True, axis=axis, averaging_constant=0.1).scale(*S8)
    assert (moving / whole).sub(1).abs().max() < 0.25


# -- special values ---------------------------------------------------------------------------------------------------


@each_range
@every_kind
def test_zero_tensor(name: str, axis: int | None, bounds: tuple[int, int]) -> None:
    scale = observed(name, torch.zeros(2, 3, 4), axis=axis).scale(*bounds)
    assert scale.shape == (() if axis is None else (3,))
    assert (scale == torch.tensor(1 / bounds[1])).all()


@each_range
@pytest.mark.parametrize("name", [name for name, axis in KINDS if axis])
def test_dead_and_tiny_channels(name: str, bounds: tuple[int, int]) -> None:
    x = torch.rand(64, 4)
    x[0] = 1
    x = x * torch.tensor([8.0, 0.0, 1e-30, 2e-3])
    scale = observed(name, x, axis=1).scale(*bounds).double() * bounds[1]
    assert float(scale[1]) == pytest.approx(8)
    assert float(scale[2]) == pytest.approx(8 * 2**-24)
    assert 1e-3 < float(scale[3]) <= 2.001e-3


@each_range
@every_kind
def test_tiny_tensor(name: str, axis: int | None, bounds: tuple[int, int]) -> None:
    scale = observed(name, torch.full((2, 3, 4), 1e-42), axis=axis).scale(*bounds)
    assert (scale == 2.0**-64).all()


@each_range
@every_kind
@pytest.mark.parametrize("value", [1.0, 3.0, 6.0, 1e-5, 3e38])
def test_constant_tensor(name: str, axis: int | None, bounds: tuple[int, int], value: float) -> None:
    scale = observed(name, torch.full((16, 3, 4), value), axis=axis).scale(*bounds)
    assert (scale.double() * bounds[1] / value - 1).abs().max() < 1e-4


@every_kind
def test_negative_only(name: str, axis: int | None) -> None:
    x = -torch.rand(20, 3, 4) - 1
    observer = observed(name, x, axis=axis)
    assert (observer.scale(*U8) == torch.tensor(1 / 255)).all()
    assert (observer.scale(*S8) > 0.9 / 128).all() and (observer.scale(*S8) <= 2 / 127).all()


def test_int8_has_a_level_more_below_zero() -> None:
    x = torch.linspace(-140, 126, 200_001, dtype=torch.float64)
    observer = observed("mse", x, bins=4096)
    histogram, threshold = observer.histogram(observer._largest(-128)), torch.tensor([127.0], dtype=torch.float64)
    errors = []
    for bounds in (S8, (-127, 127)):
        errors.append(float(criteria.squared_error(histogram, threshold, *bounds)) / len(x))
        assert errors[-1] == pytest.approx(squared_error(x, torch.tensor(1.0), bounds), rel=1e-3)
    assert errors[0] < 0.9 * errors[1]


@each_range
def test_mostly_zero_is_not_clipped_away(bounds: tuple[int, int]) -> None:
    x = torch.zeros(100_000)
    x[0] = 5
    assert float(observed("percentile", x).scale(*bounds)) == pytest.approx(5 / bounds[1])


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_nan_and_infinity_are_remembered(name: str, axis: int | None, bad: float, running: bool, first: bool) -> None:
    clean, spoilt = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    spoilt[1, 2, 3] = bad
    batches = [spoilt, clean, clean] if first else [clean, spoilt, clean]
    observer = observed(name, *batches, running=running, axis=axis)
    with pytest.raises(ValueError, match=r"backbone\.conv1: NaN or infinite") as error:
        observer.check("backbone.conv1")
    assert axis is None or "channels [2];" in str(error.value)
    assert not torch.isfinite(observer.scale(*S8)).any()
    observer.reset()
    observer.observe(clean, running)
    observer.check("backbone.conv1")


def test_fixed_scale() -> None:
    x = torch.randn(2, 3, 4, 4)
    camera = make_observer("fixed_scale", scale=1 / 128)
    assert not camera.empty
    camera.observe(x, running=False)
    assert torch.equal(camera.scale(*S8), torch.tensor(1 / 128))
    camera.observe(x / 0, running=False)
    with pytest.raises(ValueError, match="input"):
        camera.check("input")
    spread = make_observer("fixed_scale", scale=0.5, axis=1)
    assert spread.empty
    spread.observe(x, running=True)
    assert torch.equal(spread.scale(*S8), torch.full((3,), 0.5))
    own = observed("fixed_scale", x, scale=[0.1, 0.2, 0.3], axis=1)
    assert torch.equal(own.scale(*S8), torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(QuantizationError, match="3 scales for a tensor"):
        make_observer("fixed_scale", scale=[0.1, 0.2, 0.3], axis=1).observe(torch.randn(2, 4), running=False)


# -- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("c", [0.0, 0.01, 0.3, 0.7, 1.0])
def test_moving_average_of_the_extremes(axis: int | None, c: float) -> None:
    batches = [torch.randn(4, 3, 5) * k for k in (1, 5, 0.5, 2)]
    observer = observed("min_max", *batches, running=True, axis=axis, averaging_constant=c)
    dims = (0, 1, 2) if axis is None else (0, 2)
    for state, extreme in ((observer.low, torch.amin), (observer.high, torch.amax)):
        expected = extreme(batches[0], dims).double()
        for batch in batches[1:]:
            expected = expected + c * (extreme(batch, dims).double() - expected)
        torch.testing.assert_close(state.double(), expected, rtol=1e-6, atol=0)
        if c in (0, 1):
            assert torch.equal(state, extreme(batches[-int(c)], dims))


@pytest.mark.parametrize("axis", [None, 1])
def test_moving_average_of_the_histogram(axis: int | None) -> None:
    batches = [torch.randn(4, 3, 5), 9 * torch.randn(2, 3, 5)]
    observer = observed("percentile", *batches, running=True, axis=axis, averaging_constant=0.25)
    first, second = (histograms.count(b, axis, observer.top, 2048) for b in batches)
    torch.testing.assert_close(observer.counts, 0.75 * first + 0.25 * 2 * second, rtol=1e-12, atol=0)


@every_kind
def test_a_constant_of_zero_freezes(name: str, axis: int | None) -> None:
    observer = observed(name, torch.randn(4, 3, 5), axis=axis, averaging_constant=0)
    before = copy.deepcopy(observer.state_dict())
    observer.observe(torch.full((4, 3, 5), torch.inf), running=True)
    assert all(torch.equal(value, before[key]) for key, value in observer.state_dict().items())


def test_zeros_at_first_are_overcome_in_training() -> None:
    # A branch that starts at zero wakes up: what it was must not stick.
    for name, axis in KINDS:
        observer = observed(name, torch.zeros(4, 3, 50), *[torch.randn(4, 3, 50)] * 50, running=True, axis=axis)
        assert (observer.scale(*S8) * 127 > 0.5).all(), name


# -- tensors of every kind --------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("running", [False, True])
def test_memory_formats_agree(name: str, axis: int | None, running: bool) -> None:
    x = torch.randn(4, 24, 40, 40)
    before = x.clone()
    forms = [x, x.to(memory_format=torch.channels_last), torch.stack((x, x), -1)[..., 1], x.mT.contiguous().mT]
    results = [observed(name, form, form, running=running, axis=axis) for form in forms]
    for result in results[1:]:
        for key, value in result.state_dict().items():
            assert torch.equal(value, results[0].state_dict()[key]), key
    assert torch.equal(x, before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name: str, axis: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5).to(dtype)
    narrow, single = (observed(name, y, axis=axis).scale(*S8) for y in (x, x.float()))
    assert narrow.dtype == torch.float32 and torch.equal(narrow, single)


@every_kind
def test_empty_batches_and_no_batches(name: str, axis: int | None) -> None:
    observer = observed(name, torch.randn(0, 3, 5), axis=axis)
    assert observer.empty
    observer.check("anything")
    with pytest.raises(QuantizationError, match="nothing was observed; calibrate first"):
        observer.scale(*S8)
    assert not observed(name, torch.randn(2, 3, 5), axis=axis).empty


# -- state ------------------------------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(name: str, axis: int | None, assign: bool) -> None:
    x = torch.randn(4, 3, 5)
    model = torch.nn.ModuleDict({"a": observed(name, x, axis=axis), "b": make_observer(name, axis=axis)})
    fresh = torch.nn.ModuleDict({"a": make_observer(name, axis=axis), "b": observed(name, x, axis=axis)})
    fresh.load_state_dict(saved_and_loaded(model.state_dict()), assign=assign)
    assert not fresh["a"].empty and fresh["b"].empty
    for observer in (model["a"], fresh["a"]):
        observer.observe(2 * x, running=True)
    assert torch.equal(fresh["a"].scale(*S8), model["a"].scale(*S8))


def test_state_of_another_observer_is_refused() -> None:
    x = torch.randn(4, 3, 5)
    with pytest.raises(RuntimeError, match="size mismatch for low"):
        make_observer("min_max", axis=1).load_state_dict(observed("min_max", x).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for counts"):
        make_observer("mse", bins=512).load_state_dict(observed("mse", x, bins=1024).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        make_observer("mse").load_state_dict(observed("min_max", x).state_dict())


@every_kind
def test_copies_are_independent_and_keep_their_dtype(name: str, axis: int | None) -> None:
    x = torch.randn(4, 3, 5)
    observer = observed(name, x, axis=axis)
    expected = observer.scale(*S8)
    for copied in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        copied.half().bfloat16().double()
        assert [b.dtype for b in copied.buffers()] == [b.dtype for b in observer.buffers()]
        assert torch.equal(copied.scale(*S8), expected)
        copied.observe(100 * x, running=False)
        assert torch.equal(observer.scale(*S8), expected) and not torch.equal(copied.scale(*S8), expected)
    assert observer.to("meta").scale(*S8).is_meta


@every_kind
def test_calibration_in_inference_mode_then_training(name: str, axis: int | None) -> None:
    observer = make_observer(name, axis=axis)
    with torch.inference_mode():
        observer.observe(torch.randn(4, 3, 5), running=False)
        observer.observe(torch.randn(4, 3, 5), running=False)
    weight = torch.ones((), requires_grad=True)
    y = weight * torch.randn(4, 3, 5)
    observer.observe(y, running=True)
    assert not observer.scale(*S8).requires_grad
    (y.sum() * observer.scale(*S8).sum()).backward()
    assert torch.isfinite(weight.grad)


# -- devices ----------------------------------------------------------------------------------------------------------


@every_kind
def test_nothing_depends_on_the_data(name: str, axis: int | None) -> None:
    """Fake and meta tensors have no data: reading any of it on the host raises."""
    with FakeTensorMode():
        fake = observed(name, torch.randn(8, 16, 32, 32), axis=axis)
        for running in (False, True, True):
            fake.observe(torch.randn(8, 16, 32, 32), running)
        shapes = [fake.scale(*bounds).shape for bounds in RANGES]
    assert shapes == [() if axis is None else (16,)] * 2
    with torch.device("meta"):
        meta = observed(name, torch.randn(8, 16, 32, 32), torch.randn(8, 16, 32, 32), axis=axis)
        meta.observe(torch.randn(8, 16, 32, 32), running=True)
        assert meta.scale(*S8).is_meta


@pytest.mark.parametrize(("name", "axis"), [("min_max", None), ("min_max", 1), ("mix", None)])
def test_compiles_without_a_graph_break(name: str, axis: int | None) -> None:
    torch._dynamo.reset()

    def step(observer: Observer, x: Tensor, running: bool) -> Tensor:
        observer.observe(x, running)
        return observer.scale(*S8)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    ours, theirs = make_observer(name, axis=axis), make_observer(name, axis=axis)
    for k, running in enumerate((True, False, True)):
        x = torch.randn(2, 3, 8, 8) * (k + 1)
        assert torch.equal(compiled(ours, x, running), step(theirs, x, running))


@pytest.mark.gpu
@every_kind
def test_never_waits_for_the_gpu(name: str, axis: int | None) -> None:
    batches = [torch.randn(8, 16, 64, 64) * k for k in (1, 100, 3)]
    on_gpu = [b.cuda() for b in batches]
    torch.cuda.set_sync_debug_mode("error")
    torch.use_deterministic_algorithms(True)
    try:
        observer = observed(name, *on_gpu, axis=axis)
        observer.observe(on_gpu[0].to(memory_format=torch.channels_last), running=True)
        scales = [observer.scale(*bounds) for bounds in RANGES]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    expected = observed(name, *batches, axis=axis)
    expected.observe(batches[0], running=True)
    for scale, bounds in zip(scales, RANGES, strict=True):
        torch.testing.assert_close(scale.cpu(), expected.scale(*bounds), rtol=0.03, atol=0)
    for key, value in observer.state_dict().items():
        torch.testing.assert_close(value.cpu(), expected.state_dict()[key], rtol=1e-6, atol=0)


RANK = """
import sys, torch, torch.distributed as dist
from horizon_plugin_pytorch.quantization.observers import make_observer
rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
g = torch.Generator().manual_seed(7)
whole = [torch.randn(8, 3, 6, generator=g) * k for k in (1, 40, 3)]
result = {}
for name, axis in %s:
    observer = make_observer(name, axis=axis)
    alone = make_observer(name, axis=axis, sync=False)
    single = make_observer(name, axis=axis, sync=False)
    for batch, running in zip(whole, (False, False, True)):
        observer.observe(batch.chunk(2)[rank], running)
        alone.observe(batch.chunk(2)[rank], running)
        single.observe(batch, running)
    empty = make_observer(name, axis=axis)
    empty.observe(whole[0][:0] if rank else whole[0], False)
    bad = make_observer(name, axis=axis)
    bad.observe(whole[0] * torch.nan if rank else whole[0], False)
    try:
        bad.check("m")
        refused = False
    except ValueError:
        refused = True
    result[name, axis] = dict(observer.state_dict()), alone.low, dict(single.state_dict()), empty.low, refused
torch.save(result, f"{path}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK % KINDS]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for kind in KINDS:
        states, alone, single, empty, refused = zip(first[kind], second[kind], strict=True)
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), (kind, key)
            # … and with what one process sees that has all the data.
            torch.testing.assert_close(value, single[0][key], rtol=1e-6, atol=0)
        assert not torch.equal(*alone)
        assert torch.equal(*empty) and torch.isfinite(empty[0]).all()
        assert refused == (True, True)


# -- names and arguments ----------------------------------------------------------------------------------------------


def test_registry() -> None:
    assert list(OBSERVERS) == ["min_max", "percentile", "mse", "kl", "mix", "fixed_scale"]
    for name, kind in OBSERVERS.items():
        arguments = {"scale": 0.1} if name == "fixed_scale" else {}
        assert type(make_observer(name, **arguments)) is kind is type(make_observer(kind, **arguments))
    with pytest.raises(QuantizationError, match="'minmax' is no observer: use one of min_max, percentile, mse, kl"):
        make_observer("minmax")
    with pytest.raises(QuantizationError, match="is no observer"):
        make_observer(torch.nn.Identity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("min_max", {"averaging_constant": 1.5}, "averaging_constant is 1.5; it must be in"),
        ("min_max", {"bins": 512}, "MinMaxObserver: .*bins"),
        ("percentile", {"percentile": 0}, "percentile is 0; it must be in"),
        ("percentile", {"bins": 1000}, "bins is 1000; it must be a power of two"),
        ("mse", {"bins": 16}, "bins is 16; it must be a power of two"),
        ("kl", {"axis": 1}, "KLObserver has one scale per tensor only"),
        ("fixed_scale", {"scale": 0}, "must be positive"),
        ("fixed_scale", {"scale": float("nan")}, "must be positive"),
        ("fixed_scale", {"scale": 1e-40}, "must be positive"),
        ("fixed_scale", {"scale": [0.1, 0.2]}, "do not fit axis=None"),
        ("fixed_scale", {}, "FixedScaleObserver: .*scale"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        make_observer(name, **arguments)


def test_shapes_that_do_not_fit_are_refused() -> None:
    observer = observed("mse", torch.randn(2, 3), axis=1)
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(QuantizationError, match="4 channels in a tensor of shape \\(2, 4\\), 3 before"):
        observer.observe(torch.randn(2, 4), running=False)
    with pytest.raises(QuantizationError, match="no dimension 1"):
        observer.observe(torch.randn(3), running=False)
    assert all(torch.equal(value, before[key]) for key, value in observer.state_dict().items())
