"""A native program while it is built: operations in order, the buffers they use, and the arrays their structures point to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.plan.native import arena
from horizon_plugin_pytorch.plan.native.layout import Buffer, View


@dataclass(eq=False)
class Operation:
    """One operation of the library.

    Attributes:
        kind: a name of `library.KINDS`.
        ways: its structures, each of which gives the same result; `params` is the one in use.
        step: the plan's step it belongs to.
        barrier: whether threads wait for each other behind it.
        places: the structure's references, with the buffer each points into.
    """

    kind: str
    ways: list[Any]
    step: int
    barrier: bool = True
    places: list[tuple[library.Ref, Buffer]] = field(default_factory=list)
    params: Any = None

    def __post_init__(self) -> None:
        self.params = self.ways[0]


class Builder:
    """Collects operations; `time` counts the stretches between barriers, in which operations run side by side."""

    def __init__(self, isa: int) -> None:
        self.isa = isa
        self.operations: list[Operation] = []
        self.buffers: list[Buffer] = []
        self.time = 0
        self.step = 0
        self.kept: list[Any] = []

    def array(self, values: Any, dtype: Any = None) -> int:
        """The address of an array that lives as long as the program does."""
        if isinstance(values, torch.Tensor):
            assert values.is_contiguous()
            self.kept.append(values)
            return values.data_ptr()
        values = np.ascontiguousarray(values, dtype)
        self.kept.append(values)
        return int(values.ctypes.data)

    def use(self, buffer: Buffer) -> None:
        if buffer.begin < 0:
            self.buffers.append(buffer)
        buffer.use(self.time)

    def add(
        self,
        kind: str,
        ways: ctypes.Structure | Sequence[ctypes.Structure],
        refs: Sequence[tuple[library.Ref, View | None]],
        barrier: bool = True,
    ) -> Operation:
        """Append an operation; each of `refs` is a reference in a structure and the view whose first element it points to, in addition
        to the offset that the reference has already."""
        ways = [ways] if isinstance(ways, ctypes.Structure) else list(ways)
        operation = Operation(kind, ways, self.step, barrier)
        for ref, view in refs:
            if view is None:
                ref.slot = -1
                continue
            ref.dtype = library.DTYPES[view.dtype]
            ref.offset += view.offset
            self.use(view.buffer)
            operation.places.append((ref, view.buffer))
        self.operations.append(operation)
        if barrier:
            self.time += 1
        return operation

    def wait(self) -> None:
        """What comes next is another stretch: a step that runs in PyTorch."""
        if self.operations:
            self.operations[-1].barrier = True
        self.time += 1

    def finish(self) -> int:
        """Lay out the arena and point every reference into it; returns the arena's bytes."""
        size = arena.place(b for b in self.buffers if b.slot == 0)
        for operation in self.operations:
            for ref, buffer in operation.places:
                ref.slot = buffer.slot
                ref.offset += buffer.offset
        return size
