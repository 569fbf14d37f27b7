"""The ONNX model of a plan: graph, inputs and outputs, metadata, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import helper

from horizon_plugin_pytorch.export.errors import ExportError
from horizon_plugin_pytorch.export.onnx.graph import HIGHEST_OPSET, LOWEST_OPSET, Graph, NeedsOpset
from horizon_plugin_pytorch.export.onnx.lowering import Lowering, element_type, named_outputs
from horizon_plugin_pytorch.export.onnx.shapes import AXES, NeedsFixedSize, Shapes, Sizes, find_shapes
from horizon_plugin_pytorch.plan import Plan


def build(
    plan: Plan,
    form: str,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
    dynamic_size: bool | None,
) -> onnx.ModelProto:
    """The checked model; arguments as `horizon.export.to_onnx`."""
    names = list(input_names or plan.inputs)
    if len(names) != len(plan.inputs) or len({*names, *(output_names or ())}) != len(names) + len(output_names or ()):
        raise ExportError(
            f"{plan.model} takes {', '.join(plan.inputs)}: give as many input_names, and no name twice, also not an output's"
        )
    if dynamic_size is None:
        try:
            return _model(plan, form, names, output_names, *find_shapes(plan, dynamic_batch, True))
        except NeedsFixedSize:
            dynamic_size = False
    return _model(plan, form, names, output_names, *find_shapes(plan, dynamic_batch, dynamic_size))


def _model(
    plan: Plan, form: str, names: list[str], output_names: Sequence[str] | None, shapes: Shapes, sizes: list[Sizes]
) -> onnx.ModelProto:
    from horizon_plugin_pytorch import __version__

    opset = LOWEST_OPSET
    while True:
        graph = Graph(opset)
        lowering = Lowering(plan, shapes, form, graph)
        try:
            outputs = lowering.run(names, None if output_names is None else list(output_names))
            break
        except NeedsOpset as needed:
            opset = needed.opset
            assert opset <= HIGHEST_OPSET
    graph.prune(outputs)
    made = helper.make_graph(
        graph.nodes,
        plan.model,
        [_input(name, shapes.meta(i), s, len(names)) for i, (name, s) in enumerate(zip(names, sizes, strict=True))],
        [
            helper.make_tensor_value_info(
                name, element_type(shapes.meta(ref.value, item)), shapes.symbols(ref.value, item, name)
            )
            for name, (_, ref, item) in zip(outputs, named_outputs(plan, shapes), strict=True)
        ],
        initializer=graph.tensors(),
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        made, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="horizon_plugin_pytorch", producer_version=__version__,
    )  # fmt: skip
    helper.set_model_props(model, {"horizon.version": __version__, **_metadata(plan, form)})
    try:
        onnx.checker.check_model(model, full_check=True)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{plan.model} became an ONNX model that is not valid: {error}") from error


def _input(name: str, meta: Any, sizes: Sizes, inputs: int) -> onnx.ValueInfoProto:
    prefix = f"{name}_" if inputs > 1 else ""
    spatial = AXES.get(len(sizes) - 2, ())
    shape = [
        n if n is not None else "batch" if d == 0 else prefix + (spatial[d - 2] if spatial else f"size_{d}")
        for d, n in enumerate(sizes)
    ]
    return helper.make_tensor_value_info(name, element_type(meta), shape)


def _metadata(plan: Plan, form: str) -> dict[str, str]:
    scales = {
        value.scale: {"scale": plan.constants[value.scale].tolist(), "dtype": value.dtype}
        for value in plan.values
        if value.scale is not None
    }
    return {
        "horizon.model": plan.model,
        "horizon.form": form,
        "horizon.scales": json.dumps(scales),
    }
