"""The same network in OpenVINO, for comparison: in floating point, and quantized with NNCF on the same photos."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

Detector = Callable[[Tensor], Sequence[Tensor]]


class NotInstalledError(ImportError):
    """OpenVINO or NNCF is not there."""


def detectors(model: nn.Module, calibration: Sequence[Tensor], image: Tensor, threads: int) -> dict[str, Detector]:
    """The network as OpenVINO runs it on the CPU: float32, bfloat16 where the processor has it, and int8.

    Args:
        model: in eval mode.
        calibration: inputs for NNCF, shaped like `image`.
        image: the input that the detectors will take, or another one of its shape.
        threads: to compute with.

    Raises:
        NotInstalledError: see there.
    """
    try:
        with _quiet():
            import nncf
            import openvino
    except ImportError as error:
        raise NotInstalledError(f"{error.name or error} is not installed (pip install openvino nncf)") from error
    with _quiet():
        floats = openvino.convert_model(model, example_input=image, input=[list(image.shape)])
        int8 = nncf.quantize(floats, nncf.Dataset(calibration, Tensor.numpy), subset_size=len(calibration))
    core = openvino.Core()
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # What NNCF leaves in float may be computed in bfloat16, as OpenVINO does by default.
    forms = {
        "OpenVINO float32": (floats, "f32"),
        **({"OpenVINO bfloat16": (floats, "bf16")} if bf16 else {}),
        "OpenVINO int8": (int8, "bf16" if bf16 else "f32"),
    }
    return {name: _detector(core, form, precision, threads) for name, (form, precision) in forms.items()}


def _detector(core: Any, model: Any, precision: str, threads: int) -> Detector:
    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def detect(image: Tensor) -> Sequence[Tensor]:
        """The outputs are overwritten by the next call."""
        results = request.infer([image.numpy()], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(array) for array in results.values()]

    return detect


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars, logs and warnings of converting and quantizing."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
