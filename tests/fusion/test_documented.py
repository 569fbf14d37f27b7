"""The vendor's documentation, section 4.2.3.2: its list of patterns and both examples, as they stand there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import horizon_plugin_pytorch as horizon
from fusion.networks import TOLERANCE, differing, randomize, residual_for
from horizon_plugin_pytorch.fusion.patterns import DOCUMENTED, grid

PATTERNS = """
from torch import nn
import torch.nn.quantized as nnq

# 目前支持以下算子的融合
(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
(nn.Conv2d, nn.ReLU)
(nn.Conv2d, nn.BatchNorm2d, nnq.FloatFunctional)
(nn.Conv2d, nn.BatchNorm2d, nnq.FloatFunctional, nn.ReLU)
(nn.Conv2d, nnq.FloatFunctional)
(nn.Conv2d, nnq.FloatFunctional, nn.ReLU)
(nn.ConvTranspose2d, nn.ReLU)
(nn.ConvTranspose2d, nnq.FloatFunctional)
(nn.ConvTranspose2d, nnq.FloatFunctional, nn.ReLU)
(nn.ConvTranspose2d, nn.BatchNorm2d)
(nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU)
(nn.ConvTranspose2d, nn.BatchNorm2d, nnq.FloatFunctional)
(nn.ConvTranspose2d, nn.BatchNorm2d, nnq.FloatFunctional, nn.ReLU)
(nn.Conv2d, nn.BatchNorm2d, nn.ReLU6)
(nn.Conv2d, nn.ReLU6)
(nn.Conv2d, nn.BatchNorm2d, nnq.FloatFunctional, nn.ReLU6)
(nn.Conv2d, nnq.FloatFunctional, nn.ReLU6)
(nn.ConvTranspose2d, nn.ReLU6)
(nn.ConvTranspose2d, nnq.FloatFunctional, nn.ReLU6)
(nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU6)
(nn.ConvTranspose2d, nn.BatchNorm2d, nnq.FloatFunctional, nn.ReLU6)
"""

EXAMPLE_1 = """
import torch
import horizon_plugin_pytorch as horizon
from torch.quantization import DeQuantStub
from horizon_plugin_pytorch.quantization import QuantStub

class ModelForFusion(torch.nn.Sequential):
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        dequant_out=False,
    ):
        super(ModelForFusion, self).__init__(
            QuantStub(),
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
            ),
            nn.BatchNorm2d(num_features=out_channels),
            DeQuantStub() if dequant_out else nn.Identity(),
        )

float_net = ModelForFusion(
    1,
    2,
    1,
)
# 由于需要融合的网络是继承自 torch.nn.Sequential 的网络, 取 conv 和 bn 在
# 网络中的下标放入列表中来确定要融合的算子
torch.quantization.fuse_modules(
    float_net, ["1", "2"], inplace=True, fuser_func=horizon.quantization.fuse_known_modules
)
"""

EXAMPLE_2 = """
from torch import nn


class ModelForFusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=None)
        self.bn = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.quant = QuantStub()
        self.dequant = DeQuantStub()

    def forward(self, x):
        x_i = self.quant(x)
        x = self.conv(x_i)
        x = self.bn(x)
        x = self.relu(x)
        x = self.dequant(x)
        return x

model = ModelForFusion().train()

