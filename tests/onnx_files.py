"""Small ONNX files, made with onnx's own helpers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Size = int | str | None


def write(
    path: Path,
    nodes: Sequence[Any],
    inputs: dict[str, Sequence[Size]],
    outputs: dict[str, Sequence[Size]],
    weights: dict[str, np.ndarray] | None = None,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
) -> Path:
    """A model of these nodes; `dtype` is the inputs'."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(n, dtype, list(shape)) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n, shape in outputs.items()],
        [numpy_helper.from_array(w, n) for n, w in (weights or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def network(
    path: Path,
    *,
    batch: Size = 1,
    size: Sequence[Size] = (16, 24),
    channels: int = 3,
    name: str = "image",
    last: Sequence[Any] = (),
) -> Path:
    """Conv, BN, ReLU, a residual Conv, pooling and Gemm: image ``[batch, channels, *size]`` to logits ``[batch, 5]``.

    Args:
        last: nodes from ``pooled`` to ``logits`` in the place of Flatten and Gemm.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    weights = {
        "w0": normal(8, channels, 3, 3), "b0": normal(8), "w1": normal(8, 8, 3, 3), "w2": normal(5, 8), "b2": normal(5),
        "scale": 1 + normal(8), "shift": normal(8), "mean": normal(8), "var": 1 + normal(8) ** 2,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", [name, "w0", "b0"], ["c0"], pads=[1, 1, 1, 1], name="stem"),
        helper.make_node("BatchNormalization", ["c0", "scale", "shift", "mean", "var"], ["n0"], name="norm"),
        helper.make_node("Relu", ["n0"], ["r0"], name="relu"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1, 1, 1, 1], name="residual"),
        helper.make_node("Add", ["c1", "r0"], ["sum"], name="add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="pool"),
        *(
            last
            or [
                helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
                helper.make_node("Gemm", ["flat", "w2", "b2"], ["logits"], transB=1, name="head"),
            ]
        ),
    ]
    return write(path, nodes, {name: (batch, channels, *size)}, {"logits": (batch, 5)}, weights)
