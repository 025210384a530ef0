"""How much each training image counts, learned from clean validation images (Franceschi et al. 2017, "data hyper-cleaning").

A tanh network of 910 numbers, 64 → 12 → 10, on digits some of whose training labels are wrong: small enough that its
Hessian can be written out, and far enough from a quadratic that approximate inverses differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.digits import CLASSES, Labelled, digits
from problems.blocks.scores import classification_scores


class Data(mlo.Settings):
    """How many digits of each class are for training, validation and test, and what share of training labels is wrong."""

    train_per_class: int = 10
    validation_per_class: int = 20
    test_per_class: int = 50
    wrong: float = 0.2


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """All of a split is one batch, so that the lower problem has one solution to come close to."""
    if not 0 <= settings.wrong < 1:
        raise ValueError(f"wrong is {settings.wrong}; it must be at least 0 and below 1")
    split = digits(
        seed=context.seed,
        largest_class=settings.train_per_class,
        validation_per_class=settings.validation_per_class,
        test_per_class=settings.test_per_class,
    )
    train, validation, test = (_batch(part, context) for part in (split.train, split.validation, split.test))
    spoilt = spoil(train["labels"], share=settings.wrong, seed=context.seed)
    is_wrong = spoilt != train["labels"]

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        images, labels = (test if split == "test" else validation).values()
        found = classification_scores(values[model[0]](images, training=False), labels)
        if len(model) == 1 or not bool(is_wrong.any()):
            return found
        weights = values[model[1]]
        kept = {"weight_of_right": weights[~is_wrong].mean().item(), "weight_of_wrong": weights[is_wrong].mean().item()}
        return mlo.Evaluation(metrics={**found.metrics, **kept}, tables=found.tables)

    return mlo.Problem(
        variables={"network": network, "weights": weights_of(len(spoilt))},
        objectives={"weighted": weighted, "classification": classification},
        streams={
            "train": mlo.stream.Constant({"images": train["images"], "labels": spoilt}),
            "validation": mlo.stream.Constant(validation),
        },
        evaluate=evaluate,
    )


def network() -> nn.Module:
    """Linear, tanh, linear: 64 · 12 + 12 + 12 · 10 + 10 = 910 numbers."""
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def weights_of(count: int) -> Callable[..., Tensor]:
    """One weight for each of `count` training images."""

    def weights(*, initial: float = 0.5) -> Tensor:
        """All alike; keep them between 0 and 1 by `constraints: sigmoid`."""
        return torch.full((count,), initial)

    return weights


def weighted(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Σᵢ uᵢ ℓᵢ(w) / n: cross-entropy on the training images; reads levels `network` and `weights`."""
    losses = cross_entropy(values["network"](batch["images"]), batch["labels"], reduction="none")
    return (values["weights"] * losses).mean()


def classification(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of level `network`."""
    return cross_entropy(values["network"](batch["images"]), batch["labels"])


def spoil(labels: Tensor, *, share: float, seed: int) -> Tensor:
    """`labels` with a `share` of them, rounded down, moved to another class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: int(share * len(labels))]
    moved = labels.clone()
    offsets = torch.randint(1, CLASSES, (len(chosen),), generator=generator)
    moved[chosen] = (moved[chosen] + offsets.to(labels.device)) % CLASSES
    return moved


def _batch(part: Labelled, context: mlo.Context) -> dict[str, Tensor]:
    return {
        "images": part.images.flatten(1).to(context.device, context.dtype),
        "labels": part.labels.to(context.device),
    }
