"""What makes a threshold a good one: functions of a histogram, without state.

A threshold T is the value that the largest integer `hi` stands for, so the scale is ``s = T / hi``. Inside a bin the values are taken
to be spread evenly; the errors below are then exact integrals, however wide the bins are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization.observers.histogram import Histogram

_PER_OCTAVE, _FINER = 8, 4
_ELEMENTS = 2**18  # of one step of a search: a few MB, so that on a CPU they stay in its cache


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
    ``∫₀ᵘ (t - r(t))² dt = r/12 + (u - r)³/3``. Negative values that clamp to 0 cost the same with every threshold and are left out.

    Args:
        thresholds: [..., K]; the leading dimensions are the histogram's.

    Returns:
        float64 [..., K].
    """

    def integral(u: Tensor, r: Tensor) -> Tensor:
        return (u - r).pow_(3).mul_(4).add_(r).div_(12)

    return _sum(histogram, thresholds, lo, hi, integral) * (thresholds / hi) ** 2


def cosine(histogram: Histogram, thresholds: Tensor, lo: int, hi: int) -> Tensor:
    """Cosine similarity of x and its quantized values q, up to a factor that no threshold changes: ``Σ x·q / sqrt(Σ q²)``.

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
    counts = histogram.counts[..., None, : len(limits), :]
    widths = histogram.edges.diff(dim=-1)[..., None, None, :]
    # A bin without width has no values: it lies below float32's least number.
    density = torch.where(widths > 0, counts / widths, 0.0)
    s = (thresholds / hi)[..., None, None]
    u = histogram.edges[..., None, None, :] / s
    rounded = u.round()
    sides = [integral(u, rounded.clamp(max=n)).diff(dim=-1) for n in limits]
    return (density * torch.cat(sides, -2)).sum((-2, -1)) * s[..., 0, 0]


def relative_entropy(counts: Tensor, edges: Tensor, thresholds: Tensor, levels: int, bins: int) -> Tensor:
    """``Σ p log(p / q)`` of the clipped distribution p and its quantized form q, for each threshold.

    Both have `bins` equal bins over [0, T]. p has everything above T added to its last bin. q is what is inside [0, T], `levels`
    groups of bins with each group's mass spread evenly over those of its bins that are not empty. Exact zeros are left out: they
    cost nothing with any threshold. A threshold that clips more than half of the values counts as infinitely bad: the fewer values
    are inside, the better they can be like themselves, and the criterion says nothing any more.

    Args:
        counts: [n], `Histogram.magnitudes` of one tensor.
        edges: [n + 1].
        thresholds: [K].

    Returns:
        float64 [K].
    """
    counts = torch.cat((torch.zeros_like(counts[:1]), counts[1:]))
    below = torch.cat((torch.zeros_like(counts[:1]), counts.cumsum(0)))
    points = thresholds.unsqueeze(-1) * (torch.arange(bins + 1, dtype=torch.float64, device=counts.device) / bins)
    place = torch.searchsorted(edges, points, right=True).sub_(1).clamp_(0, len(counts) - 1)
    start, width = edges[place], (edges[1:] - edges[:-1])[place]
    share = torch.where(width > 0, (points - start) / width, 0.0).clamp_(0, 1)
    total = below[-1]
    inside = (below[place] + share * counts[place]).diff(dim=-1).clamp_(min=0) / total
    p = inside.clone()
    p[:, -1] += 1 - inside.sum(-1)
    groups = inside.view(-1, levels, bins // levels)
    filled = groups > 0
    q = (groups.sum(-1, keepdim=True) / filled.sum(-1, keepdim=True).clamp(min=1) * filled).view_as(p)
    q = q / q.sum(-1, keepdim=True)
    # A value where q has none would cost infinitely much; it can only be the clipped ones in an otherwise empty last bin.
    entropy = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(-1)
    return torch.where(inside.sum(-1) < 0.5, torch.inf, entropy)


def least_squared_error(histogram: Histogram, lo: int, hi: int, largest: Tensor) -> Tensor:
    """The threshold [...] with the least `squared_error`.

    Ten octaves hold it: one value A among N makes the best threshold ``A / (1 + sqrt(N / (12 hi²)))`` if it is so large that the
    others hardly matter, and that is above A / 1024 for N up to 2·10¹¹.
    """
    return _search(lambda t: squared_error(histogram, t, lo, hi), largest, 10, histogram.counts.numel())


def least_entropy(histogram: Histogram, lo: int, hi: int, largest: Tensor, bins: int) -> Tensor:
    """The threshold [] with the least `relative_entropy`.

    Raises:
        QuantizationError: `bins` is no multiple of the number of levels.
    """
    if bins % (hi + 1):
        raise QuantizationError(f"kl: {bins} bins are no multiple of the {hi + 1} levels of a magnitude up to {hi}")
    counts = histogram.magnitudes(lo < 0)
    return _search(lambda t: relative_entropy(counts, histogram.edges, t, hi + 1, bins), largest, 24, bins)


def _search(loss: Callable[[Tensor], Tensor], largest: Tensor, octaves: int, elements: int) -> Tensor:
    """The threshold with the least loss, at most `largest`: 8 candidates an octave, then 4 times finer around the best.

    Args:
        loss: [..., K] thresholds to [..., K] losses.
        largest: [...].
        octaves: how far down to look.
        elements: how many numbers the loss of one candidate works on; bounds the memory.
    """

    def best(around: Tensor, exponents: range, per_octave: int) -> Tensor:
        steps = torch.exp2(
            -torch.arange(exponents.start, exponents.stop, dtype=torch.float64, device=largest.device) / per_octave
        )
        candidates = torch.minimum(around.unsqueeze(-1) * steps, largest.unsqueeze(-1))
        parts = candidates.split(max(1, _ELEMENTS // elements), dim=-1)
        losses = torch.cat([loss(part) for part in parts], -1)
        return candidates.gather(-1, losses.argmin(-1, keepdim=True)).squeeze(-1)

    coarse = best(largest, range(octaves * _PER_OCTAVE + 1), _PER_OCTAVE)
    return best(coarse, range(1 - _FINER, _FINER), _FINER * _PER_OCTAVE)
