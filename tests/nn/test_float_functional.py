"""FloatFunctional against PyTorch's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.fusion.patterns import is_float_functional
from horizon_plugin_pytorch.nn.quantized import FloatFunctional

CALLS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "add": lambda ff, x, y: ff.add(x, y),
    "add_scalar": lambda ff, x, y: ff.add_scalar(x, 2.5),
    "add_relu": lambda ff, x, y: ff.add_relu(x, y),
    "mul": lambda ff, x, y: ff.mul(x, y),
    "mul_scalar": lambda ff, x, y: ff.mul_scalar(x, -1.5),
    "matmul": lambda ff, x, y: ff.matmul(x, y),
    "cat": lambda ff, x, y: ff.cat([x, y], dim=1),
    "cat, default dim": lambda ff, x, y: ff.cat((x, y)),
}


@pytest.mark.parametrize("call", CALLS)
def test_methods_are_pytorchs(call: str) -> None:
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    expected = CALLS[call](torch.ao.nn.quantized.FloatFunctional(), x, y)
    assert torch.equal(CALLS[call](FloatFunctional(), x, y), expected)


def test_it_has_every_method_of_pytorchs() -> None:
    public = {n for n in vars(torch.ao.nn.quantized.FloatFunctional) if not n.startswith("_")}
    assert public <= set(dir(FloatFunctional()))


def test_sub() -> None:
    x, y = torch.randn(3), torch.randn(3)
    assert torch.equal(FloatFunctional().sub(x, y), x - y)


def test_calling_the_module_itself_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not called itself"):
        FloatFunctional()(torch.zeros(1))


def test_the_result_passes_the_observer_place() -> None:
    ff, seen = FloatFunctional(), []
    ff.activation_post_process.register_forward_hook(lambda m, a, o: seen.append(o))
    out = [ff.add(torch.ones(1), torch.ones(1)), ff.cat([torch.ones(1)])]
    assert [float(t) for t in seen] == [float(t) for t in out] == [2.0, 1.0]


def test_it_is_recognized_and_so_is_pytorchs() -> None:
    assert is_float_functional(FloatFunctional()) and is_float_functional(torch.ao.nn.quantized.FloatFunctional())
    assert not is_float_functional(nn.Identity())
    assert horizon.nn.quantized.FloatFunctional is FloatFunctional


def test_it_copies_and_has_no_state() -> None:
    ff = FloatFunctional()
    assert not ff.state_dict()
    for copied in (copy.deepcopy(ff), pickle.loads(pickle.dumps(ff))):
        assert torch.equal(copied.add(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
