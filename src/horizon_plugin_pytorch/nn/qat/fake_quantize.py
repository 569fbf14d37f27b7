"""Fake quantization: where an activation gets its integers, and a weight its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.autograd import RoundActivation, RoundWeight
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, along_channels, quantize
from horizon_plugin_pytorch.nn.quantized.tensors import KeepsDtype

TINY = torch.finfo(torch.float32).tiny
LEAST_LEARNED = 2.0**-64
"""What a learned scale is at least."""


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
    parts = [
        (name, m)
        for name, m in model.named_modules()
        if hasattr(type(m), "quantizes_inputs") or isinstance(m, FakeQuantize)
    ]
    calibrated = [(name, m) for name, m in parts if m.state is FakeQuantState.CALIBRATION and state is not m.state]
    for name, module in calibrated:
        if isinstance(module, FakeQuantize):
            module.check(name)
    for _, module in calibrated:
        if hasattr(module, "finish"):
            module.finish()  # type: ignore[operator]
    for _, module in parts:
        module.state = state  # type: ignore[assignment]


def autocast_dtype(device: str) -> torch.dtype:
    """What autocast would have a convolution compute in; float32 without it."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.float32


def without_autocast(device: str) -> AbstractContextManager[None]:
    """What lies between a convolution and the rounding is computed in float32."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def in_recomputation() -> bool:
    """Inside the backward pass, where gradient checkpointing runs a forward again: nothing is observed twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_floating_point(x: QTensor) -> Tensor:
    """The payload for training; a module in eval mode before it, say of a frozen part, made integers."""
    payload = x.payload
    return payload if payload.is_floating_point() else payload.float()


def in_integers(module: nn.Module, *xs: QTensor | None) -> list[Any]:
    """The tensors with integer payloads, for eval mode.

    Raises:
        QuantizationError: a gradient was to flow back through `module`, which computes in integers.
    """
    for x in xs:
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise QuantizationError(
                f"{getattr(module, 'path', '')!r} is in eval mode, where it computes in integers and passes no gradient, but modules before "
                "it are in training mode: keep it in training mode, too, with its norm in eval mode if that is what should stay as it is"
            )
    return [x if x is None or not x.payload.is_floating_point() else x.like(x.int_repr()) for x in xs]


