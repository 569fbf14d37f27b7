"""Batch norms that are no plain module call: `F.batch_norm` on tensors of a module or of the root, and subclasses."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from fusion.networks import assert_unchanged, differing, gradients, randomize, run_both, snapshot, states_differ
from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import analyze
from horizon_plugin_pytorch.quantization import fuse_fx


class BatchNormAct2d(nn.BatchNorm2d):
    """In the style of timm: a batch norm with an activation behind it, computed by F.batch_norm."""

    def __init__(self, channels: int, activation: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.drop = nn.Identity()
        self.act = activation or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.momentum is None:
            factor = 0.0
        else:
            factor = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        use_batch = True if self.training else self.running_mean is None and self.running_var is None
        tracked = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            use_batch,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class ThenReLU(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class ThenSquare(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


class ConvNorm(nn.Module):
    def __init__(self, norm: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=bias), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class OnModule(nn.Module):
    """F.batch_norm on the tensors of a module that is not called."""

    def __init__(self, training: bool | None = None, eps: float = 1e-3) -> None:
        super().__init__()
        self.conv, self.bn, self.fixed, self.eps = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), training, eps

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        training = self.training if self.fixed is None else self.fixed
        y = F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, training, 0.2, self.eps)
        return F.relu6(y + x)


class OnRoot(nn.Module):
    """F.batch_norm on tensors of the root itself, under names of its own."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.randn(4)) if affine else None
        self.beta = nn.Parameter(torch.randn(4)) if affine else None
        self.register_buffer("mu", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("count", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mu, self.var, self.gamma, self.beta, self.training, 0.1, 1e-3)
        return torch.relu(y) * self.count


class TorchBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        y = torch.batch_norm(
            self.conv(x), bn.weight, bn.bias, bn.running_mean, bn.running_var, self.training, 0.1, 1e-5, False
        )
        return y.relu()


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNormAct2d": (lambda: ConvNorm(BatchNormAct2d(4)), "ConvBNReLU2d"),
    "BatchNormAct2d, ReLU6": (lambda: ConvNorm(BatchNormAct2d(4, nn.ReLU6(), eps=0.1), bias=True), "ConvBNReLU62d"),
    "BatchNormAct2d, Hardtanh": (lambda: ConvNorm(BatchNormAct2d(4, nn.Hardtanh(0, 6))), "ConvBNReLU62d"),
    "BatchNormAct2d, Identity": (lambda: ConvNorm(BatchNormAct2d(4, nn.Identity())), "ConvBN2d"),
    "BatchNormAct2d, SiLU": (lambda: ConvNorm(BatchNormAct2d(4, nn.SiLU())), "ConvBN2d"),
    "BatchNormAct2d, affine=False": (lambda: ConvNorm(BatchNormAct2d(4, affine=False)), "ConvBNReLU2d"),
    "subclass, then relu": (lambda: ConvNorm(ThenReLU(4, momentum=0.03)), "ConvBNReLU2d"),
    "subclass, then square": (lambda: ConvNorm(ThenSquare(4)), "ConvBN2d"),
    "module's tensors": (OnModule, "ConvBNAddReLU62d"),
    "root's tensors": (OnRoot, "ConvBNReLU2d"),
    "root's tensors, no affine": (lambda: OnRoot(affine=False), "ConvBNReLU2d"),
    "torch.batch_norm": (TorchBatchNorm, "ConvBNReLU2d"),
}


