"""Fusing modules that the user names: the whole grid, its numbers, and everything that must raise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

import horizon_plugin_pytorch as horizon
from fusion.networks import (
    ACTIVATIONS,
    ADDS,
    ANCHOR_AND_NORM,
    ANCHORS,
    FUNCTIONALS,
    PHASES,
    TAILS,
    Block,
    anchor_for,
    anchors,
    assert_unchanged,
    differing,
    dtypes,
    functionals,
    gradients,
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
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup, Handoff, Identity
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import fuse_known_modules, fuse_modules, fuse_modules_qat

# -- the grid ---------------------------------------------------------------------------------------------------------------


def assert_absorbed(block: Block, x: Tensor, dtype: torch.dtype) -> None:
    """In eval mode: the same numbers, and no norm left. Errors are relative to the largest value on the way."""
    other = residual_for(randomize(block).double().eval(), x)
    block.to(dtype)
    x, other = x.to(dtype), other.to(dtype)
    fused = fuse_modules(block, block.names)
    assert not any("BatchNorm" in type(m).__name__ for m in fused.modules())
    with torch.no_grad():
        y = block.conv(x) if block.bn is None else block.bn(block.conv(x))
        scale = max(float(t.abs().max()) for t in (y, other))
        assert differing(fused(x, other), block(x, other), scale=scale) == 0


def assert_kept(block: Block, x: Tensor, dtype: torch.dtype, name: str) -> None:
    """In training: output, gradients, running statistics and the count of batches, element for element."""
    randomize(block).to(dtype).train()
    x = x.to(dtype)
    other = residual_for(copy.deepcopy(block), x)
    fused = fuse_modules_qat(block, block.names)
    group = fused.ff if block.ff is not None else fused.conv
    assert type(group).__name__ == name and all(m.training for m in fused.modules())
    if block.bn is not None:
        assert group.bn.eps == block.bn.eps and getattr(group.bn, "momentum", 0) == getattr(block.bn, "momentum", 0)

    outputs = [model(x, other) for model in (fused, block)]
    weights = torch.randn_like(outputs[0])
    for out in outputs:
        (out * weights).sum().backward()
    assert differing(*outputs, tolerance=0.0) == 0
    assert states_differ(fused, block) == {}
    assert len(gradients(block)) == len(list(block.parameters()))
    assert states_differ(gradients(fused), gradients(block)) == {}
    assert differing(*(m.eval()(x, other) for m in (fused, block)), tolerance=0.0) == 0


@pytest.mark.parametrize("kept", [False, True], ids=["absorbed", "kept"])
@pytest.mark.parametrize(("kind", "norm"), ANCHOR_AND_NORM)
def test_whole_grid(kind: str, norm: str, kept: bool) -> None:
    for add, activation in TAILS:
        anchor, x = anchor_for(kind)
        block = Block(anchor, make_norm(norm, anchor), add, activation)
        if len(block.names) == 1:
            continue
        name = pattern_name(kind, norm != "none", add != "none", activation)
        for dtype in (torch.float32, torch.float64):
            if kept:
                assert_kept(copy.deepcopy(block), x, dtype, name)
            else:
                assert_absorbed(copy.deepcopy(block), x, dtype)


@pytest.mark.parametrize("kind", ANCHORS)
def test_drawn(kind: str) -> None:
    """Every option of the anchors and norms."""

    @settings(max_examples=40, phases=PHASES)
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
        drawn: tuple[nn.Module, Tensor], norm: str, options: Any, tail: Any, dtype: Any, functional: str, kept: bool
    ) -> None:
        (anchor, x), (add, activation) = drawn, tail
        block = Block(anchor, make_norm(norm, anchor, options), add, activation, functional)
        if len(block.names) == 1:
            return
        if kept:
            assert_kept(block, x, dtype, pattern_name(kind, norm != "none", add != "none", activation))
        else:
            assert_absorbed(block, x, dtype)

    check()


@pytest.mark.parametrize(
    ("functional", "method", "add", "activation"),
    list(product(FUNCTIONALS, ("add", "add_relu"), ADDS[1:], ACTIVATIONS)),
)
def test_every_add(functional: str, method: str, add: str, activation: str) -> None:
    anchor = nn.Conv2d(3, 4, 2).double()
    block = Block(anchor, nn.BatchNorm2d(4), add, activation, functional, method)
    assert_absorbed(block, torch.randn(2, 3, 5, 5).double(), torch.float32)


def test_twenty_steps_of_sgd_equal_the_unfused_model_at_every_step() -> None:
    torch.manual_seed(3)
    layers = [
        Block(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, momentum=0.03), "none", "ReLU"),
        Block(nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2), nn.SyncBatchNorm(6, eps=1e-3), "first", "ReLU6"),
        Block(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, momentum=None), "second", "none", "torch.ao"),
    ]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, x)
            return x

    net = randomize(Net()).train()
    groups = [[f"layers.{i}.{name}" for name in layer.names] for i, layer in enumerate(layers)]
    fused = fuse_modules_qat(net, groups)
    models = [fused, net]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4) for m in models]
    moved = copy.deepcopy(net.state_dict())
    for step in range(20):
        x, target = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            F.mse_loss(outputs[-1], target).backward()
            optimizer.step()
        assert differing(*outputs, tolerance=0.0) == 0, step
        assert states_differ(fused, net) == {}, step
        assert all(layer.bn.num_batches_tracked == step + 1 for layer in layers)
    assert set(states_differ(net, moved)) == set(moved)  # training changed everything there is

    x = torch.randn(4, 3, 5, 5)
    assert differing(fused.eval()(x), net.eval()(x), tolerance=0.0) == 0
    horizon.quantization.absorb_bn(fused)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) for m in fused.modules())
    assert differing(fused(x), net(x)) == 0


# -- modes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("mode", "fuse", "kept"),
    [
        ("fuse_bn", fuse_modules, False),
        ("fuse_bn", fuse_modules_qat, True),
        ("with_bn", fuse_modules, True),
        ("with_bn_reverse_fold", fuse_modules, True),
    ],
)
def test_who_keeps_bn(mode: str, fuse: Callable[..., nn.Module], kept: bool, training: bool) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).train(training)
    horizon.qat_mode.set_qat_mode(mode)
    try:
        fused = fuse(net, ["0", "1", "2"])
    finally:
        horizon.qat_mode.set_qat_mode("fuse_bn")
    assert any(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) is kept
    assert {m.training for m in fused.modules()} == {training}
    x = torch.randn(4, 2, 3, 3)
    assert run_both(fused.eval(), net.eval(), x) == 0


def test_absorbing_in_training_mode_uses_the_running_statistics() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))).train()
    before = copy.deepcopy(net.state_dict())
    fused = fuse_modules(net, ["0", "1"])
    assert states_differ(net, before) == {}
    x = torch.randn(4, 2, 3, 3)
    assert differing(fused.train()(x), net.eval()(x)) == 0


# -- what the result is -----------------------------------------------------------------------------------------------------


def test_places_without_an_add() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU6())
    places = fuse_known_modules(list(net))
    assert [type(p) for p in places] == [horizon.nn.intrinsic.ConvReLU62d, Identity, Identity]


def test_places_with_an_add() -> None:
    places = fuse_known_modules([nn.ConvTranspose1d(2, 3, 1), nn.BatchNorm1d(3), FloatFunctional(), nn.ReLU()])
    assert [type(p) for p in places] == [Handoff, Identity, horizon.nn.intrinsic.ConvTransposeAddReLU1d, Identity]


def test_the_group_holds_the_users_modules() -> None:
    conv, bn, relu = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
    group = fuse_known_modules([conv, bn, relu], is_qat=True)[0]
    assert isinstance(group, FusedGroup)
    assert (group.conv, group.bn, group.relu) == (conv, bn, relu)
    assert group.weight is conv.weight and group.bias is conv.bias


def test_frozen_parameters_stay_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))
    net[0].weight.requires_grad_(False)
    net[1].requires_grad_(False)
    fused = fuse_modules(net, ["0", "1"])
    assert [p.requires_grad for p in fused.parameters()] == [False, False]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_weight_stays(memory_format: torch.memory_format) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(memory_format=memory_format)
    assert fuse_modules(net, ["0", "1"])[0].weight.is_contiguous(memory_format=memory_format)


def test_a_tied_weight_is_left_alone() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    net[2].weight = net[0].weight
    weight = net[2].weight.detach().clone()
    fused = fuse_modules(net, ["0", "1"], inplace=True)
    assert torch.equal(fused[2].weight, weight) and not torch.equal(fused[0].weight, weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace(inplace: bool) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    before, reference = snapshot(net), copy.deepcopy(net)
    fused = fuse_modules(net, ["0", "1"], inplace)
    assert (fused is net) is inplace
    if not inplace:
        assert_unchanged(net, before)
    assert run_both(fused, reference, torch.randn(2, 3, 4, 4)) == 0


def test_several_groups_in_nested_modules() -> None:
    net = nn.ModuleDict(
        {
            "a": Block(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), "first", "ReLU"),
            "b": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()),
        }
    )
    fused = fuse_modules(net, [["a.conv", "a.bn", "a.ff", "a.relu"], ("b.0", "b.1")])
    assert type(fused["a"].ff) is horizon.nn.intrinsic.ConvAddReLU2d
    assert type(fused["b"][0]) is horizon.nn.intrinsic.ConvReLU2d


def test_anchor_arguments_reach_the_anchor() -> None:
    class Net(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.up, self.bn, self.ff, self.how = (
                nn.ConvTranspose2d(2, 2, 3, 2),
                nn.BatchNorm2d(2),
                FloatFunctional(),
                how,
            )

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            size = list(other.shape[-2:])
            if self.how == "positional":
                y = self.up(x, size)
            elif self.how == "keyword":
                y = self.up(x, output_size=size)
            else:
                y = self.up(input=x, output_size=size)
            return self.ff.add(other, self.bn(y))

    x, other = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 10, 9)
    for how in ("positional", "keyword", "input="):
        net = randomize(Net(how)).eval()
        for names in (["up", "bn", "ff"], ["up", "bn"]):
            assert run_both(fuse_modules(net, names), net, x, other) == 0
            assert run_both(fuse_modules_qat(net, names), net, x, other) == 0


def test_input_as_a_keyword_of_a_convolution_that_absorbed_a_1d_norm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.conv(input=x)))

    net = randomize(Net()).eval()
    for names in (["conv", "bn"], ["conv", "bn", "relu"]):
        assert run_both(fuse_modules(net, names), net, torch.randn(2, 2, 5)) == 0


@pytest.mark.parametrize("fuse", [fuse_modules, lambda m, n: horizon.quantization.absorb_bn(fuse_modules_qat(m, n))])
@pytest.mark.parametrize(
    ("anchor", "right", "wrong"),
    [
        (nn.Conv1d(4, 4, 1), (2, 4, 5), (4, 5)),
        (nn.Linear(4, 4), (2, 4), (2, 4, 4)),
        (nn.ConvTranspose1d(4, 4, 1), (2, 4, 4), (4, 4)),
    ],
)
@pytest.mark.parametrize("tail", [[], [nn.ReLU()]])
def test_an_absorbed_1d_norm_still_refuses_inputs_whose_channels_it_would_mistake(
    anchor: nn.Module, right: tuple[int, ...], wrong: tuple[int, ...], tail: list[nn.Module], fuse: Any
) -> None:
    net = randomize(nn.Sequential(copy.deepcopy(anchor), nn.BatchNorm1d(4), *tail)).eval()
    fused = fuse(net, [str(i) for i in range(len(net))])
    assert run_both(fused, net, torch.randn(right)) == 0
    with pytest.raises(FusionError, match="absorbed a BatchNorm1d"):
        fused(torch.randn(wrong))


def test_fusing_again_on_top_of_an_absorbed_norm() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).eval()
    fused = fuse_modules(fuse_modules(net, ["0", "1"]), ["0", "2"])
    assert type(fused[0]) is horizon.nn.intrinsic.ConvReLU2d
    assert run_both(fused, net, torch.randn(2, 3, 4, 4)) == 0
    fused.load_state_dict(net.state_dict())
    assert run_both(fused, net, torch.randn(2, 3, 4, 4)) == 0


# -- custom fusers ----------------------------------------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def test_additional_fuser_method_mapping() -> None:
    calls = []

    def method(is_qat: bool, conv: nn.Module, act: nn.Module) -> nn.Module:
        calls.append((is_qat, type(conv), type(act)))
        return nn.Sequential(conv, act)

    net = nn.Sequential(nn.Conv2d(2, 2, 1), Swish(), nn.Conv2d(2, 2, 1), nn.ReLU())
    config = {"additional_fuser_method_mapping": {(nn.Conv2d, Swish): method}}
    x, seen = torch.randn(1, 2, 3, 3), []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    fused = fuse_modules(net, [["0", "1"], ["2", "3"]], fuse_custom_config_dict=config)
    assert calls == [(False, nn.Conv2d, Swish)] and isinstance(fused[1], nn.Identity)
    assert type(fused[2]) is horizon.nn.intrinsic.ConvReLU2d
    assert run_both(fused, net, x) == 0 and len(seen) == 2
    torch.ao.quantization.fuse_modules_qat(
        net, ["0", "1"], fuser_func=fuse_known_modules, fuse_custom_config_dict=config
    )
    assert calls[-1] == (True, nn.Conv2d, Swish)


# -- hooks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", ["none", "first"])
@pytest.mark.parametrize("fuse", [fuse_modules, fuse_modules_qat])
def test_outer_hooks_stay_on_the_group_and_their_handles_work(fuse: Any, add: str) -> None:
    block = Block(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), add, "ReLU").eval()
    seen: list[tuple[str, Any]] = []
    pre = block.conv.register_forward_pre_hook(lambda m, a: seen.append(("in", a[0].sum().item())))
    pre_kw = block.conv.register_forward_pre_hook(lambda m, a, k: seen.append(("kw", k)), with_kwargs=True)
    post = block.relu.register_forward_hook(lambda m, a, o: seen.append(("out", o.sum().item())))
    always = block.relu.register_forward_hook(lambda m, a, o: seen.append(("always", 0)), always_call=True)
    x, other = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    block(x, other)
    expected = list(seen)
    seen.clear()

    fused = fuse(block, block.names, inplace=True)
    out = fused(x, other)
    assert [name for name, _ in seen] == [name for name, _ in expected] == ["in", "kw", "out", "always"]
    assert seen[0] == expected[0] and seen[2][1] == out.sum().item()
    for handle in (pre, pre_kw, post, always):
        handle.remove()
    seen.clear()
    fused(x, other)
    assert seen == []


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize(
    ("place", "hook"), [*product(["bn", "ff"], HOOKS), ("conv", "forward"), ("relu", "forward pre")]
)
def test_hooks_inside_refuse(place: str, hook: str) -> None:
    block = Block(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), "first", "ReLU")
    HOOKS[hook](getattr(block, place))
    before = snapshot(block)
    with pytest.raises(FusionError, match=f"hook on its {type(getattr(block, place)).__name__}"):
        fuse_modules(block, block.names, inplace=True)
    assert_unchanged(block, before)


@pytest.mark.parametrize("place", ["conv", "relu"])
@pytest.mark.parametrize("hook", ["backward", "backward pre"])
def test_backward_hooks_on_the_ends_refuse(place: str, hook: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    HOOKS[hook](net[0] if place == "conv" else net[1])
    with pytest.raises(FusionError, match="hook on its"):
        fuse_modules(net, ["0", "1"])


def test_an_observer_in_the_float_functional_refuses() -> None:
    block = Block(nn.Conv2d(2, 2, 1), None, "first", functional="torch.ao")
    block.ff.activation_post_process.register_forward_hook(lambda *_: None)
    with pytest.raises(FusionError, match="activation_post_process observes"):
        fuse_modules(block, block.names)
    block.ff.activation_post_process = torch.ao.quantization.MinMaxObserver()
    with pytest.raises(FusionError, match="activation_post_process observes"):
        fuse_modules(block, block.names)


# -- an anchor's output that is used elsewhere --------------------------------------------------------------------------------


class Elsewhere(nn.Module):
    """conv -> bn -> add -> relu, and `also` does something else with the convolution's result or the FloatFunctional."""

    def __init__(self, also: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.also = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), also
        self.ff, self.pool, self.conv2, self.bn2 = (
            FloatFunctional(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        out = self.relu(self.ff.add(x, y))
        return self.also(self, x, y, out)


USES_OF_THE_VALUE: dict[str, Callable[..., Any]] = {
    "cat": lambda m, x, y, out: torch.cat([out, y]),
    "stack": lambda m, x, y, out: torch.stack([y, out]),
    "returned in a tuple": lambda m, x, y, out: (out, y),
    "returned in a dict": lambda m, x, y, out: {"out": [out, {"y": y}]},
    "returned alone": lambda m, x, y, out: y,
    "tensor + y": lambda m, x, y, out: out + y,
    "y + tensor": lambda m, x, y, out: y + out,
    "y - 1": lambda m, x, y, out: y - 1,
    "1 / y": lambda m, x, y, out: 1 / y,
    "y ** 2": lambda m, x, y, out: y**2,
    "-y": lambda m, x, y, out: -y,
    "abs(y)": lambda m, x, y, out: abs(y),
    "y @ x": lambda m, x, y, out: y @ x,
    "y // 2": lambda m, x, y, out: y // 2,
    "y % 2": lambda m, x, y, out: y % 2,
    "x += y": lambda m, x, y, out: x.add_(y),
    "y > 0": lambda m, x, y, out: y > 0,
    "y == 0": lambda m, x, y, out: y == 0,
    "y != x": lambda m, x, y, out: y != x,
    "y[0]": lambda m, x, y, out: y[0],
    "x[y]": lambda m, x, y, out: x[y],
    "iteration": lambda m, x, y, out: list(y),
    "len": lambda m, x, y, out: len(y),
    "float": lambda m, x, y, out: float(y),
    "if y": lambda m, x, y, out: x if y else out,
    "shape": lambda m, x, y, out: y.shape[0],
    "mean()": lambda m, x, y, out: y.mean(),
    "size()": lambda m, x, y, out: out.view(y.size(0), -1),
    "torch.where": lambda m, x, y, out: torch.where(x > 0, x, y),
    "F.relu": lambda m, x, y, out: F.relu(y),
    "F.interpolate": lambda m, x, y, out: F.interpolate(y, scale_factor=2),
    "a module without parameters": lambda m, x, y, out: m.pool(y),
    "another convolution": lambda m, x, y, out: m.conv2(y),
    "another norm": lambda m, x, y, out: m.bn2(y),
    "the same add again": lambda m, x, y, out: m.ff.add(y, out),
    "both operands": lambda m, x, y, out: m.ff.add(y, y),
}


@pytest.mark.parametrize("use", USES_OF_THE_VALUE)
def test_output_used_elsewhere_raises_at_the_first_forward_naming_both_places(use: str) -> None:
    net = nn.ModuleDict({"block": Elsewhere(USES_OF_THE_VALUE[use])}).eval()
    fuse_modules(net, ["block.conv", "block.bn", "block.ff", "block.relu"], inplace=True)
    model = nn.Sequential(net["block"]).eval()
    model.register_forward_hook(next(iter(net._forward_hooks.values())))
    with pytest.raises(FusionError) as error:
        model(torch.randn(2, 4, 4, 4))
    message = str(error.value)
    assert "the output of '0.conv' is read by" in message and "fused into the add of '0.ff'" in message
    assert "Leave '0.conv' out" in message
    assert __file__ in message


def test_reader_in_another_module_is_named() -> None:
    net = Elsewhere(USES_OF_THE_VALUE["another convolution"])
    fused = fuse_modules(net, ["conv", "bn", "ff", "relu"])
    with pytest.raises(FusionError, match=r"conv2d in 'conv2'"):
        fused(torch.randn(2, 4, 4, 4))


def test_returned_output_raises_also_in_a_wrapping_model() -> None:
    fused = fuse_modules(Elsewhere(USES_OF_THE_VALUE["returned in a tuple"]), ["conv", "bn", "ff", "relu"])
    with pytest.raises(FusionError, match="as an output of Elsewhere"):
        nn.Sequential(fused)(torch.randn(2, 4, 4, 4))


class Plain(nn.Module):
    """conv -> bn -> [add] -> relu as the forward calls them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.ff, self.run = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            FloatFunctional(),
            forward,
        )
        self.identity, self.dropout, self.stash = nn.Identity(), nn.Dropout(), None

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


MISREAD: dict[str, tuple[list[str], Callable[..., Any], str]] = {
    "conv read before its relu": (["conv", "relu"], lambda m, x: m.relu(y := m.conv(x)) + y, "'conv' is read by 'add'"),
    "conv read before its norm": (["conv", "bn"], lambda m, x: m.bn(y := m.conv(x)) * y, "'conv' is read by 'mul'"),
    "norm read before its relu": (
        ["conv", "bn", "relu"],
        lambda m, x: m.relu(y := m.bn(m.conv(x))) + y,
        "'bn' is read by 'add'",
    ),
    "returned": (["conv", "relu"], lambda m, x: (m.relu(y := m.conv(x)), y), "'conv' is read by the model's output"),
    "read by a module": (["conv", "relu"], lambda m, x: m.relu(y := m.conv(x)) + m.bn(y), "'conv' is read by 'bn'"),
    "sum read before its relu": (
        ["conv", "ff", "relu"],
        lambda m, x: m.relu(y := m.ff.add(m.conv(x), x)) + y,
        "'ff' is read by 'add_",
    ),
    "another order": (["conv", "bn", "relu"], lambda m, x: m.bn(m.relu(m.conv(x))), "'conv' is read by 'relu'"),
    "called twice, once without": (
        ["conv", "relu"],
        lambda m, x: m.relu(m.conv(x)) + m.conv(x),
        "'conv' is read by 'add'",
    ),
    "added twice, once without": (
        ["conv", "ff", "relu"],
        lambda m, x: m.relu(m.ff.add(m.conv(x), x)) + m.ff.add(m.conv(x * 2), x),
        "'ff' is read by 'add_",
    ),
    "something between": (["conv", "relu"], lambda m, x: m.relu(m.conv(x) * 2), "'conv' is read by 'mul'"),
    "dropout between": (["conv", "relu"], lambda m, x: m.relu(m.dropout(m.conv(x))), "'conv' is read by 'dropout'"),
}


def fuse_by_pytorch(model: nn.Module, names: Any, inplace: bool = False) -> nn.Module:
    return torch.quantization.fuse_modules(model, names, inplace=inplace, fuser_func=fuse_known_modules)


@pytest.mark.parametrize("fuse", [fuse_modules, fuse_by_pytorch])
@pytest.mark.parametrize("case", MISREAD)
def test_a_value_inside_a_group_that_is_read_raises_at_the_first_forward(case: str, fuse: Any) -> None:
    names, forward, message = MISREAD[case]
    net = Plain(forward).eval()
    x = torch.randn(2, 4, 3, 3)
    net(x)
    fused = fuse(net, names)
    with pytest.raises(FusionError, match=f"the output of {message}") as error:
        fused(x)
    assert "exists nowhere else" in str(error.value)
    assert (f"{__file__}:" in str(error.value)) is ("output" not in message)


@pytest.mark.parametrize(
    ("names", "forward"),
    [
        (["conv", "bn", "relu"], lambda m, x: m.relu(m.bn(y := m.conv(x))).reshape(y.shape[0], -1)),
        (["conv", "relu"], lambda m, x: m.relu(y := m.conv(x)).reshape(y.size(0), y.size()[1], -1).to(y.dtype)),
        (["conv", "relu"], lambda m, x: m.relu(m.identity(m.conv(x)))),
        (["conv", "bn", "relu"], lambda m, x: m.relu(m.bn(m.conv(x))) + m.relu(m.bn(m.conv(x * 2)))),
        (["conv", "ff", "relu"], lambda m, x: m.relu(m.ff.add(m.conv(x), x)) + m.relu(m.ff.add(m.conv(x * 2), x))),
        (["conv", "bn"], lambda m, x: m.relu(y := m.bn(m.conv(x))) + y),
        (["conv", "relu"], lambda m, x: m.relu(m.conv(x)) if x.sum() > -1e9 else x),
    ],
)
@pytest.mark.parametrize("fuse", [fuse_modules, fuse_by_pytorch])
def test_what_reads_no_value_inside_a_group_is_right(
    names: list[str], forward: Callable[..., Any], fuse: Callable[..., Any]
) -> None:
    net = randomize(Plain(forward)).eval()
    assert run_both(fuse(net, names), net, torch.randn(2, 4, 3, 3)) == 0


def test_a_later_group_fused_by_pytorch_is_looked_at_too() -> None:
    net = Plain(lambda m, x: m.relu(m.ff.add(m.identity(x), y := m.bn(m.conv(x)))) + y).eval()
    net.stem, net.stem_relu = nn.Conv2d(4, 4, 1), nn.ReLU()
    fused = fuse_by_pytorch(net, [["stem", "stem_relu"], ["conv", "bn", "ff", "relu"]])
    with pytest.raises(FusionError, match="the output of 'conv' is read by"):
        fused(torch.randn(2, 4, 3, 3))


def test_what_the_forward_stores_does_not_get_traced_values() -> None:
    def forward(m: Plain, x: Tensor) -> Tensor:
        m.stash = m.conv(x)
        return m.relu(m.bn(m.stash))

    net = randomize(Plain(forward)).eval()
    fused = fuse_modules(net, ["conv", "bn", "relu"])
    assert net.stash is None and fused.stash is None
    assert run_both(fused, net, torch.randn(2, 4, 3, 3)) == 0


@pytest.mark.parametrize("use", [u for u in USES_OF_THE_VALUE if u.startswith("returned")])
def test_returned_output_raises_also_where_the_model_is_fused_by_pytorch(use: str) -> None:
    fused = fuse_by_pytorch(Elsewhere(USES_OF_THE_VALUE[use]), ["conv", "bn", "ff", "relu"])
    with pytest.raises(FusionError, match="'conv' is read by the caller, as an output of Elsewhere"):
        fused(torch.randn(2, 4, 4, 4))


def test_a_group_fused_on_its_own_returns_a_value_that_raises_when_it_is_used() -> None:
    """There nothing tells which model the modules belong to."""
    net = Elsewhere(USES_OF_THE_VALUE["returned in a tuple"])
    net.conv, net.bn, net.ff, net.relu = fuse_known_modules([net.conv, net.bn, net.ff, net.relu])
    _, value = net(torch.randn(2, 4, 4, 4))
    for use in (lambda: value + 1, lambda: value.shape, lambda: torch.relu(value), lambda: value > 0):
        with pytest.raises(FusionError, match="was fused into the add"):
            use()


METHODS: dict[str, Callable[..., Any]] = {
    "add_scalar": lambda ff, x, y: ff.add_scalar(y, 1.0),
    "mul": lambda ff, x, y: ff.mul(x, y),
    "mul_scalar": lambda ff, x, y: ff.mul_scalar(y, 2.0),
    "cat": lambda ff, x, y: ff.cat([x, y]),
    "matmul": lambda ff, x, y: ff.matmul(x, y),
}


class OtherMethod(nn.Module):
    def __init__(self, method: str, functional: str) -> None:
        super().__init__()
        self.conv, self.ff, self.method = nn.Conv2d(4, 4, 1), FUNCTIONALS[functional](), METHODS[method]

    def forward(self, x: Tensor) -> Tensor:
        return self.method(self.ff, x, self.conv(x))


@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_of_the_float_functional_raise(method: str, functional: str) -> None:
    net = OtherMethod(method, functional)
    net(torch.randn(2, 4, 4, 4))
    with pytest.raises(FusionError, match="only adds"):
        fuse_modules(net, ["conv", "ff"])(torch.randn(2, 4, 4, 4))


def test_float_functional_used_for_two_adds_raises() -> None:
    net = Plain(lambda m, x: m.ff.add(x, m.ff.add(m.conv(x), x)))
    with pytest.raises(FusionError, match="used for several adds"):
        fuse_modules(net, ["conv", "ff"])(torch.randn(2, 4, 4, 4))


def test_an_add_without_the_anchors_output_raises() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.ff = nn.Conv2d(4, 4, 1), FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            self.conv(x)
            return self.ff.add(x, x)

    with pytest.raises(FusionError, match="neither operand is the output of the Conv2d"):
        fuse_modules(Net(), ["conv", "ff"])(torch.randn(2, 4, 4, 4))


def test_two_anchors_fused_into_two_adds_that_are_swapped_raise() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fa, self.fb = (
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 4, 1),
                FloatFunctional(),
                FloatFunctional(),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.fb.add(self.fa.add(x, self.b(x)), self.a(x))

    with pytest.raises(FusionError, match="neither operand"):
        fuse_modules(Net(), [["a", "fa"], ["b", "fb"]])(torch.randn(2, 4, 4, 4))


# -- failed calls -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), "first", "ReLU")
        self.wide, self.bn3d, self.bn1d = nn.BatchNorm2d(5), nn.BatchNorm3d(4), nn.BatchNorm1d(4)
        self.no_stats = nn.BatchNorm2d(4, track_running_stats=False)
        self.conv, self.pool, self.sigmoid, self.linear = (
            nn.Conv2d(4, 4, 1),
            nn.MaxPool2d(2),
            nn.Sigmoid(),
            nn.Linear(4, 4),
        )
        self.hardtanh, self.group_norm, self.instance_norm = nn.Hardtanh(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)
        self.shared = self.conv
        self.bn, self.ff, self.relu = nn.BatchNorm2d(4), FloatFunctional(), nn.ReLU()
        self.nan_mean, self.inf_var, self.nan_gamma, self.negative = (nn.BatchNorm2d(4) for _ in range(4))
        self.nan_mean.running_mean[1] = float("nan")
        self.inf_var.running_var[1] = float("inf")
        self.nan_gamma.weight.data[1] = float("nan")
        self.negative.running_var[1] = -0.5
        self.frozen = FrozenBatchNorm2d(5)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
        self.old_weight_norm = torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))
        self.pruned = prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5)
        self.odd_bias, self.odd_gamma = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        parametrize.register_parametrization(self.odd_bias, "bias", nn.Tanh())
        parametrize.register_parametrization(self.odd_gamma, "weight", nn.Tanh())
        self.patched, self.patched_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.patched.forward = self.patched_bn.forward = torch.nn.functional.relu

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


FAILURES: dict[str, tuple[Any, str]] = {
    "wrong name": (["stem.0", "stem.7"], r"Model has no module 'stem.7'"),
    "name of a tensor": (["stem.0", "stem.0.weight"], r"no module 'stem.0.weight'"),
    "empty name": (["", "stem.1"], "no module ''"),
    "not a name": ([["stem.0", 1]], "no module 1"),
    "no names": ([], "no module is named"),
    "no names in a group": ([[]], "cannot fuse"),
    "one name": (["stem.0"], "at least two"),
    "a string": ("stem.0", "no module"),
    "no anchor": (["stem.1", "stem.2"], "cannot fuse BatchNorm2d -> ReLU"),
    "wrong order": (["stem.0", "stem.2", "stem.1"], "BatchNorm2d does not fit there"),
    "add before norm": (["conv.", "ff", "bn"], "no module 'conv.'"),
    "add before norm (types)": (["stem.0", "ff", "bn"], "BatchNorm2d does not fit there"),
    "two activations": (["stem.0", "stem.2", "relu"], "ReLU does not fit there"),
    "two norms": (["stem.0", "stem.1", "bn"], "BatchNorm2d does not fit there"),
    "unsupported activation": (["stem.0", "stem.1", "sigmoid"], "Sigmoid does not fit there"),
    "Hardtanh(-1, 1)": (["stem.0", "hardtanh"], "Hardtanh does not fit there"),
    "GroupNorm": (["stem.0", "group_norm"], "GroupNorm does not fit there"),
    "InstanceNorm": (["stem.0", "instance_norm"], "InstanceNorm2d does not fit there"),
    "pool": (["pool", "stem.1"], "cannot fuse MaxPool2d -> BatchNorm2d"),
    "norm of another dimension": (["stem.0", "bn3d"], "BatchNorm3d does not normalize the channels of a Conv2d"),
    "frozen norm of another width": (["stem.0", "frozen"], "normalizes 5 channels, but its input has 4"),
    "mismatched channels": (["stem.0", "wide"], "normalizes 5 channels, but its input has 4"),
    "linear and 2d norm": (["linear", "stem.1"], "BatchNorm2d does not normalize the channels of a Linear"),
    "no running statistics": (["stem.0", "no_stats"], "no running statistics"),
    "nan mean": (["stem.0", "nan_mean"], "running_mean holds a non-finite value"),
    "inf variance": (["stem.0", "inf_var"], "running_var holds a non-finite value"),
    "nan gamma": (["stem.0", "nan_gamma"], "weight holds a non-finite value"),
    "negative variance": (["stem.0", "negative"], "not positive"),
    "shared module": (["conv", "bn"], "'conv' is the same module as 'shared'"),
    "shared module, other name": (["shared", "bn"], "'shared' is the same module as 'conv'"),
    "named twice": (["stem.0", "stem.1", "stem.1"], "'stem.1' is named twice"),
    "named twice in two groups": ([["stem.0", "stem.1"], ["stem.0", "stem.2"]], "'stem.0' is named twice"),
    "second group fails": ([["stem.0", "stem.1", "stem.2"], ["block.conv", "nan_mean"]], "nan_mean|non-finite"),
    "second group is not there": ([["stem.0", "stem.1"], ["block.conv", "block.no"]], "'block.no'"),
    "parametrized weight": (["spectral", "bn"], "parametrization"),
    "weight made by a hook": (["old_weight_norm", "bn"], "parametrization"),
    "pruned": (["pruned", "bn"], "parametrization"),
    "parametrized bias": (["odd_bias", "bn"], "parametrization"),
    "parametrized gamma": (["stem.0", "odd_gamma"], "parametrization"),
    "patched forward": (["patched", "bn"], "cannot fuse Conv2d -> BatchNorm2d"),
    "patched norm": (["stem.0", "patched_bn"], "BatchNorm2d does not fit there"),
}


@pytest.mark.parametrize("fuse", [fuse_modules, fuse_modules_qat])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_call_says_why_and_changes_nothing(case: str, fuse: Any) -> None:
    names, message = FAILURES[case]
    model = Model()
    before = snapshot(model)
    with pytest.raises(FusionError, match=message) as error:
        fuse(model, names, inplace=True)
    if names:
        named = names if isinstance(names[0], str) else names[-1]
        assert all(str(n) in str(error.value) for n in named)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)), "the LazyConv2d is lazy and has not seen data yet"),
        ((nn.Conv2d(4, 4, 1), nn.LazyBatchNorm2d()), "the LazyBatchNorm2d is lazy and has not seen data yet"),
        ((nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, device="meta")), "it is on meta, the convolution on cpu"),
    ],
    ids=["lazy anchor", "lazy norm", "devices"],
)
def test_modules_without_values_are_refused(modules: tuple[nn.Module, ...], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        fuse_known_modules(list(modules))


@pytest.mark.parametrize("case", [c for c in FAILURES if any(w in c for w in ("second group", "shared", "no names"))])
def test_a_failed_call_through_pytorchs_function_changes_nothing(case: str) -> None:
    names, message = FAILURES[case]
    model = Model()
    before = snapshot(model)
    with pytest.raises(FusionError, match=message if names else "cannot fuse"):
        fuse_by_pytorch(model, names, inplace=True)
    assert_unchanged(model, before)


def test_a_model_that_cannot_be_copied_as_a_part_of_it_is_lazy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.LazyConv2d(4, 1)).eval()
    with pytest.raises(FusionError, match=r"'2' \(LazyConv2d\) is lazy .* run the model's forward once first"):
        fuse_modules(model, ["0", "1"])
    fuse_modules(model, ["0", "1"], inplace=True)
    assert model[0]._get_name() == "ConvReLU2d"


def test_a_failed_call_of_the_list_form_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid())
    before = snapshot(net)
    for modules in ([], [net[0]], list(net), [net[0], net[0]], [net[1], net[0]]):
        with pytest.raises(FusionError):
            fuse_known_modules(modules)
    assert_unchanged(net, before)


def test_values_too_large_for_half_precision_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).half()
    net[0].weight.data.fill_(300.0)
    net[1].running_var.fill_(0.0)
    before = snapshot(net)
    with pytest.raises(FusionError, match="overflow torch.float16"):
        fuse_modules(net, ["0", "1"], inplace=True)
    assert_unchanged(net, before)
    fuse_modules_qat(net, ["0", "1"])
    fuse_modules(net.float(), ["0", "1"])


# -- subclasses -------------------------------------------------------------------------------------------------------------


class SameConv(nn.Conv2d):
    """A subclass that computes the same."""


class SquareConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class SameNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None: ...


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class DoublingReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_subclasses_that_compute_the_same_fuse() -> None:
    net = randomize(nn.Sequential(SameConv(2, 2, 1), SameNorm(2), nn.ReLU())).eval()
    assert run_both(fuse_modules(net, ["0", "1", "2"]), net, torch.randn(2, 2, 3, 3)) == 0


@pytest.mark.parametrize(
    "modules",
    [
        (SquareConv(2, 2, 1), nn.BatchNorm2d(2)),
        (StandardizedConv(2, 2, 1), nn.BatchNorm2d(2)),
        (nn.Conv2d(2, 2, 1), DoublingNorm(2)),
        (nn.Conv2d(2, 2, 1), DoublingReLU()),
    ],
    ids=lambda modules: "+".join(type(m).__name__ for m in modules),
)
def test_subclasses_that_compute_something_else_do_not(modules: tuple[nn.Module, ...]) -> None:
    with pytest.raises(FusionError, match="cannot fuse"):
        fuse_known_modules(list(modules))


def test_statistics_absent_is_a_reason_for_every_norm() -> None:
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        with pytest.raises(FusionError, match=f"the {norm.__name__}: it has no running statistics"):
            fuse_known_modules([nn.Conv2d(2, 2, 1), norm(2, track_running_stats=False)])
