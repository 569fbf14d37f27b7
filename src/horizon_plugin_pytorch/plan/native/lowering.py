"""From a plan to a native program, for inputs of given shapes.

A walk over the steps. Each kind has a rule that appends operations and says where its result lies; a step without a rule that fits is
handed to PyTorch, which cuts the program there. What the readers of a value want of it is known before: see `outlook`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.in_place import changed_elsewhere
from horizon_plugin_pytorch.plan.native import bands, elementwise, groups, moves, stems, windows
from horizon_plugin_pytorch.plan.native.bands import Chain
from horizon_plugin_pytorch.plan.native.batches import tail
from horizon_plugin_pytorch.plan.native.constants import Constants
from horizon_plugin_pytorch.plan.native.layout import Buffer, Halo, View, fresh, zero_ranges
from horizon_plugin_pytorch.plan.native.outlook import Outlook
from horizon_plugin_pytorch.plan.native.program import Builder, Operation
from horizon_plugin_pytorch.plan.native.walks import halo
from horizon_plugin_pytorch.plan.program import Const, Plan, Ref, Step, refs
from horizon_plugin_pytorch.plan.steps import fill

Depth = Sequence[int]
"""For each chain, see `bands.find`, how many bytes between its groups lie in memory at a time; 0: all, one group after the other."""


@dataclass(frozen=True)
class InTorch:
    """A value that PyTorch makes while the program runs."""

    index: int
    meta: Any


@dataclass
class TorchStep:
    """A step of the plan that PyTorch runs, between the operations before `position` and those from it on.

    `imported`: where its result is copied to for the operations that read it.
    """

    index: int
    position: int
    time: int
    imported: View | None = None


@dataclass
class Lowered:
    """A program without its threads and arenas: operations, and what the caller has to bring.

    Attributes:
        values: for each value of the plan a `View`, `InTorch`, a host value, or a tuple of these.
        slots: the buffers of slots 1, 2, …; inputs first.
        quantizes: numbers of the operations that look for NaN.
        tail: the steps of `torch_steps` that come after everything else and work on whole batches.
        chains: the chains there are, whether or not they run in bands.
    """

    builder: Builder
    values: list[Any]
    torch_steps: list[TorchStep]
    slots: list[View]
    arena_bytes: int = 0
    own_bytes: int = 0
    quantizes: list[int] = field(default_factory=list)
    tail: set[int] = field(default_factory=set)
    chains: list[Chain] = field(default_factory=list)


class Lowering:
    """See `NativeProgram` for the arguments; `metas` from `shapes.infer`."""

    def __init__(
        self,
        plan: Plan,
        constants: Constants,
        metas: Sequence[Any],
        inputs: Sequence[Tensor],
        isa: int,
        threads: int = 1,
        depth: Depth = (),
    ) -> None:
        self.plan, self.constants, self.metas, self.threads = plan, constants, metas, threads
        self.builder = Builder(isa)
        self.env: list[Any] = []
        self.torch_steps: list[TorchStep] = []
        self.slots: list[View] = []
        self.quantizes: list[int] = []
        for x in inputs:
            strides = tuple(s * x.element_size() for s in x.stride())
            self.env.append(self._slot(tuple(x.shape), strides, str(x.dtype).removeprefix("torch.")))
        self.ahead = Outlook(plan, metas, isa)
        self.joined: dict[int, View] = {}
        self.chains = bands.find(plan, metas, self.ahead)
        self.depth = dict(zip(self.chains, depth, strict=False))

    def value(self, step: int) -> int:
        return len(self.plan.inputs) + step

    # -- values -------------------------------------------------------------------------------------------------------------

    def _slot(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> View:
        size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        view = View(Buffer(size, slot=len(self.slots) + 1), shape, strides, dtype)
        self.slots.append(view)
        return view

    def axis(self, value: int, default: int | None = None) -> int:
        """The dimension of a new value that holds its channels."""
        dims = self.metas[value].dim()
        return self.ahead.axes.get(value, default if default is not None else (1 if dims > 2 else max(dims - 1, 0)))

    def new(self, value: int, axis: int | None = None) -> View:
        """Memory for a value that an operation makes, its halo cleared."""
        meta = self.metas[value]
        axis = self.axis(value) if axis is None else axis
        if not isinstance(meta, QTensor):
            laid = fresh(tuple(meta.shape), "float32", axis)
            return self._slot(laid.shape, laid.strides, "float32")
        if value in self.ahead.joins:
            whole, begin = self.ahead.joins[value]
            if whole not in self.joined:
                self.joined[whole] = self._integers(whole, self.axis(whole))
            place = self.joined[whole]
            axis = self.axis(whole)
            part = place.narrowed(axis, begin, meta.shape[axis])
            return replace(part, halo=place.halo, scale=meta.scale)
        return self._integers(value, axis)

    def _integers(self, value: int, axis: int, need: Halo | None = None) -> View:
        meta = self.metas[value]
        dtype = str(meta.dtype8).removeprefix("torch.")
        view = fresh(tuple(meta.shape), dtype, axis, self.ahead.halos.get(value) if need is None else need, meta.scale)
        self._clear(view, axis)
        return view

    def _clear(self, view: View, axis: int) -> None:
        if view.halo:
            images, image, ranges = zero_ranges(view, axis)
            params = library.Zero(images=images, image=image, ranges=len(ranges), range=self.builder.array(ranges))
            at_start = replace(view, offset=0)
            self.builder.add("zero", params, [(params.out, at_start)], barrier=False)

    def view(self, ref: Ref | Const) -> View | None:
        """Where a value lies; what PyTorch made is copied into the arena (or, floats, read where they are). None: for PyTorch only."""
        if isinstance(ref, Const):
            return None
        value = self.env[ref.value]
        if isinstance(value, View):
            return value
        if isinstance(value, InTorch) and isinstance(value.meta, Tensor):
            return self._import(value, ref.value)
        return None

    def _import(self, value: InTorch, index: int) -> View | None:
        step = next(s for s in self.torch_steps if s.index == value.index)
        if step.imported is None:
            if isinstance(value.meta, QTensor):
                axis = self.axis(index)
                meta = value.meta
                dtype = str(meta.dtype8).removeprefix("torch.")
                step.imported = fresh(tuple(meta.shape), dtype, axis, {}, meta.scale)
                step.imported.buffer.use(step.time)
                self.builder.buffers.append(step.imported.buffer)
            elif value.meta.dtype == torch.float32:
                meta = value.meta
                strides = [0] * meta.dim()
                size = 4
                for d in reversed(range(meta.dim())):
                    strides[d], size = size, size * meta.shape[d]
                step.imported = self._slot(tuple(meta.shape), tuple(strides), "float32")
        return step.imported

    def operand(self, ref: Ref, axis: int, need: Halo | None = None) -> View | None:
        """A value with its channels next to each other along `axis`, and zeros around it; copied if it does not lie so."""
        view = self.view(ref)
        if view is None or (view.channels_last(axis) and view.fits_halo(need or {})):
            return view
        laid = fresh(view.shape, view.dtype, axis, need or {}, view.scale)
        self._clear(laid, axis)
        return laid if elementwise.emit(self.builder, "copy", laid, view) else None

    # -- steps --------------------------------------------------------------------------------------------------------------

    def run(self) -> Lowered:
        rules: dict[str, Callable[[int, Step], Any]] = {
            "quantize": self._quantize, "dequantize": self._dequantize, "group": self._group, "operator": self._operator,
            "table": self._table, "function": self._function,
        }  # fmt: skip
        last = tail(self.plan, self.metas)
        steps = self.plan.steps
        # Tensors that several values share, and one step changes, are PyTorch's: the arena has no such thing.
        shared = any(changed_elsewhere(self.plan, i) is not None for i in range(len(steps)))
        ends = {} if shared else {chain.steps[-1]: chain for chain, size in self.depth.items() if size}
        within = {i for chain in ends.values() for i in chain.steps[:-1]}
        for i, step in enumerate(steps):
            self.builder.step = i
            meta = self.metas[self.value(i)]
            if i in last:
                self.env.append(InTorch(i, meta))
                continue
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(meta)):
                self.env.append(meta)  # a host value is known by now
                continue
            if i in within:
                self.env.append(None)  # not before the chain's last group
                continue
            result = None if shared else self._chain(ends[i]) if i in ends else rules[step.kind](i, step)
            self.env.append(self._in_torch(i, step) if result is None else result)
        for i in sorted(last):
            self._in_torch(i, self.plan.steps[i])
        lowered = Lowered(self.builder, self.env, self.torch_steps, self.slots, quantizes=self.quantizes, tail=last)
        self.builder.wait()
        for leaf in tree_leaves(fill(self.plan.outputs, self.env.__getitem__, self.constants)):
            if isinstance(leaf, View):
                self.builder.use(leaf.buffer)
        lowered.arena_bytes, lowered.own_bytes = self.builder.finish(len(self.slots) + 1)
        lowered.chains = self.chains
        return lowered

    def _in_torch(self, i: int, step: Step) -> InTorch:
        self.builder.wait()
        for leaf in tree_leaves(fill((step.args, step.kwargs, step.params), self.env.__getitem__, self.constants)):
            if isinstance(leaf, View):
                self.builder.use(leaf.buffer)
        self.torch_steps.append(TorchStep(i, len(self.builder.operations), self.builder.time))
        self.builder.time += 1
        return InTorch(i, self.metas[self.value(i)])

    def _quantize(self, i: int, step: Step) -> View | None:
        x = self.view(step.args[0])
        if x is None or x.dtype != "float32":
            return None
        if self.value(i) in self.ahead.stems:
            return self._quantize_in_pairs(i, x)
        y = self.new(self.value(i))
        return y if self._quantized(y, x) else None

    def _quantized(self, y: View, x: View, barrier: bool = True) -> bool:
        position = len(self.builder.operations)
        if not elementwise.emit(self.builder, "quantize", y, x, m=y.scale, barrier=barrier):
            return False
        self.quantizes.append(position)
        return True

    def _quantize_in_pairs(self, i: int, x: View) -> View | None:
        meta = self.metas[self.value(i)]
        reader = next(n for n, s in enumerate(self.plan.steps) if any(r.value == self.value(i) for r in refs(s.args)))
        shape = stems.pair_shape(x.shape)
        sides = halo(self.ahead.walks[reader], shape[2:])
        dtype = str(meta.dtype8).removeprefix("torch.")
        y = fresh(shape, dtype, 1, {2 + d: side for d, side in enumerate(sides)}, meta.scale)
        if x.shape[2] % stems.ROWS:  # the last pair has one row
            ranges = self.builder.array(np.array([[0, y.buffer.bytes]], dtype=np.int64))
            everything = library.Zero(images=1, image=0, ranges=1, range=ranges)
            self.builder.add("zero", everything, [(everything.out, replace(y, offset=0))])
        else:
            self._clear(y, 1)
        # one operation per row of the pairs: along a row its pixels lie at one distance
        done = [self._quantized(*_every_second(y, x, row), barrier=row == stems.ROWS - 1) for row in range(stems.ROWS)]
        return y if all(done) else None

    def _dequantize(self, i: int, step: Step) -> View | None:
        x = self.view(step.args[0])
        if x is None or x.scale is None:
            return None
        y = self._slot(*_same_order(x), "float32")
        return y if elementwise.emit(self.builder, "dequantize", y, x, m=x.scale) else None

    def _group(self, i: int, step: Step) -> View | None:
        geometry = Geometry(**step.params["geometry"])
        ref = step.args[0]
        shape = tuple(self.metas[ref.value].shape)
        axis = len(shape) - 1 - geometry.dims
        out_shape = tuple(self.metas[self.value(i)].shape)
        if out_shape[: axis or None][:axis] != shape[:axis]:  # the residual is larger than the sum
            return None
        if 0 in out_shape:
            return None
        if geometry.padding_mode != "zeros":
            x = self.operand(ref, axis)
            x = None if x is None else windows.pad(self.builder, x, geometry)
        else:
            inputs = tuple(shape[axis + 1 :]) if ref.value not in self.ahead.stems else stems.pair_shape(shape)[2:]
            x = self.operand(ref, axis, self.ahead.halo(i, axis, inputs) if geometry.dims else None)
        if x is None or x.dtype == "float32":
            return None
        residual = self._residual(step, axis, out_shape)
        if residual is None and len(step.args) > 1:
            return None
        stem = None
        if ref.value in self.ahead.stems:
            padding: Any = geometry.padding
            stem = -padding[0] % stems.ROWS
        y = self.new(self.value(i), axis)
        as_images = _images if geometry.dims else _rows
        operands = groups.Operands(
            as_images(x, axis), as_images(y, axis), None if residual is None else as_images(residual, axis), stem
        )
        for n, walks in enumerate(self.ahead.walks[i]):
            groups.emit(self.builder, self.constants, step, walks, operands, barrier=n == len(self.ahead.walks[i]) - 1)
        return y

    def _residual(self, step: Step, axis: int, shape: tuple[int, ...]) -> View | None:
        """What a group adds, of its output's shape and with its channels next to each other."""
        view = self.view(step.args[1]) if len(step.args) > 1 else None
        if view is None:
            return None
        view = elementwise.broadcast(view, shape)
        if view.channels_last(axis) and (view.strides[axis] != 0 or shape[axis] == 1):
            return view
        laid = fresh(shape, view.dtype, axis, None, view.scale)
        return laid if elementwise.emit(self.builder, "copy", laid, view) else None

    def _chain(self, chain: Chain) -> View:
        """Groups that run in bands; `bands.find` takes those alone whose operands are integers in images."""
        steps, metas = [self.plan.steps[i] for i in chain.steps], [self.metas[self.value(i)] for i in chain.steps]
        source = steps[0].args[0]
        x = self.operand(source, 1, self.ahead.halo(chain.steps[0], 1, tuple(self.metas[source.value].shape[2:])))
        assert x is not None
        walks = [self.ahead.walks[i][0] for i in chain.steps]
        residuals = [self._residual(step, 1, tuple(meta.shape)) for step, meta in zip(steps, metas, strict=True)]
        members = [bands.Member(*each) for each in zip(steps, walks, metas, residuals, strict=True)]
        y = self.new(self.value(chain.steps[-1]), 1)
        chained = bands.Chained(self.builder, self.constants, members, x, y, self.depth[chain], self.threads)
        self.builder.append(chained.operation())
        return y

    def _operator(self, i: int, step: Step) -> View | None:
        name, options = step.params["name"], step.params["options"]
        if name == "Cat":
            return self._cat(i, step, options["dim"])
        if name in ("Add", "Mul"):
            return self._add_or_mul(i, step, name.lower(), options.get("activation"))
        return windows.average(self, i, step, name, options)

    def _add_or_mul(self, i: int, step: Step, kind: str, activation: str | None) -> View | None:
        a, b = (self.view(ref) for ref in step.args)
        if a is None or b is None or a.scale is None or b.scale is None:
            return None
        scale = self.constants[step.params["scale"].name]
        axis = _memory_axis(a if len(a.shape) == len(self.metas[self.value(i)].shape) else b)
        if any(s.dim() for s in (a.scale, b.scale, scale)) and self.metas[self.value(i)].dim() < 2:
            return None
        y = self.new(self.value(i), self.ahead.axes.get(self.value(i), axis))
        if kind == "add":
            m, ratio, bound = reference.group_multipliers(a.scale, None, scale, b.scale)
        else:
            (m, _, bound), ratio = reference.group_multipliers(a.scale, b.scale, scale), None
        done = elementwise.emit(self.builder, kind, y, a, b, m=m, ratio=ratio, bound=bound, activation=activation)
        return y if done else None

    def _cat(self, i: int, step: Step, dim: int) -> View | None:
        value = self.value(i)
        views = [self.view(ref) for ref in step.args]
        if any(v is None or v.scale is None for v in views):
            return None
        meta = self.metas[value]
        dim %= meta.dim()
        y = self.joined.get(value) or self._integers(value, self.ahead.axes.get(value, _memory_axis(views[0])))  # type: ignore[arg-type]
        scale = self.constants[step.params["scale"].name]
        begin = 0
        last: Operation | None = None
        for view in views:
            assert view is not None and view.scale is not None
            length = view.shape[dim]
            if view.buffer is not y.buffer:
                part = y.narrowed(dim, begin, length)
                m = reference.scale_ratio(view.scale, over=scale)
                kind = "copy" if bool((m == 1).all()) and view.dtype == y.dtype else "rescale"
                last = elementwise.emit(self.builder, kind, part, view, m=None if kind == "copy" else m, barrier=False)
                if last is None:
                    return None
            begin += length
        if last is not None:
            last.barrier = True
            self.builder.time += 1
        return y

    def _table(self, i: int, step: Step) -> View | None:
        x = self.view(step.args[0])
        if x is None:
            return None
        y = self.new(self.value(i), self.ahead.axes.get(self.value(i), _memory_axis(x)))
        done = elementwise.emit(self.builder, "table", y, x, table=self.constants[step.params["table"].name])
        return y if done else None

    def _function(self, i: int, step: Step) -> Any:
        return moves.lower(self, i, step)


