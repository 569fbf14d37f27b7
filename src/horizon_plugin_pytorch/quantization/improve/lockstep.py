"""Running a calibrated model in float and in integers side by side, one operator after the other.

A method that changes an operator needs what it gets in float and what it gets once everything before it is quantized, its own changes
there included. Running the model once per operator would take the square of its depth; here every operator runs once in each way, for
all data, and values are dropped after their last reader.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, FakeQuantState, set_fake_quantize
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.quantization.calibration import batches, device_of
from horizon_plugin_pytorch.quantization.graph import graph_parts

SAMPLES = 32
"""Data are taken until they hold so many samples (the first tensor's dim 0)."""


@dataclass(frozen=True)
class Call:
    """Arguments of a module's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Step:
    """A fused group, about to run on integers.

    Attributes:
        group: the group; a visitor may change its parameters.
        exact: its calls in the float model.
        quantized: its calls with everything before it quantized.
        outputs: what `exact` gave.
    """

    group: QATGroup
    exact: list[Call]
    quantized: list[Call]
    outputs: list[Tensor]


Visitor = Callable[[Step], None]


def take(data: Iterable[Any], samples: int = SAMPLES) -> Iterable[Any]:
    """The first items of `data` that hold `samples` samples together, at least one item."""
    if isinstance(data, Tensor):
        return data  # a mistake, for `batches` to explain
    taken, count = [], 0
    for item in data:
        taken.append(item)
        first = next((t for t in torch.utils._pytree.tree_leaves(item) if isinstance(t, Tensor)), None)
        count += 1 if first is None or first.dim() == 0 else first.shape[0]
        if count >= samples:
            break
    return taken


@torch.no_grad()
def run(model: nn.Module, data: Iterable[Any], visit: Visitor, *, progress: bool, title: str) -> None:
    """Visit every group of a calibrated model that a graph calls, in the order of execution; leaves it in eval mode and VALIDATION.

    Raises:
        QuantizationError: the model is not prepared or not calibrated, the data is empty or holds NaN; nothing was visited.
    """
    quantizers = [(n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantize)]
    if not quantizers:
        raise QuantizationError(f"{title}: the model has no fake quantization: call prepare_qat_fx first")
    for name, quantizer in quantizers:
        if not quantizer.ready:
            raise QuantizationError(
                f"{title}: {name!r} has no scale: run horizon.quantization.calibrate(model, data) first"
            )
    model.eval()
    calls = [Call(args, kwargs) for args, kwargs in batches(model, take(data), device_of(model), False, title)]
    with _Progress(title, sum(isinstance(m, QATGroup) for m in model.modules()), progress) as advance:
        try:
            _run(model, calls, [_copy(c) for c in calls], lambda step: advance(visit, step))
        finally:
            set_fake_quantize(model, FakeQuantState.VALIDATION)


class _Progress:
    """A bar that advances with each visit."""

    def __init__(self, title: str, total: int, shown: bool) -> None:
        from rich.progress import Progress

        self.bar = Progress(disable=not shown, transient=True)
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[Visitor, Step], None]:
        self.bar.start()
        return self._advance

    def _advance(self, visit: Visitor, step: Step) -> None:
        visit(step)
        self.bar.advance(self.task)

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()


def _copy(call: Call) -> Call:
    """A model may work in place on its input."""
    return Call(*torch.utils._pytree.tree_map_only(Tensor, torch.clone, (call.args, call.kwargs)))


def _in_state(module: nn.Module, state: FakeQuantState, calls: list[Call]) -> list[Any]:
    set_fake_quantize(module, state)
    return [call.run(module) for call in calls]


def _run(module: nn.Module, exact: list[Call], quantized: list[Call], visit: Visitor) -> tuple[list[Any], list[Any]]:
    """The outputs of a module for both kinds of calls; visits the groups in it."""
    if isinstance(module, fx.GraphModule):
        return _run_graph(module, exact, quantized, visit)
    if isinstance(module, QATGroup):
        outputs = _in_state(module, FakeQuantState.FLOAT, exact)
        visit(Step(module, exact, quantized, outputs))
        return outputs, _in_state(module, FakeQuantState.VALIDATION, quantized)
    for _, part in graph_parts(module):  # the module's own code is not traced: listen to what it calls its parts with
        seen = _calls_of(module, part, FakeQuantState.FLOAT, exact)
        if seen:
            _run(part, seen, _calls_of(module, part, FakeQuantState.VALIDATION, quantized), visit)
    return _in_state(module, FakeQuantState.FLOAT, exact), _in_state(module, FakeQuantState.VALIDATION, quantized)


def _calls_of(module: nn.Module, part: nn.Module, state: FakeQuantState, calls: list[Call]) -> list[Call]:
    found: list[Call] = []
    handle = part.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(_copy(Call(args, kwargs))), with_kwargs=True
    )
    try:
        _in_state(module, state, calls)
    finally:
        handle.remove()
    return found


def _run_graph(
    gm: fx.GraphModule, exact: list[Call], quantized: list[Call], visit: Visitor
) -> tuple[list[Any], list[Any]]:
    split = len(exact)
    calls = [*exact, *quantized]
    values: list[dict[fx.Node, Any]] = [{} for _ in calls]
    inputs = [iter(_bound(gm, call)) for call in calls]
    unread = {node: len(node.users) for node in gm.graph.nodes}
    for node in gm.graph.nodes:
        if node.op == "output":
            outputs = [fx.node.map_arg(node.args[0], v.__getitem__) for v in values]
            return outputs[:split], outputs[split:]
        if node.op == "placeholder":
            results = [next(i) for i in inputs]
        elif node.op == "get_attr":
            results = [_attribute(gm, str(node.target))] * len(calls)
        else:
            here = [Call(*fx.node.map_arg((node.args, node.kwargs), v.__getitem__)) for v in values]
            if node.op == "call_module":
                first, second = _run(gm.get_submodule(str(node.target)), here[:split], here[split:], visit)
                results = [*first, *second]
            elif node.op == "call_method":
                results = [getattr(c.args[0], str(node.target))(*c.args[1:], **c.kwargs) for c in here]
            else:
                results = [c.run(node.target) for c in here]
        for value, result in zip(values, results, strict=True):
            value[node] = result
        for source in node.all_input_nodes:
            unread[source] -= 1
            if unread[source] == 0:
                for value in values:
                    del value[source]
    raise AssertionError("a graph without output")


def _bound(gm: fx.GraphModule, call: Call) -> list[Any]:
    """A call's arguments in the order of the placeholders."""
    bound = inspect.signature(gm.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
