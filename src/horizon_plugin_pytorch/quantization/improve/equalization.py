"""Cross-layer equalization: giving the channels of a tensor ranges that share one scale better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log, log10
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, FakeQuantState, set_fake_quantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.quantization.calibration import batches, device_of
from horizon_plugin_pytorch.quantization.graph import graph_parts
from horizon_plugin_pytorch.quantization.improve.channels import Shared, Space, spaces_of
from horizon_plugin_pytorch.quantization.improve.lockstep import take

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST_SHARE = 1e-3
"""A channel counts as if its range were at least this share of the largest one: what never fires needs no range."""
HEADROOM = 2.0
"""How much more than calibration saw a channel may take before it is clipped, unless it was among the largest already."""


@dataclass(frozen=True)
class Equalized:
    """What was done to the tensors of one `Space`.

    Attributes:
        tensors: names of the operators whose outputs they are.
        exponent: the α that was chosen.
        gain: by how much the predicted noise at the readers' outputs falls, in dB.
    """

    tensors: tuple[str, ...]
    exponent: float
    gain: float


def equalize(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> list[Equalized]:
    """Divide channel c of a tensor by ``e[c]`` and multiply the weights that read it by ``e[c]``: the float function stays.

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1,
    https://arxiv.org/abs/1906.04721, balances two weights that have one scale each. Here weights have a scale per output channel,
    so the operator before the tensor takes any e for free, and what is balanced is the tensor's rounding against that of the
    weights that read it, whose input channels share a scale (as in Xiao et al. 2022, "SmoothQuant", https://arxiv.org/abs/2211.10438)::

        e[c] = min(1, h · r[c] / max r)^α     r: range of channel c, the geometric mean over the tensors that share channels
        noise = Σ_readers  step(e)²/12 · Σ_c e[c]² |W_c|²  +  Σ_o step_o(e)²/12 · taps · Σ_c E[y_c²] / e[c]²
        step(e) = max_c(r[c] / e[c]) / 255 (127 with negative values)      step_o(e) = max_c |W_oc e[c]| / 127

    The headroom h leaves room for data that were not seen: a channel's own extremes come from few values, and with h = 1 and α = 1
    each one of them would be a limit. For each `Space` the α in `EXPONENTS` with the least noise is taken. The operands of an
    addition share their channels, and so a chain of residual blocks is equalized as a whole. Only functions with
    ``f(e y) = e f(y)`` may lie between: none, ReLU, LeakyReLU, pooling; ReLU6 would clip elsewhere, so what it makes stays as it
    is. So do tensors with a scale per channel, which gain nothing.

    Args:
        model: from `prepare_qat_fx`, before `calibrate`; changed in place.
        data: as for `calibrate`; about 32 samples of it are used.
        progress: show a bar.

    Returns:
        what was done, per space.

    Raises:
        QuantizationError: the model is not prepared or calibrated already, or the data is empty or holds NaN; the model is unchanged.
    """
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    if not quantizers:
        raise QuantizationError("equalize: the model has no fake quantization: call prepare_qat_fx first")
    if any(q.ready and not q.fixed for q in quantizers):
        raise QuantizationError(
            "equalize: the model is calibrated already; equalize it first, because its ranges change"
        )
    spaces = [space for _, part in graph_parts(model) for space in spaces_of(model, part)]
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    set_fake_quantize(model, FakeQuantState.FLOAT)
    statistics = {tensor.name: Statistics(tensor) for space in spaces for tensor in space.tensors}
    try:
        with torch.no_grad():
            for args, kwargs in batches(model, take(data), device_of(model), progress, "equalize"):
                model(*args, **kwargs)
    finally:
        for one in statistics.values():
            one.handle.remove()
        for module, mode in modes:
            module.training = mode
    done = []
    for space in spaces:
        seen = [statistics[t.name] for t in space.tensors]
        if all(one.usable for one in seen):
            done.append(_equalize(space, seen))
    return done


class Statistics:
    """Per channel of a tensor the largest magnitude and the mean square, while `handle` is not removed."""

    def __init__(self, tensor: Shared) -> None:
        self.tensor = tensor
        self.largest = self.low = self.square = torch.zeros((), dtype=torch.float64)
        self.count = 0
        self.handle = tensor.module.register_forward_hook(self._observe)

    def _observe(self, module: nn.Module, args: Any, y: Tensor) -> None:
        channels_first = y.detach().movedim(-self.tensor.axis, 0).flatten(1)
        if channels_first.shape[1] == 0:
            return
        low, high = channels_first.amin(1).double(), channels_first.amax(1).double()
        self.largest = torch.maximum(self.largest.to(low), torch.maximum(high, -low))
        self.low = torch.minimum(self.low.to(low), low)
        self.square = self.square.to(low) + channels_first.double().square().sum(1)
        self.count += channels_first.shape[1]

    @property
    def usable(self) -> bool:
        """It was reached, is not all zero, and its scale is not given by the user."""
        quantizer: Any = self.tensor.module.output_quant
        given = quantizer.fixed or hasattr(quantizer.observer, "given")
        return not given and bool((self.largest > 0).any()) and bool(self.largest.isfinite().all())

    @property
    def levels(self) -> int:
        return 127 if bool((self.low < 0).any()) else 255

    @property
    def power(self) -> Tensor:
        return self.square / self.count


@torch.no_grad()
def _equalize(space: Space, seen: list[Statistics]) -> Equalized:
    ranges = [(s.largest / s.largest.max()).clamp(min=LEAST_SHARE).log() for s in seen]
    shape = (torch.stack(ranges).mean(0) + log(HEADROOM)).clamp(max=0)
    noises = [_noise(seen, (alpha * shape).exp()) for alpha in EXPONENTS]
    best = min(range(len(EXPONENTS)), key=noises.__getitem__)
    e = (EXPONENTS[best] * shape).exp()
    for producer in space.producers:
        scale_output(producer, 1 / e)
    for reader in space.readers:
        scale_input(reader, e)
    gain = 0.0 if noises[best] == 0 else 10 * log10(noises[0] / noises[best])
    return Equalized(tuple(t.name for t in space.tensors), EXPONENTS[best], gain)


def _noise(seen: list[Statistics], e: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=e.device)
    for tensor in seen:
        step = (tensor.largest / e).max() / tensor.levels
        for reader in tensor.tensor.readers:
            weight = _by_input(reader)
            scaled = weight * e.view(weight.shape[0], 1, -1, 1)
            total += step**2 / 12 * scaled.square().sum()
            if weight.shape[2] == 1:  # depthwise: the scale per output channel takes e up
                continue
            steps = scaled.abs().amax((2, 3)) / 127
            power = (tensor.power / e**2).view(weight.shape[0], 1, -1).sum(2)
            total += (steps.square() / 12 * power).sum() * weight.shape[3]
    return total.item()


def _by_input(group: QATGroup) -> Tensor:
    """The weight as ``[groups, C_out / groups, C_in / groups, taps]``, float64."""
    axis, groups = group._layout
    weight = group.weight.detach().double()
    weight = weight.unflatten(0, (groups, -1))
    if axis == 1:
        weight = weight.transpose(1, 2)
    return weight.flatten(3) if weight.dim() > 3 else weight.unsqueeze(-1)


def scale_output(group: QATGroup, factor: Tensor) -> None:
    """Multiply a group's linear output by `factor` ``[C_out]``."""
    axis, groups = group._layout
    weight = group.weight.detach().unflatten(0, (groups, -1))
    shape = (groups, -1, 1) if axis == 0 else (groups, 1, -1)
    weight.mul_(factor.to(weight.dtype).view(*shape, *[1] * (weight.dim() - 3)))
    if group.bias is not None:
        group.bias.detach().mul_(factor)


def scale_input(group: QATGroup, factor: Tensor) -> None:
    """Make a group read each input channel as if it were multiplied by `factor` ``[C_in]``."""
    axis, groups = group._layout
    weight = group.weight.detach().unflatten(0, (groups, -1))
    shape = (groups, 1, -1) if axis == 0 else (groups, -1, 1)
    weight.mul_(factor.to(weight.dtype).view(*shape, *[1] * (weight.dim() - 3)))
