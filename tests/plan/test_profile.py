"""Times of a plan's steps."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.plan import Plan
from horizon_plugin_pytorch.plan.profile import profile


class Net(nn.Module):
    """One convolution that outweighs the others, and a norm that runs in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.norm = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 7, padding=3), nn.GroupNorm(2, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.large(F.relu(self.small(x)))))


@pytest.fixture(scope="module")
def plan() -> Plan:
    x = torch.randn(1, 3, 48, 48)
    return horizon.plan.record(horizon.quantize(Net().eval(), [x], improve=False, progress=False), x)


BACKENDS = ["reference", *(["cpu"] if library.why_not() is None else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_step_has_its_time(plan: Plan, backend: str, batch: int) -> None:
    runner = plan.compile(backend, threads=1)
    x = torch.randn(batch, 3, 48, 48)
    start = time.perf_counter()
    steps = profile(runner, x, repeats=9)  # a median that other work on the machine does not move
    wall = time.perf_counter() - start
    assert [s.step for s in steps] == list(plan.steps)
    assert [s.result for s in steps] == [plan.result(i) for i in range(len(steps))]
    assert all(s.seconds >= 0 for s in steps)
    assert 0 < sum(s.seconds for s in steps) < wall
    assert max(steps, key=lambda s: s.seconds).step.name == "large"
    in_torch = {s.step.name for s in steps if not s.native}
    assert ("large" in in_torch) == (backend == "reference")
    assert any("norm" in name for name in in_torch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_leaves_the_runner_as_it_was(plan: Plan, backend: str) -> None:
    runner, x = plan.compile(backend), torch.randn(1, 3, 48, 48)
    before = runner(x)
    profile(runner, x, repeats=1)
    assert int((runner(x) != before).sum()) == 0


def test_no_repeats_is_an_error(plan: Plan) -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        profile(plan.compile("reference"), torch.randn(1, 3, 48, 48), repeats=0)
