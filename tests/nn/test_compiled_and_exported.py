"""Fused models under torch.compile, torch.export, autocast and functional transforms: no graph break, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusion.networks import differing, gradients, randomize, states_differ
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import absorb_bn, fuse_fx, fuse_modules, fuse_modules_qat


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.ff, self.relu2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), FloatFunctional(), nn.ReLU6()
        self.up, self.bn3 = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)
        self.seq = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.ff.add(x, self.bn2(self.conv2(x))))
        return self.seq(self.bn3(self.up(x)).flatten(2))


GROUPS = [["conv1", "bn1", "relu1"], ["conv2", "bn2", "ff", "relu2"], ["up", "bn3"], ["seq.0", "seq.1"]]
FUSERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "by name, absorbed": lambda m: fuse_modules(m, GROUPS),
    "by name, kept": lambda m: fuse_modules_qat(m, GROUPS),
    "by name, absorbed later": lambda m: absorb_bn(fuse_modules_qat(m, GROUPS)),
    "by graph, absorbed": fuse_fx,
    "by graph, kept": lambda m: fuse_fx(m, is_qat=True),
}
X = torch.randn(2, 3, 5, 5)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fuser", FUSERS)
def test_compiled_whole(fuser: str, backend: str) -> None:
    model = randomize(Net()).eval()
    fused = FUSERS[fuser](model)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert differing(compiled(X), model(X)) == 0


@pytest.mark.parametrize("fuser", ["by name, kept", "by graph, kept"])
def test_compiled_training_moves_statistics_and_gradients_the_same(fuser: str) -> None:
    model = randomize(Net()).train()
    fused = FUSERS[fuser](model)
    eager = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 5, 5)
        a, b = compiled(x), eager(x)
        assert differing(a, b) == 0
        for out in (a, b):
            out.square().sum().backward()
    assert all(differing(a, b) == 0 for a, b in zip(gradients(fused).values(), gradients(eager).values(), strict=True))
    for key, value in eager.state_dict().items():
        assert differing(fused.state_dict()[key].float(), value.float()) == 0, key


@pytest.mark.parametrize("fuser", FUSERS)
def test_exported(fuser: str) -> None:
    model = randomize(Net()).eval()
    fused = FUSERS[fuser](model)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(fused, (X,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for x in (X, torch.randn(7, 3, 5, 5)):
            assert differing(program.module()(x), model(x)) == 0
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any("batch_norm" in name for name in called) is fuser.endswith("kept")


def test_a_graph_with_optional_arguments_compiles() -> None:
    class Optional(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if mask is None else y * mask

    model = randomize(Optional()).eval()
    fused = fuse_fx(model)
    with torch.no_grad():
        assert differing(torch.compile(fused, fullgraph=True, backend="eager")(X), model(X)) == 0
        assert differing(torch.export.export(fused, (X,)).module()(X), model(X)) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_autocast(fuser: str) -> None:
    model = randomize(Net()).eval()
    fused = FUSERS[fuser](model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(X), model(X)
    assert actual.dtype == expected.dtype
    assert differing(actual.float(), expected.float(), tolerance=0.05) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_channels_last(fuser: str) -> None:
    model = randomize(Net()).eval().to(memory_format=torch.channels_last)
    fused = FUSERS[fuser](model)
    x = X.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert differing(fused(x), model(x)) == 0


@pytest.mark.parametrize("fuser", FUSERS)
def test_functional_call_with_its_own_parameters(fuser: str) -> None:
    model = randomize(Net()).eval()
    fused = FUSERS[fuser](model)
    tensors = {name: t.detach() * 2 for name, t in (*fused.named_parameters(), *fused.named_buffers())}
    actual = torch.func.functional_call(fused, tensors, (X,))
    doubled = copy.deepcopy(fused)
    with torch.no_grad():
        for t in (*doubled.parameters(), *doubled.buffers()):
            t.mul_(2)
        assert differing(actual, doubled(X), tolerance=0.0) == 0
    assert states_differ(fused, FUSERS[fuser](model)) == {}
