"""Operator fusion and int8 quantization of PyTorch vision networks.

import horizon_plugin_pytorch as horizon
"""

from horizon_plugin_pytorch._lazy import lazy_names

__version__ = "0.1.0.dev0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "horizon_plugin_pytorch.errors": ["FusionError", "QuantizationError"],
        "horizon_plugin_pytorch.quantization.quantize": ["quantize"],
    },
    submodules=["export", "fusion", "nn", "plan", "qat_mode", "quantization", "utils"],
)
