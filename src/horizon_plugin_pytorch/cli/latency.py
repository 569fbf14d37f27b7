"""Latencies and tensors as lines and tables of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from horizon_plugin_pytorch.plan.profile import StepTime


def latency_table(times: Mapping[str, Sequence[float]]) -> Table:
    """A row per candidate; the ratio is to the first, of medians."""
    table = Table("", *("median, ms", "p10", "p90", "ratio"), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    first = float(np.median(next(iter(times.values()))))
    for name, seconds in times.items():
        low, middle, high = np.percentile(seconds, (10, 50, 90))
        table.add_row(name, *(f"{t * 1e3:.3f}" for t in (middle, low, high)), f"{middle / first:.2f}")
    return table


def step_table(steps: list[StepTime], most: int) -> Table:
    """The steps that take longest, in the order of the plan."""
    total = sum(s.seconds for s in steps) or 1.0
    chosen = sorted(sorted(range(len(steps)), key=lambda i: -steps[i].seconds)[:most])
    table = Table("step", "name", "what", "output", "by", "ms", "share", box=None)
    for column in (table.columns[0], *table.columns[5:]):
        column.justify = "right"
    for i in chosen:
        s = steps[i]
        what = s.step.target or s.step.params.get("name", s.step.kind)
        shape = f"{s.result.dtype} {'×'.join(map(str, s.result.shape))}"
        by = "kernels" if s.native else "PyTorch"
        table.add_row(str(i), s.step.name, what, shape, by, f"{s.seconds * 1e3:.3f}", f"{s.seconds / total:.1%}")
    return table


def output_table(outputs: Any) -> Table:
    """A row per tensor among the outputs: where it stands, what it is, and a few statistics."""
    table = Table("output", "shape", "dtype", "min", "mean", "max", "std", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    for path, tensor in torch.utils._pytree.tree_flatten_with_path(outputs)[0]:
        if not isinstance(tensor, Tensor):
            continue
        name = torch.utils._pytree.keystr(path) or "output"
        x = tensor.detach().double()
        numbers = (x.min(), x.mean(), x.max(), x.std(correction=0)) if x.numel() else ()
        shape = "×".join(map(str, tensor.shape))
        table.add_row(name, shape, str(tensor.dtype).removeprefix("torch."), *(f"{float(n):.5g}" for n in numbers))
    return table
