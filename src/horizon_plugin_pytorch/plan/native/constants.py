"""The constants of a plan as the kernels read them: packed once per runner, shared by the programs of all shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library, packing
from horizon_plugin_pytorch.backends.cpu.memory import Memory
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.native import stems
from horizon_plugin_pytorch.plan.native.walks import Walk
from horizon_plugin_pytorch.plan.program import Plan, Step

_LARGEST_INT32 = 2**31 - 1
LARGEST_INPUT = {"int8": 128, "uint8": 255}
"""The largest absolute value of a dtype."""


@dataclass(frozen=True)
class Vectors:
    """A group's vectors over its output channels, padded."""

    bias: Tensor
    m: Tensor
    ratio: Tensor | None
    bound: Tensor
    hi: Tensor
    clamp: bool

    def structure(self, activation: str | None) -> library.Epilogue:
        """The kernels' structure; the tensors must outlive it."""
        return library.Epilogue(
            self.bias.data_ptr(), self.m.data_ptr(), None if self.ratio is None else self.ratio.data_ptr(), self.bound.data_ptr(),
            self.hi.data_ptr(), library.ACTIVATIONS[activation], int(self.clamp),
        )  # fmt: skip


class Constants:
    """Packs on first use and remembers; may be used by several threads."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._made: dict[Any, Any] = {}
        self._memory = Memory(reserve=2 * plan.int8_bytes)
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Tensor:
        return self.plan.constants[name]

    @property
    def bytes(self) -> int:
        """Memory of what was packed."""
        tensors = {id(t): t for made in self._made.values() for t in vars(made).values() if isinstance(t, Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    def outputs(self, step: Step) -> int:
        """A group's output channels."""
        return self[step.params["bias"].name].numel()

    def _taps(self, step: Step, walks: tuple[Walk, ...]) -> Tensor:
        geometry = Geometry(**step.params["geometry"])
        weight = packing.outputs_first(self[step.params["weight"].name], geometry.transposed, geometry.groups)
        if not geometry.dims:  # Linear: leading dimensions are walked over with one tap
            weight = weight.reshape(*weight.shape, *(1 for _ in walks))
        return packing.select_taps(weight, [w.taps for w in walks])

    def conv(
        self, step: Step, walks: tuple[Walk, ...], contiguous: bool, stem: int | None = None
    ) -> packing.ConvWeights:
        """The weights of a walk's taps; `stem`: for rows in pairs, see `stems`, with so many rows of zeros above the kernel."""
        contiguous = contiguous and len(walks[-1].taps) > 1
        key = (step.params["weight"].name, tuple(w.taps for w in walks), contiguous, stem)
        groups = step.params["geometry"]["groups"]

        def make() -> packing.ConvWeights:
            weight = self._taps(step, walks) if stem is None else self._stem(step, stem)
            packed = packing.pack_conv(weight, groups, contiguous)
            return replace(packed, tiles=self._memory.copy(packed.tiles))

        return self._once(key, make)

    def _stem(self, step: Step, zeros: int) -> Tensor:
        return stems.pair_rows(self[step.params["weight"].name], zeros).permute(0, 2, 3, 1)

    def depthwise(self, step: Step, walks: tuple[Walk, ...]) -> Depthwise:
        key = ("depthwise", step.params["weight"].name, tuple(w.taps for w in walks))

        def make() -> Depthwise:
            weight = self._taps(step, walks)
            return Depthwise(packing.pack_depthwise(weight), packing.pad_channels(packing.sums(weight)))

        return self._once(key, make)

    def vectors(self, step: Step, input_dtype: str, residual_dtype: str | None) -> Vectors:
        return self._once(
            ("vectors", step.name, step.params["bias"].name), lambda: self._vectors(step, input_dtype, residual_dtype)
        )

    def _vectors(self, step: Step, input_dtype: str, residual_dtype: str | None) -> Vectors:
        channels = self.outputs(step)
        given = {n: self[step.params[n].name] for n in ("m", "bound", "residual_ratio") if n in step.params}
        full = {n: packing.pad_channels(t, channels) for n, t in given.items()}
        bias = self[step.params["bias"].name]
        weight = self[step.params["weight"].name]
        reach = LARGEST_INPUT[input_dtype] * 127.0 * (weight.numel() // channels) + bias.double().abs()
        reach = reach * full["m"][:channels].double().abs()
        if residual_dtype is not None:
            reach += LARGEST_INPUT[residual_dtype] * full["residual_ratio"][:channels].double().abs()
        largest = 127 if step.params.get("dtype") == "int8" else 255
        hi = torch.full_like(full["bound"], largest, dtype=torch.uint8)
        if step.params["activation"] == "relu6":
            hi = full["bound"].double().round().clamp(0, largest).to(torch.uint8)
        return Vectors(
            packing.pad_channels(bias), full["m"], full.get("residual_ratio"), full["bound"], hi,
            bool((reach * 1.01 + 1 > _LARGEST_INT32).any()),
        )  # fmt: skip


@dataclass(frozen=True)
class Depthwise:
    """int8 ``[kernel_y, kernel_x, channels padded]`` and each channel's sum of weights."""

    weights: Tensor
    sums: Tensor


def table_bytes(table: Tensor) -> Tensor:
    """A table's 256 entries as bytes."""
    return table.contiguous().view(torch.uint8)


def step_offsets(weights: packing.ConvWeights, walks: tuple[Walk, ...], strides: tuple[int, ...]) -> packing.Int32s:
    """For each step along the sum, its distance in bytes from the window's corner at delta 0."""
    taps = np.zeros(1, dtype=np.int64)
    for walk, stride in zip(walks, strides, strict=True):
        taps = (taps[:, None] + np.array(walk.deltas, dtype=np.int64) * stride).reshape(-1)
    if not len(taps):
        return np.zeros(len(weights.steps), dtype=np.int32)
    return np.array([taps[tap] + byte for tap, byte in weights.steps], dtype=np.int64)
