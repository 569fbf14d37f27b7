"""Training with what PyTorch offers besides: autocast, memory formats, compiling, checkpointing, several processes; and saving."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from horizon_plugin_pytorch.nn.qat import QATGroup
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.weight import WeightFakeQuantize
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.quantization import (
    DeQuantStub,
    FakeQuantState,
    QuantStub,
    calibrate,
    convert_fx,
    fuse_modules_qat,
    prepare_qat,
    set_fake_quantize,
)
from nn.qat_networks import (
    LSQ,
    QCONFIGS,
    Network,
    data,
    differing_after_convert,
    gradients,
    loss_of,
    prepare,
    step,
)

QCONFIG = pytest.mark.parametrize("qconfig", [QCONFIGS["min_max"], LSQ], ids=["min_max", "lsq"])


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


# -- autocast ----------------------------------------------------------------------------------------------------------


@QCONFIG
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, qconfig: Any) -> None:
    """Gradients are those of float32 but for the convolutions' digits; integers are carried, and kept, in 16 bits."""
    model = prepare(qconfig=qconfig)
    x = data(16)
    exact = gradients(copy.deepcopy(model), x)
    payloads: list[Tensor] = []
    for group in model.modules():
        if isinstance(group, QATGroup):
            group.register_forward_hook(lambda _, __, y: payloads.append(y))
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, x)
    loss.backward()
    quantized = [y.payload for y in payloads if isinstance(y, QTensor)]
    assert len(quantized) == 4
    for payload in quantized:
        assert payload.dtype == dtype
        assert torch.equal(payload, payload.round()) and payload.abs().max() <= 255
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and (parameter.grad.abs().max() > 0 or exact[name].abs().max() == 0), (
            name
        )
    # A scale's own gradient is a sum of rounding errors, which other digits before the rounding make others.
    names = [name for name in exact if not name.endswith(".scale")]
    expected = torch.cat([exact[name].flatten() for name in names])
    found = torch.cat([model.get_parameter(name).grad.flatten() for name in names])  # type: ignore[union-attr]
    assert (found - expected).norm() < (0.15 if dtype == torch.bfloat16 else 0.05) * expected.norm()


def test_autocast_trains_and_converts_to_what_it_evaluates_to() -> None:
    model = prepare()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = data(32)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert {t.dtype for t in model.state_dict().values()} <= {torch.float32, torch.int64, torch.bool}
    assert differing_after_convert(model, x) == 0
    model.eval()
    with torch.no_grad():
        expected = convert_fx(model)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), expected) and torch.equal(convert_fx(model)(x), expected)


def test_sums_stay_inside_float16() -> None:
    """The largest weights, inputs and numbers of channels that float16 gets: no infinity."""
    model = prepare(nn.Sequential(nn.Conv2d(2048, 4, 3, padding=1)), x=torch.ones(1, 2048, 4, 4))
    with torch.no_grad():
        next(model.parameters()).fill_(1.0)
    with torch.autocast("cpu", torch.float16):
        y = model(torch.ones(1, 2048, 4, 4))
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert torch.allclose(y[0, 0, 1, 1], torch.tensor(2048.0 * 9), rtol=1e-2)


# -- memory formats ----------------------------------------------------------------------------------------------------


def test_channels_last_stays() -> None:
    model = prepare().to(memory_format=torch.channels_last)
    seen: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, QATGroup):
            module.register_forward_hook(lambda _, __, y, name=name: seen.append((name, y)))
    x = data(16).to(memory_format=torch.channels_last)
    for train in (True, False):
        model.train(train)
        seen.clear()
        model(x)
        maps = [y for _, y in seen if y.dim() == 4]
        assert len(maps) == 4
        assert all(y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous() for y in maps)


