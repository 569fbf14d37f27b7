"""Scales as ONNX wants them: one per activation, and weights' scales that give the plan's multipliers.

A plan's group computes ``acc * m[c]`` with ``m[c] = s_x * s_w[c] / s_y``; the plan keeps `m` and the activations' scales, and a runtime
multiplies the three again. `weight_scales` finds the ``s_w[c]`` for which it gets `m` back.

An activation with a scale per channel, ``s[c]``, becomes one with the scale ``S = max s[c]``. Its integers stay, so what ONNX takes for its
value is ``q * S`` in place of ``q * s[c]``: the factor ``S / s[c]`` moves into the weights' scales of the group before and its inverse into
those of the group after, which is what happens by itself when `weight_scales` is given S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horizon_plugin_pytorch.plan import Plan

Array = NDArray[Any]
FLOAT32 = np.float32
_TINY = np.finfo(FLOAT32).tiny
_ULPS = sorted(range(-8, 9), key=abs)


@dataclass(frozen=True)
class Units:
    """What the integers of a value count.

    Attributes:
        name: of the plan's constant.
        scale: the one scale that ONNX knows.
        dtype: ``int8`` or ``uint8``.
        channels: the plan's scales, float32 ``[C]``, where it has one per channel.
    """

    name: str
    scale: np.float32
    dtype: str
    channels: Array | None = None

    @property
    def exact(self) -> Array:
        """The plan's scale or scales, float64."""
        return np.asarray(self.scale if self.channels is None else self.channels, np.float64)

    @property
    def range(self) -> tuple[int, int]:
        return (0, 255) if self.dtype == "uint8" else (-128, 127)


def units_of(plan: Plan, constant: str, dtype: str) -> Units:
    scale = plan.constants[constant].numpy().astype(FLOAT32)
    channels = scale if scale.ndim == 1 and not np.all(scale == scale[0]) else None
    return Units(constant, FLOAT32(scale.max()), dtype, channels)


def weight_scales(m: Array, s_x: np.float32, s_y: np.float32 | None, used: Array) -> Array:
    """float32 ``[C]`` with ``float32(float32(s_x * s_w[c]) / s_y) == m[c]``, in float32 arithmetic, wherever there is one.

    Without `s_y`, a group whose output is float32, ``float32(s_x * s_w[c]) == m[c]``. Where no float32 does, the nearest one.

    Args:
        m: float32 ``[C]``, the plan's multipliers.
        used: bool ``[C]``, False for channels of which weights and bias are zero: any scale does, and theirs can be too small for a
            runtime's arithmetic, so they get the largest one.
    """
    over = FLOAT32(1) if s_y is None else s_y
    best = np.maximum(m.astype(np.float64) * float(over) / float(s_x), _TINY).astype(FLOAT32)
    exact = np.full(m.shape, False)
    nearest = best.copy()
    for ulps in _ULPS:
        candidate = (nearest.view(np.int32) + np.int32(ulps)).view(FLOAT32)
        product = s_x * candidate
        hit = (product if s_y is None else product / over) == m
        best = np.where(hit & ~exact, candidate, best)
        exact |= hit
    if not used.all():
        best[~used] = best[used].max() if used.any() else FLOAT32(1)
    return best
