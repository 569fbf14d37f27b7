"""Which qconfig a module of `prepare_qat_fx` has: by name over type over global; None and `hybrid_dict` leave it in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.networks import assert_unchanged, snapshot
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization import get_default_qconfig, prepare_qat_fx
from quantization.roads import by_graph, forms, in_float

SIGNED = get_default_qconfig(activation_qkwargs={"dtype": "qint8"})
UNSIGNED = get_default_qconfig(activation_qkwargs={"dtype": "quint8"})
OUT = get_default_qconfig(activation_fake_quant=None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU()})
        self.act, self.last = nn.SiLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block["relu"](self.block["bn"](self.block["conv"](x)) + x)
        return self.last(self.act(x) * 0.5)


def quantize(config: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    return by_graph(Net(), torch.randn(2, 4, 8, 8), qconfig_dict=config, **options)[1]


def dtypes(int8: nn.Module) -> dict[str, torch.dtype]:
    return {name: int8.get_submodule(name).dtype8 for name in forms(int8) if int8.get_submodule(name).scale is not None}


def test_everything_by_default() -> None:
    int8 = quantize()
    assert not in_float(int8)
    assert list(forms(int8)) == ["_quant_0", "stem.0", "_generated_add_0", "act", "_generated_mul_0", "last"]


def test_global() -> None:
    assert set(dtypes(quantize({"": SIGNED})).values()) == {torch.int8}


def test_name_over_type_over_global() -> None:
    config = {"": SIGNED, "module_type": [(nn.Conv2d, UNSIGNED)], "module_name": [("block.conv", SIGNED)]}
    found = dtypes(quantize(config))
    assert found["stem.0"] == torch.uint8  # by the type of the group's convolution
    assert found["_generated_add_0"] == torch.int8  # by the name its convolution has in the float model
    assert found["act"] == torch.int8
    assert found["_quant_0"] == torch.uint8  # an input is quantized as the module that reads it


def test_the_longest_name_counts() -> None:
    config = {"module_name": [("block.conv", UNSIGNED), ("block", None)]}
    assert "_generated_add_0" in forms(quantize(config))
    assert "_generated_add_0" in in_float(quantize({"module_name": [("block", None)]}))


@pytest.mark.parametrize("part", ["block.conv", "block.bn", "block.relu", "block"])
def test_every_part_of_a_group_names_it(part: str) -> None:
    int8 = quantize({"module_name": [(part, None)]})
    assert [name for name, reason in in_float(int8).items() if "qconfig" in reason] == ["_generated_add_0"]
    assert int8.stem.get_submodule("0").high_precision


def test_types_of_functions_and_activations() -> None:
    int8 = quantize({"module_type": [(nn.SiLU, None)]})
    assert in_float(int8) == {"act": "its qconfig is None", "_generated_mul_0": "its input is float"}


@pytest.mark.parametrize(
    "hybrid", [{"module_name": ["last"]}, {"module_name": ["act", "last"]}, {"module_type": [nn.SiLU]}]
)
def test_hybrid(hybrid: dict[str, Any]) -> None:
    int8 = quantize(hybrid=True, hybrid_dict=hybrid)
    named = set(hybrid.get("module_name", ["act"]))
    assert {name for name, reason in in_float(int8).items() if reason == "its qconfig is None"} == named


def test_one_layer_alone() -> None:
    int8 = quantize({"": None, "module_name": [("block.conv", SIGNED)]})
    assert list(forms(int8)) == ["_quant_0", "_generated_add_0"]  # both operands are the same tensor
    assert list(in_float(int8)) == ["stem.0", "act", "_generated_mul_0", "last"]


def test_an_output_without_a_quantizer() -> None:
    int8 = quantize({"module_name": [("stem", OUT)]})
    assert int8.stem.get_submodule("0").high_precision
    assert "_quant_1" in forms(int8)  # what reads it quantizes it again
    int8 = quantize({"module_name": [("act", OUT)]})
    assert in_float(int8)["act"] == "its qconfig quantizes no output"


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"module_nam": []}, r"unknown keys \['module_nam'\]"),
    ({"module_name": [("block.conf", SIGNED)]}, "no module 'block.conf'"),
    ({"": torch.ao.quantization.default_qconfig}, "QConfig is not a qconfig of this package"),
    ({"module_type": [(nn.Conv2d, "int8")]}, "str is not a qconfig"),
]


@pytest.mark.parametrize(("config", "message"), ERRORS)
def test_wrong_dicts(config: dict[str, Any], message: str) -> None:
    model = Net().eval()
    before = snapshot(model)
    with pytest.raises(QuantizationError, match=message):
        prepare_qat_fx(model, config)
    assert_unchanged(model, before)


def test_wrong_names_elsewhere() -> None:
    with pytest.raises(QuantizationError, match="no module 'nothing'"):
        prepare_qat_fx(Net().eval(), hybrid_dict={"module_name": ["nothing"]})
    with pytest.raises(QuantizationError, match="hybrid_dict: unknown keys"):
        prepare_qat_fx(Net().eval(), hybrid_dict={"names": []})
    with pytest.raises(QuantizationError, match="prepare_custom_config_dict"):
        prepare_qat_fx(Net().eval(), prepare_custom_config_dict={"x": 1})
    assert prepare_qat_fx(Net().eval(), prepare_custom_config_dict={"preserved_attributes": []})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fake_quant": "pact"}, "activation_fake_quant='pact' is not one of"),
        ({"weight_fake_quant": None}, "weight_fake_quant=None is not one of"),
        ({"activation_observer": "best"}, "'best' is no observer"),
        ({"activation_qkwargs": {"dtype": "int4"}}, "dtype 'int4' is not supported"),
        ({"activation_qkwargs": {"axis": 1}}, "activation_qkwargs cannot choose an axis"),
        ({"weight_observer": "kl"}, "KLObserver has one scale per tensor only"),
        ({"weight_qkwargs": {"bins": 64}}, "MinMaxObserver: .*bins"),
    ],
)
def test_wrong_qconfigs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        get_default_qconfig(**options)


@pytest.mark.parametrize(("observer", "scales"), [("kl", 1), ("mse", 8)])
def test_kl_has_one_scale_before_a_depthwise_convolution_too(observer: str, scales: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    config = {"": get_default_qconfig(activation_observer=observer)}
    _, int8 = by_graph(model, torch.randn(2, 3, 8, 8), qconfig_dict=config)
    assert not in_float(int8)
    assert int8.get_submodule("0").scale.numel() == scales
