"""Generators of images, trained on their own: what the generators of other graphs start from.

A GAN is a game of two levels, `generator` and `discriminator`, each `against` the other; a diffusion model is one level,
`generator`. Objectives read them by these names; option `generator` names another level, such as `foundation`, which a level
of that name in another graph can start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu, softplus

import mlo
from problems.blocks.foundation import foundation_images
from problems.blocks.generators import (
    discriminators_for,
    generated_scores,
    generators_for,
    image_and_noise,
    noisy,
    signal,
)
from problems.blocks.image_sets import ImageSets, ImageSettings, Part, stream
from problems.blocks.jitter import Jitter
from problems.blocks.streams import Jittered

Batch: TypeAlias = Mapping[str, Any]
Loss: TypeAlias = Literal["hinge", "logistic"]
Weighting: TypeAlias = Literal["noise", "velocity"]
Schedule: TypeAlias = Literal["cosine", "linear"]


class Data(ImageSettings):
    """Which images a generator learns, and the size of the batches.

    - `source`, `root`, `complete`, `size`, `workers`: see `image_sets`.
    - `foundation`, `fraction`, `validation`: the shares of the set's training images that are taken away first, of the
      others that are used at all, and of these set aside; with the same numbers and seed, other problems split the set in
      the same way.
    - `part`: what is learned: `train`, what is used and not set aside; `rest`, the images that `fraction` leaves out, for a
      generator that has seen none of what a classifier is trained on; `foundation`, those that are taken away first.
    - `foundation_labels`: of part `foundation`: None for the set's classes, or so many clusters of its images
      (`foundation_images`), by the run's seed.
    - `batch_size`: real images a batch, and as many generated ones.
    - `latent`: the size of z; of a diffusion model, channels · size².
    - `rotation`, `scale`, `shift`: how far real images are turned (degrees), stretched and moved (pixels) for the
      discriminator, beside the set's standard augmentation.
    """

    part: Literal["train", "rest", "foundation"] = "train"
    foundation_labels: int | None = None
    latent: int = 64
    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """The problem on the images that `settings` describe."""
    if settings.latent < 1:
        raise ValueError(f"latent is {settings.latent}; it must be at least 1")
    found = settings.sets(context.seed)
    learned = _learned(found, settings, context.seed)
    labels = found.classes if settings.foundation_labels is None else settings.foundation_labels
    count, dtype = settings.batch_size, context.dtype
    real: mlo.stream.AbstractStream = stream(learned, size=count, device=context.device, dtype=dtype)
    if settings.rotation or settings.scale or settings.shift:
        jitter = Jitter(rotation=settings.rotation, scale=settings.scale, shift=settings.shift)
        real = Jittered(real, jitter, background=0.0)
    shape = (count, found.channels, found.size, found.size)
    return mlo.Problem(
        variables={
            **generators_for(found, latent=settings.latent, labels=labels),
            **discriminators_for(found, labels=labels),
        },
        objectives={
            "discrimination": discrimination(labels),
            "generation": generation,
            "auxiliary_discrimination": auxiliary_discrimination,
            "auxiliary_generation": auxiliary_generation,
            "denoising": denoising,
        },
        streams={
            "train": real,
            "noise": mlo.stream.Noise(partial(_noise, count, settings.latent, labels, dtype)),
            "diffusion_noise": mlo.stream.Noise(partial(_diffusion_noise, shape, dtype)),
        },
        evaluate=_evaluation(
            partial(
                generated_scores,
                found,
                learned,
                latent=settings.latent,
                context=context,
                clusters=settings.foundation_labels,
            )
        ),
    )


def _learned(found: ImageSets, settings: Data, seed: int) -> Part:
    """The part that `settings` name, under its labels."""
    if settings.foundation_labels is not None:
        if settings.part != "foundation":
            raise ValueError(
                f"foundation_labels is {settings.foundation_labels}, and part is '{settings.part}': clusters are made of "
                "part 'foundation'"
            )
        return foundation_images(found, labels=settings.foundation_labels, seed=seed)
    part = {"train": found.train, "rest": found.rest, "foundation": found.foundation}[settings.part]
    if len(part) == 0:
        none = {
            "rest": f"a fraction of {settings.fraction} leaves no image out",
            "foundation": "foundation is 0",
            "train": f"a validation of {settings.validation} leaves no image",
        }
        raise ValueError(f"part is '{settings.part}', and {none[settings.part]}")
    return part


def discrimination(classes: int) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The objective of a discriminator of images of so many classes."""

    def discriminated(
        values: mlo.Values,
        batch: Batch,
        *,
        loss: Loss = "hinge",
        mismatch: float = 0.0,
        generator: str = "generator",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The discriminator's side: with the hinge loss (Lim and Ye 2017; Brock et al. 2019)

            E[(1 − D(x, y))₊] + E[(1 + D(G(z, y'), y'))₊] + mismatch · E[(1 + D(x, ỹ))₊],

        with `logistic`, softplus(−D) and softplus(D) for the two (Goodfellow et al. 2014).

        - `mismatch`: the weight of real images under a wrong label ỹ, drawn uniformly (Reed et al. 2016, Alg. 1); for a
          discriminator that looks at labels.
        - `generator`: the level that is G, here and below.
        """
        real, noise = batch["train"], batch["noise"]
        images = [real["images"], values[generator](noise["z"], noise["labels"])]
        labels = [real["labels"], noise["labels"]]
        if mismatch:
            images.append(real["images"])
            labels.append((real["labels"] + noise["offsets"]) % classes)
        scores = values["discriminator"](torch.cat(images), torch.cat(labels))
        true, fake, *wrong = scores.split([len(each) for each in labels])
        total = _real(true, loss) + _fake(fake, loss) + (mismatch * _fake(wrong[0], loss) if wrong else 0)
        return total, {"real_score": true.mean(), "fake_score": fake.mean()}

    return discriminated


def generation(values: mlo.Values, batch: Batch, *, loss: Loss = "hinge", generator: str = "generator") -> Tensor:
    """The generator's side: −E[D(G(z, y), y)], or with `logistic` E[softplus(−D(G(z, y), y))], which does not saturate."""
    noise = batch["noise"]
    generated = values[generator](noise["z"], noise["labels"])
    return _fooled(values["discriminator"](generated, noise["labels"]), loss)


def auxiliary_discrimination(
    values: mlo.Values,
    batch: Batch,
    *,
    loss: Loss = "hinge",
    weight: float = 1.0,
    generated_weight: float = 0.0,
    generator: str = "generator",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's side of AC-GAN (Odena et al. 2017): L_S as in `discrimination`, and cross-entropies L_C.

    The paper maximises L_S + L_C with L_C over real and generated images alike.

    - `weight`: of the cross-entropy of real images.
    - `generated_weight`: of that of generated ones; 1 is the paper's. It teaches the discriminator to call an image by the
      label it was asked for, right or wrong, and so 0 is the default.
    """
    real, noise = batch["train"], batch["noise"]
    images = torch.cat((real["images"], values[generator](noise["z"], noise["labels"])))
    scores, logits = values["discriminator"](images)
    count = len(real["labels"])
    recognition = cross_entropy(logits[:count], real["labels"])
    of_generated = cross_entropy(logits[count:], noise["labels"])
    total = _real(scores[:count], loss) + _fake(scores[count:], loss) + weight * recognition
    measured = {"recognition": recognition, "generated_recognition": of_generated}
    return total + (generated_weight * of_generated if generated_weight else 0), measured


def auxiliary_generation(
    values: mlo.Values, batch: Batch, *, loss: Loss = "hinge", weight: float = 1.0, generator: str = "generator"
) -> Tensor:
    """The generator's side of AC-GAN: that of `generation`, + weight · cross-entropy of its images by the discriminator."""
    noise = batch["noise"]
    scores, logits = values["discriminator"](values[generator](noise["z"], noise["labels"]))
    return _fooled(scores, loss) + weight * cross_entropy(logits, noise["labels"])


def denoising(
    values: mlo.Values,
    batch: Batch,
    *,
    schedule: Schedule = "cosine",
    weighting: Weighting = "noise",
    generator: str = "generator",
) -> Tensor:
    """E ‖ε − ε̂(x_t, t, y)‖² by pixel, t uniform: DDPM's simple objective (Ho et al. 2020, Eq. 14), on images in [−1, 1].

    - `schedule`: how noise is added; that of the generator.
    - `weighting`: `velocity` is E ‖v − v̂‖², in which ‖ε − ε̂‖² = ᾱ(t) ‖v − v̂‖² weighs 1/ᾱ(t): noise-like images count as
      much as others, and few steps of the solver start from these (Salimans and Ho 2022, §4).
    """
    real, noise = batch["train"], batch["diffusion_noise"]
    images, times = 2 * real["images"] - 1, noise["times"]
    share = signal(times, schedule)
    x = noisy(images, noise["noise"], share)
    v = values[generator](x, real["labels"], times)
    kept = share[:, None, None, None]
    if weighting == "velocity":
        return (kept.sqrt() * noise["noise"] - (1 - kept).sqrt() * images - v).square().mean()
    return (noise["noise"] - image_and_noise(x, v, share)[1]).square().mean()


def _real(scores: Tensor, loss: Loss) -> Tensor:
    return relu(1 - scores).mean() if loss == "hinge" else softplus(-scores).mean()


def _fake(scores: Tensor, loss: Loss) -> Tensor:
    return relu(1 + scores).mean() if loss == "hinge" else softplus(scores).mean()


def _fooled(scores: Tensor, loss: Loss) -> Tensor:
    return -scores.mean() if loss == "hinge" else softplus(-scores).mean()


def _noise(count: int, latent: int, classes: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """One draw for a batch of generated images.

    Latents `z`, uniform classes `labels`, and `offsets` from a label to a wrong one, modulo the number of classes.
    """
    return {
        "z": torch.randn(count, latent, generator=generator, dtype=dtype),
        "labels": torch.randint(classes, (count,), generator=generator),
        "offsets": torch.randint(1, max(2, classes), (count,), generator=generator),
    }


def _diffusion_noise(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform `times` [n] in [0, 1) and the `noise` of a batch of images. Times are stratified: one in each n-th."""
    count = shape[0]
    places = torch.rand(count, generator=generator, dtype=dtype)
    times = (torch.randperm(count, generator=generator) + places) / count
    return {"times": times, "noise": torch.randn(*shape, generator=generator, dtype=dtype)}


def _evaluation(judge: Callable[..., mlo.Evaluation]) -> mlo.Evaluate:
    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        return judge(values[model[0]], complete=complete and split == "test")

    return evaluate
