"""From a fused model to one with fake quantization.

`prepare_qat` changes modules in place of a model that was fused by name and keeps its forward. `prepare_qat_fx` fuses first, turns
functions that have integer rules into modules, and puts stubs where the user's model has none. Both use the same forms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.nn.checkpoint import GuestKeys
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.intrinsic.group import move_hooks
from horizon_plugin_pytorch.nn.qat import qat_group_class
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, WeightFakeQuantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.qat.operation import DeQuantStub, FloatFunctional, Operation, QuantStub
from horizon_plugin_pytorch.nn.quantized.functional import FloatOperator
from horizon_plugin_pytorch.nn.quantized.operators import AdaptiveAvgPool, AvgPool, Elementwise, Operator
from horizon_plugin_pytorch.quantization.dataflow import OutputPlan, is_stub
from horizon_plugin_pytorch.quantization.qconfig import QConfig, Resolver, check_qconfig, default_qat_qconfig

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.GELU, nn.ELU, nn.SELU, nn.CELU,
    nn.Tanh, nn.Mish, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
NONNEGATIVE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)


def operator_of(module: nn.Module) -> Operator | None:
    """The integer operator of a float module outside a group, if there is one."""
    if isinstance(module, FloatOperator):
        return module.operator
    name = type(module).__name__
    if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        override = getattr(module, "divisor_override", None)
        m: Any = module
        return AvgPool(int(name[-2]), m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, override)
    if type(module) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d):
        return AdaptiveAvgPool(int(name[-2]), module.output_size)
    if isinstance(module, ELEMENTWISE) or (isinstance(module, nn.PReLU) and module.weight.numel() == 1):
        return Elementwise(module, nonnegative=isinstance(module, NONNEGATIVE))
    return None


def quantizable(module: nn.Module) -> bool:
    """Has a QAT form with an output of its own."""
    return isinstance(module, FusedGroup) or p.anchor_of(module) is not None or operator_of(module) is not None


def _output_quant(qconfig: QConfig, plan: OutputPlan) -> FakeQuantize | None:
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
    if isinstance(module, QATGroup):
        return module
    row = p.anchor_of(module)
    if isinstance(module, FusedGroup) or row is not None:
        if not isinstance(module, FusedGroup):
            assert row is not None
            module = _wrap_anchor(row, module)
        module.__class__ = qat_group_class(module.pattern)
        assert isinstance(module, QATGroup)
        module.set_up(qconfig.weight(), _output_quant(qconfig, plan), path)
        return module
    training = module.training
    if is_stub(module, "DeQuantStub"):
        return DeQuantStub().train(training)
    if is_stub(module, "QuantStub"):
        fixed = getattr(module, "scale", None)
        quant = _output_quant(qconfig, OutputPlan(per_channel=plan.per_channel and fixed is None)) or FakeQuantize(
            default_qat_qconfig.activation().observer_factory  # type: ignore[misc]
        )
        stub = QuantStub(quant, path).train(training)
        if fixed is not None:
            quant.set_qparams(fixed)
        return stub
    if p.is_float_functional(module):
        functional_quant = _output_quant(qconfig, plan)
        return module if functional_quant is None else FloatFunctional(functional_quant, path).train(training)
    operator = operator_of(module)
    quant_or_none = _output_quant(qconfig, plan)
    if operator is None or quant_or_none is None:
        return module
    return Operation(operator, quant_or_none, path).train(training)


def _wrap_anchor(row: p.Anchor, anchor: nn.Module) -> QATGroup:
    """A group of only the anchor, which keeps the anchor's checkpoint keys."""
    group = qat_group_class(p.Pattern(row))(anchor)
    GuestKeys(anchor).attach(group)
    group.keys_elsewhere = (row.child,)
    move_hooks(anchor, group, "_forward_hooks")
    return group


# ---------------------------------------------------------------------------------------------------------------------------


