"""check_unfused_operations: what could be fused and is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.utils.quant_profiler import check_unfused_operations


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.conv2, self.bn2, self.ff = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.ff.add(self.bn2(self.conv2(x)), x)


class SharedConv(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.ff.add(self.bn(self.conv(x)), self.bn2(self.conv(x)))


class SharedNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x))) * self.relu(self.bn(self.conv2(x)))


X = torch.randn(1, 3, 4, 4)


def test_an_unfused_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_unfused_operations(Net(), X) == [["conv", "bn", "relu"], ["conv2", "bn2", "ff"]]
    shown = capsys.readouterr().out
    for word in ("name", "type", "conv2", "Conv2d", "BatchNorm2d", "FloatFunctional", "ReLU"):
        assert word in shown


def test_functions_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    class Plus(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + x)

    assert check_unfused_operations(Plus(), X) == [["conv", "add", "relu"]]
    assert "function" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fuse",
    [
        horizon.quantization.fuse_fx,
        lambda m: horizon.quantization.fuse_modules(m, [["conv", "bn", "relu"], ["conv2", "bn2", "ff"]]),
        lambda m: horizon.quantization.fuse_modules_qat(m, [["conv", "bn", "relu"], ["conv2", "bn2", "ff"]]),
    ],
)
def test_a_fused_model_has_none(fuse: Callable[[nn.Module], nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    fused = fuse(Net())
    assert check_unfused_operations(fused, X) == []
    assert "left unfused" in capsys.readouterr().out


def test_what_was_forgotten_when_fusing_by_name() -> None:
    fused = horizon.quantization.fuse_modules(Net(), ["conv", "bn", "relu"])
    assert check_unfused_operations(fused, X, print_tabulate=False) == [["conv2", "bn2", "ff"]]


def test_a_shared_convolution_is_marked() -> None:
    found = check_unfused_operations(SharedConv(), X, print_tabulate=False)
    assert sorted(found) == [["conv(shared)", "bn"], ["conv(shared)", "bn2"]]


def test_a_shared_norm_is_marked_and_its_convolutions_are_not() -> None:
    found = check_unfused_operations(SharedNorm(), X, print_tabulate=False)
    assert sorted(found) == [["conv", "bn(shared)"], ["conv2", "bn(shared)"]]


def test_what_cannot_fuse_for_another_reason_is_not_marked() -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.conv)
    assert check_unfused_operations(net, X, print_tabulate=False) == [["conv2", "bn2", "ff"]]


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}])
def test_kinds_of_example_inputs(inputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(check_unfused_operations(Net(), inputs, False)) == 2
    assert capsys.readouterr().out == ""


def test_the_model_stays_as_it_is() -> None:
    net = Net().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    check_unfused_operations(net, X, print_tabulate=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert type(net.conv) is nn.Conv2d
