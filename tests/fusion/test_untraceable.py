"""Models that symbolic tracing refuses: fused in their largest traceable parts, equal to the unfused model, and said so."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusion.networks import assert_unchanged, differing, randomize, snapshot, states_differ
from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import FusionReport, analyze
from horizon_plugin_pytorch.quantization import fuse_fx


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


class Branching(nn.Module):
    """Control flow on values around its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > -1e9 else self.b(x)


def stops_tracing(x: Tensor) -> None:
    if x.sum() > 1e9:
        raise AssertionError


def fused_equals(
    model: nn.Module, *inputs: Any, training: bool = False, **kwargs: Any
) -> tuple[nn.Module, FusionReport]:
    randomize(model).train(training)
    inputs = inputs or (torch.randn(2, 4, 6, 6),)
    before, reference = snapshot(model), copy.deepcopy(model)
    report = analyze(model, **kwargs)
    fused = fuse_fx(model, **kwargs)
    assert_unchanged(model, before)
    assert fused.fusion_report == report
    with torch.no_grad():
        a, b = fused(*inputs), reference(*inputs)
    for actual, expected in zip(*(out if isinstance(out, (tuple, list)) else (out,) for out in (a, b)), strict=True):
        assert differing(actual, expected) == 0
    fused.load_state_dict(model.state_dict())
    with torch.no_grad():
        a = fused(*inputs)
    for actual, expected in zip(*(out if isinstance(out, (tuple, list)) else (out,) for out in (a, b)), strict=True):
        assert differing(actual, expected) == 0
    return fused, report


# -- where the untraceable part is ------------------------------------------------------------------------------------------


def test_control_flow_in_the_root() -> None:
    fused, report = fused_equals(Branching())
    assert type(fused) is Branching and isinstance(fused.a, fx.GraphModule) and isinstance(fused.b, fx.GraphModule)
    assert report.count() == {"ConvBNAddReLU2d": 2}
    assert [g.modules[:2] for g in report.groups] == [("a.conv", "a.bn"), ("b.conv", "b.bn")]
    (untraced,) = report.untraced
    assert untraced.module == "" and untraced.type == "Branching" and "control flow" in untraced.reason


def test_control_flow_in_a_child() -> None:
    fused, report = fused_equals(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Branching(), nn.Conv2d(4, 4, 1), nn.ReLU())
    )
    assert isinstance(fused, fx.GraphModule)
    assert report.count() == {"ConvBNAddReLU2d": 2, "ConvBN2d": 1, "ConvReLU2d": 1}
    assert [(u.module, u.type) for u in report.untraced] == [("2", "Branching")]


def test_control_flow_deep_inside() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.block = nn.ModuleDict({"branch": Branching()}), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.inner["branch"](x))

    _, report = fused_equals(nn.Sequential(Middle(), Block()))
    assert report.count() == {"ConvBNAddReLU2d": 4}
    assert [u.module for u in report.untraced] == ["0.inner.branch"]


