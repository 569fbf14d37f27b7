"""``fuse_fx`` on real networks: same output, everything legal absorbed, every miss with its reason.

A small network of each kind always runs; all the others of the list run with ``-m slow``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import zoo
from models.verify import verify

pytest.importorskip("torchvision")
pytest.importorskip("pytorchcv")

SMALL = (
    # torchvision
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/googlenet",
    "torchvision/inception_v3",
    "torchvision/densenet121",
    "torchvision/efficientnet_b0",
    "torchvision/regnet_y_400mf",
    "torchvision/mnasnet0_5",
    "torchvision/squeezenet1_1",
    "torchvision/convnext_tiny",  # no batch norm at all
    "torchvision/vit_b_32",
    "torchvision/swin_t",
    "torchvision/deeplabv3_mobilenet_v3_large",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/fcn_resnet50",
    "torchvision/ssdlite320_mobilenet_v3_large",  # detection: cannot be traced as a whole
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    # pytorchcv
    "pytorchcv/preresnet18_wd2",  # norms before convolutions
    "pytorchcv/seresnet10",
    "pytorchcv/shufflenet_g4_w1",  # channel shuffle
    "pytorchcv/sharesnet34",  # convolutions shared between norms
    "pytorchcv/dpn68b",  # dual path
    "pytorchcv/ibn_resnet50",  # half of a norm's channels are normalized per instance
    "pytorchcv/linknet_cityscapes",  # transposed convolutions
    "pytorchcv/diaresnet20_cifar10",
    "pytorchcv/resnet20_svhn",
    "pytorchcv/revnet110",  # its convolutions are called by an autograd.Function
    "pytorchcv/wrn20_10_32bit_cifar10",  # a convolution with a computed weight
    "pytorchcv/dicenet_wd5",  # parts of it branch on shapes
    "pytorchcv/mixnet_m",
)
DOES_NOT_RUN: tuple[str, ...] = ()


def check(name: str) -> None:
    verdict = verify(name)
    assert (verdict.unfused_error is not None) == (name in DOES_NOT_RUN), verdict.unfused_error
    assert not verdict.problems, f"{len(verdict.problems)} problems:\n" + "\n".join(verdict.problems[:20])


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SMALL)
def test_small_network(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [n for n in zoo.names() if n not in SMALL])
def test_network(name: str) -> None:
    check(name)


def freeze(model: nn.Module) -> nn.Module:
    """Swaps every batch norm for torchvision's FrozenBatchNorm2d, as its detection networks do once trained."""
    from torchvision.ops.misc import FrozenBatchNorm2d

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FrozenBatchNorm2d(child.num_features, child.eps).to(child.weight))
    return model


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/fasterrcnn_resnet50_fpn"])
def test_frozen_batch_norm(name: str) -> None:
    verdict = verify(name, convert=freeze)
    assert not verdict.problems, verdict.problems[:20]
    assert verdict.legal == {"torchvision/resnet18": 20, "torchvision/fasterrcnn_resnet50_fpn": 53}[name]


def test_list_is_what_it_claims() -> None:
    import torchvision.models as tvm

    names = zoo.names()
    assert len(names) == len(set(names))
    assert sum(n.startswith("pytorchcv/") for n in names) >= 200
    expected = {n for m in (tvm, tvm.segmentation, tvm.detection) for n in tvm.list_models(module=m)}
    assert {n.removeprefix("torchvision/") for n in names if n.startswith("torchvision/")} == expected
    assert set(SMALL) <= set(names) and set(DOES_NOT_RUN) <= set(names)
