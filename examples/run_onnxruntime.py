"""Run an exported ``.onnx`` file in ONNX Runtime: shapes and latency of what comes out.

    python examples/run_onnxruntime.py net.onnx                                  # on random numbers
    python examples/run_onnxruntime.py net.onnx --image cat.jpg --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

Needs onnxruntime and NumPy, and Pillow for an image.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("--image", help="an image for the first input; random numbers if left out")
    parser.add_argument(
        "--size", help="HEIGHT,WIDTH, where the model leaves them open (default: 224,224)", default="224,224"
    )
    parser.add_argument("--batch", type=int, default=1, help="where the model leaves it open (default: 1)")
    parser.add_argument(
        "--white", type=float, default=1.0, help="the brightest pixel before mean and std: 1 or 255 (default: 1)"
    )
    parser.add_argument("--mean", default="0", help="taken off each channel (default: 0)")
    parser.add_argument("--std", default="1", help="what each channel is divided by (default: 1)")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores (the default)")
    parser.add_argument("--repeats", type=int, default=20, help="how many runs are timed (default: 20)")
    return parser.parse_args()


def concrete_shape(declared: Any, arguments: argparse.Namespace) -> list[int]:
    """The input's shape; batch, height and width are the command line's where the model leaves them open."""
    wanted = [arguments.batch, 3, *map(int, arguments.size.split(","))]
    return [size if isinstance(size, int) and size > 0 else wanted[min(i, 3)] for i, size in enumerate(declared)]


def read_image(path: str, shape: list[int], arguments: argparse.Namespace) -> np.ndarray:
    """The image in the middle of ``[N, C, H, W]``, scaled and cut to cover it, once per index of the batch."""
    from PIL import Image, ImageOps

    batch, channels, height, width = shape
    image = ImageOps.fit(Image.open(path).convert("L" if channels == 1 else "RGB"), (width, height))
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255 * arguments.white
    mean, std = (np.array(text.split(","), np.float32) for text in (arguments.mean, arguments.std))
    return np.repeat(((pixels - mean) / std).transpose(2, 0, 1)[None].astype(np.float32), batch, axis=0)


def main() -> None:
    arguments = parse_arguments()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = onnxruntime.InferenceSession(arguments.model, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feed = {}
    for i, tensor in enumerate(session.get_inputs()):
        shape = concrete_shape(tensor.shape, arguments)
        random = arguments.image is None or i > 0
        feed[tensor.name] = (
            generator.standard_normal(shape, np.float32) if random else read_image(arguments.image, shape, arguments)
        )
        print(f"input  {tensor.name}: float32 {shape}")
    outputs = session.run(None, feed)
    for tensor, value in zip(session.get_outputs(), outputs, strict=True):
        print(f"output {tensor.name}: {value.dtype} {list(value.shape)}, from {value.min():.4g} to {value.max():.4g}")
    times = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    print(f"latency: {1e3 * float(np.median(times)):.3f} ms, the median of {arguments.repeats} runs")


if __name__ == "__main__":
    main()
