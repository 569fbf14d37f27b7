"""Writing down what an int8 model does, as a `Plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from horizon_plugin_pytorch.fusion.examples import bind, call_arguments, given_names
from horizon_plugin_pytorch.fusion.tracing import expect_default
from horizon_plugin_pytorch.nn.intrinsic import Handoff
from horizon_plugin_pytorch.nn.intrinsic.handoff import AnchorInput
from horizon_plugin_pytorch.nn.quantized import operators
from horizon_plugin_pytorch.nn.quantized.group import CLAMPS, QuantizedGroup
from horizon_plugin_pytorch.nn.quantized.operation import Operation, QFunctional, Quantize
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.functions import ATTRIBUTES, METHODS, NAMES
from horizon_plugin_pytorch.plan.program import Const, Kind, Plan, PlanError, Ref, Step, Value


def record(int8_model: nn.Module, example_inputs: Any) -> Plan:
    """Record a converted model.

    Shapes may be others when the plan runs, where the model computes with sizes instead of fixed numbers.

    Args:
        int8_model: from `convert`, `convert_fx` or `horizon.quantize`, in eval mode.
        example_inputs: a tensor, a tuple of the model's arguments, or a dict of keyword arguments.

    Returns:
        the plan; run on `example_inputs` it gave the model's output, with 0 differing elements.

    Raises:
        PlanError: the model's forward cannot be traced as a whole, or uses a function that a plan has no step for, naming it.
    """
    if int8_model.training:
        raise PlanError("record: the model is in training mode; call model.eval() first")
    if not any(isinstance(m, (QuantizedGroup, Operation, Quantize)) for m in int8_model.modules()):
        raise PlanError("record: the model computes nothing in integers; convert it first")
    args, kwargs = call_arguments(example_inputs)
    try:
        names = given_names(int8_model, example_inputs)
        tracer = _PlanTracer(names)
        graph = tracer.trace(int8_model)
        values = bind(graph, args, kwargs)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"record: the forward of {type(int8_model).__name__} cannot be traced as a whole: {error}"
        ) from error
    recorder = _Recorder(int8_model, graph, tracer.operators)
    with torch.no_grad():
        expected = recorder.run(*values)
        plan = recorder.plan()
        result = plan.compile("reference")(*(v for v in values if isinstance(v, Tensor)))
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(expected), leaves(result), strict=True):
        if isinstance(a, Tensor) and not torch.equal(_plain(a), _plain(b)):
            raise PlanError(
                "record: the plan does not give what the model gives; its forward depends on more than its inputs"
            )
    return plan


def _plain(x: Tensor) -> Tensor:
    return x.payload if isinstance(x, QTensor) else x


def _operator_call(path: str, operator: int, *xs: Any) -> Any:
    raise AssertionError("stands for a method of a FloatFunctional in a graph")


class _PlanTracer(fx.Tracer):
    """Quantized modules are calls, everything else is looked into, down to functions and the tensors they read."""

    def __init__(self, given: frozenset[str]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.given = given
        self.operators: list[operators.Operator] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QuantizedGroup, Operation, Quantize))

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        functionals = {m: name for name, m in root.named_modules() if isinstance(m, QFunctional)}
        norms = [m for m in root.modules() if hasattr(m, "_check_input_dim")]
        for m, name in functionals.items():
            m.__dict__["_run"] = self._functional(name)
        for m in norms:
            m.__dict__["_check_input_dim"] = lambda x: None
        try:
            return super().trace(root, concrete_args)
        finally:
            for m in functionals:
                del m.__dict__["_run"]
            for m in norms:
                del m.__dict__["_check_input_dim"]

    def _functional(self, path: str) -> Callable[..., Any]:
        def run(operator: operators.Operator, *xs: Any) -> Any:
            self.operators.append(operator)
            return self.create_proxy("call_function", _operator_call, (path, len(self.operators) - 1, *xs), {})

        return run

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(a, AnchorInput) for a in args) or isinstance(m, Handoff):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        import inspect

        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        for i, arg in enumerate(args):
            name = str(arg.node.target).lstrip("*") if isinstance(arg, fx.Proxy) else ""
            if (
                name in parameters
                and parameters[name].default is not inspect.Parameter.empty
                and name not in self.given
            ):
                args[i] = parameters[name].default
                self.graph.erase_node(arg.node)
        return fn, args


class _Recorder(fx.Interpreter):
    """Runs the graph on the example and writes a step for every node."""

    def __init__(self, root: nn.Module, graph: fx.Graph, functional_operators: list[operators.Operator]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.root = root
        self.functional_operators = functional_operators
        self.inputs: list[str] = []
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.constants: dict[str, Tensor] = {}
        self.outputs: Any = None
        self.refs: dict[fx.Node, Any] = {}
        self._floats: dict[int, Ref] = {}

    def plan(self) -> Plan:
        used = {name for step in self.steps for name in _constant_names((step.args, step.kwargs, step.params))}
        used |= {v.scale for v in self.values if v.scale is not None} | set(_constant_names(self.outputs))
        constants = {n: t for n, t in self.constants.items() if n in used}
        return Plan(
            type(self.root).__name__, tuple(self.inputs), tuple(self.values), tuple(self.steps), self.outputs, constants
        )

    # -- values -------------------------------------------------------------------------------------------------------------

    def _constant(self, name: str, tensor: Tensor) -> Const:
        self.constants[name] = tensor.detach().clone().contiguous()
        return Const(name)

    def _value(self, name: str, result: Any) -> Value:
        if isinstance(result, QTensor):
            scale = next((n for n, t in self.constants.items() if t is result.scale or _same(t, result.scale)), None)
            if scale is None:
                scale = self._constant(f"{name}.scale", result.scale).name
            return Value(name, str(result.dtype8).removeprefix("torch."), tuple(result.shape), scale)
        if isinstance(result, Tensor):
            return Value(name, str(result.dtype).removeprefix("torch."), tuple(result.shape))
        return Value(name, "host")

    def _add(self, step: Step, result: Any) -> Ref:
        self.steps.append(step)
        self.values.append(self._value(step.name, result))
        return Ref(len(self.values) - 1)

    def _arguments(self, value: Any) -> Any:
        """A node's arguments with references instead of nodes."""
        if isinstance(value, fx.Node):
            return self.refs[value]
        if isinstance(value, dict):
            return {k: self._arguments(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._arguments(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            return (
                tuple(map(self._arguments, value)) if isinstance(value, tuple) else [self._arguments(v) for v in value]
            )
        return value

    # -- nodes --------------------------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target is _operator_call:
            return self._functional(n)
        result = super().run_node(n)
        if n.op == "placeholder":
            if not isinstance(result, Tensor):
                if any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(result)):
                    raise PlanError(
                        f"record: the argument {n.target!r} is a {type(result).__name__} of tensors; a plan's inputs are tensors: wrap the "
                        "model in one whose forward takes each of them by itself"
                    )
                self.refs[n] = result
                return result
            self.inputs.append(str(n.target))
            self.values.append(self._value(str(n.target), result))
            self.refs[n] = Ref(len(self.values) - 1)
        elif n.op == "get_attr":
            self.refs[n] = self._constant(str(n.target), result) if isinstance(result, Tensor) else result
        elif n.op == "output":
            self.outputs = self._arguments(n.args[0])
        elif n.op == "call_module":
            self._module(n, self.fetch_attr(str(n.target)), result)
        elif n.target is not expect_default:
            self._function(n, result)
        return result

    def _module(self, n: fx.Node, module: nn.Module, result: Any) -> None:
        name = str(n.target)
        if "input" in n.kwargs:
            n.args, n.kwargs = (n.kwargs["input"], *n.args), {k: v for k, v in n.kwargs.items() if k != "input"}
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        arguments = self._arguments(n.args)
        if isinstance(module, Quantize):
            if isinstance(args[0], QTensor):
                self.refs[n] = arguments[0]
                return
            params = {"scale": self._constant(f"{name}.scale", module.scale), "dtype": _name(module.dtype8)}
            self.refs[n] = self._add(Step("quantize", name, arguments, params=params), result)
        elif isinstance(module, Operation):
            self.refs[n] = self._operator(name, module.operator, module, args, arguments, result)
        else:
            assert isinstance(module, QuantizedGroup)
            self.refs[n] = self._group(name, module, args, kwargs, arguments, self._arguments(n.kwargs), result)

    def _functional(self, n: fx.Node) -> Any:
        arguments: Any = n.args
        path, index, *nodes = arguments
        module, operator = self.root.get_submodule(path), self.functional_operators[index]
        xs: Any = self.map_nodes_to_values(tuple(nodes), n)
        assert isinstance(module, QFunctional)
        result = module._run(operator, *xs)
        self.refs[n] = self._operator(path, operator, module, xs, self._arguments(tuple(nodes)), result)
        return result

    def _operator(
        self, name: str, operator: operators.Operator, module: Any, xs: Any, arguments: Any, result: Any
    ) -> Ref:
        params: dict[str, Any] = {"scale": self._constant(f"{name}.scale", module.scale), "dtype": _name(module.dtype8)}
        kind: Kind = "operator"
        if isinstance(operator, operators.Elementwise):
            from horizon_plugin_pytorch.backends import reference

            kind, x = "table", xs[0]
            table = reference.lookup_table(operator.function, x.scale, x.payload.dtype, module.scale, module.dtype8)
            params["table"] = self._constant(f"{name}.table", table)
        else:
            options = {f.name: getattr(operator, f.name) for f in dataclasses.fields(operator) if f.init}  # type: ignore[arg-type]
            params |= {"name": type(operator).__name__, "options": options}
        return self._add(Step(kind, name, tuple(arguments), params=params), result)

    def _group(
        self, name: str, module: QuantizedGroup, args: Any, kwargs: Any, arguments: Any, named: Any, result: Any
    ) -> Ref:
        pattern = module.pattern
        if pattern.activation not in CLAMPS:
            raise PlanError(f"record: {name!r} ({pattern.name}): its activation has no step in a plan")
        operands = 2 if pattern.add else 1
        other = args[1] if pattern.add else None
        constants = module.integers(args[0].scale, None if other is None else other.scale)
        params: dict[str, Any] = {
            "geometry": dataclasses.asdict(module.geometry),
            "activation": CLAMPS[pattern.activation],
            **{n: self._constant(f"{name}.{n}", t) for n, t in constants._asdict().items() if t is not None},
        }
        if module.scale is not None:
            params |= {"scale": self._constant(f"{name}.scale", module.scale), "dtype": _name(module.dtype8)}
        size = named.get("output_size", arguments[operands] if len(arguments) > operands else None)
        if size is not None:
            params["output_size"] = size
        return self._add(Step("group", name, tuple(arguments[:operands]), params=params), result)

    def _function(self, n: fx.Node, result: Any) -> None:
        args, kwargs = self._arguments(n.args), self._arguments(n.kwargs)
        if n.op == "call_method":
            target = f"method.{n.target}"
            known = str(n.target) in METHODS
        elif n.target is getattr:
            target, known = "attribute", n.args[1] in ATTRIBUTES
        elif getattr(n.target, "__name__", "") == "dequantize":
            self.refs[n] = self._dequantized(n.args[0], args[0])  # type: ignore[arg-type]
            return
        elif _name_of(n.target) == _STOCHASTIC_DEPTH and self._is(result, n.args[0]):
            self.refs[n] = args[0]  # in eval mode it hands its input on
            return
        else:
            target = NAMES.get(n.target, "")  # type: ignore[arg-type]
            known = bool(target)
        if not known:
            raise PlanError(f"record: {n.name!r}: a plan has no step for {n.target}")
        nodes = list(n.all_input_nodes)
        integers = [a for a in nodes if isinstance(self.env.get(a), QTensor)]
        if integers and isinstance(result, Tensor) and not isinstance(result, QTensor):
            before = {a: self.refs[a] for a in integers}
            self.refs |= {a: self._dequantized(a, self.refs[a]) for a in integers}
            args, kwargs = self._arguments(n.args), self._arguments(n.kwargs)
            self.refs |= before
        self.refs[n] = self._add(Step("function", n.name, args, kwargs, target), result)

    def _is(self, result: Any, operand: Any) -> bool:
        return isinstance(operand, fx.Node) and self.env.get(operand) is result

    def _dequantized(self, node: fx.Node, ref: Any) -> Any:
        value = self.env.get(node)
        if not isinstance(value, QTensor):
            return ref
        if ref.value not in self._floats:
            self._floats[ref.value] = self._add(
                Step("dequantize", f"{node.name}.dequantize", (ref,)), value.dequantize()
            )
        return self._floats[ref.value]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"


def _constant_names(arguments: Any) -> list[str]:
    if isinstance(arguments, Const):
        return [arguments.name]
    if isinstance(arguments, dict):
        return [n for a in arguments.values() for n in _constant_names(a)]
    if isinstance(arguments, (tuple, list)):
        return [n for a in arguments for n in _constant_names(a)]
    return []
