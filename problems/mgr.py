"""MGR: synthetic images found by the classifier that needs them (Yamaguchi et al. 2023).

A classifier θ = [ψ, ω], feature extractor and head, descends L + λ L_PCR (Eqs. 2–6): cross-entropy on real images, and
consistency of its features on images that a frozen generator makes of latents F_φ(z). The finder φ descends the validation
loss through the classifier's response, and a divergence that keeps F_φ(z) near the prior (Eqs. 7, 8 and 11).

A graph names its levels `classifier`, `generator` and `finder`: objectives read them by these names. Where a level lists no
`finder`, latents are drawn from the prior; where it lists no `generator`, real images stand in for synthetic ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.consistency import (
    augmix,
    augmix_draws,
    matched,
    pcr,
    rand_augment_draws,
    strong,
    strong_draws,
    trivial_augment_draws,
    uda_targets,
)
from problems.blocks.finders import Residual, perceptron
from problems.blocks.generators import generators_for
from problems.blocks.held_out import HeldOut, judged
from problems.blocks.image_sets import ImageSets, ImageSettings, stream
from problems.blocks.judge import Photographs, judge_from
from problems.blocks.latents import kl_to_standard_normal
from problems.blocks.networks import divided, networks_for
from problems.blocks.samples import FEWER, SAMPLES, drawn, sample_labels, samples_pictures, samples_table
from problems.blocks.streams import Draws, Transform, Transformed, in_dtype

Batch: TypeAlias = Mapping[str, Any]
Variables: TypeAlias = Callable[..., nn.Module]

AUGMENTATIONS: Mapping[str, tuple[Transform, Draws]] = {
    "augmix": (augmix, augmix_draws),
    "rand_augment": (strong, rand_augment_draws),
    "trivial_augment": (strong, trivial_augment_draws),
}
"""What can be done to real training images (Table 3)."""


class Data(ImageSettings):
    """Which images, how many of them, and the size of the batches.

    - `source`, `root`, `complete`, `size`, `workers`: see `image_sets`.
    - `fraction`: the share of the set's training images that is used at all.
    - `validation`: the share of these that is set aside as D_val; the others are D.
    - `batch_size`: B = B_p = B_val, images a batch: real, synthetic, of validation.
    - `latent`: the size of z, which must be the generator's.
    - `strongest`: the largest magnitude of T's operations, in [0, 1]: `problems.blocks.augmentation`.
    - `augmentation`: what is done to real training images beside the set's standard augmentation, Table 3.
    - `judge`, `judge_depth`: a file with the weights of a ResNet of torchvision, and its depth, in whose features generated
      photographs are compared with real ones: `problems.blocks.judge`. Digits have a judge of their own.
    """

    latent: int = 64
    strongest: float = 1.0
    augmentation: Literal["none", "augmix", "rand_augment", "trivial_augment"] = "none"
    judge: str | None = None
    judge_depth: Literal[18, 34, 50, 101] = 18


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """The problem on the images that `settings` describe."""
    if settings.latent < 1:
        raise ValueError(f"latent is {settings.latent}; it must be at least 1")
    found = settings.sets(context.seed)
    if len(found.validation) == 0:
        raise ValueError(f"validation is {settings.validation}; it leaves no image for the finder to be judged by")
    if not 0 <= settings.strongest <= 1:
        raise ValueError(f"strongest is {settings.strongest}; magnitudes lie in [0, 1]")
    if settings.judge is not None and found.channels != 3:
        raise ValueError(
            f"judge is '{settings.judge}'; images of {found.name} are grey, and it is a network of coloured ones"
        )
    drawn = partial(stream, size=settings.batch_size, device=context.device, dtype=context.dtype)
    train = drawn(found.train)
    if settings.augmentation != "none":
        train = Transformed(train, *AUGMENTATIONS[settings.augmentation])
    networks = networks_for(found, outputs=found.classes)
    return mlo.Problem(
        variables={
            **{name: divided(make) for name, make in networks.items()},
            **{f"{name}_two_heads": divided(make, second_head=True) for name, make in networks.items()},
            **generators_for(found, latent=settings.latent),
            **finders_for(settings.latent),
        },
        objectives={
            "classification": classification,
            "consistency": consistency,
            "labelled": labelled,
            "hardness": hardness,
            "validation": validation,
        },
        streams={
            "train": train,
            "real": drawn(found.train),
            "validation": drawn(found.validation),
            "noise": mlo.stream.Noise(partial(_noise, settings, found.classes, context.dtype)),
        },
        evaluate=_evaluation(found, settings, context),
    )


def finders_for(latent: int) -> dict[str, Variables]:
    """The finders that a level can be, by name, for latents of that size (Eq. 10, Table 5)."""

    def residual_mlp(*, layers: int = 3, hidden: int = 64) -> nn.Module:
        """z + tanh(MLP(z)), Eq. 10; with one layer, Table 5's "Residual+Shallow"."""
        return Residual(perceptron(latent, latent, layers=layers, hidden=hidden))

    def mlp(*, layers: int = 3, hidden: int = 64) -> nn.Module:
        """MLP(z)."""
        return perceptron(latent, latent, layers=layers, hidden=hidden)

    def linear() -> nn.Module:
        """W z + b."""
        return perceptron(latent, latent, layers=1)

    return {make.__name__: make for make in (residual_mlp, mlp, linear)}


