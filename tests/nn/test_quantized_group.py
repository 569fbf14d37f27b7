"""Every pattern of the grid: QAT in eval mode, the converted group, and the numerics written a second time, element for element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion import networks
from horizon_plugin_pytorch import qat_mode
from horizon_plugin_pytorch.fusion import patterns
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.nn.quantized.group import QuantizedGroup
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.quantization import (
    DeQuantStub,
    QuantStub,
    calibrate,
    convert_fx,
    get_default_qconfig,
    prepare_qat_fx,
)
from nn import numerics
from quantization.roads import by_graph, by_name, call, differing, forms, sqnr

ACTIVATIONS: dict[str, tuple[str | None, Callable[[], nn.Module] | None]] = {
    "none": (None, None),
    "ReLU": ("relu", nn.ReLU),
    "ReLU inplace": ("relu", lambda: nn.ReLU(inplace=True)),
    "ReLU6": ("relu6", nn.ReLU6),
    "Hardtanh(0, 6)": ("relu6", lambda: nn.Hardtanh(0, 6)),
}


class Net(nn.Module):
    """stub -> anchor -> [norm] -> [add] -> [activation] -> [tail] -> stub; without a tail the group's output is not rounded."""

    def __init__(
        self, anchor: nn.Module, norm: nn.Module | None, add: str, method: str, activation: str, tail: bool, stubs: bool
    ) -> None:
        super().__init__()
        self.quant = QuantStub() if stubs else nn.Identity()
        self.quant_other = QuantStub() if stubs and add != "none" else nn.Identity()
        self.conv, self.bn = anchor, norm
        self.ff = FloatFunctional() if add != "none" else None
        make = ACTIVATIONS[activation][1]
        self.relu = make() if make is not None else None
        self.add, self.method = add, method
        self.tail = nn.MaxPool1d(1) if tail else None  # hands integers on
        self.last = nn.Linear(1, 1) if tail else None
        self.dequant = DeQuantStub() if stubs else nn.Identity()

    @property
    def names(self) -> list[str]:
        return [n for n in ("conv", "bn", "ff", "relu") if getattr(self, n) is not None]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.conv(self.quant(x))
        if self.bn is not None:
            y = self.bn(y)
        if self.ff is not None:
            operands = (y, self.quant_other(other))
            y = getattr(self.ff, self.method)(*(operands if self.add == "first" else reversed(operands)))
        if self.relu is not None:
            y = self.relu(y)
        if self.last is not None:
            y = self.last(y.flatten().unsqueeze(1))
        return self.dequant(y)


def record(model: nn.Module, kind: type, item: Any) -> dict[str, Any]:
    """What the groups of a model get and return, by path."""
    found: dict[str, Any] = {}
    handles = [
        m.register_forward_hook(
            lambda m, args, kwargs, out, name=name: found.__setitem__(name, (args, out)), with_kwargs=True
        )
        for name, m in model.named_modules()
        if isinstance(m, kind)
    ]
    call(model, item)
    for handle in handles:
        handle.remove()
    return found


@st.composite
def cases(draw: st.DrawFn, kind: str, norm: str) -> tuple[Net, tuple[Tensor, ...], bool, bool, Any, Any]:
    anchor, x = draw(networks.anchors(kind))
    anchor, x = anchor.float(), x.float()
    if "Transpose" not in kind and kind != "Linear" and draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(["same", "valid"]))
        anchor = type(anchor)(
            anchor.in_channels, anchor.out_channels, anchor.kernel_size, 1, name, anchor.dilation, anchor.groups
        )
    size = draw(st.sampled_from([1.0, 1.0, 1e-6, 1e6]))
    with torch.no_grad():
        anchor.weight.mul_(size)
        if draw(st.integers(0, 5)) == 0:
            anchor.weight.zero_()
    x = x * draw(st.sampled_from([1.0, 1.0, 1e-6, 1e6]))
    if draw(st.booleans()):
        x = x.abs()  # an unsigned input
    options = draw(networks.norm_options)
    bn = networks.make_norm(norm, anchor, options)
    add = draw(st.sampled_from(["none", "none", "first", "second"]))
    tail, by_hand, keep = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    method = draw(st.sampled_from(["add", "add", "add_relu"])) if not by_hand else "add"
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    net = Net(anchor, bn, add, method, activation, tail, stubs=by_hand or draw(st.booleans()))
    networks.randomize(net)
    inputs: tuple[Tensor, ...] = (x,)
    if add != "none":
        y = anchor(x) if bn is None else bn.eval()(anchor(x))
        inputs = (x, torch.randn_like(y) * y.detach().std().nan_to_num(1) * draw(st.sampled_from([1.0, 1e-3, 1e3])))
    dtype = draw(st.sampled_from([None, "qint8", "quint8"]))
    return net.eval(), inputs, by_hand, keep, dtype, activation


