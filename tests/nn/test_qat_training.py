"""What training a prepared model does to it, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat import QATGroup
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.weight import WeightFakeQuantize
from horizon_plugin_pytorch.quantization import (
    FakeQuantState,
    QuantStub,
    calibrate,
    convert_fx,
    get_default_qconfig,
    set_fake_quantize,
)
from horizon_plugin_pytorch.quantization.improve import add_headroom
from horizon_plugin_pytorch.quantization.observers import MSEObserver
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

QCONFIG = pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)


def groups(model: nn.Module) -> list[QATGroup]:
    return [m for m in model.modules() if isinstance(m, QATGroup)]


def quantizers(model: nn.Module) -> list[FakeQuantize]:
    return [m for m in model.modules() if isinstance(m, FakeQuantize)]


def all_finite(model: nn.Module) -> bool:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return all(bool(t.isfinite().all()) for t in tensors)


@QCONFIG
@pytest.mark.parametrize("keep_bn", [True, False], ids=["bn kept", "bn absorbed"])
def test_it_learns_and_converts_to_what_it_evaluates_to(qconfig: Any, keep_bn: bool) -> None:
    model = prepare(qconfig=qconfig, keep_bn=keep_bn)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = data(32)
    losses = [step(model, optimizer, x) for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    assert differing_after_convert(model, data(32)) == 0


@QCONFIG
def test_zero_initialized_residual(qconfig: Any) -> None:
    """gamma = 0 in the last norm of a branch, as residual networks start; then negative gammas."""
    model = prepare(Network(zero_init=True), qconfig)
    (residual,) = (g for g in groups(model) if g.norm is not None and g.norm.weight.abs().max() == 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = data(32)
    for _ in range(10):
        step(model, optimizer, x)
        assert all_finite(model)
    assert residual.norm is not None and residual.norm.weight.abs().min() > 0
    assert differing_after_convert(model, x) == 0
    for group in groups(model):
        if group.norm is not None:
            with torch.no_grad():
                group.norm.weight.neg_()
                group.norm.weight[0] = 0
    step(model, optimizer, x)
    assert all_finite(model)
    assert differing_after_convert(model, x) == 0


def test_batch_norm_keeps_its_eps_and_momentum() -> None:
    def batch_norm(channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)

    network = Network(batch_norm)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(0.02)  # variances so small that eps decides
    model = prepare(network)
    norms = [g.norm for g in groups(model) if g.norm is not None]
    before = [n.running_mean.clone() for n in norms]
    seen: list[Tensor] = []
    handles = [n.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3)))) for n in norms]
    step(model, torch.optim.SGD(model.parameters(), 0.0), data())
    assert len(seen) == len(norms) == 4
    for norm, mean, batch in zip(norms, before, seen, strict=True):
        assert (norm.eps, norm.momentum) == (1e-3, 0.01)
        assert torch.allclose(norm.running_mean, 0.99 * mean + 0.01 * batch, atol=1e-7)
    for handle in handles:
        handle.remove()
    model.eval()
    calibrate(model, [data()], progress=False)
    x = data()
    with torch.no_grad():
        expected, actual = network(x), convert_fx(model)(x)
    assert differing_after_convert(model, x) == 0
    assert (actual - expected).norm() < 0.1 * expected.norm()  # with eps=1e-5 the output would be another


def test_learned_scales_stay_the_parameters_the_optimizer_got() -> None:
    model = prepare(qconfig=LSQ, calibrated=False)
    learned = {n: p for n, p in model.named_parameters() if n.endswith("scale")}
    assert len(learned) == len(quantizers(model)) + len(groups(model)) > 10
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.eval()
    calibrate(model, [data()], progress=False)
    set_fake_quantize(model, FakeQuantState.QAT)
    model.train()
    started = {n: p.detach().clone() for n, p in learned.items()}
    assert all(p.numel() > 0 for p in started.values())
    for _ in range(3):
        step(model, optimizer, data())
    now = dict(model.named_parameters())
    for name, parameter in learned.items():
        assert now[name] is parameter
        assert bool((parameter != started[name]).all()), name
    calibrate(model, [data()], progress=False)
    assert all(dict(model.named_parameters())[n] is p for n, p in learned.items())


def test_a_learned_scale_past_zero_counts_by_its_magnitude() -> None:
    model = prepare(qconfig=LSQ)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, (FakeQuantize, WeightFakeQuantize)):
            module.scale.data.neg_()
    x = data()
    expected, found = gradients(model, x), gradients(twin, x)
    for name, gradient in expected.items():
        assert torch.equal(found[name], -gradient if name.endswith(".scale") else gradient), name
    with torch.no_grad():
        assert torch.equal(convert_fx(twin.eval())(x), convert_fx(model.eval())(x))
    quantizers(twin)[0].scale.data.zero_()
    step(twin.train(), torch.optim.SGD(twin.parameters(), 1e-3), x)
    assert all_finite(twin)


def test_a_fixed_scale_is_not_learned() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.conv = QuantStub(scale=1 / 64), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.quant(x)).flatten(1)

    model = prepare(Fixed(), LSQ)
    (stub,) = quantizers(model)
    assert [n for n, _ in model.named_parameters() if "quant.output_quant" in n] == []
    step(model, torch.optim.SGD(model.parameters(), 0.1), data())
    assert stub.scale.item() == 1 / 64


def test_training_without_a_scale() -> None:
    """The first batch gives an observed scale its start; a learned one has to come from calibration."""
    model = prepare(calibrated=False)
    step(model, torch.optim.SGD(model.parameters(), 0.1), data())
    assert all(q.ready for q in quantizers(model)) and all_finite(model)

    with pytest.raises(QuantizationError, match=r"'_quant_0' has no scale yet.*calibrate\(model, data\) first$"):
        loss_of(prepare(qconfig=LSQ, calibrated=False), data())
    with pytest.raises(QuantizationError, match=r"calibrate\(model, data\) first, or train"):
        loss_of(prepare(calibrated=False).eval(), data())


def test_what_inference_mode_leaves_can_be_trained() -> None:
    model = prepare(calibrated=False)
    with torch.inference_mode():
        model(data())
        model(data())
    step(model, torch.optim.SGD(model.parameters(), 0.1), data())
    assert all_finite(model)
    learned = prepare(qconfig=LSQ, calibrated=False).eval()
    with torch.inference_mode():
        calibrate(learned, [data()], progress=False)
    set_fake_quantize(learned.train(), FakeQuantState.QAT)
    step(learned, torch.optim.SGD(learned.parameters(), 0.1), data())
    assert all_finite(learned)


def test_states() -> None:
    network = Network()
    model = prepare(network, keep_bn=False)
    x = data()

    set_fake_quantize(model, FakeQuantState.FLOAT)
    model.eval()
    assert torch.allclose(model(x), network.eval()(x), atol=1e-5)

    set_fake_quantize(model, FakeQuantState.VALIDATION)
    model.train()
    before = copy.deepcopy(model.state_dict())
    model(100 * x)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []

    set_fake_quantize(model, FakeQuantState.QAT)
    model.eval()
    model(100 * x)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []

    model.train()
    model(100 * x)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert {k.rpartition(".")[2] for k in moved} >= {"scale", "low", "high"}
    for name, q in model.named_modules():
        if isinstance(q, FakeQuantize) and f"{name}.scale" in moved:
            limit = float("inf") if q.limit is None else torch.tensor(q.limit / q.bounds[1])
            assert torch.equal(q.scale, q.observer.scale(*q.bounds).clamp(max=limit))


def test_graphs_of_earlier_steps_keep_their_scales() -> None:
    """Two forwards, then two backwards: as if each backward had come at once."""
    model = prepare()
    twin = copy.deepcopy(model)
    first, second = data(), data() * 3
    losses = loss_of(model, first), loss_of(model, second)
    for loss in losses:
        loss.backward()
    for x in (first, second):
        loss_of(twin, x).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad), name


def test_results_keep_their_scale_when_training_moves_it() -> None:
    model = prepare()
    stub = next(m for m in model.modules() if type(m).__name__ == "QuantStub")
    x = data()
    with torch.no_grad():
        model.eval()
        evaluated = stub(x)
        before = evaluated.dequantize()
        model.train()
        model(10 * x)
    assert torch.equal(evaluated.dequantize(), before)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).mean((2, 3))


def test_a_frozen_part_in_eval_mode() -> None:
    model = prepare(Parts())
    x = data()
    step(model, torch.optim.SGD(model.parameters(), 0.1), x)
    parts = dict(model.named_modules())
    for name, module in parts.items():
        if "backbone" in name or "quant" in name.partition(".")[0]:
            module.eval()
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    step(model, torch.optim.SGD(model.parameters(), 0.1), x)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("head") for k in changed)

    model.train()
    for name, module in parts.items():
        if "head" in name:
            module.eval()
    with pytest.raises(QuantizationError, match=r"'head\.\d.*' is in eval mode.*keep it in training mode"):
        model(x)
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_frozen_batch_norms() -> None:
    model = prepare()
    norms = [g.norm.eval() for g in groups(model) if g.norm is not None]
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    step(model, torch.optim.SGD(model.parameters(), 0.1), data())
    for norm, (mean, var) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
    assert differing_after_convert(model, data()) == 0


@QCONFIG
@pytest.mark.parametrize("state", [FakeQuantState.QAT, FakeQuantState.VALIDATION])
def test_a_step_never_waits_for_the_device(qconfig: Any, state: FakeQuantState) -> None:
    """Tensors of the meta device have no values, so whatever asks for one fails."""
    model = prepare(qconfig=qconfig)
    set_fake_quantize(model, state)
    model.to("meta")
    x, labels = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(x.sum() > 0)  # it does fail
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_observing_for_the_first_time_does_not_wait_either() -> None:
    model = prepare(calibrated=False).to("meta")
    model(torch.empty(6, 3, 8, 8, device="meta")).sum().backward()
    assert all(q.ready for q in quantizers(model))


def test_scales_stay_float32_in_a_half_precision_model() -> None:
    for qconfig in (None, LSQ):
        model = prepare(qconfig=qconfig).half()
        scales = [m.scale for m in model.modules() if isinstance(m, (FakeQuantize, WeightFakeQuantize))]
        assert {s.dtype for s in scales if s is not None} == {torch.float32}


def test_unbatched_and_empty_inputs() -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), keep_bn=False)
    one = gradients_of_sum(model, data(1))
    assert one.keys() == gradients_of_sum(model, data(1)[0]).keys()
    model(data(2)[:0]).sum().backward()
    assert all_finite(model)


def gradients_of_sum(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_every_parameter() -> None:
    model = prepare(qconfig=LSQ)
    found = gradients(model, data())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert [n for n, g in found.items() if g.abs().max() == 0] == []


def test_weight_scales_of_an_observer_are_chosen_when_calibration_ends() -> None:
    model = prepare(qconfig=get_default_qconfig(weight_observer="mse"))
    group = groups(model)[0]
    chosen = group.weight_quant.scale.clone()
    with torch.no_grad():
        group.weight.mul_(3)
    loss_of(model, data())
    assert torch.equal(group.weight_quant.scale, chosen)
    calibrate(model, [data()], progress=False)
    assert torch.allclose(group.weight_quant.scale, 3 * chosen, rtol=1e-2)


def test_a_constant_of_zero_leaves_scales_as_calibration_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their observer: nothing is searched for in a step, and headroom that was added stays."""
    qkwargs = {"averaging_constant": 0.0}
    model = prepare(qconfig=get_default_qconfig(activation_observer="mse", activation_qkwargs=qkwargs))
    add_headroom(model, 2.0)
    scales = [m.scale.clone() for m in quantizers(model)]
    monkeypatch.setattr(MSEObserver, "scale", lambda *_: pytest.fail("a scale was searched for"))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        step(model, optimizer, 4 * data())
    assert all(torch.equal(m.scale, s) for m, s in zip(quantizers(model), scales, strict=True))
