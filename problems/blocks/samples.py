"""What a generator makes of latents from the prior and of those that a finder finds, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

import mlo
from problems.blocks.latents import kl_to_standard_normal
from problems.blocks.pictures import scatter, tiles
from problems.blocks.quality import feature_frechet_distance
from problems.blocks.scores import digits_judge

Generate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Find: TypeAlias = Callable[[Tensor], Tensor]

SAMPLES, FEWER = 500, 50
"""Synthetic images that are measured, of all classes in turn: of digits, and of other sets, where images tell nothing."""

ROWS, COLUMNS = 10, 10
"""Classes in a picture of samples, and images of each."""


@final
@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of one set of latents.

    - `latents`: [n, latent]; `moved`, the mean of |F(z) − z| over all of their numbers, 0 for those of the prior.
    - `images`: [n, channels, size, size] in [0, 1]; `labels`: int64 [n], the classes they were asked to show, or None.
    """

    latents: Tensor
    images: Tensor
    labels: Tensor | None
    moved: float


def drawn(generate: Generate, find: Find | None, z: Tensor, labels: Tensor) -> dict[str, Samples]:
    """`uniform`: G(z, y); and, where there is a finder, `found`: G(F(z), y) of the same z and y."""
    latents = {"uniform": z} | ({"found": find(z)} if find is not None else {})
    return {
        name: Samples(latents=each, images=generate(each, labels), labels=labels, moved=(each - z).abs().mean().item())
        for name, each in latents.items()
    }


def sample_labels(count: int, *, classes: int, device: torch.device) -> Tensor:
    """The labels of `count` images, all classes in turn."""
    return torch.arange(count, device=device) % classes


@final
class DigitScores:
    """How samples compare with real digits, by a classifier of all 1,797 of them (`digits_judge`).

    - `real`: digits in [0, 1], [n, 1, 8, 8], that distances are taken to.
    """

    def __init__(self, real: Tensor) -> None:
        self._real = _judged(real)[0]

    def distance(self, samples: Samples) -> float:
        """The Fréchet distance to the real digits of the judge's 64 penultimate features: not the published FID."""
        return feature_frechet_distance(self._real, _judged(samples.images)[0]).item()

    def recognised(self, samples: Samples) -> float | None:
        """The share in which the judge sees the digit that was asked for, in percent; None where none was."""
        if samples.labels is None:
            return None
        return 100 * (_judged(samples.images)[1].argmax(1).cpu() == samples.labels.cpu()).double().mean().item()


def _judged(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, 64] and logits [n, 10]."""
    judge = digits_judge()
    layers = judge.last_two_layers.layers
    features = layers[:-1](judge.encoder(2 * images.detach().cpu().float() - 1))
    return features, layers[-1](features)


def samples_table(samples: Mapping[str, Samples], scores: DigitScores | None) -> mlo.Table:
    """A row for each set: how far from real images, how well recognised, how far its latents are from the prior."""
    rows = tuple(
        (
            name,
            None if scores is None else scores.distance(each),
            None if scores is None else scores.recognised(each),
            kl_to_standard_normal(each.latents).item(),
            each.moved,
        )
        for name, each in samples.items()
    )
    columns = ("latents", "feature Fréchet distance", "recognised (%)", "divergence", "mean |F(z) − z|")
    return mlo.Table(title=f"{len(samples['uniform'].images)} synthetic images", columns=columns, rows=rows)


def samples_pictures(
    generate: Generate, find: Find | None, *, latent: int, classes: int, like: Tensor
) -> dict[str, Tensor]:
    """`synthetic_uniform` and `synthetic_found`, a row for each of the first ten classes, from the same z and y.

    Latents are drawn from torch's global generator, with the dtype and the device of `like`.
    """
    rows = min(ROWS, classes)
    labels = torch.arange(rows, device=like.device).repeat_interleave(COLUMNS)
    z = torch.randn(len(labels), latent, dtype=like.dtype).to(like.device)
    found = drawn(generate, find, z, labels)
    return {f"synthetic_{name}": tiles(each.images.unflatten(0, (rows, COLUMNS))) for name, each in found.items()}


def embedding(real: Tensor, labels: Tensor, synthetic: Tensor | None) -> tuple[Tensor, float]:
    """Features in the plane of their two principal components, as a picture, and the share of the variance in it.

    Components are those of real and synthetic features together. Real ones are coloured by class, synthetic ones grey and
    beneath. It is linear, where the paper's UMAP (Figure 5) is not.

    - `real`, `synthetic`: [n, features] and [m, features].
    """
    everything = (real if synthetic is None else torch.cat([synthetic, real])).double()
    centred = everything - everything.mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    unlabelled = labels.new_full((len(everything) - len(real),), -1)
    variances = singular.square()
    share = (variances[:2].sum() / variances.sum().clamp(min=1e-300)).item()
    return scatter(centred @ components[:2].T, torch.cat([unlabelled, labels])), share