def prepare_qat(
    model: nn.Module,
    mapping: dict[type[nn.Module], Callable[..., nn.Module]] | None = None,
    inplace: bool = False,
    optimize_graph: bool = False,
    hybrid: bool = False,
    optimize_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Give every module of a model that was fused by name its QAT form; the model's own forward goes on running.

    ``model.qconfig`` (default: `default_qat_qconfig`) is inherited by children; a child's own ``qconfig`` overrides it, None
    leaves the child in float. The tensors between `QuantStub` and `DeQuantStub` are quantized.

    Args:
        mapping: for a float type, ``make(module, qconfig)`` of its QAT form; overrides the built-in forms.
        inplace: change `model` itself; otherwise a copy is prepared and returned.
        optimize_graph, optimize_kwargs: no effect: operands of cat keep their own scales here at no cost.
        hybrid: no effect: a module without an integer form always runs in float.

    Raises:
        QuantizationError: no QuantStub in the model, or a qconfig of another package. The model is unchanged.
    """
    from horizon_plugin_pytorch.quantization.graph import output_plans

    stubs = [n for n, m in model.named_modules() if is_stub(m, "QuantStub")]
    if not stubs:
        raise QuantizationError(
            "prepare_qat: the model has no QuantStub, so nothing in it would be quantized: put a QuantStub where tensors become "
            "quantized and a DeQuantStub where they become float again, or use prepare_qat_fx, which places them itself"
        )
    for name, module in model.named_modules():
        if "qconfig" in module.__dict__:
            try:
                check_qconfig(module.qconfig)
            except QuantizationError as error:
                raise QuantizationError(f"prepare_qat: {name or 'the model'}: {error}") from None
    if not inplace:
        model = copy.deepcopy(model)
    plans, note = output_plans(model)
    work: list[tuple[str, nn.Module, QConfig | None]] = []
    _inherit(model, "", getattr(model, "qconfig", default_qat_qconfig), work)
    for path, module, qconfig in work:
        custom = (mapping or {}).get(type(module))
        if qconfig is None:
            continue
        form = custom(module, qconfig) if custom is not None else to_qat(module, qconfig, path, plans.get(path, OutputPlan()))
        if form is not module:
            replace_module(model, path, form)
    model.quantization_notes = [note] if note else []  # type: ignore[assignment]
    return model


def _inherit(module: nn.Module, path: str, qconfig: QConfig | None, work: list[tuple[str, nn.Module, QConfig | None]]) -> None:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        own = child.__dict__.get("qconfig", qconfig)
        if isinstance(child, QATGroup):
            continue
        known = quantizable(child) or p.is_float_functional(child) or is_stub(child, "QuantStub") or is_stub(child, "DeQuantStub")
        if known:
            work.append((child_path, child, own))
        else:
            _inherit(child, child_path, own, work)


def prepare_qat_fx(
    model: nn.Module,
    qconfig_dict: dict[str, Any] | None = None,
    prepare_custom_config_dict: dict[str, Any] | None = None,
    optimize_graph: bool = False,
    hybrid: bool = False,
    hybrid_dict: dict[str, Any] | None = None,
    *,
    example_inputs: Any = None,
) -> nn.Module:
    """Fuse a model and give it fake quantization; BN is absorbed or kept as `horizon.qat_mode` says.

    Args:
        model: the float model, fused or not; it is copied and stays as it is.
        qconfig_dict: ``{"": qconfig, "module_type": [(type, qconfig)], "module_name": [(name, qconfig)]}``; by name > by type >
            global, None leaves a module in float. Names are those of the float model.
        prepare_custom_config_dict: accepted for compatibility; ``preserved_attributes`` is not needed, all are preserved.
        optimize_graph: no effect, see `prepare_qat`.
        hybrid, hybrid_dict: ``{"module_type": [...], "module_name": [...]}`` of modules to leave in float.
        example_inputs: as for `fuse_fx`.

    Returns:
        the prepared model, in the state FLOAT; go on with `calibrate`, or `set_fake_quantize` and training.

    Raises:
        QuantizationError: see `Resolver`.
    """
    from horizon_plugin_pytorch.fusion.by_graph import fuse_fx
    from horizon_plugin_pytorch.quantization.graph import prepare_graph

    unknown = set(prepare_custom_config_dict or {}) - {"preserved_attributes"}
    if unknown:
        raise QuantizationError(f"prepare_qat_fx: unknown keys in prepare_custom_config_dict: {sorted(unknown)}")
    config = dict(qconfig_dict or {})
    for key in ("module_type", "module_name"):
        skipped = [(x, None) for x in (hybrid_dict or {}).get(key, [])]
        if skipped:
            config[key] = [*config.get(key, []), *skipped]
    Resolver(config, model)  # names and values are checked before anything is done
    fused = fuse_fx(model, example_inputs=example_inputs)
    resolver = Resolver(config, fused, frozenset(n for n, _ in model.named_modules(remove_duplicate=False)))
    notes: list[str] = []
    for path, part in list(graph_parts(fused)):
        notes += prepare_graph(part, path, resolver, fused.fusion_report)  # type: ignore[arg-type]
    fused.quantization_notes = notes  # type: ignore[assignment]
    return fused


def graph_parts(model: nn.Module) -> Iterable[tuple[str, fx.GraphModule]]:
    """The traced parts of a fused model, by path."""
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module
