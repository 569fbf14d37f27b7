"""Large batches in parts that stay in the cache: whether a plan may be cut so, and which way of cutting is the fastest.

Where every step computes each image for itself, a program for n images runs N / n times. Threads either share each operation, or take
whole parts, each with an arena of its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.native.shapes import call_of
from horizon_plugin_pytorch.plan.program import Plan, PlanError, Step, refs

_PARTS = (1, 4)
_MOST_RUNS, _LEAST_SECONDS = 3, 0.1  # of one way to cut a batch
_KEEP_FIRST = frozenset(
    "relu dropout dropout1d dropout2d dropout3d contiguous clone detach pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
_ROW_MAJOR = frozenset("flatten view reshape".split())


class Split(NamedTuple):
    """`images`: how many at a time; `apart`: each thread takes parts of its own."""

    images: int
    apart: bool


def tail(plan: Plan, metas: Sequence[Any]) -> set[int]:
    """The functions from floats to floats that can wait until everything else is done, and then run on whole batches.

    Nothing but others of them reads their results, and nothing else reads their operands afterwards, which they may change in place.
    """
    inputs = len(plan.inputs)
    used = [{r.value for r in refs((step.args, step.kwargs, step.params))} for step in plan.steps]
    functions = {i for i, step in enumerate(plan.steps) if step.kind == "function"}
    found = {i for i in functions if all(_is_float(metas[n]) for n in (*used[i], inputs + i))}
    while True:
        others = [i for i in range(len(plan.steps)) if i not in found]
        last = {n: i for i in others for n in used[i]}  # who else reads a value last
        made = {inputs + i for i in functions - found}  # these may share memory with what they read
        gone = {i for i in found if inputs + i in last or used[i] & made or any(last.get(n, -1) > i for n in used[i])}
        if not gone:
            return found
        found -= gone


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, QTensor)


def separable(plan: Plan, metas: Sequence[Any], images: int) -> bool:
    """Whether every image of a batch, dimension 0 of all tensors, is computed by itself, but for the `tail`.

    Args:
        metas: the plan's values for a batch of `images`, from `shapes.infer`.
    """
    if not plan.inputs or any(x.dim() < 2 for x in metas[: len(plan.inputs)]):
        return False
    last = tail(plan, metas)
    rest = [i for i in range(len(plan.steps)) if i not in last]
    for value in (*metas[: len(plan.inputs)], *(metas[len(plan.inputs) + i] for i in rest)):
        if any(leaf.dim() < 1 or leaf.shape[0] != images for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
            return False
    floats_out = all(_is_float(metas[r.value]) for r in refs(plan.outputs))
    return floats_out and all(_each_by_itself(plan, i, plan.steps[i], metas) for i in rest)


def _each_by_itself(plan: Plan, i: int, step: Step, metas: Sequence[Any]) -> bool:
    result = metas[len(plan.inputs) + i]
    operands = [metas[r.value] for r in refs((step.args, step.kwargs))]
    if not isinstance(result, Tensor):  # sizes; those that are constants are found out when parts are lowered
        return step.target in (
            "attribute",
            "method.size",
            "operator.getitem",
            "operator.floordiv",
            "operator.mul",
            "operator.add",
        )
    if step.kind == "group":
        dims = step.params["geometry"]["dims"]
        return result.dim() == dims + 2 if dims else result.dim() >= 2
    if step.kind == "operator":
        options = step.params["options"]
        same_rank = all(x.dim() == result.dim() for x in operands)
        return {
            "Add": lambda: same_rank,
            "Mul": lambda: same_rank,
            "Cat": lambda: options["dim"] % result.dim() != 0,
            "Mean": lambda: all(d % operands[0].dim() for d in options["dim"]),
        }.get(step.params["name"], lambda: result.dim() == options["dims"] + 2)()
    if step.kind != "function":
        return True
    name = step.target.rpartition(".")[2]
    if name in _ROW_MAJOR:
        return True  # both have the batch first, and the order of elements stays
    if call_of(step.target, step.args, step.kwargs) is not None:
        return result.dim() >= 3 and (name == "interpolate" or result.dim() == int(name[-2]) + 2)
    if name == "cat":
        dim = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
        return isinstance(dim, int) and dim % result.dim() != 0
    return name in _KEEP_FIRST and isinstance(operands[0], Tensor)


def splits(images: int, threads: int) -> list[Split]:
    """Ways to cut a batch that are worth a measurement, in the order they are tried; the last is not to."""
    found = []
    for n in _PARTS:
        if images % n == 0 and images > n:
            if images // n >= threads > 1:
                found.append(Split(n, True))
            if threads == 1 or n > 1 or images // n % threads:  # parts that do not come out even leave threads waiting
                found.append(Split(n, False))
    return [*found, Split(images, False)]


def choose(candidates: Sequence[Split], seconds: Callable[[Split], float], until: float) -> Split:
    """The split that takes the fewest `seconds`, or the last if none can be measured; no new one is tried after `until`."""
    best: tuple[float, Split] | None = None
    for split in candidates:
        if best is not None and time.monotonic() > until:
            break
        try:
            taken = seconds(split)
        except PlanError:  # a size that the model has as a constant, a step in PyTorch that does not take any data
            continue
        if best is None or taken < best[0]:
            best = taken, split
    return candidates[-1] if best is None else best[1]


def random_like(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Data to measure on: what a caller brings may be NaN, or all alike."""
    return [torch.randn_like(x) if x.is_floating_point() else x for x in inputs]


def seconds(program: Callable[[Sequence[Tensor], int], Any], inputs: Sequence[Tensor], threads: int) -> float:
    """The fastest of a few runs on data like `inputs`: the first ones of a program touch memory for the first time."""
    data = random_like(inputs)
    program(data, threads)
    taken: list[float] = []
    while len(taken) < _MOST_RUNS and sum(taken) < _LEAST_SECONDS:
        start = time.perf_counter()
        program(data, threads)
        taken.append(time.perf_counter() - start)
    return min(taken)


def key(plan: Plan, isa: str, threads: int, inputs: Sequence[Tensor]) -> str:
    """Of a plan with these inputs, for the file of measurements."""
    shapes = [(tuple(x.shape), x.stride()) for x in inputs]
    steps = [(s.kind, s.name, str(s.params.get("geometry"))) for s in plan.steps]
    digest = hashlib.sha256(repr((steps, plan.int8_bytes, shapes)).encode()).hexdigest()[:32]
    return f"{isa} {threads} {digest}"
