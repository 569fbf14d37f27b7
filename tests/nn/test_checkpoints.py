"""Checkpoints across fusion: their keys stay where they were, and an absorbed norm is absorbed again when it is loaded."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import horizon_plugin_pytorch as horizon
from fusion.networks import differing, randomize, run_both, states_differ
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import absorb_bn, fuse_fx, fuse_modules, fuse_modules_qat


class Net(nn.Module):
    """Groups of every kind; some places are registered in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)  # before its convolution
        self.conv1, self.relu1 = nn.Conv2d(3, 4, 1, bias=False), nn.ReLU()
        self.ff = FloatFunctional()  # before the convolution that is fused into it
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6()
        self.body = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.SyncBatchNorm(4, affine=False), nn.ReLU())
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1, bias=False), FrozenBatchNorm2d(4)
        self.bn4, self.conv4, self.ff4 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), FloatFunctional()
        self.flatten, self.fc, self.bn5 = nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.ff.add(x, self.bn2(self.conv2(x))))
        x = self.body(x)
        x = self.ff4.add(self.bn4(self.conv4(self.bn3(self.conv3(x)))), x)
        return self.bn5(self.fc(self.flatten(F.adaptive_avg_pool2d(x, 1))))


GROUPS = [
    ["conv1", "bn1", "relu1"],
    ["conv2", "bn2", "ff", "relu2"],
    ["body.0", "body.1", "body.2"],
    ["conv3", "bn3"],
    ["conv4", "bn4", "ff4"],
    ["fc", "bn5"],
]

FUSERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "by name, absorbed": lambda m: fuse_modules(m, GROUPS),
    "by name, kept": lambda m: fuse_modules_qat(m, GROUPS),
    "by name, absorbed later": lambda m: absorb_bn(fuse_modules_qat(m, GROUPS)),
    "by graph, absorbed": fuse_fx,
    "by graph, kept": lambda m: fuse_fx(m, is_qat=True),
    "by graph, absorbed later": lambda m: absorb_bn(fuse_fx(m, is_qat=True)),
}
KEPT = [name for name in FUSERS if name.endswith("kept")]
X = torch.randn(4, 3, 5, 5)


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(Net()).eval()


def keys(prefix: str = "") -> set[str]:
    return {prefix + key for key in Net().state_dict()}


