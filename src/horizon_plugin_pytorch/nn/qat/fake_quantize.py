"""Fake quantization: where an activation gets its integers, and a weight its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.autograd import RoundActivation, RoundWeight
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, along_channels
from horizon_plugin_pytorch.nn.quantized.tensors import KeepsDtype

TINY = torch.finfo(torch.float32).tiny


class FakeQuantState(Enum):
    """What the fake quantization of a model does.

    CALIBRATION: observe, quantize nothing. QAT: quantize; in training mode observe, too. VALIDATION: quantize with the scales as
    they are. FLOAT: nothing, as the float model.
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

    Leaving CALIBRATION turns what was observed into scales; tensors in which nothing was ever negative become ``quint8`` where
    their qconfig leaves the dtype open.

    Raises:
        QuantizationError: calibration saw NaN or infinite values, naming the module; the state is unchanged.
    """
    state = FakeQuantState(state)
    quantizers = [(name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantize)]
    for name, quantizer in quantizers:
        if quantizer.state is FakeQuantState.CALIBRATION and state is not FakeQuantState.CALIBRATION:
            quantizer.check(name)
    for _, quantizer in quantizers:
        if quantizer.state is FakeQuantState.CALIBRATION and state is not FakeQuantState.CALIBRATION:
            quantizer.finish()
    for module in model.modules():
        if isinstance(module, (FakeQuantize, WeightFakeQuantize)) or hasattr(type(module), "quantizes_inputs"):
            module.state = state  # type: ignore[assignment]


def in_recomputation() -> bool:
    """Inside the backward pass, where gradient checkpointing runs a forward again: nothing is observed twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class FakeQuantize(KeepsDtype):
    """Quantizes an activation with an observed, fixed or learned scale.

    Args:
        observer: makes the `Observer`; called with ``axis=``.
        dtype: ``qint8``, ``quint8``, or None: quint8 where no value can be negative, qint8 elsewhere.
        axis: None for one scale, 1 for one per channel.
        learned: train the scale by gradient (LSQ) instead of moving it with the data.

    Input float, any shape. Output: the input itself while nothing is quantized (CALIBRATION, FLOAT); else a `QTensor`, of
    integers in a float tensor in training mode and of ``torch.int8`` / ``torch.uint8`` in eval mode.
    """

    def __init__(
        self,
        observer: Callable[..., Any],
        dtype: str | torch.dtype | None = None,
        axis: int | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.observer_factory = observer
        self.requested = None if dtype is None else parse_dtype(dtype)
        self.dtype8 = self.requested or torch.int8
        self.axis = axis
        self.learned = learned
        self.limit: float | None = None  # no value exceeds it (ReLU6)
        self.fixed = False
        self.open = False  # calibration decides whether values can be negative
        self.observer = observer(axis=axis)
        scale = torch.empty(0)  # empty until there is one
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.state = FakeQuantState.FLOAT
        self.path = ""
        self.float_calls: Counter[str] = Counter()

    @classmethod
    def with_args(cls, **kwargs: Any) -> Callable[..., FakeQuantize]:
        """A factory with these arguments, as a qconfig holds it."""
        return partial(cls, **kwargs)

    # -- set up by prepare --------------------------------------------------------------------------------------------------

    def per_channel(self, axis: int) -> None:
        """Use one scale per channel; before anything was observed."""
        self.axis = axis
        self.observer = self.observer_factory(axis=axis)

    def nonnegative(self) -> None:
        """No value is negative: use quint8 unless the qconfig asks for another dtype."""
        if self.requested is None:
            self.dtype8 = torch.uint8

    def set_qparams(self, scale: Tensor | float, zero_point: int | None = None) -> None:
        """Fix the scale: it is never observed again.

        Raises:
            QuantizationError: a scale that is not positive and finite, or a zero point other than 0.
        """
        value = torch.as_tensor(scale, dtype=torch.float64)
        if zero_point not in (None, 0) or not bool(((value > 0) & torch.isfinite(value)).all()):
            raise QuantizationError(f"{self.path or 'FakeQuantize'}: scale must be positive and finite and zero_point 0, not {scale}, {zero_point}")
        from horizon_plugin_pytorch.quantization.observers import FixedScaleObserver

        if value.dim() == 0:
            self.observer = FixedScaleObserver(scale=float(value))
        self.fixed = True
        self._set(value.to(torch.float32))

    # -- scale --------------------------------------------------------------------------------------------------------------

    @property
    def bounds(self) -> tuple[int, int]:
        return reference.integer_range(self.dtype8)

    @property
    def ready(self) -> bool:
        return self.scale.numel() > 0

    def _set(self, scale: Tensor) -> None:
        """A new tensor, never in place: graphs of earlier steps keep the scale they were computed with."""
        if self.limit is not None:
            scale = torch.clamp(scale, max=self.limit / self.bounds[1])
        if self.learned:
            self.scale = nn.Parameter(scale.to(self.scale.device))
        else:
            self.scale = scale

    def fresh_observer(self) -> Any:
        """An observer that has seen nothing; a fixed scale stays."""
        return self.observer if self.fixed else self.observer_factory(axis=self.axis).to(self.scale.device)

    def check(self, name: str) -> None:
        self.observer.check(name)

    def finish(self) -> None:
        """Turn what was observed into a scale."""
        if self.fixed or self.observer.empty:
            return
        if self.open and self.requested is None:
            self.dtype8 = torch.int8 if bool((self.observer.low < 0).any()) else torch.uint8
        self._set(self.observer.scale(*self.bounds))

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x.detach(), running=self.state is FakeQuantState.QAT)

    def current_scale(self) -> Tensor:
        """The scale, with the gradient scaling of LSQ where it is learned.

        Raises:
            QuantizationError: there is none yet.
        """
        if not self.ready:
            raise QuantizationError(
                f"{self.path or 'a fake quantizer'!r} has no scale yet: run horizon.quantization.calibrate(model, data) first, "
                "or train in FakeQuantState.QAT"
            )
        return self.scale

    # -- quantizing ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.state is FakeQuantState.CALIBRATION:
            self.observe(x)
        if not self.state.quantizes:
            return x
        if self.training:
            return self.train_quantize(x.float())
        scale = self.current_scale().detach()
        q = reference.quantize(x, scale, self.dtype8, self.axis, check=True)
        return QTensor.make(q, scale, self.dtype8, self.float_calls)

    def train_quantize(self, y: Tensor, relu: bool = False, bound: float | None = None, fresh: bool = False) -> QTensor:
        """Activation and rounding of a float32 tensor, with straight-through gradients; `fresh`: it may be overwritten."""
        if self.state is FakeQuantState.QAT and not (self.learned or self.fixed or in_recomputation()):
            self.observe(y)
            self._set(self.observer.scale(*self.bounds))
        elif self.learned and not self.ready:
            self.observe(y)
            self._set(self.observer.scale(*self.bounds))
        scale = self.current_scale()
        lo, hi = self.bounds
        if self.learned:
            scale = _scale_gradient(scale, 1 / sqrt(y.numel() / scale.numel() * hi))
        lo = max(lo, 0) if relu else lo
        shaped = along_channels(scale, y) if self.axis == 1 else scale
        inplace = fresh and not self.learned
        payload = RoundActivation.apply(y, shaped, 0.0 if relu else lo - 0.5, lo, hi, bound, inplace)
        if torch.is_autocast_enabled(y.device.type):
            payload = payload.to(torch.get_autocast_dtype(y.device.type))
        return QTensor.make(payload, scale, self.dtype8, self.float_calls)

    # -- checkpoints: a scale may be empty in one model and filled in the other ---------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "unsigned"] = torch.tensor(self.dtype8 == torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        unsigned = state_dict.pop(prefix + "unsigned", None)
        if unsigned is not None:
            self.dtype8 = torch.uint8 if bool(unsigned) else torch.int8
        scale = state_dict.get(prefix + "scale")
        if scale is not None and scale.shape != self.scale.shape:
            empty = torch.empty_like(scale, device=self.scale.device)
            self.scale = nn.Parameter(empty) if self.learned else empty  # type: ignore[assignment]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        scale = f"{self.scale.item():.6g}" if self.scale.numel() == 1 else f"{self.scale.numel()} scales" if self.ready else "no scale yet"
        return f"{scale}, {str(self.dtype8).removeprefix('torch.')}, {self.state.value}"


