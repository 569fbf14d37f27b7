"""What may fuse: four axes, the rows on each, and the patterns they generate.

A group is  anchor -> [norm] -> [add] -> [activation], in this order, each later stage optional. The patterns of the vendor's
documentation (section "可以融合的算子") are rows of the generated table; `DOCUMENTED` lists them.

A function here that refuses returns the reason as a string, and `None` when it has no objection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

Module = type[nn.Module]


@dataclass(frozen=True)
class Anchor:
    """One row of the anchor axis: a linear operator whose result a group keeps wide.

    Args:
        type: the float module.
        label: first part of the group's name, e.g. ``Conv``.
        suffix: last part of the group's name, e.g. ``2d``.
        child: the attribute under which a group holds the module, e.g. ``conv``.
        norm: the batch norm of the same dimension.
        norm_input_dim: rank the anchor's output must have for `norm` to act on its channels; ``None`` where the norm itself checks.
        transposed: output channels are dim 1 of the weight, per group.
    """

    type: Module
    label: str
    suffix: str
    child: str
    norm: Module
    norm_input_dim: int | None = None
    transposed: bool = False

    def out_channels(self, module: nn.Module) -> int:
        return int(module.out_features if self.child == "linear" else module.out_channels)  # type: ignore[arg-type]

    def groups(self, module: nn.Module) -> int:
        return int(getattr(module, "groups", 1))


@dataclass(frozen=True)
class Activation:
    """One row of the activation axis. `bound` is the value above which the result is constant (6 for ReLU6), if any."""

    type: type[nn.Module]
    label: str
    bound: float | None = None

    @property
    def child(self) -> str:
        return self.label.lower()

    def make(self, inplace: bool = False) -> nn.Module:
        return self.type(inplace=inplace) if self.type in (nn.ReLU, nn.ReLU6) else self.type()


ANCHORS: list[Anchor] = [
    Anchor(nn.Conv1d, "Conv", "1d", "conv", nn.BatchNorm1d, norm_input_dim=3),
    Anchor(nn.Conv2d, "Conv", "2d", "conv", nn.BatchNorm2d),
    Anchor(nn.Conv3d, "Conv", "3d", "conv", nn.BatchNorm3d),
    Anchor(nn.ConvTranspose1d, "ConvTranspose", "1d", "conv", nn.BatchNorm1d, norm_input_dim=3, transposed=True),
    Anchor(nn.ConvTranspose2d, "ConvTranspose", "2d", "conv", nn.BatchNorm2d, transposed=True),
    Anchor(nn.ConvTranspose3d, "ConvTranspose", "3d", "conv", nn.BatchNorm3d, transposed=True),
    Anchor(nn.Linear, "Linear", "", "linear", nn.BatchNorm1d, norm_input_dim=2),
]

RELU = Activation(nn.ReLU, "ReLU")
RELU6 = Activation(nn.ReLU6, "ReLU6", bound=6.0)
ACTIVATIONS: list[Activation] = [RELU, RELU6]


@dataclass(frozen=True)
class Pattern:
    """A point in the grid; its name is the public class name, e.g. ``ConvBNAddReLU2d``."""

    anchor: Anchor
    norm: bool = False
    add: bool = False
    activation: Activation | None = None

    @property
    def name(self) -> str:
        stages = (
            ("BN" if self.norm else "")
            + ("Add" if self.add else "")
            + (self.activation.label if self.activation else "")
        )
        return f"{self.anchor.label}{stages}{self.anchor.suffix}"

    @property
    def bare(self) -> bool:
        """Nothing but the anchor: what Conv + BN becomes once BN is absorbed."""
        return not (self.norm or self.add or self.activation)


def grid() -> Iterator[Pattern]:
    """Every pattern of the grid except the bare anchors."""
    for anchor, norm, add, activation in product(ANCHORS, (False, True), (False, True), (None, *ACTIVATIONS)):
        pattern = Pattern(anchor, norm, add, activation)
        if not pattern.bare:
            yield pattern


DOCUMENTED: tuple[str, ...] = (
    "ConvBNReLU2d",
    "ConvReLU2d",
    "ConvBNAdd2d",
    "ConvBNAddReLU2d",
    "ConvAdd2d",
    "ConvAddReLU2d",
    "ConvTransposeReLU2d",
    "ConvTransposeAdd2d",
    "ConvTransposeAddReLU2d",
    "ConvTransposeBN2d",
    "ConvTransposeBNReLU2d",
    "ConvTransposeBNAdd2d",
    "ConvTransposeBNAddReLU2d",
    "ConvBNReLU62d",
    "ConvReLU62d",
    "ConvBNAddReLU62d",
    "ConvAddReLU62d",
    "ConvTransposeReLU62d",
    "ConvTransposeAddReLU62d",
    "ConvTransposeBNReLU62d",
    "ConvTransposeBNAddReLU62d",
)
"""The 21 patterns of the vendor's list, in its order."""


