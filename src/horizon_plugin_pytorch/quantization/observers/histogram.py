"""Histograms with logarithmic bins, which can be added, averaged and summed over processes.

A bin is what the leading bits of a float32 number say: its exponent and the first bits of its mantissa. So every
octave has equally many bins, a bin's width is a fixed share of its values, and one huge outlier costs no resolution
elsewhere (the idea of Gil Tene's HdrHistogram). `OCTAVES` octaves are kept below the least power of two above the
largest magnitude; smaller magnitudes, and zero, are in the first bin. When a larger value comes, the window moves up
by whole octaves: bins are renamed, and those that drop out are added to the first. Nothing is lost, and nothing is
split.
"""

from __future__ import annotations

from math import gcd, prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization.observers.base import Observer, in_memory_order

OCTAVES = 32
SAMPLE = 2**15
"""A training step's histogram is made from about so many values of the tensor, …"""
CHANNEL_SAMPLE = 2**8
"""… and at least so many of each channel, where channels have scales of their own."""

_MANTISSA = 23  # bits of float32
_FINITE_LIMIT = 2.0**128


class Histogram(NamedTuple):
    """How many values have which magnitude.

    counts: float64 [..., 2, bins]; of positive values and zero, then of negative ones.
    edges: float64 [..., bins + 1]; bin i is [edges[i], edges[i+1]), and the one with the largest magnitude ends there.
    """

    counts: Tensor
    edges: Tensor

    def magnitudes(self, signed: bool) -> Tensor:
        """float64 [..., bins]: counts of |x|, or if not `signed` of max(x, 0)."""
        positive, negative = self.counts.unbind(-2)
        if signed:
            return positive + negative
        clamped = torch.zeros_like(negative)
        clamped[..., 0] = negative.sum(-1)
        return positive + clamped


class HistogramObserver(Observer):
    """Base of the observers that choose a threshold by looking at a histogram.

    Calibration counts every value. A training step takes a sample of the values at evenly spread places (one pass
    over the data for the extremes, as in `MinMaxObserver`, and a small one more) and moves the histogram as a whole:
    ``p = p + averaging_constant * (p_batch - p)``.

    Args:
        bins: bins of each sign, a power of two times `OCTAVES`.
    """

    statistics = ("low", "high", "top", "counts")

    top: Tensor
    """int32, [] or [channels]: magnitudes below ``2**top`` are inside the window."""
    counts: Tensor
    """float64, [2, bins] or [channels, 2, bins]; see `Histogram`."""

    def __init__(
        self, *, bins: int, axis: int | None = None, averaging_constant: float = 0.01, sync: bool = True
    ) -> None:
        super().__init__(axis=axis, averaging_constant=averaging_constant, sync=sync)
        if bins < OCTAVES or bins & (bins - 1) or bins > OCTAVES << 12:
            raise QuantizationError(
                f"{type(self).__name__}: bins is {bins}; it must be a power of two from {OCTAVES} to {OCTAVES << 12}"
            )
        self.bins = bins
        self.register_buffer("top", torch.empty(0, dtype=torch.int32))
        self.register_buffer("counts", torch.empty(0, dtype=torch.float64))

    def _accumulate(self, x: Tensor, low: Tensor, high: Tensor, running: bool, shared: bool) -> None:
        fresh = self._fresh
        super()._accumulate(x, low, high, running, shared)
        axis = self.axis
        if running and not fresh:
            x, axis = sample(x, axis)
        top = window_top(torch.maximum(-low, high))
        top = top if fresh else torch.maximum(self.top, top)
        counts = count(x, axis, top, self.bins)
        if shared:
            dist.all_reduce(counts)
        if fresh:
            self.top, self.counts = top, counts
            return
        kept = move_window(self.counts, top - self.top)
        if running:
            # The batch as a distribution of the same mass.
            batch, total = (c.sum((-2, -1), keepdim=True) for c in (counts, kept))
            kept.lerp_(counts * (total / batch.clamp(min=1)), self.averaging_constant)
        else:
            kept += counts
        self.top.copy_(top)
        self.counts.copy_(kept)

    def histogram(self, largest: Tensor) -> Histogram:
        """What was observed, with bins that end at `largest`."""
        return Histogram(self.counts, cut(window_edges(self.top, self.bins), largest))

    def _fits(self, name: str, value: Tensor) -> bool:
        if name != "counts" or value.numel() == 0:
            return super()._fits(name, value)
        return value.dim() == 2 + (self.axis is not None) and value.shape[-2:] == (2, self.bins)


