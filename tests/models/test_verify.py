"""What judges the model zoo notices a fusion that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from models.verify import compare, verify

pytest.importorskip("torchvision")

NETWORK = "torchvision/mnasnet0_5"


def fused(model: nn.Module) -> Any:
    from horizon_plugin_pytorch.quantization import fuse_fx

    return fuse_fx(model)


def raises(model: nn.Module) -> Any:
    raise RuntimeError("no")


def changes_original(model: nn.Module) -> Any:
    result = fused(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1)
    return result


def reorders_original(model: nn.Module) -> Any:
    result = fused(model)
    model.train()
    return result


def shifts_an_output(model: nn.Module) -> Any:
    result = fused(model)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("classifier.1.bias"):
                parameter.add_(1e-4)
    return result


def keeps_a_norm(model: nn.Module) -> Any:
    """Fuses, but runs and reports one group as if nothing had been absorbed."""
    result = copy.deepcopy(model)
    result.fusion_report = fused(model).fusion_report
    return result


def reports_nothing(model: nn.Module) -> Any:
    result = fused(model)
    result.fusion_report = copy.deepcopy(result.fusion_report)
    result.fusion_report.groups.clear()
    return result


WRONG: dict[str, Callable[[nn.Module], Any]] = {
    "raises": raises,
    "changed the original": changes_original,
    "changed the original: module": reorders_original,
    "differs by": shifts_an_output,
    "legal pairs are left": keeps_a_norm,
    "is not in the report, but is legal and not absorbed": reports_nothing,
}


@pytest.mark.parametrize("problem", WRONG)
def test_wrong_fusion_is_noticed(problem: str) -> None:
    problems = verify(NETWORK, fuse=WRONG[problem]).problems
    assert any(problem in p for p in problems), problems


def test_compare_is_relative_and_nested() -> None:
    a = {"x": [torch.tensor([100.0, -200.0])], "n": torch.tensor([1, 2])}
    b = {"x": [torch.tensor([100.0, -200.5])], "n": torch.tensor([1, 2])}
    assert compare(a, b) == (0.5 / 200, None)
    assert compare(a, a) == (0.0, None)


@pytest.mark.parametrize(
    "other",
    [
        [torch.zeros(3)],
        [torch.zeros(2), torch.zeros(2)],
        [torch.zeros(2, dtype=torch.float64)],
    ],
)
def test_compare_refuses_other_shapes(other: list[torch.Tensor]) -> None:
    assert compare([torch.zeros(2)], other)[1] is not None


def test_compare_counts_integers() -> None:
    assert "1 of 3" in str(compare(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))[1])


def test_compare_does_not_pass_nan() -> None:
    nan = torch.tensor([1.0, float("nan")])
    difference, problem = compare([torch.ones(2), nan, torch.ones(2)], [torch.ones(2), nan, torch.ones(2)])
    assert problem is not None and not difference <= 1e-6
