"""How good a generator's images are: recognised by a classifier of real digits, and as varied as real images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mlo
from problems.blocks.image_sets import ImageSets, Part, in_order
from problems.blocks.scores import digits_judge

SAMPLES, SHOWN, AT_ONCE = 100, 10, 100
"""Images of a class that are judged of digits, and that are shown; images that are generated at once, of whole classes."""

ROWS = 20
"""Classes that are shown."""

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
    each, kind = (SAMPLES if digits else SHOWN), ("class" if clusters is None else "label")
    count = found.classes if clusters is None else clusters
    labels = torch.arange(count).repeat_interleave(each)
    real = _Real.of(found, learned, count, context)
    means = None if clusters is None else real.means
    made = _Made.of(generator, labels, latent, context, means=means, rows=count if digits else ROWS)
    metrics = {"variety": _least(made.apart / real.apart)}
    columns: dict[str, list[Any]] = {kind: [str(c) for c in range(count)]}
    if made.nearest is not None:
        near = _shares(made.nearest, labels, count)
        metrics |= {"nearest": near.min().item(), "mean_nearest": near.mean().item()}
        columns |= {"nearest (%)": near.tolist()}
    if digits:
        numbers, shares = _judged(made.images, labels, found.classes, recognised=clusters is None)
        metrics |= numbers
        columns |= shares
    if not complete:
        return mlo.Evaluation(metrics=metrics)
    columns |= {
        "mean distance": made.apart.tolist(),
        "of real images": real.apart.tolist(),
        "ratio": (made.apart / real.apart).tolist(),
    }
    table = mlo.Table(
        title=f"Generated images, {each} a {kind}",
        columns=tuple(columns),
        rows=tuple(zip(*([_number(entry) for entry in column] for column in columns.values()), strict=True)),
    )
    pictures = {"generated": grid(made.images, made.labels), "real": grid(*real.shown)}
    return mlo.Evaluation(metrics=metrics, tables=(table,), pictures=pictures)


class _Real(NamedTuple):
    """The real images of each label: their means [labels, numbers], and the mean distance between two of them [labels].

    `shown`: the first ten images of the first twenty labels, and their labels; all photographs together take gigabytes.
    """

    means: Tensor
    apart: Tensor
    shown: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, found: ImageSets, part: Part, count: int, context: mlo.Context) -> _Real:
        """Those in `part` of the first `count` labels."""
        means: list[Tensor] = []
        apart: list[Tensor] = []
        shown: list[Tensor] = []
        for c in range(count):
            images = _real(found, part, c, context)
            apart.append(_distance(images))
            means.append(images.flatten(1).mean(0))
            shown += [images[:SHOWN].clone()] if c < ROWS else []
        labels = torch.cat([torch.full((len(images),), c) for c, images in enumerate(shown)])
        return cls(torch.stack(means), torch.stack(apart), (torch.cat(shown), labels))


class _Made(NamedTuple):
    """Generated images: those that are kept, their labels, and the mean distance between two images of each label.

    `nearest`: for every image that was made, the label whose mean it lies nearest to, if means were given.
    """

    images: Tensor
    labels: Tensor
    apart: Tensor
    nearest: Tensor | None

    @classmethod
    def of(
        cls,
        generator: Callable[..., Tensor],
        labels: Tensor,
        latent: int,
        context: mlo.Context,
        *,
        means: Tensor | None,
        rows: int,
    ) -> _Made:
        """An image for each of `labels`, whole labels one after the other; images of the first `rows` labels are kept."""
        kept: list[Tensor] = []
        apart: list[Tensor] = []
        nearest: list[Tensor] = []
        for part in labels.split(AT_ONCE):
            made = _images(generator, part, latent, context)
            apart += [_distance(made[part == c]) for c in part.unique()]
            nearest += [] if means is None else [torch.cdist(made.flatten(1), means).argmin(1)]
            kept.append(made[part < rows])
        near = torch.cat(nearest) if nearest else None
        return cls(torch.cat(kept), labels[labels < rows], torch.stack(apart), near)


def _judged(
    images: Tensor, labels: Tensor, classes: int, *, recognised: bool
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """What a classifier of all digits says of `images`: metrics, and columns by class where labels are classes."""
    probabilities = digits_judge()(2 * images.float() - 1).softmax(1)
    seen = probabilities.argmax(1)
    counts = torch.bincount(seen, minlength=classes)
    metrics: dict[str, float] = {}
    columns: dict[str, list[Any]] = {}
    if recognised:
        shares = _shares(seen, labels, classes)
        metrics = {"recognised": shares.min().item(), "mean_recognised": shares.mean().item()}
        columns = {"recognised (%)": shares.tolist(), "taken for it": counts.tolist()}
    metrics["sure"] = 100 * (probabilities.amax(1) >= SURE).float().mean().item()
    metrics["rarest"] = 100 * counts.min().item() * classes / len(labels)
    return metrics, columns


def grid(images: Tensor, labels: Tensor) -> Tensor:
    """The first ten images of each of the first twenty classes, a row a class: uint8 [height, width(, 3)].

    Images [n, 1 or 3, h, w] in [0, 1]; the lines between them, and images that are missing, are mid-grey.
    """
    channels, height, width = images.shape[1:]
    rows = min(ROWS, int(labels.max()) + 1)
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


def _real(found: ImageSets, part: Part, label: int, context: mlo.Context) -> Tensor:
    """The first images of a class, at most as many as are judged, in the part's order."""
    places = torch.nonzero(part.labels == label).squeeze(1)[:SAMPLES]
    if len(places) == 0:
        return torch.empty(0, found.channels, found.size, found.size, dtype=context.dtype)
    chosen = Part(images=part.images, index=part.index[places], labels=part.labels[places], augmented=False)
    (batch,) = in_order(chosen, size=SAMPLES, device=torch.device("cpu"), dtype=context.dtype)
    return batch["images"]


def _distance(images: Tensor) -> Tensor:
    """Mean L2 distance between two different images; NaN where there are fewer than two."""
    return torch.pdist(images.flatten(1)).mean().float()


def _shares(seen: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The share in percent of each label's images that are seen as it, [classes]."""
    right = (seen == labels).float()
    return 100 * torch.stack([right[labels == c].mean() for c in range(classes)])


def _least(ratios: Tensor) -> float:
    known = ratios[ratios.isfinite()]
    return known.min().item() if len(known) else 0.0


def _number(entry: Any) -> Any:
    return None if isinstance(entry, float) and entry != entry else entry
