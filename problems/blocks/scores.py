"""What a run reports: accuracies, calibration, the columns of the paper's Table 3, and how good generated images are."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import mlo
from problems.blocks.digits import CLASSES, all_digits
from problems.blocks.networks import Classifier
from problems.blocks.quality import mean_pairwise_distance, recognised_share, recogniser, sample_grid
from problems.blocks.torchvision_door import torchvision

SAMPLES = 100
"""Generated images of each class that are judged."""


@functools.cache
def digits_judge() -> Classifier:
    """The recogniser, trained once a process: it takes 3 s, and has no random numbers but its own."""
    return recogniser()


@functools.cache
def _torchmetrics() -> ModuleType:
    """Not before a run needs it: 0.8 s. It imports torchvision, if it is there, and not through the door."""
    with suppress(ImportError):
        torchvision()
    return importlib.import_module("torchmetrics.functional.classification")


def classification_scores(logits: Tensor, labels: Tensor) -> mlo.Evaluation:
    """Accuracies in percent, and calibration, of logits [n, classes] for labels [n].

    `balanced_accuracy` is the mean over the classes that labels name, `top1` over samples, `class_deviation` the standard
    deviation of these classes' accuracies (population), `calibration_error` the expected one over 15 bins (Guo et al. 2017,
    Eq. 3).
    """
    per_class = class_accuracies(logits, labels)[labels.bincount(minlength=logits.shape[1]) > 0]
    probabilities = logits.softmax(1)
    metrics = {
        "balanced_accuracy": per_class.mean().item(),
        "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "class_deviation": per_class.std(correction=0).item(),
        "calibration_error": 100
        * _torchmetrics()
        .multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[1], n_bins=15, norm="l1")
        .item(),
    }
    return mlo.Evaluation(metrics=metrics)


def class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of each class that is classified right, in percent, [classes]; 0 for a class without samples."""
    return (
        100 * _torchmetrics().multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="none").double()
    )


def per_class_table(
    labels: Tensor, before: Tensor | None, after: Tensor, *, real: Tensor, generated: Tensor | None
) -> mlo.Table:
    """The columns of Table 3 (Gala and Xie 2024): what each class had, was given, and gained.

    Logits `before` and `after` [n, 10] for labels [n], images `real` and `generated` [10]; what is None has no column.
    """
    columns: dict[str, list[Any]] = {
        "class": [str(c) for c in range(CLASSES)] + ["mean", "standard deviation"],
        "real images": [*real.tolist(), None, None],
    }
    if before is not None:
        columns["accuracy before"] = _with_moments(class_accuracies(before, labels))
    if generated is not None:
        columns["generated images"] = [*(round(count) for count in generated.tolist()), None, None]
    columns["accuracy" if before is None else "accuracy after"] = _with_moments(class_accuracies(after, labels))
    rows = tuple(zip(*columns.values(), strict=True))
    return mlo.Table(title="Each class of the test set (accuracy in %)", columns=tuple(columns), rows=rows)


def _with_moments(accuracies: Tensor) -> list[float]:
    """The classes' accuracies, their mean and their standard deviation (population)."""
    return [*accuracies.tolist(), accuracies.mean().item(), accuracies.std(correction=0).item()]


def generation_scores(generator: Callable[..., Tensor], *, latent: int, complete: bool) -> mlo.Evaluation:
    """How many generated images of each class a classifier of all digits recognises, and how varied they are.

    `recognised` is the share in the worst class; `variety` the mean pairwise distance within a class over that of real
    images, in the worst class. Latents are drawn from torch's global generator. `complete` adds the table and a grid of
    samples beside one of real digits.
    """
    everything = all_digits()
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    images = generator(torch.randn(len(labels), latent), labels, training=False).float()
    shares = 100 * recognised_share(digits_judge(), images, labels)
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
