"""The networks of a set of images by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import nn

from problems.blocks.networks import _resnet
from problems.blocks.networks._densenet import DenseNet
from problems.blocks.networks._normalise import normalised
from problems.blocks.networks._small import SmallCNN
from problems.blocks.networks._smooth import SmoothCNN
from problems.blocks.networks._wide_resnet import WideResNet

if TYPE_CHECKING:
    from problems.blocks.image_sets import ImageSets


def networks_for(found: ImageSets, *, outputs: int) -> dict[str, Callable[..., nn.Module]]:
    """The networks that a level can be, by name: images of this set, in [0, 1], to so many `outputs`."""
    channels = found.channels
    behind = partial(normalised, mean=found.mean, deviation=found.deviation)

    def smooth_cnn(*, width: int = 8, pooled: bool = False) -> nn.Module:
        return behind(SmoothCNN(width=width, size=found.size, classes=outputs, channels=channels, pooled=pooled))

    def small_cnn(*, width: int = 16) -> nn.Module:
        return behind(SmallCNN(width=width, classes=outputs, channels=channels))

    def wide_resnet(*, depth: int = 28, width: int = 2) -> nn.Module:
        return behind(WideResNet(depth=depth, width=width, classes=outputs, channels=channels))

    def densenet(*, depth: int = 40, growth: int = 12) -> nn.Module:
        return behind(DenseNet(depth=depth, growth=growth, classes=outputs, channels=channels))

    def resnet(*, depth: Literal[18, 34, 50, 101] = 18, weights: str | None = None) -> nn.Module:
        return behind(_resnet.resnet(depth=depth, weights=weights, classes=outputs, channels=channels))

    return {make.__name__: make for make in (smooth_cnn, small_cnn, wide_resnet, densenet, resnet)}
