"""A plan as one operator of PyTorch: compiled, exported, saved; the same numbers."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.nn.quantized.qtensor import dequantize
from horizon_plugin_pytorch.plan import Plan, PlanError


class Net(nn.Module):
    """Groups, a transposed convolution, moved, pooled and looked-up integers, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.conv2(x))
        x = F.interpolate(self.up(x), scale_factor=2)
        x = F.max_pool2d(x * torch.sigmoid(x), 2)
        return {"map": x, "logits": [self.head(torch.cat([x, x.flip(-1)], 1).mean((2, 3)))]}


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(5, 3, 16, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    int8 = horizon.quantize(Net().eval(), [X], improve=False, progress=False)
    return horizon.plan.record(int8, X)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def differing(a: Any, b: Any) -> int:
    (xs, one), (ys, other) = torch.utils._pytree.tree_flatten(a), torch.utils._pytree.tree_flatten(b)
    assert one == other
    values = [(x, dequantize(y)) for x, y in zip(xs, ys, strict=True)]
    assert all(x.dtype == torch.float32 and x.shape == y.shape for x, y in values)
    return sum(int((x != y).sum()) for x, y in values)


def exported(module: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("batch", min=2, max=16), 2: torch.export.Dim("height", min=8, max=64)}
    return torch.export.export(module, (X,), dynamic_shapes=((sizes,),), strict=strict)


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    "aot_eager": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "aot_eager, dynamic": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=True),
    "export": lambda m: exported(m, strict=False).module(),
    "strict export": lambda m: exported(m, strict=True).module(),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_traced(plan: Plan, tracer: str) -> None:
    traced, reference = TRACERS[tracer](plan.as_module()), plan.compile("reference")
    with torch.no_grad():
        for x in (X, OTHER, X):
            assert differing(traced(x), reference(x)) == 0


def test_exported_shapes_are_symbols(plan: Plan) -> None:
    program = exported(plan.as_module(), strict=False)
    (node,) = [n for n in program.graph.nodes if "run_plan" in str(n.target)]
    assert isinstance(node.meta["val"][0].shape[0], torch.SymInt)
    assert node.meta["val"][0].shape[1] == 8


def test_loads_in_another_process(plan: Plan, tmp_path: Path) -> None:
    torch.export.save(exported(plan.as_module(), strict=False), tmp_path / "net.pt2")
    expected = plan.compile("reference")(X)
    torch.save((X, expected["logits"][0]), tmp_path / "values.pt")
    program = (
        "import sys, torch, horizon_plugin_pytorch.plan.module\n"
        "module = torch.export.load(sys.argv[1]).module()\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "print(int((module(x)['logits'][0] != expected).sum()))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "net.pt2"), str(tmp_path / "values.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "0"


def test_the_operator_is_registered_as_it_should_be(plan: Plan) -> None:
    module = plan.as_module()
    torch.library.opcheck(torch.ops.horizon.run_plan, ([X], list(module.buffers()), module.constants, module.program))


def test_other_constants_are_another_plan(plan: Plan) -> None:
    module = plan.as_module()
    before = module(X)
    with torch.no_grad():
        for name, constant in zip(module.constants.splitlines(), module.buffers(), strict=True):
            if name == "head.bias":
                constant.add_(1000)  # an address that is known, and another content
    assert differing(module(X), before) == before["logits"][0].numel()


def test_its_state_is_saved_and_loaded(plan: Plan) -> None:
    module, other = plan.as_module(), plan.as_module()
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream))
    assert differing(other(X), module(X)) == 0


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x), x.shape[0]


def test_an_output_that_is_no_tensor_is_refused() -> None:
    int8 = horizon.quantize(Sized().eval(), [X], improve=False, progress=False)
    with pytest.raises(PlanError, match="returns what is not a tensor"):
        horizon.plan.record(int8, X).as_module()


@pytest.mark.parametrize("program", ["", "{}", "[]", "null", '{"format": 1}'])
def test_a_program_that_is_none_is_an_error(program: str) -> None:
    with pytest.raises(PlanError):
        torch.ops.horizon.run_plan([X], [], "", program)
