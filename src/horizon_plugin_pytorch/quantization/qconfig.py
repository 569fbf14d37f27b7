"""How a module is quantized: factories for the quantizer of its output and the one of its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.nn.qat.weight import WeightFakeQuantize
from horizon_plugin_pytorch.quantization.observers import make_observer


@dataclass(frozen=True)
class QConfig:
    """Factories without arguments; `activation` None leaves the output in high precision (float32)."""

    activation: Callable[[], FakeQuantize] | None
    weight: Callable[[], WeightFakeQuantize]


def get_default_qconfig(
    activation_fake_quant: str | None = "fake_quant",
    weight_fake_quant: str | None = "fake_quant",
    activation_observer: str = "min_max",
    weight_observer: str = "min_max",
    activation_qkwargs: dict[str, Any] | None = None,
    weight_qkwargs: dict[str, Any] | None = None,
) -> QConfig:
    """A qconfig by names.

    Args:
        activation_fake_quant: ``fake_quant``, ``lsq`` (the scale is learned) or None (high-precision output).
        weight_fake_quant: ``fake_quant`` or ``lsq``.
        activation_observer: ``min_max``, ``percentile``, ``mse``, ``kl``, ``mix`` or ``fixed_scale``. ``kl`` has one scale per
            tensor, also for a tensor that only depthwise convolutions read, which has one per channel with the others.
        weight_observer: ``min_max`` (``max|w| / 127`` per output channel, always) or one of the others but ``kl``, used once.
        activation_qkwargs: ``dtype`` (``qint8``, ``quint8``; by default quint8 where nothing can be negative) and the
            observer's own arguments, e.g. ``averaging_constant`` or ``percentile``.
        weight_qkwargs: the weight observer's arguments.

    Raises:
        QuantizationError: an unknown name or argument, or a weight observer that has one scale per tensor only.
    """
    kinds = ("fake_quant", "lsq")
    for name, value in (("activation_fake_quant", activation_fake_quant), ("weight_fake_quant", weight_fake_quant)):
        if value not in kinds and not (value is None and name.startswith("activation")):
            raise QuantizationError(f"get_default_qconfig: {name}={value!r} is not one of {kinds}")
    for name, given in (("activation_qkwargs", activation_qkwargs), ("weight_qkwargs", weight_qkwargs)):
        if "axis" in (given or {}):
            raise QuantizationError(
                f"get_default_qconfig: {name} cannot choose an axis: a weight has one scale per output channel, and so has "
                "what only depthwise convolutions read; anything else has one scale"
            )
    options = dict(activation_qkwargs or {})
    dtype = options.pop("dtype", None)
    activation = None
    if activation_fake_quant is not None:
        observer = partial(make_observer, activation_observer, **options)
        observer()  # a wrong name or argument shows here, not at prepare
        activation = FakeQuantize.with_args(observer=observer, dtype=dtype, learned=activation_fake_quant == "lsq")
        activation()
    of_weight = partial(make_observer, weight_observer, **(weight_qkwargs or {}))
    of_weight(axis=0)
    weight = WeightFakeQuantize.with_args(
        observer=None if weight_observer == "min_max" else of_weight, learned=weight_fake_quant == "lsq"
    )
    return QConfig(activation, weight)


default_calib_qconfig = get_default_qconfig()
"""For calibration: extremes of all data."""
default_qat_qconfig = get_default_qconfig()
"""For training: moving extremes."""
default_qat_out_qconfig = get_default_qconfig(activation_fake_quant=None)
"""For a model's last operator: float32 output without a rounding."""

QConfigDict = dict[str, Any]


class Resolver:
    """Which qconfig a module has: by name (the longest prefix) > by type > global.

    Args:
        qconfig_dict: ``{"": qconfig, "module_type": [(type, qconfig)], "module_name": [(name, qconfig)]}``; a qconfig None
            leaves the module in float.

    Raises:
        QuantizationError: a key or value that is none of these, or a name that `model` does not have.
    """

    def __init__(
        self, qconfig_dict: QConfigDict | None, model: nn.Module, known_names: frozenset[str] = frozenset()
    ) -> None:
        config = {"": default_qat_qconfig, **(qconfig_dict or {})}
        unknown = set(config) - {"", "module_type", "module_name"}
        if unknown:
            raise QuantizationError(
                f"qconfig_dict: unknown keys {sorted(unknown)}; use '', 'module_type' and 'module_name'"
            )
        self.default: QConfig | None = config[""]
        self.types = dict(config.get("module_type", []))
        self.names = dict(config.get("module_name", []))
        for value in (self.default, *self.types.values(), *self.names.values()):
            check_qconfig(value)
        known = {name for name, _ in model.named_modules(remove_duplicate=False)} | known_names
        for name in self.names:
            if name not in known:
                raise QuantizationError(f"qconfig_dict: the model has no module {name!r}")

    def __call__(self, names: tuple[str, ...], types: tuple[type, ...]) -> QConfig | None:
        """The qconfig of a module that has these names (of a group: those of all its parts) and types."""
        best, found = -1, self.default
        for own in self.types:
            if any(issubclass(t, own) for t in types):
                best, found = 0, self.types[own]
                break
        for prefix, qconfig in self.names.items():
            for name in names:
                if (name == prefix or name.startswith(f"{prefix}.")) and len(prefix) > best:
                    best, found = len(prefix), qconfig
        return found


def check_qconfig(value: Any) -> None:
    if value is not None and not isinstance(value, QConfig):
        raise QuantizationError(
            f"{type(value).__name__} is not a qconfig of this package: make one with horizon.quantization.get_default_qconfig"
        )
