"""The handwritten digits that ship with scikit-learn, split and, if asked, made long-tailed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast, final

import torch
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

import mlo

CLASSES = 10
STRONGEST = 16.0  # the largest intensity in scikit-learn's copy


@final
@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images with their labels.

    - `images`: float32 [n, 1, 8, 8] in [−1, 1]; −1 is the background.
    - `labels`: int64 [n], the digit shown.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> Tensor:
        """Images of each class, int64 [10]."""
        return torch.bincount(self.labels, minlength=CLASSES)


@final
@dataclass(frozen=True, kw_only=True)
class Split:
    """Three sets of digits that share no image; each is ordered by class."""

    train: Labelled
    validation: Labelled
    test: Labelled


@cache
def all_digits() -> Labelled:
    """All 1,797 digits in scikit-learn's order: 174 to 183 images a class. Shared: do not write into them."""
    images, labels = cast("tuple[Any, Any]", load_digits(return_X_y=True))  # float64 [n, 64] in [0, 16], int64 [n]
    scaled = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / (STRONGEST / 2) - 1
    return Labelled(images=scaled, labels=torch.tensor(labels, dtype=torch.int64))


def long_tail(*, largest_class: int, imbalance: float) -> tuple[int, ...]:
    """Training images of each class c in 0..9: n_c = max(1, int(n_max · IF^(−c/9))) (Cao et al. 2019, LDAM).

    - `largest_class`: n_max, the images of class 0.
    - `imbalance`: IF ≥ 1, the ratio of the largest to the smallest class before rounding; 1 is balanced.
    """
    return tuple(max(1, int(largest_class * imbalance ** (-c / (CLASSES - 1)))) for c in range(CLASSES))


def digits(
    *,
    seed: int,
    imbalance: float = 1.0,
    largest_class: int | None = None,
    validation_per_class: int = 10,
    test_per_class: int = 50,
) -> Split:
    """Split the digits at random into training, validation and test sets without a common image.

    Each class is shuffled once; its first `test_per_class` images are for the test, the next `validation_per_class`
    for validation, the next n_c for training (`long_tail`). So test and validation sets do not depend on the long tail,
    and a training set of smaller classes is part of one of larger classes.

    - `largest_class`: training images of class 0; None takes as many as every class can give.

    Raises ValueError if a number is out of range or a class has too few images.
    """
    if imbalance < 1:
        raise ValueError(f"imbalance is {imbalance}; it must be at least 1 (balanced)")
    if min(validation_per_class, test_per_class) < 0:
        raise ValueError(
            f"validation_per_class is {validation_per_class} and test_per_class {test_per_class}; "
            "neither may be negative"
        )
    everything = all_digits()
    held_out = test_per_class + validation_per_class
    available: list[int] = (everything.counts() - held_out).tolist()
    if min(available) < 1:
        raise ValueError(
            f"test_per_class ({test_per_class}) + validation_per_class ({validation_per_class}) = {held_out}, which "
            f"leaves nothing to train on: the smallest class has {min(available) + held_out} images"
        )
    largest = min(available) if largest_class is None else largest_class
    if largest < 1:
        raise ValueError(f"largest_class is {largest}; it must be at least 1")
    wanted = long_tail(largest_class=largest, imbalance=imbalance)
    for c, (want, have) in enumerate(zip(wanted, available, strict=True)):
        if want > have:
            raise ValueError(
                f"largest_class is {largest}: class {c} would need {want} training images, but {have} are left "
                f"after {held_out} for validation and test; at most {min(available)} fits every class"
            )

    order = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # test, validation, train
    for c, count in enumerate(wanted):
        of_class = torch.nonzero(everything.labels == c).squeeze(1)
        shuffled = of_class[torch.randperm(len(of_class), generator=order)]
        sizes = (test_per_class, validation_per_class, count, len(of_class) - held_out - count)
        for part, chosen in zip(parts, shuffled.split(sizes), strict=False):  # what is left over is dropped
            part.append(chosen)
    test, validation, train = (_take(everything, torch.cat(part)) for part in parts)
    return Split(train=train, validation=validation, test=test)


def _take(data: Labelled, which: Tensor) -> Labelled:
    return Labelled(images=data.images[which], labels=data.labels[which])


class FewDigits(mlo.Settings):
    """How many digits of each class are for training, validation and test."""

    train_per_class: int = 10
    validation_per_class: int = 20
    test_per_class: int = 50


def whole_parts(
    context: mlo.Context, train_per_class: int, validation_per_class: int, test_per_class: int
) -> dict[str, dict[str, Tensor]]:
    """So many digits of each class for `train`, `validation` and `test`, each one batch of flat `images` and `labels`."""
    split = digits(
        seed=context.seed,
        largest_class=train_per_class,
        validation_per_class=validation_per_class,
        test_per_class=test_per_class,
    )
    return {
        name: {
            "images": part.images.flatten(1).to(context.device, context.dtype),
            "labels": part.labels.to(context.device),
        }
        for name, part in (("train", split.train), ("validation", split.validation), ("test", split.test))
    }
