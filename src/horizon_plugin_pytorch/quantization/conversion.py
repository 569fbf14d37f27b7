"""From a calibrated or trained QAT model to integers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion.patterns import Pattern, norm_values_reason
from horizon_plugin_pytorch.nn import quantized
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.intrinsic.group import move_hooks
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.qat.operation import DeQuantStub, FloatFunctional, Operation, QuantStub
from horizon_plugin_pytorch.nn.quantized.group import freeze
from horizon_plugin_pytorch.nn.quantized.operation import Operation as QuantizedOperation
from horizon_plugin_pytorch.nn.quantized.operation import QFunctional, Quantize

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
    forms = {name: m for name, m in model.named_modules() if _is_qat(m, mapping)}
    if not forms:
        raise QuantizationError("convert: the model has no fake quantization: call prepare_qat or prepare_qat_fx first")
    if model.training or any(m.training for m in forms.values()):
        raise QuantizationError("convert: the model is in training mode; call model.eval() first")
    for name, module in forms.items():
        _check(name, module)
    if not inplace:
        model = copy.deepcopy(model)
    for name in forms:
        module = model.get_submodule(name)
        make = (mapping or {}).get(type(module), to_quantized)
        form = make(module)
        if not name:
            return form
        replace_module(model, name, form)
    if remove_qconfig:
        for module in model.modules():
            module.__dict__.pop("qconfig", None)
    from horizon_plugin_pytorch.quantization.report import report_of

    model.quantization_report = report_of(model)  # type: ignore[assignment]
    return model


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
    return isinstance(module, (QATGroup, Operation, FloatFunctional, QuantStub)) or type(module) in (mapping or {})


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
        scale = quantizer.scale
        if not bool(((scale > 0) & (scale < float("inf"))).all()):
            raise QuantizationError(f"convert: the scale of {name!r} is not positive and finite")
    if isinstance(module, QATGroup):
        if module.norm is not None and (reason := norm_values_reason(module.norm)):
            raise QuantizationError(f"convert: the batch norm of {name!r}: {reason}")
        constants = _frozen(module, name)
        axis, groups = module._layout
        # Inputs are uint8 or int8 as their producer decides, the bias is at most 2^30.
        bound = reference.accumulator_bound(constants.weight, None, torch.uint8, axis, groups) + BIAS
        if bound > ACCUMULATOR:
            raise QuantizationError(
                f"convert: the sum of {name!r} could reach {bound}, more than an int32 accumulator holds ({ACCUMULATOR}); split its input "
                "channels over two operators, or leave it in float with qconfig None"
            )


def _frozen(group: QATGroup, name: str) -> Any:
    try:
        scales = group.weight_quant.scales(group.weight, *group._layout).detach()
        return freeze(group.pattern.anchor, group.anchor, group.norm, scales)
    except ValueError as error:
        raise QuantizationError(f"convert: {name!r}: {error}") from None


def to_quantized(module: nn.Module) -> nn.Module:
    """The converted form of one QAT module."""
    form: nn.Module
    if isinstance(module, QATGroup):
        quant, p = module.output_quant, module.pattern
        cls = quantized.group_class(Pattern(p.anchor, False, p.add, p.activation))
        dtype8 = quant.dtype8 if quant is not None else torch.int8
        scale = None if quant is None else quant.current_scale().detach().clone()
        form = cls(module.geometry, _frozen(module, module.path), scale, dtype8, module.activation)
        form.path, form.handoff = module.path, module.handoff  # type: ignore[assignment]
    elif isinstance(module, QuantStub):
        quant = module.output_quant
        form = Quantize(quant.current_scale().detach().clone(), quant.dtype8, module.path)
    elif isinstance(module, Operation):
        quant = module.output_quant
        form = QuantizedOperation(module.operator, quant.current_scale().detach().clone(), quant.dtype8, module.path)
    elif isinstance(module, FloatFunctional):
        quant = module.activation_post_process
        form = QFunctional(quant.current_scale().detach().clone(), quant.dtype8, module.path)
    else:
        assert isinstance(module, DeQuantStub)
        return module
    move_hooks(module, form, "_forward_pre_hooks", "_forward_hooks")
    return form
