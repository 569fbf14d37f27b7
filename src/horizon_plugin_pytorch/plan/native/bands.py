"""Chains of convolutions, depth first: what lies between two of them is never whole in memory.

A band of rows of the chain's output goes through all of its convolutions before the next band does. Between two of them lie only the
rows that the band needs, in memory of the thread's own that stays in its second-level cache. A band goes on from the rows that the one
before it has left, so nothing is computed twice but where a thread begins.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.native import elementwise, groups
from horizon_plugin_pytorch.plan.native.constants import Constants
from horizon_plugin_pytorch.plan.native.layout import OWN, View, fresh, zero_ranges
from horizon_plugin_pytorch.plan.native.outlook import Outlook
from horizon_plugin_pytorch.plan.native.program import Builder, Operation
from horizon_plugin_pytorch.plan.native.walks import Walk
from horizon_plugin_pytorch.plan.program import Plan, Ref, Step, refs


class Chain(NamedTuple):
    """Groups, by their steps; each but the first reads the one before it, which nobody else does.

    bytes: what lies between them, of an image.
    """

    steps: tuple[int, ...]
    bytes: int


LONGEST = 3
"""A bottleneck, an inverted residual."""
SIZES = (128 << 10, 512 << 10)
"""Bytes between the convolutions of a chain at a time: what fits in the second-level caches there are, weights and all."""
_ROWS = 2  # dimension of a view


class Rows(NamedTuple):
    begin: int
    end: int

    @property
    def length(self) -> int:
        return max(self.end - self.begin, 0)

    def within(self, height: int) -> Rows:
        return Rows(min(max(self.begin, 0), height), min(max(self.end, 0), height))


# -- which groups make a chain ------------------------------------------------------------------------------------------------------


def find(plan: Plan, metas: Sequence[Any], ahead: Outlook) -> list[Chain]:
    """The chains that keep the most bytes out of memory, none longer than `LONGEST`.

    Args:
        metas: the plan's values, from `shapes.infer`.
    """
    inputs = len(plan.inputs)
    readers = Counter(r.value for s in plan.steps for r in refs((s.args, s.kwargs, s.params)))
    whole = {*ahead.joins, *(r.value for r in refs(plan.outputs))}
    fit = {i for i, step in enumerate(plan.steps) if step.kind == "group" and _fits(step, metas, inputs + i, ahead)}
    before: dict[int, int] = {}  # the step that a step goes on from
    for i in fit:
        source = plan.steps[i].args[0].value
        if source - inputs in fit and readers[source] == 1 and source not in whole:
            before[i] = source - inputs
    found: list[Chain] = []
    for last in sorted(set(before) - set(before.values())):
        run = [last]
        while run[0] in before:
            run.insert(0, before[run[0]])
        found += _cut(run, [prod(metas[inputs + i].shape[1:]) for i in run])
    return found


def _fits(step: Step, metas: Sequence[Any], value: int, ahead: Outlook) -> bool:
    geometry, source = Geometry(**step.params["geometry"]), step.args[0].value
    if (geometry.dims, geometry.transposed, geometry.padding_mode) != (2, False, "zeros") or source in ahead.stems:
        return False
    x, y = metas[source], metas[value]
    integers = all(isinstance(a, Ref) and isinstance(metas[a.value], QTensor) for a in step.args)
    return integers and y.dim() == 4 and 0 not in y.shape and x.shape[0] == y.shape[0]


def _cut(run: list[int], sizes: list[int]) -> list[Chain]:
    """Cut so that the most bytes lie within a chain."""
    best: list[tuple[int, list[Chain]]] = [(0, [])]
    for end in range(1, len(run) + 1):
        options = []
        for begin in range(max(0, end - LONGEST), end):
            kept, chains = best[begin]
            chain = Chain(tuple(run[begin:end]), sum(sizes[begin : end - 1]))
            options.append((kept + chain.bytes, [*chains, chain] if len(chain.steps) > 1 else chains))
        best.append(max(options, key=lambda option: option[0]))
    return best[-1][1]


# -- as an operation ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A group of a chain: how it walks over its input's rows and columns, and a whole value that it adds."""

    step: Step
    walks: tuple[Walk, ...]
    y: QTensor
    """Its output, without data."""
    residual: View | None

    @property
    def height(self) -> int:
        return self.y.shape[_ROWS]


class Placed(NamedTuple):
    """An operation that is like `template`, so many bytes further on in what it reads, writes, and adds."""

    template: Operation
    x: int = 0
    y: int = 0
    residual: int = 0

    def params(self) -> Any:
        params = type(self.template.params).from_buffer_copy(self.template.params)
        if self.template.kind in ("conv", "depthwise"):
            params.in_.offset += self.x
            params.out.offset += self.y
            params.res.offset += self.residual
        return params


