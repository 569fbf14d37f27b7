"""Constants as the kernels read them: weights in tiles, vectors over channels padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu.library import CHANNELS, STEP, TILE

Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class ConvWeights:
    """Weights of a convolution, cut into steps of 64 bytes along its sum.

    Attributes:
        tiles: int8, ``[tiles of 16 outputs, steps, 16, 16 outputs, 4]``, 64-byte aligned.
        sums: int32 ``[C_out padded]``, each output channel's sum of weights.
        used: uint8 ``[steps]``, groups of 4 bytes that are not all padding.
        steps: for each step the tap it belongs to (the first tap of a kernel row where `runs`), and its byte within that tap.
        runs: whether the taps of a kernel row are read as one run of bytes.
        block_offset: for each tile the first input channel that it reads; None where that is 0 for all.
    """

    tiles: Tensor
    sums: Tensor
    used: NDArray[np.uint8]
    steps: tuple[tuple[int, int], ...]
    runs: bool
    block_offset: Int32s | None


def outputs_first(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """``[C_out, C_in / groups, *kernel]``, of a transposed convolution's ``[C_in, C_out / groups, *kernel]``, too."""
    if not transposed:
        return weight
    inputs, outputs, *kernel = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return split.reshape(groups * outputs, inputs // groups, *kernel)


def select_taps(weight: Tensor, taps: Sequence[Sequence[int]]) -> Tensor:
    """Taps last-but-one, input channels last: ``[C_out, *taps, C_in / groups]`` of ``[C_out, C_in / groups, *kernel]``."""
    for dim, indices in enumerate(taps, start=2):
        if list(indices) != list(range(weight.shape[dim])):
            weight = weight.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return weight.permute(0, *range(2, weight.dim()), 1)


def pack_conv(weight: Tensor, groups: int, contiguous: bool) -> ConvWeights:
    """Pack ``[C_out, *taps, C_in / groups]`` int8.

    A tile of 16 output channels reads one window of input channels: those of all groups that it touches. Where these are several
    groups, its weights are block-diagonal.

    Args:
        contiguous: the inputs of neighbouring taps of a kernel row are neighbours in memory, so that the row can be read as one run.
    """
    outputs, inputs = weight.shape[0], weight.shape[-1]
    taps = weight.shape[1:-1]
    across = taps[-1] if taps else 1
    per_group = outputs // groups
    first = np.arange(0, outputs, TILE) // per_group
    last = (np.minimum(np.arange(0, outputs, TILE) + TILE, outputs) - 1) // per_group
    window = int((last - first + 1).max()) * inputs
    count = prod(taps)
    runs = contiguous and groups == 1 and _steps(across * inputs) < across * _steps(inputs)
    rows, width = (count // across, across * inputs) if runs else (count, window)
    if not count:  # a phase of a transposed convolution that no tap reaches: the bias alone
        rows, width = 1, 1
    steps = _steps(width)
    padded = -(-outputs // TILE) * TILE
    if groups == 1 and (padded, steps * STEP) == (outputs, width):
        matrix = weight.reshape(outputs, rows, width)
    else:
        matrix = torch.zeros(padded, rows, steps * STEP, dtype=torch.int8)
        if count and groups == 1:
            matrix[:outputs, :, :width] = weight.reshape(outputs, rows, width)
        elif count:
            channel = np.arange(outputs)
            offset = torch.from_numpy((channel // per_group - first[channel // TILE]) * inputs)
            index = (offset[:, None] + torch.arange(inputs))[:, None, :].expand(outputs, rows, inputs)
            matrix[:outputs].scatter_(2, index, weight.reshape(outputs, rows, inputs))
    groups_of_4 = matrix.contiguous().view(torch.int32).view(padded // TILE, TILE, rows * steps * (STEP // 4))
    tiles = groups_of_4.transpose(1, 2).contiguous().view(torch.int8)
    left = np.minimum(STEP, width - STEP * np.arange(steps))
    return ConvWeights(
        tiles,
        pad_channels(sums(weight)),
        np.tile(-(-left // 4), rows).astype(np.uint8),
        tuple((row * across if runs else row, byte * STEP) for row in range(rows) for byte in range(steps)),
        runs,
        (first * inputs).astype(np.int32) if groups > 1 else None,
    )


def sums(weight: Tensor) -> Tensor:
    """int32, the sum of each output channel's weights."""
    rows = weight.reshape(weight.shape[0], -1)
    if 128 * rows.shape[1] < 2**24:  # exact in float32, and several times faster
        return rows.to(torch.float32).sum(1).to(torch.int32)
    return rows.sum(1, dtype=torch.int32)


def _steps(width: int) -> int:
    return -(-width // STEP)


def pack_depthwise(weight: Tensor) -> Tensor:
    """int8 ``[kernel_y, kernel_x, channels padded]`` of ``[C, taps…, 1]``; one dimension gives kernel_y = 1."""
    channels, *taps = weight.shape[:-1]
    taps = [1] * (2 - len(taps)) + taps
    packed = torch.zeros(*taps, -(-channels // CHANNELS) * CHANNELS, dtype=torch.int8)
    packed[..., :channels] = weight.reshape(channels, *taps).permute(1, 2, 0)
    return packed


def pad_channels(values: Tensor, channels: int | None = None) -> Tensor:
    """A vector over channels, padded with zeros to a multiple of 64; one value is repeated for each of `channels`."""
    values = values.reshape(-1)
    if channels is not None and values.numel() == 1:
        values = values.expand(channels)
    padded = torch.zeros(-(-values.numel() // CHANNELS) * CHANNELS, dtype=values.dtype)
    padded[: values.numel()] = values
    return padded
