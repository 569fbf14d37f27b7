"""Running data through a prepared model to find its scales."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, FakeQuantState, set_fake_quantize


def arguments(model: nn.Module, item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model call from one item of data: a tensor, a tuple of arguments, a dict of keyword arguments, or a list as
    a DataLoader yields it, of which the model takes as many as its forward has arguments without default (labels are left out)."""
    if isinstance(item, dict):
        return (), item
    if isinstance(item, tuple):
        return item, {}
    if isinstance(item, list):
        return tuple(item[: _required(model)]), {}
    return (item,), {}


def _required(model: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters))


def batches(model: nn.Module, data: Iterable[Any], device: Any, progress: bool, title: str) -> Iterator[Any]:
    """``(args, kwargs)`` for every item of `data`, on `device`, with a progress bar.

    Raises:
        QuantizationError: there is no item, an item does not fit the model's forward, or a tensor holds NaN.
    """
    from rich.console import Console
    from rich.progress import track

    if isinstance(data, Tensor):
        raise QuantizationError(f"{title}: data is one tensor; give an iterable of inputs, e.g. [x] or a DataLoader")
    sized: Any = data
    total = len(sized) if hasattr(data, "__len__") else None
    count = 0
    for item in track(data, title, total, console=Console(stderr=True), disable=not progress, transient=True):
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments(model, item))
        _check_fit(model, args, kwargs, f"{title}: item {count} of the data")
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise QuantizationError(f"{title}: item {count} of the data holds NaN")
        yield args, kwargs
        count += 1
    if count == 0:
        raise QuantizationError(f"{title}: the data is empty")


def _check_fit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise QuantizationError(
            f"{what} does not fit the model's forward: {error}. An item is a tensor, a tuple of the model's arguments, a dict of "
            "keyword arguments, or a list, of which labels at the end are left out"
        ) from None


def device_of(model: nn.Module) -> torch.device:
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def calibrate(model: nn.Module, data: Iterable[Any], *, device: Any = None, progress: bool = True) -> nn.Module:
    """Observe `data` in eval mode and set every scale; leaves the model in eval mode and `FakeQuantState.VALIDATION`.

    Args:
        model: a prepared model; changed in place.
        data: an iterable of inputs or a DataLoader; an item is a tensor, a tuple of the model's arguments, a dict of keyword
            arguments, or a list whose first entries are the arguments (labels are ignored).
        device: where to run; by default where the model is.
        progress: show a bar.

    Returns:
        `model`.

    Raises:
        QuantizationError: the model is not prepared; the data is empty or holds NaN; an activation became NaN or infinite,
            naming the module. The model's scales and state are then as before.
    """
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    if not quantizers:
        raise QuantizationError(
            "calibrate: the model has no fake quantization: call prepare_qat or prepare_qat_fx first"
        )
    if device is not None:
        model.to(device)
    before = [(q, q.observer, q.scale.detach().clone(), q.dtype8) for q in quantizers]
    states = [(m, m.state) for m in model.modules() if isinstance(getattr(m, "state", None), FakeQuantState)]
    modes = [(m, m.training) for m in model.modules()]
    # What is kept must be usable in training, also if the caller is in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        try:
            for quantizer in quantizers:
                quantizer.observer = quantizer.fresh_observer()
            model.eval()
            set_fake_quantize(model, FakeQuantState.CALIBRATION)
            for args, kwargs in batches(model, data, device_of(model), progress, "calibrate"):
                model(*args, **kwargs)
            set_fake_quantize(model, FakeQuantState.VALIDATION)
        except BaseException:
            for quantizer, observer, scale, dtype8 in before:
                quantizer.observer, quantizer.dtype8 = observer, dtype8
                quantizer.store(scale)
            for module, state in states:
                module.state = state
            for module, mode in modes:
                module.training = mode
            raise
    return model