@dataclass(eq=False)
class Bands(Operation):
    """All bands of a chain.

    Attributes:
        templates: the operations that bands are made of, by member and what else tells them apart.
        bands: for each band its operations at a thread's beginning, and after another band.
    """

    templates: dict[tuple[Any, ...], Operation] = field(default_factory=dict)
    bands: list[tuple[list[Placed], list[Placed]]] = field(default_factory=list)

    def parts(self) -> list[Operation]:
        return [self, *self.templates.values()]

    def alike(self) -> Iterable[list[Operation]]:
        """The convolutions of each member, the most frequent first: they differ in their number of rows."""
        uses = Counter(id(placed.template) for band in self.bands for placed in band[1] or band[0])
        members: dict[int, list[Operation]] = {}
        for (member, *_), template in self.templates.items():
            if template.kind == "conv":
                members.setdefault(member, []).append(template)
        for same in members.values():
            yield sorted(same, key=lambda template: -uses[id(template)])

    def assemble(self) -> None:
        """Make the structures of all bands as the templates are now."""
        made = (library.Band * len(self.bands))()
        self.kept: list[Any] = [made]
        for band, (fresh_ops, next_ops) in zip(made, self.bands, strict=True):
            band.fresh, band.fresh_count = self._operations(fresh_ops), len(fresh_ops)
            band.next, band.next_count = self._operations(next_ops), len(next_ops)
        self.params.count, self.params.bands = len(self.bands), made

    def _operations(self, placed: list[Placed]) -> Any:
        operations = (library.Op * max(len(placed), 1))()
        for operation, one in zip(operations, placed, strict=False):
            params = one.params()
            self.kept.append(params)
            operation.kind, operation.params = library.KINDS[one.template.kind], ctypes.addressof(params)
        self.kept.append(operations)
        return operations


class Between:
    """The rows between two members, of one band at a time."""

    def __init__(self, maker: Member, reader: Member, windows: list[Rows]) -> None:
        self.rows = max(w.length for w in windows)
        self.height = maker.height
        y, dtype = maker.y, str(maker.y.dtype8).removeprefix("torch.")
        columns = reader.walks[1].halo(y.shape[3])
        # A spare row above: its zeros are the first row's left ones, and rows lie as in a whole value, without gaps.
        halo = {_ROWS: (1, 0), 3: columns} if any(columns) else {}
        self.view = fresh((1, y.shape[1], self.rows, y.shape[3]), dtype, 1, halo, y.scale)
        self.view.buffer.slot = OWN
        self.pitch = self.view.strides[_ROWS]

    def bytes(self, first: int, count: int) -> View:
        """Rows as a run of bytes, from the first pixel to the last: the zeros outside stay."""
        size = (count - 1) * self.pitch + self.view.shape[3] * self.view.shape[1]
        return self.view.reshaped((size,), (1,), self.view.offset + first * self.pitch)


