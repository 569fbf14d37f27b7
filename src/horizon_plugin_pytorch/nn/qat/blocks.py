"""Elementwise chains on a CPU, a block at a time, so that what is between their steps stays in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 2**15 - 1
"""Elements of a block for each thread."""


def pays_in_blocks(x: Tensor) -> bool:
    """Whether `x` is on a CPU and large; a compiler makes its own blocks."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() > 2 * _size()


def in_blocks(parts: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """``outputs = parts(*inputs)``, elementwise. The outputs, which may be inputs, have one shape; inputs broadcast against it."""
    for block in _blocks([*outputs, *inputs], _size()):
        results = parts(*block[len(outputs) :])
        for output, result in zip(block, results, strict=False):
            output.copy_(result)


def _size() -> int:
    return BLOCK


def _blocks(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Halves of halves along the dimension that is outermost in memory."""
    first = tensors[0]
    if first.numel() <= size:
        yield tensors
        return
    dim = max(range(first.dim()), key=lambda d: first.stride(d) if first.shape[d] > 1 else -1)
    length = first.shape[dim]
    for start, end in ((0, length // 2), (length // 2, length)):
        halves = [t if t.dim() == 0 or t.shape[dim] == 1 else t.narrow(dim, start, end - start) for t in tensors]
        yield from _blocks(halves, size)
