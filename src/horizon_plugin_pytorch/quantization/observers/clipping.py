"""Observers that clip: each gives up some large values for a finer step."""

from __future__ import annotations

import torch
from torch import Tensor

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization.observers import criteria
from horizon_plugin_pytorch.quantization.observers.histogram import HistogramObserver


class PercentileObserver(HistogramObserver):
    """The threshold is the magnitude that `percentile` percent of the values do not exceed; the rest is clipped.

    Percentile of |x| for int8, of max(x, 0) for uint8 (Wu et al. 2020, "Integer Quantization for Deep Learning
    Inference: Principles and Empirical Evaluation", percentile calibration, https://arxiv.org/abs/2004.09602).
    Accurate to a fraction of a bin; a bin is 1.6 % wide at most with 2048 of them. Where more than `percentile`
    percent are zero, nothing is clipped.

    Args:
        percentile: in (0, 100]; with 100 this is `MinMaxObserver` in calibration.
        bins: histogram bins of each sign, a power of two from 32 on.
        axis, averaging_constant, sync: see `Observer`.
    """

    def __init__(
        self,
        percentile: float = 99.99,
        bins: int = 2048,
        *,
        axis: int | None = None,
        averaging_constant: float = 0.01,
        sync: bool = True,
    ) -> None:
        super().__init__(bins=bins, axis=axis, averaging_constant=averaging_constant, sync=sync)
        if not 0 < percentile <= 100:
            raise QuantizationError(f"PercentileObserver: percentile is {percentile}; it must be in (0, 100]")
        self.percentile = percentile

    def _threshold(self, lo: int, hi: int, largest: Tensor) -> Tensor:
        histogram = self.histogram(largest)
        return criteria.percentile(histogram.magnitudes(lo < 0), histogram.edges, self.percentile, largest)

    def extra_repr(self) -> str:
        return f"percentile={self.percentile:g}, {super().extra_repr()}"


class MSEObserver(HistogramObserver):
    """The threshold with the least mean squared error of quantization.

    That is ``mean((x - s * clamp(round(x / s), lo, hi))**2)``. Rounding and clipping error are integrated exactly
    over the histogram, with -128 as well as 127 for int8 (as in Sung, Shin and Hwang 2015, "Resiliency of Deep Neural
    Networks under Quantization", https://arxiv.org/abs/1511.06488, and in Nagel et al. 2021, "A White Paper on Neural
    Network Quantization", section 3.1, https://arxiv.org/abs/2106.08295).

    Args:
        bins: histogram bins of each sign, a power of two from 32 on. With an axis, each channel has so many.
        axis, averaging_constant, sync: see `Observer`.
    """

    def __init__(
        self, bins: int = 512, *, axis: int | None = None, averaging_constant: float = 0.01, sync: bool = True
    ) -> None:
        super().__init__(bins=bins, axis=axis, averaging_constant=averaging_constant, sync=sync)

    def _threshold(self, lo: int, hi: int, largest: Tensor) -> Tensor:
        return criteria.least_squared_error(self.histogram(largest), lo, hi, largest)


class KLObserver(HistogramObserver):
    """The threshold whose quantized distribution has the least relative entropy to the observed one.

    After Szymon Migacz 2017, "8-bit Inference with TensorRT" (GTC 2017), with these changes. The bins are logarithmic,
    where there they were a fraction of the largest value: an outlier so cannot hide how the others are distributed.
    A level's values are spread evenly over it, not over its bins that are not empty. uint8 has 256 levels, int8 128.
    Exact zeros have no say. At most half of the other values are clipped. See `criteria.relative_entropy`.

    One scale per tensor only, also before depthwise convolutions: a channel alone seldom has the many values that a
    comparison of distributions needs.

    Args:
        bins: histogram bins of each sign, a power of two from 32 on. From 2048 on they are narrower than int8's steps
            up to half of the threshold.
        averaging_constant, sync: see `Observer`.
    """

    allows_axis = False

    def __init__(
        self, bins: int = 2048, *, axis: int | None = None, averaging_constant: float = 0.01, sync: bool = True
    ) -> None:
        super().__init__(bins=bins, axis=axis, averaging_constant=averaging_constant, sync=sync)

    def _threshold(self, lo: int, hi: int, largest: Tensor) -> Tensor:
        return criteria.least_entropy(self.histogram(largest), lo, hi, largest)


class MixObserver(HistogramObserver):
    """Whichever threshold of min_max, percentile (99.99), mse and kl keeps the quantized values most similar.

    Similar to the real values by cosine, ``Σ x·q / sqrt(Σ x² · Σ q²)``, computed on the histogram. By squared error
    mse would win by definition; the cosine does not count a common factor, which clipping in particular brings about
    and the layers that follow can make up for. With an axis each channel chooses for itself, and kl is not among the
    candidates.

    Args:
        bins: histogram bins of each sign, a power of two from 32 on.
        axis, averaging_constant, sync: see `Observer`.
    """

    def __init__(
        self, bins: int = 1024, *, axis: int | None = None, averaging_constant: float = 0.01, sync: bool = True
    ) -> None:
        super().__init__(bins=bins, axis=axis, averaging_constant=averaging_constant, sync=sync)

    def _threshold(self, lo: int, hi: int, largest: Tensor) -> Tensor:
        histogram = self.histogram(largest)
        magnitudes = histogram.magnitudes(lo < 0)
        candidates = [
            largest,
            criteria.percentile(magnitudes, histogram.edges, 99.99, largest),
            criteria.least_squared_error(histogram, lo, hi, largest),
        ]
        if self.axis is None:
            candidates.append(criteria.least_entropy(histogram, lo, hi, largest))
        thresholds = torch.stack(candidates, -1)
        best = criteria.cosine(histogram, thresholds, lo, hi).argmax(-1, keepdim=True)
        return thresholds.gather(-1, best).squeeze(-1)
