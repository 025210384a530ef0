"""Needs-aware generation: make more images of the classes a classifier does badly on (Gala and Xie 2024).

Four stages, Eqs. 1–7: classifier W1, conditional generator G against discriminator H, refined classifier W2 trained on
real images and on generated ones drawn by class need, and A (`meta`), the last two layers that W1, W2 and H share,
trained on validation data through the responses of all of them.

A graph names its levels `classifier`, `generator`, `discriminator`, `refined` and `meta`: objectives read them by these
names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, relu

import mlo
from problems.blocks import networks
from problems.blocks.digits import CLASSES, Labelled, digits
from problems.blocks.jitter import Jitter
from problems.blocks.need import class_losses, class_need, relaxed_bernoulli
from problems.blocks.scores import classification_scores, generation_scores, per_class_table
from problems.blocks.streams import Jittered

Need: TypeAlias = Literal["sampled", "score_function", "relaxed", "literal", "equal", "reciprocal"]
Head: TypeAlias = Literal["meta", "own"]
Batch: TypeAlias = Mapping[str, Any]


class Data(mlo.Settings):
    """The long-tailed data and the size of the batches.

    - `imbalance`, `largest_class`: n_c = max(1, int(largest_class · imbalance^(−c/9))) training images of class c.
    - `validation_per_class`, `test_per_class`: balanced, and the same for every imbalance.
    - `batch_size`: real images a batch, and as many generated ones (M = N).
    - `latent`: the dimension of the generator's z.
    - `rotation`, `scale`, `shift`: how far the images of stream `jittered` are turned (degrees), stretched and moved
      (pixels): that stream draws all classes alike and serves the discriminator, for which the last class has one image.
    """

    source: Literal["digits"] = "digits"
    imbalance: float = 50.0
    largest_class: int = 90
    validation_per_class: int = 10
    test_per_class: int = 50
    batch_size: int = 64
    latent: int = 32
    rotation: float = 15.0
    scale: float = 0.1
    shift: float = 1.0


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """The problem on the data that `settings` describe."""
    split = digits(
        seed=context.seed,
        imbalance=settings.imbalance,
        largest_class=settings.largest_class,
        validation_per_class=settings.validation_per_class,
        test_per_class=settings.test_per_class,
    )
    train, validation, test = (_mapping(part, context) for part in (split.train, split.validation, split.test))
    size = settings.batch_size
    balanced = mlo.stream.Balanced(train, train["labels"], size=size)
    jitter = Jitter(rotation=settings.rotation, scale=settings.scale, shift=settings.shift)
    return mlo.Problem(
        variables={
            "encoder": networks.Encoder,
            "classifier": networks.Classifier,
            "last_two_layers": networks.LastTwoLayers,
            "generator": partial(networks.Generator, latent=settings.latent),
        },
        objectives={
            "classification": classification,
            "discrimination": discrimination,
            "generation": generation,
            "refinement": refinement(torch.bincount(train["labels"], minlength=CLASSES).to(context.dtype)),
            "validation": validation_of_both,
        },
        streams={
            "train": mlo.stream.Shuffled(train, size=size),
            "jittered": Jittered(balanced, jitter),
            "train_and_validation": mlo.stream.Shuffled(_union(train, validation), size=size),
            "validation": mlo.stream.Shuffled(validation, size=size),
            "validation_set": mlo.stream.Constant(validation),
            "noise": mlo.stream.Noise(_noise(size, settings.latent, context.dtype)),
        },
        evaluate=_evaluation(train, {"validation": validation, "test": test}, settings.latent),
    )


def classification(values: mlo.Values, batch: Batch, *, head: Head = "meta") -> Tensor:
    """L_cls(W1, A, D_tr), Eqs. 1 and 8: cross-entropy. With `head: own` the level holds a whole network."""
    outputs = values["classifier"](batch["images"])
    logits = values["meta"](outputs) if head == "meta" else outputs
    return cross_entropy(logits, batch["labels"])


def discrimination(values: mlo.Values, batch: Batch, *, mismatch: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's side of Eq. 2 as a loss to descend, the hinge loss of BigGAN:

        E[(1 − D(x, y))₊] + E[(1 + D(G(z, y'), y'))₊] + mismatch · E[(1 + D(x, ỹ))₊]

    D(x, y) is the y-th output of the shared head on H's features. Eqs. 9 and 10 print one loss for both players, which
    contradicts the min–max; there are two.

    - `mismatch`: the weight of real images under a wrong label ỹ, drawn uniformly (Reed et al. 2016, Alg. 1). The paper
      has no such term; without it a discriminator that saw one image of a class hardly looks at the label.
    """
    real, noise = batch["jittered"], batch["noise"]
    on_real, on_fake = _scores(values, real["images"], noise)
    true = _of_class(on_real, real["labels"])
    wrong = _of_class(on_real, (real["labels"] + noise["offsets"]) % CLASSES)
    fake = _of_class(on_fake, noise["labels"])
    loss = relu(1 - true).mean() + relu(1 + fake).mean() + mismatch * relu(1 + wrong).mean()
    return loss, {"real_score": true.mean(), "fake_score": fake.mean(), "wrong_score": wrong.mean()}


