"""The fused modules on integers, ``horizon.nn.quantized.ConvAddReLU2d``, …; `FloatFunctional`; `QTensor`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from horizon_plugin_pytorch.fusion.patterns import ANCHORS, Pattern, grid
from horizon_plugin_pytorch.nn.quantized.functional import FloatFunctional

if TYPE_CHECKING:
    from horizon_plugin_pytorch.nn.quantized.group import QuantizedGroup


def _patterns() -> list[Pattern]:
    """Without norm: it is absorbed."""
    return [p for p in (*grid(), *map(Pattern, ANCHORS)) if not p.norm]


@cache
def group_class(pattern: Pattern) -> type[QuantizedGroup]:
    """The class of a pattern, importable under its name."""
    from horizon_plugin_pytorch.nn.quantized.group import QuantizedGroup

    return type(
        pattern.name, (QuantizedGroup,), {"pattern": pattern, "__module__": __name__, "__doc__": QuantizedGroup.__doc__}
    )


def __getattr__(name: str) -> Any:
    if name == "QTensor":
        from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor

        return QTensor
    for pattern in _patterns():
        if pattern.name == name:
            return group_class(pattern)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["FloatFunctional", "QTensor", "group_class", *(p.name for p in _patterns())]


__all__ = ["FloatFunctional", "group_class"]
