"""From a calibrated or trained QAT model to integers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion.patterns import Pattern, norm_values_reason
from horizon_plugin_pytorch.nn import quantized
from horizon_plugin_pytorch.nn.checkpoint import GuestKeys, NormKeys
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.intrinsic.group import move_hooks
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.qat.operation import Alone, FloatFunctional, Operation, QuantStub
from horizon_plugin_pytorch.nn.quantized.group import GroupConstants, freeze
from horizon_plugin_pytorch.nn.quantized.operation import Operation as QuantizedOperation
from horizon_plugin_pytorch.nn.quantized.operation import QFunctional, Quantize
from horizon_plugin_pytorch.quantization.report import report_of

ACCUMULATOR = 2**31 - 1
BIAS = 2**30


def convert(
    model: nn.Module,
    mapping: dict[type[nn.Module], Any] | None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    fast_mode: bool = False,
) -> nn.Module:
    """Turn a QAT model, prepared by name or by graph, into one that computes in integers.

    The result equals the QAT model in eval mode in every element.

    Args:
        model: a calibrated or trained model in eval mode.
        mapping: for a QAT type, ``make(module)`` of its converted form; overrides the built-in forms.
        inplace: change `model` itself; otherwise a copy is converted and returned.
        remove_qconfig: remove ``qconfig`` attributes.
        fast_mode: no effect.

    Returns:
        the int8 model; `quantization_report` says per module what it became.

    Raises:
        QuantizationError: the model is in training mode, not prepared or not calibrated, a batch norm's statistics are not
            finite, or a reduction could overflow int32; each names the module. The model is unchanged.
    """
    if not any(_is_qat(m, mapping) for m in model.modules()):
        raise QuantizationError("convert: the model has no fake quantization: call prepare_qat or prepare_qat_fx first")
    if training := [name for name, m in model.named_modules() if m.training and _is_qat(m, mapping)]:
        raise QuantizationError(f"convert: {training[0] or 'the model'!r} is in training mode; call model.eval() first")
    with torch.inference_mode(False), torch.no_grad():
        if not inplace:
            model = copy.deepcopy(model, {} if mapping else _float_weights(model))
        constants: dict[nn.Module, GroupConstants] = {}
        for name, module in model.named_modules():
            _check(name or type(model).__name__, module)
            if isinstance(module, QATGroup):
                constants[module] = _freeze(name, module)
        result = _convert_modules(model, constants, mapping or {})
    _drop_guest_keys(result)
    if remove_qconfig:
        for module in result.modules():
            module.__dict__.pop("qconfig", None)
    result.quantization_report = report_of(result)  # type: ignore[assignment]
    return result


def _float_weights(model: nn.Module) -> dict[int, Any]:
    """Tensors that are only read to make integers, as the memo of a deepcopy that does not copy them."""
    groups = [m for m in model.modules() if isinstance(m, QATGroup)]
    inside = {part for g in groups for part in (g.anchor, g.norm) if part is not None}
    tied = {id(t) for m in model.modules() if m not in inside for t in m._parameters.values()}
    return {id(t): t for part in inside for t in part.parameters() if id(t) not in tied}


Constants = dict[nn.Module, GroupConstants]


def _convert_modules(model: nn.Module, constants: Constants, mapping: dict[type[nn.Module], Any]) -> nn.Module:
    """Every QAT module in its converted form, a shared one as one module in all its places."""
    made: dict[int, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        if not _is_qat(module, mapping) or (isinstance(parent, Alone) and parent is not module):
            continue
        if id(module) not in made:
            custom = mapping.get(type(module))
            made[id(module)] = to_quantized(module, constants) if custom is None else custom(module)
        if not name:
            return made[id(module)]
        replace_module(model, name, made[id(module)])
    return model


def _drop_guest_keys(model: nn.Module) -> None:
    """The places of modules that became integers no longer save their float tensors, nor wait for them."""
    left = set(model.modules())
    for module in model.modules():
        for table in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
            hooks = getattr(module, table)
            for key, hook in list(hooks.items()):
                keys = getattr(getattr(hook, "hook", hook), "__self__", None)
                if (
                    isinstance(keys, GuestKeys)
                    and (keys.anchor if isinstance(keys, NormKeys) else keys.guest) not in left
                ):
                    del hooks[key]


def convert_fx(
    graph_module: nn.Module,
    inplace: bool = False,
    convert_custom_config_dict: dict[str, Any] | None = None,
    _remove_qconfig: bool = True,
    fast_mode: bool = False,
) -> nn.Module:
    """`convert` for a model from `prepare_qat_fx`."""
    unknown = set(convert_custom_config_dict or {}) - {"preserved_attributes"}
    if unknown:
        raise QuantizationError(f"convert_fx: unknown keys in convert_custom_config_dict: {sorted(unknown)}")
    return convert(graph_module, None, inplace, _remove_qconfig, fast_mode)


def _is_qat(module: nn.Module, mapping: dict[type[nn.Module], Any] | None) -> bool:
    return isinstance(module, (QATGroup, Operation, FloatFunctional, QuantStub, Alone)) or type(module) in (
        mapping or {}
    )


def _quantizer(module: nn.Module) -> FakeQuantize | None:
    if isinstance(module, FloatFunctional):
        return module.activation_post_process
    return getattr(module, "output_quant", None)


def _check(name: str, module: nn.Module) -> None:
    quantizer = _quantizer(module)
    if quantizer is not None:
        if not quantizer.ready:
            raise QuantizationError(
                f"convert: {name!r} has no scale: run horizon.quantization.calibrate(model, data) first, or train it; a module that no "
                "data reaches can be left in float with qconfig None"
            )
        quantizer.check(name)
        scale = quantizer.current_scale()
        if not bool(((scale > 0) & (scale < float("inf"))).all()):
            raise QuantizationError(f"convert: the scale of {name!r} is not positive and finite")
    if isinstance(module, QATGroup) and module.norm is not None and (reason := norm_values_reason(module.norm)):
        raise QuantizationError(f"convert: the batch norm of {name!r}: {reason}")


def _freeze(name: str, group: QATGroup) -> GroupConstants:
    """The group's integers, if its sums fit an accumulator."""
    axis, groups = group._layout
    try:
        scales = group.weight_quant.scales(group.weight, axis, groups).detach()
        constants = freeze(group.pattern.anchor, group.anchor, group.norm, scales)
    except ValueError as error:
        raise QuantizationError(f"convert: {name!r}: {error}") from None
    if constants.bias is not None and not bool(constants.bias.isfinite().all()):
        raise QuantizationError(f"convert: {name!r}: its bias is not finite")
    # Inputs are uint8 or int8 as their producer decides, the bias is at most 2^30.
    bound = reference.accumulator_bound(constants.weight, None, torch.uint8, axis, groups) + BIAS
    if bound > ACCUMULATOR:
        raise QuantizationError(
            f"convert: the sum of {name!r} could reach {bound}, more than an int32 accumulator holds ({ACCUMULATOR}); split its input "
            "channels over two operators, or leave it in float with qconfig None"
        )
    return constants


