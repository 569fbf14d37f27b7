"""The PyTorch functions a plan may call, by name. A plan from a file can name these and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_TORCH = """
    abs add arange argmax argmin bmm cat ceil chunk clamp clamp_max clamp_min clip concat cos cumsum div einsum eq erf exp expm1 flatten
    flip floor full gather ge gt index_select isfinite le log log1p log2 lt matmul max maximum mean meshgrid min minimum mm movedim mul
    narrow ne neg norm numel ones ones_like permute pixel_shuffle pixel_unshuffle pow reciprocal relu remainder repeat_interleave reshape
    roll round rsqrt select sigmoid sign sin softmax sort split sqrt square squeeze stack std sub sum swapaxes tan tanh tile topk transpose
    tril triu true_divide unbind unflatten unsqueeze var where zeros zeros_like channel_shuffle
""".split()
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d
    avg_pool2d avg_pool3d batch_norm celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dropout dropout1d
    dropout2d dropout3d elu embedding fold gelu glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm
    interpolate layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid max_pool1d max_pool2d max_pool3d mish normalize
    one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 scaled_dot_product_attention selu sigmoid silu softmax softmin softplus
    softshrink softsign tanh tanhshrink threshold unfold
""".split()
_METHODS = """
    abs add all amax amin any argmax argmin bmm bool chunk clamp clamp_max clamp_min clip clone contiguous cos cumsum detach dim div eq exp
    expand expand_as flatten flip float floor gather ge gt half index_select int le log log_softmax long lt masked_fill matmul max mean min
    movedim mul narrow ndimension ne neg new_ones new_zeros norm numel permute pow reciprocal relu repeat reshape reshape_as roll round
    rsqrt select sigmoid sign sin size softmax sort split sqrt square squeeze stack std sub sum swapaxes t tanh tile to topk transpose tril
    triu type_as unbind unflatten unfold unsqueeze var view view_as where
""".split()
_OPERATOR = """
    add and_ eq floordiv ge getitem gt iadd imul index isub itruediv le lt matmul mod mul ne neg not_ or_ pow sub truediv
""".split()
ATTRIBUTES = frozenset(("shape", "ndim", "device", "dtype", "T", "mT"))

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"torch.{n}": getattr(torch, n) for n in _TORCH if hasattr(torch, n)},
    **{f"torch.nn.functional.{n}": getattr(F, n) for n in _FUNCTIONAL if hasattr(F, n)},
    **{f"operator.{n}": getattr(operator, n) for n in _OPERATOR},
}
METHODS = frozenset(_METHODS) | {f"{n}_" for n in ("add", "clamp", "div", "mul", "relu", "sigmoid", "sub", "tanh")}
NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


def read_attribute(x: Any, name: str) -> Any:
    if name not in ATTRIBUTES:
        raise ValueError(f"attribute {name!r} cannot be read in a plan")
    return getattr(x, name)


def resolve(target: str) -> Callable[..., Any] | None:
    """The function that a step's target names: ``torch.…``, ``operator.…``, ``method.<name>`` or ``attribute``."""
    if target == "attribute":
        return read_attribute
    if target.startswith("method."):
        name = target.removeprefix("method.")
        return (lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)) if name in METHODS else None
    return FUNCTIONS.get(target)
