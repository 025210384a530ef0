"""A small convolutional network for any images."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from problems.blocks.networks._initial import at_least_one


@final
class SmallCNN(nn.Module):
    """Three convolution–BatchNorm–ReLU blocks, global average pooling and a linear layer: images to logits.

    Images [batch, channels, height, width] of at least 4×4 pixels; logits [batch, classes]. The second and third block
    halve the image.

    - `width`: channels of the first block; the next two have twice and four times as many. Raises ValueError below 1.
    """

    def __init__(self, *, width: int = 16, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        at_least_one(width=width)
        widths = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for number in range(3):
            layers += _block(widths[number], widths[number + 1], stride=1 if number == 0 else 2)
        self.blocks = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.blocks(images))


def _block(inputs: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
