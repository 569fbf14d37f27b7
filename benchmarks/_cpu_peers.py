"""Who takes part in benchmarks/cpu.py: this package and its peers, each as a function that builds a forward.

A peer imports what it needs when it is built; what is not installed is an ImportError there. Quantized models are kept in the work's
folder, so that they are made once for all batches and threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _cpu_measure import Forward
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.plan import Plan

if TYPE_CHECKING:
    from _networks import Network


@dataclass
class Work:
    """What every candidate runs: a network at a batch size, with a number of threads.

    Attributes:
        folder: of files that are made once.
        isa: cap of the instruction set, or None.
        network: None where there are only files (`cpu.py packed`).
    """

    folder: Path
    batch: int
    threads: int
    isa: str | None = None
    network: Network | None = None

    def float_model(self) -> nn.Module:
        assert self.network is not None
        return self.network.build()

    def calibration(self) -> list[Tensor]:
        assert self.network is not None
        return self.network.calibration()

    @cached_property
    def x(self) -> Tensor:
        if self.network is not None:
            return self.network.inputs(self.batch, seed=5)
        shape = self.plan.values[0].shape[1:]
        return torch.randn((self.batch, *shape), generator=torch.Generator().manual_seed(5))

    @cached_property
    def plan(self) -> Plan:
        return horizon.plan.load(self.made("plan.safetensors", self._save_plan))

    @cached_property
    def unfused_plan(self) -> Plan:
        return horizon.plan.load(self.made("unfused.safetensors", self._save_unfused_plan))

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The file of that name; made where it is missing, and complete where it is there."""
        path = self.folder / name
        if not path.exists():
            part = self.folder / "part" / name
            part.parent.mkdir(parents=True, exist_ok=True)
            make(part)
            for file in part.parent.glob(f"{path.stem}.*"):
                file.replace(self.folder / file.name)
        return path

    def _save_plan(self, path: Path) -> None:
        self.record(self.float_model()).save(path)

    def _save_unfused_plan(self, path: Path) -> None:
        from precision import unfused

        without_fences(self.record(unfused(self.float_model()))).save(path)

    def record(self, model: nn.Module) -> Plan:
        int8 = horizon.quantize(model, self.calibration(), improve=False, progress=False)
        return horizon.plan.record(int8, self.calibration()[0][:1])


Build = Callable[[Work], Forward]


def without_fences(plan: Plan) -> Plan:
    """The plan without max pooling over one element, which `precision.unfused` puts between operators and which computes nothing."""
    from horizon_plugin_pytorch.plan.program import Ref

    where: dict[int, int] = {n: n for n in range(len(plan.inputs))}
    steps, values = [], list(plan.values[: len(plan.inputs)])

    def moved(x: Any) -> Any:
        if isinstance(x, Ref):
            return Ref(where[x.value])
        if isinstance(x, dict):
            return {k: moved(v) for k, v in x.items()}
        return type(x)(map(moved, x)) if isinstance(x, (tuple, list)) else x

    for i, step in enumerate(plan.steps):
        kernel = [*step.args[1:2], *step.kwargs.values()][:1]
        if step.target.endswith("max_pool2d") and kernel in ([1], [(1, 1)], [[1, 1]]):
            where[len(plan.inputs) + i] = where[step.args[0].value]
            continue
        where[len(plan.inputs) + i] = len(values)
        steps.append(replace(step, args=moved(step.args), kwargs=moved(step.kwargs), params=moved(step.params)))
        values.append(plan.result(i))
    return replace(plan, steps=tuple(steps), values=tuple(values), outputs=moved(plan.outputs))


# -- this package -----------------------------------------------------------------------------------------------------------


def ours(work: Work) -> Forward:
    runner = work.plan.compile("cpu", work.threads)
    return lambda: runner(work.x)


def ours_unfused(work: Work) -> Forward:
    runner = work.unfused_plan.compile("cpu", work.threads)
    return lambda: runner(work.x)


# -- PyTorch ----------------------------------------------------------------------------------------------------------------


def _in_torch(model: Callable[[Tensor], Any], x: Tensor, autocast: bool = False) -> Forward:
    def forward() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    return forward


def _channels_last(work: Work) -> Tensor:
    return work.x.contiguous(memory_format=torch.channels_last)


def eager(work: Work) -> Forward:
    model = work.float_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _in_torch(model, _channels_last(work))


def _inductor(work: Work, model: Any, x: Tensor, autocast: bool = False) -> Forward:
    import torch._inductor.config as config

    config.freezing = True
    if work.isa in ("avx2", "portable"):
        config.cpp.simdlen = 256 if work.isa == "avx2" else 0
    forward = _in_torch(torch.compile(model), x, autocast)
    forward()
    return forward


def compiled(work: Work) -> Forward:
    model = work.float_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _inductor(work, model, _channels_last(work))


def compiled_bf16(work: Work) -> Forward:
    model = work.float_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _inductor(work, model, _channels_last(work), autocast=True)


def torch_ao_fx(work: Work) -> Forward:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    data = work.calibration()
    prepared = prepare_fx(work.float_model(), get_default_qconfig_mapping("x86"), (data[0],))
    with torch.no_grad():
        for x in data:
            prepared(x)
    return _in_torch(convert_fx(prepared), _channels_last(work))


def torchao_pt2e(work: Work) -> Forward:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    data = work.calibration()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(work.float_model(), (data[0],), dynamic_shapes=({0: batch},), strict=True)
        prepared = prepare_pt2e(program.module(), quantizer)
        for x in data:
            prepared(x)
        return _inductor(work, convert_pt2e(prepared), _channels_last(work))


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------------


