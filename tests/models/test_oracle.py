"""The oracle the model zoo is judged by, judged itself on networks whose counts are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import oracle, zoo

# Known from the networks' papers and sources: how many (legal pairs, additions, activations) can be fused.
KNOWN = {
    "torchvision/resnet18": (20, 8, 17),
    "torchvision/resnet50": (53, 16, 49),
    "torchvision/mobilenet_v2": (52, 10, 35),
    "torchvision/densenet121": (59, 0, 59),  # of 121 norms: the others come before their convolution
    "torchvision/vgg11_bn": (8, 0, 10),
}


@pytest.mark.parametrize("name", KNOWN)
def test_oracle_counts(name: str) -> None:
    pytest.importorskip("torchvision")
    model = zoo.build(name).double()
    inputs, _ = zoo.prepare(name, model)
    trace = oracle.trace(model, inputs)
    assert (len(trace.legal), trace.fusable_adds, trace.fusable_activations) == KNOWN[name]


class Refused(nn.Module):
    """One convolution and norm, joined in a way that must not be absorbed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.linear, self.norm1d, self.how = nn.Linear(6, 4), nn.BatchNorm1d(4), how
        if how == "no statistics":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        if how == "training":
            self.norm.train()
        if how == "hook":
            self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.how:
            case "read twice":
                y = self.conv(x)
                return self.norm(y) + y
            case "output":
                y = self.conv(x)
                return self.norm(y), y
            case "written in place":
                y = self.conv(x)
                y += 1
                return self.norm(y)
            case "view written in place":
                y = self.conv(x)
                y[:, :2] += 1
                return self.norm(y)
            case "two norms":
                return self.norm(self.conv(x)) + self.other(self.conv(x))
            case "norm twice":
                return self.norm(self.norm(self.conv(x)))
            case "features last":
                return self.norm1d(self.linear(x.new_ones(2, 4, 6)))
            case _:
                return self.norm(self.conv(x))


@pytest.mark.parametrize("how", ["read twice", "output", "two norms", "norm twice", "features last"])
def test_oracle_refuses_pair(how: str) -> None:
    trace = oracle.trace(Refused(how).eval(), (torch.randn(2, 3, 5, 5),))
    assert trace.pairs and not trace.legal, trace


@pytest.mark.parametrize("how", ["no statistics", "hook"])
def test_oracle_refuses_module(how: str) -> None:
    trace = oracle.trace(Refused(how).eval(), (torch.randn(2, 3, 5, 5),))
    assert len(trace.pairs) == 1 and not trace.legal, trace


def test_oracle_refuses_batch_statistics() -> None:
    trace = oracle.trace(Refused("training"), (torch.randn(2, 3, 5, 5),))
    assert len(trace.pairs) == 1 and not trace.legal, trace


@pytest.mark.parametrize("how", ["written in place", "view written in place"])
def test_oracle_sees_writes(how: str) -> None:
    trace = oracle.trace(Refused(how).eval(), (torch.randn(2, 3, 5, 5),))
    assert trace.norm_calls == 1 and not trace.pairs, trace


def test_oracle_accepts_plain_pair() -> None:
    trace = oracle.trace(Refused("plain").eval(), (torch.randn(2, 3, 5, 5),))
    assert trace.legal == {("conv", "norm")}
