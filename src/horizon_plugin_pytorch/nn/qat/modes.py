"""What a module has to know about where it runs: autocast, recomputation, and neighbours in the other mode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor


def autocast_dtype(device: str) -> torch.dtype:
    """What autocast has convolutions compute in; float32 without it."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.float32


def without_autocast(device: str) -> AbstractContextManager[None]:
    """For what lies between a convolution and the rounding, which is float32."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def in_recomputation() -> bool:
    """Inside the backward pass, where gradient checkpointing runs a forward again: nothing is observed twice.

    (A compiler has one graph for both, and observes once.)
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_floating_point(x: QTensor) -> Tensor:
    """The payload for training; a module before it that is in eval mode, say of a frozen part, made integers."""
    payload = x.payload
    return payload if payload.is_floating_point() else payload.float()


def in_integers(module: nn.Module, *xs: QTensor | None) -> list[Any]:
    """The tensors with integer payloads, for eval mode.

    Raises:
        QuantizationError: a gradient was to flow back through `module`, which computes in integers.
    """
    for x in xs:
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise QuantizationError(
                f"{getattr(module, 'path', '')!r} is in eval mode, where it computes in integers and passes no gradient, "
                "but modules before it are in training mode: keep it in training mode, too (its norm alone can be in "
                "eval mode), or evaluate under torch.no_grad()"
            )
    return [x if x is None or not x.payload.is_floating_point() else x.like(x.int_repr()) for x in xs]
