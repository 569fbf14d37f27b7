"""A fused group's anchor as a matrix product: ``y[g] = W[g] @ X[g]`` for every group g of its channels.

W is ``[groups, C_out / groups, K]`` with K = C_in / groups times the taps, X is ``[groups, K, positions]``: for every output position
the inputs that it reads. A transposed convolution is the convolution of its input, zeros put between the values, with the
flipped kernel. This is what least squares and rounding methods are written in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.qat.weight import channels_first


def weight_matrix(group: QATGroup) -> Tensor:
    """W, in float64."""
    axis, groups = group._layout
    weight = channels_first(group.weight.detach().double(), axis, groups)
    if axis == 1:
        weight = weight.flip(tuple(range(2, weight.dim())))
    return weight.flatten(1).unflatten(0, (groups, -1))


def from_matrix(group: QATGroup, matrix: Tensor) -> Tensor:
    """W in the shape of the group's weight."""
    axis, groups = group._layout
    shape = group.weight.shape
    if axis == 0:
        return matrix.reshape(shape)
    weight = matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2).flatten(0, 1)
    return weight.flip(tuple(range(2, weight.dim())))


def positions(group: QATGroup, y: Tensor) -> int:
    """How many output positions `y` has."""
    return y.numel() // y.shape[group.geometry.channel_axis(y)]


def at_positions(group: QATGroup, y: Tensor, chosen: Tensor) -> Tensor:
    """Values of an output-shaped tensor: ``[groups, C_out / groups, chosen]``."""
    channels_first = y.movedim(group.geometry.channel_axis(y), 0).flatten(1)
    return channels_first[:, chosen].unflatten(0, (group.geometry.groups, -1))


def columns(group: QATGroup, x: Tensor, y_shape: torch.Size, chosen: Tensor) -> Tensor:
    """X at the chosen positions of an output of shape `y_shape`.

    Args:
        x: the group's float input.
        chosen: int64 ``[n]``, indices into the output positions in the order batch, then space.
    """
    geometry = group.geometry
    if geometry.dims == 0:
        return x.reshape(-1, x.shape[-1])[chosen].T.unsqueeze(0)
    dims = geometry.dims
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    out = y_shape[-dims:]
    stride: tuple[int, ...]
    if geometry.transposed:
        x, stride = _with_zeros_between(x, geometry.stride), (1,) * dims
        pads: list[int] = []
        for i in reversed(range(dims)):
            reach = geometry.dilation[i] * (geometry.kernel_size[i] - 1)
            before = reach - int(geometry.padding[i])
            pads += [before, out[i] + reach - before - x.shape[2 + i]]
        x = F.pad(x, pads)
    else:
        stride = geometry.stride
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x = F.pad(x, geometry._pads(), mode=mode)
    for i in range(dims):
        window = geometry.dilation[i] * (geometry.kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, window, stride[i])[..., :: geometry.dilation[i]]
    places = torch.unravel_index(chosen, (x.shape[0], *out))
    # Positions last, as they lie in memory: reading all channels of one position after another would miss the cache each time.
    ordered = x.permute(1, *range(dims + 2, 2 * dims + 2), 0, *range(2, dims + 2))  # [C_in, *kernel, N, *out]
    index: Any = (..., *places)
    found = ordered[index]
    return found.reshape(geometry.groups, -1, len(chosen))


def _with_zeros_between(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *size)
    places: Any = (..., *(slice(None, None, s) for s in stride))
    spread[places] = x
    return spread
