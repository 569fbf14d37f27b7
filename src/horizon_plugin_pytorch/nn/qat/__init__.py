"""QAT forms of the fused modules: ``horizon.nn.qat.ConvBNReLU2d``, …, one for every pattern and the bare anchors."""

from __future__ import annotations

from functools import cache

from horizon_plugin_pytorch.fusion.patterns import ANCHORS, Pattern, grid
from horizon_plugin_pytorch.nn.qat.group import QATGroup


def _patterns() -> list[Pattern]:
    return [*grid(), *map(Pattern, ANCHORS)]


@cache
def qat_group_class(pattern: Pattern) -> type[QATGroup]:
    """The class of a pattern, importable under its name."""
    return type(pattern.name, (QATGroup,), {"pattern": pattern, "__module__": __name__, "__doc__": QATGroup.__doc__})


def __getattr__(name: str) -> type[QATGroup]:
    for pattern in _patterns():
        if pattern.name == name:
            return qat_group_class(pattern)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["QATGroup", "qat_group_class", *(p.name for p in _patterns())]


__all__ = ["QATGroup", "qat_group_class"]
