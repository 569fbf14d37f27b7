"""Fusing by graph: the whole grid from modules and from functions, and what the fused model is."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

import horizon_plugin_pytorch as horizon
from fusion.networks import (
    ACTIVATION_FORMS,
    ADD_FORMS,
    ANCHOR_AND_NORM,
    ANCHORS,
    FUNCTIONALS,
    PHASES,
    TAILS,
    Block,
    Written,
    anchor_for,
    anchors,
    assert_unchanged,
    differing,
    dtypes,
    functionals,
    gradients,
    groups_in,
    make_norm,
    norm_options,
    pattern_name,
    randomize,
    residual_for,
    run_both,
    snapshot,
    states_differ,
)
from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import analyze
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import fuse_fx


def calls_of(model: nn.Module) -> list[str]:
    """What the forward of a graph module does, without its inputs and output."""
    assert isinstance(model, fx.GraphModule)
    return [str(n.target) for n in model.graph.nodes if n.op not in ("placeholder", "output")]


def only_group(fused: nn.Module) -> nn.Module:
    (_, group), *others = groups_in(fused)
    assert not others
    return group


# -- the grid ---------------------------------------------------------------------------------------------------------------


def assert_fused(model: nn.Module, x: Tensor, other: Tensor, name: str, is_qat: bool, scale: float) -> None:
    before = snapshot(model)
    fused = fuse_fx(model, is_qat=is_qat)
    assert_unchanged(model, before)
    report = fused.fusion_report
    assert report.count() == {name: 1} and report.missed == [] and report.untraced == [] and report.notes == []
    assert calls_of(fused) == [report.groups[0].name]
    a, b = (m(x.clone(), other.clone()) for m in (fused, model))
    assert differing(a, b, tolerance=0.0 if is_qat else None, scale=scale) == 0
    if is_qat and model.training:
        assert states_differ(fused, model) == {}
        for out in (a, b):
            (out * other).sum().backward()
        assert states_differ(gradients(fused), gradients(model)) == {}


def assert_block_fused(block: Block, x: Tensor, dtype: torch.dtype, name: str, is_qat: bool) -> None:
    randomize(block).to(dtype).eval()
    x = x.to(dtype)
    other = residual_for(block, x)
    with torch.no_grad():
        y = block.conv(x) if block.bn is None else block.bn(block.conv(x))
    scale = max(float(t.abs().max()) for t in (y, other))
    assert_fused(block.train(is_qat), x, other, name, is_qat, scale)


@pytest.mark.parametrize(("kind", "norm"), ANCHOR_AND_NORM)
def test_whole_grid_of_modules(kind: str, norm: str) -> None:
    for i, (add, activation) in enumerate(TAILS):
        anchor, x = anchor_for(kind)
        block = Block(anchor, make_norm(norm, anchor), add, activation)
        if len(block.names) > 1:
            name = pattern_name(kind, norm != "none", add != "none", activation)
            assert_block_fused(block, x, torch.float32 if i % 2 else torch.float64, name, is_qat=i % 3 == 0)


@pytest.mark.parametrize("kind", ANCHORS)
def test_drawn_modules(kind: str) -> None:
    @settings(max_examples=25, phases=PHASES)
    @given(
        anchors(kind),
        st.sampled_from([norm for k, norm in ANCHOR_AND_NORM if k == kind]),
        norm_options,
        st.sampled_from(TAILS),
        dtypes,
        functionals,
        st.booleans(),
    )
    def check(
        drawn: tuple[nn.Module, Tensor], norm: str, options: Any, tail: Any, dtype: Any, functional: str, is_qat: bool
    ) -> None:
        (anchor, x), (add, activation) = drawn, tail
        block = Block(anchor, make_norm(norm, anchor, options), add, activation, functional)
        if len(block.names) > 1:
            name = pattern_name(kind, norm != "none", add != "none", activation)
            assert_block_fused(block, x, dtype, name, is_qat)

    check()


@pytest.mark.parametrize("kind", ANCHORS)
def test_drawn_functions(kind: str) -> None:
    activations: dict[str, tuple[str, Any]] = {"none": ("none", None), **ACTIVATION_FORMS}

    @settings(max_examples=25, phases=PHASES)
    @given(
        anchors(kind),
        st.booleans(),
        st.sampled_from(["none", *ADD_FORMS]),
        st.sampled_from(["first", "second"]),
        st.sampled_from(list(activations)),
        st.booleans(),
    )
    def check(drawn: tuple[nn.Module, Tensor], norm: bool, add: str, order: str, activation: str, is_qat: bool) -> None:
        anchor, x = drawn
        label, function = activations[activation]
        if not norm and add == "none" and label == "none":
            return
        bn = make_norm("BatchNorm", anchor) if norm else None
        model = randomize(Written(anchor, bn, ADD_FORMS.get(add), order, copy.deepcopy(function))).double().eval()
        other = residual_for(model, x)
        name = pattern_name(kind, norm, add != "none", label)
        scale = max(float(t.detach().abs().max()) for t in (model.conv(x), other)) * 10
        assert_fused(model, x, other, name, is_qat, scale)

    check()


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("add", [*ADD_FORMS, *FUNCTIONALS])
def test_every_way_to_write_an_add(add: str, order: str) -> None:
    form: Any = FUNCTIONALS[add]() if add in FUNCTIONALS else ADD_FORMS[add]
    model = randomize(Written(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), form, order, None)).double().eval()
    x, other = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 4, 4, 4).double()
    assert_fused(model, x, other, "ConvBNAdd2d", False, 10.0)


@pytest.mark.parametrize("activation", ACTIVATION_FORMS)
@pytest.mark.parametrize("add", ["none", "+", "ours", "torch.ao"])
def test_every_way_to_write_an_activation(activation: str, add: str) -> None:
    label, function = ACTIVATION_FORMS[activation]
    form: Any = FUNCTIONALS[add]() if add in FUNCTIONALS else ADD_FORMS.get(add)
    model = (
        randomize(Written(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), form, "first", copy.deepcopy(function)))
        .double()
        .eval()
    )
    x, other = torch.randn(2, 3, 4, 4).double(), 4 * torch.randn(2, 4, 4, 4).double()
    assert_fused(model, x, other, pattern_name("Conv2d", True, add != "none", label), False, 10.0)


@pytest.mark.parametrize("functional", FUNCTIONALS)
def test_add_relu_counts_as_both(functional: str) -> None:
    block = (
        randomize(Block(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), "second", "none", functional, "add_relu"))
        .double()
        .eval()
    )
    assert_fused(
        block, torch.randn(2, 3, 4, 4).double(), torch.randn(2, 4, 4, 4).double(), "ConvBNAddReLU2d", False, 10.0
    )


NOT_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp(-1, 6)": lambda x: x.clamp(-1, 6),
    "clamp(0, 5)": lambda x: x.clamp(0, 5),
    "clamp(1)": lambda x: x.clamp(1),
    "clamp(max=6)": lambda x: x.clamp(max=6),
    "clamp_max(6)": lambda x: x.clamp_max(6),
    "clamp_min(0.1)": lambda x: x.clamp_min(0.1),
    "clamp by a tensor": lambda x: torch.clamp(x, min=x.mean()),
    "clamp_min by a tensor": lambda x: torch.clamp_min(x, x.mean()),
    "hardtanh(-1, 1)": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "nn.Hardtanh()": nn.Hardtanh(),
    "nn.Sigmoid": nn.Sigmoid(),
    "nn.PReLU": nn.PReLU(),
}


@pytest.mark.parametrize("name", NOT_ACTIVATIONS)
def test_other_bounds_are_other_functions(name: str) -> None:
    model = Written(nn.Conv2d(3, 4, 1), None, ADD_FORMS["+"], "first", copy.deepcopy(NOT_ACTIVATIONS[name])).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvAdd2d": 1}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4), 4 * torch.randn(2, 4, 4, 4)) == 0


# -- stepping over ----------------------------------------------------------------------------------------------------------


class Interrupted(nn.Module):
    """Something that computes nothing between every two stages."""

    def __init__(self, between: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.a, self.b, self.c = between(), between(), between()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.c(self.b(self.bn(self.a(self.conv(x)))) + x))


@pytest.mark.parametrize("between", [nn.Identity, lambda: nn.Dropout(0.9), lambda: nn.Dropout2d(0.9)])
def test_identity_and_dropout_are_stepped_over_in_eval_mode(between: Callable[[], nn.Module]) -> None:
    model = randomize(Interrupted(between)).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvBNAddReLU2d": 1}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0
    assert bool(fused.fusion_report.notes) is (between is not nn.Identity)


def test_functional_dropout_is_stepped_over_in_eval_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.dropout(self.bn(self.conv(x)), 0.5, self.training))

    model = randomize(Net()).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


@pytest.mark.parametrize(("training", "is_qat"), [(True, False), (True, True), (False, True)])
def test_dropout_that_can_still_be_active_is_not_stepped_over(training: bool, is_qat: bool) -> None:
    model = randomize(Interrupted(lambda: nn.Dropout(0.5))).train(training)
    fused = fuse_fx(model, is_qat=is_qat)
    assert fused.fusion_report.count() == {}
    x = torch.randn(2, 3, 4, 4)
    outputs = []
    for m in (fused.train(), model.train()):
        torch.manual_seed(5)
        outputs.append(m(x))
    assert differing(*outputs, tolerance=0.0) == 0
    assert run_both(fused.eval(), model.eval(), x) == 0


class Halve(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input / 2


class DropPath(nn.Module):
    """Not what its name says: it scales in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * 0.9