def classification(values: mlo.Values, batch: Batch) -> Tensor:
    """L(θ), Eq. 3: cross-entropy on training images."""
    return cross_entropy(values["classifier"](batch["images"]), batch["labels"])


def consistency(
    values: mlo.Values, batch: Batch, *, weight: float = 0.4, loss: Literal["pcr", "uda"] = "pcr"
) -> tuple[Tensor, dict[str, Tensor]]:
    """L(θ) + λ L_PCR(θ, φ), Eqs. 2, 3, 5 and 6, both terms as means over their images.

    Real images, synthetic ones x_p and T(x_p) pass through the feature extractor together, so that batch statistics belong
    to the mixture. The gradient of PCR reaches ψ on both sides of the difference, and ω not at all.

    - `weight`: λ.
    - `loss`: `pcr`, ‖g_ψ(T(x_p)) − g_ψ(x_p)‖²; or `uda`, on the logits of the same two images (GDA+SSL): sharpened at
      temperature 0.4, where the classifier is surer than 0.8 of x_p, and held fixed.
    """
    train, network = batch["train"], values["classifier"]

    def two_views() -> dict[str, Tensor]:
        images = pseudo_images(values, batch)
        return {"plain": images, "strong": _strong(images, batch)}

    plain, transformed = values.shared("views", two_views).values()
    features = network(torch.cat([train["images"], plain, transformed]), part="features")
    on_real, on_plain, on_strong = features.split([len(train["images"]), len(plain), len(plain)])
    real = cross_entropy(network(on_real, part="head"), train["labels"])
    if loss == "pcr":
        regulariser = pcr(on_strong, on_plain)
    else:
        targets = values.once("targets", lambda: uda_targets(network(on_plain, part="head")))
        regulariser = matched(targets, network(on_strong, part="head"))
    return real + weight * regulariser, {"real_loss": real, "consistency": regulariser}


def labelled(
    values: mlo.Values,
    batch: Batch,
    *,
    weight: float = 0.4,
    transformed: bool = False,
    head: Literal["shared", "second"] = "shared",
) -> tuple[Tensor, dict[str, Tensor]]:
    """L(θ) + λ E[ℓ(f_θ(x_p), y_p)], Eqs. 2–4 with ℓ_p = ℓ: generative data augmentation (GDA).

    - `weight`: λ.
    - `transformed`: whether synthetic images pass through T first: the control for what T alone does.
    - `head`: which head classifies synthetic images; `second` is GDA+MH, for a network `…_two_heads`, of which only the
      first is judged.
    """
    train, network = batch["train"], values["classifier"]

    def seen() -> Tensor:
        images = pseudo_images(values, batch)
        return _strong(images, batch) if transformed else images

    images = values.shared("images", seen)
    features = network(torch.cat([train["images"], images]), part="features")
    on_real, on_images = features.split([len(train["images"]), len(images)])
    real = cross_entropy(network(on_real, part="head"), train["labels"])
    logits = network(on_images, part="head" if head == "shared" else "second_head")
    synthetic = cross_entropy(logits, batch["noise"]["labels"])
    return real + weight * synthetic, {"real_loss": real, "synthetic_loss": synthetic}


