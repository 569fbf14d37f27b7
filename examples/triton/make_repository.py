"""Put an exported ``.onnx`` file into a model repository of NVIDIA Triton Inference Server.

    python examples/triton/make_repository.py net.onnx --name detector

writes ``model_repository/detector/1/model.onnx`` and ``model_repository/detector/config.pbtxt``; README.md says how to start the server.
Where the file leaves the batch open, the server collects requests into batches. Needs onnx.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import onnx

TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the .onnx file")
    parser.add_argument("--name", help="of the model in the server (default: the file's)")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="(default: model_repository)")
    parser.add_argument("--version", type=int, default=1, help="of the model (default: 1)")
    parser.add_argument("--max-batch", type=int, default=16, help="where the file leaves the batch open (default: 16)")
    parser.add_argument(
        "--delay", type=int, default=500, help="microseconds a request may wait for others (default: 500)"
    )
    parser.add_argument("--gpus", type=int, default=0, help="instances on the GPU instead of the CPU (default: 0)")
    return parser.parse_args()


def sizes(value: Any) -> list[int]:
    """The tensor's shape, -1 for a size that is open."""
    return [d.dim_value if d.dim_value > 0 else -1 for d in value.type.tensor_type.shape.dim]


def tensors(title: str, values: list[Any], batched: bool) -> str:
    """A list of the configuration; with a batch, Triton leaves that dimension out of `dims`."""
    entries = []
    for value in values:
        dims = ", ".join(map(str, sizes(value)[1 if batched else 0 :]))
        kind = TYPES[value.type.tensor_type.elem_type]
        entries.append(f'  {{\n    name: "{value.name}"\n    data_type: {kind}\n    dims: [ {dims} ]\n  }}')
    return f"{title} [\n" + ",\n".join(entries) + "\n]\n"


def configuration(graph: Any, name: str, max_batch: int, delay: int, gpus: int) -> str:
    """The text of ``config.pbtxt``."""
    weights = {w.name for w in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    batched = all(len(shape) > 0 and shape[0] == -1 for shape in map(sizes, [*inputs, *graph.output]))
    text = f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {max_batch if batched else 0}\n'
    text += tensors("input", inputs, batched) + tensors("output", list(graph.output), batched)
    if batched:
        text += f"dynamic_batching {{\n  max_queue_delay_microseconds: {delay}\n}}\n"
    kind, count = ("KIND_GPU", gpus) if gpus else ("KIND_CPU", 1)
    return text + f"instance_group [\n  {{\n    count: {count}\n    kind: {kind}\n  }}\n]\n"


def main() -> None:
    arguments = parse_arguments()
    name = arguments.name or arguments.model.stem
    graph = onnx.load(arguments.model, load_external_data=False).graph
    text = configuration(graph, name, arguments.max_batch, arguments.delay, arguments.gpus)
    folder = arguments.repository / name
    (folder / str(arguments.version)).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.model, folder / str(arguments.version) / "model.onnx")
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")
    print(f"{folder}/config.pbtxt\n\n{text}")


if __name__ == "__main__":
    main()
