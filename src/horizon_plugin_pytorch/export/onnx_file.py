"""`to_onnx`: a plan as a file that other runtimes run. Imports onnx only when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from horizon_plugin_pytorch.export.errors import ExportError, MissingExtraError
from horizon_plugin_pytorch.plan import Plan, PlanError
from horizon_plugin_pytorch.plan.store import validate

Form = Literal["qdq", "qoperator", "float"]


def to_onnx(
    plan: Plan,
    path: str | Path,
    *,
    form: Form = "qdq",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool | None = None,
) -> Path:
    """Write `plan` as an ONNX model.

    Args:
        plan: from `horizon.plan.record` or `load`.
        path: of the file; one that is there is replaced only when the new one is complete.
        form: ``qdq``: float operators between DequantizeLinear and QuantizeLinear, which runtimes fuse to integer ones; int8
            weights with one scale per output channel, int32 biases. ``qoperator``: QLinearConv, ConvInteger, MatMulInteger.
            ``float``: float32 throughout, weights dequantized.
        input_names: of the inputs; as the model's arguments if left out.
        output_names: of the outputs, in the order in which the model returns them, dicts by their keys; keys, or the modules that
            make them, if left out.
        dynamic_batch: the first dimension of the inputs may have any size.
        dynamic_size: the dimensions of the inputs from the third on may have any size. None: if the plan and ONNX allow it.

    Returns:
        `path`. The file's metadata has the package's version, the model's class, the form, and in ``horizon.scales`` the scale and dtype of
        every tensor that was quantized, as JSON. Outputs that are integers in the plan are the float32 values they stand for.

    Raises:
        ExportError: a step has no form in ONNX, the plan is not valid or does not accept other sizes; no file is written.
        MissingExtraError: ``onnx`` is not installed.
        OSError: the file cannot be written.
    """
    if form not in get_args(Form):
        raise ExportError(f"form {form!r} is not one of {', '.join(get_args(Form))}")
    try:
        validate(plan)
    except PlanError as error:
        raise ExportError(f"the plan is not valid: {error}") from error
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'horizon_plugin_pytorch[export]'") from error
    from horizon_plugin_pytorch.export.onnx.model import build

    model = build(plan, form, input_names, output_names, dynamic_batch, dynamic_size)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(model.SerializeToString())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
