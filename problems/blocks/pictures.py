"""Pictures that a run keeps, as uint8."""

from __future__ import annotations

import torch
from torch import Tensor

PALETTE = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (188, 189, 34),
    (23, 190, 207),
    (0, 0, 128),
)
"""A colour for each of ten classes; further ones begin again."""

GREY = (170, 170, 170)
"""The colour of points without a class."""


def tiles(images: Tensor) -> Tensor:
    """Images in [0, 1], [rows, columns, 1 or 3, h, w], as one picture with grey lines between them: uint8."""
    rows, columns, channels, height, width = images.shape
    grid = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 128, dtype=torch.uint8)
    shades = (images.detach() * 255).round().clamp(0, 255).to(device="cpu", dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = 1 + row * (height + 1), 1 + column * (width + 1)
            grid[top : top + height, left : left + width] = shades[row, column].permute(1, 2, 0)
    return grid[..., 0] if channels == 1 else grid


def scatter(points: Tensor, labels: Tensor, *, side: int = 480, dot: int = 3) -> Tensor:
    """Points [n, 2] on white, [side, side, 3]: later ones over earlier ones, coloured by label, grey where it is −1.

    - `side`: pixels of each side; the points fill it but for a margin.
    - `dot`: pixels of each side of a point.
    """
    picture = torch.full((side, side, 3), 255, dtype=torch.uint8)
    points, labels = points.detach().cpu().double(), labels.cpu()
    low, high = points.amin(0), points.amax(0)
    spread = (high - low).max().clamp(min=1e-12)
    places = (((points - (low + high) / 2) / spread + 0.5) * (side - 3 * dot) + dot).round().long()
    for (across, up), label in zip(places.tolist(), labels.tolist(), strict=True):
        colour = PALETTE[label % len(PALETTE)] if label >= 0 else GREY
        top = side - dot - up
        picture[top : top + dot, across : across + dot] = torch.tensor(colour, dtype=torch.uint8)
    return picture


def heat_map(numbers: Tensor, *, side: int = 640) -> Tensor:
    """Numbers ≥ 0, [rows, columns], as squares: black is 0, white the largest of them. uint8 [rows·cell, columns·cell].

    - `side`: pixels that the longer side comes to, if each number has at least one.
    """
    cell = max(1, side // max(numbers.shape))
    shades = (255 * numbers.detach().cpu() / numbers.max().clamp(min=1e-30).cpu()).round().to(torch.uint8)
    return shades.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