def to_quantized(module: nn.Module, constants: Constants) -> nn.Module:
    """The converted form of one QAT module."""
    form: nn.Module
    if isinstance(module, Alone):
        form = Alone().eval()
        form.hold(to_quantized(module.quant, constants), to_quantized(module.group, constants))
        return form
    if isinstance(module, QATGroup):
        quant, p = module.output_quant, module.pattern
        cls = quantized.group_class(Pattern(p.anchor, False, p.add, p.activation))
        dtype8 = quant.dtype8 if quant is not None else torch.int8
        scale = None if quant is None else _scale(quant)
        form = cls(module.geometry, constants[module], scale, dtype8, module.activation)
        form.path, form.handoff = module.path, module.handoff
    elif isinstance(module, Operation):
        quant = module.output_quant
        form = QuantizedOperation(module.operator, _scale(quant), quant.dtype8, module.path)
    else:
        assert isinstance(module, (QuantStub, FloatFunctional))
        quant = _quantizer(module)
        assert quant is not None
        kind = Quantize if isinstance(module, QuantStub) else QFunctional
        form = kind(_scale(quant), quant.dtype8, module.path)
    move_hooks(module, form, "_forward_pre_hooks", "_forward_hooks")
    return form


def _scale(quant: FakeQuantize) -> Tensor:
    return quant.current_scale().detach().clone()
