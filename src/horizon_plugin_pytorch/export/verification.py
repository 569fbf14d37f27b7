"""How near another runtime comes to a plan: the exported file run on data, its outputs compared element by element."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.export.errors import ExportError, MissingExtraError
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, along_channels
from horizon_plugin_pytorch.plan import Plan

Runtime = Literal["onnxruntime", "openvino"]
Forward = Callable[[list[NDArray[Any]]], list[NDArray[Any]]]


@dataclass(frozen=True)
class OutputAgreement:
    """One output, over all of the data.

    Attributes:
        elements, differing: how many there are, and how many are not the same integer, or float32 where the plan's output has no scale.
        largest: the largest difference, as the output's value.
        steps: the largest difference in steps of the output's scale; None where it has none.
        sqnr: the plan's signal over the difference, in dB; infinite where nothing differs.
    """

    name: str
    elements: int
    differing: int
    largest: float
    steps: float | None
    sqnr: float

    def __str__(self) -> str:
        steps = "" if self.steps is None else f" ({self.steps:.3g} steps)"
        return (
            f"{self.name}: {self.differing:,} of {self.elements:,} elements differ, by {self.largest:.3g}{steps} at most, "
            f"SQNR {'∞' if self.sqnr == inf else f'{self.sqnr:.1f}'} dB"
        )


@dataclass(frozen=True)
class Agreement:
    """What `verify` found; printed, a line per output."""

    runtime: str
    items: int
    outputs: tuple[OutputAgreement, ...]

    @property
    def differing(self) -> int:
        return sum(o.differing for o in self.outputs)

    @property
    def sqnr(self) -> float:
        """The least of the outputs', in dB."""
        return min((o.sqnr for o in self.outputs), default=inf)

    def __str__(self) -> str:
        head = f"{self.runtime} beside the plan, {self.items} input{'s' * (self.items != 1)}"
        return "\n".join([head, *(f"  {o}" for o in self.outputs)])


def verify(
    plan: Plan, path: str | Path, data: Any, runtime: Runtime = "onnxruntime", *, optimize: bool = False
) -> Agreement:
    """Run an exported file in another runtime, on the CPU, and compare it with the plan on the reference backend.

    Args:
        plan: what was exported.
        path: of the ONNX file.
        data: a tensor, a tuple of the model's arguments or a dict by their names; or an iterable of these.
        runtime: ``onnxruntime`` or ``openvino``. OpenVINO computes in float32 what is not in integers, also on processors where it would
            take bfloat16 by default.
        optimize: let ONNX Runtime rewrite the graph, as it does by default; OpenVINO always does.

    Raises:
        MissingExtraError: the runtime is not installed.
        ExportError: no such runtime, no data, or the file does not have the plan's inputs and outputs, or does not run on the data.
        FileNotFoundError: there is no such file.
    """
    if runtime not in _RUNTIMES:
        raise ExportError(f"runtime {runtime!r} is not one of {', '.join(_RUNTIMES)}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}")
    try:
        module = importlib.import_module(runtime)
    except ImportError as error:
        raise MissingExtraError(f"{runtime} is not installed: pip install {runtime}") from error
    names, forward = _opened(_RUNTIMES[runtime], module, path, optimize)
    runner, sums = plan.compile("reference"), [_Sums() for _ in names]
    items = 0
    for inputs in _items(plan, data):
        items += 1
        expected = [y for y in tree_leaves(runner(*inputs)) if isinstance(y, Tensor)]
        try:
            found = forward([x.detach().cpu().numpy() for x in inputs])
        except Exception as error:
            raise ExportError(f"{path} does not run in {runtime} on these inputs: {_first_line(error)}") from error
        shapes = [[tuple(np.shape(y)) for y in ys] for ys in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{path} gives outputs of shapes {shapes[1]}, the plan {shapes[0]}: it was not written from this plan"
            )
        for total, a, b in zip(sums, expected, found, strict=True):
            total.add(a, b)
    if not items:
        raise ExportError("there is no data to compare on")
    outputs = tuple(total.agreement(name) for total, name in zip(sums, names, strict=True))
    version = getattr(module, "__version__", "")
    return Agreement(f"{runtime} {version}".strip(), items, outputs)


def _opened(
    make: Callable[..., tuple[list[str], Forward]], module: Any, path: Path, optimize: bool
) -> tuple[list[str], Forward]:
    try:
        return make(module, path, optimize)
    except Exception as error:
        raise ExportError(f"{path} cannot be opened by {module.__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The first line that says something: runtimes begin with lines that say where in their source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (telling or lines or [type(error).__name__])[0]


def _items(plan: Plan, data: Any) -> Iterable[list[Tensor]]:
    """Each item as tensors in the order of the plan's inputs."""
    single = isinstance(data, (Tensor, Mapping)) or (
        isinstance(data, tuple) and all(isinstance(x, Tensor) for x in data)
    )
    for item in [data] if single else data:
        if isinstance(item, Mapping):
            missing = sorted(set(plan.inputs) ^ set(item))
            if missing:
                raise ExportError(
                    f"{plan.model} takes {', '.join(plan.inputs)}; the data has {', '.join(map(str, item))}"
                )
            yield [item[name] for name in plan.inputs]
        else:
            given = [item] if isinstance(item, Tensor) else list(item)
            yield given[: len(plan.inputs)]


class _Sums:
    """What is known of one output so far."""

    def __init__(self) -> None:
        self.elements = self.differing = 0
        self.largest = self.signal = self.noise = 0.0
        self.steps: float | None = None

    def add(self, expected: Tensor, found: NDArray[Any]) -> None:
        b = torch.from_numpy(np.asarray(found)).to(torch.float64)
        if isinstance(expected, QTensor):
            scale = along_channels(expected.scale, expected).to(torch.float64)
            a, b, unit = expected.payload.to(torch.float64), _integers(b / scale), scale
        else:
            a, unit = expected.detach().cpu().to(torch.float64), torch.ones((), dtype=torch.float64)
        difference = torch.where(a == b, 0.0, a - b)  # infinities that are the same do not differ
        self.elements += a.numel()
        self.differing += int((difference != 0).sum())
        if isinstance(expected, QTensor):
            self.steps = max(self.steps or 0.0, _largest(difference))
        self.largest = max(self.largest, _largest(difference * unit))
        self.signal += float((a * unit).square().sum())
        self.noise += float((difference * unit).square().sum())

    def agreement(self, name: str) -> OutputAgreement:
        sqnr = inf if self.noise == 0 else 10 * log10(self.signal / self.noise) if self.signal > 0 else -inf
        return OutputAgreement(name, self.elements, self.differing, self.largest, self.steps, sqnr)


_NEAR = 1e-2


def _integers(x: Tensor) -> Tensor:
    """Values in units of their scale, as the integers they are but for float32's last digits; what is no integer stays as it is."""
    rounded = x.round()
    return torch.where((x - rounded).abs() < _NEAR, rounded, x)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _onnxruntime(module: Any, path: Path, optimize: bool) -> tuple[list[str], Forward]:
    options = module.SessionOptions()
    levels = module.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = module.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]
    return outputs, lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _openvino(module: Any, path: Path, optimize: bool) -> tuple[list[str], Forward]:
    model = module.Core().read_model(str(path))
    compiled = module.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = [o.any_name for o in compiled.outputs]

    def forward(inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
        results = compiled(inputs)
        return [np.array(results[o]) for o in compiled.outputs]

    return outputs, forward


_RUNTIMES: dict[str, Callable[[Any, Path, bool], tuple[list[str], Forward]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
