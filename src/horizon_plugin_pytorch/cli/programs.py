"""What `horizon run` and `horizon bench` are asked to run: a saved plan, or a model that becomes one here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.cli.model_spec import (
    SpecError,
    declared_shapes,
    example_inputs,
    is_onnx,
    load_model,
    parse_shape,
)
from horizon_plugin_pytorch.plan import Plan, load, record


@dataclass(frozen=True)
class Program:
    """A plan with inputs for it.

    Attributes:
        float_model: what the plan was quantized from, if that happened here.
        notice: what a user has to know about the numbers, or None.
    """

    plan: Plan
    inputs: tuple[Tensor, ...]
    float_model: nn.Module | None = None
    notice: str | None = None


def load_program(spec: str, shapes: Sequence[str]) -> Program:
    """Load or build what `spec` names, with random normal inputs.

    Args:
        spec: the path of a saved plan, or a model as in `load_model`. A converted model is recorded. A float model
            is quantized with its random inputs as calibration data: good for timing, not for the numbers.
        shapes: of the inputs, e.g. ``1,3,224,224``. A plan's own, or an ONNX file's, where they are left out.

    Raises:
        SpecError: nothing is found, or shapes are missing or do not fit.
        PlanError: the file is not a plan, or the model cannot be recorded.
        QuantizationError: the model cannot be quantized.
    """
    if not is_onnx(spec) and (":" not in spec or Path(spec).is_file()):
        plan = load(spec)
        return Program(plan, _inputs(plan, shapes))
    model = load_model(spec).eval()
    shapes = shapes or declared_shapes(model)
    if not shapes:
        raise SpecError(f"say what {spec} takes: --input SHAPE, once per argument, e.g. --input 1,3,224,224")
    inputs = example_inputs(model, list(shapes))
    if _is_converted(model):
        return Program(record(model, inputs), inputs)
    from horizon_plugin_pytorch.quantization.quantize import quantize

    int8 = quantize(model, [inputs], improve=False, progress=False)
    notice = (
        "a float model, quantized here with random numbers as calibration data: times mean something, outputs do not"
    )
    return Program(record(int8, inputs), inputs, model, notice)


def _is_converted(model: nn.Module) -> bool:
    from horizon_plugin_pytorch.nn.quantized.tensors import MakesIntegers

    return any(isinstance(m, MakesIntegers) for m in model.modules())


def _inputs(plan: Plan, shapes: Sequence[str]) -> tuple[Tensor, ...]:
    wanted = [parse_shape(text) for text in shapes] or [value.shape for value in plan.values[: len(plan.inputs)]]
    if len(wanted) != len(plan.inputs):
        raise SpecError(
            f"the plan takes {', '.join(plan.inputs)}: give --input {len(plan.inputs)} times, or not at all for the "
            "shapes it was recorded with"
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator).to(getattr(torch, value.dtype))
        for shape, value in zip(wanted, plan.values, strict=False)
    )
