"""Six networks in ONNX: valid, named, dynamic; equal to the plan on integers, and near it where a runtime computes in its own way.

Where a runtime rounds one element of one layer differently, a network makes more of it: moving a single element of the input by one step
changes the output of these by 15 to 40 dB. So the distance is measured twice: layer by layer, each fed with the plan's integers, and for
the whole network against what the plan itself does when one input in a thousand is off by a step.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import inf, log10
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import horizon_plugin_pytorch as horizon
from export import made, networks
from horizon_plugin_pytorch.export import to_onnx, verify

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")

FORMS = ("qdq", "qoperator", "float")


@pytest.fixture(scope="module")
def exported() -> Iterator[Any]:
    """The file of a network in a form, written once."""
    folder = Path(tempfile.mkdtemp())

    @cache
    def export(name: str, form: str = "qdq") -> Path:
        return to_onnx(networks.network(name)[0], folder / f"{name}.{form}.onnx", form=form)  # type: ignore[arg-type]

    yield export
    shutil.rmtree(folder)


def shapes(values: Any) -> list[list[Any]]:
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", networks.SIZES)
def test_valid_with_strict_shape_inference(name: str, form: str, exported: Any) -> None:
    model = onnx.load(exported(name, form))
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    assert shapes(model.graph.input) == [["batch", 3, "height", "width"]]
    assert all(shape[0] == "batch" for shape in shapes(model.graph.output))
    known = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    assert all(o in known for node in model.graph.node for o in node.output)
    kinds = Counter(n.op_type for n in model.graph.node)
    assert bool(kinds["QuantizeLinear"]) == (form != "float") == bool(kinds["DequantizeLinear"])
    assert bool(kinds["QLinearConv"]) == (form == "qoperator")


# -- what the files look like -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.SIZES)
def test_between_an_anchor_and_its_add_nothing_is_rounded(name: str, exported: Any) -> None:
    graph = onnx.load(exported(name)).graph
    makers = {o: n for n in graph.node for o in n.output}
    adds = [n for n in graph.node if n.op_type == "Add" and n.name.endswith(".add")]  # others are operators of the plan
    steps = networks.network(name)[0].steps
    assert len(adds) == sum(len(s.args) == 2 for s in steps if s.kind == "group")
    for node in adds:
        anchor, other = (makers[i] for i in node.input)
        assert anchor.op_type in ("Conv", "ConvTranspose")
        while other.op_type in ("MaxPool", "Resize"):
            other = makers[other.input[0]]
        assert other.op_type == "DequantizeLinear"


def test_names_weights_and_metadata(exported: Any) -> None:
    model = onnx.load(exported("resnet18"))
    plan = networks.network("resnet18")[0]
    names = {n.name for n in model.graph.node}
    assert {"conv1", "layer1.0.conv1", "layer4.1.conv1", "fc", "conv1.quantize", "conv1.relu"} <= names
    assert len(names) == len(model.graph.node)
    assert [i.name for i in model.graph.input] == ["x"] and [o.name for o in model.graph.output] == ["fc"]
    tensors = {t.name: t for t in model.graph.initializer}
    weight, scale, bias = (tensors[f"conv1.{n}"] for n in ("weight", "weight_scale", "bias"))
    assert (weight.data_type, list(weight.dims)) == (onnx.TensorProto.INT8, [64, 3, 7, 7])
    assert (scale.data_type, list(scale.dims)) == (onnx.TensorProto.FLOAT, [64])
    assert (bias.data_type, list(bias.dims)) == (onnx.TensorProto.INT32, [64])
    assert np.array_equal(onnx.numpy_helper.to_array(weight), plan.constants["conv1.weight"].numpy())
    zero_points = {t: onnx.numpy_helper.to_array(tensors[t]) for t in tensors if t.startswith("zero_point")}
    assert {(str(z.dtype), int(z)) for z in zero_points.values()} == {("uint8", 0), ("int8", 0)}
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata["horizon.version"] == horizon.__version__ == model.producer_version
    assert metadata["horizon.model"] == "ResNet" and metadata["horizon.form"] == "qdq"
    scales = json.loads(metadata["horizon.scales"])
    assert scales["conv1.scale"] == {"scale": float(plan.constants["conv1.scale"]), "dtype": "uint8"}


def test_transposed_convolutions_scale_their_output_channels(exported: Any) -> None:
    graph = onnx.load(exported("pose")).graph
    axes = {n.output[0]: n.attribute[0].i for n in graph.node if n.op_type == "DequantizeLinear" and n.attribute}
    found = [axes[n.input[1]] for n in graph.node if n.op_type == "ConvTranspose"]
    assert found == [1, 1, 1]


# -- ONNX Runtime -------------------------------------------------------------------------------------------------------------


def of_a_sigmoid(name: str, output: Any) -> bool:
    """CenterFace ends in a sigmoid in float32, whose last digits are the runtime's own."""
    return name == "centerface" and output.steps is None and output.sqnr > 90


