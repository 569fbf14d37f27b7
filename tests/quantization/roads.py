"""Both roads from a float model to int8, and exact comparison of what comes out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.quantization import (
    calibrate,
    convert,
    convert_fx,
    fuse_modules,
    fuse_modules_qat,
    prepare_qat,
    prepare_qat_fx,
)


def differing(actual: Any, expected: Any) -> int:
    """How many elements of nested outputs differ at all; structures, shapes and dtypes must agree."""
    a, b = tree_leaves(actual), tree_leaves(expected)
    assert len(a) == len(b)
    count = 0
    for x, y in zip(a, b, strict=True):
        assert not isinstance(x, QTensor) and not isinstance(y, QTensor), "a model's output is not dequantized"
        if isinstance(y, Tensor):
            assert isinstance(x, Tensor) and x.shape == y.shape and x.dtype == y.dtype
            count += int(((x != y) & ~(x.isnan() & y.isnan())).sum())
        else:
            assert x == y
    return count


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise, in dB."""
    noise = float((actual.double() - expected.double()).pow(2).sum())
    signal = float(expected.double().pow(2).sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def call(model: nn.Module, item: Any) -> Any:
    """The model's output for an item as `calibrate` takes it; inputs are copied, for models work in place on them."""
    item = copy.deepcopy(item)
    with torch.no_grad():
        if isinstance(item, dict):
            return model(**item)
        return model(*item) if isinstance(item, tuple) else model(item)


def by_graph(model: nn.Module, item: Any, *, shapes: bool = True, **options: Any) -> tuple[nn.Module, nn.Module]:
    """``(QAT model, int8 model)`` by `prepare_qat_fx`, calibrated on one item; what QAT evaluates to is what int8 computes."""
    example = item if shapes else None
    qat = prepare_qat_fx(
        model.eval(), options.pop("qconfig_dict", None), example_inputs=copy.deepcopy(example), **options
    )
    calibrate(qat, [copy.deepcopy(item)], progress=False)
    int8 = convert_fx(qat)
    assert differing(call(int8, item), call(qat, item)) == 0
    return qat, int8


def by_name(
    model: nn.Module, names: Sequence[Sequence[str]], item: Any, *, keep_bn: bool = False
) -> tuple[nn.Module, nn.Module]:
    """``(QAT model, int8 model)`` by `fuse_modules` and `prepare_qat`; the model has its stubs."""
    fused = (fuse_modules_qat if keep_bn else fuse_modules)(model.eval(), names) if names else model.eval()
    qat = prepare_qat(fused)
    calibrate(qat, [copy.deepcopy(item)], progress=False)
    int8 = convert(qat)
    assert differing(call(int8, item), call(qat, item)) == 0
    return qat, int8


def forms(int8: nn.Module) -> dict[str, str]:
    """What runs in integers, by path: the converted form."""
    return {row.module: row.form for row in int8.quantization_report.integer}


def in_float(int8: nn.Module) -> dict[str, str]:
    """What runs in float, by path: the reason."""
    return {row.module: row.reason for row in int8.quantization_report.in_float}
