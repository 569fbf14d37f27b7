"""The borders of the quantized part of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class QuantStub(nn.Module):
    """Marks where a float tensor becomes a quantized one; in a float model it hands its input on.

    Args:
        scale: a fixed scale for the input, e.g. 1/128 for a camera; ``None``: observed.
        zero_point: only 0 (or ``None``) is supported: quantization is symmetric.
        qconfig: how to quantize; by default the one of the surrounding module.

    Raises:
        ValueError: a scale that is not positive, or a zero point other than 0.
    """

    def __init__(self, scale: float | None = None, zero_point: int | None = None, qconfig: Any = None) -> None:
        super().__init__()
        if scale is not None and not 0 < float(scale) < float("inf"):
            raise ValueError(f"QuantStub: scale must be positive and finite, not {scale}")
        if zero_point not in (None, 0):
            raise ValueError(f"QuantStub: quantization is symmetric, so zero_point is 0, not {zero_point}")
        self.scale = None if scale is None else float(scale)
        if qconfig is not None:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale}"


class DeQuantStub(nn.Module):
    """Marks where a quantized tensor becomes a float one; in a float model it hands its input on."""

    def forward(self, x: Tensor) -> Tensor:
        return x
