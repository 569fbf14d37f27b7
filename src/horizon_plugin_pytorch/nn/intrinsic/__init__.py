"""Float fused modules: ``ConvReLU2d``, ``ConvBNAddReLU2d``, ``ConvTransposeAddReLU62d``, ``LinearReLU``, …

Every pattern of the grid in `horizon_plugin_pytorch.fusion.patterns` is a class here, named by its pattern; see `FusedGroup`.
"""

from __future__ import annotations

from functools import cache

from horizon_plugin_pytorch.fusion.patterns import ANCHORS, Pattern, grid
from horizon_plugin_pytorch.nn.intrinsic.group import FusedGroup, Identity
from horizon_plugin_pytorch.nn.intrinsic.handoff import Handoff


@cache
def group_class(pattern: Pattern) -> type[FusedGroup]:
    """The class of a pattern. Importable under its name, so that instances pickle."""
    body = {"pattern": pattern, "__module__": __name__, "__doc__": FusedGroup.__doc__}
    return type(pattern.name, (FusedGroup,), body)


def __getattr__(name: str) -> type[FusedGroup]:
    for pattern in (*grid(), *map(Pattern, ANCHORS)):  # a bare anchor is a group where it is shared by several calls
        if pattern.name == name:
            return group_class(pattern)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["FusedGroup", "Handoff", "Identity", "group_class", *(p.name for p in grid())]


__all__ = ["FusedGroup", "Handoff", "Identity", "group_class"]
