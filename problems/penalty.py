"""A learned L2 penalty for logistic regression on digits: the smallest problem that contains another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.digits import FewDigits, whole_parts
from problems.blocks.scores import classification_scores


def build(settings: FewDigits, context: mlo.Context) -> mlo.Problem:
    """Logistic regression on flattened digits; all of a split is one batch."""
    parts = whole_parts(context, settings.train_per_class, settings.validation_per_class, settings.test_per_class)

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        logits = values[model[0]](parts[split]["images"], training=False)
        return classification_scores(logits, parts[split]["labels"])

    return mlo.Problem(
        variables={"linear": linear, "log_penalty": log_penalty},
        objectives={"penalised": penalised, "classification": classification},
        streams={name: mlo.stream.Constant(part) for name, part in parts.items() if name != "test"},
        evaluate=evaluate,
    )


def linear() -> nn.Module:
    """Weights [10, 64] and biases [10], at zero."""
    layer = nn.Linear(64, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def log_penalty(*, initial: float = -4.0) -> Tensor:
    """The logarithm of the penalty, a zero-dimensional tensor."""
    return torch.tensor(initial)


def penalised(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy + ½ exp(log_penalty) ‖W‖²; reads levels `weights` and `penalty`."""
    weights = values["weights"]
    return classification(values, batch) + 0.5 * values["penalty"].exp() * weights["weight"].square().sum()


def classification(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of level `weights`."""
    return cross_entropy(values["weights"](batch["images"]), batch["labels"])
