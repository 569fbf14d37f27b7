"""What the readers of each value want of it, found before anything is laid out.

How wide a halo they need, the dimension they want its channels along, which operands of a concatenation can be written where they end up,
and which images a stem reads in pairs of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.native import moves, stems, windows
from horizon_plugin_pytorch.plan.native.layout import Halo
from horizon_plugin_pytorch.plan.native.walks import Walk, halo, phases
from horizon_plugin_pytorch.plan.program import Plan, Step, refs


class Outlook:
    """A look at a whole plan for inputs of given shapes.

    Args:
        metas: the plan's values, from `shapes.infer`.

    Attributes:
        walks: for each group the walks of its kernels, one per phase of a transposed convolution.
        halos: for each value the zeros that its readers need around it.
        axes: for values whose readers care, the dimension along which channels lie next to each other.
        joins: for operands that are written straight into a concatenation, that one's value and where they begin in it.
        stems: quantized images that lie in pairs of rows.
    """

    def __init__(self, plan: Plan, metas: Sequence[Any], isa: int) -> None:
        self.plan, self.metas = plan, metas
        self.walks: dict[int, list[tuple[Walk, ...]]] = {}
        self.halos: dict[int, dict[int, tuple[int, int]]] = {}
        self.axes: dict[int, int] = {}
        self.joins: dict[int, tuple[int, int]] = {}
        self._readers = Counter(r.value for s in plan.steps for r in refs((s.args, s.kwargs, s.params)))
        self._outputs = {r.value for r in refs(plan.outputs)}
        self._look_back()
        self._look_for_joins()
        self.stems = self._look_for_stems() if library.ISAS[isa] == "amx" else set()

    def _value(self, step: int) -> int:
        return len(self.plan.inputs) + step

    def _look_back(self) -> None:
        """The halo that the readers of each value need, and the dimension they want its channels along."""
        for i in reversed(range(len(self.plan.steps))):
            step, result = self.plan.steps[i], self._value(i)
            source = next((r.value for r in refs(step.args)), None)
            if source is None or not isinstance(self.metas[source], QTensor | Tensor):
                continue
            if step.kind == "group":
                self._look_at_group(i, step, source)
            elif step.kind == "function" and moves.keeps(step.target):
                if result in self.axes:
                    self.axes.setdefault(source, self.axes[result])
                self._widen(source, self.halos.get(result, {}))
            elif step.kind in ("table", "operator") and result in self.axes:
                for ref in refs(step.args):
                    if len(self.metas[ref.value].shape) == len(self.metas[result].shape):
                        self.axes.setdefault(ref.value, self.axes[result])

    def _look_at_group(self, i: int, step: Step, source: int) -> None:
        geometry = Geometry(**step.params["geometry"])
        x, y = tuple(self.metas[source].shape), tuple(self.metas[self._value(i)].shape)
        axis = len(x) - 1 - geometry.dims
        self.axes[source] = axis
        if not geometry.dims:
            self.walks[i] = [tuple(Walk(n, 1, (0,), (0,)) for n in x[:-1])]
            return
        inputs = windows.padded_size(geometry, x[axis + 1 :])
        self.walks[i] = phases(geometry, inputs, y[axis + 1 :])
        if geometry.padding_mode == "zeros":
            self._widen(source, self.halo(i, axis, inputs))

    def halo(self, i: int, axis: int, inputs: tuple[int, ...]) -> dict[int, tuple[int, int]]:
        """Dimensions and sides of the zeros that a group reads around an input of this size."""
        sides = halo(self.walks[i], inputs)
        return {axis + 1 + d: side for d, side in enumerate(sides) if any(side)}

    def _widen(self, value: int, need: Halo) -> None:
        have = self.halos.setdefault(value, {})
        for dim, (before, after) in need.items():
            old = have.get(dim, (0, 0))
            have[dim] = (max(old[0], before), max(old[1], after))

    def _look_for_joins(self) -> None:
        """Operands that are written straight into the concatenation that alone reads them."""
        for i, step in enumerate(self.plan.steps):
            if step.kind != "operator" or step.params["name"] != "Cat":
                continue
            result = self.metas[self._value(i)]
            dim = step.params["options"]["dim"] % result.dim()
            if result.dim() < 3 or dim != self.axes.get(self._value(i), 1):
                continue
            begin = 0
            for ref in step.args:
                operand = self.metas[ref.value]
                alone = self._readers[ref.value] == 1 and ref.value not in self._outputs
                made = ref.value >= len(self.plan.inputs) and self._writes(ref.value, dim)
                same = operand.dtype8 == result.dtype8 and torch.equal(operand.scale, result.scale)
                if alone and made and same and operand.dim() == result.dim():
                    self.joins[ref.value] = (self._value(i), begin)
                begin += operand.shape[dim]

    def _look_for_stems(self) -> set[int]:
        """Quantized images that are read by one convolution with stride 2 alone."""
        found = set()
        for i, step in enumerate(self.plan.steps):
            source = next((r.value for r in refs(step.args)), -1)
            made = self.plan.steps[source - len(self.plan.inputs)] if source >= len(self.plan.inputs) else None
            if made is None or made.kind != "quantize" or self._readers[source] != 1 or source in self._outputs:
                continue
            image = self.metas[source]
            if (
                step.kind == "group"
                and stems.fits(step, tuple(image.shape))
                and image.scale.dim() == 0
                and i in self.walks
            ):
                found.add(source)
                self.walks[i] = [stems.pair_walks(walks) for walks in self.walks[i]]
        return found

    def _writes(self, value: int, dim: int) -> bool:
        """Whether a value's operations can write it with its channels along `dim`."""
        step = self.plan.steps[value - len(self.plan.inputs)]
        if step.kind == "group":
            return dim == self.metas[value].dim() - 1 - step.params["geometry"]["dims"]
        return step.kind in ("operator", "table", "quantize") and step.params.get("name") != "Cat"
