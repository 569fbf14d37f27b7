"""State dicts, copies and pickles of QAT and int8 models, in both roads."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch import qat_mode
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import (
    DeQuantStub,
    FakeQuantState,
    QuantStub,
    calibrate,
    convert,
    fuse_modules_qat,
    get_default_qconfig,
    prepare_qat,
    prepare_qat_fx,
    set_fake_quantize,
)
from quantization.roads import call, differing


class ByGraph(nn.Module):
    """A shared convolution, scales per channel, tables with and without a parameter, a float island and a bare linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dw, self.bn_dw, self.shared = (
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
        )
        self.act, self.slope, self.norm = nn.SiLU(), nn.PReLU(), nn.GroupNorm(2, 8)
        self.up, self.fc = nn.ConvTranspose2d(8, 8, 2, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu6(self.bn_a(self.a(x)))
        y = self.shared(self.shared(self.act(self.bn_dw(self.dw(x)))))
        y = self.norm(self.up(F.max_pool2d(self.slope(y) + x, 2)))
        return {"y": y, "class": self.fc(y.mean((2, 3)))}


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.ff, self.relu = QuantStub(), DeQuantStub(), FloatFunctional(), nn.ReLU()
        self.a, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.gg, self.b = FloatFunctional(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        y = self.relu(self.ff.add(self.bn(self.a(x)), x))
        return self.dequant(self.b(self.gg.cat([y, x], 1)))


def item(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared_by_graph(model: nn.Module, **options: Any) -> nn.Module:
    return prepare_qat_fx(model.eval(), example_inputs=item(), **options)


def prepared_by_name(model: nn.Module, **options: Any) -> nn.Module:
    if options:
        model.qconfig = options["qconfig_dict"][""]
    return prepare_qat(fuse_modules_qat(model.eval(), [["a", "bn", "ff", "relu"]]))


ROADS: dict[str, tuple[type[nn.Module], Callable[..., nn.Module], str]] = {
    "by graph": (ByGraph, prepared_by_graph, "fuse_bn"),
    "by graph, BN kept": (ByGraph, prepared_by_graph, "with_bn"),
    "by name": (ByName, prepared_by_name, "fuse_bn"),
}


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest) -> Iterator[tuple[type[nn.Module], Callable[..., nn.Module]]]:
    kind, prepare, mode = ROADS[request.param]
    qat_mode.set_qat_mode(mode)
    yield kind, prepare
    qat_mode.set_qat_mode("fuse_bn")


def randomized(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.normal_()
    return model


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_qat_state(road: Any) -> None:
    kind, prepare = road
    qat = calibrate(prepare(randomized(kind())), [item()], progress=False)
    fresh = prepare(kind())
    fresh.load_state_dict(through_a_file(qat.state_dict()), strict=True)
    set_fake_quantize(fresh, FakeQuantState.VALIDATION)
    assert differing(call(fresh, item(1)), call(qat, item(1))) == 0
    assert differing(call(convert(fresh), item(1)), call(convert(qat), item(1))) == 0


def test_qat_state_after_training_goes_on_training(road: Any) -> None:
    kind, prepare = road
    torch.manual_seed(0)
    qat = calibrate(prepare(randomized(kind())), [item()], progress=False)
    set_fake_quantize(qat, FakeQuantState.QAT)

    def step(model: nn.Module) -> Tensor:
        model.train()
        out = model(item(2))
        loss = sum(t.square().mean() for t in (out.values() if isinstance(out, dict) else [out]))
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad * 0.01)
        return loss.detach()

    step(qat)
    fresh = prepare(kind())
    fresh.load_state_dict(qat.state_dict(), strict=True)
    set_fake_quantize(fresh, FakeQuantState.QAT)
    assert float(step(fresh)) == float(step(qat))
    assert {k: differing(v, qat.state_dict()[k]) for k, v in fresh.state_dict().items()} == dict.fromkeys(
        qat.state_dict(), 0
    )


@pytest.mark.parametrize("kind_of_scale", ["lsq", "mse weights"])
def test_qat_state_with_learned_and_chosen_scales(road: Any, kind_of_scale: str) -> None:
    kind, prepare = road
    qconfig = (
        get_default_qconfig("lsq", "lsq") if kind_of_scale == "lsq" else get_default_qconfig(weight_observer="mse")
    )
    qat = calibrate(prepare(randomized(kind()), qconfig_dict={"": qconfig}), [item()], progress=False)
    expected = call(qat, item(1))
    fresh = prepare(kind(), qconfig_dict={"": qconfig})
    fresh.load_state_dict(through_a_file(qat.state_dict()), strict=True)
    set_fake_quantize(fresh, FakeQuantState.VALIDATION)
    assert differing(call(fresh, item(1)), expected) == 0


def test_int8_state(road: Any) -> None:
    """The other model was calibrated on data of another size and sign: its scales and dtypes are replaced."""
    kind, prepare = road
    int8 = convert(calibrate(prepare(randomized(kind())), [item()], progress=False))
    other = convert(calibrate(prepare(kind()), [item(3).abs() * 5], progress=False))
    assert int8._modules[next(n for n in ("quant", "_quant_0") if n in int8._modules)].dtype8 == torch.int8
    assert differing(call(other, item(1)), call(int8, item(1))) > 0
    other.load_state_dict(through_a_file(int8.state_dict()), strict=True)
    assert differing(call(other, item(1)), call(int8, item(1))) == 0
    state = int8.state_dict()
    state.pop(next(k for k in state if k.endswith("unsigned")))
    with pytest.raises(RuntimeError, match=r"Missing key.*unsigned"):
        other.load_state_dict(state, strict=True)


def test_int8_state_holds_integers_and_scales_only(road: Any) -> None:
    kind, prepare = road
    int8 = convert(calibrate(prepare(randomized(kind())), [item()], progress=False))
    left = {k.rpartition(".")[2] for k in int8.state_dict() if not k.startswith(("norm.", "slope."))}
    assert left == {"weight", "weight_scale", "bias", "scale", "unsigned"}
    for name, tensor in int8.state_dict().items():
        if name.endswith(".weight") and not name.startswith(("norm.", "slope.")):
            assert tensor.dtype == torch.int8


def test_int8_state_with_groups_left_in_float() -> None:
    config = {"module_name": [("a", None), ("shared", None), ("fc", None)]}
    qat = calibrate(prepared_by_graph(randomized(ByGraph()), qconfig_dict=config), [item()], progress=False)
    int8 = convert(qat)
    float_keys = {"a.weight", "a.bias", "shared.weight", "shared.bias", "fc.weight", "fc.bias"}
    assert float_keys <= set(int8.state_dict()) and not any("call_1" in k for k in int8.state_dict())
    other = convert(calibrate(prepared_by_graph(ByGraph(), qconfig_dict=config), [item(3)], progress=False))
    other.load_state_dict(through_a_file(int8.state_dict()), strict=True)
    assert differing(call(other, item(1)), call(int8, item(1))) == 0


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("stage", ["prepared", "calibrated", "int8"])
def test_copies(road: Any, twin: Callable[[nn.Module], nn.Module], stage: str) -> None:
    kind, prepare = road
    model = prepare(randomized(kind()))
    if stage != "prepared":
        calibrate(model, [item()], progress=False)
    if stage == "int8":
        model = convert(model)
    expected = call(model, item(1))
    other = twin(model)
    assert differing(call(other, item(1)), expected) == 0
    with torch.no_grad():  # nothing is shared
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    assert differing(call(model, item(1)), expected) == 0
    if stage == "int8":
        assert str(twin(model).quantization_report) == str(model.quantization_report)
    elif stage == "calibrated":
        assert differing(call(convert(twin(model)), item(1)), expected) == 0


def test_a_float_checkpoint_lacks_nothing_but_quantizers(road: Any) -> None:
    kind, prepare = road
    source = randomized(kind())
    model = prepare(kind())
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys and all("quant" in k or "activation_post_process" in k for k in result.missing_keys)
    other = prepare(source)
    for m in (model, other):
        calibrate(m, [item()], progress=False)
    if (
        qat_mode.get_qat_mode() is qat_mode.QATMode.WithBN or kind is ByName
    ):  # else one was folded in another order of rounding
        assert differing(call(model, item(1)), call(other, item(1))) == 0


@pytest.mark.parametrize("convert_to", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_keeps_scales_and_integers(road: Any, convert_to: torch.dtype) -> None:
    kind, prepare = road
    qat = calibrate(prepare(randomized(kind())), [item()], progress=False)
    int8 = convert(qat)
    for model in (qat, int8):
        before = {k: v.clone() for k, v in model.state_dict().items() if "scale" in k or v.dtype == torch.int8}
        model.to(convert_to)
        after = model.state_dict()
        assert {k: differing(after[k], v) for k, v in before.items()} == dict.fromkeys(before, 0)


def test_keys_follow_a_replaced_convolution() -> None:
    """Of an anchor that nothing was fused with, as of one in a fused group."""
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU())
    qat = prepare_qat_fx(model, example_inputs=x)
    for name in ("0", "2"):
        group = qat.get_submodule(name)
        group.conv = nn.Conv2d(*group.conv.weight.shape[1::-1], group.conv.kernel_size)
        state = qat.state_dict()
        assert torch.equal(state[f"{name}.weight"], group.conv.weight)
        state[f"{name}.weight"] = torch.full_like(group.conv.weight, 0.5)
        qat.load_state_dict(state)
        assert bool((group.conv.weight == 0.5).all())
