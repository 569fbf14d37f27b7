"""Steps that call a PyTorch function: data moves, float32 computations, and sizes.

A rule is a Python function with the parameters of the PyTorch function it stands for; it gets references to the plan's values, and returns
names of tensors. Where the plan's result is integers, the function only moved them: the same nodes then move the value, or in the form
``qoperator`` the integers themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx.functions import elementwise, layout, neural, reductions, windows
from horizon_plugin_pytorch.export.onnx.functions.call import Call
from horizon_plugin_pytorch.export.onnx.lowering import Dim, Lowering, Quantized
from horizon_plugin_pytorch.export.onnx.sizes import ARITHMETIC, is_dynamic, size_of
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan import Step
from horizon_plugin_pytorch.plan.in_place import changed_elsewhere
from horizon_plugin_pytorch.plan.program import Ref, refs

RULES: dict[str, Callable[..., Any]] = {
    **layout.RULES,
    **windows.RULES,
    **elementwise.RULES,
    **neural.RULES,
    **reductions.RULES,
}
_SYNONYMS = {
    "view": "reshape", "view_as": "reshape_as", "swapaxes": "transpose", "concat": "cat", "truediv": "div", "true_divide": "div",
    "itruediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "clip": "clamp", "mm": "matmul", "bmm": "matmul",
}  # fmt: skip


def function(low: Lowering, step: Step) -> Any:
    """The result of a step: a tensor, integers, a Python value, a `Dim`, or a tuple of these."""
    meta = low.shapes.meta(low.index)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(meta)):
        return _host(low, step, meta)
    if (
        step.target == "operator.getitem"
        and isinstance(step.args[1], int)
        and isinstance(low.argument(step.args[0]), tuple)
    ):
        return low.argument(step.args[0])[step.args[1]]
    name = step.target.rpartition(".")[2].rstrip("_")
    if step.target == "attribute":
        name = str(step.args[1])
    rule = RULES.get(_SYNONYMS.get(name, name))
    if rule is None:
        raise ExportError(
            f"{step.target} has no form in ONNX here: replace it in the model by functions that have one, or leave it out of what is exported"
        )
    units = None
    if isinstance(meta, QTensor) or any(isinstance(leaf, QTensor) for leaf in tree_leaves(meta)):
        sources = [low.env[r.value] for r in refs((step.args, step.kwargs)) if isinstance(low.env[r.value], Quantized)]
        units = sources[0].units
    moves_integers = units is not None and low.form == "qoperator" and rule in layout.ON_INTEGERS | windows.ON_INTEGERS
    call = Call(low, step, units, moves_integers)
    args = step.args[:1] if step.target == "attribute" else step.args
    kwargs = {name: value for name, value in step.kwargs.items() if (name, value) != ("out", None)}
    _refuse_shared(low)
    try:
        bound = inspect.signature(rule).bind(call, *args, **kwargs)
    except TypeError as error:
        raise ExportError(f"{step.target} is called with an argument that has no form in ONNX here: {error}") from None
    result = rule(*bound.args, **bound.kwargs)
    if units is None:
        return result
    known = units
    return tree_map(
        lambda t: (
            t
            if isinstance(t, Quantized)
            else Quantized(known, step.name, **{"integers" if moves_integers else "scaled": t})
        ),
        result,
    )


def _refuse_shared(low: Lowering) -> None:
    """Raise if a step that changes a tensor in place changes what others read: a graph's tensors do not change."""
    other = changed_elsewhere(low.plan, low.index - len(low.plan.inputs))
    if other is not None:
        raise ExportError(
            f"it changes a tensor in place that is read afterwards as {other!r}, for which ONNX has no form: "
            "write it so that it returns a new tensor"
        )


def _host(low: Lowering, step: Step, meta: Any) -> Any:
    """A value that is no tensor: known now, or computed from sizes that vary."""
    arguments = low.argument((step.args, step.kwargs))
    source = step.args[0] if step.args else None
    if isinstance(source, Ref) and low.plan.values[source.value].dtype != "host":
        sizes = low.sizes(source)
        if step.target == "method.size" or (step.target == "attribute" and step.args[1] == "shape"):
            which = step.args[1] if step.target == "method.size" and len(step.args) > 1 else step.kwargs.get("dim")
            wanted = sizes if which is None else (sizes[which],)
            if None not in wanted:
                return meta
            value = low.env[source.value]
            tensor = low.scaled(value) if isinstance(value, Quantized) else value
            if which is None:
                return size_of(low.graph, tensor, sizes)
            only = [n if d == which % len(sizes) else 0 for d, n in enumerate(sizes)]
            return size_of(low.graph, tensor, tuple(only))[which]
        if step.target == "method.numel" and None in sizes:
            return Dim(
                low.graph.op(
                    "Reshape", low.graph.op("Size", low.tensor(low.env[source.value])), low.graph.constant([1])
                )
            )
        return meta
    if not is_dynamic(arguments):
        return meta
    args = arguments[0]
    if step.target == "operator.getitem":
        return args[0][args[1]]
    if step.target in ARITHMETIC and len(args) == 2 and not step.kwargs:
        return ARITHMETIC[step.target](low.graph, *args)
    raise ExportError(
        f"{step.target} of a size that varies has no form in ONNX here: export with dynamic_size=False and dynamic_batch=False"
    )
