"""Whether a network is fused as it should be: its outputs, its original, and what was fused against the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import oracle, zoo

# Largest relative difference of an output. In float32 a deep random network amplifies rounding: only one that cannot
# run in float64 is compared so.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


# Networks with modules that do not call their parts but hand them on, to an autograd.Function for example, which may do
# anything with them: parts that stay as they are. Pairs inside that running the network shows to be legal.
OUT_OF_SIGHT = {"pytorchcv/revnet110": 50}


@dataclass
class Verdict:
    """What fusing one network showed; ``problems`` is empty where all is as it should be."""

    name: str
    unfused_error: str | None = None  # why the network does not run at all, unfused
    size: list[list[int]] = field(default_factory=list)  # shapes of the arguments
    dtype: str = "float64"
    norm_calls: int = 0
    pairs: int = 0  # anchor → norm
    legal: int = 0  # of these
    absorbed: int = 0  # of the legal ones
    out_of_sight: int = 0  # legal by running, refused with its reason as the module holding it is handed on, not called
    absorbed_together: int = 0  # norm calls of pairs that run several times, always together
    adds: int = 0  # fused
    fusable_adds: int = 0  # that the oracle finds
    activations: int = 0
    fusable_activations: int = 0
    missed: dict[str, int] = field(default_factory=dict)  # reason given for a pair that is not legal → how many
    untraced: list[str] = field(default_factory=list)  # modules that symbolic tracing refused
    difference: float | None = None  # largest of all outputs, relative to the output's largest magnitude
    fuse_seconds: float | None = None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Case:
    """An unfused network that runs, with everything its fused form is compared with."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    expected: Any
    trace: oracle.Trace


def load(name: str, convert: Callable[[nn.Module], nn.Module] | None = None) -> Case:
    """Builds the network, randomizes it and runs it, unfused; raises what it raises.

    ``convert`` is applied to the network before anything else, e.g. to swap its norms for others.
    """
    model = zoo.build(name).to(zoo.recipe(name).dtype)
    if convert is not None:
        model = convert(model)
    inputs, expected = zoo.prepare(name, model)
    return Case(name, model, inputs, expected, oracle.trace(model, inputs))


def verify(
    name: str,
    *,
    convert: Callable[[nn.Module], nn.Module] | None = None,
    fuse: Callable[[nn.Module], Any] | None = None,
) -> Verdict:
    """Loads the network, fuses it (``fuse`` instead of ``fuse_fx``, if given) and judges the result."""
    try:
        case = load(name, convert)
    except Exception as error:
        return Verdict(name, unfused_error=describe(error))
    return judge(case, fuse)


def judge(case: Case, fuse: Callable[[nn.Module], Any] | None = None) -> Verdict:
    """Fuses the network and compares everything with the unfused network."""
    if fuse is None:
        from horizon_plugin_pytorch.quantization import fuse_fx as fuse

    dtype = zoo.recipe(case.name).dtype
    verdict = Verdict(case.name, dtype=str(dtype).removeprefix("torch."))
    verdict.size = [list(t.shape) for t in zoo.flatten(list(case.inputs))]
    if useless := zoo.is_informative(zoo.flatten(case.expected)):
        verdict.problems.append(f"the comparison would prove nothing: {useless}")
    before = case.trace
    verdict.norm_calls, verdict.pairs, verdict.legal = before.norm_calls, len(before.pairs), len(before.legal)
    verdict.fusable_adds, verdict.fusable_activations = before.fusable_adds, before.fusable_activations

    snapshot = fingerprint(case.model)
    start = time.perf_counter()
    try:
        fused = fuse(case.model)
    except Exception as error:
        verdict.problems.append(f"fuse_fx raises {describe(error)}")
        return verdict
    verdict.fuse_seconds = time.perf_counter() - start
    if changed := difference_of(snapshot, fingerprint(case.model)):
        verdict.problems.append(f"fuse_fx changed the original: {changed}")

    judge_report(verdict, before, fused.fusion_report)
    try:
        with torch.no_grad():
            zoo.seed_everything(0)
            actual = fused(*case.inputs)
        verdict.difference, problem = compare(case.expected, actual)
        if problem:
            verdict.problems.append(problem)
        elif not verdict.difference <= TOLERANCE[dtype]:
            verdict.problems.append(f"an output differs by {verdict.difference:.2g} relative")
        judge_fused(verdict, before, oracle.trace(fused, case.inputs))
    except Exception as error:
        verdict.problems.append(f"the fused network raises {describe(error)}")
    return verdict


