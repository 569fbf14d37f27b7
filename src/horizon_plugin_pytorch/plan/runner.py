"""Running a plan on the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.nn.quantized import operators
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, dequantize
from horizon_plugin_pytorch.plan.functions import resolve
from horizon_plugin_pytorch.plan.program import Const, Plan, PlanError, Ref, Step, refs

BACKENDS = ("reference",)

INTEGER_DTYPES = {"int8": torch.int8, "uint8": torch.uint8}
OPERATORS: dict[str, type[operators.Operator]] = {
    c.__name__: c
    for c in (operators.Add, operators.Mul, operators.Cat, operators.AvgPool, operators.AdaptiveAvgPool, operators.Mean)
}


class Runner:
    """A plan, callable like the model it was recorded from; made by `Plan.compile`.

    Inputs are those of the model, of any batch and image size the model accepts, on any device (constants follow). Calls from
    several threads do not disturb each other: all state is local to the call, but for the constants, which are only read.
    """

    def __init__(self, plan: Plan, backend: str = "auto", threads: int | None = None) -> None:
        if backend not in (*BACKENDS, "auto"):
            raise PlanError(f"backend {backend!r} is not available; there are: {', '.join((*BACKENDS, 'auto'))}")
        if threads is not None and threads < 1:
            raise PlanError(f"threads must be at least 1, not {threads}")
        self.plan, self.threads = plan, threads
        self.backend = "reference"
        self._constants: dict[torch.device, dict[str, Tensor]] = {}
        self._last_use = _last_uses(plan)

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Tensors in and out as the model's.

        Raises:
            PlanError: a missing or unexpected argument, another dtype or number of dimensions than recorded, tensors on
                several devices.
        """
        values = self._bind(inputs, named)
        devices = {v.device for v in values}
        if len(devices) > 1:
            raise PlanError(f"the inputs are on several devices: {', '.join(sorted(map(str, devices)))}")
        constants = self._on(next(iter(devices)) if devices else torch.device("cpu"))
        with torch.no_grad(), _threads(self.threads):
            for i, step in enumerate(self.plan.steps):
                try:
                    values.append(self._run(step, i, values, constants))
                except Exception as error:
                    raise PlanError(f"step {i} ({step.name!r}, {step.target or step.kind}): {error}") from error
                for gone in self._last_use.get(i, ()):
                    values[gone] = None
            return _fill(self.plan.outputs, values, constants)

    def _bind(self, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> list[Any]:
        names = self.plan.inputs
        arguments = dict(zip(names, inputs, strict=False)) | named
        if len(inputs) > len(names) or set(arguments) != set(names) or len(inputs) + len(named) != len(names):
            raise PlanError(
                f"{self.plan.model} takes {', '.join(names)}; got {len(inputs)} by position and {sorted(named)} by name"
            )
        values: list[Any] = []
        for name, value in zip(names, self.plan.values, strict=False):
            x = arguments[name]
            if not isinstance(x, Tensor) or _dtype_name(x.dtype) != value.dtype or x.dim() != len(value.shape):
                got = f"{_dtype_name(x.dtype)}, {x.dim()} dimensions" if isinstance(x, Tensor) else type(x).__name__
                raise PlanError(f"input {name!r} must be {value.dtype} with {len(value.shape)} dimensions, not {got}")
            values.append(x)
        return values

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._constants:
            self._constants[device] = {n: t.to(device) for n, t in self.plan.constants.items()}
        return self._constants[device]

    def _run(self, step: Step, position: int, values: list[Any], constants: dict[str, Tensor]) -> Any:
        args = _fill(step.args, values, constants)
        params = _fill(step.params, values, constants)
        run = getattr(self, f"_{step.kind}")
        if step.kind == "function":
            return run(step.target, args, _fill(step.kwargs, values, constants))
        return run(args, **params)

    # -- one method per kind of step ------------------------------------------------------------------------------------------

    @staticmethod
    def _quantize(args: Any, scale: Tensor, dtype: str) -> QTensor:
        dtype8 = INTEGER_DTYPES[dtype]
        axis = None if scale.dim() == 0 else 1
        return QTensor.make(reference.quantize(args[0], scale, dtype8, axis), scale, dtype8)

    @staticmethod
    def _dequantize(args: Any) -> Tensor:
        return dequantize(args[0])

    @staticmethod
    def _group(
        args: Any,
        geometry: dict[str, Any],
        weight: Tensor,
        bias: Tensor,
        m: Tensor,
        bound: Tensor,
        residual_ratio: Tensor | None = None,
        activation: str | None = None,
        scale: Tensor | None = None,
        dtype: str = "float32",
        output_size: Any = None,
    ) -> Tensor:
        walk = Geometry(**geometry)
        acc = walk.accumulate(args[0].payload, weight, bias, output_size)
        y = reference.epilogue(
            acc, m, residual=args[1].payload if len(args) > 1 else None, residual_ratio=residual_ratio, activation=activation,
            bound=bound, dtype=INTEGER_DTYPES.get(dtype, torch.float32), axis=walk.channel_axis(acc),
        )  # fmt: skip
        return y if scale is None else QTensor.make(y, scale, INTEGER_DTYPES[dtype])

    @staticmethod
    def _operator(args: Any, name: str, options: dict[str, Any], scale: Tensor, dtype: str) -> QTensor:
        dtype8 = INTEGER_DTYPES[dtype]
        return QTensor.make(OPERATORS[name](**options).integer(args, scale, dtype8), scale, dtype8)

    @staticmethod
    def _table(args: Any, table: Tensor, scale: Tensor, dtype: str) -> QTensor:
        return QTensor.make(reference.lookup(args[0].payload, table), scale, INTEGER_DTYPES[dtype])

    @staticmethod
    def _function(target: str, args: Any, kwargs: Any) -> Any:
        function: Callable[..., Any] | None = resolve(target)
        assert function is not None  # a plan is checked when it is made or loaded
        return function(*args, **kwargs)


def _fill(arguments: Any, values: list[Any], constants: dict[str, Tensor]) -> Any:
    """Nested arguments with the values and constants they refer to."""
    if isinstance(arguments, Ref):
        return values[arguments.value]
    if isinstance(arguments, Const):
        return constants[arguments.name]
    if isinstance(arguments, dict):
        return {k: _fill(a, values, constants) for k, a in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(_fill(a, values, constants) for a in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_fill(a, values, constants) for a in arguments)
    return arguments


def _last_uses(plan: Plan) -> dict[int, list[int]]:
    """For each step, the values that nobody reads after it."""
    last: dict[int, int] = {}
    for i, step in enumerate(plan.steps):
        last[len(plan.inputs) + i] = i
        for ref in refs((step.args, step.kwargs, step.params)):
            last[ref.value] = i
    kept = {ref.value for ref in refs(plan.outputs)}
    gone: dict[int, list[int]] = {}
    for value, step_index in last.items():
        if value not in kept:
            gone.setdefault(step_index, []).append(value)
    return gone


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