# 由于网络是继承自 Module 的网络,网络中的每个算子都有一个变量名,
# 取网络中 conv 和 bn 的变量名放入列表中进行融合
torch.quantization.fuse_modules(
    model,
    ["conv", "bn", "relu"],
    inplace=True,
    fuser_func=horizon.quantization.fuse_known_modules,
)
"""


def read(*sources: str) -> dict[str, Any]:
    """Run the texts one after the other, as a reader who types them in would."""
    namespace: dict[str, Any] = {"__name__": "documented"}
    for source in sources:
        exec(source, namespace)
    return namespace


def documented_patterns() -> list[tuple[type[nn.Module], ...]]:
    namespace = read(PATTERNS.split("#")[0])
    return [eval(line, namespace) for line in PATTERNS.splitlines() if line.startswith("(")]


def test_example_1_fuses_by_index() -> None:
    namespace = read(PATTERNS, EXAMPLE_1)
    net, unfused = namespace["float_net"], namespace["ModelForFusion"](1, 2, 1)
    assert [type(m).__name__ for m in net] == ["QuantStub", "Conv2d", "Identity", "Identity"]

    randomize(unfused)
    net.load_state_dict(unfused.state_dict())
    x = torch.randn(3, 1, 5, 5)
    assert differing(net.eval()(x), unfused.eval()(x)) == 0


def test_example_2_fuses_in_training_mode_by_name() -> None:
    namespace = read(PATTERNS, EXAMPLE_1, EXAMPLE_2)
    model, unfused = namespace["model"], namespace["ModelForFusion"]()
    assert type(model.conv) is horizon.nn.intrinsic.ConvReLU2d and model.training and model.conv.training
    assert [type(m).__name__ for m in (model.bn, model.relu)] == ["Identity", "Identity"]

    randomize(unfused)
    model.load_state_dict(unfused.state_dict())
    x = torch.randn(3, 2, 5, 5)
    assert differing(model.eval()(x), unfused.eval()(x)) == 0
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_there_are_21_patterns_and_each_is_a_row_of_the_grid() -> None:
    types = documented_patterns()
    assert len(types) == len(set(types)) == 21
    named = []
    for anchor, *rest in types:
        stages = {"BatchNorm2d": "BN", "FloatFunctional": "Add", "ReLU": "ReLU", "ReLU6": "ReLU6"}
        named.append(anchor.__name__.removesuffix("2d") + "".join(stages[t.__name__] for t in rest) + "2d")
    assert tuple(named) == DOCUMENTED
    assert set(DOCUMENTED) < {p.name for p in grid()}


class Documented(nn.Module):
    """The modules of a documented pattern, called in their order."""

    def __init__(self, types: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        for name, cls in zip(self.names_of(types), types, strict=True):
            conv = cls in (nn.Conv2d, nn.ConvTranspose2d)
            self.add_module(name, cls(4, 4, 3, padding=1) if conv else cls(4) if cls is nn.BatchNorm2d else cls())

    @staticmethod
    def names_of(types: tuple[type[nn.Module], ...]) -> list[str]:
        place = {"BatchNorm2d": "bn", "FloatFunctional": "ff", "ReLU": "relu", "ReLU6": "relu"}
        return ["conv", *(place[t.__name__] for t in types[1:])]

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for name, m in self.named_children():
            x = m.add(x, other) if name == "ff" else m(x)
        return x


def by_list(model: nn.Module, names: list[str], is_qat: bool) -> nn.Module:
    places = horizon.quantization.fuse_known_modules([model.get_submodule(n) for n in names], is_qat)
    assert len(places) == len(names)
    for name, place in zip(names, places, strict=True):
        setattr(model, name, place)
    return model


def by_pytorch(model: nn.Module, names: list[str], is_qat: bool) -> nn.Module:
    fuse = torch.ao.quantization.fuse_modules_qat if is_qat else torch.quantization.fuse_modules
    return fuse(model, names, fuser_func=horizon.quantization.fuse_known_modules)


def by_ours(model: nn.Module, names: list[str], is_qat: bool) -> nn.Module:
    fuse = horizon.quantization.fuse_modules_qat if is_qat else horizon.quantization.fuse_modules
    return fuse(model, names)


@pytest.mark.parametrize("is_qat", [False, True], ids=["absorbed", "kept"])
@pytest.mark.parametrize("route", [by_list, by_pytorch, by_ours])
@pytest.mark.parametrize("types", [*documented_patterns(), (nn.Conv2d, nn.BatchNorm2d)], ids=lambda t: t[0].__name__)
def test_every_documented_pattern(types: tuple[type[nn.Module], ...], route: Any, is_qat: bool) -> None:
    expected = randomize(Documented(types)).eval()
    model = Documented(types).eval()
    model.load_state_dict(expected.state_dict())
    names = Documented.names_of(types)
    fused = route(model, names, is_qat)

    x = torch.randn(2, 4, 6, 6)
    other = residual_for(expected, x)
    assert differing(fused(x, other), expected(x, other)) == 0

    has_norm, has_add = nn.BatchNorm2d in types, "ff" in names
    absorbed_name = types[0].__name__.removesuffix("2d")
    stages = [("BN", has_norm and is_qat), ("Add", has_add), (types[-1].__name__, types[-1] in (nn.ReLU, nn.ReLU6))]
    name = absorbed_name + "".join(label for label, there in stages if there) + "2d"
    group = fused.ff if has_add else fused.conv
    assert type(group).__name__ == name
    assert type(group) is (getattr(horizon.nn.intrinsic, name) if name != absorbed_name + "2d" else types[0])


def test_tolerances_are_those_promised() -> None:
    assert TOLERANCE[torch.float32] <= 1e-5 and TOLERANCE[torch.float64] <= 1e-12