class Chained:
    """A chain that is cut into bands of `size` bytes at the most, where a row of each member has room there."""

    def __init__(
        self,
        builder: Builder,
        constants: Constants,
        members: Sequence[Member],
        x: View,
        y: View,
        size: int,
        threads: int,
    ) -> None:
        self.builder, self.constants, self.members, self.x, self.y = builder, constants, members, x, y
        height, images = members[-1].height, x.shape[0]
        step = threads if images % threads else 1  # threads get the same number of bands
        least = min(-(-sum(prod(m.y.shape[1:]) for m in members[:-1]) // size), height)
        self._cut(min(-(-least // step) * step, height))
        while self.count < height and sum(b.view.buffer.bytes for b in self.between) > size:
            self._cut(min(self.count + step, height))
        while self.count > step and not all(map(self._follows, range(1, self.count))):
            self._cut(self.count - step)  # bands as low as that compute most rows twice

    def _cut(self, count: int) -> None:
        height = self.members[-1].height
        bands = [Rows(height * i // count, height * (i + 1) // count) for i in range(count)]
        self.count, self.windows = count, [self._windows(band) for band in bands]
        pairs = enumerate(zip(self.members, self.members[1:], strict=False))
        self.between = [Between(maker, reader, [w[n] for w in self.windows]) for n, (maker, reader) in pairs]

    def _windows(self, band: Rows) -> list[Rows]:
        """The rows of each member's input but the first one's that a band of the output reads, zeros outside included; then the band."""
        windows = [band]
        for member in self.members[:0:-1]:
            walk, rows = member.walks[0], windows[0].within(member.height)
            last = (rows.end - 1) * walk.stride + walk.deltas[-1]
            windows.insert(0, Rows(rows.begin * walk.stride + walk.deltas[0], last + 1))
        return windows

    def operation(self) -> Bands:
        operation = Bands("bands", [library.Bands()], self.builder.step)
        templates = operation.templates
        for image in range(self.x.shape[0]):
            for n in range(self.count):
                first = self._band(templates, image, n, fresh_start=True)
                following = self._band(templates, image, n, fresh_start=False) if n and self._follows(n) else []
                operation.bands.append((first, following))
        return operation

    def _follows(self, n: int) -> bool:
        """Whether the rows that band n takes over do not lie where they go to."""
        pairs = zip(self.windows[n - 1][:-1], self.windows[n][:-1], strict=True)
        return all(before.end - now.begin <= now.begin - before.begin for before, now in pairs)

    def _band(self, templates: dict[tuple[Any, ...], Operation], image: int, n: int, fresh_start: bool) -> list[Placed]:
        placed: list[Placed] = []

        def once(key: tuple[Any, ...], emit: Any, *shifts: int) -> None:
            if key not in templates:
                [templates[key]] = self.builder.aside(emit)
            placed.append(Placed(templates[key], *shifts))

        for m, member in enumerate(self.members):
            window = self.windows[n][m]
            done = window.begin if fresh_start else max(window.begin, self.windows[n - 1][m].end)
            rows = Rows(done, window.end).within(member.height)
            if m < len(self.between):
                self._prepare(once, m, n, fresh_start)
            if not rows.length:
                continue
            x, x_row = (self.between[m - 1].view, self.windows[n][m - 1].begin) if m else (self.x, 0)
            y, y_row = (self.between[m].view, window.begin) if m < len(self.between) else (self.y, 0)
            shifts = (
                _shift(x, rows.begin * member.walks[0].stride - x_row, image),
                _shift(y, rows.begin - y_row, image),
                _shift(member.residual, rows.begin, image),
            )
            emit = lambda member=member, x=x, y=y, count=rows.length: self._group(member, x, y, count)  # noqa: E731
            once((m, "rows", rows.length), emit, *shifts)
        return placed

    def _prepare(self, once: Any, m: int, n: int, fresh_start: bool) -> None:
        """Zeros around the rows between two members, and those that the band before has made."""
        between, window = self.between[m], self.windows[n][m]
        zeros = [Rows(window.begin, min(0, window.end)), Rows(max(between.height, window.begin), window.end)]
        if fresh_start:
            if between.view.halo:
                once((m, "gaps"), lambda: self._zero(between.view, *zero_ranges(between.view, 1)))
        else:
            before = self.windows[n - 1][m]
            kept = before.end - window.begin
            if kept > 0:
                key = (m, "keep", window.begin - before.begin, kept)
                once(key, lambda: self._keep(between, *key[2:]))
            zeros = [Rows(max(z.begin, before.end), z.end) for z in zeros]
        for z in zeros:
            if z.length:
                key = (m, "zeros", z.begin - window.begin, z.length)
                view = between.bytes(z.begin - window.begin, z.length)
                once(key, lambda view=view: self._zero(view, 1, 0, np.array([[0, *view.shape]]), view.offset))

    def _zero(self, view: View, images: int, image: int, ranges: Any, offset: int = 0) -> None:
        params = library.Zero(images=images, image=image, ranges=len(ranges), range=self.builder.array(ranges))
        self.builder.add("zero", params, [(params.out, view.reshaped(view.shape, view.strides, offset))], barrier=False)

    def _keep(self, between: Between, first: int, count: int) -> None:
        elementwise.emit(self.builder, "copy", between.bytes(0, count), between.bytes(first, count), barrier=False)

    def _group(self, member: Member, x: View, y: View, count: int) -> None:
        """A member's operation for so many rows, the first ones of everything."""
        down, across = member.walks
        residual = None if member.residual is None else _rows(member.residual, count)
        operands = groups.Operands(_rows(x, x.shape[_ROWS]), _rows(y, count), residual)
        walks = (Walk(count, down.stride, down.deltas, down.taps), across)
        groups.emit(self.builder, self.constants, member.step, walks, operands, barrier=False)


def _rows(view: View, count: int) -> View:
    """The first rows of the first image."""
    return view.reshaped((1, view.shape[1], count, view.shape[3]), view.strides)


def _shift(view: View | None, row: int, image: int) -> int:
    """Bytes to a row; what holds one image holds it for all in turn."""
    if view is None:
        return 0
    return row * view.strides[_ROWS] + (image * view.strides[0] if view.shape[0] > 1 else 0)