def register_anchor(type: type[nn.Module], label: str, suffix: str = "", *, like: type[nn.Module]) -> Anchor:
    """Add a row to the anchor axis: `type` computes what `like` (a stock anchor) computes and holds the same attributes.

    Its groups are named by `label` and `suffix` (``<label>BNAddReLU<suffix>``) and appear in `horizon.nn.intrinsic`.

    Raises:
        ValueError: `like` is no anchor, or the name is taken.
    """
    base = next((row for row in ANCHORS if row.type is like), None)
    if base is None:
        raise ValueError(
            f"register_anchor: like={like.__name__} is not an anchor; choose one of {[a.type.__name__ for a in ANCHORS]}"
        )
    row = Anchor(type, label, suffix, base.child, base.norm, base.norm_input_dim, base.transposed)
    _add_row(ANCHORS, row)
    return row


def register_activation(type: type[nn.Module], label: str, *, bound: float | None = None) -> Activation:
    """Add a row to the activation axis: an elementwise module without parameters, constructed as ``type()``.

    Its groups are named by `label` (``ConvBN<label>2d``) and appear in `horizon.nn.intrinsic`.

    Raises:
        ValueError: the label is taken.
    """
    row = Activation(type, label, bound)
    _add_row(ACTIVATIONS, row)
    return row


def _add_row(table: list[Any], row: Any) -> None:
    if row in table:
        return
    if any(other.type is row.type for other in table):
        raise ValueError(f"{row.type.__name__} is already registered")
    table.append(row)
    names = [pattern.name for pattern in grid()]
    if taken := sorted({name for name in names if names.count(name) > 1}):
        table.remove(row)
        raise ValueError(
            f"the label {row.label!r} of {row.type.__name__} makes names that are taken: {', '.join(taken)}"
        )


# ---------------------------------------------------------------------------------------------------------------------------
# What a module is


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Neither the module's class nor, patched onto it, the module itself has a forward of its own."""
    if not isinstance(module, base):
        return False
    methods = [name for name in ("forward", "_conv_forward", "__call__") if hasattr(base, name)]
    return not any(
        name in module.__dict__ or getattr(type(module), name) is not getattr(base, name) for name in methods
    )


def anchor_of(module: nn.Module) -> Anchor | None:
    """The anchor row of a module; subclasses count as long as they compute what the stock module computes."""
    return next((row for row in ANCHORS if computes_as(module, row.type)), None)


def anchor_types() -> tuple[type[nn.Module], ...]:
    """The types of the anchor axis; a subclass with a forward of its own is one of them and no anchor."""
    return tuple(row.type for row in ANCHORS)


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """torchvision's FrozenBatchNorm2d or a class of that name: its four tensors are buffers, and it says its eps."""
    buffers = {"weight", "bias", "running_mean", "running_var"}
    named = type(module).__name__ == "FrozenBatchNorm2d" and "forward" not in module.__dict__
    return named and buffers <= module._buffers.keys() and isinstance(getattr(module, "eps", None), float)


