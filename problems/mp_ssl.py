"""MP-SSL: semi-supervised learning on images that a generative foundation model makes (Yamaguchi 2024).

A classifier θ = [ψ, ω], feature extractor and head, descends L + λ L_u (Eqs. 1–3 and 9): cross-entropy on labelled images,
and an unsupervised loss on images G_F(M_φ(z, y), I_ξ(y)). The sampler, φ and ξ together, descends the validation loss
through the classifier's response, and the gap in feature space between its images and real ones (Eqs. 6–8).

A graph names its levels `classifier`, `foundation`, `sampler` and `foundation_classifier`: objectives read them by these
names. A classifier that lists no `sampler` is given images of z and y_F from the prior; or, with a `foundation_classifier`,
of what that says of labelled images (P-SSL); and one that lists no `foundation`, real unlabelled images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.asked_for import SHOWN, asked_for, label_entropies, labelled_in_turn, likeliest_labels
from problems.blocks.consistency import (
    Targets,
    WithThresholds,
    batch_mean_gap,
    fairness,
    fixmatch_targets,
    freematch_targets,
    l1,
    l2,
    matched,
    mmd,
    paired_gap,
    scr,
    smooth_l1,
    strong,
    strong_draws,
    uda_targets,
    weak,
    weak_draws,
)
from problems.blocks.foundation import foundation_images, foundation_set
from problems.blocks.generators import generators_for, grid
from problems.blocks.held_out import HeldOut, judged
from problems.blocks.image_sets import ImageSets, ImageSettings, Part, stream
from problems.blocks.networks import divided, networks_for
from problems.blocks.pictures import heat_map
from problems.blocks.samplers import Form, gumbel_noise, mapper_and_converter
from problems.blocks.samples import FEWER, SAMPLES, samples_table
from problems.blocks.streams import WhenDrawn, in_dtype

Batch: TypeAlias = Mapping[str, Any]
Variables: TypeAlias = Callable[..., nn.Module]
Gap: TypeAlias = Literal["paired", "batch_mean", "mmd"]
Loss: TypeAlias = Literal["scr", "l1", "l2", "smooth_l1", "uda", "fixmatch", "freematch"]

GAPS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "paired": paired_gap,
    "batch_mean": batch_mean_gap,
    "mmd": mmd,
}
"""How far generated images are from real ones (Eq. 8, Alg. 1 l.8, Table 11)."""

OF_FEATURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"scr": scr, "l1": l1, "l2": l2, "smooth_l1": smooth_l1}
"""Unsupervised losses of the features of two views (Eq. 13, Table 6); the others are of logits."""


class Data(ImageSettings):
    """Which images, how they are divided, and the size of the batches.

    - `source`, `root`, `complete`, `size`, `workers`: see `image_sets`.
    - `foundation`: the share of the set's training images that only the foundation model sees.
    - `foundation_labels`: |Y_F|, how many labels the foundation has: of its own, which are not the set's classes.
    - `foundation_source`, `foundation_root`: a set that the foundation model was trained on in place of such a share, and
      where its files lie; for graphs that read its images (`transfer_…`) or train on its labels (`foundation_classifier`).
    - `fraction`: the share of the other training images that is labelled; the rest is D_u, which oracles see.
    - `validation`: the share of labelled images that is set aside as D_val; the others are D.
    - `batch_size`: B = B_val, images a batch: labelled, unlabelled, of validation.
    - `latent`: the size of z, which must be the generator's.
    - `shift`, `flip`: T_w moves an image by up to so many pixels each way, an eighth of its side if not given, and mirrors
      it or does not. Digits must not be mirrored.
    - `strongest`: the largest magnitude of T_s's operations, in [0, 1]: `problems.blocks.augmentation`.
    - `threshold_decay`: λ of FreeMatch's running means, which start at 1/classes: short runs need a shorter memory.
    """

    foundation_labels: int = 20
    foundation_source: str | None = None
    foundation_root: str | None = None
    latent: int = 64
    shift: int | None = None
    flip: bool = False
    strongest: float = 1.0
    threshold_decay: float = 0.999


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """The problem on the images that `settings` describe."""
    found = settings.sets(context.seed)
    if len(found.validation) == 0:
        raise ValueError(f"validation is {settings.validation}; it leaves no image for the sampler to be judged by")
    if settings.latent < 1:
        raise ValueError(f"latent is {settings.latent}; it must be at least 1")
    if not 0 <= settings.strongest <= 1:
        raise ValueError(f"strongest is {settings.strongest}; magnitudes lie in [0, 1]")
    if settings.shift is not None and settings.shift < 0:
        raise ValueError(f"shift is {settings.shift}; it is a number of pixels, 0 or more")
    if not 0 <= settings.threshold_decay < 1:
        raise ValueError(f"threshold_decay is {settings.threshold_decay}; it must be at least 0 and below 1")
    if settings.foundation_labels < 2:
        raise ValueError(
            f"foundation_labels is {settings.foundation_labels}; a label converter chooses among at least 2"
        )
    networks = networks_for(found, outputs=found.classes)
    of_foundation = networks_for(found, outputs=settings.foundation_labels)
    return mlo.Problem(
        variables={
            **{
                name: _with_thresholds(make, found.classes, settings.threshold_decay) for name, make in networks.items()
            },
            **{f"{name}_foundation": make for name, make in of_foundation.items()},
            **generators_for(found, latent=settings.latent, labels=settings.foundation_labels),
            "mapper_and_converter": _sampler(settings, found.classes),
        },
        objectives={
            "classification": classification,
            "semi_supervised": semi_supervised,
            "validation": validation,
            "foundation_classification": foundation_classification,
        },
        streams=_streams(found, settings, context),
        evaluate=_evaluation(found, settings, context),
    )


def classification(values: mlo.Values, batch: Batch) -> Tensor:
    """L(θ), Eq. 2: cross-entropy on labelled images."""
    return cross_entropy(values["classifier"](batch["images"]), batch["labels"])


def foundation_classification(values: mlo.Values, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of f_θF on the foundation's images and labels: what P-SSL starts from (Eq. 5)."""
    logits = values["foundation_classifier"](batch["images"])
    right = (logits.argmax(1) == batch["labels"]).to(logits.dtype)
    return cross_entropy(logits, batch["labels"]), {"recognised": right.mean()}


