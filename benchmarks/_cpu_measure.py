"""How benchmarks/cpu.py measures: peak memory, equality, and what the processor can do at most.

Imports nothing but PyTorch and this package.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.plan import Plan
from horizon_plugin_pytorch.utils.timing import take_turns

Forward = Callable[[], Any]
TURN_SECONDS = 0.05


def tensors(y: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, Tensor)]


def differing(a: Any, b: Any) -> int:
    """Elements of the outputs that are not the same number."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert pairs and all(p.shape == q.shape and p.dtype == q.dtype for p, q in pairs)
    return sum(int((p != q).sum()) for p, q in pairs)


# -- what the network asks for, and what the processor gives ------------------------------------------------------------


def operations(plan: Plan, batch: int) -> int:
    """Multiplications and additions of the fused groups, for `batch` times the recorded input of one image."""
    total = 0
    for i, step in enumerate(plan.steps):
        if step.kind == "group":
            weight = plan.constants[step.params["weight"].name]
            transposed = step.params["geometry"]["transposed"]
            shape = plan.values[step.args[0].value].shape if transposed else plan.result(i).shape
            total += 2 * prod(shape) * prod(weight.shape[1:])
    return total * batch


def least_bytes(plan: Plan, batch: int) -> int:
    """Bytes that have to come from memory or go there at least: weights, inputs, outputs."""
    outside = [v for v in plan.values[: len(plan.inputs)]]
    outside += [plan.values[r.value] for r in torch.utils._pytree.tree_leaves(plan.outputs) if hasattr(r, "value")]
    return plan.int8_bytes + batch * sum(prod(v.shape) * 4 for v in outside)


def ceiling(threads: int, rounds: int) -> dict[str, float]:
    """Operations per second of our own 3x3 convolution, 256 to 256 channels, 56x56, on random data, and bytes per second of a copy.

    The convolution's time is the difference between chains of five and of one, so that quantizing the input does not count.
    """
    size, channels, longer = 56, 256, 5
    x = torch.randn(1, channels, size, size)
    runners: dict[str, Forward] = {}
    for length in (1, longer):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(length)]
        # the last layer's output is float32; it is a narrow one
        model = nn.Sequential(*layers, nn.Conv2d(channels, 8, 1)).eval()
        int8 = horizon.quantize(model, [x], improve=False, progress=False)
        runner = horizon.plan.record(int8, x).compile("cpu", threads)
        runners[str(length)] = lambda runner=runner: runner(x)  # type: ignore[misc]
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    runners["copy"] = lambda: target.copy_(source)
    times = take_turns(runners, rounds, TURN_SECONDS)
    each = min(b - a for a, b in zip(times["1"], times[str(longer)], strict=True)) / (longer - 1)
    return {
        "operations": 2 * size**2 * channels**2 * 9 / each,
        "bytes": 2 * source.numel() * 4 / min(times["copy"]),
    }


# -- memory ---------------------------------------------------------------------------------------------------------------


def peak_memory(build: Callable[[], Forward]) -> dict[str, float]:
    """MB of resident memory over what there was before: the peak while building, and the peak of forwards after that."""
    before = _status("VmRSS")
    _reset_peak()
    forward = build()
    forward()
    building = _status("VmHWM")
    _reset_peak()
    for _ in range(3):
        forward()
    return {"building": (building - before) / 1e3, "running": (_status("VmHWM") - before) / 1e3}


def _status(field: str) -> int:
    """kB of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# -- the machine ----------------------------------------------------------------------------------------------------------


def pin(threads: int) -> list[int]:
    """Restrict this process to `threads` cores, of different physical cores where there are as many; before any pool starts."""
    allowed = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(path.read_text() if path.exists() else str(cpu), cpu)
    distinct = list(first.values())
    chosen = (distinct + [c for c in allowed if c not in distinct])[:threads]
    if len(chosen) < threads:
        raise SystemExit(f"{threads} threads need as many processors; this process may use {len(allowed)}")
    os.sched_setaffinity(0, chosen)
    return chosen


def machine() -> str:
    """The processor's name and the instructions that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    flags = facts.get("flags", "").split()
    known = [f for f in ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(known)})"