class _HasScale(KeepsDtype):
    """A module with a scale: a buffer, or a parameter if it is learned; empty until there is one."""

    scale: Tensor

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        empty = torch.empty(0)
        if learned:
            self.scale = nn.Parameter(empty)
        else:
            self.register_buffer("scale", empty)

    @property
    def ready(self) -> bool:
        return self.scale.numel() > 0

    @torch.no_grad()
    def _store(self, scale: Tensor) -> None:
        """In the tensor that is there: an optimizer, DistributedDataParallel and CUDA graphs hold on to it."""
        if self.scale.shape == scale.shape:
            self.scale.copy_(scale)
        else:
            self.scale.data = scale.to(self.scale.device, torch.float32, copy=True)

    def snapshot(self) -> Tensor:
        """The scale as it is now; results computed with it stay what they are when training moves the scale."""
        scale = self.scale.detach().clone()
        return scale.abs_().clamp_(min=LEAST_LEARNED) if self.learned else scale

    def _trained(self, count: int, largest: int) -> Tensor:
        """The learned scale, with LSQ's gradient factor ``1 / sqrt(count * largest)`` (section 2.2).

        Args:
            count: of the weights, or of the features of one sample, that share `scale`'s values.
        """
        factor = 1 / sqrt(max(count, 1) / self.scale.numel() * largest)
        return _LearnedScale.apply(self.scale, factor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A scale may be empty in one model and filled in the other.
        scale = state_dict.get(prefix + "scale")
        if scale is not None and scale.shape != self.scale.shape and 0 in (scale.numel(), self.scale.numel()):
            self.scale.data = torch.empty_like(scale, device=self.scale.device, dtype=torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _LearnedScale(torch.autograd.Function):
    """A parameter as a scale: its magnitude, so that a step past zero does no harm; the gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(parameter)
        ctx.factor = factor
        return parameter.abs().clamp_(min=LEAST_LEARNED)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (parameter,) = ctx.saved_tensors
        return torch.where(parameter < 0, -ctx.factor, ctx.factor) * grad, None


class FakeQuantize(_HasScale):
    """Quantizes an activation with an observed, fixed or learned scale.

    Args:
        observer: makes the `Observer`; called with ``axis=``.
        dtype: ``qint8``, ``quint8``, or None: quint8 where no value can be negative, qint8 elsewhere.
        axis: None for one scale, 1 for one per channel.
        learned: train the scale by gradient (LSQ), from where calibration put it, instead of moving it with the data.

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
        super().__init__(learned)
        self.observer_factory = observer
        self.requested = None if dtype is None else parse_dtype(dtype)
        self.dtype8 = self.requested or torch.int8
        self.axis = axis
        self.limit: float | None = None  # no value exceeds it (ReLU6)
        self.fixed = False
        self.open = False  # calibration decides whether values can be negative
        self.observer = observer(axis=axis)
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
        """Fix the scale: it is neither observed nor learned any more.

        Raises:
            QuantizationError: a scale that is not positive and finite, or a zero point other than 0.
        """
        value = torch.as_tensor(scale, dtype=torch.float64)
        if zero_point not in (None, 0) or not bool(((value > 0) & torch.isfinite(value)).all()):
            raise QuantizationError(
                f"{self.path or 'FakeQuantize'}: scale must be positive and finite and zero_point 0, not {scale}, {zero_point}"
            )
        self.fixed = True
        if self.learned:
            self.learned = False
            del self.scale
            self.register_buffer("scale", torch.empty(0))
        self._store(value)

    # -- scale --------------------------------------------------------------------------------------------------------------

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
        self._store(self._observed())

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x.detach(), running=self.state is FakeQuantState.QAT)

    def _observed(self) -> Tensor:
        scale: Tensor = self.observer.scale(*self.bounds)
        given = hasattr(self.observer, "given")  # by the user, who may want a larger one
        return scale if self.limit is None or given else scale.clamp(max=self.limit / self.bounds[1])

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
                f"{self.path or 'a fake quantizer'!r} has no scale yet: run horizon.quantization.calibrate(model, data) first{training}"
            )

    # -- quantizing ---------------------------------------------------------------------------------------------------------

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
            scale = self._trained(y[:1].numel(), self.bounds[1])
        elif self.state is FakeQuantState.QAT and not (self.fixed or in_recomputation()):
            self.observe(y)
            scale = self._observed()
            self._store(scale)
        else:
            scale = self.current_scale()
        lo, hi = self.bounds
        dtype = autocast_dtype(y.device.type)
        shaped = scale if self.axis is None else along_channels(scale, y)
        payload = RoundActivation.apply(y, shaped, 0 if relu else lo, hi, relu, bound, dtype, fresh)
        return QTensor.make(payload, scale.detach(), self.dtype8, self.float_calls)

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "unsigned"] = torch.tensor(self.dtype8 == torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        unsigned = state_dict.pop(prefix + "unsigned", None)
        if unsigned is not None:
            self.dtype8 = torch.uint8 if bool(unsigned) else torch.int8
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        scale = (
            f"{self.scale.item():.6g}"
            if self.scale.numel() == 1
            else f"{self.scale.numel()} scales"
            if self.ready
            else "no scale yet"
        )
        return f"{scale}, {str(self.dtype8).removeprefix('torch.')}, {self.state.value}"


class WeightFakeQuantize(_HasScale):
    """Quantizes a weight per output channel to [-127, 127].

    Args:
        observer: a factory of an observer that chooses the scale when calibration ends; None: ``max|w| / 127``.
        learned: train the scales (LSQ), from what the observer chose.

    Without an observer and not learned, the scale is ``max|w| / 127`` at every moment, and there is no `scale`.
    """

    def __init__(self, observer: Callable[..., Any] | None = None, learned: bool = False) -> None:
        super().__init__(learned)
        self.observer_factory = observer
        if self.follows:
            self.scale = None  # type: ignore[assignment]

    @classmethod
    def with_args(cls, **kwargs: Any) -> Callable[..., WeightFakeQuantize]:
        return partial(cls, **kwargs)

    @property
    def follows(self) -> bool:
        """Whether the scale follows the weight, so that nothing is ever clipped."""
        return self.observer_factory is None and not self.learned

    def start(self, weight: Tensor, axis: int, groups: int) -> None:
        """Choose the scale for the weight as it is now, if it does not follow the weight."""
        if self.follows:
            return
        if self.observer_factory is None:
            scale = _max_scale(weight.detach(), axis, groups)
            # A channel of zeros may wake up: it starts with the largest scale of the others.
            largest = scale.amax()
            self._store(torch.where(scale > TINY, scale, torch.where(largest > TINY, largest, 1 / 127)))
        else:
            observer = self.observer_factory(axis=0).to(weight.device)
            observer.observe(_channels_first(weight.detach(), axis, groups), running=False)
            self._store(observer.scale(-127, 127))

    def scales(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        """float32 ``[C_out]``, without a gradient."""
        return _max_scale(weight.detach(), axis, groups) if self.follows else self.snapshot()

    def integers(self, weight: Tensor, axis: int, groups: int) -> tuple[Tensor, Tensor]:
        """For training: integers times `WEIGHT_UNIT` in a float tensor, differentiable; and their scales ``[C_out]``, constants."""
        if self.learned:
            scale = self._trained(weight.numel(), 127)
        else:
            scale = self.scales(weight, axis, groups)
        if self.follows:  # no gradient would find its way through the least scale there is, that of a channel of zeros
            scale = torch.where(scale > TINY, scale, 1.0)
        shaped = scale
        if axis == 1:
            shaped = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)
        shaped = shaped.view(*shaped.shape, *[1] * (weight.dim() - shaped.dim()))
        return RoundWeight.apply(weight, shaped, not self.follows), scale.detach()


def _channels_first(weight: Tensor, axis: int, groups: int) -> Tensor:
    if axis == 0:
        return weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _max_scale(weight: Tensor, axis: int, groups: int) -> Tensor:
    """``max|w[c]| / 127`` in float64, rounded once; as `reference.weight_scale`, without asking the host whether it is finite."""
    weight = _channels_first(weight, axis, groups)
    peak = weight.abs().amax(tuple(range(1, weight.dim()))).to(torch.float64)
    return (peak / 127).to(torch.float32).clamp_(min=TINY)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = {"qint8": torch.int8, "quint8": torch.uint8, torch.qint8: torch.int8, torch.quint8: torch.uint8}
    names |= {torch.int8: torch.int8, torch.uint8: torch.uint8}
    if dtype not in names:
        raise QuantizationError(f"dtype {dtype!r} is not supported: use qint8 or quint8")
    return names[dtype]
