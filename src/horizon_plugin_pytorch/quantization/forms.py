"""Which float modules have a form on integers, and making their QAT form."""

from __future__ import annotations

from typing import Any

from torch import nn

from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.nn.checkpoint import GuestKeys
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup, group_class
from horizon_plugin_pytorch.nn.intrinsic.group import move_hooks
from horizon_plugin_pytorch.nn.qat import qat_group_class
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.qat.operation import Alone, DeQuantStub, FloatFunctional, Operation, QuantStub
from horizon_plugin_pytorch.nn.quantized.functional import FloatOperator
from horizon_plugin_pytorch.nn.quantized.operators import AdaptiveAvgPool, AvgPool, Elementwise, Operator
from horizon_plugin_pytorch.quantization.dataflow import computes_as, is_stub
from horizon_plugin_pytorch.quantization.flow import OutputPlan
from horizon_plugin_pytorch.quantization.qconfig import QConfig, default_qat_qconfig

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.GELU, nn.ELU, nn.SELU, nn.CELU,
    nn.Tanh, nn.Mish, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
NONNEGATIVE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_AVERAGE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def operator_of(module: nn.Module) -> Operator | None:
    """The integer operator of a float module outside a group, if there is one."""
    m: Any = module
    if isinstance(module, FloatOperator):
        return module.operator
    for dims, (pool, adaptive) in enumerate(zip(AVERAGE_POOLS, ADAPTIVE_AVERAGE_POOLS, strict=True), start=1):
        if computes_as(module, (pool,)):
            override = getattr(m, "divisor_override", None)
            return AvgPool(dims, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, override)
        if computes_as(module, (adaptive,)):
            return AdaptiveAvgPool(dims, m.output_size)
    if computes_as(module, ELEMENTWISE) or (computes_as(module, (nn.PReLU,)) and m.weight.numel() == 1):
        return Elementwise(module, nonnegative=isinstance(module, NONNEGATIVE))
    return None


def quantizable(module: nn.Module) -> bool:
    """Has a QAT form with an output of its own."""
    return isinstance(module, FusedGroup) or p.anchor_of(module) is not None or operator_of(module) is not None


def types_of(module: nn.Module) -> tuple[type, ...]:
    """The types a qconfig by type can mean: the module's, those of a group's parts, that of a user's elementwise module."""
    inner = [module.operator.module] if isinstance(module, FloatOperator) and module.operator.module is not None else []
    return tuple(type(m) for m in (module, *module.children(), *inner))


def output_quant(qconfig: QConfig, plan: OutputPlan) -> FakeQuantize | None:
    if qconfig.activation is None or plan.high_precision:
        return None
    quant = qconfig.activation()
    if plan.per_channel:
        quant.per_channel(1)
    if plan.nonnegative:
        quant.nonnegative()
    return quant


def to_qat(module: nn.Module, qconfig: QConfig, path: str, plan: OutputPlan) -> nn.Module:
    """The QAT form of one float module; groups change in place, so their hooks and checkpoint keys stay."""
    if isinstance(module, FusedGroup) or p.anchor_of(module) is not None:
        group = module if isinstance(module, FusedGroup) else as_group(module)
        group.__class__ = qat_group_class(group.pattern)
        assert isinstance(group, QATGroup)
        group.set_up(qconfig.weight(), output_quant(qconfig, plan), path)
        return group
    form = _operation(module, qconfig, path, plan)
    if form is not module:
        form.train(module.training)
        move_hooks(module, form, "_forward_pre_hooks", "_forward_hooks")
    return form


def _operation(module: nn.Module, qconfig: QConfig, path: str, plan: OutputPlan) -> nn.Module:
    if is_stub(module, "DeQuantStub"):
        return DeQuantStub()
    if is_stub(module, "QuantStub"):
        return quant_stub(qconfig, path, scale=getattr(module, "scale", None), per_channel=plan.per_channel)
    quant = output_quant(qconfig, plan)
    if quant is None:
        return module
    if p.is_float_functional(module):
        return FloatFunctional(quant, path)
    operator = operator_of(module)
    return module if operator is None else Operation(operator, quant, path)


def quant_stub(qconfig: QConfig, path: str, *, scale: float | None = None, per_channel: bool = False) -> QuantStub:
    """The QAT form of a QuantStub, with a fixed scale if one is given."""
    make = qconfig.activation or default_qat_qconfig.activation
    assert make is not None
    quant = make()
    if scale is not None:
        quant.set_qparams(scale)
    elif per_channel:
        quant.per_channel(1)
    quant.open = True
    return QuantStub(quant, path)


def as_group(anchor: nn.Module, owner: nn.Module | None = None) -> FusedGroup:
    """A group of only the anchor.

    Args:
        owner: holds the anchor's checkpoint keys; by default the group itself, which is to stand in the anchor's place.
    """
    row = p.anchor_of(anchor)
    assert row is not None
    group = group_class(p.Pattern(row))(anchor)
    GuestKeys(anchor).follow(group, row.child).attach(owner or group)
    group.keys_elsewhere = (row.child,)
    move_hooks(anchor, owner or group, "_forward_pre_hooks", "_forward_hooks")
    return group


def alone(anchor: nn.Module, qconfig: QConfig, path: str) -> Alone:
    """An anchor that float code calls: it quantizes its input itself, and its output is float."""
    result = Alone().train(anchor.training)
    group = to_qat(as_group(anchor, result), qconfig, path, OutputPlan(high_precision=True))
    result.hold(quant_stub(qconfig, f"{path}.quant").train(anchor.training), group)
    return result