def generation(values: mlo.Values, batch: Batch) -> Tensor:
    """The generator's side of Eq. 2, −E[D(G(z, y), y)], for Eq. 9.

    H sees the images beside real ones, as when it is trained: its batch statistics belong to the mixture.
    """
    noise = batch["noise"]
    return -_of_class(_scores(values, batch["jittered"]["images"], noise)[1], noise["labels"]).mean()


def refinement(counts: Tensor) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The objective of W2, given how many real images each class has, [10]."""
    scarcity = 1 / counts.clamp(min=1)

    @mlo.reduction("batch")  # p(s) is a ratio of means over classes
    def refined(
        values: mlo.Values,
        batch: Batch,
        *,
        weight: float = 1.0,
        need: Need = "sampled",
        temperature: float = 1.0,
        head: Head = "meta",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_cls(W2, A, D_tr) + λ L_a(W2, A, W1', G'), Eqs. 4, 5 and 11, both terms as means.

        - `weight`: λ.
        - `need`: what decides how many images of a class are generated. p(s), Eq. 3, from the losses of W1, in three
          readings: Eq. 4 draws o_m ~ p and weights it by b_m with E[b_m] ≈ p(o_m), which counts p twice, and the paper's
          own counts follow p once. `sampled`: o_m ~ p with p held fixed, weight p(o_m)/stop(p(o_m)), which is 1 and
          carries the gradient into W1'; `relaxed`: o_m uniform, weight b_m, normalised by their sum; `literal`: o_m ~ p,
          weight b_m, as printed. `score_function` is `sampled`, value for value, with the policy gradient that App. F
          proposes for what cannot be differentiated: (L_m − c_m) ∇log p(o_m), c_m being the mean loss of the other images
          (`sampled` has c_m = 0). What o_m does to other images' losses through batch statistics is credited in neither.
          Baselines: `equal`, all classes alike; `reciprocal`, ∝ 1/n_c.
        - `temperature`: T of b_m.
        - `head`: `meta`, or `own` where W1 and W2 are whole networks.
        """
        real, noise = batch["train"], batch["noise"]
        p = _need(values, batch, need, head, scarcity)
        drawn = values.once("classes", lambda: _draw(p, noise["uniforms"]))
        classes = noise["labels"] if need == "relaxed" else drawn
        weights = _weights(p[classes], noise["gumbel"], need, temperature)
        generated = values["generator"](noise["z"], classes)
        outputs = values["refined"](torch.cat([real["images"], generated]))
        logits = values["meta"](outputs) if head == "meta" else outputs
        on_real, on_generated = logits.split([len(real["labels"]), len(classes)])
        real_loss = cross_entropy(on_real, real["labels"])
        losses = weights * cross_entropy(on_generated, classes, reduction="none")
        if need == "score_function":
            losses = mlo.score_function(losses, p[classes].log(), baseline=_others(losses))
        generated_loss = losses.mean()
        measured = {
            "real_loss": real_loss,
            "generated_loss": generated_loss,
            "generated": (weights.detach()[:, None] * one_hot(classes, CLASSES)).sum(0),
            "need": p,
        }
        return real_loss + weight * generated_loss, measured

    return refined


