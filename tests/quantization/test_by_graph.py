"""`prepare_qat_fx` on forwards written in many ways: the float model is kept, QAT evaluates to int8, and the report tells the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization import FakeQuantState, prepare_qat_fx, set_fake_quantize
from quantization.programs import PROGRAMS
from quantization.roads import by_graph, call, differing, in_float, sqnr


def close(actual: Any, expected: Any, least: float) -> None:
    a, b = tree_leaves(actual), tree_leaves(expected)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(y, Tensor):
            assert x.shape == y.shape and sqnr(x, y) > least
        else:
            assert x == y


def run(model: nn.Module, item: Any) -> Any:
    return model(**item) if isinstance(item, dict) else model(*item) if isinstance(item, tuple) else model(item)


def trains(qat: nn.Module, item: Any) -> None:
    """A forward in training mode, fake quantization in floating point, is what the integers of evaluation are; gradients flow."""
    expected = call(qat, item)
    set_fake_quantize(qat, FakeQuantState.QAT)
    actual = run(qat.train(), copy.deepcopy(item))
    close(actual, expected, least=45)
    sum(t.square().sum() for t in tree_leaves(actual) if isinstance(t, Tensor) and t.requires_grad).backward()
    gradients = {n: p.grad for n, p in qat.named_parameters() if p.grad is not None}
    assert gradients and all(bool(g.isfinite().all()) for g in gradients.values())
    qat.eval()


@pytest.mark.parametrize("shapes", [True, False], ids=["shapes known", "shapes unknown"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, shapes: bool) -> None:
    kind, item, expect = PROGRAMS[name]
    if not shapes and isinstance(item, dict):
        pytest.skip("without example_inputs an argument has its default")
    model = kind().eval()
    expected = call(model, item)
    qat, int8 = by_graph(model, item, shapes=shapes)
    close(call(int8, item), expected, least=27)
    used = copy.deepcopy(item)
    run(int8, used)
    assert differing(used, item) == 0
    if name != "dropout":
        trains(qat, item)
    set_fake_quantize(qat, FakeQuantState.FLOAT)
    close(call(qat, item), expected, least=90)  # what prepare rewrote is the same function
    if "float" in expect and shapes:
        assert set(expect["float"]) <= set(in_float(int8)), in_float(int8)
        if not expect["float"]:
            assert not in_float(int8)
    assert all(reason for reason in in_float(int8).values())


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_channels_of_a_linear_layer_are_not_those_of_a_convolution() -> None:
    """A depthwise convolution in one dimension reads a linear layer's ``[N, 8, 8]``: one scale per channel would be another axis."""
    x = torch.randn(2, 8, 8) * torch.logspace(-2, 2, 8)
    model = Two(nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1, groups=8))
    with torch.no_grad():
        model.first.weight.mul_(torch.logspace(-2, 2, 8).unsqueeze(1))
    _, int8 = by_graph(model, x)
    assert int8.first.scale.dim() == 0
    _, int8 = by_graph(Two(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3, padding=1, groups=8)), x)
    assert int8.first.scale.shape == (8,)


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout2d(0.3)])
def test_scales_per_channel_before_depthwise(between: nn.Module) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), between, nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 4, 1))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 8).view(-1, 1, 1, 1))
    expected = call(model.eval(), x)
    _, int8 = by_graph(model, x)
    assert int8.get_submodule("0").scale.shape == (8,) and int8.get_submodule("2").scale.dim() == 0
    assert sqnr(call(int8, x), expected) > 35


@pytest.mark.parametrize("shapes", [True, False])
def test_images_without_a_batch(shapes: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 8, 8)
    if not shapes:
        with pytest.raises(QuantizationError, match=r"'0'.*batch"):
            by_graph(model, x, shapes=False)
        return
    expected = call(model, x)
    _, int8 = by_graph(model, x)
    assert sqnr(call(int8, x), expected) > 30


def test_a_padded_unsigned_input_is_padded_with_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=2)).eval()
    x = torch.rand(1, 3, 6, 6)
    expected = call(model, x)
    _, int8 = by_graph(model, x)
    assert int8._quant_0.dtype8 == int8.get_submodule("0").dtype8 == torch.uint8
    assert sqnr(call(int8, x), expected) > 35


@pytest.mark.parametrize("module", [nn.Conv2d(4, 8, 3), nn.Linear(4, 3), nn.ConvTranspose1d(4, 2, 3)])
def test_a_bare_anchor(module: nn.Module) -> None:
    x = torch.randn(2, 4, *[6] * (module.weight.dim() - 2))
    expected = call(module.eval(), x)
    _, int8 = by_graph(module, x)
    assert sqnr(call(int8, x), expected) > 30
    assert len(int8.quantization_report.integer) == 2


class Untraceable(nn.Module):
    """Control flow between a convolution, a block and a list of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.heads = nn.ModuleList([nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        if float(x.abs().max()) > 1e9:
            raise ValueError
        x = self.block(x)
        return [head(x) for head in self.heads]


def test_an_untraceable_model_is_quantized_in_parts() -> None:
    model, x = Untraceable(), torch.randn(2, 3, 12, 12)
    expected = call(model.eval(), x)
    qat, int8 = by_graph(model, x)
    close(call(int8, x), expected, least=30)
    assert not in_float(int8)
    assert set(model.state_dict()) - {k for k in model.state_dict() if k.startswith("block.1")} <= set(qat.state_dict())


class OwnGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_a_graph_module_inside_is_part_of_the_whole() -> None:
    model, x = OwnGraph(), torch.randn(2, 3, 12, 12)
    expected = call(model.eval(), x)
    _, int8 = by_graph(model, x)
    assert sqnr(call(int8, x), expected) > 30
    assert len(int8.quantization_report.integer) == 4  # the input and three convolutions, nothing twice


def test_models_that_cannot_be_prepared() -> None:
    with pytest.raises(QuantizationError, match="no convolution and no linear layer"):
        prepare_qat_fx(nn.Sequential(nn.ReLU()))
    with pytest.raises(QuantizationError, match=r"0\.weight is torch\.float64.*model\.float\(\)"):
        prepare_qat_fx(nn.Sequential(nn.Conv2d(1, 1, 1)).double())
    with pytest.raises(QuantizationError, match="prepared already"):
        prepare_qat_fx(prepare_qat_fx(nn.Sequential(nn.Conv2d(1, 1, 1))))
    with pytest.raises(QuantizationError, match="qconfig of every convolution"):
        prepare_qat_fx(nn.Sequential(nn.Conv2d(1, 1, 1)), {"": None})


def test_a_module_that_cannot_be_traced_does_not_keep_its_input_from_being_integers() -> None:
    kind, item, _ = PROGRAMS["module_that_cannot_be_traced"]
    _, int8 = by_graph(kind(), item)
    assert list(in_float(int8)) == ["opaque"] and not int8.a.high_precision


class Attributes(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mean, self.scales = nn.Conv2d(3, 4, 3), torch.rand(3, 1, 1), [torch.ones(1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) * self.scales[0])


def test_shapes_are_found_in_silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model, x = Attributes().eval(), torch.randn(2, 3, 8, 8)
    expected = call(model, x)
    _, int8 = by_graph(model, x)
    assert sqnr(call(int8, x), expected) > 30
    assert not int8.fusion_report.notes
    assert capfd.readouterr() == ("", "") and not caplog.records
