"""The networks of benchmarks/cpu.py: weights at random, norms as trained ones have them, and data to calibrate and run on.

CenterFace alone is trained. What a network computes does not matter here, only that no layer's values are all alike or out of range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Pose(nn.Module):
    """Heatmaps of 17 joints: ResNet-18, then three transposed convolutions (Xiao et al., "Simple Baselines for Human Pose Estimation
    and Tracking", 2018, https://arxiv.org/abs/1804.06208)."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.backbone = nn.Sequential(*list(resnet18().children())[:-2])
        layers: list[nn.Module] = []
        for channels in (512, 256, 256):
            up = nn.ConvTranspose2d(channels, 256, 4, stride=2, padding=1, bias=False)
            layers += [up, nn.BatchNorm2d(256), nn.ReLU()]
        self.up = nn.Sequential(*layers)
        self.head = nn.Conv2d(256, 17, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.backbone(x)))


class UNet(nn.Module):
    """Two 3x3 convolutions per scale; what a transposed convolution brings back up is added to the skip connection."""

    def __init__(self, channels: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, after in zip((3, *channels), channels, strict=False):
            self.down.append(self._twice(before, after))
        for deep, shallow in zip(reversed(channels), reversed(channels[:-1]), strict=False):
            up = nn.ConvTranspose2d(deep, shallow, 2, stride=2, bias=False)
            self.up.append(nn.Sequential(up, nn.BatchNorm2d(shallow)))
            self.merge.append(self._twice(shallow, shallow))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(channels[0], 2, 1)

    @staticmethod
    def _twice(before: int, after: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for i, down in enumerate(self.down):
            x = down(self.pool(x) if i else x)
            levels.append(x)
        for up, merge, level in zip(self.up, self.merge, reversed(levels[:-1]), strict=True):
            x = merge(torch.relu(up(x) + level))
        return self.head(x)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name)

    return build


def _centerface() -> nn.Module:
    from horizon_plugin_pytorch import demo

    return demo.load_centerface()


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        size: channels, height and width of its input.
        mean, deviation: of the random normal input.
        trained: it comes with weights and statistics.
    """

    title: str
    size: tuple[int, int, int]
    make: Callable[[], nn.Module]
    mean: float = 0.0
    deviation: float = 1.0
    trained: bool = False

    def inputs(self, batch: int, seed: int) -> Tensor:
        """float32 ``[batch, *size]``, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *self.size), generator=generator) * self.deviation + self.mean

    def calibration(self) -> list[Tensor]:
        return [self.inputs(2, seed) for seed in (1, 2)]

    def build(self) -> nn.Module:
        """In eval mode, the same every time."""
        torch.manual_seed(0)
        model = self.make()
        return model.eval() if self.trained else with_statistics(model, self.inputs(4, 3))


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Norms that are not all alike, and the statistics that belong to them."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = None  # statistics of the whole data, not a moving average
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(x)
    return model.eval()


NETWORKS = {
    "resnet18": Network("ResNet-18", (3, 224, 224), _torchvision("resnet18")),
    "resnet50": Network("ResNet-50", (3, 224, 224), _torchvision("resnet50")),
    "mobilenet_v2": Network("MobileNetV2", (3, 224, 224), _torchvision("mobilenet_v2")),
    "centerface": Network("CenterFace 512", (3, 512, 512), _centerface, 128.0, 64.0, trained=True),
    "pose": Network("ConvTranspose pose decoder", (3, 256, 192), Pose),
    "unet": Network("U-Net", (3, 256, 256), UNet),
}
