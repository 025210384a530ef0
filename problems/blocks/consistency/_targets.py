"""Pseudo labels: what a network says of weakly transformed images, kept fixed, and learned for strongly transformed ones.

Targets are constants, and which samples count is a discrete choice. Below an upper level both belong into
`values.once("targets", lambda: uda_targets(logits_weak))`, so that no perturbed evaluation changes them; with targets made
anew, central differences see them move and exact cross products do not.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import one_hot


class Targets(NamedTuple):
    """What the network shall say, and of which samples: constants.

    - `probabilities`: [n, classes], rows that sum to 1.
    - `kept`: [n], 1 for samples that count and 0 for others.
    """

    probabilities: Tensor
    kept: Tensor


def uda_targets(logits_weak: Tensor, *, temperature: float = 0.4, confidence: float = 0.8) -> Targets:
    """softmax(logits/T), where max softmax(logits) > confidence (Xie et al. 2020, UDA, §2: sharpening and masking).

    The mask sees probabilities that are not sharpened. Logits [n, classes].
    """
    fixed = logits_weak.detach()
    sharpened = (fixed / temperature).softmax(1)
    kept = fixed.softmax(1).amax(1) > confidence
    return Targets(sharpened, kept.to(sharpened.dtype))


def fixmatch_targets(logits_weak: Tensor, *, threshold: float = 0.95) -> Targets:
    """The likeliest class, where its probability is ≥ threshold (Sohn et al. 2020, FixMatch, Eq. 4). Logits [n, classes]."""
    fixed = logits_weak.detach()
    confidence, labels = fixed.softmax(1).max(1)
    kept = confidence >= threshold
    return Targets(one_hot(labels, fixed.shape[1]).to(confidence.dtype), kept.to(confidence.dtype))


def matched(targets: Targets, logits_strong: Tensor) -> Tensor:
    """−1/n Σ_i kept_i Σ_c target_ic log softmax(logits_i)_c: over all n, so that few confident samples weigh little."""
    losses = -(targets.probabilities * logits_strong.log_softmax(1)).sum(1)
    return (targets.kept * losses).mean()


def uda(logits_weak: Tensor, logits_strong: Tensor, *, temperature: float = 0.4, confidence: float = 0.8) -> Tensor:
    """UDA's loss of unlabelled samples, `matched` to `uda_targets`; T = 0.4 and 0.8 are those of MGR's GDA+SSL.

    Logits [n, classes] of the same samples, transformed weakly and strongly. No gradient enters the weak ones. The
    cross-entropy, which differs from the KL divergence by a constant.
    """
    return matched(uda_targets(logits_weak, temperature=temperature, confidence=confidence), logits_strong)


def fixmatch(logits_weak: Tensor, logits_strong: Tensor, *, threshold: float = 0.95) -> Tensor:
    """FixMatch's loss of unlabelled samples (Eq. 4), `matched` to `fixmatch_targets`.

    Logits [n, classes] of the same samples, transformed weakly and strongly. No gradient enters the weak ones.
    """
    return matched(fixmatch_targets(logits_weak, threshold=threshold), logits_strong)
