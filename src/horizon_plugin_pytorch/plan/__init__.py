"""The static program of an int8 model: recorded once, checked, saved, loaded, run."""

from horizon_plugin_pytorch._lazy import lazy_names

_HERE = "horizon_plugin_pytorch.plan"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        f"{_HERE}.program": ["Plan", "PlanError", "Step", "Value"],
        f"{_HERE}.recording": ["record"],
        f"{_HERE}.store": ["load"],
    },
)
