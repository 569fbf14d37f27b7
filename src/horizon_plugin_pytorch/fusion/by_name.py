"""Fusing modules that the user names.

The user's ``forward`` stays as it is and goes on calling every name, so a group stands at one of the places and the others hand
on what they get. Without an add the group stands where the anchor stood. With an add it stands where the FloatFunctional stood,
because that call has both operands (`nn.intrinsic.handoff`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.absorb_bn import absorbed_values_reason
from horizon_plugin_pytorch.fusion.tracing import FusionTracer, attributes_kept
from horizon_plugin_pytorch.nn.intrinsic.assemble import Parts, assemble, chain, replace_module
from horizon_plugin_pytorch.nn.intrinsic.group import FusedGroup, Identity, move_hooks
from horizon_plugin_pytorch.nn.intrinsic.handoff import Handoff, refuse_escaped
from horizon_plugin_pytorch.qat_mode import keeps_bn

FuserMethod = Callable[..., nn.Module]


def fuse_known_modules(
    mod_list: Sequence[nn.Module],
    is_qat: bool = False,
    additional_fuser_method_mapping: dict[tuple[type, ...], FuserMethod] | None = None,
) -> list[nn.Module]:
    """Fuse a sequence ``anchor, [norm], [FloatFunctional], [activation]`` and return as many modules to stand in their places.

    BN is absorbed, in training mode as in eval mode (by its running statistics), unless `is_qat` or
    `horizon.qat_mode.set_qat_mode` ask to keep it inside the group. Serves as ``fuser_func`` of ``torch.quantization.fuse_modules``;
    then all groups of that call are checked before the first one changes anything, and the model's forward, as by `fuse_modules`.

    Args:
        mod_list: modules in the order they are called.
        is_qat: keep BN, trainable, until `absorb_bn` or convert.
        additional_fuser_method_mapping: for tuples of types, ``method(is_qat, *modules)`` that returns the fused module.

    Raises:
        FusionError: the sequence is not supported, does not fit (channels, devices, statistics) or has hooks on values inside
            the group. Nothing was changed.
    """
    mod_list = list(mod_list)
    mapping = additional_fuser_method_mapping or {}
    if call := _call_by_pytorch(mod_list):
        model, groups = call
        _check_names(model, groups)
        _check_groups(model, groups, is_qat, mapping)
        _watch(model, groups)
    custom = mapping.get(tuple(type(m) for m in mod_list))
    if custom is not None:
        fused = custom(is_qat, *mod_list)
        move_hooks(mod_list[0], fused, "_forward_pre_hooks")
        move_hooks(mod_list[-1], fused, "_forward_hooks")
        return [fused, *(nn.Identity().train(m.training) for m in mod_list[1:])]
    parts = _check(mod_list, keeps_bn(is_qat))

    places: list[nn.Module] = [Identity().train(m.training) for m in mod_list]
    norm_place = places[1] if parts.norm is not None else None
    if parts.add:
        handoff = Handoff().train(parts.anchor.training)
        move_hooks(parts.anchor, handoff, "_forward_pre_hooks")
        group = assemble(parts, keep_bn=keeps_bn(is_qat), anchor_place=handoff, norm_place=norm_place)
        assert isinstance(group, FusedGroup)
        group.handoff = handoff.token
        places[0], places[2 if parts.norm is not None else 1] = handoff, group
    else:
        group = assemble(parts, keep_bn=keeps_bn(is_qat), norm_place=norm_place)
        places[0] = group
    if mod_list[-1] is not group:
        move_hooks(mod_list[-1], group, "_forward_hooks")
    return places


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: Callable[..., list[nn.Module]] = fuse_known_modules,
    fuse_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """Fuse the named modules of `model`; each list of names is one group, in calling order.

    Args:
        model: the float model, in training or eval mode.
        modules_to_fuse: a list of module names, or a list of such lists.
        inplace: change `model` itself; otherwise a deep copy is fused and returned.
        fuser_func: makes the group out of the modules; see `fuse_known_modules`.
        fuse_custom_config_dict: ``{"additional_fuser_method_mapping": {(types): method}}``.

    Raises:
        FusionError: a name is not there or is named twice, a module is shared or lazy, or the sequence does not fuse. `model` is
            unchanged then, also where an earlier group of the list would have fused.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> horizon.quantization.fuse_modules(model, ["0", "1", "2"])
    """
    return _fuse(model, modules_to_fuse, False, inplace, fuser_func, fuse_custom_config_dict)


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: Callable[..., list[nn.Module]] = fuse_known_modules,
    fuse_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """`fuse_modules`, with BN kept inside the groups, trained as before, until `absorb_bn` or convert."""
    return _fuse(model, modules_to_fuse, True, inplace, fuser_func, fuse_custom_config_dict)


def _fuse(
    model: nn.Module,
    modules_to_fuse: Sequence[Any],
    is_qat: bool,
    inplace: bool,
    fuser_func: Callable[..., list[nn.Module]],
    config: dict[str, Any] | None,
) -> nn.Module:
    mapping = dict((config or {}).get("additional_fuser_method_mapping", {}))
    if not modules_to_fuse:
        raise FusionError("fuse_modules: no module is named")
    groups = _groups(modules_to_fuse)
    _check_names(model, groups)
    if fuser_func is fuse_known_modules:
        _check_groups(model, groups, is_qat, mapping)
    if not inplace:
        if reason := p.lazy_reason(model):
            raise FusionError(f"fuse_modules: {reason}; until then it cannot be copied")
        model = copy.deepcopy(model)
    _watch(model, groups)
    for names in groups:
        modules = [model.get_submodule(n) for n in names]
        places = fuser_func(modules, is_qat, mapping)
        for name, place in zip(names, places, strict=True):
            replace_module(model, name, place)
    return model


def _groups(modules_to_fuse: Sequence[Any]) -> list[list[str]]:
    single = not modules_to_fuse or isinstance(modules_to_fuse[0], str)
    return [list(modules_to_fuse)] if single else [list(g) for g in modules_to_fuse]


_PYTORCHS_CALL = ("torch.ao.quantization.fuse_modules", "_fuse_modules")


def _call_by_pytorch(mod_list: list[nn.Module]) -> tuple[nn.Module, list[list[str]]] | None:
    """The model and all groups of the call of ``torch.quantization.fuse_modules`` of which `mod_list` is the first group.

    PyTorch gives its ``fuser_func`` the modules of a group without the model, and so nothing to tell by who else reads their
    values or whether the groups that follow will fuse: the model is looked up in the frame of the call.
    """
    frame: Any = sys._getframe(2)
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _PYTORCHS_CALL:
            model, groups = frame.f_locals["model"], _groups(frame.f_locals["modules_to_fuse"])
            first = [id(model.get_submodule(name)) for name in groups[0]]
            return (model, groups) if first == [id(m) for m in mod_list] else None
        frame = frame.f_back
    return None


def _check_groups(model: nn.Module, groups: list[list[str]], is_qat: bool, mapping: Mapping[Any, Any]) -> None:
    """All groups, before the first one changes anything."""
    for names in groups:
        modules = [model.get_submodule(n) for n in names]
        if tuple(type(m) for m in modules) in mapping:
            continue
        try:
            _check(modules, keeps_bn(is_qat))
        except FusionError as error:
            raise FusionError(f"fuse_modules {names}: {error}") from None


def _watch(model: nn.Module, groups: list[list[str]]) -> None:
    """Have the forward of `model` refused if it reads a value that will exist only inside one of the groups."""
    if misread := _misread(model, groups):
        model.register_forward_pre_hook(partial(_refuse_forward, misread))
    adds = any(p.is_float_functional(model.get_submodule(name)) for names in groups for name in names)
    if adds and refuse_escaped not in model._forward_hooks.values():
        model.register_forward_hook(refuse_escaped)


def _misread(model: nn.Module, groups: list[list[str]]) -> str | None:
    """Where the forward reads a value that exists only inside a group, as far as the forward can be traced.

    What an add reads is left to the hand-off at the anchor's place, which sees every forward.
    """
    try:
        with attributes_kept(model):
            graph = FusionTracer().trace(model)
    except Exception:
        return None
    for names in groups:
        for name, following in zip(names, names[1:], strict=False):
            if p.is_float_functional(model.get_submodule(following)):
                continue
            is_add = p.is_float_functional(model.get_submodule(name))
            result = f"{name}.activation_post_process" if is_add else name
            for node in graph.find_nodes(op="call_module", target=result):
                for reader in _readers(model, node):
                    if reader.op != "call_module" or reader.target != following:
                        where = "the model's output" if reader.op == "output" else repr(_name(reader))
                        source = reader.meta.get("source")
                        return (
                            f"the output of {name!r} is read by {where}{f' ({source})' if source else ''}, but {name!r} was "
                            f"fused with {following!r} and its output exists nowhere else. "
                            f"Leave {following!r} out of the fused group."
                        )
    return None


def _readers(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """What reads the value of a node, other than its shape, dtype or device."""
    for user in node.users:
        if user.op == "call_module" and isinstance(model.get_submodule(str(user.target)), nn.Identity):
            yield from _readers(model, user)
        elif (user.args[1] if user.target is getattr else user.target) not in _NO_VALUES:
            yield user


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


_NO_VALUES = ("shape", "size", "dtype", "device", "ndim", "dim", "numel", "is_cuda")


def _refuse_forward(reason: str, model: nn.Module, args: Any) -> None:
    raise FusionError(reason)


def _check_names(model: nn.Module, groups: list[list[str]]) -> None:
    names_of: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        names_of.setdefault(id(module), []).append(name)
    seen: set[str] = set()
    for names in groups:
        for name in names:
            if not isinstance(name, str) or not name or name not in modules:
                raise FusionError(f"fuse_modules {names}: {type(model).__name__} has no module {name!r}")
            if name in seen:
                raise FusionError(f"fuse_modules {names}: {name!r} is named twice")
            seen.add(name)
            others = [other for other in names_of[id(modules[name])] if other != name]
            if others:
                raise FusionError(
                    f"fuse_modules {names}: {name!r} is the same module as {', '.join(map(repr, others))}; a shared module cannot "
                    "be fused. Give each call a module of its own."
                )


def _check(modules: list[nn.Module], keep_bn: bool) -> Parts:
    """Read the sequence along the axes; raises FusionError and changes nothing."""
    if len({id(m) for m in modules}) != len(modules):
        raise FusionError(f"{chain(modules)}: a module is named twice")
    for module in modules:
        if reason := p.lazy_reason(module):
            raise FusionError(f"cannot fuse {chain(modules)}: {reason}")
    row = p.anchor_of(modules[0]) if modules else None
    if row is None or len(modules) < 2:
        raise FusionError(f"cannot fuse {chain(modules)}: a group is {_EXPECTED}")
    parts, rest = Parts(row, modules[0]), modules[1:]
    if rest and p.is_norm(rest[0]):
        parts.norm = rest.pop(0)
    if rest and p.is_float_functional(rest[0]):
        parts.add = True
        if reason := p.functional_reason(rest.pop(0)):
            raise FusionError(f"cannot fuse {chain(modules)}: the FloatFunctional: {reason}")
    if rest and (activation := p.activation_of(rest[0])):
        parts.activation_row, parts.activation = activation, p.activation_module(rest.pop(0), activation)
    if rest:
        raise FusionError(
            f"cannot fuse {chain(modules)}: {type(rest[0]).__name__} does not fit there; a group is {_EXPECTED}"
        )
    reason = p.anchor_reason(parts.anchor)
    if reason:
        raise FusionError(f"cannot fuse {chain(modules)}: the {type(parts.anchor).__name__}: {reason}")
    if parts.norm is not None:
        reason = p.norm_reason(row, parts.anchor, parts.norm) or p.norm_values_reason(parts.norm)
        if not keep_bn:
            reason = reason or absorbed_values_reason(row, parts.anchor, parts.norm)
        if reason:
            raise FusionError(f"cannot fuse {chain(modules)}: the {type(parts.norm).__name__}: {reason}")
    reason = p.hook_reason(modules[0], modules[1:-1], modules[-1])
    if reason:
        raise FusionError(f"cannot fuse {chain(modules)}: {reason}; remove the hook or leave the module out")
    return parts


_EXPECTED = (
    "a Conv, ConvTranspose or Linear, then optionally a BatchNorm of its dimension, a FloatFunctional and a ReLU or ReLU6, "
    "in this order and at least two of them"
)
