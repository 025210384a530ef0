"""How good a generator's images are: recognised by a classifier of real digits, and as varied as real images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mlo
from problems.blocks.image_sets import ImageSets, Part, in_order
from problems.blocks.scores import digits_judge

SAMPLES, SHOWN, AT_ONCE = 100, 10, 100
"""Images of a class that are judged of digits, and that are shown; images that are generated at once."""

SURE = 0.9
"""The probability from which the classifier counts as sure."""


def generated_scores(
    found: ImageSets,
    learned: Part,
    generator: Callable[..., Tensor],
    *,
    latent: int,
    context: mlo.Context,
    complete: bool,
    clusters: int | None = None,
) -> mlo.Evaluation:
    """Numbers of 100 digits a label (of other sets 10 images), from latents of torch's global generator.

    - `clusters`: None where the labels are the set's classes; where they are not, how many there are.

    Its metrics:

    - `recognised`: the share in percent, in the worst class, that a classifier of all digits calls by the label asked for.
    - `variety`: the mean distance between two images of a class over that of real training images, in the worst class.
    - `sure`: the share in percent of which the classifier is sure, p ≥ 0.9, whatever it takes them for.
    - `rarest`: the share in percent of the class that it sees least, times the number of classes: 100 where all are equally
      frequent, and what tells of an unconditional generator, whose `recognised` is chance.

    - `nearest`: where labels are clusters, the share in percent, in the worst one, that lies nearest to the mean of the real
      images of the label asked for, among the means of all labels; 100 for the real images themselves.

    Clusters have `nearest` in place of `recognised`, since a digit is no cluster. Of sets other than digits there is neither
    of `recognised`, `sure` and `rarest`. `complete` adds a table and pictures.
    """
    digits = found.name == "digits"
    each = SAMPLES if digits else SHOWN
    classes = found.classes if clusters is None else clusters
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.cat([_images(generator, part, latent, context) for part in labels.split(AT_ONCE)])
    real, real_labels = _real(learned, classes, SAMPLES, context)
    distances = _distances(images, labels, classes)
    wanted = _distances(real, real_labels, classes)
    metrics = {"variety": _least(distances / wanted)}
    columns: dict[str, list[Any]] = {"class" if clusters is None else "label": [str(c) for c in range(classes)]}
    if clusters is not None:
        near = _shares(_nearest(images, real, real_labels, classes), labels, classes)
        metrics |= {"nearest": near.min().item(), "mean_nearest": near.mean().item()}
        columns |= {"nearest (%)": near.tolist()}
    if digits:
        probabilities = digits_judge()(2 * images.float() - 1).softmax(1)
        seen = probabilities.argmax(1)
        counts = torch.bincount(seen, minlength=found.classes)
        if clusters is None:
            shares = _shares(seen, labels, classes)
            metrics |= {"recognised": shares.min().item(), "mean_recognised": shares.mean().item()}
            columns |= {"recognised (%)": shares.tolist(), "taken for it": counts.tolist()}
        metrics |= {
            "sure": 100 * (probabilities.amax(1) >= SURE).float().mean().item(),
            "rarest": 100 * counts.min().item() * found.classes / len(labels),
        }
    if not complete:
        return mlo.Evaluation(metrics=metrics)
    columns |= {
        "mean distance": distances.tolist(),
        "of real images": wanted.tolist(),
        "ratio": (distances / wanted).tolist(),
    }
    table = mlo.Table(
        title=f"Generated images, {each} a {'class' if clusters is None else 'label'}",
        columns=tuple(columns),
        rows=tuple(zip(*([_number(entry) for entry in column] for column in columns.values()), strict=True)),
    )
    pictures = {"generated": grid(images, labels), "real": grid(real, real_labels)}
    return mlo.Evaluation(metrics=metrics, tables=(table,), pictures=pictures)


def grid(images: Tensor, labels: Tensor) -> Tensor:
    """The first ten images of each of the first twenty classes, a row a class: uint8 [height, width(, 3)].

    Images [n, 1 or 3, h, w] in [0, 1]; the lines between them, and images that are missing, are mid-grey.
    """
    channels, height, width = images.shape[1:]
    rows = min(20, int(labels.max()) + 1)
    picture = torch.full((rows * (height + 1) + 1, SHOWN * (width + 1) + 1, channels), 128, dtype=torch.uint8)
    shades = (images.detach() * 255).round().clamp(0, 255).to(device="cpu", dtype=torch.uint8).permute(0, 2, 3, 1)
    for c in range(rows):
        for column, tile in enumerate(shades[labels == c][:SHOWN]):
            top, left = 1 + c * (height + 1), 1 + column * (width + 1)
            picture[top : top + height, left : left + width] = tile
    return picture[..., 0] if channels == 1 else picture


def _images(generator: Callable[..., Tensor], labels: Tensor, latent: int, context: mlo.Context) -> Tensor:
    z = torch.randn(len(labels), latent, dtype=context.dtype)
    return generator(z.to(context.device), labels.to(context.device), training=False).cpu()


def _real(part: Part, classes: int, most: int, context: mlo.Context) -> tuple[Tensor, Tensor]:
    """At most so many images of each class, in the part's order, with their labels."""
    places = torch.cat([torch.nonzero(part.labels == c).squeeze(1)[:most] for c in range(classes)])
    chosen = Part(images=part.images, index=part.index[places], labels=part.labels[places], augmented=False)
    batches = list(in_order(chosen, size=AT_ONCE, device=torch.device("cpu"), dtype=context.dtype))
    return torch.cat([batch["images"] for batch in batches]), chosen.labels


def _shares(seen: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The share in percent of each label's images that are seen as it, [classes]."""
    right = (seen == labels).float()
    return 100 * torch.stack([right[labels == c].mean() for c in range(classes)])


def _nearest(images: Tensor, real: Tensor, real_labels: Tensor, classes: int) -> Tensor:
    """The label whose real images have the mean that is nearest, [n]."""
    means = torch.stack([real[real_labels == c].flatten(1).mean(0) for c in range(classes)])
    return torch.cdist(images.flatten(1), means).argmin(1)


def _distances(images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean L2 distance between two different images of a class, [classes]; NaN where there are fewer than two."""
    return torch.stack([torch.pdist(images[labels == c].flatten(1)).mean() for c in range(classes)]).float()


def _least(ratios: Tensor) -> float:
    known = ratios[ratios.isfinite()]
    return known.min().item() if len(known) else 0.0


def _number(entry: Any) -> Any:
    return None if isinstance(entry, float) and entry != entry else entry
