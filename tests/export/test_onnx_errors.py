"""What `to_onnx` and `verify` refuse, how they say it, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.export import ExportError, MissingExtraError, to_onnx, verify
from horizon_plugin_pytorch.plan import Plan
from horizon_plugin_pytorch.plan.program import Const, Ref

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x))
        return {"logits": self.head(x.mean((2, 3))), "map": x}


class With(nn.Module):
    """A convolution and a function of it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


def record(model: nn.Module, *shape: int) -> tuple[Plan, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape or (2, 3, 8, 8))
    return horizon.plan.record(horizon.quantize(model.eval(), [x], improve=False, progress=False), x), x


@pytest.fixture(scope="module")
def net() -> tuple[Plan, Tensor]:
    return record(Net())


def refused(plan: Plan, folder: Path, match: str, **options: Any) -> None:
    """It raises, saying so, and the folder is as it was."""
    (folder / "kept.onnx").write_bytes(b"as it was")
    for name in ("kept.onnx", "new.onnx"):
        with pytest.raises(ExportError, match=match):
            to_onnx(plan, folder / name, **options)
    assert [p.name for p in folder.iterdir()] == ["kept.onnx"]
    assert (folder / "kept.onnx").read_bytes() == b"as it was"


# -- names and shapes ---------------------------------------------------------------------------------------------------------


def test_names_of_inputs_and_outputs(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    graph = onnx.load(to_onnx(net[0], tmp_path / "net.onnx")).graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["x", "logits", "map"]
    given = {"input_names": ["image"], "output_names": ["scores", "conv"]}  # "conv" is a node's name, too
    graph = onnx.load(to_onnx(net[0], tmp_path / "net.onnx", **given)).graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["image", "scores", "conv"]
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert verify(net[0], tmp_path / "net.onnx", net[1]).sqnr > 40


def test_names_that_do_not_fit(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    refused(net[0], tmp_path, "give as many input_names", input_names=["a", "b"])
    refused(net[0], tmp_path, "no name twice", input_names=["a"], output_names=["a", "b"])
    refused(net[0], tmp_path, "has 2 outputs, but there are 1 names", output_names=["a"])
    refused(net[0], tmp_path, "form 'int4' is not one of qdq, qoperator, float", form="int4")


def test_sizes_are_fixed_where_asked(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    def shape(**options: Any) -> list[Any]:
        graph = onnx.load(to_onnx(net[0], tmp_path / "net.onnx", **options)).graph
        return [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]

    assert shape() == ["batch", 3, "height", "width"]
    assert shape(dynamic_batch=False) == [2, 3, "height", "width"]
    assert shape(dynamic_size=False) == ["batch", 3, 8, 8]
    assert shape(dynamic_batch=False, dynamic_size=False) == [2, 3, 8, 8]


def test_a_plan_of_one_size(tmp_path: Path) -> None:
    """Fixed where nothing is asked; refused where another size is."""
    model = With(nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 5)))
    plan, _ = record(model)
    graph = onnx.load(to_onnx(plan, tmp_path / "net.onnx")).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    (tmp_path / "net.onnx").unlink()
    refused(
        plan,
        tmp_path,
        "does not accept another image size than recorded: step .* export with dynamic_size=False",
        dynamic_size=True,
    )


def test_a_plan_of_one_batch(tmp_path: Path) -> None:
    plan, _ = record(With(lambda x: x.reshape(2, 256)))
    refused(plan, tmp_path, "does not accept another batch size .* export with dynamic_batch=False")
    to_onnx(plan, tmp_path / "net.onnx", dynamic_batch=False)


def test_a_pool_that_needs_its_size(tmp_path: Path) -> None:
    plan, _ = record(With(lambda x: torch.nn.functional.adaptive_avg_pool2d(x.exp(), 3)))
    to_onnx(plan, tmp_path / "net.onnx")
    (tmp_path / "net.onnx").unlink()
    refused(plan, tmp_path, r"step \d+ \('adaptive_avg_pool2d', .*needs sizes that are known", dynamic_size=True)


# -- what has no form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.tril(), r"step \d+ \('tril', method.tril\): method.tril has no form in ONNX here: replace it"),
        (lambda x: torch.round(x, decimals=2), "multiply, round and divide"),
        (lambda x: x.norm(p=3, dim=1), "use 1 or 2"),
        (lambda x: x[:, [True, False, True, False]], "an index that is a list"),
    ],
)
def test_functions_without_a_form(function: Any, message: str, tmp_path: Path) -> None:
    plan, _ = record(With(function))
    refused(plan, tmp_path, message, dynamic_batch=False, dynamic_size=False)


