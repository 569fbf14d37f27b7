"""Float to int8 in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.quantization.calibration import arguments, calibrate
from horizon_plugin_pytorch.quantization.conversion import convert_fx
from horizon_plugin_pytorch.quantization.improve import add_headroom, equalize, reconstruct
from horizon_plugin_pytorch.quantization.prepare import prepare_qat_fx


def quantize(
    model: nn.Module,
    calibration_data: Iterable[Any],
    *,
    qconfig_dict: dict[str, Any] | None = None,
    progress: bool = True,
    improve: bool = True,
) -> nn.Module:
    """Turn a float model into one that computes in integers.

    Fuse and prepare it, `improve.equalize`, `calibrate`, `improve.add_headroom`, `improve.reconstruct`, convert: the recipe that
    lost least on real networks (docs/precision.md).

    Args:
        model: the float model; it stays as it is. Stubs are honoured where it has them and put at its edges otherwise.
        calibration_data: an iterable of inputs or a DataLoader, see `calibrate`; a few dozen typical inputs are enough.
        qconfig_dict: see `prepare_qat_fx`.
        progress: show a bar.
        improve: False leaves the three improvements out: faster, and the int8 weights are the rounded trained ones.

    Returns:
        the int8 model, in eval mode; its `quantization_report` says what runs in integers and what in float.

    Raises:
        QuantizationError: see `prepare_qat_fx`, `calibrate` and `convert`.
    """
    data = calibration_data if hasattr(calibration_data, "__len__") else list(calibration_data)
    first = next(iter(data), None)
    if first is None:
        raise QuantizationError("quantize: the calibration data is empty")
    args, kwargs = arguments(model, first)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        prepared = prepare_qat_fx(model, qconfig_dict, example_inputs=kwargs or args)
    finally:
        for module, training in modes:
            module.training = training
    if improve:
        for module in prepared.modules():
            if isinstance(module, QATGroup) and module.norm is not None:
                module.absorb_norm()  # kept for training, which does not come
        equalize(prepared, data, progress=progress)
    calibrate(prepared, data, progress=progress)
    if improve:
        add_headroom(prepared)
        reconstruct(prepared, data, progress=progress)
    return convert_fx(prepared, inplace=True)