def judge_report(verdict: Verdict, before: oracle.Trace, report: Any) -> None:
    """The report's groups and misses against the pairs the oracle found."""
    in_groups = [set(group.modules) for group in report.groups if group.has_norm]
    missed = [(set(miss.modules), miss.reason) for miss in report.missed]
    verdict.adds = sum(group.has_add for group in report.groups)
    verdict.activations = sum(group.activation is not None for group in report.groups)
    verdict.untraced = [f"{u.module or '(the network)'} ({u.type}): {u.reason}" for u in report.untraced]
    for pair in before.pairs:
        names = {pair.anchor, pair.norm}
        absorbed = any(names <= modules for modules in in_groups)
        reasons = [reason for modules, reason in missed if names <= modules or modules == {pair.norm}]
        if not absorbed and reasons:
            verdict.missed[reasons[0]] = verdict.missed.get(reasons[0], 0) + 1
        what = f"{pair.anchor} → {pair.norm}"
        if pair.reason is None and absorbed:
            verdict.absorbed += 1
        elif pair.together and absorbed:
            verdict.absorbed_together += pair.calls
        elif absorbed:
            verdict.problems.append(f"{what} is absorbed, but {pair.reason}")
        elif not reasons or not reasons[0].strip():
            verdict.problems.append(f"{what} is not in the report, but {pair.reason or 'is legal and not absorbed'}")
        elif pair.reason is None and verdict.name in OUT_OF_SIGHT:
            verdict.out_of_sight += 1
        elif pair.reason is None:
            verdict.problems.append(f"{what} is legal but not absorbed; the report says: {reasons[0]}")
    if verdict.out_of_sight != OUT_OF_SIGHT.get(verdict.name, 0):
        verdict.problems.append(f"{verdict.out_of_sight} pairs out of sight, not {OUT_OF_SIGHT[verdict.name]}")


def judge_fused(verdict: Verdict, before: oracle.Trace, after: oracle.Trace) -> None:
    """What is left in the fused network against what should be."""
    if len(after.legal) != verdict.out_of_sight:
        verdict.problems.append(f"{len(after.legal)} legal pairs are left after fusing: {sorted(after.legal)[:2]}")
    if after.norm_calls != before.norm_calls - verdict.absorbed - verdict.absorbed_together:
        verdict.problems.append(
            f"{after.norm_calls} norms run in the fused network, not {before.norm_calls} less those absorbed"
        )


def compare(expected: Any, actual: Any) -> tuple[float, str | None]:
    """Largest difference over all tensors of two nested outputs, each relative to the expected tensor's largest
    magnitude; and what makes them incomparable, if anything does."""
    a, b = zoo.flatten(expected), zoo.flatten(actual)
    if len(a) != len(b):
        return float("inf"), f"{len(b)} output tensors instead of {len(a)}"
    worst = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf"), f"output {i} is {y.dtype} {tuple(y.shape)} instead of {x.dtype} {tuple(x.shape)}"
        if not x.numel():
            continue
        if not x.is_floating_point():
            if wrong := int((x != y).sum()):
                return float("inf"), f"output {i} ({x.dtype}) differs in {wrong} of {x.numel()} elements"
            continue
        scale = x.abs().max().item()
        error = (x - y).abs().max().item()
        relative = error / scale if scale else error
        if not relative <= worst:  # also where it is NaN, which max() would hide
            worst = relative
        if worst != worst:
            return worst, f"output {i} is not a number somewhere"
    return worst, None


Fingerprint = dict[str, tuple[Any, ...]]


@torch.no_grad()
def fingerprint(model: nn.Module) -> Fingerprint:
    """The module tree and the state of a model: every tensor's identity, place, version and sum."""
    state: Fingerprint = {
        f"module {name}": (type(m), m.training, id(m), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules(remove_duplicate=False)
    }
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, t in tensors:
        total = t.double().sum().item() if t.is_floating_point() else int(t.sum())
        state[f"tensor {name}"] = (id(t), t.data_ptr(), t._version, t.dtype, tuple(t.shape), t.requires_grad, total)
    return state


def difference_of(before: Fingerprint, after: Fingerprint) -> str | None:
    """The first entry in which two fingerprints differ."""
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key):
            return f"{key}: {before.get(key)} → {after.get(key)}"
    return None


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
