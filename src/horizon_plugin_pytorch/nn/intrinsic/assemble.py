"""Making a group out of a user's modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion.patterns import Activation, Anchor, Pattern
from horizon_plugin_pytorch.nn.checkpoint import GuestKeys, NormKeys
from horizon_plugin_pytorch.nn.intrinsic import group_class
from horizon_plugin_pytorch.nn.intrinsic.group import FusedGroup, move_hooks


@dataclass
class Parts:
    """The modules of a group to be, checked to fit."""

    row: Anchor
    anchor: nn.Module
    norm: nn.Module | None = None
    add: bool = False
    activation_row: Activation | None = None
    activation: nn.Module | None = None

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.row, self.norm is not None, self.add, self.activation_row)


def assemble(
    parts: Parts,
    *,
    keep_bn: bool,
    anchor_place: nn.Module | None = None,
    norm_place: nn.Module | None = None,
    norm_names: dict[str, str] | None = None,
) -> nn.Module:
    """The module that computes `parts`: a group, or the bare anchor where only an absorbed norm was with it.

    Args:
        keep_bn: hold the norm in the group instead of absorbing it.
        anchor_place: the module that will stand where the anchor stood, if that is not the result itself.
        norm_place: the module that stands where the norm's checkpoint keys are.
        norm_names: names of the norm's tensors there, where they differ.
    """
    keys = None
    if parts.norm is not None:
        keys = NormKeys(parts.row, parts.anchor, parts.norm, norm_names)
        if norm_place is not None:
            keys.attach(norm_place)
        if not keep_bn:
            keys.absorb()
            guard_rank(parts.row, parts.anchor)
    kept = parts.norm if keep_bn else None
    pattern = Pattern(parts.row, kept is not None, parts.add, parts.activation_row)
    if pattern.bare:
        return parts.anchor
    group = group_class(pattern)(*(m for m in (parts.anchor, kept, parts.activation) if m is not None))
    group.norm_keys = keys
    if keys is not None and kept is not None:
        keys.follow(group, "bn")
    GuestKeys(parts.anchor).follow(group, pattern.anchor.child).attach(anchor_place or group)
    away = [pattern.anchor.child]
    if kept is not None and norm_place is not None:
        away.append("bn")
    group.keys_elsewhere = tuple(away)
    if anchor_place is None:
        move_hooks(parts.anchor, group, "_forward_pre_hooks")
    return group


def guard_rank(row: Anchor, anchor: nn.Module) -> None:
    """An absorbed BatchNorm1d no longer sees which axis it normalizes: keep refusing inputs of another rank."""
    if row.norm_input_dim is not None:
        anchor.register_forward_pre_hook(partial(_refuse_rank, row.norm_input_dim), with_kwargs=True)


def _refuse_rank(dim: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    given = (args[0] if args else kwargs["input"]).dim()
    if given != dim:
        raise FusionError(
            f"{type(module).__name__} absorbed a BatchNorm1d, which normalizes its output channels only for inputs of {dim} "
            f"dimensions; this one has {given}. Leave the norm out of the fused group."
        )


def absorb_bn(model: nn.Module) -> nn.Module:
    """Absorb every batch norm that a group of `model` kept (`fuse_modules_qat`, `QATMode.WithBN`), in place.

    The inverse of nothing: running statistics become weights. Groups keep their places and checkpoint keys; a group of only an
    anchor and its norm becomes the anchor. Returns `model` (or its anchor, if `model` itself is such a group).

    Raises:
        FusionError: a norm's statistics are not finite; nothing was absorbed.
    """
    from horizon_plugin_pytorch.fusion.patterns import norm_values_reason

    kept = [(n, m) for n, m in model.named_modules() if isinstance(m, FusedGroup) and m.norm is not None]
    for name, group in kept:
        assert group.norm is not None
        reason = norm_values_reason(group.norm)
        if reason:
            raise FusionError(f"absorb_bn: the batch norm of {name or 'the model'!r}: {reason}")
    for name, group in kept:
        if not Pattern(group.pattern.anchor, False, group.pattern.add, group.pattern.activation).bare:
            group.absorb_norm()
            guard_rank(group.pattern.anchor, group.anchor)
            continue
        anchor = group.anchor
        group.norm_keys = group.norm_keys or NormKeys(group.pattern.anchor, anchor, group.norm)  # type: ignore[arg-type]
        group.norm_keys.absorb()
        guard_rank(group.pattern.anchor, anchor)
        move_hooks(group, anchor, "_forward_pre_hooks", "_forward_hooks")
        if not name:
            return anchor
        replace_module(model, name, anchor)
    return model


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def chain(modules: Iterable[nn.Module]) -> str:
    return " -> ".join(type(m).__name__ for m in modules)
