"""The command line, ``horizon``. It has no logic of its own: each command calls the library and prints what it returns.

Importing this package imports neither typer nor rich; :func:`main` does.
"""

__all__ = ["main"]


def main() -> None:
    """Run the ``horizon`` command on ``sys.argv``; the entry point of the installed program."""
    from .app import app

    app()
