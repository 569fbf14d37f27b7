"""Plans in files: one safetensors file, the program as JSON in its header, every field checked on load.

Nothing in a file is executed or unpickled; it can name only the functions of `plan.functions`. A file that is truncated, edited or
made to do harm is a `PlanError`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.nn.quantized.group import Geometry
from horizon_plugin_pytorch.plan.functions import resolve
from horizon_plugin_pytorch.plan.program import KINDS, Const, Plan, PlanError, Ref, Step, Value, refs
from horizon_plugin_pytorch.plan.steps import INTEGER_DTYPES, OPERATORS

FORMAT = 1
_LARGEST_HEADER = 64 * 2**20
_DEEPEST = 32

# What a step of each kind has to have and may have besides; a type, or the name of a check below.
_PARAMS: dict[str, dict[str, str]] = {
    "quantize": {"scale": "const", "dtype": "integer dtype"},
    "dequantize": {},
    "group": {
        "geometry": "geometry", "activation": "activation", "weight": "const", "bias": "const", "m": "const", "bound": "const",
        "residual_ratio?": "const", "scale?": "const", "dtype?": "integer dtype", "output_size?": "any",
    },
    "operator": {"name": "operator", "options": "dict", "scale": "const", "dtype": "integer dtype"},
    "table": {"table": "const", "scale": "const", "dtype": "integer dtype"},
    "function": {},
}  # fmt: skip


def save(plan: Plan, path: str | Path) -> None:
    """Write `plan` to `path`; a file that is there is replaced only when the new one is complete."""
    from safetensors.torch import save_file

    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        save_file(plan.constants, part, metadata={"plan": to_json(plan)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | Path) -> Plan:
    """Read a plan that `Plan.save` wrote.

    Raises:
        PlanError: the file is not one, or not a valid one, saying where.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no plan at {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("plan")
            constants = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not a plan, or not a whole one: {error}") from None
    if text is None or len(text) > _LARGEST_HEADER:
        raise PlanError(f"{path} has no program of a plan in it")
    try:
        return from_json(text, constants)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def to_json(plan: Plan) -> str:
    """The program of `plan`: everything but its constants."""
    program = {
        "format": FORMAT,
        "model": plan.model,
        "inputs": list(plan.inputs),
        "values": [[v.name, v.dtype, list(v.shape), v.scale] for v in plan.values],
        "steps": [
            [s.kind, s.name, s.target, _encode(s.args), _encode(s.kwargs), _encode(s.params)] for s in plan.steps
        ],
        "outputs": _encode(plan.outputs),
    }
    return json.dumps(program, allow_nan=False)


def from_json(text: str, constants: dict[str, Tensor], check: bool = True) -> Plan:
    """The plan of a program that `to_json` wrote, and its constants.

    Args:
        check: False only for a program that was checked before, whose constants are here without their data.

    Raises:
        PlanError: it is not a valid program, or does not fit the constants, saying where.
    """
    try:
        plan = _decode_plan(json.loads(text, parse_constant=_no_constant), constants)
        if check:
            validate(plan)
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise PlanError(f"its program is not valid: {type(error).__name__}: {error}") from None
    return plan


def _no_constant(name: str) -> Any:
    raise PlanError(f"{name} in the program")


# ---------------------------------------------------------------------------------------------------------------------------
# Nested arguments as JSON: what JSON has no form for is an object with one key that starts with "$".


def _encode(x: Any) -> Any:
    if isinstance(x, Ref):
        return {"$value": x.value}
    if isinstance(x, Const):
        return {"$const": x.name}
    if isinstance(x, tuple):
        return {"$tuple": [_encode(a) for a in x]}
    if isinstance(x, list):
        return [_encode(a) for a in x]
    if isinstance(x, dict):
        return {"$dict": {str(k): _encode(v) for k, v in x.items()}}
    if isinstance(x, slice):
        return {"$slice": [_encode(x.start), _encode(x.stop), _encode(x.step)]}
    if x is Ellipsis:
        return {"$ellipsis": True}
    if isinstance(x, torch.dtype):
        return {"$dtype": str(x).removeprefix("torch.")}
    if isinstance(x, torch.memory_format):
        return {"$memory_format": str(x).removeprefix("torch.")}
    if isinstance(x, float) and not math.isfinite(x):
        return {"$float": str(x)}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise PlanError(f"{type(x).__name__} {x!r} cannot be written to a plan")


_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
        torch.bool,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}


