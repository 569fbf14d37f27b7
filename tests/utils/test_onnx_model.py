"""ONNX files as modules: the same numbers as ONNX Runtime, and what cannot be read is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.utils import OnnxError, load_onnx
from onnx_files import network, write


def test_it_computes_what_onnx_runtime_does(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = network(tmp_path / "net.onnx", batch="N", name="image.0")
    model = load_onnx(path)
    assert not model.training
    (declared,) = model.onnx_inputs
    assert (declared.name, declared.shape, declared.dtype) == ("image.0", (None, 3, 16, 24), torch.float32)
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        y = model(image_0=x)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"image.0": x.numpy()})
    assert y.shape == (2, 5)
    torch.testing.assert_close(y, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_it_is_fused_and_quantized(tmp_path: Path) -> None:
    model, x = load_onnx(network(tmp_path / "net.onnx", batch=2)), torch.randn(2, 3, 16, 24)
    int8 = horizon.quantize(model, [x], improve=False, progress=False)
    assert int8.quantization_report.in_float == []
    plan = horizon.plan.record(int8, x)
    assert plan.inputs == ("image",)
    assert [s.kind for s in plan.steps if s.kind == "group"] == ["group"] * 3
    assert "residual_ratio" in plan.steps[2].params


@pytest.mark.parametrize(
    ("name", "argument"), [("input.1", "input_1"), ("class", "_class"), ("0", "_0"), ("relu", "_relu")]
)
def test_names_that_are_none_in_python(tmp_path: Path, name: str, argument: str) -> None:
    model = load_onnx(network(tmp_path / "net.onnx", name=name))
    (placeholder,) = model.graph.find_nodes(op="placeholder")
    assert placeholder.target == argument
    assert model(**{argument: torch.randn(1, 3, 16, 24)}).shape == (1, 5)


def test_weights_among_the_inputs_are_none(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    proto = onnx.load(path)
    proto.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, [8, 3, 3, 3]))
    onnx.save(proto, path)
    assert [i.name for i in load_onnx(path).onnx_inputs] == ["image"]


def test_weights_in_another_file(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    x = torch.randn(1, 3, 16, 24)
    expected = load_onnx(path)(x)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    assert int((load_onnx(path)(x) != expected).sum()) == 0


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "w"], ["y"])
    path = write(
        tmp_path / "half.onnx", [node], {"x": [1, 3]}, {"y": [1, 3]}, {"w": np.ones(3, np.float16)}, TensorProto.FLOAT16
    )
    model = load_onnx(path)
    assert model.onnx_inputs[0].dtype == torch.float32
    assert model(torch.ones(1, 3)).dtype == torch.float32


def test_operators_that_cannot_be_converted_are_named(tmp_path: Path) -> None:
    last = [
        helper.make_node("Det", ["pooled"], ["d"], name="first"),
        helper.make_node("Det", ["d"], ["e"], name="second"),
        helper.make_node("Bernoulli", ["e"], ["logits"]),
    ]
    path = network(tmp_path / "net.onnx", last=last)
    with pytest.raises(OnnxError) as caught:
        load_onnx(path)
    assert (
        "net.onnx: onnx2torch cannot convert Det (node 'first' and 1 more, opset 17); Bernoulli (node 'logits', opset 17)"
        in str(caught.value)
    )


def test_an_operator_of_another_domain_is_named(tmp_path: Path) -> None:
    path = network(
        tmp_path / "net.onnx", last=[helper.make_node("Gelu", ["pooled"], ["logits"], domain="com.microsoft")]
    )
    with pytest.raises(OnnxError, match=r"cannot convert com\.microsoft\.Gelu \(node 'logits'"):
        load_onnx(path)


def test_a_quantized_file_is_told_apart(tmp_path: Path) -> None:
    weights = {"s": np.float32(0.1), "z": np.int8(0)}
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    weights = {name: np.array(value) for name, value in weights.items()}
    path = write(tmp_path / "int8.onnx", [node, back], {"x": [1, 3]}, {"y": [1, 3]}, weights)
    with pytest.raises(OnnxError, match="the file is quantized already: take the float one"):
        load_onnx(path)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 8])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxError, match="is not an ONNX file"):
        load_onnx(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_onnx(tmp_path / "absent.onnx")


def test_a_missing_extra_is_said(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['onnx2torch'] = None\n"
        "from horizon_plugin_pytorch.utils import load_onnx\n"
        "try: load_onnx(sys.argv[1])\n"
        "except ImportError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(network(tmp_path / "net.onnx"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "to read an ONNX file, onnx2torch is needed: pip install 'horizon_plugin_pytorch[onnx]'"
    )
