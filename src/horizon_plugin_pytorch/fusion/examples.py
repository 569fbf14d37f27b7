"""What example inputs tell of a traced graph: arguments for its placeholders, and the shape and dtype of every value."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import fx, nn

from horizon_plugin_pytorch.fusion import patterns
from horizon_plugin_pytorch.fusion.tracing import Traced, explain


def record_shapes(traced: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Put ``meta["shape"]`` and ``meta["dtype"]`` on every node, computed without computing (fake tensors).

    A module left whole is seen to overwrite its inputs, or not to: ``meta["overwrites"]`` then says so.

    Returns:
        why it stopped, if it did.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            inputs = tree_leaves([self.env[i] for i in n.all_input_nodes]) if n.meta.get("opaque") else []
            before = [(t, t._version) for t in inputs if isinstance(t, torch.Tensor)]
            value = super().run_node(n)
            if n.meta.get("opaque"):
                n.meta["overwrites"] = any(t._version != version for t, version in before)
            if isinstance(value, torch.Tensor):
                n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
            return value

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = bind(traced.graph, args, kwargs)
    try:
        root = _without_data(traced, mode)  # outside of the mode: tensors that are plain attributes are copied, too
        with mode, torch.no_grad():
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, values)
            Recorder(root, graph=traced.graph).run(*fakes)
    except Exception as error:
        return explain(error)
    return None


def _without_data(traced: Traced, mode: Any) -> nn.Module:
    """A copy to run on fake tensors: the model's own batch norms must not count, nor its hooks see anything."""
    root = traced.root
    memo = {id(t): mode.from_tensor(t) for t in (*root.parameters(), *root.buffers())}
    result = copy.deepcopy(root, memo)
    result.__dict__.update(traced.constants)
    for module in result.modules():
        for table in patterns.HOOK_TABLES:
            getattr(module, table).clear()
    return result


def bind(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of the graph's placeholders, defaults where not given."""
    values: list[Any] = []
    rest = list(args)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if str(node.target).startswith("**"):
            values.append({k: v for k, v in kwargs.items() if k not in {str(n.target) for n in graph.nodes}})
        elif str(node.target).startswith("*"):
            values.append(tuple(rest))
            rest = []
        elif rest:
            values.append(rest.pop(0))
        elif node.target in kwargs:
            values.append(kwargs[node.target])
        elif node.args:
            values.append(node.args[0])
        else:
            raise ValueError(f"example_inputs have no value for the argument {node.target!r}")
    return values


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model call from what a user gives: a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def given_names(model: nn.Module, example_inputs: Any) -> frozenset[str]:
    """Names of forward's arguments that `example_inputs` fill."""
    if example_inputs is None:
        return frozenset()
    args, kwargs = call_arguments(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"example_inputs do not fit the forward of {type(model).__name__}: {error}") from None
    return frozenset(bound.arguments)
