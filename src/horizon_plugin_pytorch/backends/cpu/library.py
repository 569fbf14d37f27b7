"""Finding and loading the shared library, and its structures for `ctypes`.

The structures repeat csrc/horizon_cpu.h, which says what every field means. A library of another version is refused.
"""

from __future__ import annotations

import ctypes as c
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # its OpenMP runtime has to be there before the library asks for one by the same name

ABI = 3
SLACK = 4096
CHANNELS = 64
"""Vectors over channels are padded to a multiple of this."""
STEP = 64
"""Bytes of a step along a convolution's sum."""
TILE = 16
"""Output channels, or pixels, of a tile."""
WINOGRAD, WORDS = 32, 33
"""What `Conv.rows` is for other algorithms on AVX2."""
DIMS = 6

DTYPES = {"int8": 0, "uint8": 1, "float32": 2}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}
ISAS = ("portable", "avx2", "avx512_vnni", "amx")
"""Instruction sets, each number's name; later ones include what earlier ones need."""
KINDS = {
    name: number
    for number, name in enumerate(
        "conv depthwise zero quantize dequantize copy rescale table add mul max_pool avg_pool upsample interpolate bands".split()
    )
}

i32, i64, f32, ptr = c.c_int32, c.c_int64, c.c_float, c.c_void_p


class Ref(c.Structure):
    _fields_ = [("slot", i32), ("dtype", i32), ("offset", i64)]


class View(c.Structure):
    _fields_ = [("ref", Ref), ("stride", i64 * DIMS)]


class Epilogue(c.Structure):
    _fields_ = [
        *((name, ptr) for name in ("bias", "m", "ratio", "bound", "hi")),
        *((name, i32) for name in ("activation", "clamp")),
    ]


_IMAGES: list[tuple[str, Any]] = [(name, i64) for name in ("images", "in_image", "out_image", "res_image")]
_THREE_REFS: list[tuple[str, Any]] = [("in_", Ref), ("out", Ref), ("res", Ref)]
_ROWS_AND_PIXELS: list[tuple[str, Any]] = [
    (name, i64) for name in ("in_row", "out_row", "res_row", "in_pixel", "out_pixel", "res_pixel")
]


class Plane(c.Structure):
    _fields_ = [
        *_IMAGES,
        *_ROWS_AND_PIXELS,
        *((name, i32) for name in ("height", "width", "channels", "kernel")),
    ]


class Conv(c.Structure):
    _fields_ = [
        *_THREE_REFS,
        *_IMAGES,
        ("pixels", i64), ("tiles", i64),
        ("pixel", ptr), ("out_at", ptr), ("res_at", ptr), ("pitch", ptr),
        ("steps", i32), ("channels", i32),
        ("step", ptr), ("used", ptr), ("block_offset", ptr), ("weights", ptr), ("weight_sum", ptr),
        ("epilogue", Epilogue),
        ("plane", ptr),
        ("rows", i32), ("columns", i32), ("by_channels", i32), ("pixels_inside", i32),
    ]  # fmt: skip


class Depthwise(c.Structure):
    _fields_ = [
        *_THREE_REFS,
        *_IMAGES,
        *_ROWS_AND_PIXELS,
        *((name, i32) for name in ("height", "width", "channels")),
        *((name, i32) for name in ("kernel_y", "kernel_x", "stride_y", "stride_x", "dilation_y", "dilation_x")),
        ("weights", ptr), ("weight_sum", ptr),
        ("epilogue", Epilogue),
    ]  # fmt: skip


class Zero(c.Structure):
    _fields_ = [("out", Ref), ("images", i64), ("image", i64), ("ranges", i64), ("range", ptr)]


class Elementwise(c.Structure):
    _fields_ = [
        ("a", View), ("b", View), ("out", View),
        ("size", i64 * DIMS),
        ("m", ptr), ("ratio", ptr), ("bound", ptr),
        ("per_channel", i32), ("activation", i32),
        ("table", ptr), ("bad", ptr),
    ]  # fmt: skip


