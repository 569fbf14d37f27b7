"""What each of two processes does with fused models; `test_ddp.py` starts them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import absorb_bn, fuse_fx, fuse_modules, fuse_modules_qat

WORLD = 2
GROUPS = [["conv1", "bn1", "relu1"], ["conv2", "bn2", "ff", "relu2"], ["fc", "bn3"]]


class Net(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.ff, self.relu2 = (
            nn.ConvTranspose2d(4, 4, 1, groups=2),
            norm(4),
            FloatFunctional(),
            nn.ReLU6(),
        )
        self.fc, self.bn3 = nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.ff.add(x, self.bn2(self.conv2(x))))
        return self.bn3(self.fc(x.mean((2, 3))))


def fusers() -> dict[str, Any]:
    return {
        "unfused": lambda m: m,
        "by name, kept": lambda m: fuse_modules_qat(m, GROUPS),
        "by graph, kept": lambda m: fuse_fx(m, is_qat=True),
        "by name, absorbed": lambda m: fuse_modules(m, GROUPS),
        "by graph, absorbed": fuse_fx,
    }


def train(model: nn.Module, rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    ddp = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(10 + rank)
    losses = []
    for _ in range(4):
        loss = ddp(torch.randn(4, 3, 6, 6, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {k: v.clone() for k, v in ddp.module.state_dict().items()}


def synchronized(fuse: Any, rank: int) -> tuple[str, Tensor]:
    """PyTorch synchronizes norms on accelerators only: in training it refuses a CPU tensor, in eval mode it computes."""
    torch.manual_seed(0)
    model = fuse(Net(nn.SyncBatchNorm).train())
    try:
        model(torch.zeros(2, 3, 6, 6))
        error = ""
    except ValueError as refused:
        error = str(refused)
    return error, model.eval()(torch.full((2, 3, 6, 6), 1.0 + rank)).detach()


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, fuse in fusers().items():
        torch.manual_seed(0)
        model = fuse(Net())
        losses, state = train(model, rank)
        absorbed = absorb_bn(model.eval())(torch.ones(2, 3, 6, 6)).detach()
        results[name] = {"losses": losses, "state": state, "absorbed": absorbed, "sync": synchronized(fuse, rank)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
