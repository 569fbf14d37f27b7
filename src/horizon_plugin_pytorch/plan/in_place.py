"""Steps that change a tensor in place, and who reads that memory by another name."""

from __future__ import annotations

import inspect

from horizon_plugin_pytorch.plan.functions import resolve
from horizon_plugin_pytorch.plan.program import Plan, Step, refs

_VIEWS = frozenset(
    """
    T attribute chunk contiguous detach dropout dropout1d dropout2d dropout3d expand expand_as flatten float getitem mT movedim narrow
    permute reshape reshape_as select split squeeze swapaxes t to transpose type_as unbind unflatten unfold unsqueeze view view_as
    """.split()
)
"""Functions whose result may lie in their first argument's memory."""
_OPERATORS = frozenset(("iadd", "imul", "isub"))


def changed_elsewhere(plan: Plan, i: int) -> str | None:
    """The name of a value that step `i` changes beside its result, and that is read afterwards; None for a step that changes none."""
    if plan.result(i).dtype == "host" or not _changes(plan.steps[i]):
        return None
    first, own = len(plan.inputs), len(plan.inputs) + i

    def memory(value: int) -> int:
        """The value in whose memory this one may lie."""
        while value >= first:
            step = plan.steps[value - first]
            sources = refs(step.args[:1])
            if not sources or not (_is_view(step) or _changes(step)):
                break
            value = sources[0].value
        return value

    changed = memory(own)
    later = [r.value for s in plan.steps[i + 1 :] for r in refs((s.args, s.kwargs))] + [
        r.value for r in refs(plan.outputs)
    ]
    return next((plan.values[v].name for v in later if v < own and memory(v) == changed), None)


def _is_view(step: Step) -> bool:
    return step.kind == "function" and step.target.rpartition(".")[2] in _VIEWS


def _changes(step: Step) -> bool:
    """Whether a step changes its first argument: ``x.mul_(y)``, ``x += y``, ``relu(x, inplace=True)``."""
    if step.kind != "function":
        return False
    family, _, name = step.target.rpartition(".")
    if family == "method":
        return name.endswith("_")
    if family == "operator":
        return name in _OPERATORS
    try:
        signature = inspect.signature(resolve(step.target))  # type: ignore[arg-type]
        return bool(signature.bind(*step.args, **step.kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):  # those written in C++ have no such argument
        return False
