"""The road from float to int8 on a CUDA device, compared with the CPU element by element."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.quantization import (
    DeQuantStub,
    FakeQuantState,
    QuantStub,
    calibrate,
    convert,
    convert_fx,
    fuse_modules,
    prepare_qat,
    prepare_qat_fx,
    set_fake_quantize,
)

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    """Every kind of stage: depthwise, transposed, residual, ReLU6, pool, cat, a table and a float island."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.point = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        self.gate = nn.SiLU()
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.point(self.depthwise(x)) + x)
        x = self.norm(self.gate(x))
        up = nn.functional.max_pool2d(self.up(x), 2)
        return self.fc(torch.cat([x, up], 1).mean((2, 3)))


def make() -> nn.Module:
    model = Block()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_quantized_on_the_device_and_on_the_cpu() -> None:
    model, x = make(), torch.randn(4, 3, 32, 32)
    int8 = horizon.quantize(model, [x], progress=False)
    with torch.no_grad():
        expected = int8(x)
        assert (copy.deepcopy(int8).cuda()(x.cuda()).cpu() != expected).sum() == 0
        whole = horizon.quantize(model.cuda(), [x.cuda()], progress=False)
        y = whole(x.cuda())
    assert y.is_cuda
    signal, noise = model(x.cuda()).square().sum(), (model(x.cuda()) - y).square().sum()
    assert 10 * torch.log10(signal / noise) > 15


def test_training_on_the_device() -> None:
    model, x = make().cuda(), torch.randn(4, 3, 32, 32, device="cuda")
    qat = calibrate(prepare_qat_fx(model, example_inputs=x), [x], progress=False)
    set_fake_quantize(qat.train(), FakeQuantState.QAT)
    optimizer = torch.optim.SGD(qat.parameters(), 0.01)
    losses = []
    for _ in range(5):
        for dtype in (None, torch.bfloat16, torch.float16):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = (qat(x).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert (qat.eval()(x) != convert_fx(qat)(x)).sum() == 0


def test_a_training_step_never_waits_for_the_device() -> None:
    model, x = make().cuda(), torch.randn(4, 3, 32, 32, device="cuda")
    qat = calibrate(prepare_qat_fx(model, example_inputs=x), [x], progress=False)
    set_fake_quantize(qat.train(), FakeQuantState.QAT)
    qat(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        qat(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fused_by_name_on_the_device() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = QuantStub(), DeQuantStub()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.skip, self.relu = horizon.nn.quantized.FloatFunctional(), nn.ReLU()
            self.out = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            x = self.relu(self.skip.add(x, self.bn(self.conv(x))))
            return self.dequant(self.out(x))

    model, x = Named().eval().cuda(), torch.randn(2, 3, 9, 9, device="cuda")
    qat = calibrate(prepare_qat(fuse_modules(model, ["conv", "bn", "skip", "relu"])), [x], progress=False)
    with torch.no_grad():
        int8 = convert(qat)
        y = int8(x)
        assert (qat(x) != y).sum() == 0
        assert (int8.cpu()(x.cpu()) != y.cpu()).sum() == 0
