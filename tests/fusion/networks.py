"""Small networks for the tests of fusion: a drawn anchor, its norm with random statistics, an add, an activation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import Phase
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from horizon_plugin_pytorch.nn.quantized import FloatFunctional

ANCHORS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")
NORMS = ("none", "BatchNorm", "SyncBatchNorm", "FrozenBatchNorm2d")

ANCHOR_AND_NORM = [(a, n) for a in ANCHORS for n in NORMS if n != "FrozenBatchNorm2d" or a.endswith("2d")]
"""Every cell of anchor × norm that exists: a frozen batch norm is two-dimensional."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference allowed, relative to the largest value."""


def torch_float_functional() -> nn.Module:
    return torch.ao.nn.quantized.FloatFunctional()


FUNCTIONALS: dict[str, Callable[[], nn.Module]] = {"ours": FloatFunctional, "torch.ao": torch_float_functional}


TAILS = [
    (add, activation)
    for add in ("none", "first", "second")
    for activation in ("none", "ReLU", "ReLU6", "Hardtanh(0, 6)")
]
"""add × activation, which follow each cell of anchor × norm."""

PHASES = [phase for phase in Phase if phase is not Phase.explain]
"""Explaining a failure traces every line, which makes drawing several times slower."""

dtypes = st.sampled_from([torch.float32, torch.float64])
functionals = st.sampled_from(["ours", "torch.ao"])