def patched_identity() -> nn.Module:
    module = nn.Identity()
    module.forward = lambda x: x * 3
    return module


@pytest.mark.parametrize("between", [Halve, DropPath, patched_identity])
def test_what_only_looks_as_if_it_computed_nothing_is_not_stepped_over(between: Callable[[], nn.Module]) -> None:
    model = randomize(Interrupted(between)).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_stochastic_depth_is_stepped_over_in_eval_mode() -> None:
    model = randomize(Interrupted(lambda: StochasticDepth(0.5, "row"))).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvBNAddReLU2d": 1}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


# -- two convolutions, chains -------------------------------------------------------------------------------------------------


class Meeting(nn.Module):
    def __init__(self, first_operand_is_later: bool) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2, self.swap = nn.BatchNorm2d(3), nn.BatchNorm2d(3), first_operand_is_later

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.early(x))
        b = self.bn2(self.late(x))
        return F.relu(b + a if self.swap else a + b)


@pytest.mark.parametrize("swap", [False, True])
def test_of_two_convolutions_that_meet_in_an_add_the_later_takes_it(swap: bool) -> None:
    model = randomize(Meeting(swap)).eval()
    fused = fuse_fx(model)
    assert [(g.pattern.name, g.modules[0]) for g in fused.fusion_report.groups] == [
        ("ConvBN2d", "early"),
        ("ConvBNAddReLU2d", "late"),
    ]
    (miss,) = fused.fusion_report.missed
    assert miss.kind == "add" and miss.modules == ("early", "add") and "'late'" in miss.reason
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


