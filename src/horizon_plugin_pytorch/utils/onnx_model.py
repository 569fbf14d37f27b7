"""A float ONNX file as a PyTorch module, for people who only have the file. onnx2torch converts it."""

from __future__ import annotations

import keyword
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

EXTRA = "pip install 'horizon_plugin_pytorch[onnx]'"


class OnnxError(ValueError):
    """A file that is no ONNX model, or one that cannot be converted; it names the operators."""


@dataclass(frozen=True)
class OnnxInput:
    """An input as the file declares it; None for a size that is left open."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


def load_onnx(path: str | Path) -> fx.GraphModule:
    """The model of an ONNX file, in eval mode and float32.

    Batch, height and width that the file declares are not enforced: whether others work is for its operators to say.

    Returns:
        a module whose arguments have the names of the file's inputs, as far as Python allows, and whose attribute `onnx_inputs` is a
        tuple of `OnnxInput`.

    Raises:
        OnnxError: it is not an ONNX file, or has operators that onnx2torch cannot convert, naming them.
        ImportError: onnx2torch is not installed.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        import onnx
        import onnx2torch
    except ImportError as error:
        raise ImportError(f"to read an ONNX file, {error.name} is needed: {EXTRA}", name=error.name) from error
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise OnnxError(f"{path} is not an ONNX file: {error}") from error
    if not proto.graph.node:
        raise OnnxError(f"{path} is not an ONNX file, or has no operator in it")
    inputs = _inputs(proto.graph)
    try:
        model: fx.GraphModule = onnx2torch.convert(str(path))
    except Exception as error:
        unknown = _not_convertible(proto)
        if unknown:
            raise OnnxError(f"{path}: onnx2torch cannot convert {unknown}") from error
        raise OnnxError(f"{path}: onnx2torch cannot convert it: {type(error).__name__}: {error}") from error
    _rename(model, [i.name for i in inputs])
    model = _looked_into(model)
    model.onnx_inputs = inputs  # type: ignore[assignment]
    return model.float().eval()


def _inputs(graph: Any) -> tuple[OnnxInput, ...]:
    """The inputs, without the weights that old files list among them."""
    from onnx import helper

    weights = {w.name for w in graph.initializer}
    found = []
    for value in graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
        dtype = torch.from_numpy(helper.tensor_dtype_to_np_dtype(tensor.elem_type).type([0])).dtype
        found.append(OnnxInput(value.name, shape, torch.float32 if dtype.is_floating_point else dtype))
    return tuple(found)


def _not_convertible(proto: Any) -> str:
    """The operators for which onnx2torch has no conversion, each with the node that comes first."""
    from onnx2torch.node_converters.registry import get_converter

    versions = {entry.domain: entry.version for entry in proto.opset_import}
    nodes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in proto.graph.node:
        try:
            get_converter(node.op_type, versions[node.domain], node.domain)
        except (NotImplementedError, KeyError):
            nodes[node.domain, node.op_type].append(node.name or (node.output[0] if node.output else ""))
    texts = []
    for (domain, name), where in nodes.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        texts.append(f"{domain + '.' if domain else ''}{name} (node {where[0]!r}{more}, opset {versions.get(domain)})")
    if any(name in ("QuantizeLinear", "DequantizeLinear", "QLinearConv") for _, name in nodes):
        texts.append("the file is quantized already: take the float one")
    return "; ".join(texts)


def _rename(model: fx.GraphModule, names: list[str]) -> None:
    """Give the forward's arguments the names of the file."""
    taken: set[str] = {node.name for node in model.graph.nodes if node.op != "placeholder"}
    for node, wanted in zip(model.graph.find_nodes(op="placeholder"), names, strict=True):
        name = re.sub(r"\W", "_", wanted)
        while keyword.iskeyword(name) or not name.isidentifier() or name in taken:
            name = f"_{name}"
        taken.add(name)
        node.target = node.name = name
    model.recompile()


class _Tracer(fx.Tracer):
    """Into onnx2torch's modules, such as one for GlobalAveragePool, down to the functions they call."""

    def __init__(self, whole: frozenset[str]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)


def _looked_into(model: fx.GraphModule) -> fx.GraphModule:
    """The model on PyTorch's modules and functions; modules that look at their data, or compute shapes, stay as they are."""
    whole = set()
    for name, module in model.named_children():
        try:
            fx.Tracer().trace(module)
        except Exception:  # whatever it does with a tensor that is none
            whole.add(name)
    try:
        return fx.GraphModule(model, _Tracer(frozenset(whole)).trace(model), type(model).__name__)
    except Exception:
        return model
