"""How long each step of a plan takes, where it stands among the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.plan.program import Step, Value
from horizon_plugin_pytorch.plan.runner import Runner, _plain_layout, _threads
from horizon_plugin_pytorch.plan.steps import run_step


@dataclass(frozen=True)
class StepTime:
    """One step of a plan and the seconds it takes, the median of several runs.

    Attributes:
        native: whether the backend's own kernels run it; otherwise PyTorch does.
    """

    step: Step
    result: Value
    seconds: float
    native: bool


def profile(runner: Runner, *inputs: Tensor, repeats: int = 10) -> list[StepTime]:
    """Run `runner` on `inputs` and time every step of its plan.

    A step that costs nothing by itself (a view, or one that its neighbour's kernel does in passing) has 0 seconds. Kernels are timed one
    after the other with a wait behind each, so that the sum is a little more than a run takes.

    Raises:
        PlanError: the inputs do not fit the plan.
        ValueError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    runner(*inputs)  # what is made once is made now
    inputs = tuple(map(_plain_layout, inputs))
    native = runner.native_for(inputs[0].device) if inputs else None
    with _threads(runner.threads):  # as a call has it
        runs = [_reference(runner, inputs) if native is None else _native(runner, inputs) for _ in range(repeats)]
    plan = runner.plan
    return [
        StepTime(step, plan.result(i), median(seconds[i] for seconds, _ in runs), i in runs[0][1])
        for i, step in enumerate(plan.steps)
    ]


Run = tuple[list[float], set[int]]
"""Seconds of each step, and the steps that kernels of the backend run."""


def _reference(runner: Runner, inputs: Sequence[Tensor]) -> Run:
    values: list[Any] = list(inputs)
    constants = runner._on(inputs[0].device) if inputs else runner.plan.constants
    seconds = []
    with torch.no_grad():
        for step in runner.plan.steps:
            start = time.perf_counter()
            values.append(run_step(step, values.__getitem__, constants))
            seconds.append(time.perf_counter() - start)
    return seconds, set()


def _native(runner: Runner, inputs: Sequence[Tensor]) -> Run:
    assert runner._native is not None
    with torch.no_grad():
        threads = runner.threads or torch.get_num_threads()
        program = runner._native.program(list(inputs), threads)
        seconds = program.profile(list(inputs), threads)
    return seconds, set(range(len(seconds))) - set(program.steps_in_torch)
