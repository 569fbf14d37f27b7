"""Images and arrays as batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from horizon_plugin_pytorch.utils import ArrayFile, ImageFolder


def picture(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, one in a folder below, of 8×6 pixels each, and a file that is none."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.PNG", "c.bmp", "d/e.png", "f.tiff"]):
        picture(
            tmp_path / "photos" / name,
            rng.integers(0, 256, (8, 6, 3), dtype=np.uint8) if i else np.full((8, 6, 3), 51, np.uint8),
        )
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_pixels_are_scaled_shifted_and_ordered(photos: Path) -> None:
    pixels = np.array(Image.open(photos / "b.PNG")).astype(np.float32).transpose(2, 0, 1)
    for bgr in (False, True):
        images = ImageFolder(photos, (8, 6), mean=(0.5, 0.25, 0.125), std=(0.5, 2.0, 1.0), bgr=bgr)
        expected = (pixels[::-1] if bgr else pixels) / 255
        expected = (expected - np.array([[[0.5]], [[0.25]], [[0.125]]])) / np.array([[[0.5]], [[2]], [[1]]])
        assert images[1].shape == (1, 3, 8, 6) and images[1].dtype == torch.float32
        np.testing.assert_allclose(images[1][0].numpy(), expected, rtol=1e-6, atol=1e-6)
    raw = ImageFolder(photos, (8, 6), white=255)[1][0].numpy()
    np.testing.assert_allclose(raw, pixels, rtol=1e-6)


def test_batches_are_filled_up_and_can_be_read_again(photos: Path) -> None:
    images = ImageFolder(photos, (4, 4), batch=2)
    assert len(images) == 3 and len(images.files) == 5
    first, second = list(images), list(images)
    assert [tuple(b.shape) for b in first] == [(2, 3, 4, 4)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(images[2][1], images[0][0]) and torch.equal(images[-1], images[2])
    assert len(images[:2]) == 2
    with pytest.raises(IndexError):
        images[3]


def test_at_most_so_many_from_everywhere(photos: Path) -> None:
    assert [f.name for f in ImageFolder(photos, (4, 4), most=2).files] == ["a.png", "c.bmp"]


def test_an_image_covers_the_size_and_its_middle_stays(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    picture(tmp_path / "wide" / "a.png", pixels)
    assert torch.equal(ImageFolder(tmp_path / "wide", (4, 4))[0], torch.ones(1, 3, 4, 4))


def test_gray_alpha_and_channels_last(tmp_path: Path) -> None:
    rgba = np.full((4, 4, 4), 255, np.uint8)
    rgba[..., 3] = 7
    picture(tmp_path / "one" / "a.png", rgba)
    assert torch.equal(ImageFolder(tmp_path / "one", (4, 4), channels=1)[0], torch.ones(1, 1, 4, 4))
    assert ImageFolder(tmp_path / "one", (4, 2), channels_last=True)[0].shape == (1, 4, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (1.0, 2.0)}, "mean needs one value, or 3: not 2"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"channels": 4}, "the model takes 4: give arrays"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_arguments_that_do_not_fit(photos: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(photos, (4, 4), **options)


def test_what_holds_no_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no image in"):
        ImageFolder(tmp_path, (4, 4))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        ImageFolder(tmp_path, (4, 4))[0]


def test_an_array(tmp_path: Path) -> None:
    rows = np.arange(30, dtype=np.float64).reshape(5, 3, 2)
    np.save(tmp_path / "x.npy", rows)
    data = ArrayFile(tmp_path / "x.npy", batch=2)
    assert len(data) == 2 and data[1].dtype == torch.float32
    assert torch.equal(torch.cat(list(data)), torch.arange(24.0).view(4, 3, 2))
    assert [len(b) for b in ArrayFile(tmp_path / "x.npy", batch=9, most=4)] == [4]
    np.savez(tmp_path / "x.npz", whatever=rows)
    assert torch.equal(ArrayFile(tmp_path / "x.npz")[4], torch.arange(24.0, 30).view(1, 3, 2))


def test_arrays_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "xy.npz", b=np.arange(4), a=np.ones((4, 2), np.float32))
    data = ArrayFile(tmp_path / "xy.npz", ["a", "b"], batch=2)
    assert [(a.shape, b.tolist()) for a, b in data] == [((2, 2), [0, 1]), ((2, 2), [2, 3])]
    assert data[0][1].dtype == torch.int64


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3)))
    np.save(tmp_path / "empty.npy", np.ones((0, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(tmp_path / "xy.npz", a=np.ones(3), b=np.ones(2))
    (tmp_path / "text.npy").write_text("no array")
    for name, inputs, message in [
        ("x.npy", ["a", "b"], "the model takes a, b: give an .npz file"),
        ("xy.npz", ["a", "c"], "has no array c; there are a, b"),
        ("xy.npz", ["a", "b"], "the same number of rows"),
        ("empty.npy", ["x"], "at least one"),
        ("objects.npy", ["x"], "cannot be read"),
        ("text.npy", ["x"], "cannot be read"),
        ("absent.npy", ["x"], "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            ArrayFile(tmp_path / name, inputs)