@pytest.mark.parametrize("name", networks.SIZES)
def test_onnxruntime_on_integers_gives_the_plan(name: str, exported: Any) -> None:
    """Another batch size than recorded, the runtime's optimizations off and on: 0 elements differ."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plan, x = networks.network(name)
    for optimize in (False, True):
        found = verify(plan, exported(name, "qoperator"), x, optimize=optimize)
        assert sum(o.differing for o in found.outputs if not of_a_sigmoid(name, o)) == 0, found


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_another_image_size(name: str, exported: Any) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plan, x = networks.network(name)
    wider = torch.cat([x, x.flip(-1)], -1)[:2]
    found = verify(plan, exported(name, "qoperator"), wider)
    assert found.differing == 0 and found.outputs[0].elements > 0, found
    assert verify(plan, exported(name, "qdq"), wider).sqnr > 20


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_the_float_form_is_near_the_float_network(name: str, exported: Any) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    _, x = networks.network(name)
    net = dataclasses.replace(networks._networks()[name], size=(3, *networks.SIZES[name]))
    with torch.no_grad():
        expected = net.build()(x)
    session = runtime.InferenceSession(str(exported(name, "float")), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert sqnr(torch.from_numpy(y), expected) > 18


# -- near the plan, layer by layer and as a whole -----------------------------------------------------------------------------


def sqnr(actual: Tensor, expected: Tensor) -> float:
    noise = float((actual.double() - expected.double()).square().sum())
    return inf if noise == 0 else 10 * log10(float(expected.double().square().sum()) / noise)


def one_step_in_a_thousand(name: str) -> float:
    """How near the plan's outputs stay, in dB, when one element in a thousand of its quantized input is off by one step."""
    plan, x = networks.network(name)
    run, scale = plan.compile("reference"), float(plan.constants[plan.values[1].scale or ""])
    moved = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 1e-3
    outputs = [tree_leaves(run(item)) for item in (torch.where(moved, x - x.sign() * scale, x), x)]
    return min(sqnr(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", networks.SIZES)
def test_layer_by_layer_no_integer_is_off_by_more_than_one(name: str, runtime: Any, tmp_path: Path) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    plan, x = networks.network(name)
    cut, inputs = made.apart(plan, x[:1])
    to_onnx(cut, tmp_path / "layers.onnx", dynamic_batch=False, dynamic_size=False)
    found = verify(cut, tmp_path / "layers.onnx", inputs, runtime)
    assert len(found.outputs) > 10 and all(o.steps is not None and o.steps <= 1 for o in found.outputs), found
    assert found.sqnr >= 40, found
    assert found.differing <= 1e-4 * sum(o.elements for o in found.outputs), found


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", networks.SIZES)
def test_the_whole_network(name: str, runtime: Any, exported: Any) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    plan, x = networks.network(name)
    found = verify(plan, exported(name), x, runtime)
    assert found.sqnr >= min(40, one_step_in_a_thousand(name)), found


# -- OpenVINO fuses -----------------------------------------------------------------------------------------------------------

ELEMENTWISE = {"Eltwise", "Subgraph", "Math", "FakeQuantize"}


def kind(node: Any) -> str:
    return str(node.get_rt_info()["layerType"].astype(str))


def after_convolutions(path: Path) -> tuple[Counter[str], Counter[str]]:
    """How many nodes of each kind OpenVINO runs; and of the elementwise ones, what made their inputs if that was a convolution."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = compiled.get_runtime_model().get_ops()
    separate: Counter[str] = Counter()
    for node in nodes:
        makers = {kind(i.get_source_output().get_node()) for i in node.inputs()} if kind(node) in ELEMENTWISE else set()
        separate.update(["Deconvolution"] if "Deconvolution" in makers else makers & {"Convolution"})
    return Counter(map(kind, nodes)), separate


@pytest.mark.parametrize("name", networks.SIZES)
def test_openvino_runs_groups_as_one_node(name: str, exported: Any) -> None:
    """No separate add or clip after a convolution; an add after a transposed one, which OpenVINO does not fuse in any model."""
    plan = networks.network(name)[0]
    counts, separate = after_convolutions(exported(name))
    groups = [s.params["geometry"] for s in plan.steps if s.kind == "group"]
    assert counts["Convolution"] == sum(g["dims"] == 2 and not g["transposed"] for g in groups)
    assert counts["Deconvolution"] == sum(g["transposed"] for g in groups)
    assert separate["Convolution"] == 0
    added = sum(len(s.args) == 2 and s.params["geometry"]["transposed"] for s in plan.steps if s.kind == "group")
    assert separate["Deconvolution"] == added == (3 if name == "unet" else 0)


@pytest.mark.parametrize("name", networks.SIZES)
def test_openvino_convolves_integers(name: str, exported: Any) -> None:
    """What runs as an int8 kernel, by the names of the kernels."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(exported(name))), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for node in compiled.get_runtime_model().get_ops():
        if kind(node) in ("Convolution", "Deconvolution", "FullyConnected"):
            kernel = str(node.get_rt_info()["primitiveType"].astype(str))
            assert kernel.endswith(("I8", "u8", "i8")), f"{node.get_friendly_name()}: {kernel}"
