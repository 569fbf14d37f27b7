"""`calibrate`: every kind of data, and every kind of bad data, after which the model is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusion.networks import assert_unchanged, snapshot
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.quantization import (
    FakeQuantState,
    calibrate,
    convert_fx,
    prepare_qat_fx,
    set_fake_quantize,
)
from quantization.roads import call, differing, sqnr


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.b, self.c = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.c(self.b(self.relu(self.norm(self.a(x)))))


def data(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def prepared() -> nn.Module:
    return prepare_qat_fx(Net().eval(), example_inputs=data()[0])


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.scale.clone() for name, m in model.named_modules() if isinstance(m, FakeQuantize)}


def states(model: nn.Module) -> list[Any]:
    return [(name, getattr(m, "state", None), m.training) for name, m in model.named_modules()]


def generated() -> Iterator[Tensor]:
    yield from data()


class Sized:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(data())


KINDS: dict[str, Callable[[], Any]] = {
    "tensors": data,
    "tuples of arguments": lambda: [(x,) for x in data()],
    "keyword arguments": lambda: [{"x": x} for x in data()],
    "lists with labels": lambda: [[x, torch.zeros(2)] for x in data()],
    "generator": generated,
    "iterable": Sized,
    "DataLoader": lambda: DataLoader(TensorDataset(torch.cat(data())), batch_size=2),
    "DataLoader with labels": lambda: DataLoader(TensorDataset(torch.cat(data()), torch.zeros(6)), batch_size=2),
    "float64": lambda: [x.double().float() for x in data()],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("progress", [False, True])
def test_every_kind_of_data_gives_the_same_scales(
    kind: str, progress: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = prepared()
    reference = calibrate(copy.deepcopy(model), data(), progress=False)
    assert not capsys.readouterr().out
    assert calibrate(model, KINDS[kind](), progress=progress) is model
    expected = scales(reference)
    assert {k: differing(v, expected[k]) for k, v in scales(model).items()} == dict.fromkeys(expected, 0)
    assert not model.training and {m.state for m in model.modules() if isinstance(m, FakeQuantize)} == {
        FakeQuantState.VALIDATION
    }


def test_the_bar_is_shown_only_if_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    calibrate(prepared(), data(), progress=False)
    assert capsys.readouterr() == ("", "")
    calibrate(prepared(), data(), progress=True)
    out, err = capsys.readouterr()
    assert not out and err


def nan_item() -> list[Any]:
    bad = data()
    bad[1][0, 0, 0, 0] = float("nan")
    return bad


def fails_later() -> Iterator[Tensor]:
    yield data()[0]
    raise RuntimeError("the disk is gone")


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty": (list, QuantizationError, "the data is empty"),
    "empty loader": (lambda: DataLoader(TensorDataset(torch.zeros(0, 3))), QuantizationError, "the data is empty"),
    "a tensor": (lambda: data()[0], QuantizationError, r"data is one tensor.*\[x\]"),
    "NaN": (nan_item, QuantizationError, "item 1 of the data holds NaN"),
    "NaN in a keyword": (lambda: [{"x": nan_item()[1]}], QuantizationError, "item 0 of the data holds NaN"),
    "too many arguments": (
        lambda: [(data()[0], 1.0, 2)],
        QuantizationError,
        "item 0 .*does not fit.*too many positional",
    ),
    "unknown keyword": (lambda: [{"image": data()[0]}], QuantizationError, "item 0 .*does not fit"),
    "wrong shape": (lambda: [torch.zeros(1, 5, 8, 8)], RuntimeError, "channels"),
    "infinite": (
        lambda: [data()[0], data()[0] * float("inf")],
        QuantizationError,
        "NaN or infinite values were observed",
    ),
    "an error in the data": (fails_later, RuntimeError, "the disk is gone"),
}


@pytest.mark.parametrize("again", [False, True], ids=["fresh", "calibrated before"])
@pytest.mark.parametrize("name", BAD)
def test_bad_data_leaves_the_model_as_it_was(name: str, again: bool) -> None:
    make, kind, message = BAD[name]
    model = prepared()
    if again:
        calibrate(model, data(), progress=False)
        set_fake_quantize(model, FakeQuantState.QAT)
        model.train()
        model.get_submodule("b").eval()
    before, flags = snapshot(model), states(model)
    with pytest.raises(kind, match=message):
        calibrate(model, make(), progress=False)
    after = snapshot(model)
    assert states(model) == flags
    assert after["tree"] == before["tree"] or not again  # observers are put back as objects, too
    assert {k: differing(v, before["state"][k]) for k, v in after["state"].items()} == dict.fromkeys(before["state"], 0)


def test_nan_that_arises_inside_names_the_module() -> None:
    model = prepared()
    with torch.no_grad():
        model.get_submodule("a").weight[1] = float("nan")
    before, flags = snapshot(model), states(model)
    with pytest.raises(QuantizationError, match=r"a\.output_quant: NaN or infinite"):
        calibrate(model, data(), progress=False)
    assert states(model) == flags
    assert_unchanged(model, before)


def test_a_model_that_is_not_prepared() -> None:
    with pytest.raises(QuantizationError, match="call prepare_qat or prepare_qat_fx first"):
        calibrate(Net(), data())


def test_calibrating_again_forgets_the_first_time() -> None:
    torch.manual_seed(0)
    model = prepared()
    fresh = copy.deepcopy(model)
    calibrate(model, [x * 100 for x in data()], progress=False)
    calibrate(model, data(), progress=False)
    calibrate(fresh, data(), progress=False)
    assert {k: differing(v, scales(fresh)[k]) for k, v in scales(model).items()} == dict.fromkeys(scales(fresh), 0)


def test_calibration_changes_no_parameter_and_no_statistic() -> None:
    model = Net().train()
    model = prepare_qat_fx(model.eval(), example_inputs=data()[0])
    before = {k: v.clone() for k, v in model.state_dict().items() if "quant" not in k}
    calibrate(model.train(), data(), progress=False)
    assert {k: differing(model.state_dict()[k], v) for k, v in before.items()} == dict.fromkeys(before, 0)


def test_one_call_of_the_whole_road_keeps_its_model() -> None:
    import horizon_plugin_pytorch as horizon

    model = Net().train()
    model.norm.eval()
    before = snapshot(model)
    expected = call(copy.deepcopy(model).eval(), data()[0])
    int8 = horizon.quantize(model, data(), progress=False)
    assert_unchanged(model, before)
    assert sqnr(call(int8, data()[0]), expected) > 25


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        model = prepared()
        calibrate(model, data(), progress=False)
        int8 = convert_fx(model)
        expected = model(data()[0])
        assert differing(int8(data()[0]), expected) == 0
    assert differing(call(int8, data()[0]), expected) == 0
    set_fake_quantize(model, FakeQuantState.QAT)
    model.train()(data()[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
