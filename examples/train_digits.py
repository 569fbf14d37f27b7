"""From a float network to int8, on handwritten digits: quantized after training, and trained with quantization.

Two networks learn from scikit-learn's digits (1797 images of 8x8): a residual classifier with ReLU6, and a denoiser whose
decoder up-samples with ConvTranspose + BN + Add + ReLU. Each is trained in float, then becomes int8 in two ways:

    PTQ   horizon.quantize: calibrated on training images, not trained again
    QAT   prepare_qat_fx, calibrate, train a little more with quantization, convert_fx

    python examples/train_digits.py                              # three seeds; about a minute
    torchrun --nproc-per-node 2 examples/train_digits.py         # the same in two processes

Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.quantization import (
    FakeQuantState,
    calibrate,
    convert_fx,
    prepare_qat_fx,
    set_fake_quantize,
)

TRAINING_IMAGES = 1000
BATCH = 64
NOISE = 0.25  # standard deviation, for pixels in [0, 1]


# -- the two networks --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions and a way around them; the last norm starts at zero, so that the block starts as the way around."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn2.weight)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv1(x)))
        return F.relu6(self.bn2(self.conv2(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """Images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.blocks = nn.Sequential(Residual(16, 32, 2), Residual(32, 64, 2))
        self.classify = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.stem(x)).mean((2, 3)))


class Denoiser(nn.Module):
    """Noisy images ``[N, 1, 8, 8]`` to clean ones; what the encoder saw at a resolution is added when the decoder gets there."""

    def __init__(self) -> None:
        super().__init__()
        self.down0 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down1 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.up1, self.bn1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.BatchNorm2d(32)
        self.up0, self.bn0 = nn.ConvTranspose2d(32, 16, 2, 2), nn.BatchNorm2d(16)
        self.image = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.down0(x)
        half = self.down1(full)
        y = F.relu(self.bn1(self.up1(self.down2(half))) + half)
        y = F.relu(self.bn0(self.up0(y)) + full)
        return self.image(y)


# -- the two tasks -----------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What a network learns.

    Args:
        inputs, targets: one row per image; the first `TRAINING_IMAGES` are for training.
        score: of outputs for targets, higher is better.
    """

    title: str
    network: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def psnr(images: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(images, clean).log10().item()


def tasks() -> list[Task]:
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)  # the same split and the same noise in every run
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16
    labels = torch.from_numpy(digits.target)[order]
    noisy = images + NOISE * torch.randn(images.shape, generator=generator)
    return [
        Task("Classifier, accuracy in %", Classifier, images, labels, F.cross_entropy, accuracy),
        Task("Denoiser, PSNR in dB", Denoiser, noisy, images, F.mse_loss, psnr),
    ]


# -- training, in one process or several -------------------------------------------------------------------------------


def batches(task: Task, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch of an epoch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = torch.randperm(TRAINING_IMAGES, generator=torch.Generator().manual_seed(epoch))
    for batch in order[: TRAINING_IMAGES // BATCH * BATCH].split(BATCH):
        share = batch[rank::world]
        yield task.inputs[share], task.targets[share]


def train(model: nn.Module, task: Task, epochs: int, rate: float) -> None:
    """Adam with a learning rate that falls to zero; leaves the model in eval mode."""
    model.train()
    network = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    for epoch in range(epochs):
        for inputs, targets in batches(task, epoch):
            loss = task.loss(network(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    return task.score(model(task.inputs[TRAINING_IMAGES:]), task.targets[TRAINING_IMAGES:])


# -- float, PTQ, QAT ---------------------------------------------------------------------------------------------------


def run(task: Task, seed: int, epochs: int, qat_epochs: int) -> list[float]:
    """Scores of the float network, of PTQ's int8 network and of QAT's."""
    torch.manual_seed(seed)
    model = task.network()
    train(model, task, epochs, 3e-3)
    calibration = list(task.inputs[:TRAINING_IMAGES].split(BATCH))

    ptq = horizon.quantize(model, calibration, progress=False)

    qat = prepare_qat_fx(model, example_inputs=calibration[0])
    calibrate(qat, calibration, progress=False)
    set_fake_quantize(qat, FakeQuantState.QAT)
    train(qat, task, qat_epochs, 3e-4)
    int8 = convert_fx(qat)

    return [evaluate(network, task) for network in (model, ptq, int8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how often to train each network")
    parser.add_argument("--epochs", type=int, default=30, help="of float training")
    parser.add_argument("--qat-epochs", type=int, default=10, help="of training with quantization")
    options = parser.parse_args()

    torch.set_num_threads(1)  # these networks are too small to be shared among threads
    distributed = "RANK" in os.environ  # torchrun sets it
    if distributed:
        dist.init_process_group("gloo")
    show: Callable[[str], None] = print if not distributed or dist.get_rank() == 0 else lambda line: None
    for task in tasks():
        show(f"\n{task.title}\n{'seed':>6}{'float':>10}{'PTQ int8':>10}{'QAT int8':>10}")
        rows = [run(task, seed, options.epochs, options.qat_epochs) for seed in range(options.seeds)]
        mean = torch.tensor(rows).mean(0).tolist()
        for name, row in [*enumerate(rows), ("mean", mean)]:
            show(f"{name:>6}" + "".join(f"{score:>10.2f}" for score in row))
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
