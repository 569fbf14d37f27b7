"""Which way of doing each convolution is the fastest here: measured once, and remembered in a file.

Every way gives the same result (see hz_conv in csrc/horizon_cpu.h), so a wrong or stale entry costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.plan.native.bands import Bands
from horizon_plugin_pytorch.plan.native.program import Operation

Way = tuple[int, int, int, int, int]
"""Which of the operation's structures, then rows, columns, by_channels, pixels_inside."""

FORMAT = 3
BUDGET = 2.0
"""Seconds of measuring for one shape of inputs; operations that come after them keep the way that is usually good."""

_VNNI = ((6, 4), (8, 3), (14, 2), (7, 2), (14, 1))
# Pixels per block (AMX: tiles of 16, and what is there without tiles) and tiles of 16 channels per block, per instruction set.
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    "amx": ((1, 4), (2, 2), (4, 1), (1, 3), (1, 2), (2, 1), *_VNNI),
    "avx512_vnni": _VNNI,
    "avx2": ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (library.WINOGRAD, 0), (library.WORDS, 0)),
    "portable": ((0, 0),),
}
# Runs of a way in a row: the first one finds the caches as another way left them.
_AT_A_TIME = 2
# So many input channels make up for the transforms.
_CHANNELS_FOR_WINOGRAD = 16
# Groups of four bytes along a sum that leave a tile of AMX, which has room for 16, so empty that dot products may be faster.
_SHORT = 12


def _sum(params: library.Conv) -> int:
    """Groups of four bytes along the sum of a convolution."""
    return int(np.ctypeslib.as_array(ctypes.cast(params.used, ctypes.POINTER(ctypes.c_uint8)), (params.steps,)).sum())


def usual(params: library.Conv) -> Way:
    """Threads share the channels where there are few pixels for many weights; Winograd's algorithm where it can be had and its transforms
    serve many products; what the kernels take for the rest."""
    weights = params.steps * library.STEP * params.channels
    few = params.images * params.tiles < 8 and weights > 2**16
    fewer = params.plane and library.Plane.from_address(params.plane).channels >= _CHANNELS_FOR_WINOGRAD
    return 0, library.WINOGRAD if fewer else 0, 0, int(few), 0


def apply(operation: Operation, way: Way) -> None:
    which, rows, columns, by_channels, pixels_inside = way
    operation.params = operation.ways[which]
    params = operation.params
    params.rows, params.columns, params.by_channels, params.pixels_inside = rows, columns, by_channels, pixels_inside


def work_elsewhere(memory: Tensor, threads: int) -> None:
    """Copy one half of some bytes to the other, each thread its part: what was in the caches before is there no more."""
    half = memory.numel() // 2
    params = library.Elementwise()
    params.size[:] = [1] * (library.DIMS - 1) + [half]
    params.a.stride[-1] = params.out.stride[-1] = 1
    params.b.ref.slot, params.out.ref.offset = -1, half
    _time("copy", params, (ctypes.c_void_p * 1)(memory.data_ptr()), threads, 0, 1)


def _time(kind: str, params: ctypes.Structure, pointers: Any, threads: int, isa: int, repeats: int) -> float:
    """The least seconds of some runs."""
    op = library.Op(library.KINDS[kind], 1, ctypes.addressof(params))
    seconds = (ctypes.c_double * repeats)()
    code = library.load().hz_time(ctypes.byref(op), pointers, threads, isa, repeats, seconds)
    return min(seconds) if code == 0 else math.inf


