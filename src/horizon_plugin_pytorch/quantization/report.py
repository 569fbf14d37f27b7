"""What each module of an int8 model became, and what still runs in float and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.fusion.tracing import is_stub
from horizon_plugin_pytorch.nn.intrinsic import Handoff
from horizon_plugin_pytorch.nn.qat.operation import Alone
from horizon_plugin_pytorch.nn.quantized.functional import FloatOperator
from horizon_plugin_pytorch.nn.quantized.group import QuantizedGroup
from horizon_plugin_pytorch.nn.quantized.operation import Operation, QFunctional, Quantize
from horizon_plugin_pytorch.quantization.dataflow import PASSING_MODULES, function_name
from horizon_plugin_pytorch.quantization.forms import quantizable


@dataclass(frozen=True)
class Row:
    """One operator.

    Attributes:
        module: its path, or the node's name for a function.
        form: what it is now.
        dtype: of its output: int8, uint8 or float32.
        scale: the output's scale; for one per channel, the smallest and the largest.
        reason: why it runs in float, where it does.
    """

    module: str
    form: str
    dtype: str
    scale: str = ""
    reason: str = ""

    @property
    def runs_in_float(self) -> bool:
        return bool(self.reason)


@dataclass
class QuantizationReport:
    """What a converted model computes, in the order of execution where that is known.

    Attributes:
        rows: its operators.
        calls: for each module that makes integers, the functions without an integer form that code between the modules called on
            its output, with the number of calls so far.
        notes: what else there is to know.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    calls: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def integer(self) -> list[Row]:
        return [r for r in self.rows if not r.runs_in_float]

    @property
    def in_float(self) -> list[Row]:
        return [r for r in self.rows if r.runs_in_float] + [
            Row(
                path,
                function,
                "float32",
                reason=f"it has no integer form and is called between the modules, {count} times so far",
            )
            for path, counter in self.calls.items()
            for function, count in counter.items()
        ]

    def summary(self) -> str:
        return f"{self.model}: {len(self.integer)} operators in integers, {len(self.in_float)} in float"

    def to_json(self) -> str:
        rows = [asdict(row) for row in (*self.integer, *self.in_float)]
        return json.dumps({"model": self.model, "rows": rows, "notes": self.notes}, indent=2)

    def to_text(self, width: int = 140) -> str:
        from io import StringIO

        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        out = StringIO()
        console = Console(file=out, width=width)
        console.print(Text(self.summary()))
        columns = ("module", "form", "output", "scale")
        for title, rows, extra in (("In integers", self.integer, ()), ("In float", self.in_float, ("why",))):
            if not rows:
                continue
            table = Table(*columns, *extra, title=title, title_justify="left")
            for r in rows:
                table.add_row(
                    *(Text(c) for c in (r.module, r.form, r.dtype, r.scale, r.reason)[: len(columns) + len(extra)])
                )
            console.print(table)
        for note in self.notes:
            console.print(Text(f"Note: {note}"))
        return out.getvalue()

    def __str__(self) -> str:
        return self.to_text()


_FORMS = (QuantizedGroup, Operation, QFunctional, Quantize)


def report_of(model: nn.Module) -> QuantizationReport:
    """The report of a converted model."""
    fusion = getattr(model, "fusion_report", None)
    name = type(model).__name__ if fusion is None else fusion.model
    report = QuantizationReport(name, notes=list(getattr(model, "quantization_notes", [])))
    reasons = None if isinstance(model, fx.GraphModule) else model.__dict__.get("float_reasons")
    for path, row, calls in _rows(model, "", reasons):
        report.rows.append(row)
        if calls is not None:
            report.calls[path] = calls
    return report


Found = tuple[str, Row, "Counter[str] | None"]


def _rows(module: nn.Module, path: str, reasons: dict[str, str] | None = None) -> Iterator[Found]:
    """Rows of a module; `reasons`, by path, is what `prepare_qat` found, None where code that could not be traced calls the rest."""
    if isinstance(module, _FORMS):
        yield path, _quantized_row(path, module), module.float_calls
    elif isinstance(module, Alone):
        yield from _rows(module.quant, f"{path}.quant")
        yield from _rows(module.group, path)
    elif isinstance(module, fx.GraphModule):
        yield from _graph_rows(module, path)
    elif any(True for _ in module.children()):
        for name, child in module.named_children():
            yield from _rows(child, f"{path}.{name}" if path else name, reasons)
    elif path and _computes(module):
        reason = (reasons or {}).get(path, "it has no integer form")
        if quantizable(module) and path not in (reasons or {}):
            reason = "code that could not be traced calls it" if reasons is None else "its qconfig is None"
        yield path, Row(path, _float_form(module), "float32", reason=reason), None


def _graph_rows(gm: fx.GraphModule, path: str) -> Iterator[Found]:
    reasons: dict[str, str] = gm.__dict__.get("float_reasons", {})
    called: set[str] = set()
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        local = str(node.target) if node.op == "call_module" else node.name
        name = f"{path}.{local}" if path else local
        if node.op == "call_module":
            module = gm.get_submodule(local)
            if any(isinstance(m, _FORMS) for m in module.modules()):
                if local not in called:
                    yield from _rows(module, name)
                called.add(local)
                continue
        if node.name in reasons:
            form = _float_form(module) if node.op == "call_module" else function_name(node)
            yield name, Row(name, form, "float32", reason=reasons[node.name]), None


def _quantized_row(path: str, module: Any) -> Row:
    scale = module.scale
    if scale is None:
        return Row(path, module._get_name(), "float32", "high precision")
    several = scale.dim() > 0
    text = (
        f"{scale.min().item():.4g} … {scale.max().item():.4g} ({scale.numel()})" if several else f"{scale.item():.6g}"
    )
    return Row(path, module._get_name(), str(module.dtype8).removeprefix("torch."), text)


def _float_form(module: nn.Module) -> str:
    return module.operator.name if isinstance(module, FloatOperator) else type(module).__name__


def _computes(module: nn.Module) -> bool:
    """A leaf that is not just a place or a pass-through."""
    if isinstance(module, (*PASSING_MODULES, Handoff)) or is_stub(module) or type(module).forward is nn.Module.forward:
        return isinstance(module, nn.Upsample) and not module.mode.startswith("nearest")
    return True