def build(case: str) -> nn.Module:
    return randomize(CASES[case][0]())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_absorbed(case: str, training: bool) -> None:
    model = build(case).train(training)
    before = snapshot(model)
    checkpoint = copy.deepcopy(model.state_dict())
    fused = fuse_fx(model)
    assert_unchanged(model, before)
    assert analyze(model) == fused.fusion_report
    assert fused.fusion_report.count() == {CASES[case][1]: 1} and fused.fusion_report.missed == []
    x = torch.randn(2, 4, 5, 5)
    expected = model.eval()(x)
    assert differing(fused.eval()(x), expected) == 0
    assert not any(p.numel() for m in fused.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())

    gc.collect()  # the copy the fused model was made from is gone
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
    fused.load_state_dict(checkpoint)
    assert differing(fused(x), expected) == 0
    again = fuse_fx(model)
    again.load_state_dict(fused.state_dict())
    assert differing(again(x), expected) == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_kept(case: str, training: bool) -> None:
    """Kept, it is trained exactly as before, whichever mode the model was in when it was fused."""
    model = build(case).train(training)
    fused = fuse_fx(model, is_qat=True)
    assert fused.fusion_report.count() == {CASES[case][1]: 1}
    assert states_differ(fused, model) == {}
    for step in range(3):
        x = torch.randn(4, 4, 5, 5)
        a, b = fused.train()(x), model.train()(x)
        assert differing(a, b, tolerance=0.0) == 0, step
        for out, m in ((a, fused), (b, model)):
            m.zero_grad()
            (out * x).sum().backward()
        assert states_differ(gradients(fused), gradients(model)) == {}
        assert states_differ(fused, model) == {}
    x = torch.randn(2, 4, 5, 5)
    expected = model.eval()(x)
    assert differing(fused.eval()(x), expected, tolerance=0.0) == 0

    checkpoint = copy.deepcopy(model.state_dict())
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            for t in copied.parameters():
                t.add_(1)
        gc.collect()
        copied.load_state_dict(checkpoint)
        assert differing(copied(x), expected, tolerance=0.0) == 0
    unfused = CASES[case][0]()
    unfused.load_state_dict(fused.state_dict())
    assert states_differ(unfused, model) == {}
    horizon.quantization.absorb_bn(fused)
    assert differing(fused(x), expected) == 0
    fused.load_state_dict(checkpoint)
    assert differing(fused(x), expected) == 0


@pytest.mark.parametrize("momentum", [None, 0.2])
def test_momentum_is_the_modules_own_also_where_it_was_fused_in_eval_mode(momentum: float | None) -> None:
    model = randomize(ConvNorm(BatchNormAct2d(4, momentum=momentum))).eval()
    fused = fuse_fx(model, is_qat=True)
    assert fused.fusion_report.count() == {"ConvBNReLU2d": 1}
    assert fused.conv.bn.momentum == momentum
    if momentum is None:  # in training mode it cannot be traced, so that mode is refused
        with pytest.raises(FusionError, match="was fused in eval mode"):
            fused.train()
        return
    for _ in range(3):
        x = torch.randn(4, 4, 5, 5)
        fused.train()(x), model.train()(x)
        assert states_differ(fused, model) == {}


def test_a_cumulative_average_in_training_mode_is_left_whole() -> None:
    """``1 / float(num_batches_tracked)`` cannot be traced."""
    model = randomize(ConvNorm(BatchNormAct2d(4, momentum=None))).train()
    fused = fuse_fx(model, is_qat=True)
    assert fused.fusion_report.groups == []
    x = torch.randn(4, 4, 5, 5)
    assert differing(fused(x), model(x), tolerance=0.0) == 0 and states_differ(fused, model) == {}


def test_always_with_the_statistics_of_the_batch() -> None:
    model = randomize(OnModule(training=True)).eval()
    fused = fuse_fx(model)
    (miss,) = [m for m in fused.fusion_report.missed if m.kind == "norm"]
    assert "statistics of the batch, also in eval mode" in miss.reason and "conv" in miss.modules
    assert run_both(fused, copy.deepcopy(model), torch.randn(2, 4, 5, 5)) == 0


@pytest.mark.parametrize("training", [False, True])
def test_always_with_the_running_statistics(training: bool) -> None:
    model = randomize(OnModule(training=False)).train(training)
    absorbed = fuse_fx(model)
    assert absorbed.fusion_report.count() == {"ConvBNAddReLU62d": 1}
    x = torch.randn(2, 4, 5, 5)
    assert run_both(absorbed, model, x) == 0

    kept = fuse_fx(model.train(), is_qat=True)
    (miss,) = [m for m in kept.fusion_report.missed if m.kind == "norm"]
    assert "running statistics, also in training mode" in miss.reason
    assert differing(kept(x), model(x), tolerance=0.0) == 0 and states_differ(kept, model) == {}


