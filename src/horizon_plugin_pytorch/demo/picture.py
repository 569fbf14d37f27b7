"""Photos with the faces drawn into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from horizon_plugin_pytorch.demo.centerface import Face

if TYPE_CHECKING:
    from PIL.Image import Image


def draw(photo: np.ndarray, faces: Sequence[Face], caption: str) -> Image:
    """The photo with boxes, scores and landmarks drawn into it, and the caption above it."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    margin = 28
    height, width, _ = photo.shape
    picture = Image.new("RGB", (width, height + margin), "white")
    picture.paste(Image.fromarray(photo), (0, margin))
    pen = ImageDraw.Draw(picture)
    pen.text((6, 5), caption, fill="black", font=font)
    for face in faces:
        left, top, right, bottom = face.box
        pen.rectangle((left, top + margin, right, bottom + margin), outline="lime", width=3)
        pen.text((left + 4, bottom + margin + 4), f"{face.score:.3f}", fill="lime", font=font)
        for x, y in face.landmarks:
            pen.ellipse((x - 3, y + margin - 3, x + 3, y + margin + 3), fill="red", outline="white")
    return picture


def side_by_side(pictures: Sequence[Image]) -> Image:
    """The pictures in a row."""
    from PIL import Image

    row = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row
