"""Memory in large pages, for weights and arenas.

At batch 1 every weight is read once per image. With pages of 4 KiB each four tiles of weights cost a walk through the page tables, in a
virtual machine through two of them, which takes longer than the products. Linux gives pages of 2 MiB to memory that asks for them
(``MADV_HUGEPAGE``); where it does not, this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2**21
LINE = 64


class Memory:
    """Hands out parts of large mappings, which live as long as a tensor in them does. Pages that nobody writes to cost nothing.

    Args:
        reserve: bytes of the first mapping.
    """

    def __init__(self, reserve: int = 0) -> None:
        self._reserve = reserve
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, size: int) -> Tensor:
        """uint8 ``[size]``, 64-byte aligned, not initialized."""
        taken = -(-size // LINE) * LINE
        if taken > self._free.numel():
            self._free, self._reserve = _mapping(max(taken, self._reserve)), 0
        part, self._free = self._free[:size], self._free[taken:]
        return part

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor`, contiguous, in this memory."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        return self.empty(flat.numel()).copy_(flat).view(tensor.dtype).view(tensor.shape)


def _mapping(size: int) -> Tensor:
    size = -(-size // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return _aligned(torch.empty(size + LINE, dtype=torch.uint8), LINE, size)
    # One page more than asked for, because the mapping need not begin where a large page does.
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(torch.frombuffer(memory, dtype=torch.uint8), PAGE, size)


def _aligned(memory: Tensor, to: int, size: int) -> Tensor:
    start = -memory.data_ptr() % to
    return memory[start : start + size]
