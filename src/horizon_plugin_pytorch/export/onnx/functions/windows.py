"""Functions of windows or places: max pools, up-sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from horizon_plugin_pytorch.backends.reference.layout import nearest_sources
from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx import integers, pools
from horizon_plugin_pytorch.export.onnx.functions.call import Call
from horizon_plugin_pytorch.export.onnx.functions.layout import current
from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize, Sizes
from horizon_plugin_pytorch.export.onnx.sizes import as_vector


def _max_pool(dims: int) -> Callable[..., str]:
    def rule(
        c: Call, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> str:  # fmt: skip
        x, sizes = c.tensor(input), c.sizes(input)
        kernel = c.fixed(kernel_size, "a max pool whose kernel depends on the input's size")
        step = c.fixed(stride, "a max pool whose stride depends on the input's size")
        return pools.maximum(
            c.graph, x, sizes, c.path, dims, kernel, step, padding, dilation, ceil_mode, return_indices
        )

    return rule


def _adaptive_max_pool(dims: int) -> Callable[..., str]:
    def rule(c: Call, input: Any, output_size: Any, return_indices: bool = False) -> str:
        size = c.fixed(output_size, "an adaptive pool whose size depends on the input's")
        return pools.adaptive_maximum(c.graph, c.tensor(input), c.sizes(input), c.path, dims, size, return_indices)

    return rule


_RESIZE: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "nearest-exact": {
        "mode": "nearest",
        "coordinate_transformation_mode": "half_pixel",
        "nearest_mode": "round_prefer_ceil",
    },
    "linear": {"mode": "linear"},
    "bilinear": {"mode": "linear"},
    "trilinear": {"mode": "linear"},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.75},
}


def _powers_of_two(factors: Any) -> bool:
    each = factors if isinstance(factors, (tuple, list)) else [factors]
    return all(isinstance(f, (int, float)) and f > 0 and math.frexp(f)[0] == 0.5 for f in each)


def _sure_at_any_size(factors: Any, exact: bool) -> bool:
    """Whether Resize by these finds PyTorch's sources: ``float32(1 / factor)`` does not fall short of the edges of inputs."""
    each = factors if isinstance(factors, (tuple, list)) else [factors]
    return all(
        _powers_of_two(f)
        or (f is not None and f == int(f) > 0 and (exact or Fraction(float(np.float32(1 / f))) * int(f) >= 1))
        for f in each
    )


def _gathered(c: Call, x: str, sizes: Sizes, result: Sizes, factors: Any, exact: bool) -> str | None:
    """Nearest up-sampling as a Gather per dimension, where Resize is not sure to find PyTorch's sources; else None.

    PyTorch multiplies by ``float32(in / out)``, runtimes divide by ``float32(out / in)``: they part where a source is at the edge of an
    input. Resize is sure where `out / in` or `in / out` is whole, its division exact at those edges, and PyTorch's rounding harmless.
    """
    sides = [(n, m) for n, m in zip(sizes[2:], result[2:], strict=True) if n is not None and m is not None]
    if len(sides) < len(sizes) - 2:
        if c.units is not None and c.low.form == "qoperator" and not _sure_at_any_size(factors, exact):
            raise NeedsFixedSize("nearest up-sampling of integers to a size, or by such a factor")
        return None
    each = factors if isinstance(factors, (tuple, list)) else [factors] * len(sides)
    found, sure = [], True
    for (n, m), factor in zip(sides, each, strict=True):
        sure &= factor in (None, m / n) and (m % n == 0 or n % m == 0)
        found.append(nearest_sources(len(sides), n, m, factor, exact).numpy())
        sure &= np.array_equal(found[-1], (2 * np.arange(m) + exact) * n // (2 * m))
    if sure:
        return None
    for dim, source in enumerate(found, start=2):
        x = c.op("Gather", x, c.graph.constant(source), axis=dim)
    return x


def interpolate(
    c: Call, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Any:  # fmt: skip
    """Resize. A scale factor is given as one, unless PyTorch recomputes it from the sizes.

    Of integers that are to equal the plan's, up-sampling with weights that Resize does not have exactly is written out.
    """
    if mode not in _RESIZE:
        raise ExportError(f"interpolate with mode {mode!r} has no form in ONNX: use nearest, bilinear or bicubic")
    attributes = dict(_RESIZE[mode])
    if not mode.startswith("nearest"):
        attributes["coordinate_transformation_mode"] = "align_corners" if align_corners else "half_pixel"
    if antialias:
        c.graph.require(18)
        attributes["antialias"] = 1
    graph, rank, sizes = c.graph, c.rank(input), c.result
    spatial = rank - 2
    units = None if mode.startswith("nearest") else c.units
    counted = units is not None and c.low.form == "qoperator"
    factors = c.value(scale_factor)
    if counted and (align_corners or not _powers_of_two(factors)):
        return integers.linear_upsampled(
            c.low, c.value(input), c.sizes(input), sizes, factors, bool(align_corners), c.path
        )
    x = integers.counted(c.low, c.value(input)) if counted else c.tensor(input)
    if mode.startswith("nearest"):
        given = None if recompute_scale_factor else factors
        gathered = _gathered(c, x, c.sizes(input), sizes, given, mode == "nearest-exact")
        if gathered is not None:
            return gathered

    def rounded(y: str) -> Any:
        """Linear up-sampling of integers rounds its sums."""
        if units is None:
            return y
        return integers.rounded(c.low, y, units, c.path) if counted else c.low.quantize(y, units, c.path)

    if factors is not None and not recompute_scale_factor:
        each = [factors] * spatial if isinstance(factors, (int, float)) else list(factors)
        scales = graph.constant([1.0, 1.0, *each], np.float32)
        return rounded(c.op("Resize", x, "", scales, **attributes))
    if size is not None:
        wanted = c.value(size)
        listed = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted] * spatial
    elif None in sizes[2:]:
        raise NeedsFixedSize("interpolate with recompute_scale_factor")
    else:
        listed = list(sizes[2:])
    ends = as_vector(graph, [*current(c, input, [0, 1]), *listed])
    return rounded(c.op("Resize", x, "", "", ends, **attributes))


RULES: dict[str, Callable[..., Any]] = {
    "interpolate": interpolate,
    **{f"max_pool{d}d": _max_pool(d) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": _adaptive_max_pool(d) for d in (1, 2, 3)},
}
ON_INTEGERS = {RULES["max_pool2d"]}
"""Rules whose nodes take 8-bit integers as well."""