class Residual(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=i % 2 == 0) for i in range(2 * n))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2 * n))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, len(self.convs), 2):
            skip = x
            x = self.relu(self.bns[i](self.convs[i](x)))
            x = self.bns[i + 1](self.convs[i + 1](x))
            x += skip
            x = self.relu(x)
        return x


@pytest.mark.parametrize("is_qat", [False, True])
def test_residual_network_with_one_relu_for_all(is_qat: bool) -> None:
    model = randomize(Residual(3)).train(is_qat)
    fused = fuse_fx(model, is_qat=is_qat)
    assert fused.fusion_report.count() == {"ConvBNAddReLU2d": 3, "ConvBNReLU2d": 3}
    assert fused.fusion_report.missed == []
    x = torch.randn(2, 4, 6, 6)
    assert differing(fused(x), model(x), tolerance=0.0 if is_qat else None) == 0
    assert all(not isinstance(m, nn.ReLU) for name, m in fused.named_children())
    assert run_both(fused.eval(), model.eval(), x) == 0
    fused.load_state_dict(model.state_dict())
    assert run_both(fused, model, x) == 0


@pytest.mark.parametrize("is_qat", [False, True])
def test_twenty_training_steps_equal_the_unfused_model(is_qat: bool) -> None:
    model = randomize(Residual(2)).train()
    fused = fuse_fx(model, is_qat=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (fused, model)]
    for step in range(20):
        x = torch.randn(4, 4, 5, 5)
        for m, optimizer in zip((fused, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        assert states_differ(fused, model) == {}, step
    assert model.bns[0].num_batches_tracked == 20
    x = torch.randn(4, 4, 5, 5)
    assert run_both(fused.eval(), model.eval(), x) == 0
    horizon.quantization.absorb_bn(fused)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert differing(fused(x), model(x), tolerance=1e-4) == 0


# -- where things stand -------------------------------------------------------------------------------------------------------


class WithFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.skip = nn.ModuleDict({"ff": FloatFunctional()})
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.skip["ff"].add(x, self.body(x))) + 0 * x


def test_with_a_float_functional_the_group_stands_there() -> None:
    model = randomize(WithFunctional()).eval()
    fused = fuse_fx(model)
    assert type(fused.skip["ff"]) is horizon.nn.intrinsic.ConvAddReLU2d
    assert isinstance(fused.relu, nn.Identity) and isinstance(fused.body[1], nn.Identity)
    (group,) = fused.fusion_report.groups
    assert (group.name, group.modules) == ("skip.ff", ("body.0", "body.1", "skip.ff", "relu"))
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_generated_names_skip_those_that_are_taken() -> None:
    model = Meeting(False)
    model._generated_add_0 = nn.Identity()
    fused = fuse_fx(model)
    assert (
        type(fused._generated_add_1) is horizon.nn.intrinsic.ConvAddReLU2d
        and type(fused._generated_add_0) is nn.Identity
    )


def test_a_float_functional_of_several_adds_is_not_replaced() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.ff = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            y = self.ff.add(self.a(x), x)
            return self.ff.add(self.b(y), y) * self.ff.mul(x, y)

    model = Net().eval()
    fused = fuse_fx(model)
    assert {g.name for g in fused.fusion_report.groups} == {"_generated_add_0", "_generated_add_1"}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_everything_of_the_model_is_there_still() -> None:
    class Net(nn.Module):
        classes = ("cat", "dog")

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.unused = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(2, 2)
            self.register_buffer("steps", torch.arange(3))
            self.register_buffer("cache", torch.zeros(2), persistent=False)
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
            self.config, self.device_name = {"depth": 3}, "cpu"

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x))) * self.scale

    model = randomize(Net()).eval()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for fused in (fuse_fx(model), copy.deepcopy(fuse_fx(model))):
        assert type(fused).__name__ == "Net" and isinstance(fused, fx.GraphModule) and not fused.training
        assert fused.config == {"depth": 3} and fused.device_name == "cpu" and isinstance(fused.unused, nn.Linear)
        assert torch.equal(fused.steps, model.steps) and "cache" not in fused.state_dict() and fused.cache.shape == (2,)
        calls.clear()
        fused(torch.randn(1, 3, 2, 2))
        assert len(calls) == 1
    handle.remove()