def differing(actual: Tensor, expected: Tensor, tolerance: float | None = None, scale: float = 0.0) -> int:
    """How many elements differ by more than the dtype's tolerance, relative to the largest expected element or `scale`."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert bool(expected.isfinite().all())
    if tolerance is None:
        tolerance = TOLERANCE[expected.dtype]
    bound = tolerance * max(float(expected.detach().abs().max()), scale) if expected.numel() else 0.0
    return int(((actual - expected).abs().double() > bound).sum())


def states_differ(actual: nn.Module | dict[str, Tensor], expected: nn.Module | dict[str, Tensor]) -> dict[str, int]:
    """Differing elements per state_dict entry, exactly (a NaN equals a NaN); missing and unexpected keys fail."""
    a = actual.state_dict() if isinstance(actual, nn.Module) else actual
    b = expected.state_dict() if isinstance(expected, nn.Module) else expected
    assert a.keys() == b.keys()
    counts = {k: int((~a[k].isclose(b[k], rtol=0, atol=0, equal_nan=True)).sum()) for k in b}
    return {k: n for k, n in counts.items() if n}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By the names of a checkpoint, which fusing does not change."""
    return {k: p.grad for k, p in model.state_dict(keep_vars=True).items() if isinstance(p, nn.Parameter)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a failed call must leave as it was: tensors, the tree of modules by identity, hooks, training flags."""
    return {
        "tree": [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        "hooks": [
            (name, table, list(value.items()))
            for name, m in model.named_modules()
            for table, value in m.__dict__.items()
            if "hooks" in table and isinstance(value, dict)
        ],
        "ids": {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())},
        "state": {k: v.detach().clone() for k, v in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert not states_differ(after.pop("state"), before["state"])
    assert after == {k: v for k, v in before.items() if k != "state"}


# ---------------------------------------------------------------------------------------------------------------------------
# Random values


def randomize(model: nn.Module) -> nn.Module:
    """Random statistics and affine values for every norm, some gammas zero and negative."""
    for m in model.modules():
        mean = getattr(m, "running_mean", None)
        if mean is None:
            continue
        with torch.no_grad():
            mean.normal_()
            m.running_var.uniform_(0.2, 3.0)
            if getattr(m, "weight", None) is not None:
                m.weight.normal_(0.5, 1.0)
                m.weight[0] = 0.0
                m.weight[-1] = -0.7
            if getattr(m, "bias", None) is not None:
                m.bias.normal_()
    return model


def make_norm(norm: str, anchor: nn.Module, options: dict[str, Any] | None = None) -> nn.Module | None:
    """The norm that fits an anchor; `norm` is one of `NORMS`, `options` are drawn from `norm_options`."""
    kwargs = dict(options or {})
    scale_only = kwargs.pop("scale_only", False)
    channels = getattr(anchor, "out_channels", None) or anchor.out_features
    dims = 1 if isinstance(anchor, nn.Linear) else anchor.weight.dim() - 2
    if norm == "none":
        return None
    if norm == "FrozenBatchNorm2d":
        return FrozenBatchNorm2d(channels, eps=kwargs.get("eps", 1e-5))
    cls = nn.SyncBatchNorm if norm == "SyncBatchNorm" else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    result = cls(channels, **kwargs)
    if scale_only:
        result.bias = None
    return result


@st.composite
def anchors(draw: st.DrawFn, kind: str, same_channels: bool = False) -> tuple[nn.Module, Tensor]:
    """An anchor of a kind with every option drawn, and an input for it, both float64."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    small = st.integers(1, 3)
    bias, batch = draw(st.booleans()), draw(st.integers(2, 3))
    if kind == "Linear":
        n_in, n_out = draw(small), draw(small)
        return nn.Linear(n_in, n_in if same_channels else n_out, bias=bias).double(), torch.randn(batch, n_in).double()
    dims, transposed = int(kind[-2]), "Transpose" in kind
    groups = draw(st.integers(1, 3))
    n_in = groups * draw(st.integers(1, 2))
    n_out = n_in if same_channels else groups * draw(st.integers(1, 2))

    def per_dim(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(dims))

    kernel, stride, dilation = per_dim(small), per_dim(st.integers(1, 2)), per_dim(st.integers(1, 2))
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if transposed:
        padding = tuple(draw(st.integers(0, e // 2)) for e in extent)
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        options: dict[str, Any] = {"output_padding": output_padding}
        size = [draw(st.integers(2, 4)) for _ in extent]
    else:
        padding = per_dim(st.integers(0, 1))
        options = {"padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))}
        size = [e + draw(st.integers(1, 3)) for e in extent]
    cls = getattr(nn, kind)
    anchor = cls(n_in, n_out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias, **options)
    return anchor.double(), torch.randn(batch, n_in, *size).double()


def anchor_for(kind: str) -> tuple[nn.Module, Tensor]:
    """One anchor of a kind with options that matter (groups, stride, output padding, …), and an input, both float64."""
    if kind == "Linear":
        return nn.Linear(4, 6, bias=False).double(), torch.randn(3, 4).double()
    dims = int(kind[-2])
    options = {"output_padding": 1, "dilation": 2} if "Transpose" in kind else {"padding_mode": "circular"}
    anchor = getattr(nn, kind)(4, 6, 3, stride=2, padding=1, groups=2, bias=dims == 2, **options)
    return anchor.double(), torch.randn(2, 4, *[5, 4, 3][:dims]).double()


norm_options = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([1e-5, 1e-3, 0.1]),
        "momentum": st.sampled_from([0.1, 0.03, None]),
        "affine": st.booleans(),
        "scale_only": st.booleans(),
    }
)


# ---------------------------------------------------------------------------------------------------------------------------
# Modules, called by name

ACTIVATIONS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "ReLU": nn.ReLU,
    "ReLU inplace": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "Hardtanh(0, 6)": lambda: nn.Hardtanh(0, 6),
}
LABEL = {"none": "", "ReLU": "ReLU", "ReLU inplace": "ReLU", "ReLU6": "ReLU6", "Hardtanh(0, 6)": "ReLU6"}
ADDS = ("none", "first", "second")
"""Where the anchor's result is an operand of the add."""


class Block(nn.Module):
    """anchor -> [norm] -> [FloatFunctional] -> [activation], all modules, for fusing by name."""

    def __init__(
        self,
        anchor: nn.Module,
        norm: nn.Module | None = None,
        add: str = "none",
        activation: str = "none",
        functional: str = "ours",
        method: str = "add",
    ) -> None:
        super().__init__()
        self.conv = anchor
        self.bn = norm
        self.ff = FUNCTIONALS[functional]() if add != "none" else None
        self.relu = ACTIVATIONS[activation]()
        self.add, self.method = add, method

    @property
    def names(self) -> list[str]:
        return [name for name in ("conv", "bn", "ff", "relu") if getattr(self, name) is not None]

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        if self.ff is not None:
            add = getattr(self.ff, self.method)
            y = add(y, other) if self.add == "first" else add(other, y)
        return y if self.relu is None else self.relu(y)


def pattern_name(kind: str, norm: bool, add: bool, activation: str) -> str:
    """The documented class name, e.g. ``ConvTransposeBNAddReLU62d``."""
    label, suffix = (kind, "") if kind == "Linear" else (kind[:-2], kind[-2:])
    return f"{label}{'BN' if norm else ''}{'Add' if add else ''}{LABEL[activation]}{suffix}"


def residual_for(block: nn.Module, x: Tensor) -> Tensor:
    """A second operand of the shape of the anchor's output."""
    return torch.randn_like(block.conv(x))


# ---------------------------------------------------------------------------------------------------------------------------
# The same written with functions, for fusing by graph


def iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


ADD_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda a, b: a + b,
    "+=": iadd,
    "operator.add": operator.add,
    "torch.add": torch.add,
    "torch.add(alpha=1)": lambda a, b: torch.add(a, b, alpha=1),
    "torch.add(input=, other=)": lambda a, b: torch.add(input=a, other=b),
    "Tensor.add": lambda a, b: a.add(b),
    "Tensor.add_": lambda a, b: a.add_(b),
    "Tensor.__add__": lambda a, b: a.__add__(b),
}

ACTIVATION_FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("ReLU", F.relu),
    "F.relu(inplace)": ("ReLU", lambda x: F.relu(x, inplace=True)),
    "F.relu_": ("ReLU", F.relu_),
    "torch.relu": ("ReLU", torch.relu),
    "torch.relu_": ("ReLU", torch.relu_),
    "Tensor.relu": ("ReLU", lambda x: x.relu()),
    "Tensor.relu_": ("ReLU", lambda x: x.relu_()),
    "torch.clamp_min": ("ReLU", lambda x: torch.clamp_min(x, 0)),
    "Tensor.clamp_min": ("ReLU", lambda x: x.clamp_min(0)),
    "Tensor.clamp_min(min=)": ("ReLU", lambda x: x.clamp_min(min=0.0)),
    "Tensor.clamp_min_": ("ReLU", lambda x: x.clamp_min_(0)),
    "torch.clamp(min=0)": ("ReLU", lambda x: torch.clamp(x, min=0)),
    "Tensor.clamp(0)": ("ReLU", lambda x: x.clamp(0)),
    "nn.ReLU": ("ReLU", nn.ReLU()),
    "nn.ReLU(inplace)": ("ReLU", nn.ReLU(inplace=True)),
    "F.relu6": ("ReLU6", F.relu6),
    "F.relu6(inplace)": ("ReLU6", lambda x: F.relu6(x, inplace=True)),
    "F.hardtanh": ("ReLU6", lambda x: F.hardtanh(x, 0.0, 6.0)),
    "torch.clamp(0, 6)": ("ReLU6", lambda x: torch.clamp(x, 0, 6)),
    "torch.clip": ("ReLU6", lambda x: torch.clip(x, min=0, max=6)),
    "Tensor.clamp(0, 6)": ("ReLU6", lambda x: x.clamp(0, 6)),
    "Tensor.clamp(min=, max=)": ("ReLU6", lambda x: x.clamp(min=0.0, max=6.0)),
    "Tensor.clamp_": ("ReLU6", lambda x: x.clamp_(0, 6)),
    "Tensor.clip_": ("ReLU6", lambda x: x.clip_(0, 6)),
    "nn.ReLU6": ("ReLU6", nn.ReLU6()),
    "nn.Hardtanh(0, 6)": ("ReLU6", nn.Hardtanh(0, 6)),
}


class Written(nn.Module):
    """The group written with functions; `steps` are modules or functions applied in turn, an add among them with `other`."""

    def __init__(self, anchor: nn.Module, norm: nn.Module | None, add: Any, order: str, activation: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.add, self.order, self.activation = anchor, norm, add, order, activation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        if self.add is not None:
            add = self.add.add if isinstance(self.add, nn.Module) else self.add
            y = add(y, other) if self.order == "first" else add(other, y)
        return y if self.activation is None else self.activation(y)


def run_both(actual: nn.Module, expected: nn.Module, *inputs: Tensor) -> int:
    """Differing elements of two models on the same inputs; each gets its own copy, as both may work in place."""
    with torch.no_grad():
        a, b = (m(*(t.clone() for t in inputs)) for m in (actual, expected))
    return differing(a, b)


def groups_in(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    from horizon_plugin_pytorch.nn.intrinsic import FusedGroup

    return [(name, m) for name, m in model.named_modules() if isinstance(m, FusedGroup)]