def is_norm(module: nn.Module) -> bool:
    """A stock batch norm, or a subclass that computes the same."""
    if is_frozen_batch_norm(module):
        return True
    return any(computes_as(module, base) for base in (nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


def is_float_functional(module: nn.Module) -> bool:
    """FloatFunctional of this package or of PyTorch (recognized by name, as it may not be importable)."""
    return any(t.__name__ == "FloatFunctional" for t in type(module).__mro__) and hasattr(module, "add_relu")


def activation_of(module: nn.Module) -> Activation | None:
    """The activation row of a module; ``Hardtanh(0, b)`` is the row with bound b."""
    for row in ACTIVATIONS:
        if computes_as(module, row.type):
            return row
    if computes_as(module, nn.Hardtanh) and module.min_val == 0:
        return next((row for row in ACTIVATIONS if row.bound == module.max_val), None)
    return None


def activation_module(module: nn.Module, row: Activation) -> nn.Module:
    """The module a group holds for `module`: itself, or the row's own type where another type computes the same."""
    return module if isinstance(module, row.type) else row.make(inplace=bool(getattr(module, "inplace", False)))


# ---------------------------------------------------------------------------------------------------------------------------
# Whether they fit


def anchor_reason(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None or "parametrizations" in module._modules:
        return (
            "its weight or bias is computed by a parametrization (weight norm, pruning, …); remove or bake it in first"
        )
    return None


def lazy_reason(model: nn.Module) -> str | None:
    """The first module inside `model` whose tensors have no shape yet, so that nothing can be said of it, and what to do."""
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if torch.nn.parameter.is_lazy(tensor):
                where = f"{path!r} ({type(module).__name__})" if path else f"the {type(module).__name__}"
                return f"{where} is lazy and has not seen data yet; run the model's forward once first"
    return None


def norm_reason(anchor: Anchor, anchor_module: nn.Module, norm: nn.Module) -> str | None:
    """Why `norm` cannot be absorbed by `anchor_module`, apart from the values of its statistics."""
    frozen = is_frozen_batch_norm(norm)
    fits = anchor.norm is nn.BatchNorm2d if frozen else isinstance(norm, (anchor.norm, nn.SyncBatchNorm))
    if not fits:
        return f"{type(norm).__name__} does not normalize the channels of a {anchor.type.__name__}"
    if "parametrizations" in norm._modules:
        return "its parameters are computed by a parametrization; remove or bake it in first"
    mean = norm._buffers.get("running_mean")
    if mean is None:
        return "it has no running statistics (track_running_stats=False), so there is nothing constant to absorb"
    if mean.numel() != anchor.out_channels(anchor_module):
        return f"it normalizes {mean.numel()} channels, but its input has {anchor.out_channels(anchor_module)}"
    weight = anchor_module._parameters["weight"]
    assert weight is not None
    if mean.device != weight.device:
        return f"it is on {mean.device}, the convolution on {weight.device}"
    return None


def norm_values_reason(norm: nn.Module) -> str | None:
    """Non-finite statistics or affine values, or a variance that has no square root. Reads the values (synchronizes a GPU)."""
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, name, None)
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return f"its {name} holds a non-finite value"
    var: Any = norm.running_var
    if not var.is_meta and not bool((var.double() + norm.eps > 0).all()):
        return "running_var + eps is not positive everywhere"
    return None


def functional_reason(functional: nn.Module) -> str | None:
    """Why a FloatFunctional cannot be replaced by a group."""
    observer = getattr(functional, "activation_post_process", None)
    if observer is not None and (type(observer).forward is not nn.Identity.forward or has_hooks(observer)):
        return "its activation_post_process observes the result"
    return None


HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are on `module`."""
    return any(getattr(module, table) for table in HOOK_TABLES)


def hook_reason(first: nn.Module, middle: list[nn.Module], last: nn.Module) -> str | None:
    """Hooks that would no longer see what they observe. A group keeps its first module's pre-hooks and its last one's hooks."""
    for module in (first, *middle, last):
        tables = set(HOOK_TABLES)
        if module is first:
            tables.discard("_forward_pre_hooks")
        if module is last:
            tables.discard("_forward_hooks")
        if any(getattr(module, table, None) for table in tables):
            return f"a hook on its {type(module).__name__} observes a value inside the group"
    return None
