"""Fused groups as operations: which kernel, and the tables that say where each output pixel finds its input."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod

import numpy as np

from horizon_plugin_pytorch.backends.cpu import library, packing
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.native.constants import LARGEST_INPUT, Constants, step_offsets
from horizon_plugin_pytorch.plan.native.layout import View
from horizon_plugin_pytorch.plan.native.program import Builder
from horizon_plugin_pytorch.plan.native.walks import Walk
from horizon_plugin_pytorch.plan.program import PlanError, Step

# A table covers several images where one has fewer pixels than this, so that tiles of 16 pixels are full.
_PIXELS_OF_A_TABLE = 256
# Walking over the zeros between rows, too, costs at most this much.
_MOST_FLATTENED = 1.15
# The kernels that Winograd's algorithm is there for.
_PLANE_KERNELS = ((3, 3), (2, 2))


@dataclass(frozen=True)
class Operands:
    """A group's input, output and residual as images ``[N, *spatial]`` of channels; views have their channels in dimension 1."""

    x: View
    y: View
    residual: View | None
    stem: int | None = None
    """For an input whose rows lie in pairs, see `stems`: the zeros that its kernel has above it."""


def emit(
    builder: Builder, constants: Constants, step: Step, walks: tuple[Walk, ...], operands: Operands, barrier: bool
) -> None:
    """Append the operation for one phase of a group."""
    geometry = Geometry(**step.params["geometry"])
    channels = operands.x.shape[1]
    depthwise = geometry.groups == channels == constants.outputs(step) and len(walks) in (1, 2) and channels > 1
    if depthwise and all(w.deltas and w.dilation for w in walks):
        _depthwise(builder, constants, step, walks, operands, barrier)
    else:
        _conv(builder, constants, step, walks, operands, barrier)


def _epilogue(builder: Builder, constants: Constants, step: Step, operands: Operands) -> library.Epilogue:
    residual = operands.residual
    vectors = constants.vectors(step, operands.x.dtype, None if residual is None else residual.dtype)
    builder.kept.append(vectors)
    return vectors.structure(step.params["activation"])


def _along(view: View | None, walks: tuple[Walk, ...]) -> tuple[int, tuple[int, ...]]:
    """Of an output or residual: bytes to the phase's first element, and from each of its elements to the next."""
    if view is None:
        return 0, (0,) * len(walks)
    strides = view.strides[2:]
    start = sum(w.first * s for w, s in zip(walks, strides, strict=True))
    return start, tuple(w.every * s for w, s in zip(walks, strides, strict=True))


