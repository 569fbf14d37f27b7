"""Gradients of every fused group in training, against the same computation in plain PyTorch and float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.fusion.patterns import ANCHORS, RELU, RELU6, Activation, Anchor, Pattern
from horizon_plugin_pytorch.nn.qat import QATGroup, qat_group_class
from horizon_plugin_pytorch.nn.qat.autograd import RoundActivation
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, FakeQuantState
from horizon_plugin_pytorch.nn.qat.weight import WeightFakeQuantize
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.quantization.observers import FixedScaleObserver, MinMaxObserver

NORMS = ("absorbed", "batch statistics", "running statistics")


def make_anchor(row: Anchor, groups: int = 1) -> nn.Module:
    if row.child == "linear":
        return nn.Linear(6, 8)
    return row.type(6, 12 if groups > 1 else 8, 3, stride=2, padding=1, groups=groups)  # type: ignore[call-arg]


def make_group(
    row: Anchor, norm: str, add: bool, activation: Activation | None, *, learned: bool = False, groups: int = 1,
    weight_observer: Any = None, high_precision: bool = False,
) -> QATGroup:  # fmt: skip
    """A group in training mode, with a gamma that is zero and negative in places."""
    anchor = make_anchor(row, groups)
    parts = [anchor]
    if norm != "absorbed":
        bn = row.norm(row.out_channels(anchor), eps=1e-3)  # type: ignore[call-arg]
        with torch.no_grad():
            bn.weight.copy_(torch.randn_like(bn.weight))
            bn.weight[1] = 0
            bn.bias.normal_()
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
        parts.append(bn.train(norm == "batch statistics"))
    if activation is not None:
        parts.append(activation.make())
    group = qat_group_class(Pattern(row, norm != "absorbed", add, activation))(*parts)
    quant = None if high_precision else FakeQuantize(MinMaxObserver, learned=learned)
    group.set_up(WeightFakeQuantize(weight_observer, learned), quant, "group")
    for module in (group, group.output_quant):
        if module is not None:
            module.state = FakeQuantState.QAT
    if learned and quant is not None:
        # Some values are clipped, either by the integers' range or, below it, by ReLU6's bound.
        quant.store(torch.tensor(0.05 if activation is RELU6 else 0.012))
    return group


def integers(shape: tuple[int, ...], scale: Tensor, dtype8: torch.dtype) -> QTensor:
    info = torch.iinfo(dtype8)
    payload = torch.randint(info.min, info.max + 1, shape).float().requires_grad_()
    q = QTensor.make(payload, scale, dtype8)
    q.leaf = payload  # type: ignore[attr-defined]
    return q


def round_through(z: Tensor, lo: int, hi: int) -> Tensor:
    """``clamp(round(z), lo, hi)``, whose gradient is 1 where `round(z)` is in the range."""
    r = z.round().detach()
    passes = (r >= lo) & (r <= hi)
    return r.clamp(lo, hi) + passes * (z - z.detach())


def plain(
    group: QATGroup, x: Tensor, s_x: Tensor, other: Tensor | None, s_r: Tensor | None, s_w: Tensor, s_y: Tensor | None
) -> Tensor:
    """The group's value from dequantized tensors; every argument float64, differentiable by all of them."""
    row, anchor = group.pattern.anchor, group.anchor
    weight = anchor.weight
    shape = [-1 if d == (1 if row.transposed else 0) else 1 for d in range(weight.dim())]
    groups = row.groups(anchor)
    if row.transposed:
        shaped = s_w.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)
        shaped = shaped.reshape(*shaped.shape, *shape[2:])
    else:
        shaped = s_w.view(shape)
    w = round_through(weight / shaped, -127, 127) * shaped
    along = [1] * x.dim()
    if s_x.dim():
        along[1] = -1
    y = torch.func.functional_call(anchor, {"weight": w}, (x * s_x.view(along),))
    y = y if group.norm is None else group.norm(y)
    if other is not None:
        y = y + other * s_r
    y = y if group.activation is None else group.activation(y)
    if s_y is None:
        return y
    assert group.output_quant is not None
    return round_through(y / s_y, *group.output_quant.bounds) * s_y


def assert_close(actual: Tensor, expected: Tensor, what: str, atol: float = 1e-7) -> None:
    error = (actual.double() - expected).abs().max()
    assert error <= 1e-3 * expected.abs().max() + atol, f"{what}: {error} of {expected.abs().max()}"


