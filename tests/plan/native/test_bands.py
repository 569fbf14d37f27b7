"""Chains of groups that run depth first give what they give one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan import Plan
from plan.native import plans

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="the CPU kernels were not built")
ISAS = range(library.best_isa() + 1) if library.why_not() is None else range(1)


@dataclass
class Layer:
    geometry: Geometry
    channels: int
    dtype: str
    activation: str | None
    residual: str | None


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    of = lambda *options: (draw(st.sampled_from(options)), draw(st.sampled_from(options)))  # noqa: E731
    kernel, stride, dilation = of(1, 1, 2, 3, 5), of(1, 1, 2, 3), of(1, 1, 2)
    padding = tuple(draw(st.integers(0, d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True))
    depthwise = draw(st.booleans())
    geometry = Geometry(2, False, kernel, stride, padding, dilation, (0, 0), 0 if depthwise else 1)
    return Layer(
        geometry,
        draw(st.sampled_from([1, 3, 16, 20, 70])),
        draw(st.sampled_from(["int8", "uint8"])),
        draw(st.sampled_from([None, "relu", "relu6"])),
        draw(st.sampled_from([None, None, "int8", "uint8"])),
    )


def network(chain: list[Layer], shape: tuple[int, ...]) -> tuple[Plan, list[torch.Tensor]] | None:
    """The layers one after the other; those of 0 groups are depthwise. None: an image is too small for them."""
    into, size, results, geometries, weights = shape[1], shape, [], [], []
    for layer in chain:
        groups = layer.geometry.groups or into
        out = layer.channels if layer.geometry.groups else into
        geometry = Geometry(**{**vars(layer.geometry), "groups": groups})
        reach = [d * (k - 1) + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
        if any(n + 2 * p < r for n, p, r in zip(size[2:], geometry.padding, reach, strict=True)):
            return None
        weight = torch.randint(-127, 128, (out, into // groups, *geometry.kernel_size), dtype=torch.int8)
        size = tuple(geometry.accumulate(torch.zeros(size, dtype=torch.int8), weight, None).shape)
        into = out
        geometries.append(geometry), weights.append(weight), results.append(size)
    added = {f"r{i}": size for i, (layer, size) in enumerate(zip(chain, results, strict=True)) if layer.residual}
    made = plans.Maker(x=shape, **added)
    inputs = [plans.integers(shape, "uint8")]
    values = {"x": made.quantize(0, "uint8")}
    for number, (name, size) in enumerate(added.items(), start=1):
        dtype = chain[int(name[1:])].residual
        assert dtype is not None
        inputs.append(plans.integers(size, dtype))
        values[name] = made.quantize(number, dtype)
    y = values["x"]
    for i, (layer, geometry, weight) in enumerate(zip(chain, geometries, weights, strict=True)):
        y = made.group(
            y, geometry, weight, residual=values.get(f"r{i}"), activation=layer.activation, dtype=layer.dtype
        )
    return made.plan(y), inputs


@settings(max_examples=150)
@given(
    st.lists(layers(), min_size=2, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.tuples(st.integers(1, 24), st.integers(1, 12)),
    st.sampled_from([5, 7, 32]),  # not so few that AMX would lay them out as an image, in pairs of rows
    st.sampled_from([1, 300, 3000, 10**6]),
    st.integers(0, 2**16),
)
def test_chains(chain: list[Layer], images: int, size: tuple[int, int], channels: int, room: int, seed: int) -> None:
    torch.manual_seed(seed)
    made = network(chain, (images, channels, *size))
    if made is None:
        return
    plan, inputs = made
    expected = plans.reference(plan, *inputs)
    for isa in ISAS:
        for threads in (1, 2, 3):
            program = plans.program(plan, *inputs, isa=isa, threads=threads, depth=[room])
            assert [len(c.steps) for c in program.lowered.chains] == [len(chain)]
            assert program.chains == 1
            for _ in range(2):  # the second time on what the first has left
                assert plans.differing(expected, program(inputs, threads)) == 0, (
                    f"{library.ISAS[isa]}, {threads} threads"
                )
