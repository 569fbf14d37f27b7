"""How a run's time grows with images and with pixels: measured, fitted with a line, and drawn; a part of benchmarks/cpu.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from _cpu_peers import Work

NETWORKS = ("resnet18", "centerface")
BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
SIDES = (128, 192, 256, 320, 384, 448, 512, 576, 640)
TURN_SECONDS = 0.02


@dataclass(frozen=True)
class Axis:
    """What grows: its unit, and the shapes of a network's inputs ``[N, C, H, W]`` along it."""

    unit: str
    label: str
    shapes: Callable[[Sequence[int]], list[tuple[int, ...]]]
    amount: Callable[[Sequence[int]], float]


AXES = {
    "batch": Axis(
        "image",
        "images in the batch",
        lambda image: [(n, *image) for n in BATCHES],
        lambda shape: shape[0],
    ),
    "pixels": Axis(
        "megapixel",
        "megapixels of one image",
        lambda image: [(1, image[0], side, side) for side in SIDES],
        lambda shape: shape[2] * shape[3] / 1e6,
    ),
}


def measure_scaling(work: Work, axis: str, rounds: int) -> dict[str, Any]:
    """Seconds per run on inputs that grow along `axis`, taking turns; a runner for each, so that none makes another's program go."""
    import torch

    from horizon_plugin_pytorch.utils.timing import take_turns

    assert work.network is not None
    shapes = AXES[axis].shapes(work.network.size)
    forwards: dict[str, Callable[[], Any]] = {}
    for i, shape in enumerate(shapes):
        runner = work.plan.compile("cpu", work.threads)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        forwards[str(i)] = lambda runner=runner, x=x: runner(x)  # type: ignore[misc]
    times = take_turns(forwards, rounds, TURN_SECONDS)
    return {"title": work.network.title, "axis": axis, "shapes": shapes, "seconds": [median(t) for t in times.values()]}


@dataclass(frozen=True)
class Line:
    """``seconds = constant + each · amount``, with the least squares of relative errors; `off` is the largest of these."""

    constant: float
    each: float
    off: float

    @classmethod
    def through(cls, amounts: Sequence[float], seconds: Sequence[float]) -> Line:
        t = np.asarray(seconds)
        a = np.stack((np.ones_like(t), np.asarray(amounts)), 1) / t[:, None]
        solution, *_ = np.linalg.lstsq(a, np.ones_like(t), rcond=None)
        return cls(float(solution[0]), float(solution[1]), float(np.abs(a @ solution - 1).max()))


def _points(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    return [AXES[result["axis"]].amount(shape) for shape in result["shapes"]], result["seconds"]


def section(results: Sequence[dict[str, Any]], picture: str) -> str:
    """The part of the document about it; `picture` is the path of the drawing from there."""
    if not results:
        return ""
    machines = ", ".join(sorted({r["machine"] for r in results}))
    lines = [
        "## Time against images and pixels",
        "",
        f"Of whole runs on {machines}, and the line with the least squares of relative errors. Pixels: square images of "
        f"{SIDES[0]}×{SIDES[0]} to {SIDES[-1]}×{SIDES[-1]}, one at a time; images: batches of {BATCHES[0]} to {BATCHES[-1]} of the network's own size.",
        "",
        f"![Time of a run against the images in a batch, and against the pixels of an image, with fitted lines]({picture})",
        "",
        "| network | against | threads | constant, ms | ms per image or megapixel | largest deviation from the line |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        line = Line.through(*_points(r))
        lines.append(
            f"| {r['title']} | {r['axis']} | {r['threads']} | {1e3 * line.constant:.2f} | {1e3 * line.each:.2f} | {line.off:.1%} |"
        )
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per axis, its measurements as dots and their lines; the picture's format is that of the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cpu-scaling"  # the same picture of the same numbers
    from matplotlib import pyplot

    panels = [axis for axis in AXES if any(r["axis"] == axis for r in results)]
    figure, places = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.9), layout="constrained", squeeze=False
    )
    for place, name in zip(places[0], panels, strict=True):
        axis = AXES[name]
        for r in (r for r in results if r["axis"] == name):
            amounts, seconds = _points(r)
            line = Line.through(amounts, seconds)
            ends = np.array([0, max(amounts)])
            constant = f"{1e3 * line.constant:.1f} ms + " if abs(line.constant) >= 5e-5 else ""
            label = f"{r['title']}, {r['threads']} threads: {constant}{1e3 * line.each:.1f} ms per {axis.unit}"
            (drawn,) = place.plot(ends, 1e3 * (line.constant + line.each * ends), linewidth=1)
            place.plot(amounts, 1e3 * np.asarray(seconds), "o", markersize=5, color=drawn.get_color(), label=label)
        place.set_xlabel(axis.label)
        place.set_ylabel("ms per run")
        place.set_xlim(left=0)
        place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        place.legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