class WeightFakeQuantize(KeepsDtype):
    """Quantizes a weight per output channel to [-127, 127].

    Args:
        observer: a factory of an observer to choose the scale with, once, when calibration ends; None: ``max|w| / 127``, always.
        learned: train the scales (LSQ).
    """

    def __init__(self, observer: Callable[..., Any] | None = None, learned: bool = False) -> None:
        super().__init__()
        self.observer_factory, self.learned = observer, learned
        if learned:
            self.scale = nn.Parameter(torch.empty(0))
        else:
            self.register_buffer("scale", torch.empty(0) if observer is not None else None)
        self.state = FakeQuantState.FLOAT

    @classmethod
    def with_args(cls, **kwargs: Any) -> Callable[..., WeightFakeQuantize]:
        return partial(cls, **kwargs)

    def scales(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        """float32 ``[C_out]``."""
        if self.observer_factory is None and not self.learned:
            return _max_scale(weight, axis, groups)
        assert self.scale is not None
        if self.scale.numel() == 0:
            if self.observer_factory is not None:
                observer = self.observer_factory(axis=0)
                observer.observe(_channels_first(weight.detach(), axis, groups), running=False)
                scale = observer.scale(-127, 127)
            else:
                scale = _max_scale(weight, axis, groups)
            self.scale = nn.Parameter(scale) if self.learned else scale  # type: ignore[assignment]
        scale = self.scale
        if self.learned and self.training:
            scale = _scale_gradient(scale, 1 / sqrt(weight.numel() / scale.numel() * 127))
        return scale  # type: ignore[return-value]

    def integers(self, weight: Tensor, scales: Tensor, axis: int, groups: int) -> Tensor:
        """Integer-valued float weight times `WEIGHT_UNIT`, differentiable."""
        if axis == 1:
            shaped = scales.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)
            shaped = shaped.reshape(*shaped.shape, *[1] * (weight.dim() - 2))
        else:
            shaped = scales.view(-1, *[1] * (weight.dim() - 1))
        return RoundWeight.apply(weight, shaped)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        scale = state_dict.get(prefix + "scale")
        if scale is not None and self.scale is not None and scale.shape != self.scale.shape:
            empty = torch.empty_like(scale, device=self.scale.device)
            self.scale = nn.Parameter(empty) if self.learned else empty  # type: ignore[assignment]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _channels_first(weight: Tensor, axis: int, groups: int) -> Tensor:
    if axis == 0:
        return weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _max_scale(weight: Tensor, axis: int, groups: int) -> Tensor:
    """``max|w[c]| / 127`` in float64, rounded once; as `reference.weight_scale`, without asking the host whether it is finite."""
    peak = _channels_first(weight.detach(), axis, groups).flatten(1).abs().amax(1).to(torch.float64)
    return (peak / 127).to(torch.float32).clamp_(min=TINY)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return (x - x * factor).detach() + x * factor


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = {"qint8": torch.int8, "quint8": torch.uint8, torch.qint8: torch.int8, torch.quint8: torch.uint8}
    names |= {torch.int8: torch.int8, torch.uint8: torch.uint8}
    if dtype not in names:
        raise QuantizationError(f"dtype {dtype!r} is not supported: use qint8 or quint8")
    return names[dtype]
