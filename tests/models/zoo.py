"""The networks the fusion is tested and measured on: how to list, build, feed and randomize them.

Two libraries: every classification, segmentation and detection network of torchvision, and every fourth of
pytorchcv's architectures, sorted by name. All are built without pretrained weights. An entry is addressed by
``library/name``, e.g. ``torchvision/resnet18``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

PYTORCHCV_STEP = 4
TORCHVISION_PACKAGES = ("", "segmentation", "detection")

# The side lengths tried for a network that takes images, before its own: the smallest that the network runs at is used.
SMALL_SIDES = (64, 96, 128)


@dataclass(frozen=True)
class Recipe:
    """How a network is built and fed, where that differs from the rule of its library."""

    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to the builder
    small_kwargs: dict[str, Any] = field(default_factory=dict)  # besides these, for the network that takes small images
    small: tuple[int, int] | None = None  # (height, width) of the smallest useful image; None: found by trying
    native: tuple[int, int] | None = None  # (height, width) the network was made for, where it does not say
    input: Literal["images", "list of images", "grey image", "spectra"] = "images"
    dtype: torch.dtype = torch.float64  # that it can be compared in


# Detection: no threshold on the score, otherwise a random network detects nothing and two empty lists are compared; and
# few proposals, as each costs as much as a small image.
_RESIZE = dict(min_size=96, max_size=128)
_FEW = dict(box_detections_per_img=10, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20)
_RCNN = Recipe(dict(box_score_thresh=0.0), _RESIZE | _FEW, (96, 128), (320, 320), "list of images")
_ONE_STAGE = Recipe(dict(score_thresh=0.0, topk_candidates=50), _RESIZE, (96, 128), (320, 320), "list of images")
_SSD = Recipe(dict(score_thresh=0.0, topk_candidates=50), {}, (96, 128), (320, 320), "list of images")
_AUDIO = Recipe(dict(from_audio=False), {}, (64, 96), (64, 400), "spectra")
_SIZED = Recipe(small_kwargs=dict(in_size=(96, 96)), small=(96, 96))  # upsamples or pools to a size given when built

# The first entry whose key starts the network's name.
RECIPES: dict[str, Recipe] = {
    "torchvision/fasterrcnn": _RCNN,
    "torchvision/maskrcnn": _RCNN,
    "torchvision/keypointrcnn": _RCNN,
    "torchvision/retinanet": _ONE_STAGE,
    "torchvision/fcos": _ONE_STAGE,
    "torchvision/ssd": _SSD,
    "torchvision/vit_h_14": Recipe(small_kwargs=dict(image_size=56), small=(56, 56)),
    "torchvision/vit": Recipe(small_kwargs=dict(image_size=64), small=(64, 64)),
    "torchvision/maxvit": Recipe(small=(224, 224)),
    "torchvision/inception_v3": Recipe(dict(init_weights=False), small=(96, 96), native=(299, 299)),
    "torchvision/googlenet": Recipe(dict(init_weights=False)),
    "pytorchcv/jasper": _AUDIO,
    "pytorchcv/quartznet": _AUDIO,
    # Samples its descriptors at float32 points.
    "pytorchcv/superpointnet": Recipe(small=(128, 128), input="grey image", dtype=torch.float32),
    **{
        f"pytorchcv/{family}": _SIZED
        for family in ("danet", "deeplabv3", "fcn8sd", "pspnet", "icnet", "fastscnn", "linknet", "unet", "erfnet")
    },
    "pytorchcv/centernet": Recipe(small_kwargs=dict(in_size=(64, 64)), small=(64, 64)),
}


def torchvision_names() -> list[str]:
    """The classification, segmentation and detection networks torchvision registers, quantized ones left out."""
    import torchvision.models as tvm

    modules = [getattr(tvm, package) if package else tvm for package in TORCHVISION_PACKAGES]
    return sorted(name for module in modules for name in tvm.list_models(module=module))


def pytorchcv_names(step: int = PYTORCHCV_STEP) -> list[str]:
    """Every ``step``-th of pytorchcv's architectures, sorted by name."""
    from pytorchcv.model_provider import _models

    return sorted(_models)[::step]


def names() -> list[str]:
    """Every network, as ``library/name``."""
    return [f"torchvision/{n}" for n in torchvision_names()] + [f"pytorchcv/{n}" for n in pytorchcv_names()]


def recipe(name: str) -> Recipe:
    """What is special about building and feeding the network."""
    return next((r for key, r in RECIPES.items() if name.startswith(key)), Recipe())


