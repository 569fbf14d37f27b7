"""The scale of a quantizer: a buffer, or a parameter that is learned."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.nn.quantized.tensors import KeepsDtype

LEAST_LEARNED = 2.0**-64
"""A learned scale is at least this."""


class HasScale(KeepsDtype):
    """A module with a `scale`, float32, empty until there is one.

    It is the same tensor for as long as the module lives: an optimizer, DistributedDataParallel and CUDA graphs hold on
    to it.
    """

    scale: Tensor

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        if learned:
            self.scale = nn.Parameter(torch.empty(0))
        else:
            self.register_buffer("scale", torch.empty(0))

    @property
    def ready(self) -> bool:
        return self.scale.numel() > 0

    def store(self, scale: Tensor) -> None:
        # Usable in training, also if the caller is in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self.scale.shape == scale.shape:
                self.scale.copy_(scale)
            else:
                self.scale.data = scale.to(self.scale.device, torch.float32, copy=True)

    def snapshot(self) -> Tensor:
        """The scale as it is now; results computed with it stay what they are when training moves the scale."""
        scale = self.scale.detach().clone()
        return scale.abs_().clamp_(min=LEAST_LEARNED) if self.learned else scale

    def trained(self, count: int, largest: int) -> Tensor:
        """The learned scale for a step of training; its gradient gets LSQ's factor ``1 / sqrt(count * largest)``.

        Args:
            count: how many weights, or features of one sample, are quantized, with all scales together.
            largest: the largest integer.
        """
        factor = 1 / sqrt(max(count, 1) / self.scale.numel() * largest)
        return _Magnitude.apply(self.scale, factor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A scale may be empty in one model and filled in the other.
        value, own = state_dict.get(prefix + "scale"), self.scale
        if value is not None and own is not None and value.shape != own.shape and 0 in (value.numel(), own.numel()):
            own.data = torch.empty_like(value, device=own.device, dtype=torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Magnitude(torch.autograd.Function):
    """A parameter's magnitude, so that a step past zero does no harm; the gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(parameter)
        ctx.factor = factor
        return parameter.abs().clamp_(min=LEAST_LEARNED)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (parameter,) = ctx.saved_tensors
        return torch.where(parameter < 0, -ctx.factor, ctx.factor) * grad, None
