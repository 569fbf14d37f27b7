"""Plans: what is recorded runs as the model does, saves, loads, and refuses what is not valid."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.plan import Plan, PlanError, load, record
from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub, calibrate, convert, fuse_modules, prepare_qat


class Net(nn.Module):
    """Every kind of step: groups with residual and ReLU6, transposed, linear, operators, a table, moves and float functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU())
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.stem(x)
        x = torch.relu(self.point(self.depthwise(nn.functional.hardswish(x))) + x)
        x = self.norm(x) * 0.5
        up = nn.functional.max_pool2d(self.up(x), 2)
        both = torch.cat([x, up], 1)
        large = nn.functional.interpolate(both, size=(both.shape[-2] * 2, both.shape[-1] * 2), mode="bilinear")
        return self.fc(both.mean((2, 3))).view(x.size(0), -1), {"map": large}


def network() -> tuple[nn.Module, Tensor]:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 16, 16)
    return horizon.quantize(model.eval(), [x], progress=False), x


@pytest.fixture(scope="module")
def recorded() -> tuple[nn.Module, Tensor, Plan]:
    torch.manual_seed(0)
    model, x = network()
    return model, x, record(model, x)


def differing(a: object, b: object) -> int:
    leaves = torch.utils._pytree.tree_leaves
    return sum(int((p != q).sum()) for p, q in zip(leaves(a), leaves(b), strict=True))


def test_the_plan_equals_the_model_at_other_sizes(recorded: tuple[nn.Module, Tensor, Plan]) -> None:
    model, x, plan = recorded
    runner = plan.compile()
    for shape in (x.shape, (1, 3, 16, 16), (3, 3, 24, 40)):
        y = torch.randn(shape)
        with torch.no_grad():
            assert differing(runner(y), model(y)) == 0
            assert differing(runner(x=y), model(y)) == 0


def test_a_model_fused_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = QuantStub(1 / 128), DeQuantStub()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.skip, self.join = (horizon.nn.quantized.FloatFunctional() for _ in range(2))
            self.relu, self.out = nn.ReLU(), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            y = self.relu(self.skip.add(x, self.bn(self.conv(x))))
            return self.dequant(self.out(self.join.cat([x, y], 1)))

    x = torch.randn(2, 3, 6, 6)
    model = calibrate(prepare_qat(fuse_modules(Named().eval(), ["conv", "bn", "skip", "relu"])), [x], progress=False)
    int8 = convert(model)
    plan = record(int8, x)
    assert differing(plan.compile()(x), int8(x)) == 0
    assert [s.kind for s in plan.steps] == ["quantize", "group", "operator", "group"]


def test_save_and_load(recorded: tuple[nn.Module, Tensor, Plan], tmp_path: Path) -> None:
    _, x, plan = recorded
    plan.save(tmp_path / "net.plan")
    again = load(tmp_path / "net.plan")
    assert again == plan
    assert differing(again.compile()(x), plan.compile()(x)) == 0
    assert again.summary() == plan.summary()
    assert [p.name for p in tmp_path.iterdir()] == ["net.plan"]
    other = copy.deepcopy(plan)
    name = next(n for n in other.constants if n.endswith(".weight"))
    other.constants[name] = other.constants[name] + 1
    assert other != plan


