"""What `quantization_report` says, and in which order."""

from __future__ import annotations

import copy
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub
from quantization.roads import by_graph, by_name, call, forms, in_float


class Net(nn.Module):
    """Modules in another order than they are called in, some of them never."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.unused = nn.Conv2d(4, 2, 1), nn.Conv2d(9, 9, 1)
        self.dw, self.norm = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(self.first(x))
        x = self.norm(F.max_pool2d(x, 2))
        return self.last(F.interpolate(x.softmax(1), scale_factor=2, mode="bicubic")).flatten(1)


def quantized() -> nn.Module:
    return by_graph(Net(), torch.randn(2, 3, 12, 12))[1]


def test_rows_are_in_the_order_of_execution() -> None:
    report = quantized().quantization_report
    assert report.model == "Net"
    assert [row.module for row in report.rows] == [
        "_quant_0", "first", "dw", "norm", "softmax", "interpolate", "_quant_1", "last",
    ]  # fmt: skip
    assert [row.form for row in report.rows][3:6] == ["BatchNorm2d", "softmax", "interpolate"]


def test_dtypes_scales_and_reasons() -> None:
    rows = {row.module: row for row in quantized().quantization_report.rows}
    assert rows["_quant_0"].dtype == "int8" and float(rows["_quant_0"].scale) > 0
    assert rows["_quant_1"].dtype == "uint8"
    assert rows["first"].dtype == "int8" and rows["first"].scale.endswith("(4)") and "…" in rows["first"].scale
    assert rows["dw"].dtype == "float32" and rows["dw"].scale == "high precision" and not rows["dw"].runs_in_float
    assert rows["norm"].reason == "a batch norm that no convolution absorbed has no integer form"
    assert rows["softmax"].reason == rows["interpolate"].reason == "it has no integer form"


def test_views() -> None:
    report = quantized().quantization_report
    assert report.summary() == "Net: 5 operators in integers, 3 in float"
    text = str(report)
    for word in ("In integers", "In float", "QuantizedConv2d", "high precision", "it has no integer form"):
        assert word in text
    parsed = json.loads(report.to_json())
    assert parsed["model"] == "Net" and len(parsed["rows"]) == 8


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.conv, self.dequant = QuantStub(), nn.Conv2d(3, 4, 1), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(self.conv(x) * torch.sigmoid(x.sum()) + x.flatten(1).mean())


def test_functions_between_the_modules_are_counted_as_they_are_called() -> None:
    _, int8 = by_name(Between(), [], torch.randn(2, 3, 4, 4))
    call(int8, torch.randn(2, 3, 4, 4))
    rows = {(r.module, r.form): r.reason for r in int8.quantization_report.in_float}
    assert set(rows) == {("quant", "torch.Tensor.sum"), ("quant", "torch.Tensor.mean")}
    assert "2 times so far" in rows["quant", "torch.Tensor.sum"]
    other = copy.deepcopy(int8)
    call(other, torch.randn(2, 3, 4, 4))
    assert "3 times so far" in str(other.quantization_report).replace("\n", " ")
    assert "2 times so far" in {r.form: r.reason for r in int8.quantization_report.in_float}["torch.Tensor.sum"]


def test_modules_that_nobody_calls_are_not_listed_by_graph() -> None:
    int8 = quantized()
    assert "unused" not in {**forms(int8), **in_float(int8)}


def test_parts_of_an_untraceable_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = Net(), nn.Conv1d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return self.head(y.view(len(y), 2, -1)) if float(y.sum()) < 1e9 else y

    report = by_graph(Outer(), torch.randn(2, 3, 12, 12))[1].quantization_report
    assert report.model == "Outer"
    assert [row.module for row in report.rows][-3:] == ["net.last", "head.quant", "head"]