_TWO_REFS: list[tuple[str, Any]] = [("in_", Ref), ("out", Ref), ("images", i64), ("in_image", i64), ("out_image", i64)]
_THREE_STRIDES: list[tuple[str, Any]] = [("in_stride", i64 * 3), ("out_stride", i64 * 3), ("out_size", i32 * 3)]


class Pool(c.Structure):
    _fields_ = [*_TWO_REFS, *_THREE_STRIDES, ("channels", i32), ("start", ptr * 3), ("stop", ptr * 3), ("m", ptr)]


class Upsample(c.Structure):
    _fields_ = [*_TWO_REFS, *_THREE_STRIDES, ("bytes", i32), ("from_", ptr * 3)]


class Interpolate(c.Structure):
    _fields_ = [*_TWO_REFS, *_THREE_STRIDES, ("channels", i32), ("place", ptr * 2), ("weight", ptr * 2), ("m", f32)]


class Op(c.Structure):
    _fields_ = [("kind", i32), ("barrier", i32), ("params", ptr)]


class Band(c.Structure):
    _fields_ = [("fresh", c.POINTER(Op)), ("next", c.POINTER(Op)), ("fresh_count", i32), ("next_count", i32)]


class Bands(c.Structure):
    _fields_ = [("count", i64), ("bands", c.POINTER(Band))]


class Program(c.Structure):
    _fields_ = [
        ("ops", c.POINTER(Op)), ("count", i64), ("iterations", i64), ("slot_step", ptr), ("slots", i32), ("apart", i32),
        ("arena_bytes", i64), ("own_bytes", i64),
    ]  # fmt: skip


class LibraryError(RuntimeError):
    """There is no library to load, or not one that fits."""


def _paths() -> list[Path]:
    """Where the library may be: HORIZON_CPU_LIBRARY if that is set, otherwise in the folder lib beside this file."""
    if "HORIZON_CPU_LIBRARY" in os.environ:
        return [Path(os.environ["HORIZON_CPU_LIBRARY"])]
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return [Path(__file__).parent / "lib" / f"horizon_cpu{suffix}"]


@lru_cache(maxsize=1)
def load() -> c.CDLL:
    """The library.

    Raises:
        LibraryError: it was not built, cannot be loaded, or is of another version; saying what to do.
    """
    found = next((path for path in _paths() if path.exists()), None)
    if found is None:
        raise LibraryError(
            "the CPU kernels were not built when the package was installed: that needs CMake and a C++17 compiler "
            "(then: pip install --force-reinstall --no-deps horizon_plugin_pytorch)"
        )
    try:
        library = c.CDLL(str(found))
        library.hz_abi.restype = c.c_int
        version = library.hz_abi()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{found} cannot be loaded: {error}") from None
    if version != ABI:
        raise LibraryError(f"{found} has version {version} where {ABI} is needed: install the package again")
    library.hz_best_isa.restype = c.c_int
    library.hz_has_openmp.restype = c.c_int
    library.hz_isa_name.argtypes, library.hz_isa_name.restype = [c.c_int], c.c_char_p
    library.hz_run.argtypes = [c.POINTER(Program), ptr, c.c_int, c.c_int]
    library.hz_run.restype = c.c_int
    library.hz_profile.argtypes = [c.POINTER(Program), ptr, c.c_int, c.c_int, c.POINTER(c.c_double)]
    library.hz_profile.restype = c.c_int
    library.hz_time.argtypes = [c.POINTER(Op), ptr, c.c_int, c.c_int, c.c_int, c.POINTER(c.c_double)]
    library.hz_time.restype = c.c_int
    return library


def why_not() -> str | None:
    """None if the kernels can run here, otherwise the reason."""
    try:
        load()
    except LibraryError as error:
        return str(error)
    return None


def best_isa() -> int:
    """The best instruction set of this machine, at most the one that HORIZON_MAX_CPU_ISA names.

    Raises:
        LibraryError: see `load`; or HORIZON_MAX_CPU_ISA names none of `ISAS`.
    """
    cap = os.environ.get("HORIZON_MAX_CPU_ISA", "")
    if cap and cap not in ISAS:
        raise LibraryError(f"HORIZON_MAX_CPU_ISA is {cap!r}; there are: {', '.join(ISAS)}")
    return int(load().hz_best_isa())
