"""A network from a file, in whose features images of photographs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import TypeAlias, final

import torch
from torch import Tensor

import mlo
from problems.blocks.held_out import at_once
from problems.blocks.image_sets import DEVIATION, MEAN, ImageSets, in_order
from problems.blocks.networks import Divided, normalised
from problems.blocks.networks._resnet import Depth, resnet
from problems.blocks.quality import feature_frechet_distance
from problems.blocks.samples import Find, Generate, drawn, sample_labels

JUDGED = 2048
"""Photographs that are compared, generated and real ones, where there are as many for the test (MGR, §4.5)."""

Judge: TypeAlias = Callable[[Tensor], Tensor]
"""Images [n, 3, height, width] in [0, 1] to features [n, features]: 512 of ResNet-18 and 34, 2,048 of deeper ones."""


def judge_from(path: str, *, depth: Depth, device: torch.device) -> Judge:
    """The features that a residual network of torchvision's gives its last layer, with weights from a file.

    Images are normalised as those of ImageNet are, and everything is float32 in evaluation mode. Distances in these features
    are no FID, which is that of InceptionNet: they compare with no others but those of the same file.

    - `path`, `depth`: see `networks.resnet`; the last layer, whatever its number of classes, is not used.

    Raises ValueError, which begins with `judge is`, for a file that is missing, cannot be read or holds another network.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # it starts from random numbers, which the file replaces
            network = resnet(depth=depth, weights=path)
    except ValueError as error:
        raise ValueError(str(error).replace("weights is", "judge is", 1)) from error
    held = Divided(normalised(network, mean=MEAN, deviation=DEVIATION)).eval().requires_grad_(False)
    held = held.to(device=device, dtype=torch.float32)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return held(images.float(), part="features")

    return features


@final
class Photographs:
    """How far generated photographs are from those of the test, in a judge's features.

    As many of both, at most `JUDGED`; the test images are spread evenly over all there are. Latents and labels are the same
    in each evaluation, from a generator of their own.

    - `latent`: the size of z.
    """

    def __init__(self, judge: Judge, found: ImageSets, *, latent: int, context: mlo.Context) -> None:
        self._judge, self._found, self._at_once = judge, found, at_once(found)
        self._taken = partial(in_order, device=context.device, dtype=context.dtype, size=self._at_once)
        self._count = min(JUDGED, len(found.test))
        draws = torch.Generator().manual_seed(context.seed)
        self._z = torch.randn(self._count, latent, generator=draws, dtype=context.dtype).to(context.device)
        self._labels = sample_labels(self._count, classes=found.classes, device=context.device)

    def distances(self, generate: Generate, find: Find | None) -> dict[str, float]:
        """`uniform_feature_frechet_distance`, of G(z, y), and where there is a finder `found_…`, of G(F(z), y)."""
        features: dict[str, list[Tensor]] = {}
        for z, labels in zip(self._z.split(self._at_once), self._labels.split(self._at_once), strict=True):
            for name, each in drawn(generate, find, z, labels).items():
                features.setdefault(name, []).append(self._judge(each.images))
        return {
            f"{name}_feature_frechet_distance": feature_frechet_distance(self._real, torch.cat(parts)).item()
            for name, parts in features.items()
        }

    @cached_property
    def _real(self) -> Tensor:
        test = self._found.test
        places = torch.arange(self._count) * len(test) // self._count
        part = replace(test, index=test.index[places], labels=test.labels[places])
        return torch.cat([self._judge(batch["images"]) for batch in self._taken(part)])
