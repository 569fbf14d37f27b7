"""The definition of every integer operator, in plain PyTorch: QAT models evaluate with it, other backends equal it.

Tensors are ``torch.int8`` or ``torch.uint8`` with zero point 0, scales are float32 tensors, accumulators are int32. All
results are exactly defined: integer sums, and IEEE-754 float32 operations rounded to nearest even, in the order
written. Devices, layouts, batch sizes, thread counts, autocast and PyTorch's precision flags do not change a bit.

One shape recurs. Every operator makes an integer (a convolution's sum, a pool's sum, a product, or the operand itself)
and sends it through `epilogue`, which holds the only rounding::

    y   = float32(acc) * m                   m, and each ratio below: from float64, rounded once to float32
    y   = fma(float32(r_q), s_r / s_y, y)    where a second operand is added
    y   = max(y, 0)                          ReLU;  ReLU6: min(max(y, 0), 6 / s_y)
    y_q = clamp(round_half_even(y), lo, hi)

This package imports nothing of the project.
"""

from .arithmetic import (
    Multipliers,
    dequantize,
    epilogue,
    fma,
    group_multipliers,
    integer_range,
    quantize,
    scale_ratio,
)
from .convolution import conv, linear
from .elementwise import add, lookup, lookup_table, mul
from .layout import cat, pad, upsample_linear, upsample_nearest
from .pooling import adaptive_avg_pool, adaptive_max_pool, avg_pool, max_pool, mean
from .weights import absorb, accumulator_bound, quantize_weight, weight_qparams, weight_scale

__all__ = [
    "Multipliers",
    "absorb",
    "accumulator_bound",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "add",
    "avg_pool",
    "cat",
    "conv",
    "dequantize",
    "epilogue",
    "fma",
    "group_multipliers",
    "integer_range",
    "linear",
    "lookup",
    "lookup_table",
    "max_pool",
    "mean",
    "mul",
    "pad",
    "quantize",
    "quantize_weight",
    "scale_ratio",
    "upsample_linear",
    "upsample_nearest",
    "weight_qparams",
    "weight_scale",
]
