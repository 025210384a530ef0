"""MADAO: an augmentation policy learned beside the classifier it serves (Hataya, Zdenek, Yoshizoe and Nakayama 2022).

Eq. 1, argmin_φ g(argmin_θ f(θ, φ; D_T); D_V): the classifier θ descends cross-entropy f on training images that the policy
φ = {p, μ, π} augments, and the policy descends cross-entropy g on validation images as they are, through the classifier's
response. RandAugment and Faster AutoAugment, which the paper compares with, are other graphs of the same pieces.

A graph names its levels `classifier` and `policy`, and `critic` where Faster AutoAugment searches: objectives read them by
these names unless an option says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.augmentation import OPERATIONS, Policy, draws_for
from problems.blocks.image_sets import ImageSets, ImageSettings, in_order, stream
from problems.blocks.networks import networks_for
from problems.blocks.pictures import tiles
from problems.blocks.scores import classification_scores

Batch: TypeAlias = Mapping[str, Any]
QUANTITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "selection": lambda tensor: tensor.softmax(-1),  # π
    "magnitude": torch.sigmoid,  # μ
    "probability": torch.sigmoid,  # p
}
"""What a policy holds, and what becomes of it: all of them are [stages, operations]."""


ROWS, COLUMNS = 10, 10
"""Training images in the picture of augmented ones, and how many of each."""

AT_ONCE = 512
"""Images that are judged together."""


class Data(ImageSettings):
    """Which images, how many of them, and the size of the batches.

    - `source`, `root`, `complete`, `size`, `workers`: see `image_sets`.
    - `fraction`: the share of the set's training images that is used at all.
    - `validation`: the share of these that is set aside as D_V; the others are D_T.
    - `batch_size`: images a batch, of training and of validation.
    - `stages`: K, for how many operations one after the other noise is drawn: as many as the policy has.
    """

    stages: int = 2


def build(settings: Data, context: mlo.Context) -> mlo.Problem:
    """The problem on the images that `settings` describe."""
    if settings.stages < 1:
        raise ValueError(f"stages is {settings.stages}; it must be at least 1")
    found = settings.sets(context.seed)
    if len(found.validation) == 0:
        raise ValueError(f"validation is {settings.validation}; it leaves no image for the policy to be judged by")
    count, stages = settings.batch_size, settings.stages
    drawn = partial(stream, size=count, device=context.device, dtype=context.dtype)
    return mlo.Problem(
        variables={
            **networks_for(found, outputs=found.classes),
            **{f"{name}_critic": make for name, make in networks_for(found, outputs=found.classes + 1).items()},
            "policy": policy_of(stages),
            "rand_augment": rand_augment_of(stages),
        },
        objectives={
            "augmented_classification": augmented_classification,
            "classification": classification,
            "criticism": criticism,
            "imitation": imitation,
        },
        streams={
            "train": drawn(found.train),
            "real": drawn(found.train),
            "validation": drawn(found.validation),
            "augmentation_noise": mlo.stream.Noise(partial(_noise, count, stages, context.dtype)),
            "mixing": mlo.stream.Noise(partial(_uniforms, count, context.dtype)),
        },
        evaluate=_evaluation(found, settings, context),
    )


def policy_of(drawn: int) -> Callable[..., Policy]:
    """The policy φ where noise is drawn for so many stages."""

    def policy(*, stages: int = drawn, temperature: float = 0.1, initial: float = 0.5) -> Policy:
        """p = μ = `initial`, π the same for all operations; see `Policy`."""
        if stages != drawn:
            raise mlo.UserError(f"stages={stages}, and noise is drawn for {drawn}: set data.stages to as many")
        return Policy(stages=stages, temperature=temperature, initial=initial)

    return policy


def rand_augment_of(stages: int) -> Callable[..., Policy]:
    """RandAugment with so many operations one after the other."""

    def rand_augment(
        *, bins: int = 30, chosen: int | None = None, probability: float = 0.5, temperature: float = 0.1
    ) -> Policy:
        """Operations uniform, one magnitude μ = (b + 1/2)/bins for all of them (Cubuk et al. 2020).

        - `bins`: how many magnitudes a search chooses from.
        - `chosen`: b, from 0. If not given it is drawn uniformly, one trial of a random search; the run's seed and the
          level's name decide.
        - `probability`: p of all operations. RandAugment as published applies always; the paper calls by this name what
          MADAO is with fixed parameters (Figure 2), so that only the magnitude differs from where MADAO starts.
        """
        if bins < 1:
            raise mlo.UserError(f"bins={bins}: a search chooses from at least one magnitude")
        if chosen is not None and not 0 <= chosen < bins:
            raise mlo.UserError(f"chosen={chosen}: the magnitudes are numbered from 0 to {bins - 1}")
        if not 0 < probability < 1:
            raise mlo.UserError(
                f"probability={probability}: it must lie between 0 and 1, which a sigmoid does not reach"
            )
        number = int(torch.randint(bins, ())) if chosen is None else chosen
        policy = Policy(stages=stages, temperature=temperature)
        nn.init.constant_(policy.magnitude, _logit((number + 0.5) / bins))
        nn.init.constant_(policy.probability, _logit(probability))
        return policy

    return rand_augment


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def augmented_classification(
    values: mlo.Values,
    batch: Batch,
    *,
    weight_decay: float = 0.0,
    classifier: str = "classifier",
    policy: str = "policy",
) -> Tensor:
    """f(θ, φ) of Eq. 1: cross-entropy on training images augmented by the policy (Eqs. 8 and 9), + weight_decay/2 · ‖θ‖².

    Decay belongs in f: the Hessian of Eq. 4 is that of what is minimised. It is that of torch's SGD, over all parameters.
    The policy acts on images in [0, 1], before the network normalises them.

    - `classifier`, `policy`: the levels that are read.
    """
    train = batch["train"]
    network = values[classifier]
    images = values[policy](train["images"], batch["augmentation_noise"])
    return cross_entropy(network(images), train["labels"]) + decay(network, weight_decay)


def classification(
    values: mlo.Values, batch: Batch, *, weight_decay: float = 0.0, classifier: str = "classifier"
) -> tuple[Tensor, dict[str, Tensor]]:
    """g(θ) of Eq. 1: cross-entropy on images as they are, + weight_decay/2 · ‖θ‖², of level `classifier`.

    Of a policy above it also measures π, μ and p, as they stand before the step: `selection.1.rotate` is π of the first
    stage's rotation.
    """
    network = values[classifier]
    measured = trace(values["policy"]) if "policy" in values else {}
    return cross_entropy(network(batch["images"]), batch["labels"]) + decay(network, weight_decay), measured


def criticism(
    values: mlo.Values, batch: Batch, *, penalty: float = 10.0, policy: str = "policy"
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The critic's side of Faster AutoAugment (Hataya et al. 2020): a Wasserstein distance with gradient penalty.

        E[c(T(x))] − E[c(x')] + penalty · E[(‖∇c(x̂)‖ − 1)²] + E[CE(h(x'), y')],    x̂ = u x' + (1 − u) T(x)

    for x and x' from independent passes over the training images, T the policy, u uniform. A critic is a network of
    C + 1 outputs: h, the logits of the classes, and c.
    """
    real, count = batch["real"], len(batch["real"]["labels"])
    with torch.no_grad():
        fake = values[policy](batch["train"]["images"], batch["augmentation_noise"])
    logits, scores = _judged(values["critic"](torch.cat([real["images"], fake])))
    u = batch["mixing"][:count, None, None, None]
    mixed = (u * real["images"] + (1 - u) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(_judged(values["critic"](mixed))[1].sum(), mixed, create_graph=True)
    distance = scores[:count].mean() - scores[count:].mean()
    excess = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    recognition = cross_entropy(logits[:count], real["labels"])
    return penalty * excess + recognition - distance, {"distance": distance, "recognition": recognition}


def imitation(
    values: mlo.Values, batch: Batch, *, weight: float = 0.1, policy: str = "policy"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's side of Faster AutoAugment: −E[c(T(x))] + weight · E[CE(h(T(x)), y)].

    Augmented images shall look real to the critic and stay recognisable. Operations are chosen by Eq. 9, as the paper has it
    for a fair comparison, and not averaged as published.

    - `weight`: ε of the classification term.
    """
    train = batch["train"]
    augmented = values[policy](train["images"], batch["augmentation_noise"])
    logits, scores = _judged(values["critic"](augmented))
    recognition = cross_entropy(logits, train["labels"])
    return weight * recognition - scores.mean(), {"recognition": recognition, **trace(values[policy])}


def decay(network: Mapping[str, Tensor], weight: float) -> Tensor | float:
    """weight/2 · ‖θ‖² over all parameters of `network`."""
    return weight / 2 * sum(tensor.square().sum() for tensor in network.values()) if weight else 0.0


def trace(policy: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """π, μ and p of a policy by name, stage (from 1) and operation: `magnitude.2.rotate`. π sums to 1 in each stage."""
    found: dict[str, Tensor] = {}
    for quantity, constrained in QUANTITIES.items():
        for stage, row in enumerate(constrained(_part(policy, quantity).detach()), start=1):
            found |= {f"{quantity}.{stage}.{name}": value for name, value in zip(OPERATIONS, row, strict=True)}
    return found


def policy_table(policy: Mapping[str, Tensor], *, title: str) -> mlo.Table:
    """π, μ and p of every operation and stage, [14] rows."""
    values = {
        f"{symbol} {stage}": row.tolist()
        for quantity, symbol in (("selection", "π"), ("magnitude", "μ"), ("probability", "p"))
        for stage, row in enumerate(QUANTITIES[quantity](_part(policy, quantity)), start=1)
    }
    rows = tuple(zip(OPERATIONS, *values.values(), strict=True))
    return mlo.Table(title=title, columns=("operation", *values), rows=rows)


def _part(policy: Mapping[str, Tensor], quantity: str) -> Tensor:
    """A parameter of a policy before its constraint; one that a graph freezes (`freeze: [magnitude]`) is a buffer."""
    frozen = policy.buffers if isinstance(policy, mlo.ModuleVariables) else {}
    return policy[quantity] if quantity in policy else frozen[quantity]


def _is_policy(values: Mapping[str, Tensor]) -> bool:
    frozen = values.buffers if isinstance(values, mlo.ModuleVariables) else {}
    return all(quantity in values or quantity in frozen for quantity in QUANTITIES)


def _judged(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's logits [n, C] and its scores [n]."""
    return outputs[:, :-1], outputs[:, -1]


def _noise(count: int, stages: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """The draws of a batch of augmented images."""
    drawn = draws_for(count, stages=stages, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}


def _uniforms(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=dtype)


def _evaluation(found: ImageSets, settings: Data, context: mlo.Context) -> mlo.Evaluate:
    """Judges a network; of several, as a random search leaves them, the one that is best on validation images."""
    parts = {"validation": found.validation, "test": found.test}
    taken = partial(in_order, device=context.device, dtype=context.dtype)

    def logits(network: Any, split: mlo.Split) -> Tensor:
        batches = taken(parts[split], size=AT_ONCE)
        return torch.cat([network(batch["images"], training=False) for batch in batches])[:, : found.classes]

    def accuracy(network: Any) -> float:
        labels = parts["validation"].labels.to(context.device)
        return (logits(network, "validation").argmax(1) == labels).double().mean().item()

    def samples(policy: Any) -> Tensor:
        """Training images, each beside augmented ones."""
        every = max(1, len(found.train) // ROWS)
        shown = replace(found.train, index=found.train.index[::every][:ROWS], labels=found.train.labels[::every][:ROWS])
        (batch,) = taken(shown, size=ROWS)
        images, noise = batch["images"], _noise(len(shown) * COLUMNS, settings.stages, context.dtype, draws())
        noise = {name: tensor.to(context.device) for name, tensor in noise.items()}
        augmented = policy(images.repeat_interleave(COLUMNS, 0), noise).unflatten(0, (len(shown), COLUMNS))
        return tiles(torch.cat([images[:, None], augmented], 1))

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(context.seed)

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        for name in model:
            if _is_policy(values[name]):
                raise mlo.UserError(
                    f"evaluation.model: level '{name}' is a policy and classifies nothing; name levels with a network"
                )
        best = model[0] if len(model) == 1 else max(model, key=lambda name: accuracy(values[name]))
        labels = parts[split].labels.to(context.device)
        judged = logits(values[best], split)
        metrics = {"loss": cross_entropy(judged, labels).item(), **classification_scores(judged, labels).metrics}
        if found.classes > 10:
            metrics["top5"] = 100 * (judged.topk(5).indices == labels[:, None]).any(1).double().mean().item()
        if len(model) > 1:
            metrics["chosen"] = float(model.index(best) + 1)
        policies = [name for name in values if _is_policy(values[name])]
        if not complete:
            return mlo.Evaluation(metrics=metrics)
        return mlo.Evaluation(
            metrics=metrics,
            tables=tuple(policy_table(values[name], title=f"Level '{name}'") for name in policies),
            pictures={f"augmented_by_{name}": samples(values[name]) for name in policies},
        )

    return evaluate
