"""Methods that make int8 lose less: the float function stays, the error falls, and what runs is still what QAT evaluates to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.quantization import calibrate, convert_fx, prepare_qat_fx
from horizon_plugin_pytorch.quantization.improve import (
    add_headroom,
    correct_bias,
    equalize,
    lockstep,
    matrices,
    reconstruct,
    reconstruction,
    reestimate_bn,
)

CLASSES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class Residual(nn.Module):
    """Expand, depthwise, project, twice with a residual; pooled into a linear layer. Channels have very different ranges."""

    def __init__(self, activation: str = "relu", uneven: float = 1.5) -> None:
        super().__init__()
        act = CLASSES[activation]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), act())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), act())
        self.project = nn.Conv2d(8, 8, 1)
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), act())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), act())
        self.back = nn.Conv2d(16, 8, 1, bias=False)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), act())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for block in (self.stem, self.depthwise, self.inner, self.up):
                conv = block[0]
                factor = torch.exp(uneven * torch.randn(conv.out_channels, generator=generator))
                shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
                conv.weight.mul_(factor.view(shape))
                conv.bias.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.depthwise(self.stem(x)))
        x = self.back(self.inner(self.expand(x))) + x
        return self.head(torch.flatten(self.pool(self.up(x)), 1))


def images(count: int = 4, size: int = 24) -> Tensor:
    """Smooth, as photos are: neighbouring pixels are alike."""
    noise = torch.randn(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(2))
    return nn.functional.interpolate(noise, size=(size, size), mode="bilinear")


def prepared(model: nn.Module, x: Tensor) -> nn.Module:
    return prepare_qat_fx(model.eval(), example_inputs=x)


def groups(model: nn.Module) -> dict[str, QATGroup]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QATGroup)}


def noise(exact: Tensor, other: Tensor) -> float:
    return float((exact - other).square().sum() / exact.square().sum())


# -- matrices ------------------------------------------------------------------------------------------------------------

ANCHORS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv2d(4, 6, 3, 2, 1, 2, groups=2, bias=False), (2, 4, 9, 11)),
    (lambda: nn.Conv1d(4, 8, 3, padding="same", groups=4, bias=False), (2, 4, 9)),
    (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), padding_mode="replicate", bias=False), (2, 2, 4, 5, 6)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2, bias=False), (2, 4, 5, 6)),
    (lambda: nn.ConvTranspose1d(3, 4, 4, 3, padding=5, bias=False), (2, 3, 9)),
    (lambda: nn.ConvTranspose3d(2, 4, 2, 2, groups=2, bias=False), (1, 2, 3, 4, 2)),
    (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
]


@pytest.mark.parametrize("case", range(len(ANCHORS)))
def test_an_anchor_is_a_matrix_product(case: int) -> None:
    make, shape = ANCHORS[case]
    anchor, x = make(), torch.randn(shape)
    [group] = groups(prepared(nn.Sequential(anchor), x)).values()
    y = anchor(x).detach()
    chosen = torch.randperm(matrices.positions(group, y))[:7]
    weight = matrices.weight_matrix(group)
    product = weight @ matrices.columns(group, x, y.shape, chosen).double()
    torch.testing.assert_close(product.float(), matrices.at_positions(group, y, chosen), rtol=1e-5, atol=1e-5)
    assert torch.equal(matrices.from_matrix(group, weight).float(), anchor.weight)


# -- rounding ------------------------------------------------------------------------------------------------------------


def random_problem(groups: int = 2, rows: int = 5, size: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(groups, rows, size, dtype=torch.float64)
    x = torch.randn(groups, size, 8, dtype=torch.float64) @ torch.randn(groups, 8, 500, dtype=torch.float64)
    x += 0.1 * torch.randn(groups, size, 500, dtype=torch.float64)
    return weight, weight.abs().amax(2, keepdim=True) / 127, x @ x.mT / 500


def test_rounding_by_columns_beats_rounding_to_nearest() -> None:
    weight, scales, second = random_problem()
    q = reconstruction.round_by_columns(weight, scales, second, pinned=True)

    def error(rounded: Tensor) -> float:
        d = rounded * scales - weight
        return float((d @ second @ d.mT).diagonal(dim1=1, dim2=2).sum())

    assert torch.equal(q, q.round()) and float(q.abs().max()) == 127
    assert bool((q.abs().amax(2) == 127).all())
    assert error(q) < 0.5 * error((weight / scales).round())


def test_with_independent_inputs_it_is_rounding_to_nearest() -> None:
    weight, scales, _ = random_problem()
    second = torch.eye(weight.shape[2], dtype=torch.float64).expand(2, -1, -1)
    q = reconstruction.round_by_columns(weight, scales, second, pinned=False)
    assert int((q != (weight / scales).round()).sum()) == 0


def test_a_group_that_only_gets_zeros_is_rounded_to_nearest() -> None:
    weight, scales, second = random_problem()
    q = reconstruction.round_by_columns(weight, scales, torch.zeros_like(second), pinned=True)
    assert int((q != (weight / scales).round()).sum()) == 0


# -- equalize ------------------------------------------------------------------------------------------------------------


def test_equalizing_keeps_the_float_function_and_lowers_the_error() -> None:
    model, x = Residual().eval(), images()
    exact = model(x).detach()
    plain, better = prepared(model, x), prepared(model, x)
    before = copy.deepcopy(better.state_dict())
    done = equalize(better, [x], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(better(x), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
        for q in (plain, better):
            calibrate(q, [x], progress=False)
        assert noise(exact, better(x)) < 0.5 * noise(exact, plain(x))
    assert any(not torch.equal(v, better.state_dict()[k]) for k, v in before.items() if k.endswith("weight"))
    assert all(one.gain >= 0 for one in done) and max(one.gain for one in done) > 3
    # the residual chain is scaled as one, across pooling and flattening up to the linear layer
    chains = [one.tensors for one in done]
    assert any(len(names) == 2 and "project" in names for names in chains), chains
    assert any("pool" in names for names in chains), chains


def test_what_relu6_made_stays_as_it_is() -> None:
    model, x = Residual("relu6").eval(), images()
    q = prepared(model, x)
    before = {name: g.weight.detach().clone() for name, g in groups(q).items()}
    done = equalize(q, [x], progress=False)
    changed = {name for name, g in groups(q).items() if not torch.equal(g.weight, before[name])}
    after_relu6 = {"stem.0", "depthwise.0", "inner.0", "up.0"}
    assert not any(after_relu6 & set(one.tensors) for one in done)
    with torch.no_grad():
        torch.testing.assert_close(q(x), model(x), rtol=1e-4, atol=1e-4)
    assert "stem.0" not in changed


def test_weights_that_several_calls_share_stay_as_they_are() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(self.relu(self.conv(x))))

    model, x = Twice().eval(), images()
    q = prepared(model, x)
    before = [g.weight.detach().clone() for g in groups(q).values()]
    assert equalize(q, [x], progress=False) == []
    calibrate(q, [x], progress=False)
    reconstruct(q, [x], progress=False)
    assert all(torch.equal(g.weight, w) for g, w in zip(groups(q).values(), before, strict=True))


def test_a_scale_that_the_user_gave_is_kept() -> None:
    x = images()
    q = prepared(Residual().eval(), x)
    name, group = next((n, g) for n, g in groups(q).items() if n.startswith("depthwise"))
    group.output_quant.set_qparams(0.25)
    assert not any(name in one.tensors for one in equalize(q, [x], progress=False))
    assert float(group.output_quant.scale) == 0.25


# -- headroom ------------------------------------------------------------------------------------------------------------


def test_headroom_widens_scales_per_channel_only() -> None:
    x = images()
    for activation in CLASSES:
        q = prepared(Residual(activation), x)
        calibrate(q, [x], progress=False)
        quantizers = [m for m in q.modules() if isinstance(m, FakeQuantize)]
        assert {m.axis for m in quantizers} == {None, 1}
        before = [m.scale.clone() for m in quantizers]
        add_headroom(q, 1.5)
        for quantizer, scale in zip(quantizers, before, strict=True):
            expected = scale if quantizer.axis is None else scale * 1.5
            if quantizer.limit is not None:
                expected = expected.clamp(max=quantizer.limit / 255)
            assert torch.equal(quantizer.scale, expected)
    with pytest.raises(QuantizationError, match="at least 1"):
        add_headroom(q, 0.9)


# -- bias correction and reconstruction ----------------------------------------------------------------------------------


def test_bias_correction_takes_the_mean_error_away() -> None:
    model, x = Residual().eval(), images(8)
    exact = model(x).detach()
    q = prepared(model, x)
    calibrate(q, [x], progress=False)
    with torch.no_grad():
        before = (q(x) - exact).mean(0)
        weights = {n: g.weight.detach().clone() for n, g in groups(q).items()}
        correct_bias(q, [x], progress=False)
        after = (q(x) - exact).mean(0)
    assert float(after.abs().max()) < 0.02 * float(before.abs().max())
    assert all(torch.equal(g.weight, weights[n]) for n, g in groups(q).items())


@pytest.mark.parametrize("activation", CLASSES)
def test_reconstruction_lowers_the_error_on_other_data(activation: str) -> None:
    shares = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = Residual(activation).eval()
        x, other = images(24)[:16], images(24)[16:]
        exact = model(other).detach()
        q = prepared(model, x)
        calibrate(q, [x], progress=False)
        with torch.no_grad():
            before = noise(exact, q(other))
            reconstruct(q, [x[:4], x[4:]], progress=False)
            shares.append(noise(exact, q(other)) / before)
    assert max(shares) < 0.8 and sum(shares) < 0.5 * len(shares), shares


def test_rounded_weights_are_the_integers_that_run() -> None:
    x = images()
    q = prepared(Residual(), x)
    calibrate(q, [x], progress=False)
    reconstruct(q, [x], progress=False)
    int8 = convert_fx(q)
    for name, group in groups(q).items():
        layout = group._layout
        scales = reference.weight_scale(group.weight.detach(), *layout)
        integers = reference.quantize_weight(group.weight.detach(), scales, *layout)
        assert int((integers != int8.get_submodule(name).weight).sum()) == 0
        per_channel = scales.view(-1, 1, 1, 1) if group.geometry.dims else scales.view(-1, 1)
        if layout[0] == 0:  # they lie on the grid: rounding changes nothing any more
            torch.testing.assert_close(integers * per_channel, group.weight.detach(), rtol=1e-6, atol=0)


def test_operators_with_too_many_inputs_have_their_bias_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "LARGEST", 8)
    x = images()
    q = prepared(Residual(), x)
    calibrate(q, [x], progress=False)
    before = {n: (g.weight.detach().clone(), g.bias) for n, g in groups(q).items()}
    biases = {n: b.detach().clone() for n, (_, b) in before.items() if b is not None}
    reconstruct(q, [x], progress=False)
    for name, group in groups(q).items():
        large = matrices.weight_matrix(group).shape[2] > 8
        assert torch.equal(group.weight, before[name][0]) == large
        assert name not in biases or not torch.equal(group.bias, biases[name])


# -- the recipe ----------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A forward that cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Residual()
        self.second = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if float(y.sum()) > 1e9:
            return y[:, :4]
        return self.second(y)


@pytest.mark.parametrize("make", [Residual, lambda: Residual("relu6"), Branching])
def test_quantize_improves_and_stays_bit_exact(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x, other = images(24)[:16], images(24)[16:]
    weights = copy.deepcopy(model.state_dict())
    exact = model(other).detach()
    better = horizon.quantize(model, [x], progress=False)
    plain = horizon.quantize(model, [x], progress=False, improve=False)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert noise(exact, better(other)) < noise(exact, plain(other))

    q = prepare_qat_fx(model, example_inputs=x)
    equalize(q, [x], progress=False)
    calibrate(q, [x], progress=False)
    add_headroom(q)
    reconstruct(q, [x], progress=False)
    int8 = convert_fx(q)
    with torch.no_grad():
        assert int((q(other) != int8(other)).sum()) == 0
        assert int((q(other) != better(other)).sum()) == 0
    plain.load_state_dict(better.state_dict())
    with torch.no_grad():
        assert int((plain(other) != better(other)).sum()) == 0


def test_only_as_much_data_as_needed_is_taken() -> None:
    def stream():  # type: ignore[no-untyped-def]
        for _ in range(5):
            yield images(16)
        raise AssertionError("read on")

    assert [t.shape[0] for t in lockstep.take(stream())] == [16, 16]
    assert [t.shape[0] for t in lockstep.take([images(100), images(100)])] == [100]


def test_keyword_arguments_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
            return {"sum": torch.relu(self.a(x) + self.b(y)), "first": x * scale}

    model, item = Two().eval(), {"y": images(), "x": images()}
    int8 = horizon.quantize(model, [item], progress=False)
    with torch.no_grad():
        exact, found = model(**item), int8(**item)
    assert noise(exact["sum"], found["sum"]) < 1e-3 and torch.equal(exact["first"], found["first"])


# -- errors --------------------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[..., object]] = {
    "equalize": equalize,
    "correct_bias": correct_bias,
    "reconstruct": reconstruct,
}


@pytest.mark.parametrize("name", METHODS)
def test_bad_data_is_refused_before_anything_changes(name: str) -> None:
    x = images()
    q = prepared(Residual(), x)
    if name != "equalize":
        calibrate(q, [x], progress=False)
    before = copy.deepcopy(q.state_dict())
    for data, message in (([], "empty"), ([x * float("nan")], "NaN"), (x, "one tensor")):
        with pytest.raises(QuantizationError, match=message):
            METHODS[name](q, data, progress=False)
    assert all(torch.equal(v, q.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_steps_is_checked(name: str) -> None:
    x = images()
    with pytest.raises(QuantizationError, match="prepare_qat_fx first"):
        METHODS[name](Residual(), [x], progress=False)
    q = prepared(Residual(), x)
    if name == "equalize":
        calibrate(q, [x], progress=False)
    with pytest.raises(QuantizationError, match="calibrated already" if name == "equalize" else "has no scale"):
        METHODS[name](q, [x], progress=False)


def test_a_ridge_is_positive() -> None:
    x = images()
    q = prepared(Residual(), x)
    calibrate(q, [x], progress=False)
    with pytest.raises(QuantizationError, match="ridge"):
        reconstruct(q, [x], ridge=0.0, progress=False)


# -- batch norm ----------------------------------------------------------------------------------------------------------


def test_reestimated_statistics_are_the_data_s() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.01))
    model[2].train(False)
    model[1].train()
    modes = [m.training for m in model.modules()]
    x = [images(6)[:3], images(6)[3:]]
    with torch.no_grad():
        values = [model[1](b) for b in x]
    reestimate_bn(model, x, progress=False)
    mean = torch.stack([v.mean((0, 2, 3)) for v in values]).mean(0)
    variance = torch.stack([v.var((0, 2, 3), unbiased=True) for v in values]).mean(0)
    torch.testing.assert_close(model[2].running_mean, mean)
    torch.testing.assert_close(model[2].running_var, variance)
    assert model[2].momentum == 0.01 and [m.training for m in model.modules()] == modes


def test_reestimation_works_in_a_qat_model_that_kept_its_norms() -> None:
    from horizon_plugin_pytorch.qat_mode import QATMode, get_qat_mode, set_qat_mode

    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), images(8)
    before = get_qat_mode()
    set_qat_mode(QATMode.WithBN)
    try:
        q = prepare_qat_fx(model.eval(), example_inputs=x)
    finally:
        set_qat_mode(before)
    calibrate(q, [x], progress=False)
    group = next(g for g in groups(q).values() if g.norm is not None)
    scale = group.output_quant.scale.clone()
    reestimate_bn(q, [x], progress=False)
    values = model[0](x).detach()
    torch.testing.assert_close(group.norm.running_mean, values.mean((0, 2, 3)), rtol=0.05, atol=0.02)
    assert torch.equal(group.output_quant.scale, scale) and not q.training


def test_reestimation_refuses_what_it_cannot_do_and_restores() -> None:
    with pytest.raises(QuantizationError, match="no batch norm"):
        reestimate_bn(nn.Conv2d(3, 4, 1), [images()], progress=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_mean.fill_(3)
    with pytest.raises(QuantizationError, match="NaN"):
        reestimate_bn(model, [images(), images() * float("nan")], progress=False)
    assert bool((model[1].running_mean == 3).all()) and model[1].momentum == 0.1 and not model.training
