"""`convert`: what it refuses, what it leaves as it is, and that its result depends on nothing but the numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.networks import assert_unchanged, snapshot
from horizon_plugin_pytorch import qat_mode
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.quantization import (
    FakeQuantState,
    calibrate,
    convert,
    convert_fx,
    get_default_qconfig,
    prepare_qat_fx,
    set_fake_quantize,
)
from quantization.roads import by_graph, call, differing


class Net(nn.Module):
    """Dense, depthwise, transposed and linear groups, an add, pools, tables and a float island."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dw, self.bn_dw = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2, 2), nn.GroupNorm(2, 8)
        self.act, self.pool, self.fc = nn.SiLU(), nn.AvgPool2d(2), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.relu6(self.bn_a(self.a(x)))
        y = self.bn_dw(self.dw(x)) + x
        z = self.norm(self.up(nn.functional.max_pool2d(self.act(y), 2)))
        return self.fc(self.pool(self.pool(z * y)).flatten(1)), y


def item() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def calibrated(module: nn.Module | None = None, x: Tensor | None = None) -> nn.Module:
    x = item() if x is None else x
    qat = prepare_qat_fx((module or Net()).eval(), example_inputs=x)
    return calibrate(qat, [x], progress=False)


def training(qat: nn.Module) -> None:
    qat.train()


def partly_training(qat: nn.Module) -> None:
    qat.get_submodule("a").train()


def zero_scale(qat: nn.Module) -> None:
    qat.get_submodule("a").output_quant.scale.zero_()


def infinite_scale(qat: nn.Module) -> None:
    qat.get_submodule("up").output_quant = None
    qat.get_submodule("_quant_0").output_quant.scale.fill_(float("inf"))


def nan_weight(qat: nn.Module) -> None:
    with torch.no_grad():
        qat.get_submodule("up").weight[0, 1] = float("nan")


def infinite_bias(qat: nn.Module) -> None:
    with torch.no_grad():
        qat.get_submodule("fc").bias[1] = float("inf")


