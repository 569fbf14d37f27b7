"""What a quantization-aware training step costs, beside the float step and PyTorch's own eager QAT.

ResNet-18 with its batch norms kept: forward, cross entropy, backward, SGD with momentum. The networks take turns, so that
what else the machine does meets all of them, and each round gives one ratio; medians are reported. Memory is measured in
a process per network.

    python benchmarks/qat_step.py                          # batch 16, 224x224; about ten minutes on two cores
    python benchmarks/qat_step.py --batch 4 --rounds 5     # a quick look
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "qat-step.md"
CLASSES = 1000

app = typer.Typer(add_completion=False, rich_markup_mode=None)


# -- the networks ------------------------------------------------------------------------------------------------------


def floating(inputs: Any) -> Any:
    """The float network."""
    from torchvision.models import resnet18

    return resnet18()


def ours(inputs: Any) -> Any:
    """``prepare_qat_fx``, batch norms kept in the fused groups."""
    from horizon_plugin_pytorch.qat_mode import QATMode, get_qat_mode, set_qat_mode
    from horizon_plugin_pytorch.quantization import FakeQuantState, prepare_qat_fx, set_fake_quantize

    before = get_qat_mode()
    set_qat_mode(QATMode.WithBN)
    model = prepare_qat_fx(floating(inputs), example_inputs=inputs)
    set_qat_mode(before)
    set_fake_quantize(model, FakeQuantState.QAT)
    return model


def torch_ao(inputs: Any) -> Any:
    """torch.ao's eager QAT of torchvision's quantizable ResNet-18, with the default qconfig for x86."""
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
    from torchvision.models.quantization import resnet18

    model = resnet18(quantize=False).train()
    model.fuse_model(is_qat=True)
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model)


NETWORKS: dict[str, Callable[[Any], Any]] = {"float": floating, "ours": ours, "torch.ao, eager": torch_ao}


@dataclass
class Setting:
    """What is measured."""

    batch: int
    size: int
    threads: int
    channels_last: bool = True


class Training:
    """A network in training, its data and its optimizer."""

    def __init__(self, name: str, setting: Setting) -> None:
        import torch

        torch.manual_seed(0)
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.inputs = torch.randn(setting.batch, 3, setting.size, setting.size).to(memory_format=layout)
        self.labels = torch.randint(CLASSES, (setting.batch,))
        self.model = NETWORKS[name](self.inputs).to(memory_format=layout).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)

    def loss(self) -> Any:
        return __import__("torch").nn.functional.cross_entropy(self.model(self.inputs), self.labels)

    def step(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


# -- time --------------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Medians over all rounds."""

    seconds: float  # wall clock
    ratio: float  # of each round's seconds to those of the float step in the same round
    cpu_ratio: float  # the same of processor seconds, of all threads


def measure_times(setting: Setting, rounds: int) -> dict[str, Times]:
    """Every network takes one step per round; one more round before is not counted."""
    trainings = {name: Training(name, setting) for name in NETWORKS}
    wall: dict[str, list[float]] = {name: [] for name in NETWORKS}
    cpu: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for counted in [False, *[True] * rounds]:
        for name, training in trainings.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            training.step()
            if counted:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)

    def ratio(of: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(of[name], of["float"], strict=True))

    return {name: Times(statistics.median(wall[name]), ratio(wall, name), ratio(cpu, name)) for name in NETWORKS}


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """MiB."""

    peak: float  # the process's largest resident set while training, less what it had after importing PyTorch
    kept: float  # tensors that the forward keeps for the backward, apart from parameters


def resident() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure_memory(name: str, setting: Setting) -> Memory:
    """In a process of its own."""
    import torch

    warm_up()
    before = resident()
    training = Training(name, setting)
    for _ in range(3):
        training.step()
    peak = resident() - before

    owned = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.loss()
    del loss
    return Memory(peak, sum(kept.values()) / 2**20)


def warm_up() -> None:
    """Import everything and let the convolution library start, so that this is in no network's figure."""
    import torch
    import torchvision.models.quantization  # noqa: F401

    import horizon_plugin_pytorch.quantization.prepare  # noqa: F401

    conv = torch.nn.Conv2d(3, 4, 3)
    conv(torch.randn(1, 3, 8, 8)).sum().backward()


# -- commands ----------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True, help=__doc__)
def everything(
    context: typer.Context,
    batch: Annotated[int, typer.Option(help="images per step")] = 16,
    size: Annotated[int, typer.Option(help="height and width")] = 224,
    rounds: Annotated[int, typer.Option(help="steps of each network that count")] = 10,
    threads: Annotated[int | None, typer.Option(help="of PyTorch; its own choice by default")] = None,
    output: Annotated[Path | None, typer.Option(help="where the table goes")] = TABLE,
) -> None:
    if context.invoked_subcommand is not None:
        return
    import torch

    warnings.simplefilter("ignore")
    if threads is not None:
        torch.set_num_threads(threads)
    setting = Setting(batch, size, torch.get_num_threads())
    load = os.getloadavg()[0]
    memory = {name: _in_process(name, setting) for name in NETWORKS}
    times = measure_times(setting, rounds)
    text = table(setting, rounds, times, memory, load)
    print(text)
    if output is not None:
        output.write_text(text)


def _in_process(name: str, setting: Setting) -> Memory:
    command = [sys.executable, __file__, "memory", name, json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


@app.command()
def memory(name: str, setting: str) -> None:
    """Measure one network's memory in this process and print it as JSON."""
    import torch

    warnings.simplefilter("ignore")
    parsed = Setting(**json.loads(setting))
    torch.set_num_threads(parsed.threads)
    print(json.dumps(asdict(measure_memory(name, parsed))))


def table(setting: Setting, rounds: int, times: dict[str, Times], memory: dict[str, Memory], load: float) -> str:
    import torch

    base = memory["float"]
    rows = [
        f"| {name} | {t.seconds:.2f} s | {t.ratio:.2f} | {t.cpu_ratio:.2f} | {m.peak:.0f} MiB | {m.peak / base.peak:.2f} "
        f"| {m.kept:.0f} MiB | {m.kept / base.kept:.2f} |"
        for name, t, m in ((name, times[name], memory[name]) for name in NETWORKS)
    ]
    return f"""# What a training step costs

Made by `benchmarks/qat_step.py`. ResNet-18 with its batch norms kept, batch {setting.batch}, {setting.size}x{setting.size},
channels last: forward, cross entropy, backward, SGD with momentum, on the CPU with {setting.threads} threads
({platform.machine()}, PyTorch {torch.__version__}).

| network | step | × float | processor time, × float | peak memory | × float | kept for backward | × float |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

Times are medians of {rounds} rounds in which the networks took turns; ratios are medians of each round's ratio. When
it started, the machine's load average was {load:.1f} on {os.cpu_count()} processors; where that is not near 0, other programs ran meanwhile:
compare ratios, not seconds. Peak memory is the largest resident set of a process that trains, less what it had before the
network was made, so it holds weights, gradients and momentum, too. Kept for backward are the tensors that the forward
saves, without parameters.
"""


if __name__ == "__main__":
    app()
