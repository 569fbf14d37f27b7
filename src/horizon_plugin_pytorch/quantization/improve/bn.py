"""Batch norm statistics of the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization.calibration import batches, device_of


def reestimate_bn(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> nn.Module:
    """Replace every batch norm's running statistics by the mean over `data` of the batches' own.

    ``running_mean = mean_b(mean of batch b)`` and likewise the unbiased variance, with the weights as they are now: the moving
    averages of training lag behind weights that still move, and in QAT they mix many roundings (Wu and Johnson 2021, "Rethinking
    'Batch' in BatchNorm", section 3, https://arxiv.org/abs/2105.07576; for QAT Nagel et al. 2022, "Overcoming Oscillations in
    Quantization-Aware Training", section 4.3, https://arxiv.org/abs/2203.11086). For a float model, or a QAT model that
    kept its norms (`QATMode.WithBN`, `fuse_modules_qat`); scales stay as they are.

    Args:
        model: changed in place; momentum and mode are as before.
        data: as for `calibrate`, in batches of a size the norm can use.
        progress: show a bar.

    Raises:
        QuantizationError: there is no batch norm with running statistics, or the data is empty or holds NaN.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise QuantizationError(
            "reestimate_bn: the model has no batch norm with running statistics; they were absorbed when it was fused. "
            "Keep them with fuse_modules_qat or qat_mode WithBN"
        )
    before = [(m, m.momentum, {k: v.clone() for k, v in m.named_buffers()}) for m in norms]
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        with torch.no_grad():
            for args, kwargs in batches(model, data, device_of(model), progress, "reestimate_bn"):
                model(*args, **kwargs)
    except BaseException:
        for norm, _, buffers in before:
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return model