def test_tensors_that_are_computed() -> None:
    class Net(OnModule):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight * 2, bn.bias, False, 0.1, 1e-5)

    model = randomize(Net()).eval()
    fused = fuse_fx(model)
    assert "computed in the forward" in fused.fusion_report.missed[0].reason
    assert run_both(fused, model, torch.randn(2, 4, 5, 5)) == 0


def test_tensors_of_two_modules() -> None:
    class Net(OnModule):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            return F.batch_norm(
                self.conv(x), bn.running_mean, bn.running_var, self.other.weight, self.other.bias, False, 0.1, 1e-5
            )

    model = randomize(Net()).eval()
    fused = fuse_fx(model)
    assert "'bn', 'other'" in fused.fusion_report.missed[0].reason
    assert run_both(fused, model, torch.randn(2, 4, 5, 5)) == 0


def test_tensors_that_are_read_elsewhere_too() -> None:
    class Net(OnModule):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            y = F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, 1e-5)
            return y + bn.running_mean.mean()

    model = randomize(Net()).eval()
    fused = fuse_fx(model)
    (miss,) = [m for m in fused.fusion_report.missed if m.kind == "norm"]
    assert "read by 'mean', too" in miss.reason
    assert run_both(fused, model, torch.randn(2, 4, 5, 5)) == 0


def test_no_running_statistics() -> None:
    class Net(OnModule):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), None, None, self.bn.weight, self.bn.bias, True, 0.1, 1e-5)

    model = randomize(Net()).eval()
    fused = fuse_fx(model)
    assert "no running statistics" in fused.fusion_report.missed[0].reason
    assert run_both(fused, model, torch.randn(2, 4, 5, 5)) == 0


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_subclass_called_twice(training: bool, is_qat: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), BatchNormAct2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    model = randomize(Net()).train(training)
    fused = fuse_fx(model, is_qat=is_qat)
    assert fused.fusion_report.groups == [] and len(fused.fusion_report.missed) == 2
    x = torch.randn(2, 4, 5, 5)
    assert differing(fused(x), model(x), tolerance=0.0) == 0 and states_differ(fused, model) == {}


class Counting(nn.Module):
    """Counts batches itself, in a buffer that a batch norm's counter is named like."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma, self.beta = (
            nn.Conv2d(4, 4, 1),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
        )
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("num_batches_tracked", torch.tensor(5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, self.training, 0.1, 1e-3)
        return y * self.num_batches_tracked


@pytest.mark.parametrize("is_qat", [False, True])
def test_a_counter_that_belongs_to_the_root_stays_there(is_qat: bool) -> None:
    model = Counting().eval()
    fused = fuse_fx(model, is_qat=is_qat)
    x = torch.randn(2, 4, 5, 5)
    assert run_both(fused, model, x) == 0
    assert fused.state_dict()["num_batches_tracked"] == 5
    fused.load_state_dict(model.state_dict())
    assert run_both(fused, model, x) == 0


def test_several_functional_norms_of_one_owner() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
            for i in range(3):
                self.register_buffer(f"mean{i}", torch.randn(4))
                self.register_buffer(f"var{i}", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            for i, conv in enumerate(self.convs):
                mean, var = getattr(self, f"mean{i}"), getattr(self, f"var{i}")
                x = F.relu(F.batch_norm(conv(x), mean, var, training=self.training))
            return x

    model = Net().eval()
    x = torch.randn(2, 4, 5, 5)
    for is_qat in (False, True):
        fused = fuse_fx(model, is_qat=is_qat)
        assert fused.fusion_report.count() == {"ConvBNReLU2d": 3}
        assert run_both(fused, model, x) == 0
        fused.load_state_dict(model.state_dict())
        assert run_both(fused, model, x) == 0
        assert not is_qat or states_differ(fused, model) == {}