class Tuner:
    """Chooses ways, for one instruction set and number of threads; after `until` (of `time.monotonic`) nothing more is measured."""

    def __init__(self, isa: int, threads: int, cache: Cache, until: float) -> None:
        self.isa, self.threads, self.cache, self.until = isa, threads, cache, until

    def tune(self, operations: list[Operation], pointers: Any) -> None:
        """Choose for every convolution; `pointers` are slots with memory that the operations may overwrite."""
        for operation in operations:
            if isinstance(operation, Bands):
                alone = Tuner(self.isa, 1, self.cache, self.until)
                for same in operation.alike():
                    alone._tune(same, pointers)
                operation.assemble()
            elif operation.kind == "conv":
                self._tune([operation], pointers)

    def _tune(self, alike: list[Operation], pointers: Any) -> None:
        """Choose for operations that can be done in the same ways; the first is measured."""
        key = self._key(alike[0])
        way = self._known(key, len(alike[0].ways))
        if way is None and time.monotonic() < self.until:
            way = self._measure(alike[0], pointers)
            self.cache.put(key, way)
        for operation in alike:
            apply(operation, usual(operation.params) if way is None else way)

    def _known(self, key: str, structures: int) -> Way | None:
        """What was measured before, if it is something that the kernels have: a file can hold anything."""
        found = self.cache.get(key, (structures, 64, 64, 2, 2))
        if found is None or (found[1], found[2]) not in ((0, 0), *BLOCKS[library.ISAS[self.isa]]):
            return None
        return found[0], found[1], found[2], found[3], found[4]

    def _blocks(self, operation: Operation) -> list[Way]:
        """The sizes of blocks that the kernels have, and that the convolution's channels fill."""
        start, first = usual(operation.ways[0]), operation.ways[0]
        tiles = -(-first.channels // library.TILE)
        widest = 1 if first.block_offset else tiles
        blocks = [block for block in BLOCKS[library.ISAS[self.isa]] if block[1] <= widest]
        if library.ISAS[self.isa] == "amx" and _sum(first) > _SHORT:
            blocks = [block for block in blocks if block not in _VNNI]
        if not first.plane:
            blocks = [block for block in blocks if block[0] != library.WINOGRAD]
        return [start] + [(which, *block, *start[3:]) for which in range(len(operation.ways)) for block in blocks]

    def _splits(self, way: Way) -> list[Way]:
        """What else can be chosen for a size of blocks: how threads share the work, and the order."""
        shares = (0, 1) if self.threads > 1 else (0,)
        orders = (0,) if self.isa < library.ISAS.index("avx512_vnni") else (0, 1)
        return [(*way[:3], by_channels, inside) for by_channels in shares for inside in orders]

    def _measure(self, operation: Operation, pointers: Any) -> Way:
        times: dict[Way, float] = {}

        def fastest(ways: list[Way], count: int, turns: int) -> list[Way]:
            for way in ways * turns:  # in turns, so that what else the machine does meets them all alike
                times[way] = min(times.get(way, math.inf), self._seconds(operation, way, pointers))
            return sorted(dict.fromkeys(ways), key=times.__getitem__)[:count]

        blocks = fastest(self._blocks(operation), 2, 1)
        ways = fastest([way for block in blocks for way in self._splits(block)], 2, 2)
        return fastest(ways, 1, 3)[0]

    def _seconds(self, operation: Operation, way: Way, pointers: Any) -> float:
        apply(operation, way)
        return _time(operation.kind, operation.params, pointers, self.threads, self.isa, _AT_A_TIME)

    def _key(self, operation: Operation) -> str:
        p = operation.ways[0]
        pitch = np.ctypeslib.as_array(ctypes.cast(p.pitch, ctypes.POINTER(ctypes.c_int32)), (p.tiles,))
        what = (
            p.images, p.pixels, int(pitch.max()), int((pitch == 0).sum()), p.in_image, p.out_image, p.channels, p.steps, _sum(p),
            bool(p.block_offset), bool(p.plane), p.in_.dtype, p.out.dtype, p.res.dtype if p.res.slot >= 0 else -1, p.epilogue.activation, len(operation.ways),
        )  # fmt: skip
        return f"{library.ISAS[self.isa]} {self.threads} " + " ".join(str(int(w)) for w in what)


class Cache:
    """Ways by key, in a file that several processes may share: written to a new file that replaces the old one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _folder() / f"ways-{FORMAT}.json"
        self.machine = _machine()
        self.note: str | None = None
        self._lock = threading.Lock()
        self._new = False
        self._all = self._read()

    @property
    def _ways(self) -> dict[str, Any]:
        return self._all.setdefault(self.machine, {})

    def get(self, key: str, limits: tuple[int, ...] | int) -> list[int] | None:
        """The numbers of this key, each from 0 to below its limit (an integer: that of any number of them); None where there are none, or
        none that are valid."""
        with self._lock:
            way = self._ways.get(key)
        if not isinstance(way, list):
            return None
        limits = (limits,) * len(way) if isinstance(limits, int) else limits
        if len(way) != len(limits):
            return None
        return way if all(type(w) is int and 0 <= w < limit for w, limit in zip(way, limits, strict=True)) else None

    def put(self, key: str, way: Sequence[int]) -> None:
        with self._lock:
            self._ways[key] = list(way)
            self._new = True

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
                raise ValueError("it is not a table of tables")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.note = f"{self.path} was not readable and is written anew: {error}"
            return {}
        return content

    def write(self) -> None:
        """Save what was measured; a file that cannot be written is noted, and costs the next process the same measurements."""
        with self._lock:
            if not self._new:
                return
            note, self.note = self.note, None
            for machine, ways in self._read().items():  # what other processes found meanwhile
                self._all[machine] = ways | self._all.get(machine, {})
            self.note = note
            part = None
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                    part = file.name
                    json.dump(self._all, file)
                os.replace(part, self.path)
                self._new = False
            except OSError as error:
                self.note = f"measurements are not kept: {error}"
                if part is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(part)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "horizon_plugin_pytorch"


def _machine() -> str:
    """The processor's model; measurements of another are not used."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} × {os.cpu_count()}"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} × {os.cpu_count()}"
