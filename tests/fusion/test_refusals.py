"""What fusing by graph leaves alone: each case keeps the model's numbers and gives a reason that names the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fusion.networks import assert_unchanged, differing, randomize, snapshot
from horizon_plugin_pytorch.fusion import FusionReport, analyze
from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub, fuse_fx


class Net(nn.Module):
    """Parts to write a forward with."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.inplace = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.narrow, self.spatial = nn.Conv2d(4, 1, 1), nn.AdaptiveAvgPool2d(1)
        self.quant, self.dequant, self.flat, self.silu = (
            QuantStub(),
            DeQuantStub(),
            nn.Flatten(2),
            nn.SiLU(inplace=True),
        )
        self.twice, self.swish, self.same, self.pair = Twice(), Swish(), Same(), Pair()
        self.unflat, self.nested = nn.Unflatten(2, (6, 6)), nn.Sequential(nn.ReLU(inplace=True))
        self.odd, self.identity = Odd(), nn.Identity()
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b += a
        return a


class Odd(nn.Module):
    """Cannot be traced, and works in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if x.sum() > -1e9 else x


def fused_equals(
    model: nn.Module, *, training: bool = False, example_inputs: Any = None, is_qat: bool = False
) -> FusionReport:
    """Fuse, compare with the unfused model (which must stay as it was), and return the report."""
    randomize(model).train(training)
    before = snapshot(model)
    assert_report = analyze(model, example_inputs, is_qat=is_qat)
    fused = fuse_fx(model, example_inputs=example_inputs, is_qat=is_qat)
    assert_unchanged(model, before)
    assert assert_report == fused.fusion_report
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        a, b = fused(x.clone()), model(x.clone())
    assert differing(a, b) == 0
    return fused.fusion_report


def misses(report: FusionReport) -> list[tuple[str, tuple[str, ...]]]:
    return [(m.kind, m.modules) for m in report.missed]


# -- in-place hazards -------------------------------------------------------------------------------------------------------
# The convolution would run where the add is. `w` has memory of its own, so that a test's input stays as it is.

OVERWRITTEN: dict[str, Callable[[Net, Tensor, Tensor], Any]] = {
    "method": lambda m, w, y: w.mul_(2),
    "method, relu_": lambda m, w, y: w.relu_(),
    "function": lambda m, w, y: torch.relu_(w),
    "function, inplace": lambda m, w, y: F.relu(w, inplace=True),
    "function, inplace by position": lambda m, w, y: F.silu(w, True),
    "clamp_": lambda m, w, y: w.clamp_(0, 1),
    "copy_": lambda m, w, y: w.copy_(w * 2),
    "out=": lambda m, w, y: torch.mul(w, 2, out=w),
    "__imul__": lambda m, w, y: w.__imul__(2),
    "module": lambda m, w, y: m.inplace(w),
    "module, SiLU": lambda m, w, y: m.silu(w),
    "module in a Sequential": lambda m, w, y: m.nested(w),
    "user's module": lambda m, w, y: m.twice(w),
    "user's module, swish": lambda m, w, y: m.swish(w),
    "user's module, second argument": lambda m, w, y: m.pair(w * 3, w),
    "user's module, not traceable": lambda m, w, y: m.odd(w),
    "through a user's module": lambda m, w, y: m.same(w).mul_(2),
    "through a stub": lambda m, w, y: m.quant(w).mul_(2),
    "through nn.Flatten": lambda m, w, y: m.flat(w).relu_(),
    "through nn.Unflatten": lambda m, w, y: m.unflat(w.flatten(2)).mul_(2),
    "through a view": lambda m, w, y: w.view(2, -1).mul_(2),
    "through chunk": lambda m, w, y: w.chunk(2, 1)[0].mul_(2),
    "through a slice": lambda m, w, y: w[:, 1:].mul_(2),
    "through select": lambda m, w, y: w.select(1, 0).mul_(2),
    "through .T": lambda m, w, y: w.mT.mul_(2),
    "through .data": lambda m, w, y: w.data.mul_(2),
    "through swapaxes": lambda m, w, y: w.swapaxes(1, 2).mul_(2),
    "through movedim": lambda m, w, y: torch.movedim(w, 1, 2).mul_(2),
    "through unflatten": lambda m, w, y: w.unflatten(1, (2, 2)).mul_(2),
    "through ravel": lambda m, w, y: torch.ravel(w).mul_(2),
    "through contiguous": lambda m, w, y: w.contiguous().mul_(2),
    "through to": lambda m, w, y: w.to(torch.float32).mul_(2),
    "through expand": lambda m, w, y: w.expand(2, 4, 6, 6).mul_(2),
    "through dropout in eval mode": lambda m, w, y: F.dropout(w, 0.5, m.training).mul_(2),
    "through detach": lambda m, w, y: w.detach().mul_(2),
}


def augmented(m: Net, w: Tensor, y: Tensor) -> None:
    w *= 2


def augmented_slice(m: Net, w: Tensor, y: Tensor) -> None:
    w[:, 0] += 1


OVERWRITTEN |= {"*=": augmented}


@pytest.mark.parametrize("how", OVERWRITTEN)
@pytest.mark.parametrize("keyword", [False, True], ids=["conv(x)", "conv(input=x)"])
def test_the_input_is_overwritten_before_the_add(how: str, keyword: bool) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        w = x * 1
        y = m.conv(input=w) if keyword else m.conv(w)
        OVERWRITTEN[how](m, w, y)
        return y + w

    report = fused_equals(Net(forward))
    assert report.groups == []
    (miss,) = [m for m in report.missed if m.modules == ("conv", "add")]
    assert miss.kind == "add" and "overwrites the input of 'conv' before the add" in miss.reason


def test_an_assignment_to_a_slice_is_not_traceable_and_stays_right() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        w = x * 1
        y = m.conv(w)
        augmented_slice(m, w, y)
        return y + w

    report = fused_equals(Net(forward))
    assert report.groups == [] and report.untraced[0].module == ""


def test_overwritten_before_the_convolution_or_after_the_add_is_no_hazard() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        w = (x * 1).relu_()
        z = m.conv(w) + w
        w.mul_(2)
        return z * w

    assert fused_equals(Net(forward)).count() == {"ConvAdd2d": 1}


def test_overwriting_something_else_is_no_hazard() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        w, v = x * 1, x * 3
        y = m.conv(w)
        v.mul_(2)
        return y + w * v

    assert fused_equals(Net(forward)).count() == {"ConvAdd2d": 1}


ADDED_INTO: dict[str, Callable[[Net, Tensor, Tensor], Any]] = {
    "itself": lambda m, w: w,
    "a view": lambda m, w: w.view(2, -1),
    "a slice": lambda m, w: w[:, :2],
    "mT": lambda m, w: w.mT,
    "a user's module": lambda m, w: m.same(w),
    "a stub": lambda m, w: m.dequant(w),
    "nn.Flatten": lambda m, w: m.flat(w),
    "nn.Identity": lambda m, w: m.identity(w),
}


def iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


@pytest.mark.parametrize("how", ADDED_INTO)
@pytest.mark.parametrize("add", [iadd, lambda a, b: a.add_(b)], ids=["+=", "add_"])
def test_adding_in_place_into_an_operand_that_is_read_later(how: str, add: Callable[..., Tensor]) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        w = x * 2
        alias = ADDED_INTO[how](m, w)
        z = add(w, m.conv(x))
        return z.flatten(1).mean() * alias.flatten(1)

    (miss,) = fused_equals(Net(forward)).missed
    assert miss.kind == "add" and miss.modules[0] == "conv" and "read again later" in miss.reason


def test_adding_in_place_into_the_convolutions_output_or_a_dead_operand_fuses() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        y += x
        w = y * 2
        w += m.conv2(y)
        return w

    assert fused_equals(Net(forward)).count() == {"ConvAdd2d": 2}


@pytest.mark.parametrize("operation", ["iadd", "isub", "imul", "itruediv"])
def test_augmented_assignment_reaches_other_names_of_the_tensor(operation: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        w = x.abs() + 1
        alias = w
        if operation == "iadd":
            w += 3
        elif operation == "isub":
            w -= 3
        elif operation == "imul":
            w *= 3
        else:
            w /= 3
        return F.relu(m.conv(alias)) + alias

    assert fused_equals(Net(forward)).count() == {"ConvReLU2d": 1}


def test_augmented_assignment_of_a_size_does_not_reach_other_names() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        height = x.size(2)
        before = height
        height += 2
        return F.relu(m.conv(F.interpolate(x, size=(height, before))))

    assert fused_equals(Net(forward)).count() == {"ConvReLU2d": 1}


# -- reasons ----------------------------------------------------------------------------------------------------------------


def test_a_convolution_called_twice() -> None:
    report = fused_equals(Net(lambda m, x: m.relu(m.bn(m.conv(x))) + m.bn2(m.conv(x * 2))))
    assert report.groups == []
    kinds = {(miss.kind, miss.modules, miss.shared) for miss in report.missed}
    assert {("norm", ("conv", "bn"), "conv"), ("norm", ("conv", "bn2"), "conv")} <= kinds
    assert all("'conv' is called 2 times" in miss.reason for miss in report.missed if miss.kind == "norm")
    assert all(__file__ in miss.reason for miss in report.missed if miss.kind == "norm")


def test_a_norm_called_twice() -> None:
    report = fused_equals(Net(lambda m, x: m.relu(m.bn(m.conv(x))) * m.relu(m.bn(m.conv2(x)))))
    assert report.groups == []
    assert all("'bn' is called 2 times" in miss.reason and miss.shared == "bn" for miss in report.missed)


def test_a_module_registered_twice() -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x))))
    net.other_name = net.conv
    report = fused_equals(net)
    assert report.groups == [] and "'conv' is the same module as 'other_name'" in report.missed[0].reason


def test_shared_activations_are_no_obstacle() -> None:
    report = fused_equals(Net(lambda m, x: m.relu(m.conv2(m.relu(m.bn(m.conv(x)))) + x)))
    assert report.count() == {"ConvAddReLU2d": 1, "ConvBNReLU2d": 1}


@pytest.mark.parametrize(
    ("forward", "reader"),
    [
        (lambda m, x: m.bn(y := m.conv(x)) + y, "'bn', 'add'"),
        (lambda m, x: torch.cat([m.bn(y := m.conv(x)), y], 1), "'bn', 'cat'"),
        (lambda m, x: (m.bn(y := m.conv(x)), y)[0] + y.mean(), "'bn', 'mean'"),
    ],
)
def test_several_consumers(forward: Callable[..., Any], reader: str) -> None:
    report = fused_equals(Net(forward))
    (miss,) = [m for m in report.missed if m.kind == "norm"]
    assert miss.modules == ("conv", "bn")
    assert miss.reason == f"the output of 'conv' is used by 2 consumers: {reader}"


def test_the_models_output_is_a_consumer() -> None:
    model = Net(lambda m, x: {"y": (y := m.conv(x)), "z": m.relu(y)})
    report = analyze(model)
    assert report.groups == []
    assert report.missed[0].reason == "the output of 'conv' is used by 2 consumers: 'relu', the model's output"


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: torch.add(m.conv(x), x, alpha=2), "it scales its second operand (alpha=2)"),
        (lambda m, x: m.conv(x).add(x, alpha=0.5), "it scales its second operand (alpha=0.5)"),
        (lambda m, x: m.conv(x) + 1.0, "it adds a constant (1.0)"),
        (lambda m, x: 2 + m.conv(x), "it adds a constant (2)"),
        (lambda m, x: (y := m.conv(x)) + y, "both operands are the same tensor"),
        (lambda m, x: torch.add(m.conv(x), x, out=torch.empty(0)), "it writes into a tensor given as out="),
    ],
)
def test_adds_that_are_something_else(forward: Callable[..., Any], reason: str) -> None:
    report = fused_equals(Net(forward))
    assert report.groups == []
    (miss,) = report.missed
    assert miss.kind == "add" and miss.modules[0] == "conv" and miss.reason.startswith(reason)


@pytest.mark.parametrize("operand", ["spatial", "narrow"])
@pytest.mark.parametrize("order", ["conv first", "conv second"])
def test_a_broadcasting_residual_is_refused_where_shapes_are_known(operand: str, order: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        other = m.spatial(x) if operand == "spatial" else x[:, :1]
        return m.conv(x) + other if order == "conv first" else other + m.conv(x)

    report = fused_equals(Net(forward), example_inputs=torch.randn(2, 4, 6, 6))
    (miss,) = report.missed
    assert miss.kind == "add" and "it broadcasts (2, " in miss.reason and "(2, 4, 6, 6)" in miss.reason
    fused_equals(Net(forward))  # without inputs it may fuse, and stays right


def test_a_convolution_that_is_the_one_broadcast() -> None:
    forward = lambda m, x: m.narrow(x) + m.relu(x)  # noqa: E731
    report = fused_equals(Net(forward), example_inputs=torch.randn(2, 4, 6, 6))
    assert report.groups == [] and "it broadcasts (2, 4, 6, 6)" in report.missed[0].reason
    fused_equals(Net(forward))


def test_operands_of_different_dtypes() -> None:
    report = fused_equals(Net(lambda m, x: m.conv(x) + x.double()), example_inputs=torch.randn(2, 4, 6, 6))
    (miss,) = report.missed
    assert miss.reason == "its operands differ in dtype: torch.float32 and torch.float64 ('double')"


def test_a_conversion_between_the_stages() -> None:
    report = fused_equals(Net(lambda m, x: m.relu(m.conv(x).double()).float()))
    assert report.groups == []


def test_example_inputs_that_the_model_does_not_run_on_are_noted() -> None:
    report = analyze(Net(lambda m, x: m.conv(x) + x).eval(), torch.randn(2, 3, 6, 6))
    assert "broadcasting adds may not be seen" in report.notes[0]


def test_a_norm_on_something_else() -> None:
    report = fused_equals(Net(lambda m, x: m.conv2(m.bn(torch.cat([m.conv(x)[:, :2], m.relu(x)[:, :2]], 1)))))
    (miss,) = [m for m in report.missed if m.kind == "norm"]
    assert miss.modules == ("bn",) and miss.reason == "its input is 'cat', not a convolution's or linear layer's output"
    report = fused_equals(Net(lambda m, x: m.bn2(m.bn(m.conv(x)))))
    (miss,) = [m for m in report.missed if m.kind == "norm"]
    assert miss.modules == ("bn2",) and "its input is 'bn'" in miss.reason
    report = fused_equals(Net(lambda m, x: m.bn(x)))
    assert misses(report) == [("norm", ("bn",))]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: setattr(m, "bn", nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
        (lambda m: setattr(m, "bn", nn.BatchNorm2d(4, device="cpu").requires_grad_(False)), None),
        (lambda m: setattr(m, "bn", nn.InstanceNorm2d(4, track_running_stats=True)), "-"),
        (lambda m: setattr(m, "bn", nn.GroupNorm(2, 4)), "-"),
        (lambda m: parametrize.register_parametrization(m.conv, "weight", nn.Tanh()), "parametrization"),
        (lambda m: parametrize.register_parametrization(m.conv, "bias", nn.Tanh()), "parametrization"),
        (lambda m: parametrize.register_parametrization(m.bn, "weight", nn.Tanh()), "parametrization"),
        (torch.no_grad()(lambda m: prune.l1_unstructured(m.conv, "weight", 0.5)), "parametrization"),
        (lambda m: torch.nn.utils.spectral_norm(m.conv), "parametrization"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.conv), "parametrization"),
    ],
)
def test_a_norm_that_cannot_be_absorbed(spoil: Callable[[Any], Any], reason: str | None) -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x))))
    spoil(net)
    report = fused_equals(net)
    if reason is None:
        assert report.count() == {"ConvBNReLU2d": 1}
        return
    assert report.groups == []
    assert reason == "-" or (report.missed[0].modules == ("conv", "bn") and reason in report.missed[0].reason)


def test_patched_forwards_are_not_taken_for_stock_ones() -> None:
    for name, factor in (("conv", 3), ("bn", 2), ("relu", 5)):
        net = Net(lambda m, x: m.relu(m.bn(m.conv(x))))
        module = getattr(net, name)
        module.forward = lambda x, stock=type(module).forward, m=module, k=factor: stock(m, x) * k  # noqa: B008
        before = module.forward
        report = fused_equals(net)
        assert all(name not in group.modules for group in report.groups)
        assert module.forward is before


class SquareConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


def test_subclasses_with_a_forward_of_their_own() -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x))))
    net.conv = SquareConv(4, 4, 1)
    report = fused_equals(net)
    assert report.groups == [] and any(m.kind == "norm" and "bn" in m.modules for m in report.missed)


class MaskedConv(nn.Conv2d):
    """Returns a length beside its output, and cannot be traced."""

    def forward(self, input: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return super().forward(input), len(input)


def test_subclasses_that_return_more_than_their_output_are_named() -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x)[0])))
    net.conv = MaskedConv(4, 4, 1)
    (miss,) = (m for m in fused_equals(net).missed if m.kind == "norm")
    assert miss.modules == ("conv", "bn") and miss.reason == "MaskedConv 'conv' has a forward of its own"


class DoublingReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_what_a_subclass_does_after_the_stock_forward_is_kept() -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x))))
    net.relu = DoublingReLU()
    fused_equals(net)


# -- parameters that are read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.bn(m.conv(x)) * m.conv.weight.mean(),
        lambda m, x: m.bn(m.conv(x)) + m.conv.bias.mean(),
        lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.mean(),
        lambda m, x: m.bn(m.conv(x)) + m.bn.weight.sum(),
        lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight),
    ],
)
def test_parameters_the_forward_reads(forward: Callable[..., Any]) -> None:
    report = fused_equals(Net(forward))
    assert report.groups == []
    (miss,) = [m for m in report.missed if m.kind == "norm"]
    assert "are read by the forward, too" in miss.reason


def test_a_tied_weight_is_untied() -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x))) + m.conv2(x))
    net.conv2.weight = net.conv.weight
    fused_equals(net)


# -- hooks ------------------------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", ["conv", "bn", "relu"])
@pytest.mark.parametrize("add", [False, True])
def test_hooks_inside_are_refused_and_those_at_the_ends_stay(place: str, hook: str, add: bool) -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x)) + x) if add else m.relu(m.bn(m.conv(x))))
    HOOKS[hook](getattr(net, place))
    report = fused_equals(net)
    stages = ["conv", "bn", *(["add"] if add else []), "relu"]
    if hook == "forward":  # ends a group at this place
        fused = stages[: stages.index(place) + 1]
    elif hook == "forward pre" and not (
        place == "conv" and add
    ):  # begins one; before an add the anchor's place is called no more
        fused = stages if place == "conv" else stages[: stages.index(place)]
    elif place == "conv":
        fused = stages[:2] if hook == "forward pre" else []
    else:
        fused = stages[: stages.index(place)]
    groups = [list(g.modules) for g in report.groups]
    assert groups == ([fused] if len(fused) > 1 else [])
    if fused != stages:
        assert any(f"hook on '{place}'" in m.reason or "a hook on its" in m.reason for m in report.missed)


@pytest.mark.parametrize("add", [False, True])
def test_hooks_at_the_ends_see_the_same_values(add: bool) -> None:
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x)) + x) if add else m.relu(m.bn(m.conv(x)))).eval()
    seen: list[tuple[str, Tensor]] = []
    if not add:
        net.conv.register_forward_pre_hook(lambda m, a: seen.append(("in", a[0])))
    net.relu.register_forward_hook(lambda m, a, o: seen.append(("out", o)))
    x = torch.randn(2, 4, 6, 6)
    net(x)
    expected = seen[:]
    seen.clear()
    fused = fuse_fx(net)
    assert len(fused.fusion_report.groups) == 1
    fused(x)
    assert [n for n, _ in seen] == [n for n, _ in expected]
    assert all(differing(a, b, scale=1.0) == 0 for (_, a), (_, b) in zip(seen, expected, strict=True))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def test_hooks_on_a_block_leave_it_whole_and_its_inside_fuses() -> None:
    model = nn.Sequential(Inner(), nn.Conv2d(4, 4, 1), nn.ReLU())
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    report = fused_equals(model)
    assert report.count() == {"ConvBNAddReLU2d": 1, "ConvReLU2d": 1}
    assert report.untraced[0].module == "0" and "forward hooks" in report.untraced[0].reason
    assert len(seen) == 2
