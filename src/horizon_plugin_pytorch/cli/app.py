"""The commands of ``horizon``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from horizon_plugin_pytorch.plan.runner import Runner
    from horizon_plugin_pytorch.quantization.report import QuantizationReport

    from .programs import Program

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
            metavar="PACKAGE.MODULE:CALLABLE|ONNX",
            help="An nn.Module, or a class or function that returns one when called without arguments; or a float .onnx file.",
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

    from .model_spec import SpecError, declared_shapes, example_inputs, load_model

    with _error_to_exit(SpecError):
        module = load_model(model).eval()
        tensors = example_inputs(module, inputs or declared_shapes(module))
    with _error_to_exit(ValueError, TypeError, RuntimeError):
        report = fusion.analyze(module, tensors or None)
    typer.echo(report.to_text(width=get_terminal_size(fallback=(140, 24)).columns))
    with _error_to_exit(OSError):
        if json is not None:
            json.write_text(report.to_json(), encoding="utf-8")
        if html is not None:
            html.write_text(report.to_html(), encoding="utf-8")


@app.command(
    no_args_is_help=True,
    epilog="Example: horizon quantize model.onnx --data photos/ --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
)
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="ONNX|PACKAGE.MODULE:CALLABLE",
            help="A float .onnx file; or an nn.Module, or a class or function that returns one when called without arguments.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="What to calibrate with, a few dozen typical inputs: a folder of images; or .npy (one input) or .npz (by name) "
            "with one row per example, as the model takes them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Where to write the plan; here, under the model's name, if left out.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHT,WIDTH", help="Of the images; as the .onnx file says if left out.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs at a time; as the .onnx file says, or 1, if left out.", show_default=False),
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="How many images or rows to take at most.")] = 128,
    mean: Annotated[str, typer.Option(metavar="NUMBERS", help="What is taken off each channel of an image.")] = "0",
    std: Annotated[str, typer.Option(metavar="NUMBERS", help="What each channel is divided by after that.")] = "1",
    white: Annotated[
        float, typer.Option(help="The brightest pixel before mean and std: 1, or 255 for bytes as they are.")
    ] = 1.0,
    bgr: Annotated[bool, typer.Option("--bgr", help="Blue first instead of red.")] = False,
    improve: Annotated[
        bool, typer.Option(help="Equalize, widen and reconstruct (minutes, and less is lost), or only calibrate.")
    ] = True,
) -> None:
    """Turn a float model into an int8 plan that `run`, `bench` and `export` take.

    Needs, for .onnx files and images, the extra: pip install 'horizon_plugin_pytorch\\[onnx]'
    """
    from horizon_plugin_pytorch.errors import QuantizationError
    from horizon_plugin_pytorch.plan import PlanError, record
    from horizon_plugin_pytorch.quantization.quantize import quantize as to_int8

    from .model_spec import SpecError, is_onnx, load_model
    from .quantizing import check_runs, comparison, numbers, open_data

    console = Console(width=get_terminal_size(fallback=(140, 24)).columns, highlight=False)
    path = output or Path(f"{Path(model).stem if is_onnx(model) else model.rpartition(':')[2]}.int8.safetensors")
    with _error_to_exit(SpecError, QuantizationError, PlanError, OSError, ValueError):
        module = load_model(model).eval()
        pixels = {"white": white, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std"), "bgr": bgr}
        if not path.parent.is_dir():
            raise SpecError(f"there is no folder {path.parent} to write {path} to")
        items = open_data(module, data, size=size, batch=batch, most=most, **pixels)
        check_runs(module, items)
        int8 = to_int8(module, items, improve=improve)
        plan = record(int8, items[0])
        plan.save(path)
        report: QuantizationReport = int8.quantization_report  # type: ignore[assignment]
        typer.echo(report.summary())
        for row in report.in_float:
            typer.echo(f"  in float: {row.module} ({row.form}): {row.reason}")
        console.print(comparison(module, plan, items))
    typer.echo(
        f"{path}: {len(plan.steps)} steps, {plan.int8_bytes / 1e6:.2f} MB of int8 weights. Try: horizon run {path}"
    )


PROGRAM = typer.Argument(
    metavar="PLAN|PACKAGE.MODULE:CALLABLE|ONNX",
    help="A saved plan, or a model: an nn.Module, a class or function that returns one when called without arguments, or a float .onnx file.",
    show_default=False,
)
SHAPES = typer.Option(
    "--input",
    metavar="SHAPE",
    help="Shape of an input, e.g. 1,3,224,224; once per argument. A plan has shapes of its own, an .onnx file may have.",
    show_default=False,
)
THREADS = typer.Option(min=1, help="Threads to compute with; as PyTorch is set if left out.", show_default=False)
BACKEND = typer.Option(help="auto, cpu or reference; auto takes the fastest there is.")


@contextmanager
def _running(
    spec: str, shapes: list[str] | None, backend: str, threads: int | None
) -> Iterator[tuple[Program, Runner]]:
    """What the command line names, ready to run; whatever is wrong with it ends the command in one line."""
    from horizon_plugin_pytorch.errors import QuantizationError
    from horizon_plugin_pytorch.plan import PlanError

    from .model_spec import SpecError
    from .programs import load_program

    with _error_to_exit(SpecError, PlanError, QuantizationError, OSError):
        program = load_program(spec, shapes or [])
        if program.notice:
            typer.echo(f"note: {program.notice}", err=True)
        yield program, program.plan.compile(backend, threads)


@app.command(no_args_is_help=True, epilog="Example: horizon run resnet50.safetensors --input 4,3,224,224 --threads 2")
def run(
    program: Annotated[str, PROGRAM],
    inputs: Annotated[list[str] | None, SHAPES] = None,
    threads: Annotated[int | None, THREADS] = None,
    backend: Annotated[str, BACKEND] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="How many runs the latency is the median of.")] = 10,
) -> None:
    """Run a plan on random numbers and say what comes out and how long it takes.

    A float model is quantized first, with random numbers: for its time, not for its outputs.
    """
    from horizon_plugin_pytorch.utils.timing import take_turns

    from .latency import latency_table, output_table

    console = Console(width=get_terminal_size(fallback=(140, 24)).columns, highlight=False)
    with _running(program, inputs, backend, threads) as (loaded, runner):
        outputs = runner(*loaded.inputs)
        console.print(runner.report, markup=False)
        console.print(output_table(outputs))
        console.print(latency_table(take_turns({runner.backend: lambda: runner(*loaded.inputs)}, repeats)))


@app.command(
    no_args_is_help=True, epilog="Example: horizon bench torchvision.models:resnet18 --input 1,3,224,224 --threads 2"
)
def bench(
    program: Annotated[str, PROGRAM],
    inputs: Annotated[list[str] | None, SHAPES] = None,
    threads: Annotated[int | None, THREADS] = None,
    backend: Annotated[str, BACKEND] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="How many runs are timed.")] = 30,
    steps: Annotated[int, typer.Option(min=0, help="How many of the slowest steps to list.")] = 20,
) -> None:
    """Time a plan, beside the float model where there is one, and each of its steps.

    The float model runs in PyTorch, eagerly, on the same inputs and threads; the two take turns.
    """
    import torch

    from horizon_plugin_pytorch.plan.profile import profile
    from horizon_plugin_pytorch.utils.timing import take_turns

    from .latency import latency_table, step_table

    console = Console(width=get_terminal_size(fallback=(140, 24)).columns, highlight=False)
    if threads is not None:
        torch.set_num_threads(threads)
    with _running(program, inputs, backend, threads) as (loaded, runner), torch.no_grad():
        forwards = {f"int8, {runner.backend}": lambda: runner(*loaded.inputs)}
        if loaded.float_model is not None:
            forwards["float, PyTorch eager"] = lambda: loaded.float_model(*loaded.inputs)  # type: ignore[misc]
        times = take_turns(forwards, repeats)
        console.print(runner.report, markup=False)
        console.print(latency_table(times))
        if steps:
            console.print(step_table(profile(runner, *loaded.inputs), steps))


@app.command(
    no_args_is_help=True, epilog="Example: horizon export resnet18.safetensors -o resnet18.onnx --verify onnxruntime"
)
def export(
    program: Annotated[str, PROGRAM],
    inputs: Annotated[list[str] | None, SHAPES] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Where to write it: .onnx, or .pt2 for torch.export; here, as .onnx under the program's name, if left out.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of .onnx: qdq (the default): what runtimes fuse to integers; qoperator: operators on integers, exact; float: "
            "float32 throughout. Of .pt2: aten (the default): PyTorch's operators alone; horizon: this package's.",
            show_default=False,
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch/--fixed-batch", help="Any batch size, or the recorded one.")
    ] = True,
    dynamic_size: Annotated[
        bool | None,
        typer.Option(
            "--dynamic-size/--fixed-size",
            help="Any image size, or the recorded one; any if it is possible.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="RUNTIME",
            help="Run it in onnxruntime or openvino on random numbers and compare it with the plan.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a plan as an ONNX model, or as a program of torch.export.

    A float model is quantized first, with random numbers. For .onnx it needs the extra: pip install 'horizon_plugin_pytorch\\[export]'
    """
    from horizon_plugin_pytorch.export import ExportError, MissingExtraError, to_onnx
    from horizon_plugin_pytorch.export import verify as compare
    from horizon_plugin_pytorch.export.torch_export import save as save_torch_export

    name = program.rpartition(":")[2] if ":" in program else Path(program).stem
    path = output or Path(f"{name.removesuffix('.int8')}.int8.onnx")
    with (
        _running(program, inputs, "reference", None) as (loaded, _),
        _error_to_exit(ExportError, MissingExtraError, OSError),
    ):
        if path.suffix == ".pt2":
            if verify is not None or dynamic_size is not None:
                raise ExportError(
                    "--verify and --dynamic-size are for .onnx; a .pt2 computes the plan's numbers, at its size"
                )
            form = form or "aten"
            save_torch_export(loaded.plan, path, ops=form, dynamic_batch=dynamic_batch)  # type: ignore[arg-type]
        else:
            form = form or "qdq"
            to_onnx(loaded.plan, path, form=form, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
        typer.echo(f"{path}: {form}, {path.stat().st_size / 1e6:.2f} MB")
        if verify is not None:
            typer.echo(str(compare(loaded.plan, path, loaded.inputs, verify)))


@app.command(epilog="Example: horizon demo --output faces.png")
def demo(
    output: Annotated[Path, typer.Option(metavar="PATH", help="Where to write the picture.", dir_okay=False)] = Path(
        "demo.png"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="How many rounds the times are medians of.")] = 15,
) -> None:
    """Fuse a trained face detector, quantize it, time it beside float and OpenVINO, and draw the faces found in a photo.

    Needs the extra: pip install 'horizon_plugin_pytorch\\[demo]'
    """
    from horizon_plugin_pytorch import demo as centerface

    with _error_to_exit(centerface.MissingExtraError, OSError):
        centerface.run(output, repeats=repeats, console=Console(width=get_terminal_size(fallback=(140, 24)).columns))
