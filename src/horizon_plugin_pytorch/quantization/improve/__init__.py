"""Methods that make int8 lose less. Each works on a prepared model, in place; `horizon.quantize` applies the recipe that measured best.

In order: `equalize` the prepared model, `calibrate`, `add_headroom`, `reconstruct`. `correct_bias` is the part of `reconstruct` that
changes no weight, `reestimate_bn` is for a model whose batch norms were kept.
"""

from horizon_plugin_pytorch._lazy import lazy_names

_HERE = "horizon_plugin_pytorch.quantization.improve"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        f"{_HERE}.bn": ["reestimate_bn"],
        f"{_HERE}.equalization": ["Equalized", "equalize"],
        f"{_HERE}.headroom": ["add_headroom"],
        f"{_HERE}.reconstruction": ["correct_bias", "reconstruct"],
    },
)
