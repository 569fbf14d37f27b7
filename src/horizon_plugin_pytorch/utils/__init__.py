"""Checks on models."""

from horizon_plugin_pytorch._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {}, submodules=["quant_profiler"])
