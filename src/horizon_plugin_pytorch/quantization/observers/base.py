"""What every observer does: follow a tensor's extremes, agree on them across processes, make a scale of a threshold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized.tensors import KeepsDtype

LEAST_SCALE = 2.0**-64
"""No scale is smaller: ratios of scales stay inside float32's range, and far from its denormal numbers."""

LEAST_SHARE = 2.0**-24
"""No channel's threshold is smaller than this share of the tensor's largest magnitude: float32's own resolution."""


class Observer(KeepsDtype):
    """Decides the scale of a tensor from the values it takes. Base class; a subclass's `_threshold` says how.

    The scale is symmetric with zero point 0: ``scale = threshold / hi``, computed in float64 and rounded once to
    float32.

    Args:
        axis: None for one scale per tensor, else the dimension that has one scale per index (channel).
        averaging_constant: how far a training step moves the statistics, ``new = old + c * (current - old)``, in
            [0, 1]. With 0 they stay as they are once there are any, and observing costs nothing.
        sync: with `torch.distributed` initialized, combine each batch with those of the other ranks, so that all have
            the same statistics and scales. Every rank must then observe equally often; an empty tensor counts as
            zeros. Set it to False to observe on one rank only.

    The statistics are buffers. They are empty until something was observed, so ``state_dict`` says which it was, and
    loading resizes them; they keep their dtype when the model's is changed.

    Raises:
        QuantizationError: an argument out of range.
    """

    statistics: tuple[str, ...] = ("low", "high")
    """The buffers that `reset` empties."""
    allows_axis = True
    """Whether this kind can have one scale per channel."""

    low: Tensor
    """The least value: float32, [] or [channels]; empty before the first observation."""
    high: Tensor
    """The largest value, likewise."""

    def __init__(self, *, axis: int | None = None, averaging_constant: float = 0.01, sync: bool = True) -> None:
        super().__init__()
        kind = type(self).__name__
        if not 0 <= averaging_constant <= 1:
            raise QuantizationError(f"{kind}: averaging_constant is {averaging_constant}; it must be in [0, 1]")
        if axis is not None and not self.allows_axis:
            raise QuantizationError(
                f"{kind} has one scale per tensor only: use min_max, percentile, mse or mix with an axis"
            )
        self.axis = axis
        self.averaging_constant = averaging_constant
        self.sync = sync
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))

    # -- observing ---------------------------------------------------------------------------------------------------

    def observe(self, x: Tensor, running: bool) -> None:
        """Take in a batch.

        Nothing here depends on the data on the host: it never waits for the device.

        Args:
            x: floating point, any shape and memory format; not changed.
            running: False to calibrate: all values seen so far count equally. True to train: a moving average, which
                the first batch starts.

        Raises:
            QuantizationError: `x` has no dimension `axis`, or another number of channels than before.
        """
        if running and self.averaging_constant == 0 and not self._fresh:
            return
        shared = self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if x.numel() == 0 and not shared:
            return
        self._check_shape(x)
        # What is kept must be usable in training even if calibration ran in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            low, high = extremes(x, self.axis)
            if shared:
                # NaN has no defined maximum across ranks, infinity has; the sign turns a minimum into a maximum.
                both = torch.stack((-low, high)).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
                dist.all_reduce(both, dist.ReduceOp.MAX)
                low, high = -both[0], both[1].clone()
            self._accumulate(x, low, high, running, shared)

    def _accumulate(self, x: Tensor, low: Tensor, high: Tensor, running: bool, shared: bool) -> None:
        """Take in a batch whose extremes, over all ranks if `shared`, are known."""
        if self._fresh:
            self.low, self.high = low, high
        elif running:
            self.low.lerp_(low, self.averaging_constant)
            self.high.lerp_(high, self.averaging_constant)
        else:
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)

    def _check_shape(self, x: Tensor) -> None:
        if self.axis is None:
            return
        kind, shape = type(self).__name__, tuple(x.shape)
        if not -x.dim() <= self.axis < x.dim():
            raise QuantizationError(
                f"{kind}: a tensor of shape {shape} has no dimension {self.axis} to have scales along"
            )
        if not self._fresh and x.shape[self.axis] != self.low.numel():
            raise QuantizationError(
                f"{kind}: {shape[self.axis]} channels in a tensor of shape {shape}, {self.low.numel()} before"
            )

    @property
    def _fresh(self) -> bool:
        return self.low.numel() == 0

    @property
    def empty(self) -> bool:
        """Whether there is no scale yet, because nothing was observed."""
        return self._fresh

    def reset(self) -> None:
        """Forget what was observed."""
        for name in self.statistics:
            setattr(self, name, getattr(self, name).new_empty(0))

    def check(self, name: str) -> None:
        """Refuse data that held NaN or infinite values. Waits for the device.

        Args:
            name: path of the observed module, for the message.

        Raises:
            QuantizationError: (a ValueError) naming the module and, with one scale per channel, the channels.
        """
        bad = ~(torch.isfinite(self.low) & torch.isfinite(self.high))
        if not bool(bad.any()):
            return
        where = ""
        if bad.dim():
            channels = bad.nonzero().flatten().tolist()
            where = f" in channels {channels[:8]}{' …' if len(channels) > 8 else ''}"
        raise QuantizationError(
            f"{name}: NaN or infinite values were observed{where}; look for them in the calibration data and in the "
            "float model's outputs, then calibrate again"
        )

    # -- scale -------------------------------------------------------------------------------------------------------

    def scale(self, lo: int, hi: int) -> Tensor:
        """The scale for integers in [lo, hi].

        Args:
            lo: -128 for int8 (or -127), 0 for uint8; with 0, negative values clamp to 0 and have no say.
            hi: 127 or 255.

        Returns:
            float32, [] or [channels], on the device of the statistics. Positive and never denormal for finite data:
            what was always zero gets the largest magnitude of the whole tensor as its threshold (zero is exact with
            any scale, and a channel that wakes up later is not clipped), 1 if the whole tensor was zero; no channel's
            threshold is smaller than ``2**-24`` of the tensor's, and no scale smaller than ``2**-64``. NaN or
            infinite data give a scale of NaN or infinity.

        Raises:
            QuantizationError: nothing was observed.
        """
        if self.empty:
            raise QuantizationError(f"{type(self).__name__} has no scale: nothing was observed; calibrate first")
        with torch.no_grad():
            largest = self._largest(lo)
            overall = largest.amax()
            threshold = torch.maximum(self._threshold(lo, hi, largest), overall * LEAST_SHARE)
            threshold = torch.where(largest == 0, torch.where(overall == 0, 1.0, overall), threshold)
            return (threshold / hi).clamp(min=LEAST_SCALE).to(torch.float32)

    def _largest(self, lo: int) -> Tensor:
        """float64: the largest magnitude that integers from `lo` on can stand for."""
        low, high = self.low.double(), self.high.double()
        return torch.maximum(-low, high) if lo < 0 else high.clamp(min=0)

    def _threshold(self, lo: int, hi: int, largest: Tensor) -> Tensor:
        """float64: the value that `hi` stands for, at most `largest`."""
        raise NotImplementedError

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.statistics:
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if value is not None and value.shape != own.shape and self._fits(name, value):
                setattr(self, name, torch.empty(value.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fits(self, name: str, value: Tensor) -> bool:
        """Whether a saved statistic is of an observer like this one; if not, loading reports its shape as an error."""
        return value.numel() == 0 or value.dim() == (self.axis is not None)

    def extra_repr(self) -> str:
        axis = "" if self.axis is None else f"axis={self.axis}, "
        return f"{axis}averaging_constant={self.averaging_constant:g}{', empty' if self.empty else ''}"


class MinMaxObserver(Observer):
    """Nothing is clipped: ``scale = max(|min|, |max|) / hi`` for int8, ``max(max, 0) / hi`` for uint8.

    Calibration keeps the extremes ever seen; training keeps moving averages of each batch's two extremes (Jacob et
    al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section
    3.1, https://arxiv.org/abs/1712.05877). One pass over the data.
    """

    def _threshold(self, lo: int, hi: int, largest: Tensor) -> Tensor:
        return largest


class FixedScaleObserver(Observer):
    """A scale that is given, e.g. 1/128 for a camera's pixels; the data do not change it.

    Calibration looks at the data all the same, so that `check` finds NaN; training does not.

    Args:
        scale: positive; with an `axis` one for all channels, or one for each.

    Raises:
        QuantizationError: a scale that is not positive, finite and a normal float32 number.
    """

    given: Tensor

    def __init__(
        self,
        scale: float | Tensor,
        *,
        axis: int | None = None,
        averaging_constant: float = 0.01,
        sync: bool = True,
    ) -> None:
        super().__init__(axis=axis, averaging_constant=averaging_constant, sync=sync)
        given = torch.as_tensor(scale, dtype=torch.float64).detach().to(torch.float32).clone()
        info = torch.finfo(torch.float32)
        if not bool(((given >= info.tiny) & (given <= info.max)).all()):
            raise QuantizationError(
                f"FixedScaleObserver: scale must be positive, finite and not denormal in float32, not {scale}"
            )
        if given.dim() and (axis is None or given.dim() > 1):
            raise QuantizationError(f"FixedScaleObserver: scales of shape {tuple(given.shape)} do not fit axis={axis}")
        self.register_buffer("given", given)

    @property
    def _spread(self) -> bool:
        """One given scale for channels whose number only the data tell."""
        return self.axis is not None and self.given.dim() == 0

    @property
    def empty(self) -> bool:
        return self._spread and self._fresh

    def observe(self, x: Tensor, running: bool) -> None:
        if not running or self.empty:
            super().observe(x, running)

    def _check_shape(self, x: Tensor) -> None:
        super()._check_shape(x)
        if self.given.dim() and x.shape[self.axis] != self.given.numel():  # type: ignore[index]
            raise QuantizationError(
                f"FixedScaleObserver: {self.given.numel()} scales for a tensor of shape {tuple(x.shape)}"
            )

    def scale(self, lo: int, hi: int) -> Tensor:
        """The given scale, whatever `lo` and `hi` are.

        Raises:
            QuantizationError: one scale was given for all channels, and nothing was observed that tells how many
                there are.
        """
        if self.empty:
            raise QuantizationError(
                "FixedScaleObserver: the number of channels is not known before something was observed"
            )
        return self.given.expand(self.low.shape).clone() if self._spread else self.given.clone()

    def extra_repr(self) -> str:
        given = (
            f"{self.given.item():g}"
            if self.given.dim() == 0 and not self.given.is_meta
            else f"{self.given.numel()} scales"
        )
        return f"{given}, {super().extra_repr()}"


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The least and the largest value, float32, [] or [channels]; 0 where there is none. NaN if a value is NaN."""
    if x.numel() == 0:
        none = torch.zeros(() if axis is None else x.shape[axis], device=x.device)
        return none, none.clone()
    if axis is None:
        low, high = torch.aminmax(in_memory_order(x))
    else:
        # Over several dimensions these two are faster than one aminmax, in either memory format. A dimension is
        # added, because amin over no dimension at all means over every one.
        others = [d for d in range(x.dim()) if d != axis % x.dim()]
        low, high = x.unsqueeze(-1).amin([*others, -1]), x.unsqueeze(-1).amax([*others, -1])
    return low.to(torch.float32), high.to(torch.float32)


def in_memory_order(x: Tensor) -> Tensor:
    """`x` with its dimensions in the order they lie in memory: reducing or flattening it then copies nothing if it is
    dense."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
