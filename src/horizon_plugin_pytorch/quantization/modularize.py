"""Turning functions of a graph that have an integer form into modules, so that they can be quantized and named."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from horizon_plugin_pytorch.fusion import operators as fusion_operators
from horizon_plugin_pytorch.fusion import patterns as p
from horizon_plugin_pytorch.nn.intrinsic.assemble import replace_module
from horizon_plugin_pytorch.nn.quantized import operators as ops
from horizon_plugin_pytorch.nn.quantized.functional import FloatOperator
from horizon_plugin_pytorch.nn.quantized.group import CLAMPS
from horizon_plugin_pytorch.quantization import dataflow
from horizon_plugin_pytorch.quantization.forms import ELEMENTWISE

MULS: frozenset[Any] = frozenset(
    {python_operator.mul, python_operator.imul, torch.mul, torch.Tensor.mul, "mul", "mul_", "__mul__"}
)
CATS: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
MEANS: frozenset[Any] = frozenset({torch.mean, torch.Tensor.mean, "mean"})
POOLS: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
ADAPTIVE_POOLS: dict[Any, int] = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}

NONNEGATIVE_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(F.relu, F.relu_, F.relu6, F.sigmoid, F.hardsigmoid, F.softplus),
        *(torch.relu, torch.relu_, torch.sigmoid, torch.abs, torch.exp, torch.square),
        *"relu relu_ sigmoid sigmoid_ abs exp square".split(),
    }
)
ELEMENTWISE_FUNCTIONS: frozenset[Any] = NONNEGATIVE_FUNCTIONS | frozenset(
    {
        *(F.silu, F.hardswish, F.leaky_relu, F.gelu, F.elu, F.selu, F.celu, F.tanh, F.mish, F.softsign, F.logsigmoid),
        *(F.hardtanh, torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max, torch.tanh, torch.neg, torch.sin),
        *(torch.cos, torch.pow, torch.add, torch.sub, torch.mul, torch.div, fusion_operators.assign),
        *(getattr(python_operator, name) for name in "add sub mul truediv neg pow iadd isub imul itruediv".split()),
        *"tanh tanh_ neg sin cos clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max pow".split(),
        *"add add_ sub sub_ mul mul_ div div_".split(),
    }
)
"""Functions that are elementwise in one tensor, all other arguments being constants; those that are undefined for some numbers
(log, sqrt) are not among them, for a table has an entry for every integer, whether it occurs or not."""
POWERS: frozenset[Any] = frozenset({torch.pow, "pow", python_operator.pow})


@dataclass
class Call:
    """A graph node as a function of its one tensor."""

    method: bool
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    position: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        args = list(self.args)
        args.insert(self.position, x.clone())  # functions in place are values here
        if self.method:
            return getattr(args[0], self.target)(*args[1:], **self.kwargs)
        return self.target(*args, **self.kwargs)

    @property
    def __name__(self) -> str:
        return self.target if self.method else getattr(self.target, "__name__", str(self.target))


def modularize(gm: fx.GraphModule, held: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Rewrite `gm` in place: every function with an integer form becomes a `FloatOperator`.

    Args:
        held: nodes that must stay as they are.

    Returns:
        the nodes of the graph that are float tensors.
    """
    graph = gm.graph
    modules = dict(gm.named_modules(remove_duplicate=False))
    floats = dataflow.float_values(graph, modules)
    counts: dict[str, int] = {}
    for node in list(graph.nodes):
        if node in held or node not in floats:
            continue
        if node.op == "call_module" and not any(True for _ in modules[str(node.target)].parameters()):
            node.meta["moves"] = dataflow.only_moves(modules[str(node.target)])
        if node.op == "call_module" and (elementwise := _elementwise_module(modules[str(node.target)])):
            read: Read | None = (elementwise, (dataflow.first_argument(node),), node)
            name = str(node.target)
        else:
            read, name = read_operator(node, modules), ""
        if read is None or read[2] in held or not floats.issuperset(read[1]):
            continue
        operator, inputs, end = read
        if not name or isinstance(modules[name], FloatOperator):
            kind = operator.name.lower().strip("_")
            while True:
                name = f"_generated_{kind}_{counts.get(kind, 0)}"
                counts[kind] = counts.get(kind, 0) + 1
                if not hasattr(gm, name):
                    break
        replace_module(gm, name, FloatOperator(operator).train(gm.training))
        modules[name] = gm.get_submodule(name)
        with graph.inserting_before(end):
            call = graph.call_module(name, tuple(inputs))
        call.meta = {k: v for k, v in (*node.meta.items(), *end.meta.items()) if k in ("source", "shape", "dtype")}
        floats.add(call)
        _replace(graph, node, end, call)
    graph.lint()
    return floats


def _replace(graph: fx.Graph, start: fx.Node, end: fx.Node, call: fx.Node) -> None:
    """Let `call` stand for the chain of single consumers from `start` to `end`."""
    end.replace_all_uses_with(call)
    node: Any = end
    while True:
        before = dataflow.first_argument(node)
        graph.erase_node(node)
        if node is start:
            break
        node = before


