"""From a plan to the program that measures fastest: how a batch is cut, and which chains run depth first.

What was measured is in the tuner's file; a wrong or stale entry costs time and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.plan.native import bands, batches, tuning
from horizon_plugin_pytorch.plan.native.batches import Split
from horizon_plugin_pytorch.plan.native.constants import Constants
from horizon_plugin_pytorch.plan.native.execution import NativeProgram
from horizon_plugin_pytorch.plan.native.lowering import Depth
from horizon_plugin_pytorch.plan.native.shapes import infer
from horizon_plugin_pytorch.plan.native.tuning import Tuner
from horizon_plugin_pytorch.plan.program import Plan, PlanError

_DEPTHS = (0, *bands.SIZES)
_SPLITTING, _DEEPENING = 0.5, 0.8
"""Shares of the time after which these choices find the kernels that have not been measured as they usually are."""
_MOST_RUNS, _LEAST_SECONDS = 8, 0.3
_WORTH = {"amx": 1.04, "avx512_vnni": 1.04}
"""Depth first is taken where it is slower by less: it needs less memory, and suffers less from what runs beside it. Slower kernels do not
wait for memory."""
_CACHES = 48 << 20
"""Bytes that push everything else out of the caches."""


def compile_for(
    plan: Plan, constants: Constants, inputs: Sequence[Tensor], isa: int, threads: int, cache: tuning.Cache
) -> NativeProgram:
    """The program for inputs of this shape and layout that measures fastest, as far as measurements go in their time."""
    start = time.monotonic()
    key = batches.key(plan, library.ISAS[isa], threads, inputs)
    images = inputs[0].shape[0] if inputs and inputs[0].dim() else 1

    def first(some: int) -> Sequence[Tensor]:
        return inputs if some == images else [x[:some] for x in inputs]

    def build(split: Split, share: float, some: int = images, depth: Depth = ()) -> NativeProgram:
        """For the first images; kernels are measured as long as less than this share of the time is spent."""
        tuner = Tuner(isa, 1 if split.apart else threads, cache, start + share * tuning.BUDGET)
        return NativeProgram(plan, constants, first(some), isa, tuner, split, threads, depth)

    candidates = batches.splits(images, threads)
    if len(candidates) > 1 and not batches.separable(
        plan, infer(plan, [(tuple(x.shape), x.dtype) for x in inputs]), images
    ):
        candidates = candidates[-1:]
    known = cache.get(f"batch {key}", (images + 1, 2))
    split = candidates[-1] if known is None else Split(known[0], bool(known[1]))
    if len(candidates) > 1 and (known is None or split not in candidates):

        def seconds(split: Split) -> float:
            some = min(images, split.images * (threads if split.apart else 1))
            share = _SPLITTING * (candidates.index(split) + 1) / len(candidates)
            rounds = -(-images // some)  # in the last one some threads may have nothing to do
            return batches.seconds(build(split, share, some), first(some), threads) * rounds

        split = batches.choose(candidates, seconds, start + tuning.BUDGET)
        cache.put(f"batch {key}", (split.images, int(split.apart)))

    key = f"depth {split.images} {int(split.apart)} {key}"
    depth = cache.get(key, len(_DEPTHS))
    if depth is None:
        threads_of_part = 1 if split.apart else threads
        depth = _depths(
            lambda depth: build(split, _DEEPENING, split.images, depth), first(split.images), threads_of_part
        )
        cache.put(key, depth)
    program = build(split, 1, depth=[_DEPTHS[n] for n in depth])
    cache.write()
    return program


def _depths(build: Callable[[Depth], NativeProgram], inputs: Sequence[Tensor], threads: int) -> list[int]:
    """For each chain the number in `_DEPTHS` with which it is the fastest, each step timed where it stands in a run.

    A run right after another finds its values in the caches, one after other work does not: what counts is the sum of both.
    """
    flat = build(())
    chains = flat.lowered.chains
    large = [c for c in chains if c.bytes > bands.SIZES[0]]  # what fits in a cache as a whole gains nothing
    if not large:
        return [0] * len(chains)
    programs = [flat, *(build([size if c in large else 0 for c in chains]) for size in bands.SIZES)]
    steps = len(flat.plan.steps)
    best = [[[float("inf")] * steps for _ in ("cold", "warm")] for _ in programs]
    data, other = batches.random_like(inputs), torch.empty(_CACHES, dtype=torch.uint8)
    until = time.monotonic() + _LEAST_SECONDS
    try:
        with torch.no_grad():
            for turn in range(_MOST_RUNS):
                for program, runs in zip(programs, best, strict=True):
                    tuning.work_elsewhere(other, threads)
                    runs[:] = [list(map(min, seconds, program.profile(data, threads))) for seconds in runs]
                if turn and time.monotonic() > until:
                    break
    except PlanError:  # a step in PyTorch that does not take any data: nothing can be measured
        return [0] * len(chains)

    worth = _WORTH.get(library.ISAS[flat.isa], 1)

    def seconds(chain: bands.Chain, n: int) -> float:
        return sum(run[i] for run in best[n] for i in chain.steps) * (worth if n == 0 else 1)

    return [min(range(len(programs)), key=lambda n: seconds(c, n)) if c in large else 0 for c in chains]
