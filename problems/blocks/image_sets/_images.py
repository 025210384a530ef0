"""Where images come from: held in memory, or decoded from files when they are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import TypeAlias, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

import mlo

Box: TypeAlias = tuple[int, int, int, int]
"""Left, upper, right and lower edge of a part of an image, in pixels."""

TRIES = 10
"""How often a crop is drawn until one lies inside the image (Szegedy et al. 2015, as in torchvision)."""


class AbstractImages(ABC):
    """Images by number, all of one size once they are drawn, with the set's standard augmentation.

    - `strongest`: the integer that stands for intensity 1.
    - `draws`: uniform numbers in [0, 1) that the augmentation of an image takes.
    """

    strongest: int
    draws: int

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def take(self, index: Tensor, draws: Tensor | None) -> Tensor:
        """Images `index` [n] as uint8 [n, channels, height, width], augmented by `draws` [n, self.draws], or plain."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class HeldImages(AbstractImages):
    """Small images in memory; augmented by a shift of up to `padding` pixels each way, black coming in, and a flip.

    - `pixels`: uint8 [n, channels, height, width].
    - `flip`: mirror left to right with probability 1/2.
    """

    pixels: Tensor
    strongest: int = 255
    padding: int = 0
    flip: bool = False
    draws: int = field(default=3, init=False)

    def __len__(self) -> int:
        """See the base."""
        return len(self.pixels)

    def take(self, index: Tensor, draws: Tensor | None) -> Tensor:
        """See the base."""
        images = self.pixels[index]
        if draws is None:
            return images
        if self.padding:
            count, channels, height, width = images.shape
            wide = pad(images, (self.padding,) * 4)
            first = (draws[:, :2] * (2 * self.padding + 1)).long()
            rows, columns = first[:, :1] + torch.arange(height), first[:, 1:2] + torch.arange(width)
            images = wide.gather(2, rows[:, None, :, None].expand(count, channels, height, wide.shape[-1]))
            images = images.gather(3, columns[:, None, None, :].expand(count, channels, height, width))
        if self.flip:
            images = torch.where(draws[:, 2, None, None, None] < 0.5, images.flip(-1), images)
        return images


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FileImages(AbstractImages):
    """Files that are decoded when drawn, as RGB.

    Plain: the shorter side resized to 8/7 of `size`, the middle cut out (224 of 256). Augmented: a random part of 8 % to
    100 % of the area, with sides 3:4 to 4:3, resized to `size`, and mirrored with
    probability 1/2.

    - `size`: pixels of each side of what is drawn.
    - `workers`: threads that decode; their number does not change a bit.
    """

    paths: Sequence[str]
    size: int
    workers: int = 0
    strongest: int = field(default=255, init=False)
    draws: int = field(default=2 * TRIES + 3, init=False)

    def __len__(self) -> int:
        """See the base."""
        return len(self.paths)

    def take(self, index: Tensor, draws: Tensor | None) -> Tensor:
        """See the base. Raises `mlo.UserError` for a file that is no image."""
        chosen: list[int] = index.tolist()
        paths = [self.paths[number] for number in chosen]
        rows: list[list[float]] = [[] for _ in paths] if draws is None else draws.tolist()
        if self.workers < 1:
            return torch.stack([self._decoded(path, row) for path, row in zip(paths, rows, strict=True)])
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self._decoded, paths, rows)))

    def _decoded(self, path: str, draws: Sequence[float]) -> Tensor:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError) as error:  # the latter is what Pillow says of a broken PNG
            raise mlo.UserError(f"'{path}' cannot be read as an image: {error}") from error
        if draws:
            part = image.crop(random_part(*image.size, draws))
            image = part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        else:
            image = _middle(image, self.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.flip(-1) if draws and draws[-1] < 0.5 else pixels


def _middle(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to 8/7 of `size`, and the middle of that."""
    short = round(size * 8 / 7)
    wide, high = (int(short * side / min(image.size)) for side in image.size)
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, upper = round((wide - size) / 2), round((high - size) / 2)
    return resized.crop((left, upper, left + size, upper + size))


def random_part(width: int, height: int, draws: Sequence[float]) -> Box:
    """A part of 8 % to 100 % of the area whose sides are 3:4 to 4:3, from 22 uniform `draws`.

    Ten pairs of them try an area and, uniform in its logarithm, a ratio; the first part that fits is put at the place that
    the last two choose. If none fits: the largest part in the middle with an allowed ratio.
    """
    across, down = draws[2 * TRIES], draws[2 * TRIES + 1]
    for attempt in range(TRIES):
        area = width * height * (0.08 + 0.92 * draws[2 * attempt])
        ratio = exp(log(4 / 3) * (2 * draws[2 * attempt + 1] - 1))
        wide, high = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, upper = int(across * (width - wide + 1)), int(down * (height - high + 1))
            return left, upper, left + wide, upper + high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - wide) // 2, (height - high) // 2
    return left, upper, left + wide, upper + high
