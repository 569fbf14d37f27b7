"""Which function a table of 256 entries is.

A plan keeps tables, not the functions they were made from. A function is taken for a table's where it gives all 256 entries again; then
the graph has the function, which a runtime fuses and computes fast. Else it has the table, which is exact everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.export.onnx.graph import Array, Graph
from horizon_plugin_pytorch.export.onnx.scales import FLOAT32, Units
from horizon_plugin_pytorch.plan.steps import INTEGER_DTYPES


@dataclass(frozen=True)
class Known:
    """A function of one tensor, in PyTorch and in ONNX."""

    function: Callable[[Tensor], Tensor]
    emit: Callable[[Graph, str], str]


def _sigmoid_times(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def hardswish(g: Graph, x: str) -> str:
    if g.opset >= 14:
        return g.op("HardSwish", x)
    return g.op("Mul", x, g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def gelu(g: Graph, x: str) -> str:
    """``x / 2 * (1 + erf(x / sqrt(2)))``; ONNX has the function itself from opset 20 on."""
    if g.opset >= 20:
        return g.op("Gelu", x)
    erf = g.op("Erf", g.op("Div", x, g.scalar(2**0.5)))
    return g.op("Mul", g.op("Mul", x, g.op("Add", erf, g.scalar(1.0))), g.scalar(0.5))


def gelu_tanh(g: Graph, x: str) -> str:
    if g.opset >= 20:
        return g.op("Gelu", x, approximate="tanh")
    cube = g.op("Mul", g.op("Mul", x, x), x)
    inner = g.op("Mul", g.op("Add", x, g.op("Mul", cube, g.scalar(0.044715))), g.scalar((2 / np.pi) ** 0.5))
    return g.op("Mul", g.op("Mul", x, g.op("Add", g.op("Tanh", inner), g.scalar(1.0))), g.scalar(0.5))


def mish(g: Graph, x: str) -> str:
    return g.op("Mish", x) if g.opset >= 18 else g.op("Mul", x, g.op("Tanh", g.op("Softplus", x)))


def _clip(low: float, high: float) -> Callable[[Graph, str], str]:
    return lambda g, x: g.op("Clip", x, g.scalar(low), g.scalar(high))


def _one(kind: str, **attributes: Any) -> Callable[[Graph, str], str]:
    return lambda g, x: g.op(kind, x, **attributes)


FUNCTIONS: tuple[Known, ...] = (
    Known(torch.relu, _one("Relu")),
    Known(F.relu6, _clip(0.0, 6.0)),
    Known(torch.sigmoid, _one("Sigmoid")),
    Known(F.silu, _sigmoid_times),
    Known(F.hardswish, hardswish),
    Known(F.hardsigmoid, _one("HardSigmoid", alpha=1 / 6, beta=0.5)),
    Known(F.gelu, gelu),
    Known(lambda x: F.gelu(x, approximate="tanh"), gelu_tanh),
    Known(torch.tanh, _one("Tanh")),
    Known(F.hardtanh, _clip(-1.0, 1.0)),
    Known(F.mish, mish),
    Known(F.softplus, _one("Softplus")),
    Known(F.softsign, _one("Softsign")),
    Known(F.elu, _one("Elu", alpha=1.0)),
    Known(F.selu, _one("Selu")),
    Known(F.leaky_relu, _one("LeakyRelu", alpha=0.01)),
    Known(torch.abs, _one("Abs")),
    Known(torch.neg, _one("Neg")),
    Known(torch.exp, _one("Exp")),
    Known(torch.square, lambda g, x: g.op("Mul", x, x)),
)


def recognize(table: Array, x: Units, y: Units) -> Known | None:
    """The function that gives this table for these units; None if it is none of the known ones."""
    wanted = torch.from_numpy(table)
    s_x, s_y = torch.tensor(x.scale), torch.tensor(y.scale)
    for known in (*FUNCTIONS, *_fitted(table, x, y)):
        try:
            found = reference.lookup_table(known.function, s_x, INTEGER_DTYPES[x.dtype], s_y, INTEGER_DTYPES[y.dtype])
        except ValueError:  # not defined for all 256
            continue
        if torch.equal(found, wanted):
            return known
    return None


def _fitted(table: Array, x: Units, y: Units) -> Iterator[Known]:
    """Functions with a number that the table itself tells: a slope below zero, a factor, a summand."""
    low, high = x.range
    q = np.arange(low, high + 1)
    inner = (table > y.range[0]) & (table < y.range[1])
    real, value = q * float(x.scale), table * float(y.scale)
    for slope in _simple(_ratio(value, real, inner & (q < 0))):
        yield Known(lambda t, a=slope: F.leaky_relu(t, a), _one("LeakyRelu", alpha=slope))  # type: ignore[misc]
    for factor in _simple(_ratio(value, real, inner)):
        yield Known(lambda t, a=factor: t * a, lambda g, x, a=factor: g.op("Mul", x, g.scalar(a)))  # type: ignore[misc]
    if inner.any():
        for summand in _simple(float(np.mean((value - real)[inner]))):
            yield Known(lambda t, a=summand: t + a, lambda g, x, a=summand: g.op("Add", x, g.scalar(a)))  # type: ignore[misc]


def _ratio(y: Array, x: Array, where: Array) -> float:
    """The least-squares slope through the origin, 0 where nothing is known."""
    norm = float(np.sum(x[where] ** 2))
    return float(np.sum(x[where] * y[where])) / norm if norm else 0.0


def _simple(value: float) -> Iterator[float]:
    """Numbers that a person would have written and that are near, then the number itself."""
    for digits in (1, 2, 3):
        yield float(f"{value:.{digits}g}")
    yield float(FLOAT32(value))
