"""A small network that can be differentiated twice everywhere."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from problems.blocks.networks._initial import at_least_one


@final
class SmoothCNN(nn.Module):
    """Three convolutions with GELU between them and a linear layer: images to logits, smooth and without batch statistics.

    So its Hessian is that of a mean over samples, and exists everywhere: what implicit methods ask for. Images
    [batch, channels, size, size], logits [batch, classes]; the second and third convolution halve the image. With the
    defaults 7,178 numbers.

    - `width`: channels of the first convolution; the next two have twice and four times as many. Raises ValueError below 1.
    - `size`: pixels of each side.
    - `pooled`: whether the linear layer reads the mean over all places, as in a residual network, and not every place.
    """

    def __init__(
        self, *, width: int = 8, classes: int = 10, channels: int = 1, size: int = 8, pooled: bool = False
    ) -> None:
        super().__init__()
        at_least_one(width=width)
        widths = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for number in range(3):
            stride = 1 if number == 0 else 2
            layers += [
                nn.Conv2d(widths[number], widths[number + 1], kernel_size=3, padding=1, stride=stride),
                nn.GELU(),
            ]
        side = 1 if pooled else (size + 3) // 4
        layers += [nn.AdaptiveAvgPool2d(1)] if pooled else []
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * side**2, classes))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.layers(images)
