"""The fused modules in their forms: `intrinsic` (float), `quantized`; one class per idea, not per combination."""

from horizon_plugin_pytorch.nn import intrinsic, quantized

__all__ = ["intrinsic", "quantized"]