def test_the_model_and_its_copy_share_nothing() -> None:
    model = randomize(Meeting(False)).eval()
    before = snapshot(model)
    fused = fuse_fx(model)
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for t in (*fused.parameters(), *fused.buffers()):
            t.add_(1)
    assert_unchanged(model, before)


def test_fusing_a_fused_model_changes_nothing_more() -> None:
    model = randomize(Residual(1)).eval()
    once = fuse_fx(model)
    twice = fuse_fx(once)
    assert twice.fusion_report.groups == [] and twice.fusion_report.missed == []
    assert run_both(twice, model, torch.randn(2, 4, 6, 6)) == 0
    assert states_differ(twice, once) == {}
    twice.load_state_dict(model.state_dict())
    assert run_both(twice, model, torch.randn(2, 4, 6, 6)) == 0


@pytest.mark.parametrize("is_qat", [False, True])
def test_what_was_fused_by_name_is_left_and_the_rest_is_found(is_qat: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Block(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), "second", "ReLU")
            self.b, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(self.bn(self.b(self.a(x, x))))

    model = randomize(Net()).eval()
    fuse = horizon.quantization.fuse_modules_qat if is_qat else horizon.quantization.fuse_modules
    fused = fuse_fx(fuse(model, ["a.conv", "a.bn", "a.ff", "a.relu"]), is_qat=is_qat)
    assert fused.fusion_report.count() == {"ConvBNReLU62d": 1}
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0
    fused.load_state_dict(model.state_dict())
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_a_part_that_was_fused_by_name_does_not_stand_in_the_way() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.ff, self.last = nn.Conv2d(3, 3, 1), FloatFunctional(), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.ff.add(self.conv(x), x))

    model = randomize(nn.Sequential(Plus(), nn.BatchNorm2d(3), nn.ReLU())).eval()
    half = copy.deepcopy(model)
    horizon.quantization.fuse_modules(half[0], ["conv", "ff"], inplace=True)
    fused = fuse_fx(half)
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1} and fused.fusion_report.untraced == []
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_calling_a_part_of_a_fused_model_is_right_or_raises() -> None:
    """Its forward still is the user's, while its modules were fused for the whole model's graph."""

    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.conv(x)) + x)

    x = torch.randn(2, 3, 4, 4)
    model = randomize(nn.Sequential(Plus())).eval()
    with pytest.raises(FusionError, match="the output of 'conv' is read by"):
        fuse_fx(model).get_submodule("0")(x)

    model = randomize(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))).eval()
    fused = fuse_fx(model)
    assert differing(fused.get_submodule("0")(x), model[0](x)) == 0


