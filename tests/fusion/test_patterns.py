"""The table of patterns: what it generates, and a user's own rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from fusion.networks import randomize, run_both
from horizon_plugin_pytorch.fusion import DOCUMENTED, grid, register_activation, register_anchor
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.quantization import fuse_fx, fuse_modules, fuse_modules_qat


@pytest.fixture
def tables() -> Iterator[None]:
    before = p.ANCHORS[:], p.ACTIVATIONS[:]
    yield
    p.ANCHORS[:], p.ACTIVATIONS[:] = before


def test_the_grid() -> None:
    names = [pattern.name for pattern in grid()]
    assert len(names) == len(set(names)) == 7 * (2 * 2 * 3 - 1)
    assert {"LinearReLU", "ConvBN2d", "Conv" + "Add1d", "ConvTransposeBNAddReLU63d", "LinearBNAddReLU6"} <= set(names)
    assert not {"Conv2d", "Linear"} & set(names)
    assert set(DOCUMENTED) <= set(names) and len(DOCUMENTED) == len(set(DOCUMENTED)) == 21


class Scaled(nn.Conv2d):
    """A convolution with a forward of its own, linear in its weight, so a norm behind it can be absorbed."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Block(nn.Module):
    def __init__(self, conv: nn.Module, relu: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv, nn.BatchNorm2d(conv.out_channels), relu
        self.ff = horizon.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.ff.add(x, self.bn(self.conv(x))))


NAMES = ["conv", "bn", "ff", "relu"]


@pytest.mark.usefixtures("tables")
def test_one_row_makes_an_activation_everywhere() -> None:
    count = len(list(grid()))
    register_activation(nn.SiLU, "SiLU")
    assert len(list(grid())) == count + 7 * 4
    for name in ("ConvSiLU2d", "ConvTransposeBNAddSiLU3d", "LinearSiLU"):
        assert name in dir(horizon.nn.intrinsic) and getattr(horizon.nn.intrinsic, name).__name__ == name

    model = randomize(Block(nn.Conv2d(3, 3, 1), nn.SiLU())).eval()
    x = torch.randn(2, 3, 4, 4)
    for fused, name in (
        (fuse_modules(model, NAMES), "ConvAddSiLU2d"),
        (fuse_modules_qat(model, NAMES), "ConvBNAddSiLU2d"),
        (fuse_fx(model), "ConvAddSiLU2d"),
        (fuse_fx(model, is_qat=True), "ConvBNAddSiLU2d"),
    ):
        assert type(fused.ff).__name__ == name and isinstance(fused.ff.silu, nn.SiLU)
        assert run_both(fused, model, x) == 0
        assert run_both(pickle.loads(pickle.dumps(fused)), model, x) == 0


@pytest.mark.usefixtures("tables")
def test_options_of_a_registered_activation_stay() -> None:
    register_activation(nn.LeakyReLU, "LeakyReLU")
    shared = nn.LeakyReLU(0.37)
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Conv2d(3, 3, 1), shared, nn.BatchNorm2d(3), shared)
    ).eval()
    fused = fuse_fx(model)
    assert fused.fusion_report.count() == {"ConvLeakyReLU2d": 2}
    assert [m.negative_slope for m in fused.modules() if isinstance(m, nn.LeakyReLU)] == [0.37] * 3
    assert run_both(fused, model, torch.randn(2, 3, 4, 4)) == 0


@pytest.mark.usefixtures("tables")
def test_a_hook_on_a_registered_activation_runs_once() -> None:
    register_activation(nn.Sigmoid, "Sigmoid")
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())
    seen: list[int] = []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    for fuse in (fuse_fx, lambda m: fuse_modules(m, ["0", "1"])):
        fused = fuse(model)
        seen.clear()
        fused(torch.randn(1, 3, 2, 2))
        assert seen == [1] and "ConvSigmoid2d" in repr(fused)
    handle.remove()


class Anchored(nn.Module):
    """Holds what nn.Conv2d holds, and computes it, without being one."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(c_out, c_in, 1, 1)), None
        self.out_channels, self.groups = c_out, 1

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight, self.bias)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("anchor", [Scaled(3, 3, 1), Anchored(3, 3)], ids=lambda m: type(m).__name__)
def test_one_row_makes_an_anchor_everywhere(anchor: nn.Module) -> None:
    count = len(list(grid()))
    row = register_anchor(type(anchor), "Special", "2d", like=nn.Conv2d)
    assert len(list(grid())) == count + 11 and p.anchor_of(anchor) == row
    assert horizon.nn.intrinsic.SpecialBNAddReLU62d.pattern.anchor is row

    model = randomize(Block(copy.deepcopy(anchor), nn.ReLU6())).eval()
    x = torch.randn(2, 3, 4, 4)
    for fused, name in (
        (fuse_modules(model, NAMES), "SpecialAddReLU62d"),
        (fuse_fx(model), "SpecialAddReLU62d"),
        (fuse_fx(model, is_qat=True), "SpecialBNAddReLU62d"),
    ):
        assert type(fused.ff).__name__ == name
        assert run_both(fused, model, x) == 0
        fused.load_state_dict(model.state_dict())
        assert run_both(fused, model, x) == 0


@pytest.mark.usefixtures("tables")
def test_registering_the_same_row_again_changes_nothing() -> None:
    for _ in range(2):
        register_activation(nn.SiLU, "SiLU")
        register_anchor(Scaled, "Scaled", "2d", like=nn.Conv2d)
    assert len(p.ACTIVATIONS) == 3 and len(p.ANCHORS) == 8


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("label", ["ReLU", "AddReLU", "ReLU6"])
def test_a_label_that_makes_taken_names(label: str) -> None:
    before = [pattern.name for pattern in grid()]
    with pytest.raises(ValueError, match="taken"):
        register_activation(nn.SiLU, label)
    assert [pattern.name for pattern in grid()] == before


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(("label", "suffix"), [("Conv", "2d"), ("ConvBN", "2d"), ("Linear", "")])
def test_an_anchors_label_that_makes_taken_names(label: str, suffix: str) -> None:
    before = [pattern.name for pattern in grid()]
    with pytest.raises(ValueError, match="taken"):
        register_anchor(Scaled, label, suffix, like=nn.Conv2d)
    assert [pattern.name for pattern in grid()] == before


@pytest.mark.usefixtures("tables")
def test_types_and_likes_that_do_not_go() -> None:
    with pytest.raises(ValueError, match="ReLU is already registered"):
        register_activation(nn.ReLU, "Rectifier")
    with pytest.raises(ValueError, match="Conv2d is already registered"):
        register_anchor(nn.Conv2d, "Another", "2d", like=nn.Conv2d)
    with pytest.raises(ValueError, match="like=MaxPool2d is not an anchor; choose one of"):
        register_anchor(Scaled, "Scaled", like=nn.MaxPool2d)
