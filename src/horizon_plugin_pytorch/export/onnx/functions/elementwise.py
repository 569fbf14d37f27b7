"""Functions of one element, or of two that are broadcast, on float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx import tables
from horizon_plugin_pytorch.export.onnx.functions.call import Call, numpy_type
from horizon_plugin_pytorch.plan.program import Const, Ref


def _one(kind: str, **attributes: Any) -> Callable[..., str]:
    """A function that ONNX has under a name of its own."""
    return lambda c, input, inplace=False: c.op(kind, c.tensor(input), **attributes)


def _composed(emit: Callable[..., str]) -> Callable[..., str]:
    return lambda c, input, inplace=False: emit(c.graph, c.tensor(input))


def _floating(c: Call, *arguments: Any) -> list[str]:
    """Operands in floating point: what PyTorch divides integers in."""
    found = c.promoted(*arguments)
    into = c.low.shapes.meta(c.low.index).dtype
    return found if into in {c.dtype(a) for a in arguments} else c.promoted(*arguments, into=into)


def _two(kind: str) -> Callable[..., str]:
    def rule(c: Call, input: Any, other: Any, alpha: float = 1) -> str:
        a, b = c.promoted(input, other)
        if alpha != 1:
            dtype = c.low.shapes.meta(c.low.index).dtype
            b = c.graph.op("Mul", b, c.graph.constant(alpha, numpy_type(dtype)))
        return c.op(kind, a, b)

    return rule


def div(c: Call, input: Any, other: Any, rounding_mode: str | None = None) -> str:
    if rounding_mode is None:
        return c.op("Div", *_floating(c, input, other))
    a, b = c.promoted(input, other)
    dtype = c.low.shapes.meta(c.low.index).dtype
    if not dtype.is_floating_point:
        raise ExportError("a division of integer tensors with rounding has no form in ONNX here: divide floats")
    y = c.graph.op("Div", a, b)
    if rounding_mode == "floor":
        return c.op("Floor", y)
    return c.op("Mul", c.graph.op("Sign", y), c.graph.op("Floor", c.graph.op("Abs", y)))


def floordiv(c: Call, input: Any, other: Any) -> str:
    return div(c, input, other, "floor")


def rsub(c: Call, input: Any, other: Any) -> str:
    return _two("Sub")(c, other, input)


def remainder(c: Call, input: Any, other: Any) -> str:
    """With the divisor's sign, as PyTorch: ``a - floor(a / b) * b``; integers have ONNX's Mod."""
    a, b = c.promoted(input, other)
    if not c.low.shapes.meta(c.low.index).dtype.is_floating_point:
        return c.op("Mod", a, b)
    return c.op("Sub", a, c.graph.op("Mul", c.graph.op("Floor", c.graph.op("Div", a, b)), b))


def power(c: Call, input: Any, exponent: Any) -> str:
    if isinstance(exponent, (int, float)) and exponent == 2:
        x = c.tensor(input)
        return c.op("Mul", x, x)
    return c.op("Pow", *c.promoted(input, exponent))


def _compare(kind: str, negated: bool = False) -> Callable[..., str]:
    def rule(c: Call, input: Any, other: Any) -> str:
        y = c.graph.op(kind, *c.promoted(input, other))
        return c.op("Not", y) if negated else y

    return rule


def clamp(c: Call, input: Any, min: Any = None, max: Any = None) -> str:
    if isinstance(min, (Ref, Const)) or isinstance(max, (Ref, Const)):
        x = c.tensor(input)
        if min is not None:
            x = c.graph.op("Max", x, c.tensor(min))
        return x if max is None else c.graph.op("Min", x, c.tensor(max))
    dtype = numpy_type(c.dtype(input) or torch.float32)
    low, high = ("" if n is None else c.graph.constant(c.fixed(n, "a clamp to a size"), dtype) for n in (min, max))
    return c.op("Clip", c.tensor(input), low, high) if high else c.op("Clip", c.tensor(input), low)


def hardtanh(c: Call, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> str:
    return clamp(c, input, float(min_val), float(max_val))


def where(c: Call, condition: Any, input: Any = None, other: Any = None) -> str:
    if input is None:
        raise ExportError("where with a condition alone gives as many elements as it finds, which has no form here")
    return c.op("Where", c.tensor(condition), *c.promoted(input, other))


def where_method(c: Call, input: Any, condition: Any, other: Any) -> str:
    return where(c, condition, input, other)


def masked_fill(c: Call, input: Any, mask: Any, value: Any) -> str:
    x = c.tensor(input)
    filler = c.tensor(value) if isinstance(value, Ref) else c.graph.constant(value, numpy_type(c.dtype(input)))  # type: ignore[arg-type]
    return c.op("Where", c.tensor(mask), filler, x)


def gelu(c: Call, input: Any, approximate: str = "none") -> str:
    return (tables.gelu_tanh if approximate == "tanh" else tables.gelu)(c.graph, c.tensor(input))


def leaky_relu(c: Call, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return c.op("LeakyRelu", c.tensor(input), alpha=float(negative_slope))


def elu(c: Call, input: Any, alpha: float = 1.0, inplace: bool = False) -> str:
    return c.op("Elu", c.tensor(input), alpha=float(alpha))


def celu(c: Call, input: Any, alpha: float = 1.0, inplace: bool = False) -> str:
    return c.op("Celu", c.tensor(input), alpha=float(alpha))


def softplus(c: Call, input: Any, beta: float = 1.0, threshold: float = 20.0) -> str:
    x = c.tensor(input)
    if beta == 1:
        return c.op("Softplus", x)
    factor = c.graph.scalar(beta)
    return c.op("Div", c.graph.op("Softplus", c.graph.op("Mul", x, factor)), factor)


def hardshrink(c: Call, input: Any, lambd: float = 0.5) -> str:
    return c.op("Shrink", c.tensor(input), lambd=float(lambd), bias=0.0)


def softshrink(c: Call, input: Any, lambd: float = 0.5) -> str:
    return c.op("Shrink", c.tensor(input), lambd=float(lambd), bias=float(lambd))


def threshold(c: Call, input: Any, threshold: float, value: float, inplace: bool = False) -> str:
    x = c.tensor(input)
    above = c.graph.op("Greater", x, c.graph.scalar(threshold))
    return c.op("Where", above, x, c.graph.scalar(value))


def prelu(c: Call, input: Any, weight: Any) -> str:
    w, rank = c.tensor(weight), c.rank(input)
    if c.sizes(weight) != (1,) and rank > 2:
        w = c.graph.op("Unsqueeze", w, c.graph.constant(list(range(1, rank - 1))))
    return c.op("PRelu", c.tensor(input), w)


def rounding(c: Call, input: Any, decimals: int = 0) -> str:
    if decimals:
        raise ExportError("round to decimals has no form in ONNX: multiply, round and divide")
    return c.op("Round", c.tensor(input))


def ones_like(c: Call, input: Any, **_: Any) -> str:
    return _filled(c, input, 1)


def _filled(c: Call, like: Any, value: float) -> str:
    dtype = c.low.shapes.meta(c.low.index).dtype
    shape = c.graph.op("Shape", c.tensor(like))
    return c.op("Expand", c.graph.constant(value, numpy_type(dtype)), shape)


def _of_negative(emit: Callable[[Call, str], str]) -> Callable[..., str]:
    return lambda c, input: emit(c, c.tensor(input))


def expm1(c: Call, x: str) -> str:
    return c.op("Sub", c.graph.op("Exp", x), c.graph.scalar(1.0))


def log1p(c: Call, x: str) -> str:
    return c.op("Log", c.graph.op("Add", x, c.graph.scalar(1.0)))


def log2(c: Call, x: str) -> str:
    return c.op("Div", c.graph.op("Log", x), c.graph.scalar(float(np.log(2))))


def isfinite(c: Call, x: str) -> str:
    bad = c.graph.op("Or", c.graph.op("IsNaN", x), c.graph.op("IsInf", x))
    return c.op("Not", bad)


def _same_op(kind: str) -> Callable[..., str]:
    """Two operands of any kind, in floating point or as truth values."""
    return lambda c, a, b: c.op(kind, c.tensor(a), c.tensor(b))


def cast_bool(c: Call, input: Any) -> str:
    return c.op("Not", c.cast(c.tensor(input), c.dtype(input) or torch.bool, torch.bool))


_UNARY = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "neg": "Neg",
    "reciprocal": "Reciprocal", "relu": "Relu", "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "softsign": "Softsign", "sqrt": "Sqrt",
    "tan": "Tan", "tanh": "Tanh", "selu": "Selu",
}  # fmt: skip
RULES: dict[str, Callable[..., Any]] = {
    **{name: _one(kind) for name, kind in _UNARY.items()},
    **{known: _composed(emit) for known, emit in (("hardswish", tables.hardswish), ("mish", tables.mish))},
    "silu": _composed(lambda g, x: g.op("Mul", x, g.op("Sigmoid", x))),
    "logsigmoid": _composed(lambda g, x: g.op("Neg", g.op("Softplus", g.op("Neg", x)))),
    "tanhshrink": _composed(lambda g, x: g.op("Sub", x, g.op("Tanh", x))),
    "square": _composed(lambda g, x: g.op("Mul", x, x)),
    "rsqrt": _composed(lambda g, x: g.op("Reciprocal", g.op("Sqrt", x))),
    "relu6": _composed(lambda g, x: g.op("Clip", x, g.scalar(0.0), g.scalar(6.0))),
    "hardsigmoid": _one("HardSigmoid", alpha=1 / 6, beta=0.5),
    **{n: _of_negative(f) for n, f in (("expm1", expm1), ("log1p", log1p), ("log2", log2), ("isfinite", isfinite))},
    "add": _two("Add"), "sub": _two("Sub"), "mul": _two("Mul"), "maximum": _two("Max"), "minimum": _two("Min"), "div": div,
    "floordiv": floordiv, "remainder": remainder, "mod": remainder, "pow": power,
    "eq": _compare("Equal"), "ne": _compare("Equal", negated=True), "gt": _compare("Greater"), "ge": _compare("GreaterOrEqual"),
    "lt": _compare("Less"), "le": _compare("LessOrEqual"), "and": _same_op("And"), "or": _same_op("Or"), "not": cast_bool,
    "clamp": clamp, "clamp_min": lambda c, input, min: clamp(c, input, min), "clamp_max": lambda c, input, max: clamp(c, input, None, max),
    "hardtanh": hardtanh, "where": where, "masked_fill": masked_fill, "gelu": gelu, "leaky_relu": leaky_relu, "elu": elu, "celu": celu,
    "softplus": softplus, "hardshrink": hardshrink, "softshrink": softshrink, "threshold": threshold, "prelu": prelu, "round": rounding,
    "ones_like": ones_like,
}  # fmt: skip
