"""The commands of ``horizon``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="horizon",
    help="Operator fusion and quantization for PyTorch.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@contextmanager
def _error_to_exit(*expected: type[Exception]) -> Iterator[None]:
    """Print an expected error in one line instead of a traceback, and leave with exit code 2."""
    try:
        yield
    except expected as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False)
        raise typer.Exit(2) from error


@app.callback()
def _root() -> None:
    """Operator fusion and quantization for PyTorch."""


@app.command(no_args_is_help=True, epilog="Example: horizon check torchvision.models:resnet18 --input 1,3,224,224")
def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="An nn.Module, or a class or function that returns one when called without arguments.",
            show_default=False,
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="Shape of an example input, e.g. 1,3,224,224; once per argument of the model.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Also write the report as JSON.", dir_okay=False, show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Also write the report as HTML.", dir_okay=False, show_default=False),
    ] = None,
) -> None:
    """Say which operators of a model fuse, which do not, and why. The model is looked at in eval mode."""
    from horizon_plugin_pytorch import fusion

    from .model_spec import SpecError, example_inputs, load_model

    with _error_to_exit(SpecError):
        module = load_model(model).eval()
        tensors = example_inputs(module, inputs or [])
    with _error_to_exit(ValueError, TypeError, RuntimeError):
        report = fusion.analyze(module, tensors or None)
    typer.echo(report.to_text(width=get_terminal_size(fallback=(140, 24)).columns))
    with _error_to_exit(OSError):
        if json is not None:
            json.write_text(report.to_json(), encoding="utf-8")
        if html is not None:
            html.write_text(report.to_html(), encoding="utf-8")


@app.command(epilog="Example: horizon demo --output faces.png")
def demo(
    output: Annotated[Path, typer.Option(metavar="PATH", help="Where to write the picture.", dir_okay=False)] = Path(
        "demo.png"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="How many runs each latency is the median of.")] = 15,
) -> None:
    """Fuse a trained face detector, compare it with what it was, and draw the faces both find in a photo.

    Needs the extra: pip install 'horizon_plugin_pytorch\\[demo]'
    """
    from horizon_plugin_pytorch import demo as centerface

    with _error_to_exit(centerface.MissingExtraError, OSError):
        centerface.run(output, repeats=repeats, console=Console(width=get_terminal_size(fallback=(140, 24)).columns))
