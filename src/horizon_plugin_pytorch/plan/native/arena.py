"""Where in the arena each buffer lies: buffers that are in use at the same time do not overlap."""

from __future__ import annotations

from collections.abc import Iterable

from horizon_plugin_pytorch.plan.native.layout import ALIGN, Buffer


def place(buffers: Iterable[Buffer]) -> int:
    """Give every buffer its offset, the largest first, each at the lowest place that is free while it is in use.

    Returns:
        the arena's size in bytes.
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.begin)):
        rivals = sorted((b for b in placed if b.begin <= buffer.end and buffer.begin <= b.end), key=lambda b: b.offset)
        offset = 0
        for rival in rivals:
            if offset + buffer.bytes <= rival.offset:
                break
            offset = max(offset, -(-(rival.offset + rival.bytes) // ALIGN) * ALIGN)
        buffer.offset = offset
        total = max(total, offset + buffer.bytes)
        placed.append(buffer)
    return -(-total // ALIGN) * ALIGN
