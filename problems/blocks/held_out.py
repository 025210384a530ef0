"""What is said of a trained classifier, by the images that were held out for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.image_sets import ImageSets, in_order
from problems.blocks.samples import DigitScores, embedding
from problems.blocks.scores import classification_scores

AT_ONCE, OF_PHOTOGRAPHS = 512, 64
"""Images that are judged together; 512 of 224 pixels take 3.2 GB in a ResNet-18, 64 take 0.4."""


def at_once(found: ImageSets) -> int:
    """How many images of this set are judged together."""
    return AT_ONCE if found.size <= 64 else OF_PHOTOGRAPHS


def judged(values: Mapping[str, Any], model: tuple[str, ...]) -> Any:
    """The level that is judged: `classifier`, if it is in `model`, as where a graph names none; or else the first.

    Raises UserError if that is no network with a head.
    """
    name = "classifier" if "classifier" in model else model[0]
    level = values[name]
    if not any(key.endswith("head.weight") for key in (*level, *getattr(level, "buffers", ()))):
        raise mlo.UserError(
            f"evaluation.model: level '{name}' is no network and classifies nothing; name one, such as 'classifier'"
        )
    return level


@final
class HeldOut:
    """The validation and test images of a set, and its training images in feature space.

    Networks are called as levels are, with `training=False`, and with `part="features"` where features are asked for.
    """

    def __init__(self, found: ImageSets, context: mlo.Context) -> None:
        self._found = found
        self._parts = {"validation": found.validation, "test": found.test}
        self._device = context.device
        self._taken = partial(in_order, device=context.device, dtype=context.dtype, size=at_once(found))

    @cached_property
    def digits(self) -> DigitScores | None:
        """Scores of generated digits, with distances to the test images, of which there are enough; None of other sets."""
        if self._found.name != "digits":
            return None
        return DigitScores(torch.cat([batch["images"] for batch in self._taken(self._found.test)]))

    def scores(self, network: Callable[..., Tensor], split: mlo.Split) -> dict[str, float]:
        """Cross-entropy `loss` and `classification_scores` on a split; `top5`, in percent, of sets of over ten classes."""
        labels = self._parts[split].labels.to(self._device)
        logits = torch.cat([network(batch["images"], training=False) for batch in self._taken(self._parts[split])])
        metrics = {"loss": cross_entropy(logits, labels).item(), **classification_scores(logits, labels).metrics}
        if self._found.classes > 10:
            metrics["top5"] = 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
        return metrics

    def features(self, network: Callable[..., Tensor], synthetic: Tensor | None) -> tuple[Tensor, float]:
        """`embedding` of the features of all training images, beside `synthetic` ones [m, features]."""
        batches = list(self._taken(self._found.train))
        real = torch.cat([network(batch["images"], part="features", training=False) for batch in batches])
        return embedding(real, torch.cat([batch["labels"] for batch in batches]), synthetic)
