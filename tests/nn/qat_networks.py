"""A small network with every kind of group, prepared for training, and a step of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch.qat_mode import QATMode, get_qat_mode, set_qat_mode
from horizon_plugin_pytorch.quantization import (
    FakeQuantState,
    calibrate,
    convert_fx,
    get_default_qconfig,
    prepare_qat_fx,
    set_fake_quantize,
)

LSQ = get_default_qconfig(activation_fake_quant="lsq", weight_fake_quant="lsq")
QCONFIGS = {
    "min_max": get_default_qconfig(),
    "lsq": LSQ,
    "mse": get_default_qconfig(activation_observer="mse", weight_observer="mse"),
    "percentile": get_default_qconfig(activation_observer="percentile", activation_qkwargs={"percentile": 99.9}),
}


class Network(nn.Module):
    """Dense, depthwise and transposed convolutions, a residual add of each activation, pools, a cat and a linear layer."""

    def __init__(self, batch_norm: Any = nn.BatchNorm2d, zero_init: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), batch_norm(8)
        self.depthwise, self.depthwise_bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), batch_norm(8)
        self.residual, self.residual_bn = nn.Conv2d(8, 8, 3, padding=1), batch_norm(8)
        self.up, self.up_bn = nn.ConvTranspose2d(8, 8, 2, stride=2), batch_norm(8)
        self.linear = nn.Linear(16, 4)
        if zero_init:
            nn.init.zeros_(self.residual_bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.conv(x)))
        x = F.relu(self.depthwise_bn(self.depthwise(x)))
        y = F.relu(self.residual_bn(self.residual(x)) + x)
        z = F.relu6(self.up_bn(self.up(F.max_pool2d(y, 2))) + y)
        z = torch.cat([y, z], 1)
        return self.linear(F.adaptive_avg_pool2d(z, 1).flatten(1))


@contextmanager
def qat_mode(mode: QATMode) -> Iterator[None]:
    before = get_qat_mode()
    set_qat_mode(mode)
    try:
        yield
    finally:
        set_qat_mode(before)


def data(count: int = 6, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size)


def prepare(
    model: nn.Module | None = None,
    qconfig: Any = None,
    *,
    keep_bn: bool = True,
    calibrated: bool = True,
    x: Tensor | None = None,
) -> nn.Module:
    """A model (default: a `Network`) in training mode and the state QAT."""
    x = data() if x is None else x
    model = fitted(Network() if model is None else model, x)
    with qat_mode(QATMode.WithBN if keep_bn else QATMode.FuseBN):
        prepared = prepare_qat_fx(model, None if qconfig is None else {"": qconfig}, example_inputs=x)
    if calibrated:
        calibrate(prepared, [x, x.flip(2)], progress=False)
    set_fake_quantize(prepared, FakeQuantState.QAT)
    return prepared.train()


def fitted(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in eval mode, with norms that have the statistics of `x`, as those of a trained network fit its data."""
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in momenta:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model.eval()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Cross entropy against labels that a network can learn: which channel of the image varies most."""
    labels = x.var((2, 3)).argmax(1)
    return F.cross_entropy(model(x).float(), labels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss = loss_of(model, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differing_after_convert(model: nn.Module, x: Tensor) -> int:
    """How many output elements of a prepared model in eval mode differ from those of what it converts to."""
    training = model.training
    model.eval()
    with torch.no_grad():
        count = int((model(x) != convert_fx(model)(x)).sum())
    model.train(training)
    return count
