"""A classifier in two parts, f = h ∘ g, each of which can be called alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeAlias, final

from torch import Tensor, nn

import mlo

Part: TypeAlias = Literal["both", "features", "head", "second_head"]


@final
class Divided(nn.Module):
    """`network` cut before its last layer, which must be linear: the feature extractor g and the head h.

    `part` says what is run: `both`, images to logits; `features`, images to features [batch, features]; `head`, features to
    logits; `second_head`, features to the logits of another head, where there is one. Running the parts one after the
    other is running both, bit for bit.

    - `network`: taken over, and changed: its last layer moves to `head`.
    - `second_head`: whether there is another linear layer like the last one, with values of its own.

    Raises UserError for a network whose last layer is not linear.
    """

    def __init__(self, network: nn.Module, *, second_head: bool = False) -> None:
        super().__init__()
        name, last = list(network.named_modules())[-1]
        if not isinstance(last, nn.Linear) or not name:
            raise mlo.UserError(f"only a network that ends in a linear layer has a head, and this ends in {last}")
        parent, _, key = name.rpartition(".")
        setattr(network.get_submodule(parent), key, nn.Identity())
        self.features = network
        self.head = last
        self.second_head = nn.Linear(last.in_features, last.out_features) if second_head else None

    def forward(self, inputs: Tensor, part: Part = "both") -> Tensor:
        """See the class."""
        if part == "features":
            return self.features(inputs)
        if part == "head":
            return self.head(inputs)
        if part == "second_head":
            if self.second_head is None:
                raise mlo.UserError("this network has one head; variables `…_two_heads` have a second")
            return self.second_head(inputs)
        return self.head(self.features(inputs))


def divided(make: Callable[..., nn.Module], *, second_head: bool = False) -> Callable[..., nn.Module]:
    """The network that `make` makes, `Divided`, with the options of `make`."""

    @wraps(make)
    def cut(**options: Any) -> nn.Module:
        return Divided(make(**options), second_head=second_head)

    return cut