class _Plain(nn.Module):
    """A model as the ONNX exporter takes it: not a GraphModule, which it asks for ``torch.export``'s metadata."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def _onnx(work: Work) -> Path:
    import onnx  # noqa: F401  # the exporter needs it

    def save(path: Path) -> None:
        torch.onnx.export(
            _Plain(work.float_model()), (work.calibration()[0],), str(path), input_names=["x"], opset_version=17, dynamo=False,
            dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip

    return work.made("float32.onnx", save)


def _onnx_int8(work: Work) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter([{"x": item.numpy()} for item in work.calibration()])

        def get_next(self) -> Any:
            return next(self.items, None)

    def save(path: Path) -> None:
        prepared = path.with_name("prepared.onnx")
        quant_pre_process(str(_onnx(work)), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        prepared.unlink()

    return work.made("int8.onnx", save)


def _onnxruntime(work: Work, path: Path) -> Forward:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = work.threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {"x": work.x.numpy()}
    return lambda: session.run(None, inputs)


def onnxruntime_float(work: Work) -> Forward:
    return _onnxruntime(work, _onnx(work))


def onnxruntime_int8(work: Work) -> Forward:
    import onnxruntime  # noqa: F401  # before anything is made

    return _onnxruntime(work, _onnx_int8(work))


# -- OpenVINO ---------------------------------------------------------------------------------------------------------------


def _openvino_float(work: Work) -> Path:
    import openvino

    def save(path: Path) -> None:
        x = work.calibration()[0][:1]
        model = openvino.convert_model(work.float_model(), example_input=x, input=[list(x.shape)])
        openvino.save_model(model, path, compress_to_fp16=False)

    return work.made("float32.xml", save)


def _openvino_int8(work: Work) -> Path:
    def save(path: Path) -> None:
        import nncf
        import openvino

        data = [x[i : i + 1] for x in work.calibration() for i in range(len(x))]
        with redirect_stdout(sys.stderr):
            model = openvino.Core().read_model(_openvino_float(work))
            int8 = nncf.quantize(model, nncf.Dataset(data, lambda x: x.numpy()), subset_size=len(data))
        openvino.save_model(int8, path, compress_to_fp16=False)

    return work.made("int8.xml", save)


def openvino_files(work: Work) -> list[Path]:
    return [_openvino_float(work), _openvino_int8(work)]


def _openvino(work: Work, path: Path, precision: str) -> Forward:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([work.batch, *model.inputs[0].shape[1:]])
    settings = {
        "INFERENCE_NUM_THREADS": work.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    inputs = [work.x.numpy()]
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)


def openvino_float(work: Work) -> Forward:
    return _openvino(work, _openvino_float(work), "f32")


def openvino_bf16(work: Work) -> Forward:
    return _openvino(work, _openvino_float(work), "bf16")


def openvino_int8(work: Work) -> Forward:
    import openvino

    # What is left in float may be computed in bfloat16 where the processor has it, as OpenVINO does by default.
    bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return _openvino(work, _openvino_int8(work), "bf16" if bf16 and work.isa in (None, "amx") else "f32")


# -- the list ---------------------------------------------------------------------------------------------------------------

OURS, UNFUSED = "ours", "ours, unfused"
CANDIDATES: dict[str, Build] = {
    OURS: ours,
    UNFUSED: ours_unfused,
    "torch fp32": eager,
    "torch.compile fp32": compiled,
    "torch.compile bf16": compiled_bf16,
    "torch.ao FX int8": torch_ao_fx,
    "torchao PT2E int8": torchao_pt2e,
    "ONNX Runtime fp32": onnxruntime_float,
    "ONNX Runtime int8": onnxruntime_int8,
    "OpenVINO fp32": openvino_float,
    "OpenVINO bf16": openvino_bf16,
    "OpenVINO int8": openvino_int8,
}
NEED_ONLY_FILES = (OURS, "OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8")

CAPS: dict[str, dict[str, str]] = {
    "amx": {},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
"""Instruction sets `--isa` caps both sides to, with the variables by which peers obey. OpenVINO's and PyTorch's oneDNN obey
ONEDNN_MAX_CPU_ISA (OpenVINO's execution graph then names other kernels), PyTorch's own kernels ATEN_CPU_CAPABILITY. ONNX Runtime has
no such switch and runs uncapped."""


def environment(threads: int, isa: str | None) -> dict[str, str]:
    """The environment of a process that measures."""
    cap = {} if isa is None else {"HORIZON_MAX_CPU_ISA": isa, **CAPS[isa]}
    return {**os.environ, "OMP_NUM_THREADS": str(threads), **cap}


def prepare(name: str, work: Work) -> bool:
    """Import what a candidate imports and make its files, so that neither counts as its memory; whether there was something to make."""
    before = set(work.folder.glob("*"))
    if name in (OURS, UNFUSED):
        from horizon_plugin_pytorch.plan.native import execution  # noqa: F401

        work.made("plan.safetensors", work._save_plan)
        if name == UNFUSED:
            work.made("unfused.safetensors", work._save_unfused_plan)
    elif name.startswith("ONNX"):
        import onnxruntime  # noqa: F401

        _onnx_int8(work)
    elif name.startswith("OpenVINO"):
        import openvino  # noqa: F401

        openvino_files(work)
    elif name.startswith("torch.compile") or name == "torchao PT2E int8":
        import torch._inductor.compile_fx  # noqa: F401
    elif work.network is not None:
        import torchvision  # noqa: F401
    return set(work.folder.glob("*")) != before
