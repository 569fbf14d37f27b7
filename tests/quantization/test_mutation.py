"""Reads of values after they were overwritten in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from horizon_plugin_pytorch.fusion.tracing import FusionTracer
from horizon_plugin_pytorch.quantization.mutation import late_reads, settle


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.relu, self.body = nn.ReLU(inplace=True), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x * 2)


def chain(m: Any, x: Tensor) -> Any:
    x = x.relu_()
    x = F.relu6(x, inplace=True)
    return m.relu(x) + 1


def only_the_shape_is_read(m: Any, x: Tensor) -> Any:
    y = m.relu(x)
    return y * x.shape[0] + x.size(1)


def reads_before(m: Any, x: Tensor) -> Any:
    y = x + 1
    return m.relu(x) + y


def two_writers(m: Any, x: Tensor) -> Any:
    y = m.relu(x)
    z = x + 1
    x.mul_(2)
    return x + y * z


def statement(m: Any, x: Tensor) -> Any:
    x.clamp_(0, 1)
    x.add_(1)
    return x


def augmented(m: Any, x: Tensor) -> Any:
    v = x
    x += 1
    return v * x


def view(m: Any, x: Tensor) -> Any:
    x[0].add_(1)
    return x + 1


def reshaped(m: Any, x: Tensor) -> Any:
    y = x.flatten(1)
    m.relu(x)
    return y + 1


def out_argument(m: Any, x: Tensor) -> Any:
    y = x.flatten()
    torch.add(x.sum(), 1, out=y)
    return x + 1


NOTHING, REPLACED, HELD = "nothing to do", "replaced", "held"
CASES = [
    (chain, NOTHING),
    (only_the_shape_is_read, NOTHING),
    (reads_before, NOTHING),
    (two_writers, REPLACED),
    (statement, REPLACED),
    (augmented, REPLACED),
    (view, HELD),
    (reshaped, HELD),
    (out_argument, HELD),
]


@pytest.mark.parametrize(("body", "what"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_late_reads(body: Callable[..., Any], what: str) -> None:
    net = Net(body)
    graph = FusionTracer().trace(net)
    modules = dict(net.named_modules(remove_duplicate=False))
    assert bool(late_reads(graph, modules)) == (what != NOTHING)
    held = settle(graph, modules)
    assert bool(held) == (what == HELD)
    assert all("overwrites" in reason for reason in held.values())
    assert (what == HELD) == bool(late_reads(graph, modules))  # what was not held is settled
    if body is out_argument:
        return  # PyTorch itself resizes such a result
    traced = fx.GraphModule(net, graph)
    x = torch.randn(3, 4)
    assert torch.equal(traced(x.clone()), net(x.clone()))