BROKEN: list[tuple[Callable[[nn.Module], None], str]] = [
    (training, r"training mode; call model\.eval\(\)"),
    (partly_training, "'a' is in training mode"),
    (zero_scale, "the scale of 'a' is not positive"),
    (infinite_scale, "the scale of '_quant_0' is not positive and finite"),
    (nan_weight, "'up': .*not finite"),
    (infinite_bias, "'fc': .*not finite"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("inplace", [False, True])
def test_refused_and_unchanged(damage: Callable[[nn.Module], None], message: str, inplace: bool) -> None:
    qat = calibrated()
    damage(qat)
    before = snapshot(qat)
    with pytest.raises(QuantizationError, match=message):
        convert_fx(qat, inplace=inplace)
    after = snapshot(qat)
    assert after["tree"] == before["tree"] and after["ids"] == before["ids"] and after["hooks"] == before["hooks"]


def test_forgetting_to_calibrate() -> None:
    qat = prepare_qat_fx(Net().eval(), example_inputs=item())
    with pytest.raises(QuantizationError, match=r"'\w+' has no scale: run horizon.quantization.calibrate"):
        convert_fx(qat)
    set_fake_quantize(qat, FakeQuantState.VALIDATION)
    with pytest.raises(QuantizationError, match=r"'_quant_0[.\w]*' has no scale"):
        call(qat, item())


def test_a_model_that_is_not_prepared() -> None:
    with pytest.raises(QuantizationError, match="call prepare_qat or prepare_qat_fx first"):
        convert(Net().eval())
    with pytest.raises(QuantizationError, match="convert_custom_config_dict"):
        convert_fx(calibrated(), convert_custom_config_dict={"nothing": 1})


def test_statistics_that_are_not_finite() -> None:
    qat_mode.set_qat_mode("with_bn")
    try:
        qat = calibrated()
    finally:
        qat_mode.set_qat_mode("fuse_bn")
    qat.get_submodule("a").norm.running_var[2] = float("nan")
    with pytest.raises(QuantizationError, match="the batch norm of 'a': its running_var"):
        convert_fx(qat)


@pytest.mark.parametrize("fits", [True, False])
def test_a_sum_that_could_overflow(fits: bool) -> None:
    inputs = (2**31 - 1 - 2**30) // (255 * 127) + (0 if fits else 1)
    layer = nn.Linear(inputs, 2)
    nn.init.constant_(layer.weight, 0.01)
    qat = calibrated(nn.Sequential(layer), torch.randn(2, inputs))
    if fits:
        assert differing(call(convert_fx(qat), torch.ones(1, inputs)), call(qat, torch.ones(1, inputs))) == 0
    else:
        bound = inputs * 255 * 127 + 2**30
        with pytest.raises(QuantizationError, match=rf"the sum of '0' could reach {bound}.*split its input"):
            convert_fx(qat)


@pytest.mark.parametrize("road", ["QAT", "int8"])
def test_nan_at_inference_names_the_module(road: str) -> None:
    qat = calibrated()
    model = qat if road == "QAT" else convert_fx(qat)
    x = item()
    x[0, 0, 3, 3] = float("nan")
    with pytest.raises(QuantizationError, match="'_quant_0[.a-z_]*'.*NaN"):
        call(model, x)


class Root(nn.Module):
    """A user's activation that is undefined for negative numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x) if False else (x + 0.0) ** 1 * torch.sigmoid(x)


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.div(x, 1.0) * (1 / (x * 0.0))


def test_a_table_that_is_undefined_names_the_module() -> None:
    qat = prepare_qat_fx(
        nn.Sequential(nn.Conv2d(3, 4, 1), Undefined(), nn.Conv2d(4, 2, 1)).eval(), example_inputs=item()
    )
    set_fake_quantize(qat, FakeQuantState.FLOAT)
    for quant in (m for m in qat.modules() if isinstance(m, FakeQuantize)):
        quant.set_qparams(0.1)
    set_fake_quantize(qat, FakeQuantState.VALIDATION)
    with pytest.raises(QuantizationError, match="'1': the function is NaN"):
        call(qat, item())


def test_convert_leaves_the_qat_model_as_it_is() -> None:
    qat = calibrated()
    before, expected = snapshot(qat), call(qat, item())
    int8 = convert_fx(qat)
    assert_unchanged(qat, before)
    set_fake_quantize(qat, FakeQuantState.QAT)
    optimizer = torch.optim.SGD(qat.train().parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        qat(item())[0].square().sum().backward()
        optimizer.step()
    assert differing(call(int8, item()), expected) == 0  # training on does not reach into it


def test_tied_parameters_are_not_shared_with_the_qat_model() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.out.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.words(tokens))

    tokens = torch.arange(16).view(2, 8)
    qat, int8 = by_graph(Tied(), tokens)
    expected = call(int8, tokens)
    with torch.no_grad():
        qat.words.weight.mul_(2)
    assert differing(call(int8, tokens), expected) == 0


def test_converting_in_place_holds_no_float_weight() -> None:
    qat = calibrated()
    int8 = convert_fx(qat, inplace=True)
    assert int8 is qat
    float_tensors = {k for k, v in int8.state_dict().items() if v.dtype == torch.float32 and "scale" not in k}
    assert float_tensors == {"norm.weight", "norm.bias"}


def one_by_one(int8: nn.Module, x: Tensor) -> Any:
    parts = [call(int8, x[i : i + 1]) for i in range(len(x))]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def in_threads(int8: nn.Module, x: Tensor) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        return call(int8, x)
    finally:
        torch.set_num_threads(before)


def without_onednn(int8: nn.Module, x: Tensor) -> Any:
    with torch.backends.mkldnn.flags(enabled=False):
        return call(int8, x)


def under_autocast(int8: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return int8.get_submodule("a")(int8.get_submodule("_quant_0")(x)).dequantize()


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "one image at a time": one_by_one,
    "channels_last input": lambda m, x: call(m, x.to(memory_format=torch.channels_last)),
    "channels_last model": lambda m, x: call(copy.deepcopy(m).to(memory_format=torch.channels_last), x),
    "strided input": lambda m, x: call(m, torch.cat([x, x], 3)[..., : x.shape[3]]),
    "three threads": in_threads,
    "without oneDNN": without_onednn,
    "a larger batch": lambda m, x: tuple(t[:3] for t in call(m, torch.cat([x] * 8))),
    "training flag": lambda m, x: call(copy.deepcopy(m).train(), x),
    "inference mode": lambda m, x: torch.inference_mode()(m)(x),
}


class Integers(Net):
    """Without the float island, whose sums are floating-point ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


@pytest.fixture(scope="module")
def int8() -> nn.Module:
    torch.manual_seed(0)
    return convert_fx(calibrated(Integers()))


@pytest.mark.parametrize("way", WAYS)
def test_the_result_depends_on_nothing_but_the_numbers(way: str, int8: nn.Module) -> None:
    assert differing(WAYS[way](int8, item()), call(int8, item())) == 0


def test_autocast_does_not_reach_the_integers(int8: nn.Module) -> None:
    with torch.no_grad():
        expected = int8.get_submodule("a")(int8.get_submodule("_quant_0")(item())).dequantize()
        assert differing(under_autocast(int8, item()), expected) == 0


@pytest.mark.parametrize("dtype", ["qint8", "quint8"])
def test_dtypes_by_qconfig(dtype: str) -> None:
    qconfig = get_default_qconfig(activation_qkwargs={"dtype": dtype})
    _, model = by_graph(Integers(), item(), qconfig_dict={"": qconfig})
    kinds = {m.dtype8 for m in model.modules() if getattr(m, "scale", None) is not None and hasattr(m, "dtype8")}
    assert kinds == {torch.int8 if dtype == "qint8" else torch.uint8}


def test_a_module_called_with_inputs_of_several_scales() -> None:
    """One converted group, two inputs: its integers are derived from each input's scale."""

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x)) + self.head(self.b(x * 50))

    _, model = by_graph(Levels(), item())
    assert len({float(m.scale) for m in model.modules() if getattr(m, "scale", None) is not None}) >= 4
