"""Fake quantization of activations: what it does in which state, and where the integers come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.autograd import RoundActivation
from horizon_plugin_pytorch.nn.qat.modes import autocast_dtype, in_recomputation
from horizon_plugin_pytorch.nn.qat.scale import HasScale
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, along_channels, quantize
from horizon_plugin_pytorch.nn.quantized.tensors import MakesIntegers


class FakeQuantState(Enum):
    """What the fake quantization of a model does.

    CALIBRATION: observe, quantize nothing. QAT: quantize; in training mode observe, too. VALIDATION: quantize with the
    scales as they are. FLOAT: nothing, as the float model.
    """

    CALIBRATION = "calibration"
    QAT = "qat"
    VALIDATION = "validation"
    FLOAT = "float"

    @property
    def quantizes(self) -> bool:
        return self in (FakeQuantState.QAT, FakeQuantState.VALIDATION)


def set_fake_quantize(model: nn.Module, state: FakeQuantState) -> None:
    """Set the state of every quantizer of a prepared model.

    Leaving CALIBRATION turns what was observed into scales; tensors in which nothing was ever negative become ``quint8``
    where their qconfig leaves the dtype open.

    Raises:
        QuantizationError: calibration saw NaN or infinite values, naming the module; the state is unchanged.
    """
    state = FakeQuantState(state)
    parts = [
        (name, m)
        for name, m in model.named_modules()
        if hasattr(type(m), "quantizes_inputs") or isinstance(m, FakeQuantize)
    ]
    finished = [(name, m) for name, m in parts if m.state is FakeQuantState.CALIBRATION and state is not m.state]
    for name, module in finished:
        if isinstance(module, FakeQuantize):
            module.check(name)
    for _, module in finished:
        if hasattr(module, "finish"):
            module.finish()
    for _, module in parts:
        module.state = state


class FakeQuantize(HasScale, MakesIntegers):  # type: ignore[misc]  # there, None is a scale, too
    """Quantizes an activation with an observed, fixed or learned scale.

    Args:
        observer: makes the `Observer`; called with ``axis=``.
        dtype: ``qint8``, ``quint8``, or None: quint8 where no value can be negative, qint8 elsewhere.
        axis: None for one scale, 1 for one per channel.
        learned: train the scale by gradient (LSQ), from where calibration put it, instead of moving it with the data.

    Input float, any shape. Output: the input itself while nothing is quantized (CALIBRATION, FLOAT); else a `QTensor`,
    of integers in a float tensor in training mode and of ``torch.int8`` / ``torch.uint8`` in eval mode.
    """

    def __init__(
        self,
        observer: Callable[..., Any],
        dtype: str | torch.dtype | None = None,
        axis: int | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__(learned)
        self.observer_factory = observer
        self.requested = None if dtype is None else parse_dtype(dtype)
        self.dtype8 = self.requested or torch.int8
        self.axis = axis
        self.limit: float | None = None  # no value exceeds it (ReLU6)
        self.fixed = False
        self.open = False  # calibration decides whether values can be negative
        self.observer = observer(axis=axis)
        if not self.observer.empty:  # a given scale
            self.store(self._observed())
        self.state = FakeQuantState.FLOAT
        self.path = ""
        self.float_calls: Counter[str] = Counter()

    @classmethod
    def with_args(cls, **kwargs: Any) -> Callable[..., FakeQuantize]:
        """A factory with these arguments, as a qconfig holds it."""
        return partial(cls, **kwargs)

    # -- set up by prepare ---------------------------------------------------------------------------------------------

    def per_channel(self, axis: int) -> None:
        """Use one scale per channel, if the observer's kind can; before anything was observed."""
        if self.observer.allows_axis:
            self.axis = axis
            self.observer = self.observer_factory(axis=axis)

    def nonnegative(self) -> None:
        """No value is negative: use quint8 unless the qconfig asks for another dtype."""
        if self.requested is None:
            self.dtype8 = torch.uint8

    def set_qparams(self, scale: Tensor | float, zero_point: int | None = None) -> None:
        """Fix the scale: it is neither observed nor learned any more.

        Raises:
            QuantizationError: a scale that is not positive and finite, or a zero point other than 0.
        """
        value = torch.as_tensor(scale, dtype=torch.float64)
        if zero_point not in (None, 0) or not bool(((value > 0) & torch.isfinite(value)).all()):
            raise QuantizationError(
                f"{self.path or 'FakeQuantize'}: scale must be positive and finite and zero_point 0, not {scale}, "
                f"{zero_point}"
            )
        self.fixed = True
        if self.learned:
            self.learned = False
            del self.scale
            self.register_buffer("scale", torch.empty(0))
        self.store(value)

    # -- scale ---------------------------------------------------------------------------------------------------------

    @property
    def bounds(self) -> tuple[int, int]:
        return reference.integer_range(self.dtype8)

    def fresh_observer(self) -> Any:
        """An observer that has seen nothing."""
        return self.observer_factory(axis=self.axis).to(self.scale.device)

    def check(self, name: str) -> None:
        self.observer.check(name)

    def finish(self) -> None:
        """Turn what was observed into a scale."""
        if self.fixed or self.observer.empty:
            return
        if self.open and self.requested is None:
            self.dtype8 = torch.int8 if bool((self.observer.low < 0).any()) else torch.uint8
        self.store(self._observed())

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x.detach(), running=self.state is FakeQuantState.QAT)

    def _observed(self) -> Tensor:
        scale: Tensor = self.observer.scale(*self.bounds)
        given = hasattr(self.observer, "given")  # by the user, who may want a larger one
        return scale if self.limit is None or given else scale.clamp(max=self.limit / self.bounds[1])

    @property
    def _moves(self) -> bool:
        """Training moves the scale with the data."""
        settled = self.ready and self.observer.averaging_constant == 0
        return self.state is FakeQuantState.QAT and not (self.fixed or settled)

    def current_scale(self) -> Tensor:
        """A copy of the scale.

        Raises:
            QuantizationError: there is none yet.
        """
        self._require_scale()
        return self.snapshot()

    def _require_scale(self) -> None:
        if not self.ready:
            training = "" if self.learned else ", or train in FakeQuantState.QAT"
            raise QuantizationError(
                f"{self.path or 'a fake quantizer'!r} has no scale yet: run horizon.quantization.calibrate(model, data) "
                f"first{training}"
            )

    # -- quantizing ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.state is FakeQuantState.CALIBRATION:
            self.observe(x)
        if not self.state.quantizes:
            return x
        if self.training:
            return self.train_quantize(x.float())
        return quantize(x, self.current_scale(), self.dtype8, self.path, self.float_calls)

    def train_quantize(self, y: Tensor, relu: bool = False, bound: float | None = None, fresh: bool = False) -> QTensor:
        """Activation and rounding of a float32 tensor, with straight-through gradients; `fresh`: it may be overwritten.

        Under autocast the integers are in its dtype, which holds them exactly.
        """
        if self.learned:
            self._require_scale()
            scale = self.trained(y[:1].numel(), self.bounds[1])
        elif self._moves and not in_recomputation():
            self.observe(y)
            scale = self._observed()
            self.store(scale)
        else:
            scale = self.current_scale()
        lo, hi = self.bounds
        dtype = autocast_dtype(y.device.type)
        overwrite = fresh and not self.learned and dtype == torch.float32
        shaped = scale if self.axis is None else along_channels(scale, y)
        payload = RoundActivation.apply(y, shaped, 0 if relu else lo, hi, relu, bound, dtype, overwrite)
        return QTensor.make(payload, scale.detach(), self.dtype8, self.float_calls)

    def extra_repr(self) -> str:
        count = self.scale.numel()
        scale = "no scale yet" if count == 0 else f"{count} scales"
        if count == 1 and not self.scale.is_meta:
            scale = f"{self.scale.item():.6g}"
        return f"{scale}, {str(self.dtype8).removeprefix('torch.')}, {self.state.value}"


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = {"qint8": torch.int8, "quint8": torch.uint8, torch.qint8: torch.int8, torch.quint8: torch.uint8}
    names |= {torch.int8: torch.int8, torch.uint8: torch.uint8}
    if dtype not in names:
        raise QuantizationError(f"dtype {dtype!r} is not supported: use qint8 or quint8")
    return names[dtype]
