"""Plans in the formats of others."""

from horizon_plugin_pytorch._lazy import lazy_names

_HERE = "horizon_plugin_pytorch.export"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        f"{_HERE}.errors": ["ExportError", "MissingExtraError"],
        f"{_HERE}.onnx_file": ["to_onnx"],
        f"{_HERE}.torch_export": ["to_torch_export"],
        f"{_HERE}.verification": ["Agreement", "OutputAgreement", "verify"],
    },
)