def test_malformed_plans(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    plan, _ = net

    def with_step(i: int, **changes: Any) -> Plan:
        steps = list(plan.steps)
        steps[i] = dataclasses.replace(steps[i], **changes)
        return dataclasses.replace(plan, steps=tuple(steps))

    group = next(i for i, s in enumerate(plan.steps) if s.kind == "group")
    params = plan.steps[group].params
    refused(
        with_step(group, args=(Ref(99),)),
        tmp_path,
        rf"the plan is not valid: step {group} \('conv'\): value %99 is not there yet",
    )
    refused(with_step(group, params={**params, "weight": Const("gone")}), tmp_path, "there is no constant 'gone'")
    refused(with_step(group, kind="magic"), tmp_path, "unknown kind 'magic'")
    bias = plan.constants["conv.bias"].float()
    refused(dataclasses.replace(plan, constants={**plan.constants, "conv.bias": bias}), tmp_path, "its bias int32")
    scale = -plan.constants["conv.scale"]
    refused(
        dataclasses.replace(plan, constants={**plan.constants, "conv.scale": scale}),
        tmp_path,
        "not positive and finite",
    )


def test_a_folder_that_is_not_there(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        to_onnx(net[0], tmp_path / "gone" / "net.onnx")


def test_onnx_is_imported_when_it_is_used() -> None:
    code = "import sys, horizon_plugin_pytorch as h; h.export.to_onnx; h.export.verify; print(sorted({'onnx', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_onnx(net: tuple[Plan, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'horizon_plugin_pytorch\[export\]'"):
        to_onnx(net[0], tmp_path / "net.onnx")


# -- verify -------------------------------------------------------------------------------------------------------------------


def test_verify_counts(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    """A file whose weights were changed differs, and verify says by how much; items can be given in every way."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plan, x = net
    path = to_onnx(plan, tmp_path / "net.onnx", form="qoperator")
    found = verify(plan, path, [x, (x * 2,), {"x": -x}])
    assert found.items == 3 and found.differing == 0 and found.sqnr == inf
    assert [(o.name, o.elements, o.steps) for o in found.outputs] == [("logits", 30, None), ("map", 3072, 0.0)]
    assert "0 of 3,072 elements differ, by 0 (0 steps) at most, SQNR ∞ dB" in str(found)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "conv.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 10**4, tensor.name))
    onnx.save(model, path)
    found = verify(plan, path, x)
    logits, feature_map = found.outputs
    assert feature_map.differing > 500 and feature_map.steps is not None and feature_map.steps >= 2
    assert feature_map.steps == round(feature_map.steps)
    assert feature_map.largest == pytest.approx(feature_map.steps * float(plan.constants["conv.scale"]), rel=1e-6)
    assert (
        logits.differing == 10
        and logits.steps is None
        and logits.sqnr < 60
        and found.sqnr == min(o.sqnr for o in found.outputs)
    )


def test_verify_in_openvino(net: tuple[Plan, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    found = verify(net[0], to_onnx(net[0], tmp_path / "net.onnx"), net[1], "openvino")
    assert found.runtime.startswith("openvino 2") and found.sqnr > 40


def test_verify_refuses(net: tuple[Plan, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plan, x = net
    path = to_onnx(plan, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="runtime 'tensorrt' is not one of onnxruntime, openvino"):
        verify(plan, path, x, "tensorrt")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        verify(plan, tmp_path / "gone.onnx", x)
    with pytest.raises(ExportError, match="no data"):
        verify(plan, path, [])
    with pytest.raises(ExportError, match="Net takes x; the data has y"):
        verify(plan, path, {"y": x})
    with pytest.raises(ExportError, match="does not run in onnxruntime on these inputs|not written from this plan"):
        verify(record(With(torch.exp))[0], path, x)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="cannot be opened by onnxruntime"):
        verify(plan, tmp_path / "text.onnx", x)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match="openvino is not installed: pip install openvino"):
        verify(plan, path, x, "openvino")
