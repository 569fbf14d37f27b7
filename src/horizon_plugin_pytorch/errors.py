"""The errors a user can meet; each names the module and says what to do."""


class FusionError(ValueError):
    """Modules that cannot be fused as asked. Raised before the model is changed."""


class QuantizationError(ValueError):
    """A model, its data or a call that cannot be quantized as asked. Raised before the model is changed."""
