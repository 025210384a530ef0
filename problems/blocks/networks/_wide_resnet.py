"""Wide residual networks (Zagoruyko and Komodakis 2016)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn.functional import relu

from problems.blocks.networks._initial import at_least_one, he_initialised


@final
class WideResNet(nn.Module):
    """WRN-depth-width: images [batch, channels, height, width] to logits [batch, classes].

    A 3×3 convolution to 16 channels; three groups of (depth − 4)/6 pre-activation blocks B(3, 3) with 16k, 32k and 64k
    channels, the second and third at half the image each; BatchNorm, ReLU, global average pooling, a linear layer
    (Table 1). Parameters with 10 classes and 3 channels: 28-2 1.5 million, 40-2 2.2, 28-10 36.5.

    - `depth`: 6n + 4. Raises ValueError for another.
    - `width`: k, the widening factor. Raises ValueError below 1.
    """

    def __init__(self, *, depth: int = 28, width: int = 2, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}; a wide residual network has 6n + 4 layers: 10, 16, 22, 28, 34, 40, …")
        at_least_one(width=width)
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.convolution = _convolution(channels, widths[0])
        blocks: list[nn.Module] = []
        for group in range(3):
            for number in range((depth - 4) // 6):
                stride = 2 if number == 0 and group > 0 else 1
                blocks.append(_Block(widths[group + (number > 0)], widths[group + 1], stride=stride))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        he_initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = relu(self.norm(self.blocks(self.convolution(images))))
        return self.head(features.mean(dim=(2, 3)))


@final
class _Block(nn.Module):
    """BatchNorm, ReLU, convolution, twice, beside the identity; where the shape changes, beside a 1×1 convolution.

    The latter reads what the first convolution reads, as in the authors' code.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.convolution1 = _convolution(inputs, outputs, stride=stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.convolution2 = _convolution(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        active = relu(self.norm1(features))
        beside = features if self.shortcut is None else self.shortcut(active)
        return beside + self.convolution2(relu(self.norm2(self.convolution1(active))))


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
