"""Steps that change a tensor in place, and who reads that memory by another name."""

from __future__ import annotations

from horizon_plugin_pytorch.plan.program import Plan, Step, refs

_VIEWS = frozenset(
    """
    T attribute chunk contiguous detach dropout dropout1d dropout2d dropout3d expand expand_as flatten float getitem mT movedim narrow
    permute reshape reshape_as select split squeeze swapaxes t to transpose type_as unbind unflatten unfold unsqueeze view view_as
    """.split()
)
"""Functions whose result may lie in their first argument's memory."""


def changes(step: Step) -> bool:
    """Whether the step changes its first argument."""
    return step.kind == "function" and step.target.startswith("method.") and step.target.endswith("_")


def changed_elsewhere(plan: Plan, i: int) -> str | None:
    """The name of another value that step `i`, which changes its first argument, may change, and that is read afterwards."""
    first, own = len(plan.inputs), len(plan.inputs) + i

    def memory(value: int) -> int:
        """The value in whose memory this one may lie."""
        while value >= first:
            step = plan.steps[value - first]
            name = step.target.rpartition(".")[2]
            sources = refs(step.args[:1])
            if step.kind != "function" or not sources or not (name in _VIEWS or changes(step)):
                break
            value = sources[0].value
        return value

    changed = memory(refs(plan.steps[i].args)[0].value)
    later = [r.value for s in plan.steps[i + 1 :] for r in refs((s.args, s.kwargs))] + [
        r.value for r in refs(plan.outputs)
    ]
    return next((plan.values[v].name for v in later if v < own and memory(v) == changed), None)
