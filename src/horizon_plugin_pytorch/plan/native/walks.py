"""How a convolution walks over its input, one dimension at a time, plain and transposed ones alike.

Output ``first + i * every`` reads the inputs ``i * stride + delta`` for the taps' deltas. A plain convolution is one such walk,
with ``delta = k * dilation - padding``. A transposed one, whose output o gets input i through the tap k where
``o = i * stride - padding + k * dilation``, falls into `stride` phases: outputs of the same remainder read the same taps, each phase
with ``delta = (phase + padding - k * dilation) / stride``, and no input is stretched with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from horizon_plugin_pytorch.nn.quantized.group import Geometry


@dataclass(frozen=True)
class Walk:
    """Along one dimension; `deltas` ascend, `taps` are the kernel's indices that go with them."""

    count: int
    stride: int
    deltas: tuple[int, ...]
    taps: tuple[int, ...]
    first: int = 0
    every: int = 1

    def halo(self, length: int) -> tuple[int, int]:
        """Zeros that the walk reads before and after an input of `length`."""
        if not self.deltas or not self.count:
            return 0, 0
        return max(0, -self.deltas[0]), max(0, (self.count - 1) * self.stride + self.deltas[-1] - length + 1)

    @property
    def dilation(self) -> int | None:
        """The distance between taps where it is one number; None where it is not."""
        steps = {b - a for a, b in zip(self.deltas, self.deltas[1:], strict=False)}
        return 1 if not steps else steps.pop() if len(steps) == 1 else None


def phases(geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[tuple[Walk, ...]]:
    """The walks along each dimension, for each phase; `inputs` and `outputs` are the spatial sizes."""
    along = [_along(geometry, dim, outputs[dim]) for dim in range(geometry.dims)]
    return [walks for walks in product(*along) if all(w.count for w in walks)]


def halo(all_walks: list[tuple[Walk, ...]], inputs: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros that any phase needs before and after each dimension."""
    sides = [[w.halo(n) for w, n in zip(walks, inputs, strict=True)] for walks in all_walks]
    return [(max(s[d][0] for s in sides), max(s[d][1] for s in sides)) for d in range(len(inputs))] if sides else []


def _along(geometry: Geometry, dim: int, outputs: int) -> list[Walk]:
    kernel, stride, dilation = (getattr(geometry, n)[dim] for n in ("kernel_size", "stride", "dilation"))
    padding = _padding(geometry, dim)
    if not geometry.transposed:
        return [Walk(outputs, stride, tuple(k * dilation - padding for k in range(kernel)), tuple(range(kernel)))]
    result = []
    for phase in range(stride):
        pairs = sorted(
            ((phase + padding - k * dilation) // stride, k)
            for k in range(kernel)
            if (phase + padding - k * dilation) % stride == 0
        )
        count = len(range(phase, outputs, stride))
        result.append(Walk(count, 1, tuple(d for d, _ in pairs), tuple(k for _, k in pairs), phase, stride))
    return result


def _padding(geometry: Geometry, dim: int) -> int:
    """Zeros before the input; those of other padding modes are there already."""
    if geometry.padding_mode != "zeros" or geometry.padding == "valid":
        return 0
    if isinstance(geometry.padding, str):
        return geometry.dilation[dim] * (geometry.kernel_size[dim] - 1) // 2
    return geometry.padding[dim]
