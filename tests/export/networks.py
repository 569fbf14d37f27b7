"""Plans to export: six networks at small sizes, and every pattern of the grid."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from fusion.networks import ANCHORS, anchor_for, make_norm, randomize
from horizon_plugin_pytorch.plan import Plan

SIZES = {
    "resnet18": (64, 64),
    "resnet50": (32, 32),
    "mobilenet_v2": (64, 64),
    "centerface": (64, 96),
    "pose": (64, 32),
    "unet": (32, 48),
}
"""Height and width of each network's input."""


def _networks() -> Any:
    """benchmarks/_networks.py, which is in no package."""
    name = "_networks"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name].NETWORKS


@functools.cache
def network(name: str) -> tuple[Plan, Tensor]:
    """The plan of a network recorded with a batch of 1, and another input, a batch of 3."""
    net = dataclasses.replace(_networks()[name], size=(3, *SIZES[name]))
    int8 = horizon.quantize(net.build(), net.calibration(), improve=False, progress=False)
    return horizon.plan.record(int8, net.inputs(1, 5)), net.inputs(3, 6)


class Group(nn.Module):
    """One pattern, then its integers moved and a Linear; without the tail the group returns float32."""

    def __init__(self, anchor: nn.Module, norm: nn.Module | None, activation: nn.Module | None, tail: bool) -> None:
        super().__init__()
        self.anchor, self.norm, self.activation = anchor, norm, activation
        self.last = nn.Linear(1, 1) if tail else None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.anchor(x)
        y = y if self.norm is None else self.norm(y)
        y = y if other is None else y + other
        y = y if self.activation is None else self.activation(y)
        return y if self.last is None else self.last(y.flatten(1).unsqueeze(-1))


PATTERNS = [
    (kind, norm, add, activation)
    for kind in ANCHORS
    for norm in ("none", "BatchNorm")
    for add in (False, True)
    for activation in (None, nn.ReLU, nn.ReLU6)
]
"""anchor × norm × add × activation: 84, with the 7 anchors alone."""


def pattern(
    kind: str, norm: str, add: bool, activation: type[nn.Module] | None, tail: bool
) -> tuple[Plan, tuple[Tensor, ...]]:
    """The plan of a pattern, and the inputs it was calibrated with, in float32."""
    torch.manual_seed(0)
    anchor, x = anchor_for(kind)
    anchor, x = anchor.float(), x.float()
    bn = make_norm(norm, anchor)
    model = Group(anchor, bn, activation and activation(), tail)
    randomize(model).eval()
    with torch.no_grad():
        y = anchor(x) if bn is None else bn(anchor(x))
    inputs = (x, torch.randn_like(y) * y.std()) if add else (x,)
    int8 = horizon.quantize(model, [inputs], improve=False, progress=False)
    return horizon.plan.record(int8, inputs), inputs
