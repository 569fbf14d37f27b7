"""A QTensor is, to any code, the float32 tensor that it stands for: functions and methods give the same on both."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor

# Expressions of x and y, two QTensors of different scales; those of the first block stay integers with one scale per tensor.
INTEGERS = """
x.view(2, -1) ; x.reshape(8, -1) ; torch.reshape(x, (-1,)) ; x.flatten(1) ; torch.flatten(input=x, start_dim=1) ; x.unflatten(1, (2, 4))
x.permute(0, 2, 3, 1) ; torch.permute(x, (3, 2, 1, 0)) ; x.transpose(1, 2) ; x.squeeze() ; x.unsqueeze(0) ; x.mT ; x.mH ; x[0, 0].T
x[0, 0].H ; x[0, 0].t() ; x.data ; x.real ; x.swapaxes(0, 1) ; x.movedim(1, -1) ; x.movedim((0, 1), (1, 0)) ; x.ravel() ; torch.rot90(x, 1, (2, 3))
x[0] ; x[:, 1:3] ; x[..., None] ; x[:, [0, 2]] ; x[torch.tensor([1, 0])] ; x[f > 0] ; x[:, ::2] ; x.select(1, 2) ; x.narrow(1, 2, 3)
x.index_select(1, index) ; x.gather(1, places) ; torch.gather(x, 1, places) ; torch.take_along_dim(x, places, 1) ; x.diagonal(dim1=2, dim2=3)
x.expand(3, 2, 8, 4, 4) ; x[:1].expand_as(x) ; torch.broadcast_to(x, (3, 2, 8, 4, 4)) ; x.repeat(1, 2, 1, 1) ; x.tile(2) ; x.repeat_interleave(2, 1)
x.chunk(2, 1) ; x.split(3, 1) ; x.split([1, 7], 1) ; torch.tensor_split(x, 3, 1) ; x.unbind(1) ; [t for t in x] ; list(x) ; x.view_as(y)
x.reshape_as(y) ; x.roll(1, 2) ; x.flip(1) ; torch.fliplr(x) ; x.unfold(2, 2, 1) ; torch.atleast_3d(x[0, 0]) ; F.pixel_shuffle(x, 2)
F.pixel_unshuffle(x, 2) ; torch.channel_shuffle(x, 2) ; F.channel_shuffle(x, 2) ; x.contiguous() ; x.clone() ; x.detach() ; +x
x.contiguous(memory_format=torch.channels_last) ; x.to("cpu") ; x.cpu() ; copy.copy(x) ; copy.deepcopy(x) ; pickle.loads(pickle.dumps(x))
F.max_pool2d(x, 2) ; F.max_pool2d(x, 3, 1, 1, ceil_mode=True) ; F.max_pool2d(input=x, kernel_size=2) ; torch.max_pool2d(x, 2) ; F.max_pool1d(x[0], 2)
F.max_pool3d(x, 2) ; F.adaptive_max_pool2d(x, 3) ; F.adaptive_max_pool1d(x[0], 3) ; nn.MaxPool2d(2)(x) ; nn.AdaptiveMaxPool2d(2)(x)
F.interpolate(x, scale_factor=2) ; F.interpolate(x, size=(3, 5)) ; F.interpolate(x, scale_factor=2, mode="nearest-exact")
F.interpolate(input=x, size=7) ; nn.Upsample(scale_factor=2)(x) ; F.pad(x, (1, 2)) ; F.pad(x, (1, 1, 2, 2)) ; F.pad(x, (0, 0, 0, 0, 1, 1))
F.pad(x, (-1, -1)) ; F.pad(x, (1, 1, 1, 1), mode="reflect") ; F.pad(x, (1, 1, 1, 1), mode="replicate") ; nn.ReflectionPad2d(1)(x)
F.pad(x, (1, 1, 1, 1), mode="circular") ; nn.ZeroPad2d(1)(x) ; F.relu(x) ; torch.relu(x) ; x.relu() ; F.relu(input=x)
F.dropout(x, 0.5, False) ; F.dropout2d(x, 0.5, training=False) ; nn.Dropout().eval()(x) ; torch.cat([x, x], 1) ; torch.cat(tensors=[x, x], dim=0)
torch.concat([x, x]) ; torch.stack([x, x]) ; torch.hstack([x, x]) ; torch.cat(x.chunk(2, 1)[::-1], 1) ; torch.cat([x, x.flip(0)], 2)
"""
FLOATS = """
-x ; abs(x) ; x + 1 ; 1 + x ; x + y ; x - y ; x * y ; x * 2.5 ; x / 3 ; x // 2 ; x % 2 ; x**2 ; 2 ** (x / 10) ; x @ y.mT ; torch.matmul(x, y.mT)
torch.add(x, y, alpha=2) ; torch.sub(x, 1) ; torch.mul(x, y) ; torch.div(x, 2) ; x.add(1) ; x.mul(y) ; torch.maximum(x, y) ; torch.where(x > 0, x, y)
torch.lerp(x, y, 0.5) ; torch.addcmul(x, y, y) ; f + x ; x + f ; f * x ; sum([x, y]) ; torch.einsum("bchw,bchw->bc", x, y)
x == y ; x != 0 ; x < y ; x <= 1 ; x > 0 ; x >= y ; torch.equal(x, x) ; torch.allclose(x, x) ; torch.isnan(x) ; x.any() ; x.all() ; x.sign()
x.sum() ; x.sum(1) ; x.mean() ; x.mean((2, 3)) ; x.max() ; x.max(1) ; x.amax(1) ; x.min() ; x.argmax(1) ; x.var(1) ; x.std() ; x.norm() ; x.prod(1)
x.cumsum(1) ; x.sort(1) ; x.topk(2, 1) ; torch.median(x) ; F.normalize(x) ; x.unique() ; x.nonzero() ; x.round() ; x.floor() ; x.triu()
torch.cat([x, y], 1) ; torch.cat((x, f), 1) ; torch.stack([x, y]) ; torch.block_diag(x[0, 0], x[0, 0]) ; x.masked_fill(f > 0, 7.0)
F.conv2d(x, weight) ; F.conv_transpose2d(x, transposed) ; F.linear(x, matrix) ; F.batch_norm(x, zeros, ones) ; F.group_norm(x, 2)
F.layer_norm(x, (4,)) ; F.avg_pool2d(x, 2) ; F.adaptive_avg_pool2d(x, 1) ; F.unfold(x, 2) ; F.grid_sample(x, grid, align_corners=False)
F.prelu(x, ones) ; F.cosine_similarity(x, y) ; F.mse_loss(x, y) ; F.cross_entropy(x, labels) ; F.scaled_dot_product_attention(x, y, y)
F.relu6(x) ; F.hardtanh(x, -1, 1) ; F.leaky_relu(x) ; torch.sigmoid(x) ; F.silu(x) ; x.clamp(-1, 1) ; F.softmax(x, 1) ; x.exp() ; x.tanh() ; F.elu(x)
F.interpolate(x, scale_factor=2, mode="bicubic") ; F.interpolate(x, scale_factor=1.5, recompute_scale_factor=True)
F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
F.pad(x, (1, 1), value=3.0) ; F.max_pool2d(x, 2, return_indices=True) ; F.adaptive_max_pool2d(x, 3, return_indices=True)
x.to(torch.float64) ; x.to(torch.int32) ; x.to(y) ; x.to(x.dtype) ; x.float() ; x.half() ; x.double() ; x.int() ; x.long() ; x.bool() ; x.type()
x.type(torch.float16) ; torch.zeros(1).type_as(x) ; x.new_zeros(2) ; x.new_tensor([1.5]) ; torch.zeros_like(x) ; torch.full_like(x, 0.3)
x[0, 0, 0, 0].item() ; x.tolist() ; x.numpy() ; np.asarray(x) ; float(x[0, 0, 0, 0]) ; int(x[0, 0, 0, 0]) ; bool(x[0, 0, 0, 0])
x.view(torch.int32) ; torch.fft.fft(x).abs() ; torch.linalg.norm(x) ; x.view(-1).dot(y.view(-1)) ; x.index_add(1, index, x[:, :3])
nn.BatchNorm2d(8).eval()(x) ; nn.Softmax(1)(x) ; f.clone().add_(x) ; f.clone().copy_(x) ; torch.cat([f, x[:, :1]], 1) ; torch.ops.aten.relu(x)
"""
QUERIES = """
x.dtype ; x.is_floating_point() ; torch.is_floating_point(x) ; x.shape ; x.size(1) ; x.ndim ; x.dim() ; x.numel() ; len(x) ; x.device ; x.stride()
x.is_contiguous() ; torch.zeros(2, dtype=x.dtype) ; x.requires_grad ; x.is_leaf ; x.is_complex()
"""


def split(block: str) -> list[str]:
    return [e.strip() for line in block.strip().splitlines() for e in line.split(" ; ")]


def quantized(dtype: torch.dtype, per_channel: bool, factor: float) -> QTensor:
    low, high = (-128, 127) if dtype == torch.int8 else (0, 255)
    payload = torch.randint(low, high + 1, (2, 8, 4, 4), dtype=torch.int16).to(dtype)
    scale = (torch.rand(8) * 0.1 + 0.01 if per_channel else torch.tensor(0.1)) * factor
    return QTensor.make(payload, scale, dtype)


def evaluate(expression: str, x: Any, y: Any) -> Any:
    torch.manual_seed(1)
    names = dict(
        f=torch.randn(2, 8, 4, 4), weight=torch.randn(4, 8, 3, 3), transposed=torch.randn(8, 3, 2, 2), matrix=torch.randn(5, 4),
        zeros=torch.zeros(8), ones=torch.ones(8), grid=torch.rand(2, 3, 3, 2), labels=torch.randint(0, 4, (2, 4, 4)),
        places=torch.randint(0, 8, (2, 8, 4, 4)), index=torch.tensor([0, 2, 1]),
    )  # fmt: skip
    scope = {"torch": torch, "F": F, "nn": nn, "np": np, "copy": copy, "pickle": pickle, "x": x, "y": y, **names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about deprecated attributes
        return eval(expression, scope)


def value(result: Any) -> Any:
    return tree_map(lambda t: t.dequantize() if isinstance(t, QTensor) else t, result)


def same(actual: Any, expected: Any) -> bool:
    a, b = tree_leaves(actual), tree_leaves(expected)
    if len(a) != len(b):
        return False
    for s, t in zip(a, b, strict=True):
        if isinstance(t, (Tensor, np.ndarray)):
            s, t = torch.as_tensor(s), torch.as_tensor(t)
            if s.dtype != t.dtype or s.shape != t.shape or bool(((s != t) & ~((s != s) & (t != t))).any()):
                return False
        elif s != t:
            return False
    return True


@pytest.mark.parametrize("expression", split(INTEGERS) + split(FLOATS) + split(QUERIES))
def test_the_same_as_on_the_value(expression: str) -> None:
    for dtype, per_channel in itertools.product((torch.int8, torch.uint8), (False, True)):
        x, y = quantized(dtype, per_channel, 1.0), quantized(dtype, per_channel, 1.5)
        before = x.payload.clone()
        expected = evaluate(expression, x.dequantize(), y.dequantize())
        actual = evaluate(expression, x, y)
        integers = [t for t in tree_leaves(actual) if isinstance(t, QTensor)]
        assert same(value(actual), expected)
        assert int((x.payload != before).sum()) == 0
        if expression in split(INTEGERS) and not per_channel:
            assert integers and all(t.dtype8 == dtype and t.payload.dtype == dtype for t in integers)
            assert not x.float_calls
        if expression in split(FLOATS):
            assert not integers and x.float_calls + y.float_calls
        if expression in split(QUERIES):
            assert not x.float_calls


IN_PLACE = """
x.add_(1) ; x.mul_(2) ; x.__iadd__(1) ; x.__imul__(y) ; x.__setitem__(0, 1.0) ; x.copy_(f) ; x.zero_() ; x.fill_(0.5) ; x.clamp_(0, 6) ; x.neg_()
x.sigmoid_() ; x.masked_fill_(f > 0, 1.0) ; x[0].add_(1) ; x.view(-1).mul_(2) ; x.t_() ; x.squeeze_() ; torch.add(f, f, out=x) ; F.relu6_(x)
torch.sigmoid_(x) ; x.normal_() ; x.index_add_(1, index, f[:, :3]) ; setattr(x, "data", f) ; torch.max(f, 1, out=(x, places)) ; F.elu_(x)
"""


@pytest.mark.parametrize("expression", split(IN_PLACE))
def test_changes_in_place_are_refused(expression: str) -> None:
    x, y = quantized(torch.int8, False, 1.0), quantized(torch.int8, False, 1.5)
    before = x.payload.clone()
    if not hasattr(F, "relu6_") and "relu6_" in expression:
        expression = "x.tanh_()"
    with pytest.raises(QuantizationError, match="in place"):
        evaluate(expression, x, y)
    assert int((x.payload != before).sum()) == 0


def test_augmented_assignment_is_refused() -> None:
    x = quantized(torch.int8, False, 1.0)
    with pytest.raises(QuantizationError, match="x = x \\+ y"):
        x += 1


@pytest.mark.parametrize(
    "function", [lambda x: x.relu_(), torch.relu_, lambda x: F.relu(x, inplace=True), nn.ReLU(inplace=True)]
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_relu_in_place_is_seen_by_views(function: Any, per_channel: bool) -> None:
    x = quantized(torch.int8, per_channel, 1.0)
    view, expected = x.payload.view(-1), x.dequantize().relu()
    function(x)
    assert int((x.dequantize() != expected).sum()) == 0
    assert int(view.min()) == 0


def test_an_index_must_not_be_taken_from_the_integers() -> None:
    x = quantized(torch.uint8, False, 1.0)
    with pytest.raises((IndexError, RuntimeError, TypeError)):
        torch.arange(256.0)[x]  # uint8 integers would be taken for a mask
    with pytest.raises((IndexError, RuntimeError, TypeError)):
        x.flatten()[x.flatten()]


def test_training_keeps_gradients_and_integers() -> None:
    source = torch.randn(2, 4, 6, 6, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    x = QTensor.make(source * 1.0, scale, torch.int8)
    moved = F.max_pool2d(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).reshape(2, 4, 6, 6), 2)
    assert isinstance(moved, QTensor) and moved.scale is scale
    F.pad(F.interpolate(moved, scale_factor=2), (1, 1, 1, 1), mode="reflect").dequantize().sum().backward()
    assert source.grad is not None and scale.grad is not None and bool(source.grad.abs().sum() > 0)
    assert not x.detach().dequantize().requires_grad


@pytest.mark.parametrize("call", [{"scale_factor": 2}, {"size": (9, 5)}, {"scale_factor": 1.7, "align_corners": True}])
def test_bilinear_rounds_to_integers_of_the_same_scale(call: dict[str, Any]) -> None:
    x = quantized(torch.uint8, False, 1.0)
    y = F.interpolate(x, mode="bilinear", **call)
    assert isinstance(y, QTensor) and y.scale is x.scale and y.payload.dtype == torch.uint8 and not x.float_calls
    steps = (y.payload - F.interpolate(x.payload.float(), mode="bilinear", **call)).abs().max()
    assert 0 < float(steps) < 0.5 + 1 / 8

    source = x.payload.float().requires_grad_()
    trained = F.interpolate(QTensor.make(source, x.scale, torch.uint8), mode="bilinear", **call)
    assert int((trained.payload != y.payload).sum()) == 0  # the same integers
    weight = torch.randn(y.shape)
    (trained.payload * weight).sum().backward()
    expected = source.detach().clone().requires_grad_()
    (F.interpolate(expected, mode="bilinear", **call) * weight).sum().backward()
    assert source.grad is not None and torch.equal(source.grad, expected.grad)  # type: ignore[arg-type]


def test_dropout_in_training_keeps_the_integers() -> None:
    x = QTensor.make(torch.randint(-128, 128, (64, 64)).float(), torch.tensor(0.1), torch.int8)
    y = F.dropout(x, 0.25, True)
    kept = y.payload != 0
    assert isinstance(y, QTensor) and not x.float_calls
    assert int((y.payload[kept] != x.payload[kept]).sum()) == 0
    assert float(y.scale) == pytest.approx(0.1 / 0.75)
    assert 0.6 < float(kept.float().mean()) < 0.85


def test_functions_are_counted_at_the_module_that_made_the_integers() -> None:
    x = quantized(torch.int8, False, 1.0)
    _ = x[0].flatten() * 2 + 1
    _ = torch.softmax(x, 1)
    assert dict(x.float_calls) == {"torch.Tensor.mul": 1, "torch.softmax": 1}


def test_text_tells_what_it_is() -> None:
    text = repr(quantized(torch.uint8, False, 1.0))
    assert (
        text.startswith("QTensor(") and "torch.uint8" in text and "scale=0.1" in text.replace("tensor(0.1000)", "0.1")
    )
