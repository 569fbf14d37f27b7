"""A trained face detector, fused and quantized to int8: what changed, what did not, how fast it is, and the faces it finds."""

from horizon_plugin_pytorch._lazy import lazy_names

_NAMES = {
    "centerface": "Face MissingExtraError OUTPUTS calibration_photos decode load_centerface load_photo to_input",
    "comparison": "Difference count_operators sqnr",
    "picture": "draw side_by_side",
    "program": "latencies run",
}

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {f"{__name__}.{module}": names.split() for module, names in _NAMES.items()}
)
