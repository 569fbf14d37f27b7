"""Buffers that ``model.half()`` and the like must not convert."""

from __future__ import annotations

from typing import Any

from torch import nn


class KeepsDtype(nn.Module):
    """A module whose own buffers keep their dtype: scales are float32 and integers integers, whatever the model's dtype is."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        result = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return result
