"""`prepare_qat` on models that keep their forward: stubs, FloatFunctional, shared and unused modules, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.networks import FUNCTIONALS, assert_unchanged, snapshot
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import (
    DeQuantStub,
    QuantStub,
    calibrate,
    convert,
    fuse_modules,
    get_default_qconfig,
    prepare_qat,
)
from quantization.roads import by_name, call, differing, forms, in_float, sqnr


class Net(nn.Module):
    """Some convolutions, two functionals and stubs; `body` is the forward."""

    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.wide = nn.Conv2d(8, 4, 1)
        self.relu, self.ff, self.gg = nn.ReLU(), FloatFunctional(), FloatFunctional()
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def data() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def quantize(net: nn.Module, names: list[list[str]] | None = None, least: float = 28.0) -> nn.Module:
    x = data()
    expected = call(net.eval(), x)
    _, int8 = by_name(net, names or [], x)
    actual = call(int8, x)
    if isinstance(expected, Tensor):
        assert sqnr(actual, expected) > least
    return int8


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda m, x: m.ff.add(m.a(x), m.b(x)),
    "add_relu": lambda m, x: m.ff.add_relu(m.a(x), m.b(x)),
    "sub": lambda m, x: m.ff.sub(m.relu(m.a(x)), m.relu(m.b(x))),
    "mul": lambda m, x: m.ff.mul(m.a(x), m.b(x)),
    "add_scalar": lambda m, x: m.ff.add_scalar(m.relu(m.a(x)), -1.0),
    "mul_scalar": lambda m, x: m.ff.mul_scalar(m.relu(m.a(x)), -1.0),
    "cat": lambda m, x: m.wide(m.ff.cat([m.a(x), m.b(x)], 1)),
    "matmul": lambda m, x: m.ff.matmul(m.a(x), m.b(x)),
}


@pytest.mark.parametrize("package", FUNCTIONALS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("last", [False, True], ids=["read by a convolution", "read by the DeQuantStub"])
def test_float_functional(name: str, package: str, last: bool) -> None:
    if (name, package) == ("sub", "torch.ao"):
        pytest.skip("it has no such method")
    operation = OPERATIONS[name]

    def body(m: Any, x: Tensor) -> Tensor:
        y = operation(m, m.quant(x))
        return m.dequant(y if last else m.c(y))

    int8 = quantize(Net(body, ff=FUNCTIONALS[package]()))
    assert last or name == "cat" or "ff" in forms(int8)
    if not last and name in ("sub", "add_scalar", "mul_scalar"):
        assert int8.ff.dtype8 == torch.int8  # operands that are never negative do not make it so
    if not last and name == "add_relu":
        assert int8.ff.dtype8 == torch.uint8


def test_one_functional_for_two_additions_has_one_scale() -> None:
    quantize(Net(lambda m, x: m.dequant(m.c(m.ff.add(m.ff.add(m.a(m.quant(x)), m.b(m.quant(x))), m.quant(x))))))


class Residual(nn.Module):
    """A hand-written residual block."""

    def __init__(self, order: str = "first") -> None:
        super().__init__()
        self.quant, self.dequant, self.order = QuantStub(), DeQuantStub(), order
        self.conv0, self.bn0, self.relu0 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.ff, self.relu1, self.out = FloatFunctional(), nn.ReLU(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.bn0(self.conv0(self.quant(x))))
        y = self.bn1(self.conv1(x))
        y = self.ff.add(y, x) if self.order == "first" else self.ff.add(x, y)
        return self.dequant(self.out(self.relu1(y)))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("keep_bn", [False, True])
def test_a_residual_block(order: str, keep_bn: bool) -> None:
    model, x = Residual(order), data()
    expected = call(model.eval(), x)
    names = [["conv0", "bn0", "relu0"], ["conv1", "bn1", "ff", "relu1"]]
    _, int8 = by_name(model, names, x, keep_bn=keep_bn)
    assert sqnr(call(int8, x), expected) > 30
    assert forms(int8) == {
        "quant": "Quantize",
        "conv0": "QuantizedConvReLU62d",
        "ff": "QuantizedConvAddReLU2d",
        "out": "QuantizedConv2d",
    }
    assert int8.out.high_precision and int8.ff.dtype8 == torch.uint8


STRUCTURES: dict[str, tuple[Callable[..., Any], dict[str, nn.Module]]] = {
    "called twice": (lambda m, x: m.dequant(m.a(m.a(m.quant(x)))), {}),
    "two stubs": (lambda m, x: m.dequant(m.ff.add(m.a(m.quant(x)), m.b(m.quant2(x * 20)))), {"quant2": QuantStub()}),
    "float between": (lambda m, x: m.dequant(m.b(m.quant2(m.dequant2(m.a(m.quant(x))) * 2))), {"quant2": QuantStub(), "dequant2": DeQuantStub()}),
    "float module between": (lambda m, x: m.dequant(m.b(m.quant2(m.norm(m.a(m.quant(x)))))), {"norm": nn.BatchNorm2d(4), "quant2": QuantStub()}),
    "softmax at the end": (lambda m, x: m.dequant(m.a(m.quant(x)).softmax(1)), {}),
    "activation behind the stub": (lambda m, x: m.act(m.dequant(m.a(m.quant(x)))), {"act": nn.Sigmoid()}),
    "functional behind the stub": (lambda m, x: m.ff.add(m.dequant(m.a(m.quant(x))), x), {}),
    "pool and table": (lambda m, x: m.dequant(m.b(m.act(m.pool(m.a(m.quant(x)))))), {"pool": nn.AvgPool2d(2), "act": nn.SiLU()}),
    "one parameter": (lambda m, x: m.dequant(m.b(m.act(m.a(m.quant(x))))), {"act": nn.PReLU()}),
    "plus sign": (lambda m, x: m.dequant(m.a(m.quant(x)) + m.b(m.quant(x))), {}),
    "view": (lambda m, x: m.dequant(m.fc(m.a(m.quant(x)).view(x.shape[0], -1))), {"fc": nn.Linear(256, 3)}),
    "output size": (lambda m, x: m.dequant(m.up(m.a(m.quant(x)), output_size=(16, 16))), {"up": nn.ConvTranspose2d(4, 4, 3, 2, 1)}),
    "depthwise": (lambda m, x: m.dequant(m.b(m.dw(m.a(m.quant(x))))), {"dw": nn.Conv2d(4, 4, 3, groups=4)}),
    "no DeQuantStub": (lambda m, x: m.a(m.quant(x)), {}),
    "attention": (lambda m, x: m.dequant(m.mha(*[m.a(m.quant(x)).flatten(2)] * 3)[0]), {"mha": nn.MultiheadAttention(64, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name: str) -> None:
    body, modules = STRUCTURES[name]
    int8 = quantize(Net(body, **{k: copy.deepcopy(m) for k, m in modules.items()}))
    if name == "float module between":
        assert in_float(int8)["norm"] == "it has no integer form"
    if name == "depthwise":
        assert int8.a.scale.shape == (4,)
    if name == "activation behind the stub":
        assert "DeQuantStub" in in_float(int8)["act"]


def test_a_module_under_two_names_stays_one() -> None:
    net = Net(lambda m, x: m.dequant(m.b(m.a(m.quant(x)))))
    net.b = net.a
    x = data()
    expected = call(net.eval(), x)
    _, int8 = by_name(net, [], x)
    assert int8.a is int8.b and sqnr(call(int8, x), expected) > 28


def test_modules_the_forward_does_not_call_stay_as_they_are() -> None:
    int8 = quantize(Net(lambda m, x: m.dequant(m.a(m.quant(x)))))
    assert type(int8.b) is nn.Conv2d
    assert in_float(int8)["b"] == "the forward does not call it"


def test_a_nested_sequential() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU6())
    net = nn.Sequential(QuantStub(), block, nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 3), DeQuantStub())
    int8 = quantize(net, [["1.0", "1.1", "1.2"]])
    assert list(forms(int8)) == ["0", "1.0", "2", "4"]


class Branching(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.quant(x))
        return self.dequant(self.b(x)) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("groups", [1, 4])
def test_a_forward_that_cannot_be_traced(groups: int) -> None:
    model, x = Branching(groups), data()
    expected = call(model.eval(), x)
    _, int8 = by_name(model, [], x)
    assert sqnr(call(int8, x), expected) > 28
    assert "cannot be traced" in int8.quantization_report.notes[0]
    assert int8.b.scale is not None  # it cannot be known that a DeQuantStub reads it


# -- qconfig ----------------------------------------------------------------------------------------------------------------------


def test_qconfigs_are_inherited_and_overridden() -> None:
    net = Net(lambda m, x: m.dequant(m.c(m.b(m.a(m.quant(x))))))
    net.qconfig = get_default_qconfig(activation_qkwargs={"dtype": "qint8"})
    net.a.qconfig = get_default_qconfig(activation_qkwargs={"dtype": "quint8"})
    net.quant.qconfig = get_default_qconfig(activation_observer="fixed_scale", activation_qkwargs={"scale": 0.05})
    _, int8 = by_name(net, [], data())
    assert (int8.quant.dtype8, int8.a.dtype8, int8.b.dtype8) == (torch.int8, torch.uint8, torch.int8)
    assert float(int8.quant.scale) == pytest.approx(0.05)
    assert not any("qconfig" in m.__dict__ for m in int8.modules())


def test_qconfig_none_leaves_a_module_in_float() -> None:
    net = Net(lambda m, x: m.c(m.quant2(m.b(m.dequant(m.a(m.quant(x)))))), quant2=QuantStub())
    net.b.qconfig = None
    int8 = quantize(net)
    assert type(int8.b) is nn.Conv2d and in_float(int8)["b"] == "its qconfig is None"
    assert int8.a.high_precision


def test_a_fixed_scale() -> None:
    net = Net(lambda m, x: m.dequant(m.a(m.quant(x))), quant=QuantStub(scale=1 / 128))
    qat, int8 = by_name(net, [], data())
    assert float(qat.quant.output_quant.scale) == float(int8.quant.scale) == 1 / 128


def test_output_of_high_precision_by_qconfig() -> None:
    net = Net(lambda m, x: m.dequant(m.a(m.quant(x))))
    net.a.qconfig = get_default_qconfig(activation_fake_quant=None)
    assert quantize(net).a.high_precision


def test_mapping_overrides_a_form() -> None:
    class Mine(nn.Module):
        def __init__(self, module: nn.Module, qconfig: Any) -> None:
            super().__init__()
            self.module, self.seen = module, qconfig

        def forward(self, x: Any) -> Tensor:
            return self.module(x)

    net = Net(lambda m, x: m.dequant(m.norm(m.a(m.quant(x)))), norm=nn.GroupNorm(2, 4))
    qat = prepare_qat(net.eval(), mapping={nn.Conv2d: Mine, nn.GroupNorm: Mine})
    assert isinstance(qat.a, Mine) and qat.a.seen is not None and isinstance(qat.norm, Mine)


# -- errors -----------------------------------------------------------------------------------------------------------------------


ERRORS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no stub": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1)), "no QuantStub.*prepare_qat_fx"),
    "float tensor": (lambda: Net(lambda m, x: m.b(m.dequant(m.a(m.quant(x))))), "'b' gets a float tensor.*QuantStub"),
    "softmax between": (lambda: Net(lambda m, x: m.b(m.a(m.quant(x)).softmax(1))), "'b' gets a float tensor"),
    "in place": (
        lambda: Net(lambda m, x: (lambda y: m.dequant(m.b(m.ff.add(m.act(y), y))))(m.a(m.quant(x))), act=nn.ReLU(inplace=True)),
        "'act' works in place.*'ff'.*inplace=False",
    ),
    "prepared already": (
        lambda: prepare_qat(Net(lambda m, x: m.dequant(m.a(m.quant(x)))).eval()),
        "prepare_qat: the model is prepared already",
    ),
    "double": (lambda: Net(lambda m, x: m.dequant(m.a(m.quant(x)))).double(), r"a\.weight is torch\.float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("inplace", [False, True])
def test_refused_and_unchanged(name: str, inplace: bool) -> None:
    make, message = ERRORS[name]
    model = make().eval()
    before = snapshot(model)
    with pytest.raises(QuantizationError, match=message):
        prepare_qat(model, inplace=inplace)
    assert_unchanged(model, before)


def test_a_qconfig_of_another_package_is_refused() -> None:
    net = Net(lambda m, x: m.dequant(m.a(m.quant(x))))
    net.a.qconfig = torch.ao.quantization.default_qconfig
    with pytest.raises(QuantizationError, match=r"prepare_qat: a: QConfig .*get_default_qconfig"):
        prepare_qat(net)


def test_an_addition_in_place_says_what_to_do() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(m.quant(x))
        y += m.b(m.quant(x))
        return m.dequant(m.c(m.quant2(y)))

    net = Net(body, quant2=QuantStub())
    net.a.qconfig = get_default_qconfig(activation_qkwargs={"dtype": "qint8"})
    qat = prepare_qat(net.eval())
    x = data()
    assert differing(call(qat, x), call(net, x)) == 0  # nothing is quantized yet
    calibrate(qat, [x], progress=False)
    expected = call(net, x)
    try:
        actual = call(convert(qat), x)
    except QuantizationError as error:
        assert "in place" in str(error)
    else:
        assert sqnr(actual, expected) > 28


def test_a_float_tensor_is_refused_by_name_where_tracing_cannot_tell() -> None:
    class Late(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.dequant(self.a(self.quant(x)))
            return self.b(x) if float(x.sum()) > -1e9 else x

    qat = prepare_qat(Late().eval())
    calibrate(qat, [data()], progress=False)
    with pytest.raises(QuantizationError, match="'b' got a float tensor"):
        call(qat, data())


def test_torch_stubs_are_recognized() -> None:
    net = Net(lambda m, x: m.dequant(m.a(m.quant(x))))
    net.quant, net.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
    assert list(forms(quantize(net))) == ["quant", "a"]


def test_hooks_see_what_they_saw() -> None:
    seen: list[str] = []
    net = Net(lambda m, x: m.dequant(m.b(m.act(m.a(m.quant(x))))), act=nn.SiLU())
    for name in ("quant", "a", "act"):
        module = net.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append(f"before {name}"))
        module.register_forward_hook(lambda m, args, out, name=name: seen.append(f"after {name}"))
    x = data()
    call(net.eval(), x)
    expected = list(seen)
    qat, int8 = by_name(net, [], x)
    for model in (qat, int8):
        seen.clear()
        call(model, x)
        assert seen == expected


def test_inplace_returns_the_model_itself() -> None:
    net = Net(lambda m, x: m.dequant(m.a(m.quant(x)))).eval()
    qat = prepare_qat(net, inplace=True)
    assert qat is net
    calibrate(qat, [data()], progress=False)
    assert convert(qat, inplace=True) is net
    assert forms(net)


def test_fused_with_torch_fuse_modules() -> None:
    """The documented way: this package's fuser through PyTorch's own function."""
    from horizon_plugin_pytorch.quantization import fuse_known_modules

    model, x = Residual(), data()
    names = [["conv0", "bn0", "relu0"], ["conv1", "bn1", "ff", "relu1"]]
    theirs = torch.ao.quantization.fuse_modules(model.eval(), names, fuser_func=fuse_known_modules)
    _, a = by_name(theirs, [], x)
    _, b = by_name(fuse_modules(model, names), [], x)
    assert differing(call(a, x), call(b, x)) == 0
