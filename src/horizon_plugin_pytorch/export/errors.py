"""The error of everything that a plan is written to."""


class ExportError(ValueError):
    """A plan that cannot be written in the form that was asked for; it names the step and says what to do. No file is left behind."""


class MissingExtraError(ImportError):
    """Something that an export or its check needs is not installed; it says how to install it."""
