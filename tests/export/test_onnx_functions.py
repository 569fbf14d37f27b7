"""Functions, operators and tables in ONNX: small programs in every form, beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.export import ExportError, to_onnx, verify
from horizon_plugin_pytorch.plan import Plan, PlanError
from quantization.programs import PROGRAMS

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def record(model: nn.Module, item: Any) -> Plan:
    return horizon.plan.record(horizon.quantize(model.eval(), [item], improve=False, progress=False), item)


NOT_RECORDED = {
    "view_in_place_and_other_readers_before", "flag_as_an_argument", "module_that_cannot_be_traced", "control_flow", "assignment_to_a_part",
    "tuple_as_input",
}  # fmt: skip
FIXED_BATCH = {"moves", "fresh_tensors"}
REFUSED = {
    "nested_outputs": r"returns what is not a tensor: \['b'\]\[1\]\[1\]",
    "view_in_place": r"step 3 \('mul_', method.mul_\): it changes a tensor in place that is read afterwards as",
    "view_in_place_by_an_argument": r"step 3 \('relu', torch.nn.functional.relu\): it changes a tensor in place that is read afterwards as",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, tmp_path: Path) -> None:
    """The forwards that quantization is tested with. On integers no element differs, but for float32 functions' last digits."""
    kind, item, _ = PROGRAMS[name]
    try:
        plan = record(kind(), item)
    except PlanError:
        assert name in NOT_RECORDED
        return
    data = tuple(x for x in tree_leaves(item) if isinstance(x, Tensor))
    path = tmp_path / "program.onnx"
    for form, least in (("qdq", 40), ("qoperator", 140), ("float", 20)):
        if name in REFUSED:
            with pytest.raises(ExportError, match=REFUSED[name]):
                to_onnx(plan, path, form=form)
            continue
        if name in FIXED_BATCH:
            with pytest.raises(ExportError, match="dynamic_batch=False"):
                to_onnx(plan, path, form=form)
        to_onnx(plan, path, form=form, dynamic_batch=name not in FIXED_BATCH)
        found = verify(plan, path, data)
        assert found.sqnr >= least, (form, found)


# -- functions in float32 -------------------------------------------------------------------------------------------------------