@pytest.mark.parametrize(("kind", "norm"), [(a, n) for a, n in networks.ANCHOR_AND_NORM if n != "FrozenBatchNorm2d"])
@settings(max_examples=10)
@given(data=st.data())
def test_qat_int8_and_the_numerics_agree(kind: str, norm: str, data: st.DataObject) -> None:
    net, inputs, by_hand, keep, dtype, _ = data.draw(cases(kind, norm))
    qconfig = get_default_qconfig(activation_qkwargs={"dtype": dtype} if dtype else None)
    if by_hand:
        net.qconfig = qconfig
        groups = [net.names] if len(net.names) > 1 else []
        qat, int8 = by_name(net, groups, inputs, keep_bn=keep)
    else:
        qat_mode.set_qat_mode("with_bn" if keep else "fuse_bn")
        try:
            qat = prepare_qat_fx(net, {"": qconfig}, example_inputs=inputs)
        finally:
            qat_mode.set_qat_mode("fuse_bn")
        calibrate(qat, [inputs], progress=False)
        int8 = convert_fx(qat)
        assert differing(call(int8, inputs), call(qat, inputs)) == 0

    before, after = record(qat, QATGroup, inputs), record(int8, QuantizedGroup, inputs)
    assert before.keys() == after.keys()
    name = next(n for n, m in int8.named_modules() if isinstance(m, QuantizedGroup))
    module: Any = int8.get_submodule(name)
    source: Any = qat.get_submodule(name)
    (x, *rest), out = after[name]
    (x_qat, *rest_qat), out_qat = before[name]
    for a, b in zip((x, *rest, out), (x_qat, *rest_qat, out_qat), strict=True):
        a, b = (t.payload if isinstance(t, QTensor) else t for t in (a, b))
        assert int((a != b).sum()) == 0 and a.dtype == b.dtype
    in_group = module.pattern
    expected = numerics.group(
        source.anchor,
        source.norm,
        x.payload,
        x.scale,
        s_y=module.scale,
        dtype=module.dtype8,
        residual=(rest[0].payload, rest[0].scale) if in_group.add else None,
        activation=None if in_group.activation is None else in_group.activation.label.lower(),
    )
    actual = out.payload.numpy() if isinstance(out, QTensor) else out.numpy()
    assert int((actual != expected).sum()) == 0


@st.composite
def depthwise(draw: st.DrawFn, dims: int) -> tuple[nn.Module, Tensor]:
    """A convolution, a depthwise one with a channel multiplier, and another; channels of very different size."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    channels, multiplier = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    options: dict[str, Any] = dict(padding=draw(st.integers(0, 1)), dilation=dilation, padding_mode=mode)
    middle: nn.Module = conv(channels, channels * multiplier, kernel, stride, groups=channels, **options)
    if mode == "zeros" and draw(st.booleans()):
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        middle = up(channels, channels * multiplier, kernel, stride, groups=channels, dilation=dilation)
    first = conv(2, channels, 1)
    with torch.no_grad():
        size = torch.logspace(-3, 3, channels)[torch.randperm(channels)]
        first.weight.mul_(size.view(-1, *[1] * (dims + 1)))
        first.bias.mul_(size)
    activation = draw(st.sampled_from([None, nn.ReLU(), nn.ReLU6(), nn.Dropout(0.5)]))
    layers = [first, activation, middle, draw(st.sampled_from([None, nn.ReLU()])), conv(channels * multiplier, 2, 1)]
    x = torch.randn(2, 2, *[6] * dims)
    return nn.Sequential(*(m for m in layers if m is not None)).eval(), x.abs() if draw(st.booleans()) else x


@pytest.mark.parametrize("dims", [1, 2, 3])
@settings(max_examples=10)
@given(data=st.data())
def test_scales_per_channel_before_depthwise(dims: int, data: st.DataObject) -> None:
    net, x = data.draw(depthwise(dims))
    qat = prepare_qat_fx(net, example_inputs=x)
    calibrate(qat, [x], progress=False)
    int8 = convert_fx(qat)
    assert differing(call(int8, x), call(qat, x)) == 0
    seen = record(int8, QuantizedGroup, x)
    assert len(seen) == 3
    first = next(iter(seen.values()))
    assert first[1].scale.dim() == 1
    for name, ((x_in, *_), out) in seen.items():
        module, source = int8.get_submodule(name), qat.get_submodule(name)
        expected = numerics.group(
            source.anchor, None, x_in.payload, x_in.scale, s_y=module.scale, dtype=module.dtype8,
            activation=None if module.pattern.activation is None else module.pattern.activation.label.lower(),
        )  # fmt: skip
        actual = out.payload.numpy() if isinstance(out, QTensor) else out.numpy()
        assert int((actual != expected).sum()) == 0


class Clip(nn.Module):
    """A user's own activation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x + 0.5, -1.0, 2.0) * 0.5


@pytest.fixture
def clip() -> Any:
    row = patterns.register_activation(Clip, "Clip")
    yield row
    patterns.ACTIVATIONS.remove(row)


@pytest.mark.parametrize("road", ["by name", "by graph"])
@pytest.mark.parametrize("tail", [False, True])
def test_a_registered_activation(clip: Any, road: str, tail: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = QuantStub(), DeQuantStub()
            self.conv, self.bn, self.ff, self.act = (
                nn.Conv2d(3, 3, 3, padding=1),
                nn.BatchNorm2d(3),
                FloatFunctional(),
                Clip(),
            )
            self.last = nn.Conv2d(3, 2, 1) if tail else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            return self.dequant(self.last(self.act(self.ff.add(self.bn(self.conv(x)), x))))

    net, x = networks.randomize(Own()).eval(), torch.randn(2, 3, 8, 8)
    expected = call(net, x)
    if road == "by name":
        _, int8 = by_name(net, [["conv", "bn", "ff", "act"]], x)
    else:
        _, int8 = by_graph(net, x)
    assert "QuantizedConvAddClip2d" in forms(int8).values()
    assert sqnr(call(int8, x), expected) > 30