def build(name: str, seed: int = 0, *, native: bool = False) -> nn.Module:
    """The network in eval mode, float32, randomly initialized; made for small images unless ``native``."""
    library, short = name.split("/")
    options = recipe(name).kwargs | ({} if native else recipe(name).small_kwargs)
    seed_everything(seed)
    if library == "torchvision":
        import torchvision.models as tvm

        kwargs: dict[str, Any] = dict(weights=None) | options
        if short in tvm.list_models(module=tvm.segmentation) + tvm.list_models(module=tvm.detection):
            kwargs["weights_backbone"] = None
        model = tvm.get_model(short, **kwargs)
    else:
        from pytorchcv.model_provider import get_model

        model = get_model(short, pretrained=False, **options)
    wake(model)
    return model.eval()


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Gives every parameter that starts as all zeros (a bias, a transformer's head) small normal values in place, so
    that an output cannot agree because it is zero."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.normal_(0, 0.05)


def seed_everything(seed: int) -> None:
    """Seeds what a network may draw from while it is built or run."""
    random.seed(seed)
    torch.manual_seed(seed)


def native_size(name: str, model: nn.Module) -> tuple[int, int]:
    """(height, width) the network was made for; 224 × 224 where neither the table nor the network says."""
    size = recipe(name).native or getattr(model, "in_size", None) or (224, 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def example_inputs(
    name: str, size: tuple[int, int], *, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Any, ...]:
    """Normally distributed arguments for the network, by its recipe: images [batch, 3, height, width], a list of
    images [3, height, width], one grey image [1, 1, height, width], or mel spectra [batch, height, width] (bands and
    frames) with their lengths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    match recipe(name).input:
        case "list of images":
            return ([normal(3, *size).sigmoid() for _ in range(batch)],)
        case "spectra":
            return normal(batch, *size), torch.tensor([size[1] - 16 * (i % 2) for i in range(batch)])
        case "grey image":
            return (normal(1, 1, *size),)
        case _:
            return (normal(batch, 3, *size),)


def candidate_sizes(name: str, model: nn.Module) -> Iterator[tuple[int, int]]:
    """(height, width) to try, small ones first: many networks end in a pooling window that asks for their own size."""
    known = recipe(name).small
    if known is not None:
        yield known
        return
    height, width = native_size(name, model)
    for side in SMALL_SIDES:
        if side < min(height, width):
            yield (side, side)
    yield (height, width)


@torch.no_grad()
def prepare(name: str, model: nn.Module, *, batch: int = 2, seed: int = 0) -> tuple[tuple[Any, ...], Any]:
    """Randomizes the norms of ``model`` at the smallest image it runs at; its arguments, and its output for them.

    Raises what the network raises at its own size, where it runs at none.
    """
    sizes = list(candidate_sizes(name, model))
    for size in sizes:
        inputs = example_inputs(name, size, batch=batch, dtype=next(model.parameters()).dtype)
        try:
            randomize_bn(model, inputs, seed=seed)
            seed_everything(seed)
            return inputs, model(*inputs)
        except (RuntimeError, ValueError, AssertionError):
            if size == sizes[-1]:
                raise
    raise AssertionError("unreachable")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes with running statistics, whichever library it comes from."""
    from torchvision.ops.misc import FrozenBatchNorm2d

    return isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d))


@torch.no_grad()
def randomize_bn(model: nn.Module, inputs: Sequence[Any], seed: int = 0) -> None:
    """Gives each norm random statistics and affine values that keep a deep network's activations in range.

    In one forward, before a norm runs, its mean and variance are set to those of what reaches it, jittered by up to
    half a standard deviation and a factor of 2; so each norm's output is near gamma · N(0, 1) + beta however deep it
    sits. gamma is drawn from ±[0.5, 1.5] (a quarter negative, one channel in sixteen zero), beta from N(0, 0.25).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).to(like)

    def set_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].detach()
        mean, var = norm.running_mean, norm.running_var
        if mean is None or var is None or norm in seen:
            return
        seen.add(norm)
        channels_last = x.transpose(0, 1).reshape(x.shape[1], -1)
        spread = channels_last.var(dim=1, correction=0)
        # A channel that is dead here, or seen through a pixel or two (after global pooling), has no variance to speak of;
        # scaled up to 1 it would amplify rounding from norm to norm until nothing could be compared.
        spread = spread + 0.1 * x.var(correction=0) + 1e-3
        mean.copy_(channels_last.mean(dim=1) + spread.sqrt() * uniform(mean, -0.5, 0.5))
        var.copy_(spread * uniform(var, 0.5, 2.0))
        if norm.weight is not None:
            gamma = uniform(norm.weight, 0.5, 1.5)
            gamma[uniform(gamma, 0, 1) < 0.25] *= -1
            gamma[uniform(gamma, 0, 1) < 1 / 16] = 0
            norm.weight.copy_(gamma)
        if norm.bias is not None:
            norm.bias.copy_(0.5 * torch.randn(norm.bias.shape, generator=generator, dtype=torch.float64))

    seen: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(set_statistics) for m in model.modules() if is_norm(m)]
    try:
        seed_everything(seed)
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a nested output, in order; a dict's by its own order, an object's by its attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in flatten(item)]
    return []


def is_informative(outputs: Sequence[Tensor]) -> str | None:
    """Why these outputs would make a comparison prove nothing; None where they are fit for one."""
    floats = [t for t in outputs if t.is_floating_point() and t.numel()]
    if not floats:
        return "no output has a floating-point element"
    for i, t in enumerate(floats):
        if not torch.isfinite(t).all():
            return f"output {i} is not finite"
    if all(t.numel() == 1 or t.std().item() <= 1e-9 * max(t.abs().max().item(), math.ulp(0.0)) for t in floats):
        return "every output is constant"
    return None