@mlo.reduction("batch")  # FreeMatch has thresholds of the batch
def semi_supervised(
    values: mlo.Values, batch: Batch, *, weight: float = 1.0, loss: Loss = "scr", fairness_weight: float = 0.05
) -> tuple[Tensor, dict[str, Tensor]]:
    """L(θ) + λ L_u(θ, φ, ξ), Eqs. 1–3 and 9, both terms as means over their images.

    Labelled images, T_w(x_u) and T_s(x_u) pass through the feature extractor together, so that batch statistics belong to
    the mixture. Losses of features reach ψ through both views, and ω not at all.

    - `weight`: λ.
    - `loss`: of features `scr`, 1 − cos (Eq. 13), or `l1`, `l2`, `smooth_l1` (Table 6); of logits `uda`, `fixmatch` or
      `freematch`, with what is said of T_w(x_u) as a target that is held fixed.
    - `fairness_weight`: w_f, of FreeMatch alone; its paper has 0.05.
    """
    train, noise, network = batch["train"], batch["noise"], values["classifier"]

    def two_views() -> dict[str, Tensor]:
        images = unlabelled(values, batch)
        return {"weak": weak(images, noise["weak"]), "strong": strong(images, noise["strong"])}

    views = [train["images"], *values.shared("views", two_views).values()]
    features = network(torch.cat(views), part="features")
    on_real, on_weak, on_strong = features.split([len(each) for each in views])
    real = cross_entropy(network(on_real, part="head"), train["labels"])
    if loss in OF_FEATURES:
        unsupervised = OF_FEATURES[loss](on_weak, on_strong)
        measured: dict[str, Tensor] = {}
    else:
        logits = [network(each, part="head") for each in (on_weak, on_strong)]
        unsupervised, kept = _of_logits(loss, values, *logits, fairness_weight=fairness_weight)
        measured = {"kept": kept}
    return real + weight * unsupervised, {"real_loss": real, "unsupervised_loss": unsupervised, **measured}


