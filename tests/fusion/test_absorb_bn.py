"""The algebra of absorbing a batch norm, against values computed channel by channel; and absorbing what was kept."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from fusion.networks import (
    ANCHORS,
    PHASES,
    anchors,
    assert_unchanged,
    differing,
    make_norm,
    norm_options,
    randomize,
    run_both,
    snapshot,
)
from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion.absorb_bn import (
    absorb_into,
    bn_factor_and_shift,
    norm_tensors,
    scale_output_channels,
)
from horizon_plugin_pytorch.fusion.patterns import anchor_of
from horizon_plugin_pytorch.quantization import absorb_bn, fuse_fx, fuse_modules, fuse_modules_qat


def weight_of_channel(anchor: nn.Module, weight: Tensor, channel: int) -> Tensor:
    """The part of a weight that makes one output channel, by definition of the operator."""
    if not hasattr(anchor, "transposed") or not anchor.transposed:
        return weight[channel]
    per_group_out, per_group_in = anchor.out_channels // anchor.groups, anchor.in_channels // anchor.groups
    group = channel // per_group_out
    return weight[group * per_group_in : (group + 1) * per_group_in, channel % per_group_out]


def ulps(actual: Tensor, exact: float) -> float:
    """How far a value is from an exact one, in units in the last place of its dtype."""
    info = torch.finfo(actual.dtype)
    spacing = max(
        2.0 ** (math.floor(math.log2(abs(exact)) if exact else -1000)) * info.eps, info.smallest_normal * info.eps
    )
    return abs(float(actual) - exact) / spacing


@pytest.mark.parametrize("kind", ANCHORS)
def test_values_channel_by_channel(kind: str) -> None:
    @settings(max_examples=10, phases=PHASES)
    @given(anchors(kind), norm_options, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    def check(drawn: tuple[nn.Module, Tensor], options: dict[str, Any], dtype: torch.dtype) -> None:
        anchor = drawn[0].to(dtype)
        norm = randomize(make_norm("BatchNorm", anchor, options))
        row = anchor_of(anchor)
        assert row is not None
        fused = copy.deepcopy(anchor)
        absorb_into(row, fused, norm_tensors(norm), norm.eps)
        weight, bias = fused.weight.detach(), fused.bias.detach()
        assert weight.shape == anchor.weight.shape and weight.dtype == bias.dtype == dtype
        for c in range(row.out_channels(anchor)):
            gamma = float(norm.weight[c]) if norm.weight is not None else 1.0
            beta = float(norm.bias[c]) if norm.bias is not None else 0.0
            k = gamma / math.sqrt(float(norm.running_var[c]) + norm.eps)
            offset = float(anchor.bias[c]) if anchor.bias is not None else 0.0
            exact = k * (offset - float(norm.running_mean[c])) + beta
            scale = abs(k) * (abs(offset) + abs(float(norm.running_mean[c]))) + abs(beta)
            assert abs(float(bias[c]) - exact) <= torch.finfo(dtype).eps * abs(exact) * 0.5001 + 4e-15 * scale
            before, after = (weight_of_channel(anchor, w, c).flatten() for w in (anchor.weight, weight))
            tolerance = 4.0 if dtype == torch.float64 else 0.5001  # rounded once
            assert all(ulps(a, k * float(b)) <= tolerance for a, b in zip(after, before, strict=True))

    check()


def test_gamma_zero_leaves_the_channel_its_bias() -> None:
    norm = nn.BatchNorm2d(3)
    norm.weight.data.zero_()
    norm.bias.data.copy_(torch.tensor([1.0, -2.0, 3.0]))
    fused = fuse_modules(nn.Sequential(nn.Conv2d(3, 3, 1), norm), ["0", "1"])
    assert int(fused[0].weight.count_nonzero()) == 0
    assert torch.equal(fused[0].bias, norm.bias)


def test_factor_and_shift() -> None:
    norm = randomize(nn.BatchNorm2d(5)).double().eval()
    k, shift = bn_factor_and_shift(norm_tensors(norm), norm.eps)
    assert k.dtype == shift.dtype == torch.float64 and k.shape == shift.shape == (5,)
    x = torch.randn(2, 5, 3, 3).double()
    assert differing(k.reshape(-1, 1, 1) * x + shift.reshape(-1, 1, 1), norm(x)) == 0


def test_scaling_keeps_the_shape_of_a_grouped_transposed_weight() -> None:
    anchor = anchor_of(nn.ConvTranspose2d(4, 6, 3))
    assert anchor is not None
    weight = torch.ones(4, 3, 2, 2)
    scaled = scale_output_channels(weight, torch.arange(6.0), anchor, groups=2)
    assert scaled.shape == weight.shape
    assert scaled[:2, :, 0, 0].tolist() == [[0, 1, 2]] * 2 and scaled[2:, :, 0, 0].tolist() == [[3, 4, 5]] * 2


# -- absorb_bn: what was kept -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b, self.bn_b, self.relu = nn.ConvTranspose2d(3, 3, 1, groups=3), nn.SyncBatchNorm(3), nn.ReLU()
        self.c, self.bn_c, self.ff = (
            nn.Conv2d(3, 3, 1, bias=False),
            nn.BatchNorm2d(3),
            horizon.nn.quantized.FloatFunctional(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn_b(self.b(self.bn_a(self.a(x)))))
        return self.ff.add(y, self.bn_c(self.c(y)))


GROUPS = [["a", "bn_a"], ["b", "bn_b", "relu"], ["c", "bn_c", "ff"]]
X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("fuse", [lambda m: fuse_modules_qat(m, GROUPS), lambda m: fuse_fx(m, is_qat=True)])
@pytest.mark.parametrize("training", [False, True])
def test_absorb_bn_finishes_in_place(fuse: Any, training: bool) -> None:
    model = randomize(Net()).train(training)
    fused = fuse(model)
    assert absorb_bn(fused) is fused
    assert not any("BatchNorm" in type(m).__name__ for m in fused.modules())
    assert type(fused.a) is nn.Conv2d and type(fused.b) is horizon.nn.intrinsic.ConvTransposeReLU2d
    assert type(fused.ff) is horizon.nn.intrinsic.ConvAdd2d
    assert all(m.training is training for m in fused.modules())
    assert run_both(fused.eval(), model.eval(), X) == 0
    before = snapshot(fused)
    assert absorb_bn(fused) is fused
    assert_unchanged(fused, before)


def test_absorbed_later_is_absorbed_at_once() -> None:
    model = randomize(Net())
    later, at_once = absorb_bn(fuse_modules_qat(model, GROUPS)), fuse_modules(model, GROUPS)
    assert later.state_dict().keys() == at_once.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(later.state_dict().values(), at_once.state_dict().values(), strict=True)
    )


def test_a_group_that_is_the_model_itself() -> None:
    conv, bn = nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3)).eval()
    expected = bn(conv(X))
    group = horizon.nn.intrinsic.ConvBN2d(conv, bn).eval()
    assert differing(group(X), expected, tolerance=0.0) == 0
    anchor = absorb_bn(group)
    assert anchor is conv and differing(anchor(X), expected) == 0

    conv, bn, relu = nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3)).eval(), nn.ReLU()
    expected = relu(bn(conv(X)))
    group = horizon.nn.intrinsic.ConvBNReLU2d(conv, bn, relu).eval()
    assert absorb_bn(group) is group and type(group) is horizon.nn.intrinsic.ConvReLU2d
    assert differing(group(X), expected) == 0


def test_hooks_a_user_put_on_a_kept_group_stay() -> None:
    fused = fuse_modules_qat(randomize(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval(), ["0", "1"])
    seen: list[str] = []
    handles = [
        fused[0].register_forward_pre_hook(lambda *_: seen.append("pre")),
        fused[0].register_forward_hook(lambda *_: seen.append("post")),
    ]
    absorb_bn(fused)
    fused(torch.randn(2, 3))
    assert seen == ["pre", "post"] and type(fused[0]) is nn.Linear
    with pytest.raises(FusionError, match="absorbed a BatchNorm1d"):
        fused(torch.randn(2, 3, 3))
    for handle in handles:
        handle.remove()
    seen.clear()
    fused(torch.randn(2, 3))
    assert seen == []


def test_statistics_that_became_non_finite_in_training() -> None:
    fused = fuse_modules_qat(randomize(Net()), GROUPS)
    fused.ff.bn.running_var[0] = float("inf")
    before = snapshot(fused)
    with pytest.raises(
        FusionError, match="absorb_bn: the batch norm of 'ff': its running_var holds a non-finite value"
    ):
        absorb_bn(fused)
    assert_unchanged(fused, before)


def test_overflowing_half_precision_by_graph_is_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).half().eval()
    model[0].weight.data.fill_(300.0)
    model[1].running_var.fill_(0.0)
    fused = fuse_fx(model)
    assert fused.fusion_report.groups == [] and "overflow torch.float16" in fused.fusion_report.missed[0].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).to(dtype).eval()
    exact = fuse_modules(copy.deepcopy(model).double(), ["0", "1"])
    fused = fuse_modules(model, ["0", "1"])
    assert torch.equal(fused[0].weight, exact[0].weight.to(dtype)) and torch.equal(
        fused[0].bias, exact[0].bias.to(dtype)
    )
    by_graph = fuse_fx(model)
    assert torch.equal(by_graph.get_submodule("0").weight, fused[0].weight)
