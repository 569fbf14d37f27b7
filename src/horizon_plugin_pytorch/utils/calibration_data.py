"""Calibration data from files: images in a folder, and NumPy's arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(Sequence[Tensor]):
    """Batches of the images in a folder and those below it, read when they are asked for.

    An image is scaled until it covers `size`, what is left over is cut off evenly on both sides, and each pixel becomes
    ``(pixel / 255 * white - mean) / std``. The last batch is filled up with the first images.

    Args:
        folder: in which ``.jpg``, ``.png`` and the like are looked for.
        size: height and width.
        batch: images per batch.
        most: how many images at most; of more, some from everywhere in their sorted list.
        white: what the brightest pixel is before `mean` and `std`: 1, or 255 for models that take bytes as they are.
        mean, std: one value, or one per channel.
        channels: 3 for color or 1 for gray.
        bgr: blue first instead of red.
        channels_last: ``[N, H, W, C]`` instead of ``[N, C, H, W]``.

    Raises:
        ValueError: there is no image, or an argument that does not fit the others.
        ImportError: Pillow is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        size: tuple[int, int],
        *,
        batch: int = 1,
        most: int | None = None,
        white: float = 1.0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        channels: int = 3,
        bgr: bool = False,
        channels_last: bool = False,
    ) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "to read images, Pillow is needed: pip install 'horizon_plugin_pytorch[onnx]'", name="PIL"
            ) from error
        if channels not in (1, 3):
            raise ValueError(f"images have 3 channels, or 1 for gray; the model takes {channels}: give arrays (.npy)")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name} needs one value, or {channels}: not {len(values)}")
        if any(s <= 0 for s in std):
            raise ValueError(f"std must be positive, not {', '.join(map(str, std))}")
        if batch < 1 or (most is not None and most < 1):
            raise ValueError("a batch, and the images to take, are at least 1")
        files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not files:
            raise ValueError(f"there is no image in {folder} (looked for: {' '.join(SUFFIXES)})")
        if most is not None and len(files) > most:
            files = [files[i * len(files) // most] for i in range(most)]
        self.files = files
        self.size, self.batch, self.channels, self.bgr = size, batch, channels, bgr
        self.white, self.channels_last = white, channels_last
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __getitem__(self, index: Any) -> Any:
        """float32 ``[batch, C, H, W]``."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} batches")
        first = index % len(self) * self.batch
        images = torch.stack([self._read(self.files[i % len(self.files)]) for i in range(first, first + self.batch)])
        return images.permute(0, 2, 3, 1).contiguous() if self.channels_last else images

    def _read(self, file: Path) -> Tensor:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB" if self.channels == 3 else "L")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        height, width = self.size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).view(height, width, self.channels).permute(2, 0, 1).float()
        pixels = pixels.flip(0) if self.bgr else pixels
        return (pixels / 255 * self.white - self.mean) / self.std


class ArrayFile(Sequence[Any]):
    """Batches of the arrays in a ``.npy`` or ``.npz`` file, taken as they are: the model's inputs, one row of each per example.

    Args:
        file: ``.npy`` for a model of one input; ``.npz`` with one array per input, of its name.
        inputs: the names of the model's inputs.
        batch: rows per batch; a last batch that is not full is left out if there is another.
        most: how many rows at most.

    An item is a tensor, or a tuple of one tensor per input.

    Raises:
        ValueError: the file holds no such arrays, or they are empty or have different numbers of rows.
    """

    def __init__(
        self, file: str | Path, inputs: Sequence[str] = ("x",), *, batch: int = 1, most: int | None = None
    ) -> None:
        try:
            loaded = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if isinstance(loaded, np.ndarray):
            arrays = [loaded]
        else:
            with loaded:
                arrays = self._by_name(file, loaded, inputs)
        if len(arrays) != len(inputs):
            raise ValueError(f"the model takes {', '.join(inputs)}: give an .npz file with one array of each name")
        if len({a.shape[:1] for a in arrays}) > 1 or arrays[0].ndim == 0 or len(arrays[0]) == 0:
            raise ValueError(
                f"{file}: the arrays need the same number of rows, at least one; they are {[a.shape for a in arrays]}"
            )
        self.arrays = [a[:most] for a in arrays]
        self.batch = min(batch, len(self.arrays[0]))

    @staticmethod
    def _by_name(file: Any, loaded: Any, inputs: Sequence[str]) -> list[np.ndarray]:
        if len(inputs) == len(loaded.files) == 1:
            return [loaded[loaded.files[0]]]
        missing = [name for name in inputs if name not in loaded.files]
        if missing:
            raise ValueError(f"{file} has no array {', '.join(missing)}; there are {', '.join(loaded.files)}")
        return [loaded[name] for name in inputs]

    def __len__(self) -> int:
        return max(1, len(self.arrays[0]) // self.batch)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} batches")
        first = index % len(self) * self.batch
        parts = tuple(_tensor(a[first : first + self.batch]) for a in self.arrays)
        return parts[0] if len(parts) == 1 else parts


def _tensor(rows: np.ndarray) -> Tensor:
    """Floating point of any precision as float32."""
    tensor = torch.from_numpy(np.ascontiguousarray(rows))
    return tensor.float() if tensor.is_floating_point() else tensor
