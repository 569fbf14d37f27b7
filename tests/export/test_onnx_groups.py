"""Fused groups in ONNX: every pattern, and groups drawn at random, beside ONNX Runtime and OpenVINO."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export import made, networks
from horizon_plugin_pytorch.export import to_onnx, verify
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan import Plan, Step
from plan.native import plans

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FORMS = ("qdq", "qoperator")
OPENVINO = importlib.util.find_spec("openvino") is not None


def with_integers(plan: Plan) -> Plan:
    """The plan with its groups' integers as outputs, too: 1 step shows there."""
    wanted = [
        i
        for i, value in enumerate(plan.values[len(plan.inputs) :], start=len(plan.inputs))
        if value.scale is not None and plan.constants[value.scale].dim() == 0
    ]
    from horizon_plugin_pytorch.plan.program import Ref, refs

    return dataclasses.replace(plan, outputs=(*map(Ref, wanted), *refs(plan.outputs)))


@pytest.mark.parametrize(("kind", "norm", "add", "activation"), networks.PATTERNS)
def test_every_pattern(kind: str, norm: str, add: bool, activation: Any, tmp_path: Path) -> None:
    """ConvNd, ConvTransposeNd and Linear, with what may follow: no integer is off by more than 1, and on integers none differs."""
    for tail in (True, False):
        plan, inputs = networks.pattern(kind, norm, add, activation, tail)
        plan = with_integers(plan)
        for form in FORMS:
            to_onnx(plan, tmp_path / "group.onnx", form=form)
            found = verify(plan, tmp_path / "group.onnx", inputs)
            integers = [o for o in found.outputs if o.steps is not None]
            assert len(integers) >= 1 and all(o.steps is not None and o.steps <= 1 for o in integers), found
            assert found.sqnr >= 40, found
            if form == "qoperator":
                assert found.differing == 0, found


@pytest.mark.parametrize(("kind", "norm", "add", "activation"), networks.PATTERNS)
def test_every_pattern_in_openvino(kind: str, norm: str, add: bool, activation: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    plan, inputs = networks.pattern(kind, norm, add, activation, True)
    plan = with_integers(plan)
    to_onnx(plan, tmp_path / "group.onnx")
    found = verify(plan, tmp_path / "group.onnx", inputs, "openvino")
    assert all(o.steps <= 1 for o in found.outputs if o.steps is not None), found
    assert found.sqnr >= 40, found


# -- drawn --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    geometry: Geometry
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    in_dtype: str
    out_dtype: str
    residual: str | None
    activation: str | None
    per_channel: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(0, 3))
    common = {
        "in_dtype": draw(st.sampled_from(["int8", "uint8"])),
        "out_dtype": draw(st.sampled_from(["int8", "uint8"])),
        "residual": draw(st.sampled_from([None, None, "int8", "uint8"])),
        "activation": draw(st.sampled_from([None, "relu", "relu6"])),
        "per_channel": draw(st.booleans()) and dims > 0,
        "seed": draw(st.integers(0, 2**16)),
    }
    if dims == 0:
        into, out = draw(st.integers(1, 40)), draw(st.integers(1, 20))
        leading = draw(st.sampled_from([(1,), (5,), (2, 3)]))
        return Case(Geometry(0), (*leading, into), (out, into), **common)
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    into, out = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 1, 2, 3]))
    of = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = of(1, 3), of(1, 2), of(1, 2)
    transposed = draw(st.booleans())
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding: Any = tuple(draw(st.integers(0, r - 1)) for r in reach)
    extra, mode = (0,) * dims, "zeros"
    if transposed:
        extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
    elif set(stride) == {1} and draw(st.integers(0, 3)) == 0:
        padding = "same"
    elif draw(st.integers(0, 3)) == 0:
        mode = draw(st.sampled_from(["reflect", "replicate", "circular"]))
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    geometry = Geometry(dims, transposed, kernel, stride, padding, dilation, extra, groups, mode)
    size = tuple(draw(st.integers(max(r, 4), r + 5)) for r in reach)
    weight = (groups * into, out, *kernel) if transposed else (groups * out, into, *kernel)
    return Case(geometry, (draw(st.integers(1, 2)), groups * into, *size), weight, **common)


