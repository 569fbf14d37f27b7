"""The errors a user can meet; each names the module and says what to do."""


class FusionError(ValueError):
    """Modules that cannot be fused as asked. Raised before the model is changed."""
