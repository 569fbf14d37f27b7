"""Plans as `.pt2` files: the same numbers, where this package cannot be imported, at other sizes, from another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import horizon_plugin_pytorch as horizon
from export.networks import ANCHORS, PATTERNS, SIZES, network, pattern
from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.export import to_torch_export
from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.torch_export import save
from horizon_plugin_pytorch.nn.quantized.qtensor import dequantize
from horizon_plugin_pytorch.plan import Plan
from horizon_plugin_pytorch.plan.program import Ref, Value
from plan.native.plans import Maker
from plan.test_plan import network as every_step

Dim = torch.export.Dim

ELSEWHERE = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "horizon_plugin_pytorch":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
try:
    import horizon_plugin_pytorch
    sys.exit("it can be imported")
except ImportError:
    pass
for path in sys.argv[1:]:
    inputs = torch.load(path + ".inputs")
    outputs = [torch.export.load(path).module()(*x) for x in inputs]
    torch.save(torch.utils._pytree.tree_leaves(outputs), path + ".outputs")
"""


def elsewhere(program: str, *paths: Path) -> None:
    command = [sys.executable, "-c", program, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def differing(actual: Any, expected: Any) -> int:
    """Elements; integers count as the float32 values they stand for."""
    a, b = tree_leaves(actual), tree_leaves(dequantize(expected))
    assert len(a) == len(b)
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))


def on_reference(plan: Plan, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The plan's outputs; inputs are copied."""
    return tree_leaves(dequantize(plan.compile("reference")(*(x.clone() for x in inputs))))


def is_plain(program: torch.export.ExportedProgram) -> bool:
    """Whether it calls PyTorch's own operators, and arithmetic of sizes, only."""
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return all(
        t.namespace == "aten"
        if isinstance(t, torch._ops.OpOverload)
        else t.__module__ in ("_operator", "math", "torch")
        for t in targets
    ) and not any(n.op == "get_attr" for n in program.graph.nodes)


# -- on ATen operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_networks_without_the_package(name: str, tmp_path: Path) -> None:
    plan, x = network(name)
    program = to_torch_export(plan)
    assert is_plain(program)
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    inputs = [(x,), (x[:1],)]
    torch.save(inputs, f"{path}.inputs")
    elsewhere(ELSEWHERE, path)
    outputs = torch.load(f"{path}.outputs")
    expected = [y for one in inputs for y in on_reference(plan, one)]
    assert differing(outputs, expected) == 0
    assert all(len(y.unique()) > 20 for y in expected)


@pytest.mark.parametrize("kind", ANCHORS)
def test_the_grid(kind: str) -> None:
    for i, row in enumerate(p for p in PATTERNS if p[0] == kind):
        plan, inputs = pattern(*row, tail=i % 2 == 0)
        (group, *_) = [s for s in plan.steps if s.kind == "group"]
        assert ("residual_ratio" in group.params) == row[2] and bool(group.params["activation"]) == bool(row[3])
        program = to_torch_export(plan)
        assert is_plain(program)
        for batch in (None, 1):
            xs = tuple(x[:batch] for x in inputs)
            assert differing(program.module()(*xs), on_reference(plan, xs)) == 0, row


@pytest.fixture(scope="module")
def net() -> tuple[Plan, Tensor]:
    torch.manual_seed(0)
    model, x = every_step()
    return horizon.plan.record(model, x), x


def test_every_kind_of_step_at_other_sizes(net: tuple[Plan, Tensor]) -> None:
    plan, _ = net
    assert {s.kind for s in plan.steps} >= {"quantize", "group", "operator", "table", "function"}
    program = to_torch_export(plan, dynamic_shapes={"x": {0: Dim("batch"), 2: 2 * Dim("rows", min=2), 3: Dim.DYNAMIC}})
    assert is_plain(program)
    for shape in ((2, 3, 16, 16), (1, 3, 16, 16), (5, 3, 24, 41)):
        y = torch.randn(shape)
        assert differing(program.module()(y), plan.compile("reference")(y)) == 0


def test_it_has_the_model_s_names_and_structure(net: tuple[Plan, Tensor]) -> None:
    plan, x = net
    program = to_torch_export(plan)
    logits, rest = program.module()(x)
    assert list(rest) == ["map"]
    assert program.graph_signature.user_inputs == ("x",)
    assert differing((logits, rest), plan.compile("reference")(x)) == 0


def test_weights_are_stored_as_int8(net: tuple[Plan, Tensor]) -> None:
    plan, _ = net
    state = to_torch_export(plan).state_dict
    assert {name.replace("/", ".").removeprefix("constants."): t.dtype for name, t in state.items()} == {
        name: t.dtype for name, t in plan.constants.items()
    }


@pytest.mark.parametrize("ops", ["aten", "horizon"])
def test_nan_is_an_error(net: tuple[Plan, Tensor], ops: Any) -> None:
    plan, x = net
    module = to_torch_export(plan, ops=ops).module()
    with pytest.raises(Exception, match="NaN"):
        module(x.index_fill(1, torch.tensor([1]), torch.nan))


class Depthwise(nn.Module):
    """A value with a scale per channel, and functions between it and the depthwise convolution that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.between = nn.Sequential(nn.ReLU(), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Moves(nn.Module):
    """Functions that have rules on integers, and some that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.first(x))
        pooled = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2, ceil_mode=True)
        near = F.interpolate(x, scale_factor=3) + F.interpolate(x, size=[36, 24], mode="nearest-exact")
        y = self.second(x)
        left, right = y.chunk(2, dim=1)
        joined = torch.cat([right, left.flip(-1)], 1)
        return {
            "pooled": F.adaptive_max_pool2d(pooled, 3),
            "shuffled": F.pixel_shuffle(y, 2),
            "unshuffled": F.pixel_unshuffle(y.transpose(2, 3).contiguous(), 2),
            "near": near,
            "padded": F.pad(y, (2, 1, 0, 0), mode="reflect"),
            "joined": F.dropout(joined[:, ::2].permute(0, 2, 3, 1), training=False),
            "smooth": F.interpolate(y, scale_factor=2, mode="bilinear"),
            "cubic": F.interpolate(y, scale_factor=1.5, mode="bicubic"),
            "adaptive": F.adaptive_avg_pool2d(y, (5, 3)),
            "averaged": F.avg_pool2d(y, 3, 2, 1, count_include_pad=False, ceil_mode=True),
            "product": y * y.reshape_as(y),
            "sizes": x.new_zeros(y.size(0), y.shape[2], dtype=y.dtype),
            "largest": y.topk(2, dim=1)[0],
        }


