"""What makes a threshold a good one: functions of a histogram, without state.

A threshold T is the value that the largest integer `hi` stands for, so the scale is ``s = T / hi``. Inside a bin the
values are taken to be spread evenly; the errors below are then exact integrals, however wide the bins are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from horizon_plugin_pytorch.quantization.observers.histogram import OCTAVES, Histogram

_PER_OCTAVE, _FINER = 8, 4
_ELEMENTS = 2**17  # worked on at once: 1 MB, so that on a CPU it stays in the cache


def percentile(counts: Tensor, edges: Tensor, percent: float, largest: Tensor) -> Tensor:
    """The magnitude that `percent` of the values do not exceed, by linear interpolation inside its bin.

    If that falls into the first bin, almost everything is zero, and the threshold is `largest`.

    Args:
        counts: [..., bins], `Histogram.magnitudes`.
        edges: [..., bins + 1].
        largest: [...].
    """
    below = counts.cumsum(-1)
    wanted = below[..., -1:] * (percent / 100)
    place = torch.searchsorted(below, wanted).clamp(max=counts.shape[-1] - 1)
    inside = counts.gather(-1, place)
    share = 1 - (below.gather(-1, place) - wanted) / inside
    start, end = edges.gather(-1, place), edges.gather(-1, place + 1)
    threshold = torch.where(place == 0, largest.unsqueeze(-1), start + share * (end - start))
    return torch.minimum(threshold.squeeze(-1), largest)


def squared_error(histogram: Histogram, thresholds: Tensor, lo: int, hi: int) -> Tensor:
    """Sum of ``(x - s * clamp(round(x / s), lo, hi))**2`` over the histogram, without what no threshold changes.

    With ``u = |x| / s`` and ``r = min(round(u), n)``, where n is `hi` for positive and ``-lo`` for negative values,
    ``∫₀ᵘ (t - r(t))² dt = r/12 + (u - r)³/3``. Negative values that clamp to 0 cost the same with every threshold and
    are left out.

    Args:
        thresholds: [..., K]; the leading dimensions are the histogram's.

    Returns:
        float64 [..., K].
    """

    def integral(u: Tensor, r: Tensor) -> Tensor:
        return (u - r).pow_(3).mul_(4).add_(r).div_(12)

    return _sum(histogram, thresholds, lo, hi, integral) * (thresholds / hi) ** 2


def cosine(histogram: Histogram, thresholds: Tensor, lo: int, hi: int) -> Tensor:
    """Cosine similarity of x and its quantized values q, up to a factor: ``Σ x·q / sqrt(Σ q²)``.

    With u and r as in `squared_error`, ``∫ t·r dt = r·u²/2 - r³/6 + r/24`` and ``∫ r² dt = r²·u - 2r³/3 + r/6``.

    Args:
        thresholds: [..., K].

    Returns:
        float64 [..., K].
    """

    def product(u: Tensor, r: Tensor) -> Tensor:
        return r * (u * u / 2 - r * r / 6 + 1 / 24)

    def square(u: Tensor, r: Tensor) -> Tensor:
        return r * (r * u - r * r * (2 / 3) + 1 / 6)

    # In steps: x·q is s² times the first, q² s² times the second, and both come with the s of dx = s du.
    products, squares = (_sum(histogram, thresholds, lo, hi, integral) for integral in (product, square))
    return torch.where(squares > 0, products / squares.sqrt() * (thresholds / hi), 0.0)


def _sum(
    histogram: Histogram, thresholds: Tensor, lo: int, hi: int, integral: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The sum over all values of a function whose integral over u, in steps, is given: [..., K]."""
    limits = [hi, -lo] if lo < 0 else [hi]

    def block(counts: Tensor, edges: Tensor, thresholds: Tensor) -> Tensor:
        widths = edges.diff(dim=-1)[:, None, None]
        # A bin without width has no values: it lies below float32's least number.
        density = torch.where(widths > 0, counts[:, None] / widths, 0.0)
        s = thresholds / hi
        u = edges[:, None] / s[..., None]
        rounded = u.round()
        sides = [integral(u, rounded.clamp(max=n)).diff(dim=-1) for n in limits]
        return (density * torch.stack(sides, -2)).sum((-2, -1)) * s

    counts = histogram.counts[..., : len(limits), :]
    bins, candidates = counts.shape[-1], thresholds.shape[-1]
    by_channel = (
        counts.reshape(-1, len(limits), bins),
        histogram.edges.reshape(-1, bins + 1),
        thresholds.reshape(-1, candidates),
    )
    channels = max(1, _ELEMENTS // (bins * candidates))
    blocks = zip(*(t.split(channels) for t in by_channel), strict=True)
    return torch.cat([block(*parts) for parts in blocks]).view(thresholds.shape)


def relative_entropy(counts: Tensor, edges: Tensor, ends: Tensor, levels: int) -> Tensor:
    """``Σ p log(p / q)`` over the bins below a threshold T, of the clipped distribution p and its quantized form q.

    p has everything above T added to its last bin. q is what is below T, spread evenly inside each of `levels` equal
    parts of [0, T]. Exact zeros are left out: they cost nothing with any threshold. So is a threshold that clips more
    than half of the values, with an entropy of infinity: the fewer values are left, the better they are like
    themselves, and the criterion says nothing any more. The bins narrower than a level of the smallest threshold
    left are one bin.

    Args:
        counts: [n], `Histogram.magnitudes` of one tensor.
        edges: [n + 1].
        ends: int64 [K]; the thresholds are ``edges[ends]``.

    Returns:
        float64 [K].
    """
    zero = torch.zeros_like(counts[:1])
    counts = torch.cat((zero, counts[1:]))
    below = torch.cat((zero, counts.cumsum(0)))
    total, inside = below[-1], below[ends].unsqueeze(-1)
    step = edges[ends].unsqueeze(-1) / levels

    # The values below each boundary between levels, and from these, in a straight line, below each edge.
    boundaries = torch.arange(levels + 1, dtype=torch.float64, device=counts.device) * step
    place = torch.searchsorted(edges, boundaries, right=True).sub_(1).clamp_(0, len(counts) - 1)
    share = torch.where(counts[place] > 0, (boundaries - edges[place]) / edges.diff()[place], 0.0).clamp_(0, 1)
    of_level = below[place] + share * counts[place]
    level = (edges / step).long().clamp_(0, levels - 1)
    first, last = of_level.gather(-1, level), of_level.gather(-1, level + 1)
    q = (first + (edges / step - level) * (last - first)).diff(dim=-1) / inside

    bins = torch.arange(len(counts), device=counts.device)
    p = torch.where(bins < ends.unsqueeze(-1), counts, 0.0) / total
    p = torch.where(bins == ends.unsqueeze(-1) - 1, p + 1 - inside / total, p)

    narrow = edges[1:] * levels < percentile(counts, edges, 50, edges[-1])
    p, q = (torch.cat(((d * narrow).sum(-1, keepdim=True), d * ~narrow), -1) for d in (p, q))
    # Only clipped values in a last bin otherwise empty have no part in q; they would cost infinitely much.
    entropy = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(-1)
    return torch.where(inside.squeeze(-1) < total / 2, torch.inf, entropy)


def least_squared_error(histogram: Histogram, lo: int, hi: int, largest: Tensor) -> Tensor:
    """The threshold [...] with the least `squared_error`.

    Ten octaves hold it: one value A among N makes the best threshold ``A / (1 + sqrt(N / (12 hi²)))`` if it is so
    large that the others hardly matter, and that is above A / 1024 for N up to 2·10¹¹.
    """
    return _search(lambda t: squared_error(histogram, t, lo, hi), largest)


def least_entropy(histogram: Histogram, lo: int, hi: int, largest: Tensor) -> Tensor:
    """The threshold [] with the least `relative_entropy`, among the bins' edges: 8 in an octave, down 24 octaves."""
    counts, edges = histogram.magnitudes(lo < 0), histogram.edges
    stride = max(1, len(counts) // (OCTAVES * _PER_OCTAVE))
    end = torch.searchsorted(edges, largest.reshape(1))
    ends = (end - stride * torch.arange(24 * _PER_OCTAVE, device=edges.device)).clamp(1, len(counts))
    best = relative_entropy(counts, edges, ends, hi + 1).argmin(-1, keepdim=True)
    return torch.minimum(edges[ends[best]].squeeze(0), largest)


def _search(loss: Callable[[Tensor], Tensor], largest: Tensor) -> Tensor:
    """The threshold with the least loss, at most `largest`: 8 candidates an octave, then 4 times finer around the best.

    Args:
        loss: [..., K] thresholds to [..., K] losses.
        largest: [...].
    """

    def best(around: Tensor, exponents: range, per_octave: int) -> Tensor:
        steps = torch.exp2(
            -torch.arange(exponents.start, exponents.stop, dtype=torch.float64, device=largest.device) / per_octave
        )
        candidates = torch.minimum(around.unsqueeze(-1) * steps, largest.unsqueeze(-1))
        return candidates.gather(-1, loss(candidates).argmin(-1, keepdim=True)).squeeze(-1)

    coarse = best(largest, range(10 * _PER_OCTAVE + 1), _PER_OCTAVE)
    return best(coarse, range(1 - _FINER, _FINER), _FINER * _PER_OCTAVE)
