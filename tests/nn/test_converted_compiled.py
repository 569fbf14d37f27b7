"""Converted models under torch.compile: no graph break, no element that differs; under torch.export they say what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.nn.quantized.qtensor import dequantize
from horizon_plugin_pytorch.nn.quantized.tensors import MakesIntegers
from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub, calibrate, convert, prepare_qat


class Graph(nn.Module):
    """Groups of every form, operators, tables, and functions that move integers or run in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        self.prelu, self.norm, self.head = nn.PReLU(), nn.GroupNorm(2, 8), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = torch.relu(self.point(F.hardswish(self.depthwise(x))) + x)
        y = F.max_pool2d(self.up(F.pad(x, (1, 1, 0, 0))), 2)[..., 1:-1]
        z = F.interpolate(F.avg_pool2d(self.prelu(self.norm(x)) * x, 2), scale_factor=2)
        both = torch.cat([z, y, x.flip(-1)], 1)
        return self.head(both.mean((2, 3))), {"pooled": F.adaptive_avg_pool2d(both, 2).flatten(1)}


class Named(nn.Module):
    """What FloatFunctional can do, in a model that is converted by name."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.transposed = nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 3, 3, 2, 1)
        names = "add add_relu mul cat add_scalar mul_scalar sub matmul".split()
        self.ff = nn.ModuleDict({name: FloatFunctional() for name in names})

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        ff, y = self.ff, self.conv(x)
        z = ff["mul"].mul(ff["add_relu"].add_relu(x, y), ff["add"].add(y, x))
        z = ff["mul_scalar"].mul_scalar(ff["add_scalar"].add_scalar(z, 0.5), -2.0)
        z = ff["matmul"].matmul(ff["sub"].sub(z, y), x)
        z = self.transposed(z, output_size=[2 * x.shape[2], 2 * x.shape[3]])
        return self.dequant(ff["cat"].cat([z, F.interpolate(y, scale_factor=2)], 1))


def by_graph(x: Tensor) -> nn.Module:
    return horizon.quantize(Graph().eval(), [x], improve=False, progress=False)


def by_name(x: Tensor) -> nn.Module:
    model = Named().eval()
    for name, module in model.named_modules():
        if name:
            module.qconfig = horizon.quantization.default_calib_qconfig
    model.qconfig = horizon.quantization.default_calib_qconfig
    prepared = prepare_qat(model)
    calibrate(prepared, [x], progress=False)
    return convert(prepared.eval())


ROADS: dict[str, Callable[[Tensor], nn.Module]] = {"by graph": by_graph, "by name": by_name}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=ROADS)
def int8(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return ROADS[request.param](X)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def differing(a: Any, b: Any) -> int:
    xs, ys = (torch.utils._pytree.tree_leaves(dequantize(t)) for t in (a, b))
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(xs, ys, strict=True))
    return sum(int((x != y).sum()) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(int8: nn.Module, backend: str, dynamic: bool) -> None:
    compiled = torch.compile(int8, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for x in (X, OTHER, X):
            assert differing(compiled(x), int8(x)) == 0


@pytest.mark.slow
def test_compiled_by_inductor(int8: nn.Module) -> None:
    compiled = torch.compile(int8, fullgraph=True)
    with torch.no_grad():
        assert differing(compiled(X), int8(X)) == 0


def test_without_no_grad(int8: nn.Module) -> None:
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    assert differing(compiled(X), int8(X)) == 0


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_modules_of_its_own(make: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 1), DeQuantStub())
    for module in (layer, *layer):
        module.qconfig = horizon.quantization.default_calib_qconfig
    prepared = prepare_qat(layer.eval())
    calibrate(prepared, [X], progress=False)
    original = convert(prepared.eval())
    other = make(original)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                module.weight.neg_()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        assert differing(compiled(X), other(X)) == 0
        assert differing(other(X), original(X)) > 0


def test_nan_is_an_error_when_compiled(int8: nn.Module) -> None:
    # with fullgraph=True PyTorch trips over an fx.GraphModule that raises, before the message gets out
    compiled = torch.compile(int8, backend="aot_eager")
    with torch.no_grad(), pytest.raises(QuantizationError, match="holds NaN"):
        compiled(X * float("nan"))


@pytest.mark.parametrize("strict", [False, True])
def test_export_says_how(int8: nn.Module, strict: bool) -> None:
    with pytest.raises(Exception, match=r"as_module"):
        torch.export.export(int8, (X,), strict=strict)


def test_the_operator_is_registered_as_it_should_be(int8: nn.Module) -> None:
    calls: list[Any] = []
    operator = torch.ops.horizon.quantized_module

    class Recorder(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in (operator, operator.default):
                calls.append(args)
            return super().call_function(target, args, kwargs)

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lambda *args: Recorder(graph).run(*args)

    with torch.no_grad():
        assert differing(torch.compile(int8, fullgraph=True, backend=backend)(X), int8(X)) == 0
    assert len(calls) == sum(isinstance(m, MakesIntegers) for m in int8.modules())
    for args in calls:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