X = (2, 4, 6, 8)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "abs": torch.abs, "ceil": torch.ceil, "cos": torch.cos, "erf": torch.erf, "exp": torch.exp, "floor": torch.floor,
    "neg": torch.neg, "reciprocal": lambda x: torch.reciprocal(x + 9), "rsqrt": lambda x: torch.rsqrt(x + 9), "sign": torch.sign,
    "sin": torch.sin, "square": torch.square, "tan": lambda x: torch.tan(x / 9), "log1p": lambda x: torch.log1p(x + 9),
    "expm1": torch.expm1, "log2": lambda x: torch.log2(x + 9), "round": torch.round, "tanhshrink": F.tanhshrink, "logsigmoid": F.logsigmoid,
    "elu": lambda x: F.elu(x, 0.7), "celu": lambda x: F.celu(x, 0.7), "selu": F.selu, "mish": F.mish, "silu": F.silu, "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "softplus": lambda x: F.softplus(x, beta=2), "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.4), "hardshrink": F.hardshrink, "softshrink": F.softshrink,
    "softsign": F.softsign, "threshold": lambda x: F.threshold(x, 0.1, 0.2), "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "clamp": lambda x: x.clamp(-0.5, 0.5), "clamp_min": lambda x: x.clamp_min(0.1), "clamp to a tensor": lambda x: torch.clamp(x, min=x.mean()),
    "pow": lambda x: (x + 9) ** 1.5, "remainder": lambda x: torch.remainder(x, 0.4), "div floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"), "rsub": lambda x: 1 - x, "sub alpha": lambda x: torch.sub(x, x.exp(), alpha=2),
    "maximum": lambda x: torch.maximum(x, -x), "where": lambda x: torch.where(x > 0, x, x * 0.1), "compare": lambda x: (x >= 0.1) * x + (x != 0) * 1.0,
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.5), "softmax": lambda x: x.softmax(1), "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, 1), "layer_norm": lambda x: F.layer_norm(x, (6, 8)), "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm, "normalize": F.normalize, "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "mean": lambda x: x.mean((1, 3)), "mean of all": lambda x: x.exp().mean(), "sum": lambda x: x.exp().sum(-1, keepdim=True),
    "amax": lambda x: x.amax((2, 3)), "max and where": lambda x: x.exp().max(2)[0], "min of all": lambda x: x.exp().min(), "argmax": lambda x: x.argmax(3),
    "var": lambda x: x.var((2, 3)), "std": lambda x: x.std(1, unbiased=False), "norm": lambda x: x.norm(dim=1), "cumsum": lambda x: x.cumsum(2),
    "topk": lambda x: x.topk(3, -1)[0], "sort": lambda x: x.sort(-1, descending=True)[0], "matmul": lambda x: x @ x.transpose(2, 3),
    "einsum": lambda x: torch.einsum("bchw,bcvw->bchv", x, x), "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), "glu": lambda x: F.glu(x, 1),
    "avg_pool": lambda x: F.avg_pool2d(x.exp(), 3, 2, 1), "avg_pool without padding": lambda x: F.avg_pool2d(x.exp(), 3, 2, 1, count_include_pad=False),
    "avg_pool ceil": lambda x: F.avg_pool2d(x.exp(), 3, 2, ceil_mode=True), "avg_pool ceil and padding": lambda x: F.avg_pool2d(x.exp(), 3, 2, 1, True),
    "avg_pool divisor": lambda x: F.avg_pool2d(x.exp(), 2, divisor_override=3), "avg_pool1d": lambda x: F.avg_pool1d(x.exp().flatten(2), 4),
    "adaptive unequal": lambda x: F.adaptive_avg_pool2d(x.exp(), (4, 3)), "adaptive equal": lambda x: F.adaptive_avg_pool2d(x.exp(), (3, None)),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False), "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "movedim": lambda x: x.movedim(1, 3), "flip": lambda x: x.flip(2, 3), "roll": lambda x: x.roll((1, 2), (2, 3)), "split": lambda x: x.split([1, 3], 1),
    "unbind": lambda x: x.unbind(1)[2], "narrow": lambda x: x.narrow(2, 1, 3), "select": lambda x: x.select(1, 2), "index": lambda x: x[:, 1, ..., ::2],
    "index none": lambda x: x[:, None, :, -1], "repeat": lambda x: x.repeat(1, 2, 1, 3), "tile": lambda x: x.tile(2, 1, 1, 1), "t": lambda x: x[0, 0].t(),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2), "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2), "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad reflect": lambda x: F.pad(x, (1, 2, 0, 1), "reflect"), "pad circular": lambda x: F.pad(x, (1, 2, 3, 1), "circular"),
    "pad negative": lambda x: F.pad(x, (-1, 2)), "expand_as": lambda x: x[:, :1].expand_as(x), "arange": lambda x: x + torch.arange(x.shape[3]),
    "full": lambda x: x + torch.full((4, 1, 1), 0.5), "ones_like": lambda x: x + torch.ones_like(x), "meshgrid": lambda x: x + torch.meshgrid(
        torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")[0], "to int": lambda x: (x * 9).int(), "and": lambda x: ((x > 0) & (x < 1)) * 1.0,
    "stack": lambda x: torch.stack([x, -x], -1), "max_pool ceil": lambda x: F.max_pool2d(x.exp(), 3, 2, ceil_mode=True),
    "max_pool dilated": lambda x: F.max_pool2d(x.exp(), 2, 1, 1, dilation=2), "adaptive max": lambda x: F.adaptive_max_pool2d(x.exp(), (3, 4)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False), "linear": lambda x: F.linear(x.exp(), torch.eye(8)[:3], torch.ones(3)),
    "conv": lambda x: F.conv2d(x.exp(), torch.ones(2, 2, 3, 3), padding="same", groups=2),
    "conv_transpose": lambda x: F.conv_transpose2d(x.exp(), torch.ones(4, 2, 3, 3), stride=2, padding=1, output_padding=1),
    "prelu": lambda x: F.prelu(x.exp() - 1, torch.tensor([0.1, 0.2, 0.3, 0.4])), "embedding": lambda x: F.embedding(x.argmax(1), torch.eye(4)),
    "batch_norm": lambda x: F.batch_norm(x.exp(), torch.ones(4), torch.ones(4) * 2, torch.ones(4) * 3),
    "gather": lambda x: x.gather(1, x.argsort(1)) if False else x.gather(1, x.argmax(1, keepdim=True)),
    "sizes": lambda x: x.view(x.size(0), x.shape[1] // 2, -1, x.size(3)), "interpolate to sizes": lambda x: F.interpolate(
        x, size=(x.shape[2] * 2 - 1, x.shape[3] + 3), mode="bilinear", align_corners=True),
}  # fmt: skip


