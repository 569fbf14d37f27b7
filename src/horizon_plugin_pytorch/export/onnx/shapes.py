"""Which sizes of a plan's values depend on the inputs' sizes, found by running its shapes at several of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.plan import Plan, PlanError


class NeedsFixedSize(ExportError):
    """Something that ONNX can say only where a size is known."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what if "dynamic_size" in what else f"{what} needs sizes that are known: export with dynamic_size=False"
        )


AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
Sizes = tuple[int | None, ...]


def input_sizes(plan: Plan, batch: bool, size: bool) -> list[Sizes]:
    """The recorded shapes of the inputs, None where they may vary: dimension 0, and those from 2 on."""
    return [
        tuple(
            None if (d == 0 and batch and len(value.shape) > 1) or (d > 1 and size) else n
            for d, n in enumerate(value.shape)
        )
        for value in plan.values[: len(plan.inputs)]
    ]


class Shapes:
    """The shapes of every value, for the recorded inputs and for inputs that differ from those in one way at a time.

    Raises:
        PlanError: the plan does not accept such inputs.
    """

    def __init__(self, plan: Plan, inputs: list[Sizes]) -> None:
        from horizon_plugin_pytorch.plan.native.shapes import infer

        values = plan.values[: len(plan.inputs)]
        recorded = [value.shape for value in values]
        kinds = sorted({d for sizes in inputs for d, n in enumerate(sizes) if n is None})
        trials = [recorded]
        for kind in kinds:
            trials.append(
                [
                    tuple(2 * n if d == kind and sizes[d] is None else n for d, n in enumerate(shape))
                    for shape, sizes in zip(recorded, inputs, strict=True)
                ]
            )
        with torch.device("meta"):  # also for the tensors that the model makes itself
            self.runs = [
                infer(plan, [(shape, getattr(torch, v.dtype)) for shape, v in zip(trial, values, strict=True)])
                for trial in trials
            ]

    def meta(self, value: int, item: int | None = None) -> Any:
        """A value for the recorded inputs, or one tensor of a tuple: tensors without data, or what is no tensor."""
        return self._in(self.runs[0], value, item)

    def _in(self, run: list[Any], value: int, item: int | None) -> Any:
        return run[value] if item is None else tree_leaves(run[value])[item]

    def of(self, value: int, item: int | None = None) -> Sizes:
        """The shape of a tensor (or of the tensor `item` of a tuple), None where it varies."""
        shapes = [tuple(self._in(run, value, item).shape) for run in self.runs]
        return tuple(ns[0] if len(set(ns)) == 1 else None for ns in zip(*shapes, strict=True))

    def equal(self, a: int, dim_a: int, b: int, dim_b: int) -> bool:
        """Whether a dimension of one tensor is as large as one of another, whatever the inputs' sizes."""
        return all(run[a].shape[dim_a] == run[b].shape[dim_b] for run in self.runs)

    def symbols(self, value: int, item: int | None, name: str) -> list[int | str]:
        """The shape with names in place of what varies: ``batch`` where it is the inputs' batch, else a name of its own."""
        shape: list[int | str] = []
        batches = [run[0].shape[0] if run[0].dim() else None for run in self.runs]
        for d, n in enumerate(self.of(value, item)):
            same = [self._in(run, value, item).shape[d] for run in self.runs] == batches
            shape.append(n if n is not None else "batch" if same else f"{name}_{d}")
        return shape


def find_shapes(plan: Plan, batch: bool, size: bool) -> tuple[Shapes, list[Sizes]]:
    """The shapes of `plan` where what is asked for may vary.

    Raises:
        ExportError: the plan does not accept other sizes, saying at which step and what to do; NeedsFixedSize where it does accept other
            batch sizes, if those are asked for.
    """
    sizes = input_sizes(plan, batch, size)
    try:
        return Shapes(plan, sizes), sizes
    except PlanError as error:
        if size:
            find_shapes(plan, batch, False)  # if this fails, too, its reason is the one to tell
            raise NeedsFixedSize(
                f"{plan.model} does not accept another image size than recorded: {error}; export with dynamic_size=False"
            ) from error
        if batch:
            find_shapes(plan, False, False)
            raise ExportError(
                f"{plan.model} does not accept another batch size than recorded: {error}; export with dynamic_batch=False"
            ) from error
        raise ExportError(f"{plan.model} has a step whose shape depends on data: {error}") from error
