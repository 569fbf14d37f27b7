"""What `horizon quantize` is asked for: a float model, and data to calibrate it with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from horizon_plugin_pytorch.cli.model_spec import SpecError
from horizon_plugin_pytorch.demo.comparison import sqnr
from horizon_plugin_pytorch.plan import Plan
from horizon_plugin_pytorch.quantization.calibration import arguments
from horizon_plugin_pytorch.utils.calibration_data import ArrayFile, ImageFolder

_MOST_COMPARED = 4


def numbers(text: str, option: str) -> tuple[float, ...]:
    """The numbers in ``text``, e.g. ``0.485,0.456,0.406``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"{option} {text!r}: write one number, or one per channel with commas between") from None


def image_size(text: str) -> tuple[int, int]:
    """Height and width in ``text``: ``224`` or ``480,640``."""
    parts = text.split(",")
    if len(parts) > 2 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise SpecError(f"--size {text!r}: write HEIGHT,WIDTH, e.g. 480,640, or one number for a square")
    return int(parts[0]), int(parts[-1])


def open_data(
    model: nn.Module, path: Path, *, size: str | None, batch: int | None, most: int, **images: Any
) -> Sequence[Any]:
    """Batches to calibrate `model` with.

    Args:
        path: a folder of images, or a ``.npy`` or ``.npz`` file.
        size, batch: what the model's ONNX file declares, where they are left out.
        most: how many images or rows.
        images: how pixels become the input, see `ImageFolder`.

    Raises:
        SpecError: what is there is not data, or does not fit the model, or the size is not known.
    """
    declared = getattr(model, "onnx_inputs", ())
    if not path.exists():
        raise SpecError(f"there is no data at {path}")
    try:
        if path.is_dir():
            return _open_images(declared, path, size, batch, most, images)
        if path.suffix not in (".npy", ".npz"):
            raise SpecError(f"{path} is neither a folder of images nor a .npy or .npz file")
        names = [i.name for i in declared] or ["x"]
        rows = batch or next((i.shape[0] for i in declared if i.shape and i.shape[0]), 1)
        return ArrayFile(path, names, batch=rows, most=most)
    except ImportError as error:
        raise SpecError(str(error)) from error
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(str(error)) from error


def _open_images(
    declared: Sequence[Any], path: Path, size: str | None, batch: int | None, most: int, images: dict[str, Any]
) -> ImageFolder:
    layout: dict[str, Any] = {}
    own_size: tuple[int | None, ...] = (None, None)
    if declared:
        (first, *others) = declared
        if others or len(first.shape) != 4 or first.dtype != torch.float32:
            takes = ", ".join(f"{i.name}: {_type(i)}" for i in declared)
            raise SpecError(f"the model does not take images, but {takes}: give arrays, --data file.npz")
        last = first.shape[3] in (1, 3) and first.shape[1] not in (1, 3)
        channels = first.shape[3 if last else 1]
        layout = {"channels_last": last, "channels": 3 if channels is None else channels}
        own_size = first.shape[1:3] if last else first.shape[2:]
        batch = batch or first.shape[0]
    if size is None and None in own_size:
        raise SpecError(
            "say the size of the images: --size HEIGHT,WIDTH"
            + (f"; the file has {_type(declared[0])}" if declared else "")
        )
    height, width = own_size if size is None else image_size(size)
    assert height is not None and width is not None
    return ImageFolder(path, (height, width), batch=batch or 1, most=most, **layout, **images)


def _type(declared: Any) -> str:
    shape = "×".join("?" if n is None else str(n) for n in declared.shape)
    return f"{str(declared.dtype).removeprefix('torch.')} {shape}"


def check_runs(model: nn.Module, data: Sequence[Any]) -> None:
    """Raise SpecError if the model does not take the data."""
    args, kwargs = arguments(model, data[0])
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        shapes = " and ".join("×".join(map(str, x.shape)) for x in args)
        raise SpecError(f"the model does not run on the data, {shapes}: {type(error).__name__}: {error}") from error


def comparison(model: nn.Module, plan: Plan, data: Sequence[Any]) -> Table:
    """How near int8 comes to float, per output, on the first of the data."""
    runner = plan.compile()
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for item in data[:_MOST_COMPARED]:
        args, kwargs = arguments(model, item)
        with torch.no_grad():
            expected, actual = model(*args, **kwargs), runner(*args, **kwargs)
        found = zip(
            torch.utils._pytree.tree_flatten_with_path(expected)[0],
            torch.utils._pytree.tree_leaves(actual),
            strict=True,
        )
        for (path, a), b in found:
            if isinstance(a, Tensor) and a.is_floating_point():
                name = torch.utils._pytree.keystr(path) or "output"
                pairs.setdefault(name, []).append((a, b.dequantize() if hasattr(b, "dequantize") else b))
    table = Table("int8 against float, on data that calibration saw", "SQNR, dB", box=None)
    table.columns[1].justify = "right"
    for name, results in pairs.items():
        a, b = (torch.cat([r[i].flatten() for r in results]) for i in (0, 1))
        table.add_row(name, f"{sqnr(a, b):.1f}")
    return table
