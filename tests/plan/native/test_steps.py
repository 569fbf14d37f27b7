"""Operators, tables, moves and functions: each native, or in PyTorch where it is said, and equal to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.program import Ref, Step
from plan.native import plans

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="the CPU kernels were not built")
ISAS = range(library.best_isa() + 1) if library.why_not() is None else range(1)
dtypes = st.sampled_from(["int8", "uint8"])


def check(made: plans.Maker, outputs: Any, *inputs: torch.Tensor, in_torch: int = 0) -> None:
    plan = made.plan(outputs)
    expected = plans.reference(plan, *inputs)
    for isa in ISAS:
        for threads in (1, 2):
            got, steps = plans.native(plan, *inputs, isa=isa, threads=threads)
            assert plans.differing(expected, got) == 0, f"{library.ISAS[isa]}, {threads} threads"
            assert len(steps) == in_torch, [plan.steps[i].name for i in steps]


def conv(channels: int, into: int, kernel: int = 3, padding: int = 1) -> tuple[Geometry, torch.Tensor]:
    of = lambda n: (n, n)  # noqa: E731
    geometry = Geometry(2, False, of(kernel), of(1), of(padding), of(1), of(0), 1)
    return geometry, torch.randint(-127, 128, (channels, into, kernel, kernel), dtype=torch.int8)


@settings(max_examples=60)
@given(st.data())
def test_add_and_mul(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 16, 33]), min_size=1, max_size=5)))
    other = tuple(1 if data.draw(st.integers(0, 3)) == 0 else n for n in shape)[
        data.draw(st.integers(0, len(shape) - 1)) :
    ]
    a, b, y = (data.draw(dtypes) for _ in range(3))
    made = plans.Maker(a=shape, b=other)
    first, second = made.quantize(0, a, 0.5), made.quantize(1, b, 0.75)
    if data.draw(st.booleans()):
        first, second = second, first
    activation = data.draw(st.sampled_from([None, "relu", "relu6"]))
    results = [
        made.operator("Add", (first, second), y, 0.37, activation=activation),
        made.operator("Mul", (first, second), y, 21.0),
    ]
    check(made, tuple(results), plans.integers(shape, a) * 0.5, plans.integers(other, b) * 0.75)


@settings(max_examples=40)
@given(st.data())
def test_cat(data: st.DataObject) -> None:
    dims = data.draw(st.integers(2, 5))
    shape = [data.draw(st.sampled_from([1, 2, 3, 6])) for _ in range(dims)]
    dim = data.draw(st.integers(-dims, dims - 1))
    made, refs, inputs = plans.Maker(), [], []
    count = data.draw(st.integers(1, 4))
    shapes = []
    for _ in range(count):
        shape[dim] = data.draw(st.integers(1, 40))
        shapes.append(tuple(shape))
    made = plans.Maker(**{f"x{i}": s for i, s in enumerate(shapes)})
    for i, s in enumerate(shapes):
        dtype, scale = data.draw(dtypes), data.draw(st.sampled_from([1.0, 1.0, 0.5, 1.7]))
        refs.append(made.quantize(i, dtype, scale))
        inputs.append(plans.integers(s, dtype) * scale)
    if data.draw(st.booleans()):
        refs.append(refs[0])
    check(made, made.operator("Cat", tuple(refs), data.draw(dtypes), 1.0, dim=dim), *inputs)


def test_cat_between_convolutions_is_written_in_place() -> None:
    made = plans.Maker(x=(2, 8, 9, 9))
    x = made.quantize(0, "int8")
    parts = [made.group(x, *conv(n, 8), scale=torch.tensor(0.05)) for n in (8, 24)]
    both = made.operator("Cat", tuple(parts), "int8", 0.05, dim=1)
    y = made.group(both, *conv(16, 32, 5, 2))
    check(made, (y, both), plans.integers((2, 8, 9, 9), "int8"))
    program = plans.program(made.plan(y), plans.integers((2, 8, 9, 9), "int8"))
    assert [o.kind for o in program.lowered.builder.operations if o.kind != "zero"] == [
        "quantize",
        "conv",
        "conv",
        "conv",
    ]


@settings(max_examples=60)
@given(st.data())
def test_pools(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    size = tuple(data.draw(st.integers(4, 9)) for _ in range(dims))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 16, 40, 67])), *size)
    a, b = data.draw(dtypes), data.draw(dtypes)
    kernel = tuple(data.draw(st.integers(1, 4)) for _ in range(dims))
    call = {
        "kernel_size": kernel,
        "stride": data.draw(st.sampled_from([None, 1, 2, 3])),
        "padding": tuple(data.draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": data.draw(st.booleans()),
    }
    made = plans.Maker(x=shape)
    x = made.quantize(0, a)
    largest = made.function(f"torch.nn.functional.max_pool{dims}d", x, of=x, **call)
    override = data.draw(st.sampled_from([None, 3])) if dims > 1 else None
    average = made.operator(
        "AvgPool",
        (x,),
        b,
        0.8,
        dims=dims,
        count_include_pad=data.draw(st.booleans()),
        divisor_override=override,
        **call,
    )
    parts = tuple(data.draw(st.integers(1, n + 2)) for n in size)
    adaptive = made.operator("AdaptiveAvgPool", (x,), b, 0.8, dims=dims, output_size=parts)
    adaptive_max = made.function(f"torch.nn.functional.adaptive_max_pool{dims}d", x, parts, of=x)
    over = tuple(range(2, dims + 2)) if data.draw(st.booleans()) else tuple(range(-dims, 0))
    mean = made.operator("Mean", (x,), b, 0.8, dim=over, keepdim=data.draw(st.booleans()))
    check(made, (largest, average, adaptive, adaptive_max, mean), plans.integers(shape, a))


@settings(max_examples=40)
@given(st.data())
def test_nearest_upsampling(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    shape = (2, data.draw(st.sampled_from([1, 5, 64])), *(data.draw(st.integers(1, 6)) for _ in range(dims)))
    if data.draw(st.booleans()):
        target: dict[str, Any] = {"size": tuple(data.draw(st.integers(1, 13)) for _ in range(dims))}
    else:
        target = {"scale_factor": data.draw(st.sampled_from([2, 2.0, 1.5, 3.3, (1.0,) * dims]))}
    mode = data.draw(st.sampled_from(["nearest", "nearest-exact"]))
    made = plans.Maker(x=shape)
    x = made.quantize(0, "int8")
    y = made.function("torch.nn.functional.interpolate", x, of=x, mode=mode, **target)
    check(made, y, plans.integers(shape, "int8"))


@settings(max_examples=60)
@given(st.data())
def test_linear_upsampling(data: st.DataObject) -> None:
    dims, dtype = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(["int8", "uint8"]))
    shape = (2, data.draw(st.sampled_from([1, 5, 19, 64])), *(data.draw(st.integers(1, 6)) for _ in range(dims)))
    if data.draw(st.booleans()):
        target: dict[str, Any] = {"size": tuple(data.draw(st.integers(1, 13)) for _ in range(dims))}
    else:
        target = {"scale_factor": data.draw(st.sampled_from([2, 4.0, 1.5, 3.3, (1.0,) * dims]))}
    mode, corners = ("linear", "bilinear")[dims - 1], data.draw(st.booleans())
    made = plans.Maker(x=shape)
    x = made.quantize(0, dtype)
    y = made.function("torch.nn.functional.interpolate", x, of=x, mode=mode, align_corners=corners, **target)
    check(made, y, plans.integers(shape, dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_table_and_relu(dtype: str) -> None:
    shape = (2, 19, 5, 4)
    made = plans.Maker(x=shape)
    x = made.quantize(0, dtype)
    scale = torch.tensor(0.1)
    table = reference.lookup_table(
        torch.nn.functional.hardswish, torch.tensor(0.05), getattr(torch, dtype), scale, torch.int8
    )
    params = {"table": made.constant(table), "scale": made.constant(scale), "dtype": "int8"}
    y = made.add(Step("table", "hardswish", (x,), params=params), "int8", params["scale"])
    check(made, (y, made.function("torch.relu", y, of=y)), plans.integers(shape, dtype))


Build = Callable[[plans.Maker, Ref], Any]
MOVES: dict[str, tuple[Build, int]] = {
    "flatten": (lambda m, x: m.function("torch.flatten", x, 1, of=x), 0),
    "flatten space": (lambda m, x: m.function("torch.flatten", x, 2, of=x), 0),
    "permute": (lambda m, x: m.function("method.permute", x, 0, 2, 3, 1, of=x), 0),
    "transpose": (lambda m, x: m.function("torch.transpose", x, 1, -1, of=x), 0),
    "view": (lambda m, x: m.function("method.reshape", x, 2, 4, -1, of=x), 0),
    "slice": (lambda m, x: m.function("operator.getitem", x, (slice(None), slice(2, 7), slice(None, None, 2)), of=x), 0),
    "select": (lambda m, x: m.function("operator.getitem", x, (slice(None), 3), of=x), 0),
    "unsqueeze": (lambda m, x: m.function("torch.unsqueeze", x, 2, of=x), 0),
    "contiguous": (lambda m, x: m.function("method.contiguous", x, of=x), 0),
    "dropout": (lambda m, x: m.function("torch.nn.functional.dropout", x, 0.5, False, of=x), 0),
    "expand": (lambda m, x: m.function("method.expand", m.function("operator.getitem", x, (slice(None), slice(0, 1)), of=x), -1, 5, -1, -1, of=x), 0),
    "pixel shuffle": (lambda m, x: m.function("torch.pixel_shuffle", x, 2, of=x), 0),
    "pixel unshuffle": (lambda m, x: m.function("torch.pixel_unshuffle", x, 2, of=x), 0),
    "channel shuffle": (lambda m, x: m.function("torch.channel_shuffle", x, 4, of=x), 0),
    "cat of one scale": (lambda m, x: m.function("torch.cat", [x, x], 1, of=x), 0),
    "flip": (lambda m, x: m.function("torch.flip", x, [2], of=x), 1),
    "softmax": (lambda m, x: m.function("torch.softmax", m.add(Step("dequantize", "float", (x,)), "float32"), 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("halo", [False, True])
def test_moves(name: str, halo: bool) -> None:
    """Of integers with and without zeros around them, and read by what computes."""
    build, in_torch = MOVES[name]
    shape = (2, 8, 6, 4)
    made = plans.Maker(x=shape)
    x = made.quantize(0, "int8")
    outputs = [build(made, x)]
    if halo:
        outputs.append(made.group(x, *conv(20, 8)))
    if made.values[outputs[0].value].scale is not None:
        scale = made.constant(torch.tensor(0.1))
        params = {"table": made.constant(torch.arange(-128, 128).to(torch.int8)), "scale": scale, "dtype": "int8"}
        outputs.append(made.add(Step("table", "same", (outputs[0],), params=params), "int8", scale))
    check(made, tuple(outputs), plans.integers(shape, "int8"), in_torch=in_torch)


@pytest.mark.parametrize("start", [0, 8])
def test_chunks_are_views_that_keep_their_halo(start: int) -> None:
    made = plans.Maker(x=(2, 3, 10, 10))
    x = made.group(made.quantize(0, "int8"), *conv(16, 3), scale=torch.tensor(0.05))
    part = made.function("operator.getitem", x, (slice(None), slice(start, start + 8)), of=x)
    y = made.group(part, *conv(12, 8))
    z = made.group(x, *conv(4, 16))
    plan = made.plan((y, z))
    check(made, (y, z), plans.integers((2, 3, 10, 10), "int8"))
    kinds = [o.kind for o in plans.program(plan, plans.integers((2, 3, 10, 10), "int8")).lowered.builder.operations]
    assert "copy" not in kinds


def test_floats_between_integers_run_in_pytorch() -> None:
    """Segments: what PyTorch computes comes back into the arena, or is quantized from where it is."""
    shape = (2, 6, 7, 5)
    made = plans.Maker(x=shape)
    x = made.group(made.quantize(0, "uint8"), *conv(16, 6), scale=torch.tensor(0.05))
    soft = made.function("torch.softmax", made.add(Step("dequantize", "float", (x,)), "float32"), 1)
    scale = made.constant(torch.tensor(1 / 256))
    q = made.add(Step("quantize", "again", (soft,), params={"scale": scale, "dtype": "uint8"}), "uint8", scale)
    flipped = made.function("torch.flip", q, [3], of=q)
    y = made.group(flipped, *conv(9, 16), residual=None)
    z = made.group(q, *conv(16, 16), residual=x, dtype=None)
    check(made, {"y": y, "z": z, "soft": soft}, plans.integers(shape, "uint8"), in_torch=2)


def test_scales_per_channel_through_a_depthwise_group() -> None:
    shape = (2, 3, 9, 9)
    made = plans.Maker(x=shape)
    wide = made.group(
        made.quantize(0, "int8"), *conv(24, 3), scale=torch.rand(24) + 0.5, dtype="uint8", activation="relu6"
    )
    geometry = Geometry(2, False, (3, 3), (2, 2), (1, 1), (1, 1), (0, 0), 24)
    y = made.group(wide, geometry, torch.randint(-127, 128, (24, 1, 3, 3), dtype=torch.int8))
    check(made, (y, made.add(Step("dequantize", "wide", (wide,)), "float32")), plans.integers(shape, "int8"))


def test_without_a_batch_dimension() -> None:
    made = plans.Maker(x=(3, 9, 9))
    x = made.quantize(0, "int8")
    y = made.group(x, *conv(24, 3))
    pooled = made.function("torch.nn.functional.max_pool2d", y, 2, of=y)
    check(made, (y, pooled), plans.integers((3, 9, 9), "int8"))