def _conv(
    builder: Builder, constants: Constants, step: Step, walks: tuple[Walk, ...], operands: Operands, barrier: bool
) -> None:
    x, y, residual = operands.x, operands.y, operands.residual
    compact = bool(walks) and x.strides[-1] == x.shape[1] and walks[-1].dilation == 1
    weights = constants.conv(step, walks, compact, operands.stem)
    builder.kept.append(weights)
    (y_start, y_reads), (r_start, r_reads) = _along(y, walks), _along(residual, walks)
    deltas = step_offsets(weights, walks, x.strides[2:])
    corner = int(deltas.min())
    images, pixels = x.shape[0], prod(w.count for w in walks)
    together = 1
    if pixels < _PIXELS_OF_A_TABLE:
        together = next(
            n for n in range(1, images + 1) if images % n == 0 and (n * pixels >= _PIXELS_OF_A_TABLE or n == images)
        )
    common = library.Conv(
        images=images // together,
        in_image=x.strides[0] * together,
        out_image=y.strides[0] * together,
        res_image=0 if residual is None else residual.strides[0] * together,
        steps=len(weights.steps),
        channels=constants.outputs(step),
        step=builder.array(deltas - corner, np.int32),
        used=builder.array(weights.used),
        block_offset=None if weights.block_offset is None else builder.array(weights.block_offset),
        weights=weights.tiles.data_ptr(),
        weight_sum=weights.sums.data_ptr(),
        epilogue=_epilogue(builder, constants, step, operands),
    )
    common.in_.offset, common.out.offset, common.res.offset = corner, y_start, r_start
    if library.ISAS[builder.isa] == "avx2" and _is_plane(weights, walks, x):
        plane = _plane(walks, operands)
        builder.kept.append(plane)
        common.plane = ctypes.addressof(plane)
    domains = [_pixels(walks, x)]
    if library.ISAS[builder.isa] == "amx" and _gains_from_flattening(walks, x):
        domains.append(_flattened(walks, x))
    ways = []
    for domain in domains:
        way = library.Conv.from_buffer_copy(common)
        pixel = _whole_tiles(domain.table(together, x.strides[0], domain.reads), step, repeat=True)
        way.pixels, way.tiles = domain.count * together, len(pixel) // library.TILE
        way.pixel, way.pitch = builder.array(pixel), builder.array(_pitch(pixel))
        way.out_at = builder.array(
            _whole_tiles(domain.table(together, y.strides[0], y_reads, missing=-1), step, repeat=False)
        )
        if residual is not None:
            way.res_at = builder.array(
                _whole_tiles(domain.table(together, residual.strides[0], r_reads), step, repeat=True)
            )
        ways.append(way)
    refs = [ref for w in ways for ref in ((w.in_, x), (w.out, y), (w.res, residual))]
    builder.add("conv", ways, refs, barrier)


def _is_plane(weights: packing.ConvWeights, walks: tuple[Walk, ...], x: View) -> bool:
    """Whether a convolution has a plane, see hz_plane: its shape, and four times its largest sum in int32."""
    side_by_side = len(walks) == 2 and all(w.stride == 1 and w.dilation == 1 for w in walks)
    kernel = tuple(len(w.deltas) for w in walks)
    if weights.block_offset is not None or not side_by_side or kernel not in _PLANE_KERNELS:
        return False
    channels = x.shape[1]
    largest = LARGEST_INPUT[x.dtype] * 127 * channels * prod(kernel)
    return 4 * largest < 2**31 and (channels % 4 == 0 or not weights.runs)


def _plane(walks: tuple[Walk, ...], operands: Operands) -> library.Plane:
    x, y, residual = operands.x, operands.y, operands.residual
    plane = library.Plane(
        images=x.shape[0],
        in_image=x.strides[0],
        out_image=y.strides[0],
        res_image=0 if residual is None else residual.strides[0],
        channels=x.shape[1],
        kernel=len(walks[0].deltas),
    )
    (plane.in_row, plane.in_pixel) = x.strides[2:]
    (plane.out_row, plane.out_pixel) = _along(y, walks)[1]
    (plane.res_row, plane.res_pixel) = _along(residual, walks)[1]
    (plane.height, plane.width) = (w.count for w in walks)
    return plane


@dataclass(frozen=True)
class _Domain:
    """The output pixels of an image in the order of the tables: for each its index along every dimension.

    reads: bytes between the inputs of neighbouring outputs, by dimension.
    outside: where a pixel is not one of the output's; its input may be read.
    """

    indices: tuple[np.ndarray, ...]
    reads: tuple[int, ...]
    outside: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.indices[0]) if self.indices else 1

    def table(self, images: int, image: int, strides: tuple[int, ...], missing: int | None = None) -> np.ndarray:
        """Bytes of every pixel of so many images; those outside have `missing` where that is given."""
        one = sum((i * s for i, s in zip(self.indices, strides, strict=True)), np.zeros(self.count, dtype=np.int64))
        every = np.arange(images, dtype=np.int64)[:, None] * image + one
        if missing is not None and self.outside is not None:
            every[:, self.outside] = missing
        return every.reshape(-1)


