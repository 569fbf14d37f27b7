"""Converted modules under `torch.compile`: each call of one is a single operator, `horizon::quantized_module`.

The arithmetic looks at its data: NaN is an error, a sum that float32 would round is split, a table is made when a scale is first seen.
And a compiler might round otherwise. So the operator runs the module as it runs without a compiler; what lies between the modules, which
only moves integers, is compiled. A graph knows its modules by number, which means nothing in another process, so
`torch.export` is refused: `Plan.as_module` is for that, and is the faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.nn.quantized.tensors import MakesIntegers


def call(
    module: MakesIntegers, xs: Sequence[Tensor], method: str = "forward", sizes: Any = (), number: float | None = None
) -> Tensor:
    """`module.method` on `xs` and the other arguments, as one node of the graph that is being made.

    Raises:
        QuantizationError: the graph is made by `torch.export`.
    """
    if torch.compiler.is_exporting():
        raise QuantizationError(
            "a converted model is exported as a plan: "
            "torch.export.export(horizon.plan.record(model, inputs).as_module(), inputs)"
        )
    y = torch.ops.horizon.quantized_module(
        [x.payload if isinstance(x, QTensor) else x for x in xs],
        [x.scale if isinstance(x, QTensor) else None for x in xs],
        module.number,
        method,
        list(sizes),
        number,
    )
    return y if module.scale is None else QTensor.make(y, module.scale, module.dtype8, module.float_calls)


def _module(number: int) -> MakesIntegers:
    if number not in MakesIntegers.numbered:
        raise QuantizationError(
            "a compiled graph calls a module of a converted model that is gone: compile the model again"
        )
    return MakesIntegers.numbered[number]


@torch.library.custom_op("horizon::quantized_module", mutates_args=())
def quantized_module(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    module: int,
    method: str,
    sizes: Sequence[int],
    number: float | None,
) -> Tensor:
    """A method of a converted module, as without a compiler.

    Args:
        xs: integers, and floats.
        scales: of `xs`; None for floats.
        module, method: the module's number, and the name.
        sizes, number: what else the method takes.

    Returns:
        integers, or floats where the module has no scale; contiguous.

    Raises:
        QuantizationError: what the module raises; or there is no module of that number.
    """
    inputs = [x if s is None else QTensor.make(x.detach(), s, x.dtype) for x, s in zip(xs, scales, strict=True)]
    y = _module(module).uncompiled(method, inputs, sizes, number)
    y = (y.payload if isinstance(y, QTensor) else y).contiguous()
    # an output of an operator is a tensor of its own
    return y.clone() if any(y.data_ptr() == x.data_ptr() for x in xs) else y


@quantized_module.register_fake
def _(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    module: int,
    method: str,
    sizes: Sequence[int],
    number: float | None,
) -> Tensor:
    owner = _module(module)
    y = owner.float_form(method, [x.to(torch.float32) for x in xs], sizes)
    return xs[0].new_empty(y.shape, dtype=torch.float32 if owner.scale is None else owner.dtype8)
