"""Runners of plans on the CPU kernels: networks, threads, shapes, layouts, errors."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan import Plan, PlanError
from horizon_plugin_pytorch.plan.runner import Runner
from plan.native import plans
from quantization.programs import PROGRAMS

needs_library = pytest.mark.skipif(library.why_not() is not None, reason="the CPU kernels were not built")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class UNet(nn.Module):
    """Down, up by transposed convolution, add and cat with what came down, nearest up-sampling, a softmax in float at the end."""

    def __init__(self) -> None:
        super().__init__()

        def block(into: int, out: int, stride: int = 1, groups: int = 1) -> nn.Module:
            conv = nn.Conv2d(into, out, 3, stride, 1, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())

        self.stem, self.wise, self.down = block(3, 20, 2), block(20, 20, 1, 20), block(20, 36, 2)
        self.up = nn.Sequential(nn.ConvTranspose2d(36, 20, 4, 2, 1, bias=False), nn.BatchNorm2d(20))
        self.mix, self.head = block(40, 24), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top = self.wise(self.stem(x))
        low = nn.functional.hardswish(self.down(top))
        up = torch.relu(self.up(low) + top)
        both = self.mix(torch.cat([up, nn.functional.interpolate(low[:, :20], scale_factor=2.0)], 1))
        return torch.softmax(self.head(both), 1), both.mean((2, 3))


@pytest.fixture(scope="module")
def recorded() -> tuple[Plan, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    return horizon.plan.record(horizon.quantize(UNet().eval(), [x], progress=False), x), x


@needs_library
def test_a_network_at_several_sizes_and_thread_counts(recorded: tuple[Plan, Tensor]) -> None:
    plan, _ = recorded
    reference = plan.compile("reference")
    for threads in (1, 2, 4):
        runner = plan.compile("cpu", threads=threads)
        for shape in ((2, 3, 32, 32), (1, 3, 40, 64), (4, 3, 36, 32)):
            x = torch.randn(shape)
            expected = reference(x)
            strided = torch.randn(*shape[:3], 2 * shape[3])[..., ::2].copy_(x)
            for laid in (x, x.contiguous(memory_format=torch.channels_last), strided):
                assert plans.differing(expected, runner(laid)) == 0
    assert "softmax" in runner.report and runner.backend == "cpu"


@needs_library
def test_outputs_do_not_alias(recorded: tuple[Plan, Tensor]) -> None:
    plan, x = recorded
    runner = plan.compile("cpu")
    first = runner(x)
    kept = [t.clone() for t in first]
    runner(torch.randn_like(x))
    assert plans.differing(tuple(kept), first) == 0


@needs_library
def test_many_threads_share_a_runner(recorded: tuple[Plan, Tensor]) -> None:
    plan, _ = recorded
    runner, reference = plan.compile("cpu", threads=1), plan.compile("reference")
    inputs = [torch.randn(1 + i % 2, 3, 32, 32) for i in range(6)]
    expected = [reference(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            wrong.append(plans.differing(expected[i], runner(inputs[i])))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(wrong) == 30 and sum(wrong) == 0


@needs_library
def test_a_nan_is_an_error_of_its_own_call(recorded: tuple[Plan, Tensor]) -> None:
    plan, x = recorded
    runner = plan.compile("cpu")
    expected = runner(x)
    bad = x.clone()
    bad[-1, 0, 3, 5] = float("nan")
    with pytest.raises(PlanError, match="NaN"):
        runner(bad)
    assert plans.differing(expected, runner(x)) == 0


@needs_library
def test_inputs_that_do_not_fit(recorded: tuple[Plan, Tensor]) -> None:
    runner = recorded[0].compile("cpu")
    for wrong in (torch.zeros(1, 4, 32, 32), torch.zeros(1, 3, 32, 32).double(), torch.zeros(3, 32, 32)):
        with pytest.raises(PlanError):
            runner(wrong)
    with pytest.raises(PlanError, match="meta"):
        runner(torch.zeros(1, 3, 32, 32, device="meta"))


@needs_library
def test_a_call_after_one_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs are not looked at again; those of any other call are."""
    torch.manual_seed(0)
    made = plans.Maker(x=(2, 3, 12, 12))
    weight = torch.randint(-127, 128, (5, 3, 3, 3), dtype=torch.int8)
    geometry = Geometry(2, False, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    plan = made.plan(made.group(made.quantize(0, "int8"), geometry, weight, dtype=None))
    runner, reference = plan.compile("cpu"), plan.compile("reference")
    x = plans.integers((2, 3, 12, 12), "int8")
    expected, of_negative = reference(x), reference(-x)
    assert plans.differing(expected, runner(x)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_bind", None)
        assert plans.differing(of_negative, runner(-x)) == 0
        assert plans.differing(expected, runner(x.requires_grad_())) == 0
        assert not runner(x).requires_grad
    x = x.detach()
    for wrong in (x.double(), x[0], x.to("meta"), None):
        with pytest.raises(PlanError):
            runner(wrong)
    with pytest.raises(PlanError, match="takes x"):
        runner(x, x)
    with pytest.raises(PlanError, match="NaN"):
        runner(x / 0)
    for like in (x[:1], x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x):
        assert plans.differing(reference(like), runner(like)) == 0
    assert plans.differing(expected, runner(x=x)) == 0


@needs_library
def test_inputs_that_the_kernels_cannot_take_are_reported(recorded: tuple[Plan, Tensor]) -> None:
    plan, x = recorded
    runner = plan.compile("auto")
    runner(x)
    assert "meta" not in runner.report
    assert runner.native_for(torch.device("meta")) is None
    assert "inputs on meta: the reference" in runner.report


IN_A_FORKED_CHILD = """
import os, sys, torch, horizon_plugin_pytorch as horizon
torch.set_num_threads(2)
plan, x = horizon.plan.load(sys.argv[1]), torch.randn(1, 3, 32, 32)
expected = plan.compile("reference")(x)
before = plan.compile("cpu", threads=2)
before(x)
torch.randn(2**20).sum()  # PyTorch's threads have run
if os.fork() == 0:
    torch.set_num_threads(1)  # for what this program itself computes
    new = plan.compile("cpu", threads=2)
    differ = [not torch.equal(expected, runner(x)) for runner in (before, new)]
    os._exit(sum(differ))
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@needs_library
def test_runners_in_a_forked_child(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    horizon.plan.record(horizon.quantize(model, [x], progress=False), x).save(tmp_path / "plan.safetensors")
    command = [sys.executable, "-c", IN_A_FORKED_CHILD, str(tmp_path / "plan.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


IN_SPAWNED_CHILDREN = """
import sys
import torch
import horizon_plugin_pytorch as horizon

class Outputs(torch.utils.data.Dataset):
    \"\"\"What a runner makes of each input; the runner is this process's, or made by whoever first needs it.\"\"\"

    def __init__(self, runner, plan, inputs):
        self.runner, self.plan, self.inputs = runner, plan, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        if self.runner is None:
            self.runner = self.plan.compile("cpu", threads=1)
        return self.runner(self.inputs[i])

def main():
    plan = horizon.plan.load(sys.argv[1])
    inputs = torch.randn(6, 1, 3, 32, 32)
    expected = [plan.compile("reference")(x) for x in inputs]
    runner = plan.compile("cpu", threads=2)
    runner(inputs[0])
    for used in (runner, None):
        loader = torch.utils.data.DataLoader(
            Outputs(used, plan, inputs), batch_size=None, num_workers=2, multiprocessing_context="spawn"
        )
        differing = sum(int((y != e).sum()) for y, e in zip(loader, expected, strict=True))
        print(differing, "of", sum(e.numel() for e in expected))

if __name__ == "__main__":
    main()
"""


@needs_library
def test_runners_in_spawned_children(tmp_path: Path) -> None:
    """The workers of a DataLoader: one that is sent there, and one that is made there."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    horizon.plan.record(horizon.quantize(model, [x], progress=False), x).save(tmp_path / "plan.safetensors")
    (tmp_path / "program.py").write_text(IN_SPAWNED_CHILDREN)  # children import it, so it is a file
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "plan.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(Path(horizon.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.stdout.splitlines() == ["0 of 37632"] * 2, done.stderr


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_a_pickled_runner_is_compiled_as_it_was(recorded: tuple[Plan, Tensor], backend: str) -> None:
    if backend == "cpu" and library.why_not() is not None:
        pytest.skip("the CPU kernels were not built")
    plan, x = recorded
    runner = plan.compile(backend, threads=2)
    expected = runner(x)
    for copied in (pickle.loads(pickle.dumps(runner)), copy.deepcopy(runner)):
        assert copied.plan == plan and copied.threads == 2 and copied.report.startswith(runner.report.splitlines()[0])
        assert plans.differing(copied(x), expected) == 0


def test_a_pickled_runner_says_that_its_backend_is_not_there(
    recorded: tuple[Plan, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if library.why_not() is not None:
        pytest.skip("the CPU kernels were not built")
    pickled = pickle.dumps(recorded[0].compile("cpu"))
    monkeypatch.setattr(library, "why_not", lambda: "not built")
    with pytest.raises(PlanError, match="backend 'cpu' is not available: not built"):
        pickle.loads(pickled)


@needs_library
def test_packed_weights_are_shared_by_shapes(recorded: tuple[Plan, Tensor]) -> None:
    plan, x = recorded
    runner = plan.compile("cpu")
    runner(x)
    packed = runner._native.constants.bytes  # type: ignore[union-attr]
    runner(torch.randn(1, 3, 48, 48))
    assert runner._native.constants.bytes == packed  # type: ignore[union-attr]


def test_without_the_library_auto_says_so(recorded: tuple[Plan, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda: "not built")
    runner = recorded[0].compile("auto")
    assert runner.backend == "reference" and "not built" in runner.report
    with pytest.raises(PlanError, match="not built"):
        recorded[0].compile("cpu")


@needs_library
def test_isa_is_capped_by_the_environment() -> None:
    code = "from horizon_plugin_pytorch.backends.cpu import library as l; print(l.ISAS[l.best_isa()])"

    def run(cap: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HORIZON_MAX_CPU_ISA": cap, "PYTHONPATH": str(Path(horizon.__file__).parents[1])}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )

    assert run("portable").stdout.strip() == "portable"
    assert "there are: portable, avx2" in run("sse9").stderr


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    """Sizes and offsets of every field, and the numbers, as the C compiler has them."""
    header = Path(horizon.__file__).parents[2] / "csrc" / "horizon_cpu.h"
    compiler = next(
        (c for c in ("cc", "gcc", "clang") if subprocess.run(["which", c], capture_output=True).returncode == 0), None
    )
    if compiler is None or not header.exists():
        pytest.skip("needs a C compiler and a checkout")
    structures = {
        "hz_ref": library.Ref, "hz_view": library.View, "hz_epilogue": library.Epilogue, "hz_conv": library.Conv,
        "hz_plane": library.Plane,
        "hz_depthwise": library.Depthwise, "hz_zero": library.Zero, "hz_elementwise": library.Elementwise, "hz_pool": library.Pool,
        "hz_upsample": library.Upsample, "hz_interpolate": library.Interpolate, "hz_op": library.Op, "hz_band": library.Band,
        "hz_bands": library.Bands, "hz_program": library.Program,
    }  # fmt: skip
    lines, expected = [], []
    for name, structure in structures.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(structure))
        for field in structure._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field[0].rstrip("_")}));')
            expected.append(getattr(structure, field[0]).offset)
    for name in ("ABI", "SLACK", "CHANNELS", "DIMS", "WINOGRAD", "WORDS"):
        lines.append(f'printf("%d\\n", HZ_{name});')
        expected.append(getattr(library, name))
    source = tmp_path / "sizes.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\nint main(void) {{ {"".join(lines)} }}\n'
    )
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "sizes")], check=True)
    printed = subprocess.run([str(tmp_path / "sizes")], capture_output=True, text=True, check=True).stdout
    assert [int(n) for n in printed.split()] == expected


NOT_PLANS = {
    "view_in_place_and_other_readers_before", "flag_as_an_argument", "module_that_cannot_be_traced", "control_flow", "assignment_to_a_part",
    "tuple_as_input",
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", PROGRAMS)
def test_forwards_written_in_many_ways_equal_the_reference(name: str) -> None:
    kind, item, _ = PROGRAMS[name]
    torch.manual_seed(0)
    int8 = horizon.quantize(kind().eval(), [item], improve=False, progress=False)
    try:
        plan = horizon.plan.record(int8, item)
    except PlanError:
        assert name in NOT_PLANS
        return
    assert name not in NOT_PLANS
    inputs = [x for x in tree_leaves(item) if isinstance(x, Tensor)]
    expected, got = (plan.compile(backend)(*inputs) for backend in ("reference", "cpu"))
    assert plans.differing(expected, got) == 0