@mlo.reduction("batch")  # gaps of means and of distributions are no means over samples
def validation(
    values: mlo.Values,
    batch: Batch,
    *,
    gap: Gap = "paired",
    gap_weight: float = 10.0,
    validation_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_val(θ') + λ_gap L_gap(φ, ξ), Eqs. 6–8.

    The first term reaches φ and ξ through the classifier's response alone. The second is taken at the response with ψ held
    fixed, and reaches them directly alone: the norms of the hypergradient's `indirect` and `direct` part are theirs.
    Labelled images x and generated ones, of the same x, y, z and g as below, pass through the network together.

    - `gap`: `paired`, mean_i ‖g_ψ(x_i) − g_ψ(x̂_i)‖² (Eq. 8), where x̂_i is made for the class of x_i; `batch_mean`, of the
      means of logits (Alg. 1, l.8); `mmd`, of the distributions of features (Table 11).
    - `gap_weight`: λ_gap; with 0 the gap is not computed.
    - `validation_weight`: of L_val; with 0 it is not computed, and the level cannot be subject to the classifier.

    Raises UserError where nothing is left.
    """
    if not gap_weight and not validation_weight:
        raise mlo.UserError("validation: gap_weight and validation_weight are both 0, which leaves nothing to minimise")
    terms: list[Tensor] = []
    measured: dict[str, Tensor] = {}
    if validation_weight:
        held_out = batch["validation"]
        measured["validation_loss"] = cross_entropy(values["classifier"](held_out["images"]), held_out["labels"])
        terms.append(validation_weight * measured["validation_loss"])
    if gap_weight:
        real = batch["train"]["images"]
        images = torch.cat([real, unlabelled(values, batch)])
        said = values["classifier"].fixed()(images, part="both" if gap == "batch_mean" else "features")
        measured["gap"] = GAPS[gap](*said.split(len(real)))
        terms.append(gap_weight * measured["gap"])
    return torch.stack(terms).sum(), measured


def unlabelled(values: mlo.Values, batch: Batch) -> Tensor:
    """x_u: images of the foundation model on running statistics, or real ones where the level lists no `foundation`.

    Raises UserError for a level that lists who asks for images, and nobody who makes them.
    """
    if "foundation" not in values:
        for asking in ("sampler", "foundation_classifier"):
            if asking in values:
                raise mlo.UserError(
                    f"an objective's level lists '{asking}', and no 'foundation' that makes its images: add it to `given`"
                )
        return batch["foundation_images" if "foundation_images" in batch else "unlabelled"]["images"]
    z, labels = asked(values, batch)
    return values["foundation"](z, labels, training=False)


def asked(values: mlo.Values, batch: Batch) -> tuple[Tensor, Tensor]:
    """The latents, and the foundation's labels or weights of them, that G_F is asked for.

    M_φ(z, y) and I_ξ(y), with y the classes of the labelled batch (Alg. 1, l.6); without `sampler`, z and softmax f_θF(x) of
    the labelled images (Eq. 5); without `foundation_classifier` either, z and uniform labels.
    """
    noise = batch["noise"]
    if "sampler" in values:
        return values["sampler"](noise["z"], batch["train"]["labels"], noise["gumbel"])
    if "foundation_classifier" in values:
        logits = values["foundation_classifier"](batch["train"]["images"], training=False)
        return noise["z"], logits.softmax(1)
    return noise["z"], noise["labels"]


def _of_logits(
    loss: Loss, values: mlo.Values, on_weak: Tensor, on_strong: Tensor, *, fairness_weight: float
) -> tuple[Tensor, Tensor]:
    """A loss of pseudo labels, and the share of images that count. Targets and thresholds are chosen once a step."""
    if loss != "freematch":
        choose = uda_targets if loss == "uda" else fixmatch_targets
        targets: Targets = values.once("targets", lambda: choose(on_weak))
        return matched(targets, on_strong), targets.kept.mean()
    current = values["classifier"](thresholds_of=on_weak)  # in every evaluation: it is what moves the running means
    thresholds = values.once("thresholds", lambda: current)
    targets = values.once("targets", lambda: freematch_targets(on_weak, thresholds))
    unsupervised = matched(targets, on_strong)
    if fairness_weight:
        unsupervised = unsupervised + fairness_weight * fairness(targets, on_strong, thresholds)
    return unsupervised, targets.kept.mean()


def _with_thresholds(make: Variables, classes: int, decay: float) -> Variables:
    """The network that `make` makes, cut before its last layer, with FreeMatch's thresholds beside it."""

    @wraps(make)
    def classifier(**options: Any) -> nn.Module:
        return WithThresholds(divided(make)(**options), classes=classes, decay=decay)

    return classifier


def _sampler(settings: Data, classes: int) -> Variables:
    def sampler(
        *,
        temperature: float = 0.1,
        form: Form = "hard",
        conditional: bool = True,
        degenerate: bool = False,
        layers: int = 3,
        hidden: int = 64,
        embedding: int = 16,
    ) -> nn.Module:
        return mapper_and_converter(
            latent=settings.latent,
            classes=classes,
            labels=settings.foundation_labels,
            temperature=temperature,
            form=form,
            conditional=conditional,
            degenerate=degenerate,
            layers=layers,
            hidden=hidden,
            embedding=embedding,
        )

    return sampler


def _streams(found: ImageSets, settings: Data, context: mlo.Context) -> dict[str, mlo.stream.AbstractStream]:
    drawn = partial(stream, size=settings.batch_size, device=context.device, dtype=context.dtype)

    def rest() -> mlo.stream.AbstractStream:
        if len(found.rest) == 0:
            raise ValueError(f"fraction is {settings.fraction}, which leaves no image unlabelled: D_u is empty")
        return drawn(found.rest)

    return {
        "train": drawn(found.train),
        "validation": drawn(found.validation),
        "unlabelled": WhenDrawn(rest),
        "foundation_images": WhenDrawn(lambda: drawn(_foundation(found, settings, context.seed))),
        "noise": mlo.stream.Noise(partial(_noise, settings, found.size, context.dtype)),
    }


def _foundation(found: ImageSets, settings: Data, seed: int) -> Part:
    """What the foundation model was trained on, under its own labels."""
    if settings.foundation_source is None:
        return foundation_images(found, labels=settings.foundation_labels, seed=seed)
    if settings.foundation_source == settings.source:
        raise ValueError(
            f"foundation_source is '{settings.source}', the set itself, whose images are also learned and validated with; "
            "`foundation: 0.5` keeps half of them for the foundation model alone"
        )
    part, classes = foundation_set(
        settings.foundation_source,
        root=settings.foundation_root,
        size=found.size,
        channels=found.channels,
        seed=seed,
        complete=settings.complete,
        workers=settings.workers,
    )
    if classes != settings.foundation_labels:
        raise ValueError(
            f"foundation_labels is {settings.foundation_labels}; {settings.foundation_source} has {classes} classes"
        )
    return part


def _noise(settings: Data, size: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """One draw for a batch of generated images.

    Latents `z`, Gumbel noise `gumbel`, uniform foundation labels `labels`, and what T_w and T_s draw, `weak` and `strong`.
    """
    count, labels = settings.batch_size, settings.foundation_labels
    shift = max(1, size // 8) if settings.shift is None else settings.shift
    return {
        "z": torch.randn(count, settings.latent, generator=generator, dtype=dtype),
        "labels": torch.randint(labels, (count,), generator=generator),
        "gumbel": gumbel_noise(count, labels, generator=generator, dtype=dtype),
        "weak": in_dtype(weak_draws(count, shift=shift, flip=settings.flip, generator=generator), dtype),
        "strong": in_dtype(strong_draws(count, strongest=settings.strongest, generator=generator), dtype),
    }


def _evaluation(found: ImageSets, settings: Data, context: mlo.Context) -> mlo.Evaluate:
    """Judges the classifier, the foundation model's images as they are asked for, and what the label converter learned."""
    held_out = HeldOut(found, context)

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
        tables: list[mlo.Table] = []
        pictures: dict[str, Tensor] = {}
        synthetic: Tensor | None = None
        if "foundation" in values and (complete or held_out.digits is not None):
            digits = held_out.digits
            real = labelled_in_turn(found, FEWER if digits is None else SAMPLES, context)
            samples, shown = asked_for(values, real, settings.foundation_labels, settings.latent, context)
            features = partial(network, part="features", training=False)
            metrics |= {
                f"{name}_gap": paired_gap(features(real["images"]), features(each.images)).item()
                for name, each in samples.items()
            }
            if digits is not None:
                metrics |= {f"{name}_feature_frechet_distance": digits.distance(each) for name, each in samples.items()}
            if complete:
                tables.append(samples_table(samples, digits))
                pictures |= {f"synthetic_{name}": grid(each.images, shown[name]) for name, each in samples.items()}
                synthetic = features([*samples.values()][-1].images)
        if "sampler" in values:
            table = values["sampler"]["converter.table"]
            metrics |= label_entropies(table)
            if complete:
                tables.append(likeliest_labels(table))
                pictures["labels"] = heat_map(table.softmax(1))
        if complete:
            few = labelled_in_turn(found, SHOWN, context, again=False)
            pictures["real"] = grid(few["images"], few["rows"].cpu())
            pictures["features"], metrics["features_in_plane"] = held_out.features(network, synthetic)
        return mlo.Evaluation(metrics=metrics, tables=tuple(tables), pictures=pictures)

    return evaluate
