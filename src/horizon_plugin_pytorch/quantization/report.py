"""What each module of an int8 model became, and what still runs in float and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from horizon_plugin_pytorch.nn.qat.operation import DeQuantStub
from horizon_plugin_pytorch.nn.quantized.group import QuantizedGroup
from horizon_plugin_pytorch.nn.quantized.operation import Operation, QFunctional, Quantize


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
    model: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def integer(self) -> list[Row]:
        return [r for r in self.rows if not r.runs_in_float]

    @property
    def in_float(self) -> list[Row]:
        return [r for r in self.rows if r.runs_in_float]

    def summary(self) -> str:
        return f"{self.model}: {len(self.integer)} operators in integers, {len(self.in_float)} in float"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

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
                table.add_row(*(Text(c) for c in (r.module, r.form, r.dtype, r.scale, r.reason)[: len(columns) + len(extra)]))
            console.print(table)
        for note in self.notes:
            console.print(Text(f"Note: {note}"))
        return out.getvalue()

    def __str__(self) -> str:
        return self.to_text()


def report_of(model: nn.Module) -> QuantizationReport:
    """The report of a converted model; functions that ran in float are counted from its calls so far."""
    report = QuantizationReport(type(model).__name__, notes=list(getattr(model, "quantization_notes", [])))
    inside: set[str] = set()
    for path, module in model.named_modules():
        if any(path.startswith(f"{p}.") for p in inside):
            continue
        if isinstance(module, (QuantizedGroup, Operation, QFunctional, Quantize)):
            inside.add(path)
            report.rows.append(_quantized_row(path, module))
        elif isinstance(module, fx.GraphModule):
            report.rows += _float_functions(path, module)
        elif path and not isinstance(module, DeQuantStub) and _computes(module):
            report.rows.append(Row(path, type(module).__name__, "float32", reason=_why(module)))
    return report


def _quantized_row(path: str, module: Any) -> Row:
    scale = module.scale
    if scale is None:
        return Row(path, module._get_name(), "float32", "high precision")
    text = f"{scale.item():.6g}" if scale.dim() == 0 else f"{scale.min().item():.4g} … {scale.max().item():.4g} ({scale.numel()})"
    return Row(path, module._get_name(), str(module.dtype8).removeprefix("torch."), text)


def _computes(module: nn.Module) -> bool:
    """A leaf that is not just a place or a pass-through."""
    from horizon_plugin_pytorch.nn.intrinsic import Handoff
    from horizon_plugin_pytorch.quantization.dataflow import PASSING_MODULES

    if any(True for _ in module.children()) or isinstance(module, (*PASSING_MODULES, Handoff)):
        return False
    return type(module).forward is not nn.Module.forward and not isinstance(module, nn.Upsample) or _bilinear(module)


def _bilinear(module: nn.Module) -> bool:
    return isinstance(module, nn.Upsample) and not module.mode.startswith("nearest")


def _why(module: nn.Module) -> str:
    from horizon_plugin_pytorch.quantization.prepare import quantizable

    if quantizable(module):
        return "its qconfig is None, or only float operators read it"
    return "it has no integer form"


def _float_functions(path: str, gm: fx.GraphModule) -> list[Row]:
    """Functions of a graph that compute on float values."""
    from horizon_plugin_pytorch.quantization import dataflow

    modules = dict(gm.named_modules())
    rows = []
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or dataflow.is_query(node) or dataflow.passes(node, modules):
            continue
        if not any(n.op != "get_attr" and not dataflow.is_query(n) for n in node.all_input_nodes):
            continue
        name = f"{path}.{node.name}" if path else node.name
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if target == "expect_default" or node.target is getattr:
            continue
        rows.append(Row(name, target, "float32", reason="the function has no integer form, or only float operators read it"))
    return rows
