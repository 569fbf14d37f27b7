"""A native program while it is built: operations in order, the buffers they use, and the arrays their structures point to."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.plan.native import arena
from horizon_plugin_pytorch.plan.native.layout import OWN, Buffer, View


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

    def parts(self) -> Sequence[Operation]:
        """All operations whose references have to be filled in."""
        return [self]


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
        self.append(operation)
        return operation

    def append(self, operation: Operation) -> None:
        self.operations.append(operation)
        if operation.barrier:
            self.time += 1

    def aside(self, emit: Callable[[], Any]) -> list[Operation]:
        """The operations that `emit` appends, which do not become part of the program by themselves."""
        kept, self.operations = self.operations, []
        emit()
        made, self.operations = self.operations, kept
        return made

    def wait(self) -> None:
        """What comes next is another stretch: a step that runs in PyTorch."""
        if self.operations:
            self.operations[-1].barrier = True
        self.time += 1

    def finish(self, own_slot: int) -> tuple[int, int]:
        """Lay out the arena and a thread's own memory, slot `own_slot`, and point every reference into them; returns their bytes."""
        sizes = [arena.place(b for b in self.buffers if b.slot == slot) for slot in (0, OWN)]
        for operation in self.operations:
            for part in operation.parts():
                for ref, buffer in part.places:
                    ref.slot = own_slot if buffer.slot == OWN else buffer.slot
                    ref.offset += buffer.offset
        return sizes[0], sizes[1]