def _pixels(walks: tuple[Walk, ...], x: View) -> _Domain:
    grid = np.meshgrid(*(np.arange(w.count, dtype=np.int64) for w in walks), indexing="ij") if walks else []
    return _Domain(
        tuple(g.reshape(-1) for g in grid), tuple(w.stride * s for w, s in zip(walks, x.strides[2:], strict=True))
    )


def _gains_from_flattening(walks: tuple[Walk, ...], x: View) -> bool:
    """Whether rows that are walked over with the zeros between them make every tile uniform at little cost."""
    if (
        len(walks) < 2
        or walks[-1].stride != 1
        or walks[-2].stride != 1
        or not x.strides[-1]
        or x.strides[-2] % x.strides[-1]
    ):
        return False
    width, pitch = walks[-1].count, x.strides[-2] // x.strides[-1]
    return width % library.TILE != 0 and width < pitch <= _MOST_FLATTENED * width


def _flattened(walks: tuple[Walk, ...], x: View) -> _Domain:
    """All rows of a plane as one, with the columns of zeros between them."""
    *outer, rows, columns = (w.count for w in walks)
    pitch = x.strides[-2] // x.strides[-1]
    counts = [*outer, (rows - 1) * pitch + columns]
    *first, flat = (g.reshape(-1) for g in np.meshgrid(*(np.arange(n, dtype=np.int64) for n in counts), indexing="ij"))
    reads = tuple(w.stride * s for w, s in zip(walks, x.strides[2:], strict=True))
    return _Domain((*first, flat // pitch, flat % pitch), reads, flat % pitch >= columns)


def _whole_tiles(table: np.ndarray, step: Step, repeat: bool) -> np.ndarray:
    """As int32, up to a whole number of tiles, with the last entry repeated or -1."""
    if len(table) and int(table.max()) >= 2**31:
        raise PlanError(f"{step.name!r}: an image is larger than 2 GiB")
    missing = -len(table) % library.TILE
    return np.concatenate([table, np.full(missing, table[-1] if repeat else -1)]).astype(np.int32)


def _pitch(pixel: np.ndarray) -> np.ndarray:
    steps = np.diff(pixel.reshape(-1, library.TILE), axis=1)
    return np.where((steps == steps[:, :1]).all(1), steps[:, 0], 0).astype(np.int32)


def _depthwise(
    builder: Builder, constants: Constants, step: Step, walks: tuple[Walk, ...], operands: Operands, barrier: bool
) -> None:
    x, y, residual = operands.x, operands.y, operands.residual
    weights = constants.depthwise(step, walks)
    builder.kept.append(weights)
    (y_start, y_reads), (r_start, r_reads) = _along(y, walks), _along(residual, walks)
    rows = (Walk(1, 1, (0,), (0,)), *walks)[-2:]
    in_reads, out_reads, res_reads = ((0, *reads)[-2:] for reads in (x.strides[2:], y_reads, r_reads))
    params = library.Depthwise(
        images=x.shape[0],
        in_image=x.strides[0],
        out_image=y.strides[0],
        res_image=0 if residual is None else residual.strides[0],
        channels=x.shape[1],
        weights=weights.weights.data_ptr(),
        weight_sum=weights.sums.data_ptr(),
        epilogue=_epilogue(builder, constants, step, operands),
    )
    params.in_row, params.in_pixel = in_reads
    params.out_row, params.out_pixel = out_reads
    params.res_row, params.res_pixel = res_reads
    (params.height, params.width) = (w.count for w in rows)
    (params.kernel_y, params.kernel_x) = (len(w.deltas) for w in rows)
    (params.stride_y, params.stride_x) = (w.stride for w in rows)
    (params.dilation_y, params.dilation_x) = (w.dilation for w in rows)
    corner = sum(w.deltas[0] * s for w, s in zip(walks, x.strides[2:], strict=True))
    params.in_.offset, params.out.offset, params.res.offset = corner, y_start, r_start
    builder.add("depthwise", params, [(params.in_, x), (params.out, y), (params.res, residual)], barrier)
