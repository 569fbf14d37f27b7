"""From a fused model to one with fake quantization.

`prepare_qat` changes modules in place of a model that was fused by name and keeps its forward. `prepare_qat_fx` fuses first, turns
functions that have integer rules into modules, and puts stubs where the user's model has none. Both use the same forms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.fusion.tracing import is_stub
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.quantization import dataflow, forms
from horizon_plugin_pytorch.quantization.flow import OutputPlan
from horizon_plugin_pytorch.quantization.qconfig import QConfig, Resolver, check_qconfig, default_qat_qconfig


@torch.inference_mode(False)  # what is made must be usable in training, also if the caller is in inference mode
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
        optimize_graph: no effect: operands of cat keep their own scales here at no cost.
        optimize_kwargs: no effect, likewise.
        hybrid: no effect: a module without an integer form always runs in float.

    Raises:
        QuantizationError: the model is prepared already or is not a float32 one; it has no QuantStub, a qconfig of another package,
            a convolution or linear layer that gets a float tensor, or a module that works in place on a value that is read again
            later. The model is unchanged.
    """
    from horizon_plugin_pytorch.quantization.named import outputs_of

    _check_fresh("prepare_qat", model)
    if not any(dataflow.is_stub(m, "QuantStub") for m in model.modules()):
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
    qconfigs: dict[str, QConfig | None] = {}
    mapping = mapping or {}
    _inherit(model, "", getattr(model, "qconfig", default_qat_qconfig), tuple(mapping), qconfigs)
    outputs = outputs_of(model, qconfigs)
    made: dict[int, nn.Module] = {}  # a module under several names has one form
    for path, qconfig in qconfigs.items():
        module = model.get_submodule(path)
        custom = mapping.get(type(module))
        if qconfig is None or path in outputs.left:
            continue
        if id(module) not in made:
            plan = outputs.plans.get(path, OutputPlan())
            form = custom(module, qconfig) if custom is not None else forms.to_qat(module, qconfig, path, plan)
            made[id(module)] = made[id(form)] = form
        replace_module(model, path, made[id(module)])
    model.quantization_notes = [outputs.note] if outputs.note else []  # type: ignore[assignment]
    model.float_reasons = outputs.left  # type: ignore[assignment]
    return model


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _inherit(
    module: nn.Module, path: str, qconfig: QConfig | None, types: tuple[type, ...], found: dict[str, QConfig | None]
) -> None:
    """The qconfig of every module with a form of its own; `types` are those the user has forms for."""
    for name, child in module._modules.items():
        if child is None:
            continue
        whole = type(child).__module__.startswith("torch.nn") and not isinstance(child, _CONTAINERS)
        child_path = f"{path}.{name}" if path else name
        own = child.__dict__.get("qconfig", qconfig)
        known = forms.quantizable(child) or p.is_float_functional(child) or is_stub(child)
        if known or type(child) in types:
            found[child_path] = own
        elif not whole:  # e.g. MultiheadAttention uses its children's tensors, and runs in float as a whole
            _inherit(child, child_path, own, types, found)


def _check_fresh(caller: str, model: nn.Module) -> None:
    """The model is a float32 one."""
    if any(isinstance(m, (QATGroup, FakeQuantize)) for m in model.modules()):
        raise QuantizationError(f"{caller}: the model is prepared already")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != parameter.float().dtype:
            raise QuantizationError(
                f"{caller}: {name} is {parameter.dtype}; scales are found and trained in float32: call model.float() first "
                "(and use torch.autocast to train faster)"
            )


@torch.inference_mode(False)
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
        hybrid: no effect, see `prepare_qat`.
        hybrid_dict: ``{"module_type": [...], "module_name": [...]}`` of modules to leave in float.
        example_inputs: as for `fuse_fx`.

    Returns:
        the prepared model, in the state FLOAT; go on with `calibrate`, or `set_fake_quantize` and training.

    Raises:
        QuantizationError: the model is prepared already or is not a float32 one; the dicts are wrong (see `Resolver`); nothing
            would be quantized; the result of a QuantStub is overwritten in part.
        FusionError, ValueError: see `fuse_fx`.
    """
    from horizon_plugin_pytorch.fusion.by_graph import fuse_fx
    from horizon_plugin_pytorch.quantization.graph import prepare_parts

    unknown = set(prepare_custom_config_dict or {}) - {"preserved_attributes"}
    if unknown:
        raise QuantizationError(f"prepare_qat_fx: unknown keys in prepare_custom_config_dict: {sorted(unknown)}")
    config = _with_hybrid(qconfig_dict, hybrid_dict)
    Resolver(config, model)  # names and values are checked before anything is done
    _check_fresh("prepare_qat_fx", model)
    fused = fuse_fx(model, example_inputs=example_inputs)
    report = fused.fusion_report
    resolver = Resolver(config, fused, frozenset(n for n, _ in model.named_modules(remove_duplicate=False)))
    prepared = prepare_parts(fused, resolver, report)  # type: ignore[arg-type]
    if not any(isinstance(m, FakeQuantize) for m in prepared.modules()):
        raise QuantizationError(
            f"prepare_qat_fx: nothing in {type(model).__name__} is to be quantized: {_why_nothing(model)}"
        )
    prepared.quantization_notes = []  # type: ignore[assignment]
    return prepared


def _with_hybrid(qconfig_dict: dict[str, Any] | None, hybrid_dict: dict[str, Any] | None) -> dict[str, Any]:
    """`qconfig_dict` with qconfig None for what `hybrid_dict` names."""
    unknown = set(hybrid_dict or {}) - {"module_type", "module_name"}
    if unknown:
        raise QuantizationError(f"hybrid_dict: unknown keys {sorted(unknown)}; use 'module_type' and 'module_name'")
    config = dict(qconfig_dict or {})
    for key, named in (hybrid_dict or {}).items():
        config[key] = [*config.get(key, []), *((x, None) for x in named)]
    return config


def _why_nothing(model: nn.Module) -> str:
    if any(p.anchor_of(m) is not None for m in model.modules()):
        return (
            "the qconfig of every convolution and linear layer is None, or the code that calls them could not be traced"
        )
    return "it has no convolution and no linear layer"
