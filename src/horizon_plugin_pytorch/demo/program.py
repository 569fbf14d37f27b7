"""The program of ``horizon demo``: fuse a trained network, quantize it, run it, and say what that changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.demo import openvino
from horizon_plugin_pytorch.demo.centerface import (
    OUTPUTS,
    calibration_photos,
    decode,
    load_centerface,
    load_photo,
    to_input,
)
from horizon_plugin_pytorch.demo.comparison import Difference, count_operators, sqnr
from horizon_plugin_pytorch.demo.picture import draw, side_by_side
from horizon_plugin_pytorch.utils.timing import take_turns

if TYPE_CHECKING:
    from rich.console import Console

FLOAT, FUSED, INT8 = "PyTorch float32", "PyTorch float32, fused", "this package, int8"


def run(path: Path, *, repeats: int, console: Console) -> None:
    """Fuse CenterFace, quantize it, print what that changed, and write the photo with the faces that float and int8 find.

    The int8 network runs on the CPU kernels where they were built, otherwise on the reference, and what is printed says which. PyTorch and,
    where it is installed, OpenVINO take turns with it on the same image with the same number of threads.

    Args:
        path: where to write the picture; its suffix says in which format.
        repeats: how many rounds the times are medians of.
        console: where to print.
    """
    import horizon_plugin_pytorch as horizon

    threads = torch.get_num_threads()
    model, photo = load_centerface(), load_photo()
    image, calibration = to_input(photo), [to_input(p) for p in calibration_photos()]
    fused = horizon.quantization.fuse_fx(model, example_inputs=(image,))
    int8 = horizon.quantize(model, calibration)
    plan = horizon.plan.record(int8, image)
    runner = plan.compile("auto", threads)
    detectors: dict[str, openvino.Detector] = {INT8: runner, FLOAT: model, FUSED: fused}
    missing = None
    try:
        detectors |= openvino.detectors(model, calibration, image, threads)
    except openvino.NotInstalledError as error:
        missing = str(error)
    with torch.inference_mode():
        outputs = {name: [y.clone() for y in detector(image)] for name, detector in detectors.items()}
        expected = plan.compile("reference")(image)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(fused.fusion_report.to_text(width=console.width))
    _print_operators(console, {"unfused": model, "fused": fused})
    differences = map(Difference.between, outputs[FLOAT], outputs[FUSED])
    _print_table(
        console,
        "Largest difference between fused and unfused, float32",
        ("output", "absolute", "relative to the largest value"),
        [(name, f"{d.absolute:.2e}", f"{d.relative:.2e}") for name, d in zip(OUTPUTS, differences, strict=True)],
    )
    say(int8.quantization_report.to_text(width=console.width))
    say(runner.report)
    differing = sum(int((a != b).sum()) for a, b in zip(outputs[INT8], expected, strict=True))
    elements = sum(y.numel() for y in expected)
    say(f"{differing} of {elements} output elements differ between the {runner.backend} backend and the reference")
    quantized = [name for name in outputs if name.endswith("int8")]
    _print_table(
        console,
        "SQNR in dB against float32, calibrated on five other photos",
        ("output", *quantized),
        [
            (output, *(f"{sqnr(outputs[FLOAT][i], outputs[name][i]):.1f}" for name in quantized))
            for i, output in enumerate(OUTPUTS)
        ],
    )
    faces = {name: decode(output) for name, output in outputs.items()}
    _print_table(
        console,
        "Faces",
        ("", "found", "scores"),
        [(name, str(len(found)), " ".join(f"{f.score:.4f}" for f in found)) for name, found in faces.items()],
    )
    times = latencies(detectors, image, repeats)
    _print_table(
        console,
        f"Time per image of {photo.shape[1]}×{photo.shape[0]} pixels, threads: {threads}, median of {repeats} rounds "
        "(in float a group runs its operators in turn; what fusing saves there is the batch norms)",
        ("", "ms", "ratio to the first"),
        [(name, f"{1e3 * seconds:.2f}", f"{ratio:.2f}") for name, (seconds, ratio) in times.items()],
    )
    if missing:
        say(f"OpenVINO is not compared: {missing}")
    captions = {FLOAT: "float32", INT8: "int8"}
    side_by_side(
        [
            draw(photo, faces[name], f"{caption}: {1e3 * times[name][0]:.1f} ms, threads: {threads}")
            for name, caption in captions.items()
        ]
    ).save(path)
    say(f"The faces are drawn in {path}")


def latencies(
    detectors: Mapping[str, openvino.Detector], image: Tensor, repeats: int
) -> dict[str, tuple[float, float]]:
    """Seconds per image, and the ratio to the first detector's: medians over the rounds of each.

    Modules of PyTorch get the image channels-last, which is what their convolutions compute in and the faster way to run them.
    """
    last = image.contiguous(memory_format=torch.channels_last)
    forwards: dict[str, Callable[[], Any]] = {}
    for name, detector in detectors.items():
        if isinstance(detector, nn.Module):
            detector.to(memory_format=torch.channels_last)
        x = last if isinstance(detector, nn.Module) else image
        forwards[name] = partial(detector, x)
    with torch.inference_mode():
        turns = torch.tensor(list(take_turns(forwards, repeats).values()), dtype=torch.float64)
    seconds, ratios = (t.quantile(0.5, dim=1).tolist() for t in (turns, turns / turns[0]))
    return dict(zip(detectors, zip(seconds, ratios, strict=True), strict=True))


def _print_operators(console: Console, models: Mapping[str, nn.Module]) -> None:
    operators = {name: count_operators(model) for name, model in models.items()}
    kinds = sorted(set().union(*operators.values()))
    rows = [(kind, *(str(count[kind] or "") for count in operators.values())) for kind in kinds]
    rows.append(("all", *(str(count.total()) for count in operators.values())))
    _print_table(console, "Operators", ("", *operators), rows)


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