Read = tuple[ops.Operator, tuple[fx.Node, ...], fx.Node]


def read_operator(node: fx.Node, modules: dict[str, nn.Module]) -> Read | None:
    """``(operator, its tensors, the last node it covers)`` of a function or method node with an integer form."""
    if node.op not in ("call_function", "call_method"):
        return None
    add = fusion_operators.read_add(node)
    if add and (not add.refused or (add.left is add.right and set(node.kwargs) <= {"input", "other"})):
        activation, end = _activation_behind(_observer_behind(node, modules), modules)
        return ops.Add(activation), (add.left, add.right), _observer_behind(end, modules)
    kwargs: dict[str, Any] = dict(node.kwargs)
    one_input = len(node.all_input_nodes) == 1
    if _is_product(node):
        a, b = node.args[:2]
        return ops.Mul(), (a, b), _observer_behind(node, modules)  # type: ignore[return-value]
    if node.target in CATS:
        call: Any = dict(zip(("tensors", "dim"), node.args, strict=False)) | kwargs
        operands = call["tensors"]
        nodes = isinstance(operands, (list, tuple)) and all(isinstance(t, fx.Node) for t in operands)
        if nodes and operands and set(call) <= {"tensors", "dim"} and isinstance(call.get("dim", 0), int):
            return ops.Cat(call.get("dim", 0)), tuple(operands), _observer_behind(node, modules)
        return None
    if node.target in MEANS and one_input:
        call = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | kwargs
        dim = call.get("dim")
        dims = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, (list, tuple)) else None
        if dims and set(call) <= {"input", "dim", "keepdim"} and all(isinstance(d, int) for d in dims):
            return ops.Mean(dims, bool(call.get("keepdim", False))), (call["input"],), node
        return None
    if node.target in POOLS and one_input:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        call = dict(zip(names, node.args, strict=False)) | kwargs
        x = call.pop("input")
        call["stride"] = call.get("stride") or None
        return ops.AvgPool(POOLS[node.target], **call), (x,), node
    if node.target in ADAPTIVE_POOLS and one_input:
        call = dict(zip(("input", "output_size"), node.args, strict=False)) | kwargs
        return ops.AdaptiveAvgPool(ADAPTIVE_POOLS[node.target], call["output_size"]), (call["input"],), node
    return _read_elementwise(node, modules)


def _is_product(node: fx.Node) -> bool:
    if len(node.args) < 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return False
    return node.target in MULS or bool(node.target is fusion_operators.assign and node.args[2] == "imul")


def _read_elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> Read | None:
    if node.target not in ELEMENTWISE_FUNCTIONS or len(node.all_input_nodes) != 1:
        return None
    positions = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node)]
    constants = [a for i, a in enumerate(node.args) if i not in positions]
    plain = all(isinstance(c, (int, float, bool, str, type(None))) for c in (*constants, *node.kwargs.values()))
    if len(positions) != 1 or not plain:
        return None
    if node.target is fusion_operators.assign and constants[-1] not in ("iadd", "isub", "imul", "itruediv"):
        return None
    if node.target in POWERS and not (positions == [0] and isinstance(constants[0], int) and constants[0] > 0):
        return None
    x: Any = node.args[positions[0]]
    call = Call(node.op == "call_method", node.target, tuple(constants), dict(node.kwargs), positions[0])
    nonnegative = node.target in NONNEGATIVE_FUNCTIONS or fusion_operators.read_activation(node) is not None
    return ops.Elementwise(call, nonnegative=nonnegative), (x,), _observer_behind(node, modules)


def _observer_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """The place of a FloatFunctional's observer behind its operator, which hands its result on."""
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module":
        owner, _, leaf = str(users[0].target).rpartition(".")
        if leaf == "activation_post_process" and p.is_float_functional(modules[owner]):
            return users[0]
    return node


def _activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str | None, fx.Node]:
    """A ReLU or ReLU6 that alone reads an add: both become one operator with one rounding."""
    users = list(node.users)
    if len(users) != 1:
        return None, node
    user = users[0]
    module = dataflow.module_of(user, modules)
    row = fusion_operators.read_activation(user) if module is None else p.activation_of(module)
    if module is not None and p.has_hooks(module):
        row = None
    return (None, node) if row is None or row not in CLAMPS else (CLAMPS[row], user)


def _elementwise_module(module: nn.Module) -> ops.Elementwise | None:
    """A user's own activation module: no tensors, and nothing in its forward but elementwise functions of its one input."""
    if type(module).__module__.startswith("torch.nn") or p.has_hooks(module) or module.state_dict():
        return None
    try:
        graph = fx.Tracer().trace(module)
    except Exception:
        return None
    children = dict(module.named_modules())
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    if len(placeholders) != 1 or not body:
        return None
    for node in body:
        if node.op == "call_module":
            fits = dataflow.computes_as(children[str(node.target)], ELEMENTWISE)
        else:
            read = read_operator(node, children)
            fits = read is not None and isinstance(read[0], (ops.Elementwise, ops.Add, ops.Mul))
        if not fits:
            return None
    return ops.Elementwise(module)
