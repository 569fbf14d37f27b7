"""Padding by what lies inside, on values or on integers."""

from __future__ import annotations

from collections.abc import Sequence

from horizon_plugin_pytorch.export.onnx.graph import Graph

_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
_LAST = 2**63 - 1


def pad(graph: Graph, x: str, begin: Sequence[int], end: Sequence[int], mode: str) -> str:
    """Pad each dimension of `x` by `begin` and `end`, by a mode of `torch.nn.functional.pad`.

    ``circular`` is slices that are joined: ONNX's Pad has that mode from opset 19 on, and not every runtime has it.
    """
    if mode != "circular":
        return graph.op("Pad", x, graph.constant([*begin, *end]), mode=_MODES[mode])
    for axis, (before, after) in enumerate(zip(begin, end, strict=True)):
        parts = [x]
        if before:
            parts.insert(0, _slice(graph, x, axis, -before, _LAST))
        if after:
            parts.append(_slice(graph, x, axis, 0, after))
        x = graph.op("Concat", *parts, axis=axis) if len(parts) > 1 else x
    return x


def _slice(graph: Graph, x: str, axis: int, start: int, stop: int) -> str:
    return graph.op("Slice", x, *(graph.constant([n]) for n in (start, stop, axis)))
