"""What quantized modules have in common: buffers that keep their dtype, an 8-bit dtype that is saved, values that go with scales."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module whose own buffers and parameters keep their dtype: scales are float32 and integers integers, whatever the
    model's dtype is."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        buffers = dict(self._buffers)
        parameters = {name: p.data for name, p in self._parameters.items() if p is not None}
        result = super()._apply(fn, recurse)
        for name, old in buffers.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        for name, value in parameters.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return result


class MakesIntegers(KeepsDtype):
    """A converted module that makes integers of `dtype8` with `scale` (None: float32 values); a checkpoint holds both.

    Attributes:
        number: by which compiled graphs of this process know it, see `nn.quantized.compiled`.
        numbered: the modules that have one.
    """

    dtype8: torch.dtype
    scale: Tensor | None
    float_calls: Counter[str]
    numbered: ClassVar[weakref.WeakValueDictionary[int, MakesIntegers]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self._take_number()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._take_number()  # a copy is another module

    def _take_number(self) -> None:
        self.number = next(self._numbers)
        self.numbered[self.number] = self

    def uncompiled(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int], number: float | None) -> Tensor:
        """`method` with these arguments."""
        return getattr(self, method)(*xs)

    def float_form(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Floats of the shape of what `method` makes."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scale is not None:
            destination[prefix + "unsigned"] = torch.tensor(self.dtype8 == torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: Any,
        errors: Any,
    ) -> None:
        if self.scale is not None:
            unsigned = state_dict.pop(prefix + "unsigned", None)
            if unsigned is None:
                missing.append(prefix + "unsigned")
            else:
                self.dtype8 = torch.uint8 if bool(unsigned) else torch.int8
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


Made = TypeVar("Made")


class Remembered(Generic[Made]):
    """Values that were made from tensors, for as long as those are the same objects and unchanged.

    Copies and pickles are empty.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: list[tuple[list[tuple[Tensor, int]], Any, Made]] = []

    def get(self, tensors: Sequence[Tensor | None], other: Any, make: Callable[[], Made]) -> Made:
        """What `make` returned for these tensors and `other`; the last `size` of them are kept."""
        if any(
            t is not None and t.is_inference() for t in tensors
        ):  # whether such a tensor was changed is not recorded
            return make()
        key = [(t, t._version) for t in tensors if t is not None]
        for known, known_other, made in self._known:
            same = len(known) == len(key) and all(a is b and v == w for (a, v), (b, w) in zip(known, key, strict=True))
            if same and known_other == other:
                return made
        made = make()
        self._known = [*self._known, (key, other, made)][-self.size :]
        return made

    def __reduce__(self) -> Any:
        return Remembered, (self.size,)

    def __deepcopy__(self, memo: Any) -> Remembered[Made]:
        return Remembered(self.size)
