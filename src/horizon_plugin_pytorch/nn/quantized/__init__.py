"""`FloatFunctional`, the module form of operators that have no module."""

from horizon_plugin_pytorch.nn.quantized.functional import FloatFunctional

__all__ = ["FloatFunctional"]
