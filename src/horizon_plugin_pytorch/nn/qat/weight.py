"""Fake quantization of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.nn.qat.autograd import RoundWeight
from horizon_plugin_pytorch.nn.qat.scale import HasScale

TINY = torch.finfo(torch.float32).tiny
WEIGHT_MAX = 127


class WeightFakeQuantize(HasScale):
    """Quantizes a weight per output channel to [-127, 127].

    Args:
        observer: a factory of an observer that chooses the scale when calibration ends; None: ``max|w| / 127``.
        learned: train the scales (LSQ), from there.

    Without an observer and not learned, the scale is ``max|w| / 127`` at every moment, and there is no `scale`.

    In the methods, `axis` (0 or 1) is the weight's dimension of output channels, of which with 1 each of `groups` has its
    own.
    """

    def __init__(self, observer: Callable[..., Any] | None = None, learned: bool = False) -> None:
        super().__init__(learned)
        self.observer_factory = observer
        if self.follows:
            self.scale = None  # type: ignore[assignment]

    @classmethod
    def with_args(cls, **kwargs: Any) -> Callable[..., WeightFakeQuantize]:
        """A factory with these arguments, as a qconfig holds it."""
        return partial(cls, **kwargs)

    @property
    def follows(self) -> bool:
        """The scale follows the weight, so that nothing is ever clipped."""
        return self.observer_factory is None and not self.learned

    def start(self, weight: Tensor, axis: int, groups: int) -> None:
        """Choose the scale for the weight as it is now, unless it follows the weight anyway."""
        if self.follows:
            return
        weight = weight.detach()
        if self.observer_factory is None:
            scale = max_scale(weight, axis, groups)
            # A channel of zeros may wake up: it starts with the largest scale of the others.
            largest = scale.amax()
            self.store(torch.where(scale > TINY, scale, torch.where(largest > TINY, largest, 1 / WEIGHT_MAX)))
        else:
            observer = self.observer_factory(axis=0).to(weight.device)
            observer.observe(channels_first(weight, axis, groups), running=False)
            self.store(observer.scale(-WEIGHT_MAX, WEIGHT_MAX))

    def scales(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        """float32 ``[C_out]``, constants."""
        return max_scale(weight.detach(), axis, groups) if self.follows else self.snapshot()

    def integers(self, weight: Tensor, axis: int, groups: int) -> tuple[Tensor, Tensor]:
        """For training: integers times `WEIGHT_UNIT`, differentiable, and their scales, constants."""
        if self.learned:
            scale = self.trained(weight.numel(), WEIGHT_MAX)
        else:
            scale = self.scales(weight, axis, groups)
        if self.follows:
            # A channel of zeros has the least scale there is, through which no gradient would find its way.
            scale = torch.where(scale > TINY, scale, 1.0)
        shaped = scale
        if axis == 1:
            shaped = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)
        shaped = shaped.view(*shaped.shape, *[1] * (weight.dim() - shaped.dim()))
        return RoundWeight.apply(weight, shaped, not self.follows), scale.detach()


def channels_first(weight: Tensor, axis: int, groups: int) -> Tensor:
    """``[C_out, C_in / groups, *kernel]``, whichever layout the weight has."""
    if axis == 0:
        return weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def max_scale(weight: Tensor, axis: int, groups: int) -> Tensor:
    """`reference.weight_scale`, which asks the host whether the weight is finite, without asking."""
    weight = channels_first(weight, axis, groups)
    peak = weight.abs().amax(tuple(range(1, weight.dim()))).to(torch.float64)
    return (peak / WEIGHT_MAX).to(torch.float32).clamp_(min=TINY)
