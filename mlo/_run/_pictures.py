"""Pictures of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 480
"""Pixels a picture's shorter side has at least: small images are enlarged by whole factors, each pixel a square."""


def write_pictures(folder: Path, pictures: Mapping[str, Tensor]) -> None:
    """Write each picture, uint8 [height, width] or [height, width, 3], to `<folder>/<name>.png`."""
    if pictures:
        folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        image = Image.fromarray(picture.cpu().numpy())
        factor = max(1, -(-_SMALLEST // min(image.size)))
        enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        enlarged.save(folder / f"{name}.png")