@mlo.reduction("batch")  # the divergence is that of the batch's moments
def validation(values: mlo.Values, batch: Batch, *, kl: float = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
    """L_val(θ') + λ_KL D_KL(p_φ(z) ‖ p(z)), Eqs. 7, 8 and 11, and l.8 of Algorithm 1.

    The first term reaches φ through the classifier's response alone, the second directly: the norms of the `direct` and of
    the `indirect` part of the hypergradient are those of λ_KL ∇KL and of ∇L_val. Without a `finder` there is no second term.

    - `kl`: λ_KL.
    """
    held_out = batch["validation"]
    loss = cross_entropy(values["classifier"](held_out["images"]), held_out["labels"])
    if "finder" not in values:
        return loss, {}
    divergence = kl_to_standard_normal(latents(values, batch))
    return loss + kl * divergence, {"validation_loss": loss, "divergence": divergence}


@mlo.reduction("batch")
def hardness(
    values: mlo.Values, batch: Batch, *, loss: Literal["cross_entropy", "pcr"] = "pcr", kl: float = 0.01
) -> tuple[Tensor, dict[str, Tensor]]:
    """−ℓ on synthetic images + λ_KL D_KL: a finder of hard examples, which needs no response (Table 7).

    - `loss`: ℓ, the classifier's cross-entropy for y_p, or its PCR.
    - `kl`: λ_KL. The paper does not say whether it is kept here.
    """
    network, images = values["classifier"], pseudo_images(values, batch)
    if loss == "pcr":
        features = network(torch.cat([_strong(images, batch), images]), part="features")
        on_strong, on_plain = features.split(len(images))
        hard = pcr(on_strong, on_plain)
    else:
        hard = cross_entropy(network(images), batch["noise"]["labels"])
    divergence = kl_to_standard_normal(latents(values, batch))
    return kl * divergence - hard, {"hardness": hard, "divergence": divergence}


def latents(values: mlo.Values, batch: Batch) -> Tensor:
    """F_φ(z), or z where the level lists no finder."""
    z = batch["noise"]["z"]
    return values["finder"](z) if "finder" in values else z


def pseudo_images(values: mlo.Values, batch: Batch) -> Tensor:
    """x_p = G(F_φ(z), y_p), on running statistics; or the images of stream `real` where the level lists no generator."""
    if "generator" not in values:
        return batch["real"]["images"]
    return values["generator"](latents(values, batch), batch["noise"]["labels"], training=False)


def _strong(images: Tensor, batch: Batch) -> Tensor:
    return strong(images, batch["noise"]["strong"])


def _noise(settings: Data, classes: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """One draw for a batch of synthetic images: latents `z`, uniform classes `labels`, and what T draws, `strong`."""
    count = settings.batch_size
    z = torch.randn(count, settings.latent, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (count,), generator=generator)
    drawn = strong_draws(count, strongest=settings.strongest, generator=generator)
    return {"z": z, "labels": labels, "strong": in_dtype(drawn, dtype)}


def _evaluation(found: ImageSets, settings: Data, context: mlo.Context) -> mlo.Evaluate:
    """Judges the classifier, and the images of the generator, if there is one, from uniform and from found latents."""
    held_out = HeldOut(found, context)
    photographs: Photographs | None = None
    if settings.judge is not None:
        judge = judge_from(settings.judge, depth=settings.judge_depth, device=context.device)
        photographs = Photographs(judge, found, latent=settings.latent, context=context)

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        network = judged(values, model)
        metrics = held_out.scores(network, split)
        tables: tuple[mlo.Table, ...] = ()
        pictures: dict[str, Tensor] = {}
        synthetic: Tensor | None = None
        generate = partial(values["generator"], training=False) if "generator" in values else None
        digits, find = held_out.digits, values.get("finder")
        if generate is not None and photographs is not None:
            metrics |= photographs.distances(generate, find)
        if generate is not None and (complete or digits is not None):
            count = FEWER if digits is None else SAMPLES
            z = torch.randn(count, settings.latent, dtype=context.dtype).to(context.device)
            samples = drawn(generate, find, z, sample_labels(count, classes=found.classes, device=context.device))
            if digits is not None:
                metrics |= {f"{name}_feature_frechet_distance": digits.distance(each) for name, each in samples.items()}
            if complete:
                tables = (samples_table(samples, digits),)
                pictures |= samples_pictures(generate, find, latent=settings.latent, classes=found.classes, like=z)
                synthetic = network([*samples.values()][-1].images, part="features", training=False)
        if complete:
            pictures["features"], metrics["features_in_plane"] = held_out.features(network, synthetic)
        return mlo.Evaluation(metrics=metrics, tables=tables, pictures=pictures)

    return evaluate
