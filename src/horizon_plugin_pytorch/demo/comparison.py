"""How two forms of a network differ: in operators and in outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn


def count_operators(model: nn.Module) -> Counter[str]:
    """How often each operator stands in the model's graph: a module by its class, a function by its name.

    A module of PyTorch or a fused group is one operator; other modules are looked into.
    """
    graph = model.graph if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if type(module).__module__.startswith(("torch.nn.", "horizon_plugin_pytorch.")):
                counts[type(module).__name__] += 1
            else:
                counts.update(count_operators(module))
        elif node.op == "call_method":
            counts[str(node.target)] += 1
        elif node.op == "call_function":
            counts[node.target.__name__] += 1
    return counts


@dataclass(frozen=True)
class Difference:
    """How far ``other`` is from ``reference``: the largest difference, and the same relative to max |reference|."""

    absolute: float
    relative: float

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> Difference:
        reference, other = reference.double(), other.double()
        absolute = (reference - other).abs().max().item()
        return cls(absolute, absolute / reference.abs().max().item())


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: ``10 log10(sum reference^2 / sum (reference - other)^2)``."""
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))