def test_memory_format_does_not_change_gradients() -> None:
    model = prepare()
    x = data(16)
    expected = gradients(copy.deepcopy(model), x)
    actual = gradients(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max() + 1e-6), name


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("qconfig", "keep_bn"), [(QCONFIGS["min_max"], True), (LSQ, False)], ids=["min_max, bn kept", "lsq, bn absorbed"]
)
def test_compiled_steps(qconfig: Any, keep_bn: bool, fresh_compiler: None) -> None:
    """One graph without a break, compiled once, and the same state after every step."""
    model = prepare(qconfig=qconfig, keep_bn=keep_bn)
    twin = copy.deepcopy(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for network in (compiled, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        for _ in range(3):
            step(network, optimizer, data(16))
    assert len(graphs) == 1
    expected = twin.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol=1e-4, atol=1e-5), name
    assert differing_after_convert(model, data()) == 0


@pytest.mark.slow
def test_inductor(fresh_compiler: None) -> None:
    model = prepare()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for network in (compiled, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        losses = [step(network, optimizer, data(16)) for _ in range(3)]
        assert losses[0].isfinite()
    expected = twin.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol=1e-3, atol=1e-3), name


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@QCONFIG
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(qconfig: Any, use_reentrant: bool) -> None:
    """The recomputation observes nothing and uses the scales of the first time."""
    model = prepare(qconfig=qconfig, keep_bn=False)
    twin = copy.deepcopy(model)
    observed = count_observations(model)
    for _ in range(2):
        x = data(16)
        expected = gradients(twin, x)
        model.zero_grad()
        checkpoint(lambda x: loss_of(model, x), x.requires_grad_(), use_reentrant=use_reentrant).backward()
        assert differing({n: p.grad for n, p in model.named_parameters()}, expected) == []
    assert differing(model.state_dict(), twin.state_dict()) == []
    count = len([m for m in model.modules() if isinstance(m, FakeQuantize)])
    assert len(observed) == (0 if qconfig is LSQ else 2 * count)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_between_quantized_layers(use_reentrant: bool) -> None:
    """Quantized tensors cross the borders of what is checkpointed, with their gradients."""
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(4)]
    network = nn.Sequential(QuantStub(), *layers, DeQuantStub(), nn.Flatten())
    for name in "1234":
        fuse_modules_qat(network, [f"{name}.0", f"{name}.1"], inplace=True)
    model = prepare_qat(network)
    x = torch.randn(6, 4, 5, 5)
    calibrate(model.eval(), [x], progress=False)
    set_fake_quantize(model, FakeQuantState.QAT)
    model.train()
    twin = copy.deepcopy(model)
    observed = count_observations(model)
    twin(x).square().sum().backward()
    checkpoint_sequential(model, 5, x.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    expected = {n: p.grad for n, p in twin.named_parameters()}
    assert len(expected) == 8 and differing({n: p.grad for n, p in model.named_parameters()}, expected) == []
    assert len(observed) == 4  # the last group's output stays in high precision


def count_observations(model: nn.Module) -> list[str]:
    observed: list[str] = []
    for name, m in model.named_modules():
        if isinstance(m, FakeQuantize):
            observe = m.observer.observe

            def counting(x: Tensor, running: bool, name: str = name, observe: Any = observe) -> None:
                observed.append(name)
                observe(x, running)

            m.observer.observe = counting  # type: ignore[method-assign]
    return observed


# -- copies and checkpoints --------------------------------------------------------------------------------------------


def trained(qconfig: Any) -> nn.Module:
    model = prepare(qconfig=qconfig)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        step(model, optimizer, data())
    return model


def through_file(state: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)
def test_copies_go_on_as_the_original(qconfig: Any) -> None:
    model = trained(qconfig)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_file(model, weights_only=False)]
    for network in [model, *copies]:
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for _ in range(2):
            step(network, optimizer, data())
    for network in copies:
        assert differing(network.state_dict(), model.state_dict()) == []
        assert differing_after_convert(network, data()) == 0
    scales = [
        m.scale for m in model.modules() if isinstance(m, (FakeQuantize, WeightFakeQuantize)) if m.scale is not None
    ]
    ours = {t.data_ptr() for t in [*model.parameters(), *scales]}
    assert not any(t.data_ptr() in ours for t in copies[0].state_dict().values() if t.numel())


@pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_state_dict_into_a_freshly_prepared_model(qconfig: Any, calibrated: bool) -> None:
    model = trained(qconfig)
    state = through_file(model.state_dict())
    fresh = prepare(qconfig=qconfig, calibrated=calibrated)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.05)
    fresh.load_state_dict(state)
    assert differing(fresh.state_dict(), model.state_dict()) == []
    x = data()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    fresh.train()
    step(fresh, optimizer, x)
    assert differing(fresh.state_dict(), model.state_dict()) != []
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], fresh.parameters(), strict=True))


@pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)
def test_state_dict_into_a_freshly_converted_model(qconfig: Any) -> None:
    """Whose weights and scales are others: nothing of the int8 model is outside its state_dict."""
    int8 = convert_fx(trained(qconfig).eval())
    state = through_file(int8.state_dict())
    torch.manual_seed(7)
    fresh = convert_fx(prepare(qconfig=qconfig).eval())
    x = data()
    with torch.no_grad():
        assert int((fresh(x) != int8(x)).sum()) > 0
        fresh.load_state_dict(state)
        assert int((fresh(x) != int8(x)).sum()) == 0


def test_a_float_checkpoint_loads_into_a_prepared_model() -> None:
    network, other = Network(), Network()
    torch.nn.init.normal_(other.conv.weight)
    for keep_bn in (True, False):
        model = prepare(network, keep_bn=keep_bn)
        incompatible = model.load_state_dict(other.state_dict(), strict=False)
        assert incompatible.unexpected_keys == []
        assert all("quant" in key or "_generated" in key for key in incompatible.missing_keys)
        set_fake_quantize(model, FakeQuantState.FLOAT)
        x = data()
        assert torch.allclose(model.eval()(x), other.eval()(x), atol=1e-5)


def test_a_scale_of_another_shape_is_refused() -> None:
    model = prepare()
    state = model.state_dict()
    key = next(k for k, v in state.items() if k.endswith("output_quant.scale") and v.dim() == 1)
    state[key] = state[key][:3]
    with pytest.raises(RuntimeError, match=r"size mismatch for .*output_quant\.scale"):
        model.load_state_dict(state)
