"""MGR: synthetic images found by the classifier that needs them (Yamaguchi et al. 2023).

A classifier θ = [ψ, ω], feature extractor and head, descends L + λ L_PCR (Eqs. 2–6): cross-entropy on real images, and
consistency of its features on images that a frozen generator makes of latents F_φ(z). The finder φ descends the validation
loss through the classifier's response, and a divergence that keeps F_φ(z) near the prior (Eqs. 7, 8 and 11).

A graph names its levels `classifier`, `generator` and `finder`: objectives read them by these names. Where a level lists no
`finder`, latents are drawn from the prior; where it lists no `generator`, real images stand in for synthetic ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial, wraps
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
from problems.blocks.image_sets import ImageSets, ImageSettings, in_order, stream
from problems.blocks.judge import Judge, judge_from
from problems.blocks.latents import kl_to_standard_normal
from problems.blocks.networks import Divided, networks_for
from problems.blocks.quality import feature_frechet_distance
from problems.blocks.samples import (
    FEWER,
    SAMPLES,
    DigitScores,
    Find,
    Generate,
    drawn,
    embedding,
    sample_labels,
    samples_pictures,
    samples_table,
)
from problems.blocks.scores import classification_scores
from problems.blocks.streams import Draws, Transform, Transformed

Batch: TypeAlias = Mapping[str, Any]
Variables: TypeAlias = Callable[..., nn.Module]

AT_ONCE, OF_PHOTOGRAPHS = 512, 64
"""Images that are judged together; 512 of 224 pixels take 3.2 GB in a ResNet-18, 64 take 0.4."""
JUDGED = 2048
"""Photographs that a judge compares, generated and real ones, where there are as many for the test (the paper's §4.5)."""

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
            **{name: _divided(make) for name, make in networks.items()},
            **{f"{name}_two_heads": _divided(make, second_head=True) for name, make in networks.items()},
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
    plain = pseudo_images(values, batch)
    features = network(torch.cat([train["images"], plain, _strong(plain, batch)]), part="features")
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
    images = pseudo_images(values, batch)
    images = _strong(images, batch) if transformed else images
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


def _divided(make: Variables, *, second_head: bool = False) -> Variables:
    """The network that `make` makes, cut before its last layer, with the options of `make`."""

    @wraps(make)
    def divided(**options: Any) -> nn.Module:
        return Divided(make(**options), second_head=second_head)

    return divided


def _noise(settings: Data, classes: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """One draw for a batch of synthetic images: latents `z`, uniform classes `labels`, and what T draws, `strong`."""
    count = settings.batch_size
    z = torch.randn(count, settings.latent, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (count,), generator=generator)
    drawn = strong_draws(count, strongest=settings.strongest, generator=generator)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in drawn.items()}
    return {"z": z, "labels": labels, "strong": cast}


def _classifier(values: Mapping[str, Any], model: tuple[str, ...]) -> Any:
    """The level that is judged: level `classifier`, if it is in `model`, as where a graph names none; or else the first."""
    name = "classifier" if "classifier" in model else model[0]
    level = values[name]
    if "head.weight" not in level and "head.weight" not in getattr(level, "buffers", ()):
        raise mlo.UserError(
            f"evaluation.model: level '{name}' is no network and classifies nothing; name one, such as 'classifier'"
        )
    return level


def _evaluation(found: ImageSets, settings: Data, context: mlo.Context) -> mlo.Evaluate:
    """Judges the classifier, and the images of the generator, if there is one, from uniform and from found latents."""
    parts = {"validation": found.validation, "test": found.test}
    at_once = AT_ONCE if found.size <= 64 else OF_PHOTOGRAPHS
    taken = partial(in_order, device=context.device, dtype=context.dtype, size=at_once)

    @cache
    def digits() -> DigitScores | None:
        """Distances are taken to the test images, of which there are enough."""
        if found.name != "digits":
            return None
        return DigitScores(torch.cat([batch["images"] for batch in taken(found.test)]))

    judge = settings.judge and judge_from(settings.judge, depth=settings.judge_depth, device=context.device)
    count = min(JUDGED, len(found.test))

    @cache
    def features_of_real() -> Tensor:
        places = torch.arange(count) * len(found.test) // count  # of all classes, in whatever order they come
        part = replace(found.test, index=found.test.index[places], labels=found.test.labels[places])
        return torch.cat([judge(batch["images"]) for batch in taken(part)]) if judge else torch.empty(0)

    def judged(judge: Judge, generate: Generate, find: Find | None) -> dict[str, float]:
        """The distances of as many generated photographs, of the same z and y in each evaluation."""
        draws = torch.Generator().manual_seed(context.seed)
        z = torch.randn(count, settings.latent, generator=draws, dtype=context.dtype).to(context.device)
        labels = sample_labels(count, classes=found.classes, device=context.device)
        features: dict[str, list[Tensor]] = {}
        for some, of_some in zip(z.split(at_once), labels.split(at_once), strict=True):
            for name, each in drawn(generate, find, some, of_some).items():
                features.setdefault(name, []).append(judge(each.images))
        return {
            f"{name}_feature_frechet_distance": feature_frechet_distance(features_of_real(), torch.cat(parts)).item()
            for name, parts in features.items()
        }

    def scores(network: Any, split: mlo.Split) -> dict[str, float]:
        labels = parts[split].labels.to(context.device)
        logits = torch.cat([network(batch["images"], training=False) for batch in taken(parts[split])])
        metrics = {"loss": cross_entropy(logits, labels).item(), **classification_scores(logits, labels).metrics}
        if found.classes > 10:
            metrics["top5"] = 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
        return metrics

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        network = _classifier(values, model)
        metrics = scores(network, split)
        tables: tuple[mlo.Table, ...] = ()
        pictures: dict[str, Tensor] = {}
        synthetic: Tensor | None = None
        generate, find = (
            partial(values["generator"], training=False) if "generator" in values else None,
            values.get("finder"),
        )
        if generate is not None and judge:
            metrics |= judged(judge, generate, find)
        if generate is not None and (complete or digits() is not None):
            shown = FEWER if digits() is None else SAMPLES
            z = torch.randn(shown, settings.latent, dtype=context.dtype).to(context.device)
            samples = drawn(generate, find, z, sample_labels(shown, classes=found.classes, device=context.device))
            if (real := digits()) is not None:
                metrics |= {f"{name}_feature_frechet_distance": real.distance(each) for name, each in samples.items()}
            if complete:
                tables = (samples_table(samples, digits()),)
                pictures |= samples_pictures(generate, find, latent=settings.latent, classes=found.classes, like=z)
                synthetic = network([*samples.values()][-1].images, part="features", training=False)
        if complete:
            batches = list(taken(found.train))
            features = torch.cat([network(batch["images"], part="features", training=False) for batch in batches])
            labels = torch.cat([batch["labels"] for batch in batches])
            pictures["features"], metrics["features_in_plane"] = embedding(features, labels, synthetic)
        return mlo.Evaluation(metrics=metrics, tables=tables, pictures=pictures)

    return evaluate
