"""Observers decide the scale of a tensor from the values it takes. One subject a file:

- `base`: the extremes, agreement across processes, scales; `MinMaxObserver`, `FixedScaleObserver`
- `histogram`: counting values, and the base of what needs that
- `criteria`: what makes a threshold a good one, as functions
- `clipping`: `PercentileObserver`, `MSEObserver`, `KLObserver`, `MixObserver`
"""

from __future__ import annotations

from typing import Any

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.quantization.observers.base import FixedScaleObserver, MinMaxObserver, Observer
from horizon_plugin_pytorch.quantization.observers.clipping import (
    KLObserver,
    MixObserver,
    MSEObserver,
    PercentileObserver,
)

OBSERVERS: dict[str, type[Observer]] = {
    "min_max": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "kl": KLObserver,
    "mix": MixObserver,
    "fixed_scale": FixedScaleObserver,
}
"""The observers by the names that qconfigs use."""


def make_observer(name_or_class: str | type[Observer], **kwargs: Any) -> Observer:
    """An observer by name (a key of `OBSERVERS`) or class, with its arguments.

    Raises:
        QuantizationError: no observer of that name, not an observer class, or an argument it does not take or refuses.
    """
    kind = OBSERVERS.get(name_or_class) if isinstance(name_or_class, str) else name_or_class
    if not (isinstance(kind, type) and issubclass(kind, Observer)):
        raise QuantizationError(
            f"{name_or_class!r} is no observer: use one of {', '.join(OBSERVERS)}, or a subclass of Observer"
        )
    try:
        return kind(**kwargs)
    except TypeError as error:
        raise QuantizationError(f"{kind.__name__}: {error}") from error


__all__ = [
    "OBSERVERS",
    "FixedScaleObserver",
    "KLObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MixObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
]
