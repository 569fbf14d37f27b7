"""The first convolution of an image network: few channels, and a stride of 2.

A step of 64 bytes of such an input would be mostly empty. So the image is quantized with its rows in pairs: a pixel holds the four (or
fewer) channels of two rows, ``[N, H / 2, W, 2, 4]``. The convolution walks down the pairs with stride 1, and a row of its kernel is one
run of bytes over two rows of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.native.walks import Walk
from horizon_plugin_pytorch.plan.program import Step

ROWS, CHANNELS = 2, 4


def fits(step: Step, image: Sequence[int]) -> bool:
    """Whether a group that reads an image ``[N, C, H, W]`` gains from rows in pairs."""
    geometry = Geometry(**step.params["geometry"])
    return (
        step.kind == "group"
        and len(step.args) == 1
        and (geometry.dims, geometry.transposed, geometry.groups, geometry.padding_mode) == (2, False, 1, "zeros")
        and not isinstance(geometry.padding, str)
        and geometry.stride == (2, 2)
        and geometry.dilation == (1, 1)
        and len(image) == 4
        and image[1] <= CHANNELS
        and geometry.kernel_size[1] * ROWS * CHANNELS <= library.STEP
    )


def above(walks: tuple[Walk, ...]) -> int:
    """Rows of zeros that the kernel gets above it, so that it begins with a pair."""
    return walks[0].deltas[0] % ROWS


def pair_walks(walks: tuple[Walk, ...]) -> tuple[Walk, ...]:
    """Of walks over rows and columns: over pairs of rows and columns."""
    rows, columns = walks
    pairs = -(-(len(rows.taps) + above(walks)) // ROWS)
    first = (rows.deltas[0] - above(walks)) // ROWS
    return Walk(rows.count, 1, tuple(range(first, first + pairs)), tuple(range(pairs))), columns


def pair_rows(weight: Tensor, zeros: int) -> Tensor:
    """``[C_out, 8, pairs, kernel_x]`` of ``[C_out, C_in, kernel_y, kernel_x]``, with rows of zeros above."""
    outputs, inputs, height, width = weight.shape
    pairs = -(-(height + zeros) // ROWS)
    laid = torch.zeros(outputs, pairs * ROWS, CHANNELS, width, dtype=weight.dtype)
    laid[:, zeros : zeros + height, :inputs] = weight.transpose(1, 2)
    return laid.view(outputs, pairs, ROWS * CHANNELS, width).transpose(1, 2)


def pair_shape(image: Sequence[int]) -> tuple[int, ...]:
    return image[0], ROWS * CHANNELS, -(-image[2] // ROWS), image[3]