def window_top(largest: Tensor) -> Tensor:
    """int32: the least t with ``largest < 2**t``; `largest` float32, not negative."""
    return (largest.view(torch.int32) >> _MANTISSA) - 126


def _first_code(top: Tensor, bins: int) -> Tensor:
    """The leading bits of the first bin's numbers, in a window up to ``2**top``; negative below float32's range."""
    return (top + 126) * (bins // OCTAVES) + bins // OCTAVES - bins


def _dropped_bits(bins: int) -> int:
    """How many low bits of a float32 number its bin does not depend on."""
    return _MANTISSA - (bins // OCTAVES).bit_length() + 1


def window_edges(top: Tensor, bins: int) -> Tensor:
    """float64 [..., bins + 1]: where the bins of a window begin, and the window's end."""
    codes = _first_code(top, bins).unsqueeze(-1) + torch.arange(bins + 1, dtype=torch.int32, device=top.device)
    infinity = 255 * (bins // OCTAVES)
    numbers = (codes.clamp(0, infinity) << _dropped_bits(bins)).view(torch.float32).double().clamp(max=_FINITE_LIMIT)
    numbers[..., :1].zero_()
    return numbers


def cut(edges: Tensor, largest: Tensor) -> Tensor:
    """Let the bin that `largest` is in end there, but not before it has some width."""
    starts, ends = edges[..., :-1], edges[..., 1:]
    end = torch.maximum(largest.unsqueeze(-1), starts * (1 + 2.0**-16))
    here = (starts <= largest.unsqueeze(-1)) & (ends > largest.unsqueeze(-1))
    return torch.cat((edges[..., :1], torch.where(here, end, ends)), -1)


def count(x: Tensor, axis: int | None, top: Tensor, bins: int) -> Tensor:
    """float64 [2, bins] or [channels, 2, bins]: elements of `x` in each bin of the window up to ``2**top``."""
    bits = x.to(torch.float32).view(torch.int32)
    first = _first_code(top, bins)
    channels = 1
    if axis is not None:
        channels = x.shape[axis]
        shape = [1] * x.dim()
        shape[axis] = channels
        first = first.view(shape)
    place = (bits & 0x7FFFFFFF).bitwise_right_shift_(_dropped_bits(bins)).sub_(first).clamp_(0, bins - 1)
    place += (bits >> 31).bitwise_and_(bins)  # the sign bit, all over; bins is a power of two
    if axis is not None:
        place += torch.arange(channels, dtype=torch.int32, device=x.device).view(shape) * (2 * bins)
    counts = torch.zeros(channels * 2 * bins, dtype=torch.float64, device=x.device)
    flat = in_memory_order(place).reshape(-1)
    counts.index_add_(0, flat, counts.new_ones(1).expand(flat.shape))
    return counts.view(2, bins) if axis is None else counts.view(channels, 2, bins)


def move_window(counts: Tensor, octaves: Tensor) -> Tensor:
    """`counts` [..., 2, bins] as they are in a window that is some `octaves` [...] (≥ 0) higher; a new tensor."""
    bins = counts.shape[-1]
    steps = (octaves.long() * (bins // OCTAVES)).clamp(max=bins)[..., None, None]
    places = torch.arange(bins, device=counts.device)
    moved = torch.cat((counts, torch.zeros_like(counts[..., :1])), -1).gather(
        -1, (places + steps).clamp(max=bins).expand(counts.shape)
    )
    moved[..., 0] = (counts * (places <= steps)).sum(-1)
    return moved


def sample(x: Tensor, axis: int | None) -> tuple[Tensor, int | None]:
    """About `SAMPLE` of `x`'s values, always at the same places, and the axis along which these have their channels.

    The places are a fixed stride apart (and wrap around) that has no factor in common with their number, so they are
    spread evenly along every dimension.
    """
    channels = 1 if axis is None else max(x.shape[axis], 1)
    places, wanted = x.numel() // channels, max(SAMPLE // channels, CHANNEL_SAMPLE)
    if places <= wanted:
        return x, axis
    stride = places // wanted
    while gcd(stride, places) > 1:
        stride += 1
    chosen = torch.arange(wanted, device=x.device) * stride % places
    if axis is None:
        return torch.take(x, chosen), None
    inner = prod(x.shape[axis % x.dim() + 1 :])
    channel = torch.arange(channels, device=x.device).unsqueeze(1)
    return torch.take(x, chosen // inner * (channels * inner) + channel * inner + chosen % inner), 0