def build(case: Case) -> tuple[Plan, tuple[torch.Tensor, ...]]:
    torch.manual_seed(case.seed)
    geometry = case.geometry
    weight = torch.randint(-127, 128, case.weight, dtype=torch.int8)
    inputs = [plans.integers(case.shape, case.in_dtype)]
    if case.residual:
        y = geometry.differentiable(inputs[0], weight.float())
        inputs.append(plans.integers(tuple(y.shape), case.residual))
    maker = plans.Maker(**{f"x{i}": tuple(x.shape) for i, x in enumerate(inputs)})
    x = maker.quantize(0, case.in_dtype)
    other = maker.quantize(1, case.residual) if case.residual else None
    channels = weight.shape[geometry.weight_axis] * (geometry.groups if geometry.transposed else 1)
    scale = torch.rand(channels) * 0.1 + 0.02 if case.per_channel else None
    y = maker.group(
        x, geometry, weight, residual=other, activation=case.activation, dtype=case.out_dtype, scale=scale, spread=20.0
    )  # fmt: skip
    return made.recorded(maker, y, *inputs), tuple(inputs)


@settings(max_examples=60)
@given(cases())
def test_drawn(case: Case) -> None:
    plan, inputs = build(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "group.onnx"
        for form in FORMS:
            to_onnx(plan, path, form=form, dynamic_size=False)
            found = verify(plan, path, inputs)
            assert found.outputs[0].steps is not None and found.outputs[0].steps <= 1, found
            if form == "qoperator":
                assert found.differing == 0, found
            elif OPENVINO and case.geometry.dims == 2 and not case.per_channel:
                # OpenVINO 2026.4 errs in odd cases of other dimensions; scales per channel are for depthwise readers, see below
                found = verify(plan, path, inputs, "openvino")
                assert found.outputs[0].steps is not None and found.outputs[0].steps <= 1, found


def test_a_channel_scale_becomes_one_scale_and_every_integer_stays(tmp_path: Path) -> None:
    """Producer with scales per channel, ReLU6 whose bound cuts, then a depthwise convolution: Min with a vector, all integers equal."""
    torch.manual_seed(0)
    of = lambda n: (n, n)  # noqa: E731
    plain = Geometry(2, False, of(3), of(1), of(1), of(1), of(0), 1)
    depthwise = dataclasses.replace(plain, groups=8)
    maker = plans.Maker(x=(1, 3, 6, 6))
    x = maker.quantize(0, "int8")
    scale = torch.rand(8) * 0.1 + 0.02
    y = maker.group(
        x,
        plain,
        torch.randint(-127, 128, (8, 3, 3, 3), dtype=torch.int8),
        activation="relu6",
        dtype="uint8",
        scale=scale,
        spread=20.0,
    )
    z = maker.group(y, depthwise, torch.randint(-127, 128, (8, 1, 3, 3), dtype=torch.int8), dtype="int8", spread=5.0)
    inputs = plans.integers((1, 3, 6, 6), "int8")
    plan = made.recorded(maker, z, inputs)
    for form in FORMS:
        path = to_onnx(plan, tmp_path / "net.onnx", form=form)
        model = onnx.load(path)
        assert [n.op_type for n in model.graph.node].count("Min") == 1
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                tensors = {t.name: list(t.dims) for t in model.graph.initializer}
                activation = node.input[0] not in tensors
                assert not activation or tensors[node.input[1]] == []
        found = verify(plan, path, inputs)
        assert found.differing == 0, found
        if OPENVINO and form == "qdq":
            assert verify(plan, path, inputs, "openvino").outputs[0].steps == 0


def test_a_channel_scale_that_others_read(tmp_path: Path) -> None:
    """Made by a stub and by a group, read by a function, by operators of other shapes and as an output: each gets the true value."""
    torch.manual_seed(0)
    plain = Geometry(2, False, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 1)
    depthwise = dataclasses.replace(plain, groups=6)
    maker = plans.Maker(x=(2, 6, 5, 5))
    x = maker.quantize(0, "int8", torch.rand(6) + 0.5)
    weight = torch.randint(-127, 128, (6, 1, 3, 3), dtype=torch.int8)
    scale = torch.rand(6) * 0.1 + 0.02
    y = maker.group(x, depthwise, weight, activation="relu", dtype="uint8", scale=scale, spread=20.0)
    real = maker.add(Step("dequantize", "real", (y,)), "float32")
    mean = maker.operator("Mean", (y,), "uint8", 0.04, dim=(2, 3))
    added = maker.operator("Add", (y, y), "uint8", 0.1)
    inputs = plans.integers((2, 6, 5, 5), "int8")
    plan = made.recorded(maker, (real, maker.function("torch.exp", real), mean, added, y), inputs)
    for form in FORMS:
        path = to_onnx(plan, tmp_path / "net.onnx", form=form)
        found = verify(plan, path, inputs)
        assert all(o.sqnr > 120 if o.steps is None else o.steps <= 1 for o in found.outputs), found
        assert [len(v.type.tensor_type.shape.dim) for v in onnx.load(path).graph.output] == [4, 4, 2, 4, 4]