def _every_second(y: View, x: View, row: int) -> tuple[View, View]:
    """Of an image the rows that are number `row` of their pairs, ``[N, C, rows, W]``, and where they lie."""
    n, c, h, w = x.shape
    shape = (n, c, len(range(row, h, stems.ROWS)), w)
    to = y.reshaped(shape, y.strides, y.offset + row * stems.CHANNELS)
    return to, x.reshaped(
        shape, (*x.strides[:2], stems.ROWS * x.strides[2], x.strides[3]), x.offset + row * x.strides[2]
    )


def _same_order(x: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of compact float32 that lie in the order of `x`."""
    strides = [0] * len(x.shape)
    step = 4
    for d in sorted(range(len(x.shape)), key=lambda d: (x.strides[d], -d)):
        strides[d] = step
        step *= x.shape[d]
    return x.shape, tuple(strides)


def _memory_axis(x: View) -> int:
    """The dimension whose elements are neighbours in memory."""
    return min(range(len(x.shape)), key=lambda d: (x.strides[d] if x.shape[d] > 1 else 2**62, -d), default=0)


def _images(x: View, axis: int) -> View:
    return x if axis == 1 else x.unsqueezed()


def _rows(x: View, axis: int) -> View:
    """``[..., C]`` as one image whose pixels are the leading dimensions: ``[1, C, ...]``."""
    return x.reshaped((1, x.shape[-1], *x.shape[:-1]), (0, x.strides[-1], *x.strides[:-1]))