class After(nn.Module):
    """A convolution, and a function of what it gives in float32."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


EXACT_ENOUGH = 90
"""dB; a function is a handful of float32 operations."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(X)
    plan = record(After(FUNCTIONS[name]), x)
    to_onnx(plan, tmp_path / "function.onnx", form="qoperator")
    found = verify(plan, tmp_path / "function.onnx", x)
    assert found.sqnr >= EXACT_ENOUGH, found
    if {"batch", "height"} <= {
        d.dim_param for d in onnx.load(tmp_path / "function.onnx").graph.input[0].type.tensor_type.shape.dim
    }:
        other = torch.randn(3, 4, 10, 16)
        try:
            plan.compile("reference")(other)
        except PlanError:
            return
        assert verify(plan, tmp_path / "function.onnx", other).sqnr >= EXACT_ENOUGH


def test_the_lowest_opset_that_suffices(tmp_path: Path) -> None:
    for name, opset in (("gelu", 13), ("hardswish", 13), ("mish", 13), ("grid_sample", 16), ("layer_norm", 17)):
        plan = record(After(FUNCTIONS[name]), torch.randn(X))
        model = onnx.load(to_onnx(plan, tmp_path / "function.onnx"))
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)], name


# -- tables ---------------------------------------------------------------------------------------------------------------------

TABLES = {
    "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "HardSigmoid": F.hardsigmoid, "LeakyRelu": lambda x: F.leaky_relu(x, 0.2),
    "Elu": F.elu, "Softplus": F.softplus, "Erf": F.gelu, "Gather": lambda x: torch.sin(x * 3) + x,
}  # fmt: skip


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind: str, tmp_path: Path) -> None:
    """A function that is known by its table is written as itself, another one as the table; on integers the table, always."""
    torch.manual_seed(0)
    x = torch.randn(X)
    plan = record(Between(TABLES[kind]), x)
    assert any(s.kind == "table" for s in plan.steps)
    kinds = [n.op_type for n in onnx.load(to_onnx(plan, tmp_path / "table.onnx")).graph.node]
    assert kind in kinds and ("Gather" in kinds) == (kind == "Gather")
    assert verify(plan, tmp_path / "table.onnx", x).sqnr >= 40
    to_onnx(plan, tmp_path / "table.onnx", form="qoperator")
    assert verify(plan, tmp_path / "table.onnx", x).differing == 0
    to_onnx(plan, tmp_path / "table.onnx", form="float")
    assert verify(plan, tmp_path / "table.onnx", x).sqnr > 15


def shuffled_by_views(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


@pytest.mark.parametrize(
    "function",
    [shuffled_by_views, lambda x: torch.channel_shuffle(x, 2), lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)],
    ids=["views", "channel_shuffle", "pixels"],
)
def test_openvino_keeps_the_order_of_channels(function: Any, tmp_path: Path) -> None:
    """At a free image size, integers that lie channels-last there."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 10)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 48, 1), nn.Conv2d(48, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(function(torch.relu(self.b(torch.relu(self.a(x))))))

    plan = record(Net(), x)
    model = onnx.load(to_onnx(plan, tmp_path / "net.onnx"))
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    assert verify(plan, tmp_path / "net.onnx", x, "openvino").sqnr >= 40
    to_onnx(plan, tmp_path / "net.onnx", form="qoperator")
    assert verify(plan, tmp_path / "net.onnx", [x, torch.randn(1, 3, 6, 8)]).differing == 0
