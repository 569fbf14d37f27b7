"""Layers that run in float32: norms, softmax, products, convolutions and pools outside groups, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from horizon_plugin_pytorch.backends.reference.shapes import as_tuple
from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx import pools
from horizon_plugin_pytorch.export.onnx.functions.call import Call
from horizon_plugin_pytorch.export.onnx.functions.layout import chunk
from horizon_plugin_pytorch.export.onnx.shapes import NeedsFixedSize


def _softmax(kind: str) -> Callable[..., str]:
    def rule(c: Call, input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> str:
        if dim is None:
            dim = 0 if c.rank(input) in (0, 1, 3) else 1  # PyTorch's own default
        return c.op(kind, c.tensor(input), axis=dim % c.rank(input))

    return rule


def softmin(c: Call, input: Any, dim: int, _stacklevel: int = 3, dtype: Any = None) -> str:
    return c.op("Softmax", c.graph.op("Neg", c.tensor(input)), axis=dim % c.rank(input))


def _affine(c: Call, y: str, weight: Any, bias: Any, behind: int) -> str:
    """``y * weight + bias`` along a dimension that has `behind` dimensions behind it."""
    for kind, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            p = c.tensor(parameter)
            if behind:
                p = c.graph.op("Unsqueeze", p, c.graph.constant(list(range(1, behind + 1))))
            y = c.graph.op(kind, y, p)
    return y


def layer_norm(
    c: Call, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> str:
    c.graph.require(17)
    x, count = c.tensor(input), len(as_list(normalized_shape))
    scale = (
        c.tensor(weight)
        if weight is not None
        else c.graph.constant(np.ones(as_list(c.fixed(normalized_shape, "a layer norm"))), np.float32)
    )
    shift = [] if bias is None else [c.tensor(bias)]
    return c.op("LayerNormalization", x, scale, *shift, axis=-count, epsilon=float(eps))


def as_list(x: Any) -> list[int]:
    return [x] if isinstance(x, int) else list(x)


def batch_norm(
    c: Call, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> str:  # fmt: skip
    if training or running_mean is None:
        raise ExportError("a batch norm that is in training mode: put the model into eval mode before it is recorded")
    channels = c.sizes(running_mean)
    scale, shift = (
        c.graph.constant(np.full(channels, empty), np.float32) if p is None else c.tensor(p)
        for p, empty in ((weight, 1.0), (bias, 0.0))
    )
    return c.op(
        "BatchNormalization", c.tensor(input), scale, shift, c.tensor(running_mean), c.tensor(running_var), epsilon=float(eps)
    )  # fmt: skip


def instance_norm(
    c: Call, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> str:  # fmt: skip
    if not use_input_stats:
        return batch_norm(c, input, running_mean, running_var, weight, bias, False, momentum, eps)
    channels = c.sizes(input)[1]
    one, zero = (c.graph.constant(np.full(channels, v), np.float32) for v in (1.0, 0.0))
    scale, shift = (c.tensor(p) if p is not None else other for p, other in ((weight, one), (bias, zero)))
    return c.op("InstanceNormalization", c.tensor(input), scale, shift, epsilon=float(eps))


def group_norm(c: Call, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> str:
    """InstanceNormalization of the groups as channels, then weight and bias per channel."""
    graph, x, rank = c.graph, c.tensor(input), c.rank(input)
    shape = graph.op("Shape", x)
    grouped = graph.op("Reshape", x, graph.constant([0, num_groups, -1]))
    one, zero = (graph.constant(np.full(num_groups, v), np.float32) for v in (1.0, 0.0))
    y = c.op("InstanceNormalization", grouped, one, zero, epsilon=float(eps))
    return _affine(c, graph.op("Reshape", y, shape), weight, bias, rank - 2)


def linear(c: Call, input: Any, weight: Any, bias: Any = None) -> str:
    w = c.graph.op("Transpose", c.tensor(weight), perm=[1, 0])
    y = c.op("MatMul", c.tensor(input), w)
    return y if bias is None else c.graph.op("Add", y, c.tensor(bias))


def matmul(c: Call, input: Any, other: Any) -> str:
    return c.op("MatMul", *c.promoted(input, other))


def einsum(c: Call, equation: str, *operands: Any) -> str:
    listed = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    return c.op("Einsum", *c.promoted(*listed), equation=equation.replace(" ", ""))


def _conv(dims: int) -> Callable[..., str]:
    def rule(
        c: Call, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> str:  # fmt: skip
        kernel = c.sizes(weight)[2:]
        dilated = as_tuple(dilation, dims)
        if padding == "same":
            totals = [d * (int(k or 1) - 1) for d, k in zip(dilated, kernel, strict=True)]
            pads = [t // 2 for t in totals] + [t - t // 2 for t in totals]
        else:
            pads = [*as_tuple(0 if padding == "valid" else padding, dims)] * 2
        inputs = [c.tensor(input), c.tensor(weight), *([] if bias is None else [c.tensor(bias)])]
        return c.op(
            "Conv", *inputs, kernel_shape=list(kernel), strides=list(as_tuple(stride, dims)), dilations=list(dilated), group=groups,
            pads=pads,
        )  # fmt: skip

    return rule


def _conv_transpose(dims: int) -> Callable[..., str]:
    def rule(
        c: Call, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1,
        dilation: Any = 1,
    ) -> str:  # fmt: skip
        inputs = [c.tensor(input), c.tensor(weight), *([] if bias is None else [c.tensor(bias)])]
        return c.op(
            "ConvTranspose", *inputs, kernel_shape=list(c.sizes(weight)[2:]), strides=list(as_tuple(stride, dims)),
            dilations=list(as_tuple(dilation, dims)), group=groups, pads=[*as_tuple(padding, dims)] * 2,
            output_padding=list(as_tuple(output_padding, dims)),
        )  # fmt: skip

    return rule


def _avg_pool(dims: int) -> Callable[..., str]:
    def rule(
        c: Call, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> str:  # fmt: skip
        kernel = c.fixed(kernel_size, "an average pool whose kernel depends on the input's size")
        step = c.fixed(stride, "an average pool whose stride depends on the input's size")
        return pools.average(
            c.graph, c.tensor(input), c.sizes(input), c.path, dims, kernel, step, padding, ceil_mode, count_include_pad, divisor_override
        )  # fmt: skip

    return rule


def _adaptive_avg_pool(dims: int) -> Callable[..., str]:
    def rule(c: Call, input: Any, output_size: Any) -> str:
        size = c.fixed(output_size, "an adaptive pool whose size depends on the input's")
        return pools.adaptive_average(c.graph, c.tensor(input), c.sizes(input), c.path, dims, size)

    return rule


def embedding(c: Call, input: Any, weight: Any, *_: Any, **__: Any) -> str:
    return c.op("Gather", c.tensor(weight), c.tensor(input), axis=0)


def glu(c: Call, input: Any, dim: int = -1) -> str:
    value, gate = chunk(c, input, 2, dim)
    return c.graph.op("Mul", value, c.graph.op("Sigmoid", gate))


def attention(
    c: Call, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    """``softmax(q k^T * scale + mask) v``."""
    if dropout_p or enable_gqa or is_causal:
        raise ExportError(
            "attention with dropout, grouped queries or a causal mask has no form in ONNX here: give attn_mask"
        )
    graph, rank, width = c.graph, c.rank(query), c.sizes(query)[-1]
    if scale is None and width is None:
        raise NeedsFixedSize("attention over a width that varies")
    factor = scale if scale is not None else float(width) ** -0.5  # type: ignore[arg-type]
    keys = graph.op("Transpose", c.tensor(key), perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = graph.op("Mul", graph.op("MatMul", c.tensor(query), keys), graph.scalar(factor))
    if attn_mask is not None:
        mask = c.tensor(attn_mask)
        if not (c.dtype(attn_mask) or c.meta(attn_mask).dtype).is_floating_point:
            mask = graph.op("Where", mask, graph.scalar(0.0), graph.scalar(float(np.finfo(np.float32).min)))
        scores = graph.op("Add", scores, mask)
    return c.op("MatMul", graph.op("Softmax", scores, axis=rank - 1), c.tensor(value))


def grid_sample(
    c: Call,
    input: Any,
    grid: Any,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> str:
    c.graph.require(16)
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode) if c.graph.opset >= 20 else mode
    return c.op(
        "GridSample", c.tensor(input), c.tensor(grid), mode=renamed, padding_mode=padding_mode, align_corners=int(bool(align_corners))
    )  # fmt: skip


def local_response_norm(c: Call, input: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> str:
    return c.op("LRN", c.tensor(input), size=size, alpha=float(alpha), beta=float(beta), bias=float(k))


RULES: dict[str, Callable[..., Any]] = {
    "softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax"), "softmin": softmin, "layer_norm": layer_norm,
    "batch_norm": batch_norm, "instance_norm": instance_norm, "group_norm": group_norm, "linear": linear, "matmul": matmul, "einsum": einsum,
    "embedding": embedding, "glu": glu, "scaled_dot_product_attention": attention, "grid_sample": grid_sample,
    "local_response_norm": local_response_norm,
    **{f"conv{d}d": _conv(d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv_transpose(d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _avg_pool(d) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _adaptive_avg_pool(d) for d in (1, 2, 3)},
}  # fmt: skip