# -- arguments ----------------------------------------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None, flag: bool = False, *, scale: float = 1.0) -> Any:
        y = F.relu(self.bn(self.conv(x)))
        if mask is not None:
            y = y * mask
        if flag:
            return y, x
        return y * scale


def test_optional_arguments_are_specialized_to_their_defaults() -> None:
    model = randomize(Optional()).eval()
    fused = fuse_fx(model)
    x, mask = torch.randn(2, 3, 4, 4), torch.ones(4, 4)
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1}
    assert run_both(fused, model, x) == 0
    assert differing(fused(x, None, False), model(x)) == 0
    assert differing(fused(x, mask=None), model(x)) == 0
    fused = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    assert differing(fused(x), model(x)) == 0
    for call in (lambda: fused(x, mask), lambda: fused(x, mask=mask), lambda: fused(x, None, True)):
        with pytest.raises(ValueError, match=r"traced with (mask=None|flag=False)"):
            call()


@pytest.mark.parametrize(
    "example",
    [
        lambda x, m: (x, m),
        lambda x, m: {"x": x, "mask": m},
        lambda x, m: {"mask": m, "x": x},
    ],
    ids=["tuple", "dict", "dict in another order"],
)
def test_arguments_in_example_inputs_stay_arguments(example: Callable[..., Any]) -> None:
    model = randomize(Optional()).eval()
    x, mask = torch.randn(2, 3, 4, 4), torch.rand(4, 4)
    inputs = example(x, mask)
    fused = fuse_fx(model, example_inputs=inputs)
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1} and fused.fusion_report.notes == []
    assert differing(fused(x, mask), model(x, mask)) == 0
    assert differing(fused(x, mask=mask), model(x, mask)) == 0
    assert differing(fused(mask=mask, x=x), model(x, mask)) == 0


def test_flags_in_example_inputs() -> None:
    model = randomize(Optional()).eval()
    x = torch.randn(2, 3, 4, 4)
    fused = fuse_fx(model, example_inputs={"x": x, "flag": True})
    expected = model(x, flag=True)
    for actual in (fused(x, flag=True), fused(x, None, True)):
        assert isinstance(actual, tuple) and all(differing(a, b) == 0 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("inputs", [(1, 2, 3, 4, 5), {"y": 1}, (), {"x": 1, "z": 2}])
def test_example_inputs_that_do_not_fit(inputs: Any) -> None:
    for call in (fuse_fx, analyze):
        with pytest.raises(ValueError, match="example_inputs do not fit the forward of Optional"):
            call(Optional(), example_inputs=inputs)


def test_a_tensor_as_example_inputs() -> None:
    fused = fuse_fx(Optional(), example_inputs=torch.randn(2, 3, 4, 4))
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1} and fused.fusion_report.notes == []


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, inputs: Any, *rest: Tensor, **named: Tensor) -> Any:
        x, y = inputs["x"], inputs["y"][0]
        return {"sum": F.relu(self.a(x) + y), "list": [F.relu6(self.b(y)), rest, named["z"]]}


def test_structured_inputs_and_outputs() -> None:
    model = Structured().eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvAddReLU2d": 1, "ConvReLU62d": 1}
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    a, b = (m({"x": x, "y": (y,)}, x, y, z=x) for m in (fused, model))
    assert differing(a["sum"], b["sum"]) == 0 and differing(a["list"][0], b["list"][0]) == 0
    assert a["list"][1][1] is y and a["list"][2] is x


