"""What a foundation model is asked for by a sampler or by P-SSL, and what it makes of that: for evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import mlo
from problems.blocks.image_sets import ImageSets, in_order
from problems.blocks.samplers import entropies, gumbel_noise
from problems.blocks.samples import Samples, sample_labels

CLASSES, SHOWN = 10, 100
"""Classes that are looked at, and images of theirs that are shown."""


def labelled_in_turn(found: ImageSets, count: int, context: mlo.Context, *, again: bool = True) -> dict[str, Tensor]:
    """`count` training images of the first ten classes that occur, in turn, with `labels` and, counted from 0, `rows`.

    - `again`: whether they are taken over again where there are fewer.
    """
    part = found.train
    classes = part.labels.unique()[:CLASSES]
    places = torch.nonzero(torch.isin(part.labels, classes)).squeeze(1)
    rows = torch.searchsorted(classes, part.labels[places])
    order = _in_turn(rows)
    chosen = order[torch.arange(count) % len(order)] if again else order[:count]
    index = places[chosen]
    taken = replace(part, index=part.index[index], labels=part.labels[index])
    (batch,) = in_order(taken, size=len(taken), device=context.device, dtype=context.dtype)
    return {**batch, "rows": rows[chosen].to(context.device)}


def _in_turn(rows: Tensor) -> Tensor:
    """Places of all `rows`, ordered so that rows alternate as long as they last."""
    rank = torch.zeros_like(rows)
    for row in rows.unique():
        members = torch.nonzero(rows == row).squeeze(1)
        rank[members] = torch.arange(len(members))
    return torch.argsort(rank * (int(rows.max()) + 1) + rows)


def asked_for(
    values: Mapping[str, Any], real: Mapping[str, Tensor], labels: int, latent: int, context: mlo.Context
) -> tuple[dict[str, Samples], dict[str, Tensor]]:
    """Images of level `foundation`, each way it is asked for them with the same latents; and the row that each is shown in.

    - `uniform`: of foundation labels in turn: all of them, or the first ten where there are more than images.
    - `pseudo`: of what level `foundation_classifier` says of `real`.
    - `found`: of level `sampler`, for the classes of `real`. Last, where there is one.

    Latents and Gumbel noise are drawn from torch's global generator. `real` is from `labelled_in_turn`.
    """
    count = len(real["labels"])
    z = torch.randn(count, latent, dtype=context.dtype).to(context.device)
    gumbel = gumbel_noise(count, labels, generator=torch.default_generator, dtype=context.dtype).to(context.device)
    uniform = sample_labels(count, classes=labels if labels <= count else CLASSES, device=context.device)
    ways: dict[str, tuple[Tensor, Tensor]] = {"uniform": (z, uniform)}
    if "foundation_classifier" in values:
        ways["pseudo"] = z, values["foundation_classifier"](real["images"], training=False).softmax(1)
    if "sampler" in values:
        ways["found"] = values["sampler"](z, real["labels"], gumbel, training=False)
    samples = {
        name: Samples(
            latents=latents,
            images=values["foundation"](latents, wanted, training=False),
            labels=None if name == "uniform" else real["labels"],
            moved=(latents - z).abs().mean().item(),
        )
        for name, (latents, wanted) in ways.items()
    }
    return samples, {name: (uniform if name == "uniform" else real["rows"]).cpu() for name in samples}


def label_entropies(table: Tensor) -> dict[str, float]:
    """`label_entropy`, the mean over classes of the entropy of their labels in nats, and that of each of the first ten."""
    found = entropies(table)
    each = {f"label_entropy.{c}": entropy for c, entropy in enumerate(found[:CLASSES].tolist())}
    return {"label_entropy": found.mean().item(), **each}


def likeliest_labels(table: Tensor, *, labels: int = 3) -> mlo.Table:
    """What each of the first ten classes asks the foundation for most often, with its share."""
    shares, places = table[:CLASSES].softmax(1).topk(min(labels, table.shape[1]))
    said = [
        [f"{label} ({100 * share:.0f} %)" for share, label in zip(*pair, strict=True)]
        for pair in zip(shares.tolist(), places.tolist(), strict=True)
    ]
    rows = tuple(
        (str(c), entropy, *each) for c, (entropy, each) in enumerate(zip(entropies(table).tolist(), said, strict=False))
    )
    names = tuple(f"likeliest {number + 1}" for number in range(shares.shape[1]))
    return mlo.Table(title="Foundation labels of each class", columns=("class", "entropy", *names), rows=rows)