@pytest.mark.parametrize("fuser", FUSERS)
def test_all_six_groups_fuse(fuser: str) -> None:
    fused = FUSERS[fuser](make(0))
    norms = [m for m in fused.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == (6 if fuser in KEPT else 0)
    assert run_both(fused, make(0), X) == 0


# -- before fusion → after it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fuser", FUSERS)
def test_a_checkpoint_from_before_fusion_loads(fuser: str, assign: bool) -> None:
    fused, other = FUSERS[fuser](make(0)), make(1)
    checkpoint = other.state_dict()
    before = copy.deepcopy(checkpoint)
    parameters = dict(fused.named_parameters())
    result = fused.load_state_dict(checkpoint, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert run_both(fused, other, X) == 0
    assert states_differ(checkpoint, before) == {}  # the caller's tensors are the caller's
    if not assign:  # an optimizer goes on holding the parameters it was made with
        assert all(parameters[name] is p for name, p in fused.named_parameters())
    fused.load_state_dict(before, assign=assign)  # and again
    assert run_both(fused, other, X) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_as_part_of_a_larger_model(fuser: str) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return nn.ModuleDict({"left": nn.Linear(2, 2), "net": nn.ModuleList([model, nn.Linear(1, 1)])})

    fused, other = wrap(FUSERS[fuser](make(0))), wrap(make(1))
    fused.load_state_dict(other.state_dict())
    assert run_both(fused["net"][0], other["net"][0], X) == 0


@pytest.mark.parametrize("fuser", [name for name in FUSERS if name.startswith("by name")])
def test_fused_as_part_of_a_larger_model(fuser: str) -> None:
    wrapped, other = (
        nn.ModuleDict({"a": nn.ModuleDict({"net": make(0)})}),
        nn.ModuleDict({"a": nn.ModuleDict({"net": make(1)})}),
    )
    fuse = fuse_modules if fuser == "by name, absorbed" else fuse_modules_qat
    fused = fuse(wrapped, [[f"a.net.{name}" for name in group] for group in GROUPS])
    if fuser == "by name, absorbed later":
        absorb_bn(fused)
    fused.load_state_dict(other.state_dict())
    assert run_both(fused["a"]["net"], other["a"]["net"], X) == 0


# -- after fusion → after it, and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fuser", FUSERS)
def test_a_checkpoint_from_after_fusion_loads_into_a_fused_model(fuser: str, assign: bool) -> None:
    fused, other = FUSERS[fuser](make(0)), FUSERS[fuser](make(1))
    checkpoint = other.state_dict()
    fused.load_state_dict(checkpoint, assign=assign)
    assert run_both(fused, make(1), X) == 0
    assert states_differ(fused, other) == {}


@pytest.mark.parametrize("road", ["by name", "by graph"])
@pytest.mark.parametrize(
    ("first", "second"), [("absorbed", "absorbed later"), ("absorbed later", "absorbed"), ("kept", "absorbed")]
)
def test_between_the_ways_to_treat_the_norm(road: str, first: str, second: str) -> None:
    source, target = FUSERS[f"{road}, {first}"](make(1)), FUSERS[f"{road}, {second}"](make(0))
    target.load_state_dict(source.state_dict())
    assert run_both(target, make(1), X) == 0


@pytest.mark.parametrize("kind", ["absorbed", "kept"])
def test_between_the_roads(kind: str) -> None:
    for a, b in (("by name", "by graph"), ("by graph", "by name")):
        source, target = FUSERS[f"{a}, {kind}"](make(1)), FUSERS[f"{b}, {kind}"](make(0))
        target.load_state_dict(source.state_dict())
        assert run_both(target, make(1), X) == 0


@pytest.mark.parametrize("fuser", KEPT)
def test_a_checkpoint_with_kept_norms_is_one_from_before_fusion(fuser: str) -> None:
    model = make(1)
    fused = FUSERS[fuser](model)
    assert states_differ(fused, model) == {}  # the same keys and values
    unfused = make(0)
    unfused.load_state_dict(fused.state_dict())
    assert run_both(unfused, model, X) == 0


@pytest.mark.parametrize("fuser", [name for name in FUSERS if name not in KEPT])
def test_keys_of_an_absorbed_norm_are_gone(fuser: str) -> None:
    fused = FUSERS[fuser](make(0))
    expected = {k for k in keys() if "bn" not in k and "body.1" not in k} | {"conv1.bias", "conv3.bias", "conv4.bias"}
    assert set(fused.state_dict()) == expected
    assert {k for k, _ in fused.state_dict(keep_vars=True).items()} == expected


# -- strictness -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", FUSERS)
def test_each_missing_key_is_missed(fuser: str) -> None:
    fused, checkpoint = FUSERS[fuser](make(0)), make(1).state_dict()
    for key in checkpoint:
        less = {k: v for k, v in checkpoint.items() if k != key}
        if key.endswith("num_batches_tracked"):  # stock norms accept old checkpoints without it
            continue
        with pytest.raises(RuntimeError, match=re.escape(key)):
            fused.load_state_dict(less)
    fused.load_state_dict(checkpoint)
    assert run_both(fused, make(1), X) == 0  # the failed attempts left nothing behind


@pytest.mark.parametrize("fuser", FUSERS)
def test_each_missing_key_of_its_own_checkpoint_is_missed(fuser: str) -> None:
    fused = FUSERS[fuser](make(0))
    checkpoint = FUSERS[fuser](make(1)).state_dict()
    for key in checkpoint:
        if key.endswith("num_batches_tracked"):
            continue
        with pytest.raises(RuntimeError, match=re.escape(key)):
            fused.load_state_dict({k: v for k, v in checkpoint.items() if k != key})


UNEXPECTED = [
    "extra",
    "conv1.extra",
    "conv1.conv.weight",
    "conv2.conv.weight",
    "ff.conv.weight",
    "ff.weight",
    "bn2.extra",
    "body.0.conv.weight",
]


@pytest.mark.parametrize("fuser", FUSERS)
def test_unexpected_keys_are_unexpected(fuser: str) -> None:
    fused, checkpoint = FUSERS[fuser](make(0)), make(1).state_dict()
    for key in UNEXPECTED:
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{re.escape(key)}"'):
            fused.load_state_dict({**checkpoint, key: torch.zeros(4)})


@pytest.mark.parametrize("fuser", FUSERS)
def test_a_bias_that_was_not_there_is_unexpected_beside_the_norm(fuser: str) -> None:
    fused, checkpoint = FUSERS[fuser](make(0)), make(1).state_dict()
    for key in ("conv1.bias", "conv3.bias", "conv4.bias"):
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
            fused.load_state_dict({**checkpoint, key: torch.zeros(4)})


@pytest.mark.parametrize("fuser", FUSERS)
def test_wrong_shapes_are_wrong_also_where_they_would_broadcast(fuser: str) -> None:
    fused, checkpoint = FUSERS[fuser](make(0)), make(1).state_dict()
    for key, value in checkpoint.items():
        if value.dim():
            with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(key)}"):
                fused.load_state_dict({**checkpoint, key: value[:1]})


@pytest.mark.parametrize("fuser", FUSERS)
def test_not_strict(fuser: str) -> None:
    fused, other = FUSERS[fuser](make(0)), make(1)
    checkpoint = other.state_dict()
    result = fused.load_state_dict({**checkpoint, "extra": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["extra"] and result.missing_keys == []
    assert run_both(fused, other, X) == 0
    result = fused.load_state_dict({}, strict=False)
    # a stock norm takes a checkpoint without a version for an old one, that need not have its count of batches
    assert set(result.missing_keys) == {k for k in fused.state_dict() if not k.endswith("num_batches_tracked")}
    assert run_both(fused, other, X) == 0


def test_an_old_checkpoint_without_the_count_of_batches() -> None:
    checkpoint = make(1).state_dict()
    old = {k: v for k, v in checkpoint.items() if not k.endswith("num_batches_tracked")}
    for name, fuse in FUSERS.items():
        fused = fuse(make(0))
        fused.load_state_dict(old)
        assert run_both(fused, make(1), X) == 0, name


# -- one tensor's road ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fuser", ["by name, absorbed", "by graph, absorbed"])
def test_a_float32_checkpoint_into_a_model_of_another_dtype_is_rounded_once(fuser: str, dtype: torch.dtype) -> None:
    fused = FUSERS[fuser](make(0)).to(dtype)
    fused.load_state_dict(make(1).state_dict())
    exact = FUSERS[fuser](make(1).double()).state_dict()
    assert states_differ(fused, {key: value.to(dtype) for key, value in exact.items()}) == {}


@pytest.mark.parametrize("fuser", ["by name, absorbed", "by graph, absorbed"])
def test_a_half_precision_checkpoint_into_a_float32_model_loses_nothing_more(fuser: str) -> None:
    checkpoint = make(1).half().state_dict()
    other = make(0)
    other.load_state_dict(checkpoint)
    fused = FUSERS[fuser](make(0))
    fused.load_state_dict(checkpoint)
    assert run_both(fused, other, X) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_a_model_on_meta_is_materialized_by_a_checkpoint(fuser: str) -> None:
    fused = FUSERS[fuser](make(0)).to("meta")
    fused.load_state_dict(make(1).state_dict(), assign=True)
    assert not any(t.is_meta for t in (*fused.parameters(), *fused.buffers()))
    assert run_both(fused, make(1), X) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_an_optimizer_made_before_loading_goes_on(fuser: str) -> None:
    fused = FUSERS[fuser](make(0))
    optimizer = torch.optim.SGD(fused.parameters(), lr=1.0)
    fused.load_state_dict(make(1).state_dict())
    before = {n: p.detach().clone() for n, p in fused.named_parameters()}
    fused(X).square().sum().backward()
    optimizer.step()
    assert all(
        not torch.equal(p, before[n]) for n, p in fused.named_parameters() if p.grad is not None and bool(p.grad.any())
    )


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(fuser: str, how: str) -> None:
    fused = FUSERS[fuser](make(0))
    if how == "deepcopy":
        copied = copy.deepcopy(fused)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert [(n, type(m).__name__) for n, m in copied.named_modules()] == [
        (n, type(m).__name__) for n, m in fused.named_modules()
    ]
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert run_both(copied, make(0), X) == 0
    copied.load_state_dict(make(1).state_dict())  # its hooks are its own
    assert run_both(copied, make(1), X) == 0 and run_both(fused, make(0), X) == 0
    if fuser in KEPT:
        absorb_bn(copied)
        assert run_both(copied, make(1), X) == 0 and run_both(fused, make(0), X) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_a_saved_checkpoint_loads_weights_only(fuser: str) -> None:
    file = io.BytesIO()
    torch.save(FUSERS[fuser](make(1)).state_dict(), file)
    file.seek(0)
    fused = FUSERS[fuser](make(0))
    fused.load_state_dict(torch.load(file, weights_only=True))
    assert run_both(fused, make(1), X) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_dtype_moves(fuser: str) -> None:
    fused = FUSERS[fuser](make(0)).double()
    assert {t.dtype for t in fused.parameters()} == {torch.float64}
    fused.load_state_dict(make(1).double().state_dict())
    assert run_both(fused, make(1).double(), X.double()) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_state_dict_gives_the_live_tensors(fuser: str) -> None:
    fused = FUSERS[fuser](make(0))
    live = {id(p) for p in fused.parameters()}
    kept = fused.state_dict(keep_vars=True)
    assert {id(p) for p in kept.values() if isinstance(p, nn.Parameter)} == live
    plain = fused.state_dict()
    assert not any(t.requires_grad for t in plain.values())
    assert {k: t.data_ptr() for k, t in plain.items()} == {k: t.data_ptr() for k, t in kept.items()}


# -- built by hand ----------------------------------------------------------------------------------------------------------


def test_a_group_built_by_hand_has_keys_of_its_own() -> None:
    def build() -> nn.Module:
        group = horizon.nn.intrinsic.ConvBNReLU2d(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        return randomize(nn.Sequential(group)).eval()

    model, other = build(), build()
    assert set(model.state_dict()) == {"0.conv.weight", *(f"0.bn.{n}" for n in nn.BatchNorm2d(3).state_dict())}
    model.load_state_dict(other.state_dict())
    assert run_both(model, other, X) == 0
    absorbed = absorb_bn(build())
    assert set(absorbed.state_dict()) == {"0.conv.weight", "0.conv.bias"}
    absorbed.load_state_dict(other.state_dict())
    assert run_both(absorbed, other, X) == 0
    again = absorb_bn(build())
    again.load_state_dict(absorbed.state_dict())
    assert run_both(again, other, X) == 0


class LoadCounter(nn.Module):
    """A root with a load hook of its own, registered the public way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.loads = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 0
        self.register_load_state_dict_pre_hook(count_load)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def count_load(module: nn.Module, *_: Any) -> None:
    module.loads += 1


def test_load_hooks_of_the_users_root_go_on_with_the_fused_one() -> None:
    fused = fuse_fx(LoadCounter().eval())
    fused.load_state_dict(LoadCounter().state_dict())
    assert fused.loads == 1
    copied = copy.deepcopy(fused)
    copied.load_state_dict(LoadCounter().state_dict())
    assert (copied.loads, fused.loads) == (2, 1)


def test_outputs_after_loading_equal_to_the_last_bit_whichever_order_things_are_registered_in() -> None:
    class Order(nn.Module):
        def __init__(self, norm_first: bool) -> None:
            super().__init__()
            names = ["bn", "conv"] if norm_first else ["conv", "bn"]
            for name in names:
                self.add_module(name, nn.BatchNorm2d(3) if name == "bn" else nn.Conv2d(3, 3, 1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    checkpoint = randomize(Order(True)).state_dict()
    outs = []
    for norm_first in (True, False):
        fused = fuse_modules(Order(norm_first).eval(), ["conv", "bn"])
        fused.load_state_dict(checkpoint)
        outs.append(fused(X))
    assert differing(*outs, tolerance=0.0) == 0


# -- modules replaced inside a group ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", KEPT)
def test_converting_kept_norms_to_synchronized_ones(fuser: str) -> None:
    model, other = make(0), make(1)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(FUSERS[fuser](model)).double()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in fused.modules()) == 5
    x = X.double()
    model.double().train()(x), fused.train()(x)
    assert states_differ(fused, model) == {}  # what is saved is what is trained, not what stood there before
    fused.load_state_dict(other.double().state_dict())
    assert run_both(fused.eval(), other, x) == 0
    absorb_bn(fused)
    assert run_both(fused, other, x) == 0
    fused.load_state_dict(model.state_dict())
    assert run_both(fused, model.eval(), x) == 0
