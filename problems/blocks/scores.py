"""What a run reports: accuracies, calibration, the columns of the paper's Table 3, and how good generated images are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

import mlo
from problems.blocks.digits import CLASSES, all_digits
from problems.blocks.quality import mean_pairwise_distance, recognised_share, recogniser, sample_grid

SAMPLES = 100
"""Generated images of each class that are judged."""


def classification_scores(logits: Tensor, labels: Tensor) -> mlo.Evaluation:
    """Accuracies in percent, and calibration, of logits [n, 10] for labels [n].

    `balanced_accuracy` is the mean over classes, `top1` over samples, `class_deviation` the standard deviation of the
    classes' accuracies (population), `calibration_error` the expected one over 15 bins (Guo et al. 2017, Eq. 3).
    """
    per_class = class_accuracies(logits, labels)
    probabilities = logits.softmax(1)
    metrics = {
        "balanced_accuracy": per_class.mean().item(),
        "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "class_deviation": per_class.std(correction=0).item(),
        "calibration_error": 100
        * multiclass_calibration_error(probabilities, labels, num_classes=CLASSES, n_bins=15, norm="l1").item(),
    }
    return mlo.Evaluation(metrics=metrics)


def class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of each class that is classified right, in percent, [10]."""
    return 100 * multiclass_accuracy(logits, labels, num_classes=CLASSES, average="none").double()


def per_class_table(
    labels: Tensor, before: Tensor, after: Tensor, *, real: Tensor, generated: Tensor | None
) -> mlo.Table:
    """The columns of Table 3 (Gala and Xie 2024): what each class had, was given, and gained."""
    first, second = class_accuracies(before, labels), class_accuracies(after, labels)
    counts = [None] * CLASSES if generated is None else [round(count) for count in generated.tolist()]
    columns = list(zip(real.tolist(), first.tolist(), counts, second.tolist(), strict=True))
    rows: list[tuple[Any, ...]] = [(str(c), *row) for c, row in enumerate(columns)]
    rows.append(("mean", None, first.mean().item(), None, second.mean().item()))
    rows.append(("standard deviation", None, first.std(correction=0).item(), None, second.std(correction=0).item()))
    return mlo.Table(
        title="Each class of the test set (accuracy in %)",
        columns=("class", "real images", "accuracy before", "generated images", "accuracy after"),
        rows=tuple(rows),
    )


def generation_scores(generator: Callable[..., Tensor], *, latent: int, complete: bool) -> mlo.Evaluation:
    """How many generated images of each class a classifier of all digits recognises, and how varied they are.

    `recognised` is the share in the worst class; `variety` the mean pairwise distance within a class over that of real
    images, in the worst class. Latents are drawn from torch's global generator. `complete` adds the table and a grid of
    samples beside one of real digits.
    """
    everything = all_digits()
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    images = generator(torch.randn(len(labels), latent), labels, training=False).float()
    shares = 100 * recognised_share(recogniser(), images, labels)
    distances = mean_pairwise_distance(images, labels)
    real = mean_pairwise_distance(everything.images, everything.labels)
    metrics = {"recognised": shares.min().item(), "variety": (distances / real).min().item()}
    if not complete:
        return mlo.Evaluation(metrics=metrics)
    rows = tuple(
        (str(c), shares[c].item(), distances[c].item(), real[c].item(), (distances / real)[c].item())
        for c in range(CLASSES)
    )
    table = mlo.Table(
        title=f"Generated digits, {SAMPLES} a class",
        columns=("class", "recognised (%)", "mean distance", "of real digits", "ratio"),
        rows=rows,
    )
    pictures = {
        "generated": sample_grid(images, labels),
        "real": sample_grid(everything.images, everything.labels),
    }
    return mlo.Evaluation(metrics=metrics, tables=(table,), pictures=pictures)