def test_threads_share_a_runner(recorded: tuple[nn.Module, Tensor, Plan]) -> None:
    _, _, plan = recorded
    runner = plan.compile()
    inputs = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    expected = [runner(x) for x in inputs]
    results: list[object] = [None] * len(inputs)

    def work(i: int) -> None:
        results[i] = runner(inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert differing(results, expected) == 0


@pytest.mark.parametrize(
    "wrong",
    [(), (torch.zeros(1, 3, 16, 16),) * 2, (torch.zeros(3, 16, 16),), (torch.zeros(1, 3, 16, 16).double(),), ("x",)],
    ids=["nothing", "two", "rank", "dtype", "text"],
)
def test_wrong_calls(recorded: tuple[nn.Module, Tensor, Plan], wrong: tuple[object, ...]) -> None:
    with pytest.raises(PlanError, match="x|takes"):
        recorded[2].compile()(*wrong)


def test_unknown_backend(recorded: tuple[nn.Module, Tensor, Plan]) -> None:
    with pytest.raises(PlanError, match="reference"):
        recorded[2].compile("tpu")


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(PlanError, match="convert it first"):
        record(Net().eval(), torch.zeros(1, 3, 8, 8))
    model, x = network()
    with pytest.raises(PlanError, match="training mode"):
        record(copy.deepcopy(model).train(), x)


def test_stochastic_depth_as_a_function_hands_its_input_on() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + stochastic_depth(self.conv(x), 0.5, "row", self.training)

    x = torch.randn(2, 3, 8, 8)
    model = horizon.quantize(Deep().eval(), [x], progress=False)
    plan = record(model, x)
    assert not any("stochastic" in step.name for step in plan.steps)
    y = torch.randn(2, 3, 8, 8)
    assert torch.equal(plan.compile("reference")(y), model(y))


def rewrite(source: Path, target: Path, change: object) -> None:
    """Write the plan at `source` to `target` with its program changed."""
    with safe_open(source, "pt") as file:
        program = json.loads(file.metadata()["plan"])
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(program, tensors)  # type: ignore[operator]
    save_file(tensors, target, metadata={"plan": json.dumps(program)})


def first(program: dict, kind: str) -> list:
    return next(s for s in program["steps"] if s[0] == kind)


EDITS = {
    "format": lambda p, t: p.update(format=99),
    "no steps": lambda p, t: p.pop("steps"),
    "fewer steps": lambda p, t: p["steps"].pop(),
    "unknown kind": lambda p, t: first(p, "group").__setitem__(0, "eval"),
    "forbidden function": lambda p, t: first(p, "function").__setitem__(2, "torch.load"),
    "a method outside the list": lambda p, t: first(p, "function").__setitem__(2, "method.numpy"),
    "dunder": lambda p, t: first(p, "function").__setitem__(2, "method.__class__"),
    "value of the future": lambda p, t: first(p, "group").__setitem__(3, {"$tuple": [{"$value": 10**6}]}),
    "negative value": lambda p, t: first(p, "group").__setitem__(3, {"$tuple": [{"$value": -1}]}),
    "missing constant": lambda p, t: t.pop(next(n for n in t if n.endswith(".weight"))),
    "weight dtype": lambda p, t: t.update({n: v.float() for n, v in t.items() if n.endswith(".weight")}),
    "bias shape": lambda p, t: t.update({n: v[:1].clone() for n, v in t.items() if n.endswith(".bias")}),
    "zero scale": lambda p, t: t.update({n: v * 0 for n, v in t.items() if n.endswith(".scale")}),
    "short table": lambda p, t: t.update({n: v[:5].clone() for n, v in t.items() if n.endswith(".table")}),
    "geometry": lambda p, t: first(p, "group")[5]["$dict"]["geometry"]["$dict"].update(groups=0),
    "extra parameter": lambda p, t: first(p, "group")[5]["$dict"].update(hook="os.system"),
    "unknown object": lambda p, t: first(p, "group").__setitem__(3, {"$pickle": "gASVAAAA"}),
    "deep nesting": lambda p, t: first(p, "function").__setitem__(3, json.loads("[" * 200 + "]" * 200)),
    "sizes": lambda p, t: p["values"][0].__setitem__(2, [-1, "x"]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_files_are_refused(recorded: tuple[nn.Module, Tensor, Plan], tmp_path: Path, edit: str) -> None:
    recorded[2].save(tmp_path / "good")
    rewrite(tmp_path / "good", tmp_path / "bad", EDITS[edit])
    with pytest.raises(PlanError):
        load(tmp_path / "bad")


def test_damaged_files_are_refused(recorded: tuple[nn.Module, Tensor, Plan], tmp_path: Path) -> None:
    """Truncations and random bytes in the header: an error or, where nothing that counts was hit, the same plan."""
    plan = recorded[2]
    plan.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    rng = random.Random(0)
    header = int.from_bytes(data[:8], "little")
    bad = tmp_path / "bad"
    for i in range(60):
        if i < 20:
            bad.write_bytes(data[: rng.randrange(len(data))])
        else:
            broken = bytearray(data)
            for _ in range(3):
                broken[rng.randrange(8 + header)] = rng.randrange(256)
            bad.write_bytes(bytes(broken))
        try:
            loaded = load(bad)
        except PlanError:
            continue
        assert i >= 20 and isinstance(loaded, Plan)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_plans_are_plain_data(recorded: tuple[nn.Module, Tensor, Plan]) -> None:
    plan = recorded[2]
    assert copy.deepcopy(plan) == plan
    assert dataclasses.replace(plan, model="other") != plan
    lines = plan.summary().splitlines()
    assert len(lines) == len(plan.steps) + len(plan.inputs) + 2
