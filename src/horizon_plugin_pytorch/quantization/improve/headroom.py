"""Room above the largest value that calibration saw."""

from __future__ import annotations

import torch
from torch import nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize


@torch.no_grad()
def add_headroom(model: nn.Module, factor: float = 1.25) -> nn.Module:
    """Multiply every scale that belongs to one channel by `factor`.

    The extremes of a single channel come from few values: data that were not seen exceed them often, and clipping a rare strong
    feature (a face, to a face detector) costs far more than a coarser step, ``factor**2`` of a noise that is small where each
    channel has its own scale anyway. A scale that a whole tensor shares has its extremes from all channels and is left as it is.
    ReLU6 bounds its scale as before. Training forgets the headroom, unless the observers' ``averaging_constant`` is 0.

    Args:
        model: prepared and calibrated; changed in place.
        factor: 1 or more.

    Raises:
        QuantizationError: a factor below 1.
    """
    if not factor >= 1:
        raise QuantizationError(f"add_headroom: the factor is {factor}; it must be at least 1")
    for quantizer in model.modules():
        if (
            isinstance(quantizer, FakeQuantize)
            and quantizer.axis is not None
            and quantizer.ready
            and not quantizer.fixed
        ):
            scale = quantizer.scale * factor
            limit = quantizer.limit
            quantizer.scale.copy_(scale if limit is None else scale.clamp(max=limit / quantizer.bounds[1]))
    return model
