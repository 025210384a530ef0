"""What a foundation model is trained on: images that nobody else sees, under labels of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.cluster import KMeans  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import mlo
from problems.blocks.image_sets import SETS, ImageSets, Part, image_sets, in_order

LABELS = 20
"""Labels that a foundation model of digits has, where nothing else is said: the digits are ten."""

FINEST = 32
"""Images of more pixels a side are averaged to so many before they are clustered."""

AT_ONCE = 512


def foundation_images(found: ImageSets, *, labels: int, seed: int) -> Part:
    """`found.foundation` under `labels` labels of its own: the clusters of k-means on its pixels.

    So a foundation model's label space is neither the classes nor contained in them (Yamaguchi et al. 2023b, §1). Images of
    more than 32 pixels a side are averaged to 32 first. The best of ten starts, drawn by `seed`; one thread: the same seed
    and images give the same clusters.

    - `labels`: of what is returned, below this number; each of them occurs.

    Raises ValueError, beginning with `foundation` or `foundation_labels`, without images, and for fewer labels than one or
    more than there are different images.
    """
    part = found.foundation
    if len(part) == 0:
        raise ValueError("foundation is 0; it leaves a foundation model no image")
    if labels < 1:
        raise ValueError(f"foundation_labels is {labels}; it must be at least 1")
    pixels = _pixels(part)
    different = len(np.unique(pixels, axis=0))
    if labels > different:
        raise ValueError(f"foundation_labels is {labels}; of {different} different images no more clusters can be made")
    start = torch.randint(2**31, (), generator=mlo.stream.Draw(seed, "foundation.clusters", 0).generator())
    with threadpool_limits(1):  # several threads add up in any order
        clusters: Any = cast("Any", KMeans)(labels, n_init=10, random_state=int(start)).fit_predict(pixels)
    return replace(part, labels=torch.from_numpy(np.asarray(clusters)).to(torch.int64))


def foundation_set(
    source: str,
    *,
    root: str | Path | None = None,
    size: int,
    channels: int,
    seed: int,
    complete: bool = True,
    workers: int = 0,
) -> tuple[Part, int]:
    """The training images of another set, at `size` pixels, not augmented, and its number of classes: a foundation set.

    - `source`, `root`, `complete`, `workers`: see `image_sets`.
    - `size`, `channels`: those that the images must have.

    Raises what `image_sets` raises, with `foundation_source` and `foundation_root` for `source` and `root`, and ValueError
    for images of other channels.
    """
    known = SETS.get(source)
    if known is not None and known.channels != channels:
        raise ValueError(
            f"foundation_source is '{source}', whose images have {known.channels} channels; here they have {channels}"
        )
    try:
        found = image_sets(source, root=root, seed=seed, validation=0.0, size=size, complete=complete, workers=workers)
    except ValueError as error:
        said = str(error)
        raise ValueError(f"foundation_{said}" if said.startswith(("source ", "root ")) else said) from error
    return replace(found.train, augmented=False), found.classes


def _pixels(part: Part) -> np.ndarray[Any, Any]:
    """The images as rows of numbers, [n, numbers], at most 32 pixels a side."""

    def small(images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images, min(images.shape[-1], FINEST)).flatten(1)

    batches = in_order(part, size=AT_ONCE, device=torch.device("cpu"), dtype=torch.float64)
    return torch.cat([small(batch["images"]) for batch in batches]).numpy()