def check(
    group: QATGroup, per_channel_input: bool = False, input_dtype: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """Compare output and every gradient; returns the plain gradients."""
    row = group.pattern.anchor
    spatial = (7,) * group.geometry.dims if group.geometry.dims < 3 else (5, 4, 5)
    s_x = torch.rand(6) * 0.02 + 0.005 if per_channel_input else torch.tensor(0.013)
    x = integers((5, 6, *spatial), s_x, input_dtype)
    double = copy.deepcopy(group).double()
    with torch.no_grad():
        shape = copy.deepcopy(group.anchor)(x.leaf).shape  # type: ignore[attr-defined]
    other = integers(tuple(shape), torch.tensor(0.007), torch.int8) if group.pattern.add else None

    y = group(x, *([] if other is None else [other]))
    gradient = torch.randn(y.shape)
    (y.dequantize() if isinstance(y, QTensor) else y).backward(gradient)

    quant, weight_quant = group.output_quant, group.weight_quant
    s_w = weight_quant.scales(group.weight, *group._layout).double().requires_grad_()
    s_y = None if quant is None else y.scale.double().requires_grad_()  # type: ignore[attr-defined]
    leaf = x.leaf.detach().double().requires_grad_()  # type: ignore[attr-defined]
    other_leaf = None if other is None else other.leaf.detach().double().requires_grad_()  # type: ignore[attr-defined]
    expected = plain(double, leaf, s_x.double(), other_leaf, None if other is None else other.scale.double(), s_w, s_y)
    expected.backward(gradient.double())

    value = y.dequantize() if isinstance(y, QTensor) else y
    steps = (value.double() - expected).abs() / (1 if s_y is None else s_y.detach())
    assert (steps > 1e-3).sum() <= (0 if s_y is None else 1)  # a value half way between two integers may fall to either

    compared = {"x": (x.leaf.grad, leaf.grad)}  # type: ignore[attr-defined]
    if other_leaf is not None:
        compared["other"] = (other.leaf.grad, other_leaf.grad)  # type: ignore[union-attr]
    for name, parameter in group.named_parameters():
        if "quant" not in name:
            compared[name] = (parameter.grad, double.get_parameter(name).grad)
    if weight_quant.learned:
        factor = (group.weight.numel() / s_w.numel() * 127) ** -0.5
        compared["weight scale"] = (weight_quant.scale.grad, s_w.grad * factor)
    if quant is not None and quant.learned:
        factor = (y[0].numel() / s_y.numel() * quant.bounds[1]) ** -0.5  # type: ignore[union-attr]
        compared["output scale"] = (quant.scale.grad, s_y.grad * factor)  # type: ignore[union-attr]
    for name, (actual, wanted) in compared.items():
        assert actual is not None and wanted is not None, name
        # The gradient of a bias before a norm is zero, but for the sums' rounding.
        assert_close(actual, wanted, name, 1e-3 if name.endswith(f"{row.child}.bias") else 1e-7)
    if row.norm is not None and group.norm is not None:
        for name in ("running_mean", "running_var"):
            assert_close(getattr(group.norm, name), getattr(double.norm, name), name)
    return {name: wanted for name, (_, wanted) in compared.items()}


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("activation", [None, RELU, RELU6], ids=["none", "relu", "relu6"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("row", ANCHORS, ids=[a.type.__name__ for a in ANCHORS])
def test_every_pattern(row: Anchor, norm: str, add: bool, activation: Activation | None, learned: bool) -> None:
    if row.child == "linear" and norm == "batch statistics":
        torch.manual_seed(1)
    gradients = check(make_group(row, norm, add, activation, learned=learned))
    assert all(
        g.abs().max() > 0 for name, g in gradients.items() if not (name.endswith("bias") and norm == "batch statistics")
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("row", [a for a in ANCHORS if a.child == "conv"], ids=lambda a: a.type.__name__)
def test_one_input_scale_per_channel(row: Anchor, norm: str) -> None:
    """Depthwise, with two output channels for each input channel."""
    check(make_group(row, norm, True, RELU6, groups=6), per_channel_input=True, input_dtype=torch.int8)


@pytest.mark.parametrize("row", [a for a in ANCHORS if a.child == "conv"], ids=lambda a: a.type.__name__)
def test_grouped(row: Anchor) -> None:
    check(make_group(row, "batch statistics", False, RELU, groups=3, learned=True))


@pytest.mark.parametrize("row", ANCHORS, ids=[a.type.__name__ for a in ANCHORS])
def test_high_precision_output(row: Anchor) -> None:
    check(make_group(row, "batch statistics", True, RELU6, high_precision=True))
    check(make_group(row, "absorbed", False, None, high_precision=True))


def test_weights_that_their_observer_clips_get_no_gradient() -> None:
    group = make_group(ANCHORS[1], "absorbed", False, None, weight_observer=partial(FixedScaleObserver, 0.001))
    check(group)
    clipped = group.weight.abs() > 0.1275
    assert 0 < clipped.sum() < clipped.numel() / 4
    gradient = group.weight.grad
    assert gradient is not None and gradient[clipped].abs().max() == 0 and (gradient[~clipped] == 0).sum() == 0


@pytest.mark.parametrize("norm", NORMS)
def test_a_channel_of_zero_weights_learns(norm: str) -> None:
    group = make_group(ANCHORS[1], norm, False, None)
    with torch.no_grad():
        group.weight[2] = 0
    check(group)
    gradient = group.weight.grad
    assert gradient is not None and gradient[2].abs().mean() > 0.1 * gradient.abs().mean()


def test_double_backward_is_that_of_the_plain_formula() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    s = torch.tensor(0.02)
    q = RoundActivation.apply(x, s, 0, 255, True, 6.0, torch.float32, False)
    (gradient,) = torch.autograd.grad((q * s).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    passes = (x > 0) & (x < min(6.0, 255.5 * 0.02))
    assert torch.allclose(gradient, 3 * (q * s) ** 2 * passes)
    assert torch.allclose(second, 6 * (q * s) * passes)
