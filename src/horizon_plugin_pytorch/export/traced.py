"""`QTensor` as `torch.export` can trace it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor


class TracedQTensor(QTensor):
    """Integers beside a tensor of their shape that holds nothing: what is traced are the integers.

    A `QTensor` is its integers, seen as another type, and a tensor that is being traced has a type of its own. The rules for functions
    are `QTensor`'s; each computes on `payload`.
    """

    _payload: Tensor

    @staticmethod
    def make(payload: Tensor, scale: Tensor, dtype8: torch.dtype, float_calls: Any = None) -> TracedQTensor:
        result = torch.Tensor._make_wrapper_subclass(
            TracedQTensor, payload.shape, strides=payload.stride(), dtype=payload.dtype, device=payload.device
        )
        result._payload, result.scale, result.dtype8 = payload, scale, dtype8
        return result

    @property
    def payload(self) -> Tensor:
        return self._payload

    def like(self, payload: Tensor, scale: Tensor | None = None) -> TracedQTensor:
        return self.make(payload, self.scale if scale is None else scale, self.dtype8)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Attributes that are tensors, such as ``q.T``, are those of the integers."""
        args, kwargs = torch.utils._pytree.tree_map_only(TracedQTensor, lambda q: q._payload, (args, kwargs or {}))
        return func(*args, **kwargs)
