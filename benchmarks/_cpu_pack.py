"""Plans and OpenVINO models in a form that is small enough to take to another machine: without their weights.

`pack` fills what is large with zeros and compresses; `unpack` puts random numbers in its place: int8 anywhere in its range, float32 normal
with He's deviation. What the outputs are then means nothing; how long they take does not depend on it, as long as the
numbers are not constant.
"""

from __future__ import annotations

import math
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import horizon_plugin_pytorch as horizon

LARGE = 4096
"""Elements; smaller constants of float32 (biases, scales) stay as they are."""
FILES = {"plan.safetensors", "float32.xml", "float32.bin", "int8.xml", "int8.bin"}


def pack(directory: Path, models: Path, networks: Sequence[str]) -> None:
    """Write `directory`/<network>.tar.xz for each network, whose models are made where they are missing."""
    from _cpu_peers import Work, openvino_files
    from _networks import NETWORKS

    directory.mkdir(parents=True, exist_ok=True)
    for name in networks:
        work = Work(models / name, 1, 1, network=NETWORKS[name])
        part = directory / f".{name}"
        part.mkdir(exist_ok=True)
        constants = {n: torch.zeros_like(t) if _is_weight(n, t) else t for n, t in work.plan.constants.items()}
        replace(work.plan, constants=constants).save(part / "plan.safetensors")
        for path in openvino_files(work):
            shutil.copy(path, part)
            weights = path.with_suffix(".bin")
            fill(path, weights, part / weights.name, lambda constant: np.zeros(constant.shape, constant.dtype))
        archive = directory / f"{name}.tar.xz"
        with tarfile.open(archive, "w:xz") as tar:
            for path in sorted(part.iterdir()):
                tar.add(path, path.name)
        shutil.rmtree(part)
        print(f"{archive}: {archive.stat().st_size / 1e6:.2f} MB", flush=True)


def unpack(directory: Path) -> Path:
    """Unpack every archive of `directory` into a folder beside it, with random weights; returns the folder."""
    models = directory / "unpacked"
    for archive in sorted(directory.glob("*.tar.xz")):
        folder = models / archive.name.removesuffix(".tar.xz")
        if folder.exists():
            continue
        part = models / f".{folder.name}"
        part.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in FILES and member.isfile():
                    tar.extract(member, part, filter="data")
        _randomize(part)
        part.replace(folder)
    return models


def _randomize(folder: Path) -> None:
    random = np.random.default_rng(0)
    plan = horizon.plan.load(folder / "plan.safetensors")
    generator = torch.Generator().manual_seed(0)
    constants = {
        n: torch.randint(-127, 128, t.shape, dtype=torch.int8, generator=generator) if _is_weight(n, t) else t
        for n, t in plan.constants.items()
    }
    replace(plan, constants=constants).save(folder / "plan.safetensors")

    def numbers(constant: Constant) -> np.ndarray:
        if constant.dtype == np.int8:
            return random.integers(-127, 128, constant.shape, np.int8)
        inputs = math.prod(constant.shape[1:]) or 1
        return (random.standard_normal(constant.shape) * math.sqrt(2 / inputs)).astype(constant.dtype)

    for path in folder.glob("*.xml"):
        fill(path, path.with_suffix(".bin"), path.with_suffix(".bin"), numbers)


def _is_weight(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.dtype == torch.int8


@dataclass(frozen=True)
class Constant:
    """A tensor in the weights of an OpenVINO model."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


def constants_of(model: Path) -> Iterator[Constant]:
    """The large constants that an OpenVINO model's XML describes: int8 of any size, and float32 of more than `LARGE` elements."""
    dtypes = {"i8": np.dtype(np.int8), "f32": np.dtype(np.float32)}
    for layer in ElementTree.parse(model).getroot().iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None or data.get("element_type") not in dtypes:
            continue
        shape = tuple(int(n) for n in data.get("shape", "").split(",") if n.strip())
        found = Constant(
            dtypes[data.get("element_type", "")], shape, int(data.get("offset", 0)), int(data.get("size", 0))
        )
        if found.dtype == np.int8 or math.prod(shape) > LARGE:
            yield found


def fill(model: Path, weights: Path, target: Path, numbers: Callable[[Constant], np.ndarray]) -> None:
    """Write `weights` to `target` with other numbers in the place of the large constants."""
    content = bytearray(weights.read_bytes())
    for constant in constants_of(model):
        values = numbers(constant).tobytes()
        assert len(values) == constant.size
        content[constant.offset : constant.offset + constant.size] = values
    target.write_bytes(content)