@pytest.mark.parametrize("how", ["positional", "keyword", "input="])
def test_arguments_of_a_transposed_convolution(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.bn = nn.ConvTranspose2d(2, 2, 3, 2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            if how == "positional":
                y = self.up(x, [10, 9])
            elif how == "keyword":
                y = self.up(x, output_size=[10, 9])
            else:
                y = self.up(output_size=[10, 9], input=x)
            return F.relu(other + self.bn(input=y))

    model = randomize(Net()).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvTransposeBNAddReLU2d": 1}
    assert run_both(fused, model, torch.randn(1, 2, 4, 4), torch.randn(1, 2, 10, 9)) == 0


def test_unknown_configuration_is_an_error() -> None:
    fuse_fx(Meeting(False), {"preserved_attributes": ["swap"]})
    with pytest.raises(ValueError, match="unknown keys in fuse_custom_config_dict: \\['typo'\\]"):
        fuse_fx(Meeting(False), {"typo": 1})


# -- state that a forward keeps -----------------------------------------------------------------------------------------------


class Stashing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.features, self.calls = nn.Conv2d(3, 3, 1), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.features = self.conv(x)
        return F.relu(self.features)


def test_what_a_traced_forward_stores_on_the_model_does_not_stay() -> None:
    model = Stashing().eval()
    analyze(model, torch.randn(1, 3, 2, 2))
    assert model.features is None and model.calls == 0
    fused = fuse_fx(model)
    assert fused.features is None and fused.calls == 0
    copy.deepcopy(fused)
    pickle.loads(pickle.dumps(fused))


def test_analyzing_with_inputs_moves_no_statistics_and_runs_no_hooks() -> None:
    model = randomize(Residual(1)).train()
    seen: list[int] = []
    model.bns[0].register_forward_hook(lambda *_: seen.append(1))
    before = snapshot(model)
    report = analyze(model, torch.randn(2, 4, 6, 6))
    assert report.notes == [] and seen == []
    assert_unchanged(model, before)


def test_statistics_that_are_not_finite_are_an_error_naming_the_norm() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[0][1].running_var[1] = float("nan")
    before = snapshot(model)
    for call in (fuse_fx, analyze):
        with pytest.raises(FusionError, match=r"'0\.1': its running_var holds a non-finite value"):
            call(model)
    assert_unchanged(model, before)


# -- kinds of models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(), nn.Sequential(), nn.BatchNorm2d(3)])
def test_models_with_nothing_to_fuse(model: nn.Module) -> None:
    fused = fuse_fx(model.eval())
    assert fused.fusion_report.groups == []
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_a_graph_module() -> None:
    model = randomize(Residual(2)).eval()
    fused = fuse_fx(fx.symbolic_trace(model))
    assert fused.fusion_report.count() == {"ConvBNAddReLU2d": 2, "ConvBNReLU2d": 2}
    assert run_both(fused, model, torch.randn(2, 4, 6, 6)) == 0


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.LazyLinear(4)])
@pytest.mark.parametrize("call", [fuse_fx, analyze], ids=["fuse_fx", "analyze"])
def test_lazy_modules_must_have_seen_data(call: Callable[..., Any], lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.Sequential(copy.copy(lazy))).eval()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    with pytest.raises(FusionError, match=rf"'1.0' \({type(lazy).__name__}\) is lazy .* run the model's forward once"):
        call(model)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before


def test_lazy_modules_that_have_seen_data_are_like_others() -> None:
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    model(x)
    fused = fuse_fx(randomize(model).eval())
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1}
    assert run_both(fused, model, x) == 0


class OwnCall(nn.Conv2d):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) * 2


def test_an_anchor_with_a_call_of_its_own() -> None:
    model = randomize(nn.Sequential(OwnCall(3, 3, 1), nn.BatchNorm2d(3))).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.groups == []
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


class FrozenBatchNorm2d(nn.Module):
    """As detection networks write it; not all say their eps."""

    def __init__(self, channels: int, eps: float | None) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        if eps is not None:
            self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + getattr(self, "eps", 1e-5)).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


@pytest.mark.parametrize("eps", [0.1, None])
def test_frozen_batch_norms_of_others(eps: float | None) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3, eps), nn.ReLU())).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == ({} if eps is None else {"ConvBNReLU2d": 1})
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


def test_an_assignment_that_stays_in_the_graph_copies_pickles_and_exports() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            z = y
            y *= 2
            return z + y

    model = Net().eval()
    x = torch.randn(2, 3, 4, 4)
    fused = fuse_fx(model)
    for other in (
        fused,
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.export.export(fused, (x,)).module(),
    ):
        assert run_both(other, model, x) == 0


def test_time_to_fuse_grows_with_the_network_and_no_faster() -> None:
    """Counted in calls instead of seconds: of a function that everything goes through."""

    def calls(depth: int) -> int:
        layers = [m for _ in range(depth) for m in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())]
        model = nn.Sequential(*layers).eval()
        count = 0

        def tick(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(tick)
        try:
            fuse_fx(model)
        finally:
            sys.setprofile(None)
        return count

    small, large = calls(20), calls(80)
    assert large < 4.6 * small
