"""A representation trained for the classifier it leads to, under penalties that validation chooses: three nested levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.digits import whole_parts
from problems.blocks.scores import classification_scores


class Data(mlo.Settings):
    """How many digits of each class are for training (half for the classifier), validation and test."""

    train_per_class: int = 12
    validation_per_class: int = 20
    test_per_class: int = 50


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """Digits, flattened; all of a stream is one batch. Every other training image is for `support`, the rest for `query`."""
    parts = whole_parts(context, settings.train_per_class, settings.validation_per_class, settings.test_per_class)
    streams = {
        "support": {key: tensor[0::2] for key, tensor in parts["train"].items()},
        "query": {key: tensor[1::2] for key, tensor in parts["train"].items()},
        "validation": parts["validation"],
    }

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        features, classifier = model
        logits = values[classifier](values[features](parts[split]["images"], training=False), training=False)
        return classification_scores(logits, parts[split]["labels"])

    return mlo.Problem(
        variables={"representation": representation, "linear": linear, "log_penalties": log_penalties},
        objectives={"fit": fit, "transfer": transfer, "validation": validation},
        streams={name: mlo.stream.Constant(part) for name, part in streams.items()},
        evaluate=evaluate,
    )


def representation(*, width: int = 16) -> nn.Module:
    """64 numbers to `width` between −1 and 1."""
    return nn.Sequential(nn.Linear(64, width), nn.Tanh())


def linear(*, width: int = 16) -> nn.Module:
    """Weights [10, width] and biases [10], at zero."""
    layer = nn.Linear(width, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def log_penalties(*, initial: float = -4.0) -> dict[str, Tensor]:
    """The logarithms of the penalties on the classifier and on the representation."""
    return {"classifier": torch.tensor(initial), "features": torch.tensor(initial)}


def fit(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy + ½ exp(penalty) ‖W‖²: what level `classifier` minimises, given `features` and `penalty`."""
    weight = values["classifier"]["weight"]
    return _loss(values, batch) + 0.5 * values["penalty"]["classifier"].exp() * weight.square().sum()


def transfer(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy + ½ exp(penalty) ‖V‖²: what level `features` minimises through the classifier's response."""
    weight = values["features"]["0.weight"]
    return _loss(values, batch) + 0.5 * values["penalty"]["features"].exp() * weight.square().sum()


def validation(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the classifier on the features: what level `penalty` minimises through both."""
    return _loss(values, batch)


def _loss(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    return cross_entropy(values["classifier"](values["features"](batch["images"])), batch["labels"])
