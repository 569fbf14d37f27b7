"""Checks on models, models and data from files."""

from horizon_plugin_pytorch._lazy import lazy_names

_HERE = "horizon_plugin_pytorch.utils"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        f"{_HERE}.calibration_data": ["ArrayFile", "ImageFolder"],
        f"{_HERE}.onnx_model": ["OnnxError", "load_onnx"],
    },
    submodules=["quant_profiler"],
)