def validation_of_both(
    values: mlo.Values, batch: Batch, *, first_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_cls(W2', A, D_val) + γ L_cls(W1', A, D_val), Eqs. 6 and 12; `first_weight` is γ, and without it W1 is not read."""
    meta, images, labels = values["meta"], batch["images"], batch["labels"]
    refined = cross_entropy(meta(values["refined"](images)), labels)
    if not first_weight:
        return refined, {}
    first = cross_entropy(meta(values["classifier"](images)), labels)
    return refined + first_weight * first, {"refined": refined, "classifier": first}


def _scores(values: mlo.Values, real: Tensor, noise: Batch) -> tuple[Tensor, Tensor]:
    """What the discriminator says of real and of generated images for every class, twice [batch, 10]."""
    fake = values["generator"](noise["z"], noise["labels"])
    scores = values["meta"](values["discriminator"](torch.cat([real, fake])))
    on_real, on_fake = scores.split([len(real), len(fake)])
    return on_real, on_fake


def _of_class(scores: Tensor, labels: Tensor) -> Tensor:
    """D(x, y) = scores[y], [batch]."""
    return scores.gather(1, labels[:, None]).squeeze(1)


def _need(values: mlo.Values, batch: Batch, need: Need, head: Head, scarcity: Tensor) -> Tensor:
    """p(s), [10]: Eq. 3 from the whole validation set, differentiable in W1' and A; or what a baseline puts there."""
    if need == "equal":
        return torch.full_like(scarcity, 1 / CLASSES)
    if need == "reciprocal":
        return scarcity / scarcity.sum()
    validation = batch["validation_set"]
    outputs = values["classifier"](validation["images"])
    logits = values["meta"](outputs) if head == "meta" else outputs
    return class_need(class_losses(logits, validation["labels"], CLASSES))


def _draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One class for each of `uniforms`, by inverting the distribution function of p."""
    return torch.searchsorted(p.cumsum(0), uniforms * p.sum()).clamp(max=len(p) - 1)


def _weights(p: Tensor, gumbel: Tensor, need: Need, temperature: float) -> Tensor:
    """The weight of each generated image, [M], from its class's p."""
    if need == "score_function":
        return torch.ones_like(p)
    if need in ("sampled", "equal", "reciprocal"):
        return p / p.detach()
    b = relaxed_bernoulli(p, gumbel, temperature)
    return b * len(b) / b.sum() if need == "relaxed" else b


def _others(losses: Tensor) -> Tensor:
    """The mean of all other losses, [M]: independent of the choice behind each, as images are drawn one by one."""
    return (losses.sum() - losses) / max(1, len(losses) - 1)


def _union(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([tensor, two[name]]) for name, tensor in one.items()}


def _mapping(part: Labelled, context: mlo.Context) -> dict[str, Tensor]:
    return {
        "images": part.images.to(device=context.device, dtype=context.dtype),
        "labels": part.labels.to(context.device),
    }


def _noise(size: int, latent: int, dtype: torch.dtype) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """One draw for a batch of generated images.

    Latents `z`, uniform classes `labels`, `uniforms` to draw classes by, `gumbel` noise [size, 2], and `offsets` in 1..9
    from a label to a wrong one.
    """

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        z = torch.randn(size, latent, generator=generator, dtype=dtype)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        uniforms = torch.rand(size, generator=generator, dtype=dtype)
        exponentials = -torch.rand(size, 2, generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
        gumbel = -exponentials.log().to(dtype)
        offsets = torch.randint(1, CLASSES, (size,), generator=generator)
        return {"z": z, "labels": labels, "uniforms": uniforms, "gumbel": gumbel, "offsets": offsets}

    return draw


def _evaluation(train: Mapping[str, Tensor], held_out: Mapping[str, Mapping[str, Tensor]], latent: int) -> mlo.Evaluate:
    """Judges `[network]`, `[encoder, head]`, the pair before and after refinement `[W1, A, W2]`, or a `[generator]`."""
    real = torch.bincount(train["labels"], minlength=CLASSES)

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        if model == ("generator",):
            return generation_scores(values["generator"], latent=latent, complete=complete and split == "test")
        images, labels = held_out[split]["images"], held_out[split]["labels"]

        def logits(network: str) -> Tensor:
            outputs = values[network](images, training=False)
            return values[model[1]](outputs, training=False) if len(model) > 1 else outputs

        first, last = model[0], model[-1] if len(model) != 2 else model[0]
        metrics = dict(classification_scores(logits(last), labels).metrics)
        if first != last:
            before = classification_scores(logits(first), labels).metrics
            metrics |= {f"before_{name}": value for name, value in before.items()}
        generated = totals.get(last, {}).get("generated")
        table = per_class_table(
            labels, logits(first) if first != last else None, logits(last), real=real, generated=generated
        )
        return mlo.Evaluation(metrics=metrics, tables=(table,))

    return evaluate