@pytest.mark.parametrize("model", [Depthwise, Moves])
def test_functions_on_integers(model: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 12, 8)
    int8 = horizon.quantize(model().eval(), [x], improve=False, progress=False)
    plan = horizon.plan.record(int8, x)
    vectors = [t for n, t in plan.constants.items() if n.endswith("scale") and t.dim() == 1]
    assert bool(vectors) == (model is Depthwise)
    program = to_torch_export(plan)
    assert is_plain(program)
    for batch in (2, 1, 5):
        y = torch.randn(batch, 3, 12, 8)
        assert differing(program.module()(y), plan.compile("reference")(y)) == 0


class Fma(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return reference.fma(a, b, c)


def test_a_fused_multiply_add_rounds_once() -> None:
    """Sums that float64 cannot hold, among them those that a second rounding, to float32, would get wrong."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(2**23, 2**24, (100_000,), generator=generator).float() for _ in range(2))
    c = torch.randint(2**23, 2**24, (100_000,), generator=generator) * 2.0 ** torch.arange(100_000).remainder(90)
    # 2^53 + 2^29 is half way between two float32, and the product's 1 is lost in float64
    a[0], b[0], c[0] = 2.0**29 + 1, 1.0, 2.0**53
    a[1], b[1], c[1] = 1.0, 1.0, 2.0**53 + 2.0**30
    a[2:4], b[2:4], c[2:4] = 4097.0, 4097.0, torch.tensor([2.0**76, -(2.0**76)])
    a, b, c = (torch.cat([t, -t]) for t in (a, b, c.float()))
    with torch.no_grad():
        program = torch.export.export(Fma(), (a, b, c))
    assert differing(program.module()(a, b, c), reference.fma(a, b, c)) == 0


# -- on our operator ----------------------------------------------------------------------------------------------------------

WITH_US = """
import sys, torch, horizon_plugin_pytorch.plan.module
for path in sys.argv[1:]:
    inputs = torch.load(path + ".inputs")
    outputs = [torch.export.load(path).module()(*x) for x in inputs]
    torch.save(torch.utils._pytree.tree_leaves(outputs), path + ".outputs")
"""


@pytest.mark.parametrize("name", ["resnet18", "centerface"])
def test_networks_on_our_operator(name: str, tmp_path: Path) -> None:
    plan, x = network(name)
    path = tmp_path / "net.pt2"
    save(plan, path, ops="horizon")
    inputs = [(x,), (x[:1],)]
    torch.save(inputs, f"{path}.inputs")
    elsewhere(WITH_US, path)
    assert differing(torch.load(f"{path}.outputs"), [y for one in inputs for y in on_reference(plan, one)]) == 0


# -- errors -------------------------------------------------------------------------------------------------------------------


def made(function: Callable[[Maker], Any]) -> Plan:
    maker = Maker(x=(2, 3))
    outputs = function(maker)
    maker.values = [Value(v.name, v.dtype, (2, 3), v.scale) for v in maker.values]
    return maker.plan(outputs)


def test_a_size_that_a_step_needs_is_named(tmp_path: Path) -> None:
    def reshaped(maker: Maker) -> Any:
        q = maker.quantize(0, "int8")
        return maker.function("method.reshape", maker.function("method.clone", q, of=q), (3, 2), of=q)

    plan = made(reshaped)
    with pytest.raises(
        ExportError, match=r"Made cannot be exported with these sizes left open: step 2 \('method.reshape"
    ):
        save(plan, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []
    save(plan, tmp_path / "net.pt2", dynamic_batch=False)
    x = torch.randn(2, 3)
    y = torch.export.load(tmp_path / "net.pt2").module()(x)
    assert differing(y, plan.compile("reference")(x)) == 0


def test_a_step_that_looks_at_data_is_named(tmp_path: Path) -> None:
    def looking(maker: Maker) -> Any:
        return maker.function("torch.relu", Ref(0), inplace=maker.function("operator.not_", Ref(0)))

    with pytest.raises(ExportError, match=r"step 0 \('operator.not_0', operator.not_\) cannot be exported"):
        save(made(looking), tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_tensor(tmp_path: Path) -> None:
    plan = made(lambda maker: (maker.quantize(0, "int8"), 3))
    for ops in ("aten", "horizon"):
        with pytest.raises(ExportError, match="returns what is not a tensor"):
            to_torch_export(plan, ops=ops)  # type: ignore[arg-type]


def test_other_operators_are_refused(net: tuple[Plan, Tensor]) -> None:
    with pytest.raises(ExportError, match="ops is 'aten' or 'horizon', not 'onnx'"):
        to_torch_export(net[0], ops="onnx")  # type: ignore[arg-type]