def test_nothing_fusable_inside_is_not_reported() -> None:
    class Check(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > -1e9 else x

    _, report = fused_equals(nn.Sequential(Block(), Check(), Block()))
    assert report.count() == {"ConvBNAddReLU2d": 2} and report.untraced == []


def test_a_shared_part_is_fused_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.block(self.block(x))

    _, report = fused_equals(Twice())
    assert report.count() == {"ConvBNAddReLU2d": 1}


def test_a_part_registered_under_two_names() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Block()
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.other(self.one(x))

    fused_equals(Alias())


# -- parents that do more than call ---------------------------------------------------------------------------------------------


class Parent(nn.Module):
    """Two blocks by name, in a ModuleList, a ModuleDict and a Sequential; the subclasses' forwards use them in their ways."""

    def __init__(self) -> None:
        super().__init__()
        self.b0, self.b1 = Block(), Block()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.table = nn.ModuleDict({"x": Block(), "y": Block()})
        self.body = nn.Sequential(OrderedDict(first=Block(), second=Block()))
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.listed = [self.b0.conv]
        self.head = nn.Conv2d(4, 4, 1)


def run_conv(block: nn.Module, x: Tensor) -> Tensor:
    return block.conv(x)


def run_first(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return blocks[0].conv(x)


class CallsByName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b1(self.b0(x))


class IteratesOverAList(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for block in self.blocks:
            x = block(x)
        return x


class Enumerates(Parent):
    def forward(self, x: Tensor) -> Any:
        stops_tracing(x)
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x) * (i + 1)
            outs.append(x)
        return outs


class IndexesAndCalls(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.blocks[0](x) + self.blocks[-1](x)


class IteratesOverADict(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for _, block in self.table.items():
            x = block(x)
        return self.table["x"](x)


class CallsASequential(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.body(self.stem(x))


class IteratesOverASequential(Parent):
    """Taps every intermediate result."""

    def forward(self, x: Tensor) -> Any:
        stops_tracing(x)
        outs = []
        for module in self.stem:
            x = module(x)
            outs.append(x)
        return outs


class CallsAndIterates(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        y = self.stem(x)
        for module in self.stem:
            y = y + module(x)
        return y


class IndexesASequential(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.body[0](x) + self.body(x) + self.body.first(x)


class SlicesASequential(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.stem[:2](x) + self.stem(x)


class TapsThroughModules(Parent):
    def forward(self, x: Tensor) -> Any:
        stops_tracing(x)
        outs = []
        for module in self._modules["stem"]._modules.values():
            x = module(x)
            outs.append(x)
        return outs


class LooksIntoByName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0.conv(x) + self.b0(x)


class LooksIntoOnly(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0.relu(self.b0.conv(x))


class LooksIntoInALoop(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for block in self.blocks:
            x = block.relu(block.conv(x))
        return x


class LooksIntoByIndex(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.blocks[0].conv(x) + self.blocks[1](x)


class LooksIntoASequential(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.body[0].conv(x) + self.body(x)


class LooksIntoBySetattrName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for i in range(2):
            x = getattr(self, f"b{i}").conv(x)
        return x


class LooksIntoChildren(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for module in self.children():
            if hasattr(module, "conv"):
                x = module.conv(x)
        return x


class LooksIntoModules(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                x = module(x)
        return x


class LooksIntoWithAHelper(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        for block in self.blocks:
            x = run_conv(block, x)
        return x + run_first(self.blocks, x) + run_conv(self.b0, x)


class LooksIntoWithAMethod(Parent):
    def peek(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.peek(self.b0, x) + self.b0(x)


class MethodOfItsOwn(Parent):
    def extra(self, x: Tensor) -> Tensor:
        return self.b0.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.extra(x) + self.b0(x)


class AnotherNameForSelf(Parent):
    def forward(this, x: Tensor) -> Tensor:
        stops_tracing(x)
        return this.b0.conv(x) + this.b0(x)


class SelfUnderAnotherName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        model = self
        return model.b0.conv(x) + model.b0(x)


class BlockUnderAnotherName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        block = self.b0
        return block.conv(x) + block(x)


class Comprehension(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return sum(block.conv(x) for block in self.blocks) + self.blocks[0](x)


class ComprehensionThatCalls(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return sum(block(x) for block in self.blocks)


class AListOfModules(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.listed[0](x) + self.b0(x)


class CallsForward(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0.forward(x)


class ReadsAWeight(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0(x) * self.b0.conv.weight.mean()


class Functionally(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0(x) + F.conv2d(x, self.b0.conv.weight, self.b0.conv.bias, padding=1)


class Nested(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)

        def step(block: nn.Module, y: Tensor) -> Tensor:
            return block.conv(y)

        return step(self.b0, x) + (lambda b: b.conv(x))(self.b1) + self.b1(x)


class Checkpointed(Parent):
    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return torch.utils.checkpoint.checkpoint(self.b0, x, use_reentrant=False)


class Recursive(Parent):
    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        stops_tracing(x)
        return self.b0(x) if depth == 2 else self.forward(self.b1(x), depth + 1)


class Inherited(LooksIntoByName):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b1(x)


class InheritedCall(CallsByName):
    def extra(self, x: Tensor) -> Tensor:
        return self.b0.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return CallsByName.forward(self, x) + self.extra(x)


class Closure(Parent):
    def __init__(self) -> None:
        super().__init__()
        block = self.b0
        self.function = lambda x: block.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0(x) + self.function(x)


class ItsOwnCall(Parent):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + self.b0.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.b0(x)


GROUPS: dict[type[nn.Module], int | None] = {
    CallsByName: 2,
    IteratesOverAList: 2,
    Enumerates: 2,
    IndexesAndCalls: 2,
    IteratesOverADict: 2,
    CallsASequential: 3,
    IteratesOverASequential: 0,
    CallsAndIterates: 0,
    IndexesASequential: 2,
    ComprehensionThatCalls: None,
    LooksIntoByName: 0,
    LooksIntoOnly: 0,
    LooksIntoInALoop: 0,
    TapsThroughModules: 0,
}
"""How many groups are found, of those in modules that are called at all; where it is not said, what counts is that it is right."""

PARENTS = [
    cls for cls in vars().copy().values() if isinstance(cls, type) and issubclass(cls, Parent) and cls is not Parent
]


@pytest.mark.parametrize("cls", PARENTS, ids=lambda cls: cls.__name__)
def test_what_a_parent_does_with_its_parts(cls: type[nn.Module]) -> None:
    _, report = fused_equals(cls())
    assert "" in [u.module for u in report.untraced]
    if (expected := GROUPS.get(cls)) is not None:
        called = [g for g in report.groups if not g.name.startswith("head")]
        assert len(called) == expected


class Shares(nn.Module):
    """A convolution that two separately traced parts call, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()
        self.b.conv = self.a.conv

    def forward(self, x: Tensor) -> Tensor:
        stops_tracing(x)
        return self.a(x) + self.b(x)


def test_a_module_shared_by_two_parts_is_left_alone() -> None:
    _, report = fused_equals(Shares())
    assert report.groups == []
    assert {m.modules[0] for m in report.missed} >= {"a.conv", "b.conv"} and all(
        m.shared for m in report.missed if m.kind == "norm"
    )
    assert any("'a.conv' is the same module as 'b.conv'" in m.reason for m in report.missed)


def test_a_module_shared_by_a_part_and_its_parent() -> None:
    class Net(Shares):
        def __init__(self) -> None:
            super().__init__()
            self.head = self.b.conv

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.head(self.a(x))

    _, report = fused_equals(Net())
    assert report.groups == []


def test_a_module_shared_by_the_traced_model_and_an_untraceable_child() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.bn = Branching(), nn.BatchNorm2d(4)
            self.conv = self.child.a.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.child(x)))

    fused_equals(Net())


def test_positions_in_a_sequential_are_not_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Block(), Block(), Block())[1:]  # its names are '1' and '2'

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.body[1].conv(x) + self.body(x)

    fused_equals(Net())


def test_a_model_whose_call_or_forward_is_not_its_classes() -> None:
    class Called(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    _, report = fused_equals(Called(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert report.groups == [] and report.untraced[0].reason == "Called has a __call__ of its own"

    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    model.forward = lambda x: model[0](x) - 1
    fused = fuse_fx(model)
    x = torch.randn(2, 4, 6, 6)
    assert differing(fused(x), model(x)) == 0
    assert fused.fusion_report.untraced[0].reason == "its forward is replaced on the module itself"

    _, report = fused_equals(nn.Sequential(Called(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU()))


def test_a_property_of_a_part_can_reach_inside() -> None:
    class WithProperty(Block):
        @property
        def inner(self) -> nn.Module:
            return self.conv

        def peek(self, x: Tensor) -> Tensor:
            return self.conv(x)

    class Net(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.block, self.how = WithProperty(), how

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.block(x) + (self.block.inner(x) if self.how == "property" else self.block.peek(x))

    for how in ("property", "method"):
        fused_equals(Net(how))


def test_a_lower_module_is_looked_into_from_the_top() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Middle()

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.middle(x) + self.middle.block.conv(x)

    fused_equals(Top())


def test_source_that_is_not_there_is_left_alone() -> None:
    namespace: dict[str, Any] = {"nn": nn, "Block": Block, "stops_tracing": stops_tracing}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.b0 = Block()\n"
        "    def forward(self, x):\n"
        "        stops_tracing(x)\n"
        "        return self.b0.conv(x) + self.b0(x)\n",
        namespace,
    )
    _, report = fused_equals(namespace["Hidden"]())
    assert report.groups == [] and report.untraced[0].module == ""


def test_a_patched_forward_of_the_root() -> None:
    model = Branching()
    model.forward = lambda x: model.a.conv(x) + model.a(x) if x.sum() > -1e9 else x
    randomize(model).eval()
    x = torch.randn(2, 4, 6, 6)
    fused = fuse_fx(model)
    assert differing(fused(x), model(x)) == 0


def test_the_output_of_a_fused_anchor_does_not_escape() -> None:
    """Whatever was not seen beforehand raises instead of computing something else."""
    model = Branching().eval()
    fused = fuse_fx(model)
    with pytest.raises(FusionError, match="the output of 'conv' is read by|the output of"):
        fused.a.conv(torch.randn(2, 4, 6, 6)) + 1


# -- the fused parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_qat", [False, True])
def test_fused_parts_copy_pickle_and_train(is_qat: bool) -> None:
    model = randomize(Branching()).train(is_qat)
    fused = fuse_fx(model, is_qat=is_qat)
    x = torch.randn(2, 4, 6, 6)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(copied) is Branching and copied.fusion_report == fused.fusion_report
        assert differing(copied(x), fused(x), tolerance=0.0) == 0


def test_kept_norms_of_fused_parts_train_like_the_model() -> None:
    model = randomize(Branching()).train()
    fused = fuse_fx(model, is_qat=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (fused, model)]
    for _ in range(3):
        x = torch.randn(2, 4, 6, 6)
        for m, optimizer in zip((fused, model), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            m(x).square().mean().backward()
            optimizer.step()
        assert states_differ(fused, model) == {}


def test_several_untraceable_levels_are_all_in_the_report() -> None:
    class Level(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.block = inner, Block()

        def forward(self, x: Tensor) -> Tensor:
            stops_tracing(x)
            return self.block(self.inner(x))

    _, report = fused_equals(Level(Level(Branching())))
    assert report.count() == {"ConvBNAddReLU2d": 4}
    assert [u.module for u in report.untraced] == ["", "inner", "inner.inner"]


# -- the training mode --------------------------------------------------------------------------------------------------------


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.aux = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.bn(self.conv(x)))
        if self.training:
            return y, self.aux(x)
        return y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", [FunctionalDropout, Auxiliary])
def test_a_forward_that_depends_on_the_mode_is_right_in_both_or_refuses_the_other(
    cls: type[nn.Module], training: bool
) -> None:
    model = randomize(cls()).train(training)
    fused = fuse_fx(model, is_qat=True)
    x = torch.randn(2, 4, 5, 5)
    for mode in (training, not training):
        try:
            fused.train(mode)
        except FusionError as error:
            assert mode != training and "forward is another one in" in str(error)
            continue
        model.train(mode)
        outputs = []
        for m in (fused, model):
            torch.manual_seed(3)
            outputs.append(m(x))
        for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in outputs), strict=True):
            assert differing(a, b, tolerance=0.0) == 0