def _decode(x: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise PlanError("arguments are nested too deeply")
    if isinstance(x, list):
        return [_decode(a, depth + 1) for a in x]
    if not isinstance(x, dict):
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        raise PlanError(f"unexpected {type(x).__name__} in arguments")
    if len(x) != 1:
        raise PlanError(f"an object in arguments must have one key, not {sorted(x)[:5]}")
    ((key, value),) = x.items()
    if key == "$value" and type(value) is int:
        return Ref(value)
    if key == "$const" and isinstance(value, str):
        return Const(value)
    if key == "$tuple" and isinstance(value, list):
        return tuple(_decode(a, depth + 1) for a in value)
    if key == "$dict" and isinstance(value, dict):
        return {k: _decode(v, depth + 1) for k, v in value.items()}
    if key == "$slice" and isinstance(value, list) and len(value) == 3:
        return slice(*(_decode(a, depth + 1) for a in value))
    if key == "$ellipsis":
        return Ellipsis
    if key == "$dtype" and value in _DTYPES:
        return _DTYPES[value]
    if key == "$memory_format" and value in _MEMORY_FORMATS:
        return _MEMORY_FORMATS[value]
    if key == "$float" and value in ("inf", "-inf", "nan"):
        return float(value)
    raise PlanError(f"unknown object {key!r} in arguments")


def _decode_plan(program: Any, constants: dict[str, Tensor]) -> Plan:
    if not isinstance(program, dict) or program.get("format") != FORMAT:
        raise PlanError(f"format {program.get('format') if isinstance(program, dict) else None!r} is not {FORMAT}")
    values = tuple(
        Value(str(n), str(d), tuple(_whole(i) for i in shape), scale) for n, d, shape, scale in program["values"]
    )
    steps = tuple(
        Step(kind, str(name), _decode(args), _decode(kwargs), str(target), _decode(params))
        for kind, name, target, args, kwargs, params in program["steps"]
    )
    inputs = tuple(str(n) for n in program["inputs"])
    return Plan(str(program["model"]), inputs, values, steps, _decode(program["outputs"]), constants)


def _whole(x: Any) -> int:
    if type(x) is not int or x < 0:
        raise PlanError(f"{x!r} is not a size")
    return x


# ---------------------------------------------------------------------------------------------------------------------------
# Validation


def validate(plan: Plan) -> None:
    """Raise `PlanError` unless every reference, constant, dtype and function of the plan is one it may have."""
    if len(plan.values) != len(plan.inputs) + len(plan.steps):
        raise PlanError(f"{len(plan.values)} values for {len(plan.inputs)} inputs and {len(plan.steps)} steps")
    if len(set(plan.inputs)) != len(plan.inputs):
        raise PlanError("an input's name stands twice")
    for value in plan.values:
        if value.dtype not in (*_DTYPES, "host"):
            raise PlanError(f"value {value.name!r} has the unknown dtype {value.dtype!r}")
        if value.scale is not None:
            _check_scale(plan, value.scale, value.name)
    for i, step in enumerate(plan.steps):
        try:
            _check_step(plan, i, step)
        except PlanError as error:
            raise PlanError(f"step {i} ({step.name!r}): {error}") from None
    _check_references(plan, plan.outputs, len(plan.values))


def _check_references(plan: Plan, arguments: Any, before: int) -> None:
    for ref in refs(arguments):
        if not 0 <= ref.value < before:
            raise PlanError(f"value %{ref.value} is not there yet")
    for name in _constants(arguments):
        if name not in plan.constants:
            raise PlanError(f"there is no constant {name!r}")


def _constants(arguments: Any) -> list[str]:
    if isinstance(arguments, Const):
        return [arguments.name]
    if isinstance(arguments, dict):
        return [n for a in arguments.values() for n in _constants(a)]
    if isinstance(arguments, (tuple, list)):
        return [n for a in arguments for n in _constants(a)]
    return []


def _check_scale(plan: Plan, name: str, where: str) -> None:
    tensor = plan.constants.get(name)
    if tensor is None or tensor.dtype != torch.float32 or tensor.dim() > 1:
        raise PlanError(f"the scale of {where!r} is not a float32 constant")
    if not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
        raise PlanError(f"the scale of {where!r} is not positive and finite")


def _check_step(plan: Plan, position: int, step: Step) -> None:
    if step.kind not in KINDS:
        raise PlanError(f"unknown kind {step.kind!r}")
    if not isinstance(step.args, tuple) or not isinstance(step.kwargs, dict) or not isinstance(step.params, dict):
        raise PlanError("its arguments are not a tuple and dicts")
    before = len(plan.inputs) + position
    _check_references(plan, (step.args, step.kwargs, step.params), before)
    if (step.kind == "function") != bool(step.target) or (step.target and resolve(step.target) is None):
        raise PlanError(f"function {step.target!r} is not one a plan may call")
    expected = _PARAMS[step.kind]
    names = {n.rstrip("?") for n in expected}
    missing = [n for n in expected if not n.endswith("?") and n not in step.params]
    if missing or set(step.params) - names:
        raise PlanError(f"parameters {sorted(step.params)}, expected {sorted(names)}")
    for name, kind in expected.items():
        value = step.params.get(name.rstrip("?"))
        if value is not None or not name.endswith("?"):
            _check_param(plan, name.rstrip("?"), kind, value)
    if step.kind == "group":
        _check_group(plan, step)
    if step.kind == "table":
        table = plan.constants[step.params["table"].name]
        if table.shape != (256,) or table.dtype != INTEGER_DTYPES[step.params["dtype"]]:
            raise PlanError("its table does not have 256 entries of its dtype")
    if step.kind in ("dequantize", "group", "operator", "table"):
        for ref in refs(step.args):
            if plan.values[ref.value].dtype not in INTEGER_DTYPES:
                raise PlanError(f"value %{ref.value} is not integers")


def _check_param(plan: Plan, name: str, kind: str, value: Any) -> None:
    ok = {
        "const": lambda: isinstance(value, Const),
        "integer dtype": lambda: value in INTEGER_DTYPES,
        "activation": lambda: value in (None, "relu", "relu6"),
        "operator": lambda: value in OPERATORS,
        "dict": lambda: isinstance(value, dict),
        "geometry": lambda: isinstance(value, dict) and Geometry(**value) is not None,
        "any": lambda: True,
    }[kind]()
    if not ok:
        raise PlanError(f"parameter {name!r} is not a valid {kind}: {value!r}")
    if name == "scale":
        _check_scale(plan, value.name, "its output")


def _check_group(plan: Plan, step: Step) -> None:
    walk = Geometry(**step.params["geometry"])
    tensors = {n: plan.constants[c.name] for n, c in step.params.items() if isinstance(c, Const)}
    weight, bias = tensors["weight"], tensors["bias"]
    sizes = (walk.kernel_size, walk.stride, walk.dilation, walk.output_padding)
    if (
        walk.dims not in (0, 1, 2, 3)
        or any(len(s) != walk.dims for s in sizes)
        or weight.dim() != (walk.dims + 2 if walk.dims else 2)
    ):
        raise PlanError("its geometry does not fit its weight")
    if walk.groups < 1 or any(s < 1 for s in (*walk.kernel_size, *walk.stride, *walk.dilation)):
        raise PlanError("its geometry is not one of a convolution")
    channels = weight.shape[walk.weight_axis] * (walk.groups if walk.transposed else 1)
    if weight.dtype != torch.int8 or bias.dtype != torch.int32 or bias.shape != (channels,):
        raise PlanError("its weight must be int8 and its bias int32, one per output channel")
    for name in ("m", "bound", "residual_ratio"):
        tensor = tensors.get(name)
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() not in (1, channels)):
            raise PlanError(f"{name} must be float32, one value or one per output channel")
    if len(step.args) != (2 if "residual_ratio" in tensors else 1):
        raise PlanError("a residual needs its ratio, and a ratio its residual")
    if ("scale" in step.params) != ("dtype" in step.params):
        raise PlanError("an output scale needs a dtype, and a dtype a scale")
