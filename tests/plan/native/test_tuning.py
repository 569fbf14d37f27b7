"""Choosing how convolutions are done: no choice changes a result, and what was measured is found again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan import Plan
from horizon_plugin_pytorch.plan.native import bands, batches, tuning
from horizon_plugin_pytorch.plan.native.batches import Split
from horizon_plugin_pytorch.plan.native.compiling import compile_for
from horizon_plugin_pytorch.plan.native.constants import Constants
from horizon_plugin_pytorch.plan.native.execution import NativeProgram
from horizon_plugin_pytorch.plan.program import PlanError, Ref, Step
from plan.native import plans

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="the CPU kernels were not built")
ISAS = range(library.best_isa() + 1) if library.why_not() is None else range(1)


def network(batch: int = 1) -> tuple[Plan, torch.Tensor]:
    """A stem, a 3×3 and a float output, with channels that fill no tile."""
    shape = (batch, 3, 29, 31)
    of = lambda n: (n, n)  # noqa: E731
    made = plans.Maker(x=shape)

    def conv(x: object, into: int, out: int, stride: int, **more: object) -> object:
        weight = torch.randint(-127, 128, (out, into, 3, 3), dtype=torch.int8)
        return made.group(x, Geometry(2, False, of(3), of(stride), of(1), of(1), of(0)), weight, **more)  # type: ignore[arg-type]

    x = conv(made.quantize(0, "int8"), 3, 40, 2, dtype="uint8", activation="relu")
    y = conv(x, 40, 40, 1, residual=x, scale=torch.tensor(0.05))
    return made.plan(conv(y, 40, 150, 1, dtype=None)), plans.integers(shape, "int8")


def test_every_way_gives_the_same() -> None:
    plan, x = network()
    expected = plans.reference(plan, x)
    for isa in ISAS:
        blocks = tuning.BLOCKS[library.ISAS[isa]]
        for rows, columns in [*blocks, (3, 3), (2, 4), (13, 1)]:
            for by_channels, inside in ((0, 0), (0, 1), (1, 0), (1, 1)):
                program = plans.program(plan, x, isa=isa)
                for operation in program.lowered.builder.operations:
                    if operation.kind == "conv":
                        tuning.apply(operation, (len(operation.ways) - 1, rows, columns, by_channels, inside))
                for threads in (1, 2):
                    assert plans.differing(expected, program((x,), threads)) == 0


@pytest.mark.parametrize("batch", [1, 8])
def test_measurements_are_found_again(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = network(batch)
    isa = library.best_isa()
    first = compile_for(plan, Constants(plan), (x,), isa, 2, tuning.Cache(tmp_path / "ways.json"))
    assert plans.differing(plans.reference(plan, x), first((x,), 2)) == 0
    stored = json.loads((tmp_path / "ways.json").read_text())

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(tuning.Tuner, "_measure", refuse)
    monkeypatch.setattr(batches, "choose", refuse)
    again = compile_for(plan, Constants(plan), (x,), isa, 2, tuning.Cache(tmp_path / "ways.json"))
    ways = [
        [(o.params.rows, o.params.columns) for o in p.lowered.builder.operations if o.kind == "conv"]
        for p in (first, again)
    ]
    assert ways[0] == ways[1] and first.split == again.split
    assert json.loads((tmp_path / "ways.json").read_text()) == stored


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"cpu": 3}', "\x00\xff", "[" * 100_000])
def test_a_damaged_file_is_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ways.json"
    path.write_text(content, encoding="latin-1")
    cache = tuning.Cache(path)
    assert cache.note is not None and str(path) in cache.note
    cache.put("key", (1, 2))
    cache.write()
    assert tuning.Cache(path).get("key", (5, 5)) == [1, 2]
    assert tuning.Cache(path).note is None


def test_numbers_out_of_range_are_no_ways(tmp_path: Path) -> None:
    path = tmp_path / "ways.json"
    for wrong in ([1], [1, 9], [1, -1], [1, "1"], [1, True], {"a": 1}, None):
        path.write_text(json.dumps({tuning._machine(): {"key": wrong}}))
        assert tuning.Cache(path).get("key", (5, 5)) is None


def test_ways_that_the_kernels_do_not_have_are_not_taken(tmp_path: Path) -> None:
    plan, x = network()
    isa = library.best_isa()
    compile_for(plan, Constants(plan), (x,), isa, 1, tuning.Cache(tmp_path / "ways.json"))
    stored = json.loads((tmp_path / "ways.json").read_text())
    stored[tuning._machine()] = {key: [0, 63, 63, 0, 0] for key in stored[tuning._machine()]}
    (tmp_path / "ways.json").write_text(json.dumps(stored))
    program = compile_for(plan, Constants(plan), (x,), isa, 1, tuning.Cache(tmp_path / "ways.json"))
    assert plans.differing(plans.reference(plan, x), program((x,), 1)) == 0


def test_a_folder_that_cannot_be_written_is_noted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = tuning.Cache(tmp_path / "file" / "ways.json")
    cache.put("key", (1, 2))
    cache.write()
    assert cache.note is not None and "not kept" in cache.note
    assert cache.get("key", (5, 5)) == [1, 2]


def test_measuring_ends_in_time(tmp_path: Path) -> None:
    plan, x = network()
    cache = tuning.Cache(tmp_path / "ways.json")
    NativeProgram(plan, Constants(plan), (x,), 0, tuning.Tuner(0, 1, cache, time.monotonic() - 1))
    assert not (tmp_path / "ways.json").exists() and not cache._ways


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("images", [1, 2, 3, 6])
def test_parts_of_a_batch(apart: bool, images: int) -> None:
    plan, x = network(6)
    expected = plans.reference(plan, x)
    for isa in ISAS:
        for threads in (1, 2, 4):
            program = NativeProgram(plan, Constants(plan), (x,), isa, split=Split(images, apart))
            for layout in (torch.contiguous_format, torch.channels_last):
                laid = x.contiguous(memory_format=layout)
                program = NativeProgram(plan, Constants(plan), (laid,), isa, split=Split(images, apart))
                assert plans.differing(expected, program((laid,), threads)) == 0


def floats_at_the_end(in_place: bool, read_later: bool) -> tuple[Plan, Tensor]:
    """A convolution to float32 with two readers in PyTorch, one of which mixes images; its result may be quantized again."""
    shape = (4, 8, 5, 5)
    of = lambda n: (n, n)  # noqa: E731
    made = plans.Maker(x=shape)
    weight = torch.randint(-127, 128, (4, 8, 1, 1), dtype=torch.int8)
    geometry = Geometry(2, False, of(1), of(1), of(0), of(1), of(0))
    y = made.group(made.quantize(0, "int8"), geometry, weight, dtype=None)
    soft = made.function("method.relu_" if in_place else "torch.sigmoid", y)
    rolled = made.function("torch.roll", soft, 1, 0)
    outputs = [soft, rolled]
    if read_later:
        scale = made.constant(torch.tensor(0.1))
        q = made.add(Step("quantize", "again", (y,), params={"scale": scale, "dtype": "int8"}), "int8", scale)
        outputs.append(made.add(Step("dequantize", "end", (q,)), "float32"))
    return made.plan(tuple(outputs)), plans.integers(shape, "int8")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("read_later", [False, True])
def test_floats_at_the_end_see_the_whole_batch(in_place: bool, read_later: bool) -> None:
    plan, x = floats_at_the_end(in_place, read_later)
    expected = plans.reference(plan, x)
    whole = NativeProgram(plan, Constants(plan), (x,), 0)
    assert plans.differing(expected, whole((x,), 1)) == 0
    waits = [s.index for s in whole.lowered.torch_steps] == sorted(whole.lowered.tail)
    assert waits is not read_later  # it could change, in place, what a later step reads
    for apart in (False, True):
        if not waits:
            with pytest.raises(PlanError, match="each image"):
                NativeProgram(plan, Constants(plan), (x,), 0, split=Split(2, apart))
            continue
        program = NativeProgram(plan, Constants(plan), (x,), 0, split=Split(2, apart))
        assert program.iterations == 2 and plans.differing(expected, program((x,), 2)) == 0


def test_a_size_among_the_outputs_is_that_of_the_whole_batch() -> None:
    made = plans.Maker(x=(4, 8, 5, 5))
    x = made.quantize(0, "int8")
    y = made.add(Step("dequantize", "end", (x,)), "float32")
    size = made.add(Step("function", "size", (y, 0), target="method.size"), "host")
    plan, data = made.plan((y, size)), plans.integers((4, 8, 5, 5), "int8")
    with pytest.raises(PlanError, match="each image"):
        NativeProgram(plan, Constants(plan), (data,), 0, split=Split(2, False))
    assert NativeProgram(plan, Constants(plan), (data,), 0)((data,), 1)[1] == 4


def test_batches_that_threads_cannot_share_evenly_are_tried_in_other_ways() -> None:
    assert batches.splits(4, 2) == [Split(1, True), Split(4, False)]
    assert batches.splits(5, 2) == [Split(1, True), Split(1, False), Split(5, False)]
    assert batches.splits(16, 1) == [Split(1, False), Split(4, False), Split(16, False)]
    assert batches.splits(1, 2) == [Split(1, False)]


def test_what_mixes_images_is_not_cut() -> None:
    shape = (4, 8, 5, 5)
    of = lambda n: (n, n)  # noqa: E731
    made = plans.Maker(x=shape)
    x = made.quantize(0, "int8")
    rolled = made.function("torch.roll", x, 1, 0, of=x)
    weight = torch.randint(-127, 128, (4, 8, 1, 1), dtype=torch.int8)
    plan = made.plan(made.group(rolled, Geometry(2, False, of(1), of(1), of(0), of(1), of(0)), weight, dtype=None))
    data = plans.integers(shape, "int8")
    with pytest.raises(PlanError, match="each image"):
        NativeProgram(plan, Constants(plan), (data,), 0, split=Split(2, False))
    program = compile_for(plan, Constants(plan), (data,), 0, 1, tuning.Cache(Path("/nonexistent/ways.json")))
    assert program.iterations == 1
    assert plans.differing(plans.reference(plan, data), program((data,), 1)) == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_what_runs_on_the_caller_s_data_alone_is_not_measured(tmp_path: Path, batch: int) -> None:
    """A step that random data would not pass, and inputs that are not of one batch."""
    shape = (batch, 16, 40, 120)
    made = plans.Maker(x=shape, index=(7,))
    conv = Geometry(2, False, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    weights = [torch.randint(-127, 128, (16, 16, 3, 3), dtype=torch.int8) for _ in range(3)]
    y = made.quantize(0, "int8")
    for weight in weights:
        y = made.group(y, conv, weight, dtype="int8", scale=torch.tensor(0.05))
    places = made.function("method.long", made.function("torch.mul", Ref(1), 1024))
    picked = made.function("torch.index_select", Ref(1), 0, places)
    plan = made.plan((y, picked))
    inputs = (plans.integers(shape, "int8"), torch.arange(7.0) / 1024)
    program = compile_for(plan, Constants(plan), inputs, library.best_isa(), 2, tuning.Cache(tmp_path / "ways.json"))
    assert program.chains == 0
    assert program.lowered.chains[0].bytes > bands.SIZES[0]
    assert plans.differing(plans.reference(plan, *inputs), program(inputs, 2)) == 0
