"""FreeMatch: pseudo labels under thresholds that follow the network's confidence (Wang et al. 2023)."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import mlo
from problems.blocks.consistency._targets import Targets, matched


class Thresholds(NamedTuple):
    """What `SelfAdaptiveThresholds` gives: constants.

    - `local`: τ(c), [classes]: from which probability on a pseudo label counts.
    - `probabilities`: p̃, the running mean of probabilities, [classes].
    - `histogram`: h̃, the running share of pseudo labels, [classes].
    """

    local: Tensor
    probabilities: Tensor
    histogram: Tensor


@final
class SelfAdaptiveThresholds(nn.Module):
    r"""Running means of what a network says of unlabelled samples, and the thresholds they give (Eqs. 5–7 and 11).

        τ ← λ τ + (1 − λ) mean_i max_c q_ic,    p̃ ← λ p̃ + (1 − λ) mean_i q_i,    h̃ ← λ h̃ + (1 − λ) mean_i [c = argmax q_i],
        τ(c) = p̃(c) / max_b p̃(b) · τ,

    with q_i = softmax of the logits of the weakly transformed sample i. All start at 1/classes. They are buffers: a call
    in training mode updates them from its batch and returns the thresholds after the update, as Eq. 8 has it; a call in
    evaluation mode leaves them. Two calls are two updates.

    Buffers are kept on the real steps of the level that holds them, so they belong into the level that learns: see
    `WithThresholds`. They are statistics of the batch: objectives that use them declare `@mlo.reduction("batch")`.

    - `classes`: how many.
    - `decay`: λ, 0.999 in the paper.

    Raises UserError for a decay outside [0, 1) or fewer than two classes.
    """

    confidence: Tensor
    probabilities: Tensor
    histogram: Tensor

    def __init__(self, *, classes: int, decay: float = 0.999) -> None:
        super().__init__()
        if classes < 2:
            raise mlo.UserError(f"classes={classes}: thresholds of pseudo labels need at least two")
        if not 0 <= decay < 1:
            raise mlo.UserError(f"decay={decay}: it must be at least 0 and below 1")
        self.decay = decay
        self.register_buffer("confidence", torch.tensor(1 / classes))  # τ
        self.register_buffer("probabilities", torch.full((classes,), 1 / classes))  # p̃
        self.register_buffer("histogram", torch.full((classes,), 1 / classes))  # h̃

    def forward(self, logits_weak: Tensor) -> Thresholds:
        """The thresholds for a batch of logits [n, classes], which are not differentiated."""
        if self.training:
            q = logits_weak.detach().softmax(1).to(self.confidence.dtype)
            labels = one_hot(q.argmax(1), q.shape[1]).to(q.dtype)
            # New tensors, not in place: the caller's buffers stay what they were.
            self.confidence = torch.lerp(q.amax(1).mean(), self.confidence, self.decay)
            self.probabilities = torch.lerp(q.mean(0), self.probabilities, self.decay)
            self.histogram = torch.lerp(labels.mean(0), self.histogram, self.decay)
        local = self.probabilities / self.probabilities.amax() * self.confidence
        return Thresholds(local, self.probabilities, self.histogram)


@final
class WithThresholds(nn.Module):
    """A network and `SelfAdaptiveThresholds` beside it, in one module, as a level holds them.

    `module(images, ...)` is the network's output; `module(thresholds_of=logits_weak)` the thresholds, updated in training
    mode.
    """

    def __init__(self, network: nn.Module, *, classes: int, decay: float = 0.999) -> None:
        super().__init__()
        self.network = network
        self.thresholds = SelfAdaptiveThresholds(classes=classes, decay=decay)

    def forward(self, *args: Any, thresholds_of: Tensor | None = None, **kwargs: Any) -> Any:
        """See the class."""
        return self.network(*args, **kwargs) if thresholds_of is None else self.thresholds(thresholds_of)


def freematch_targets(logits_weak: Tensor, thresholds: Thresholds) -> Targets:
    """The likeliest class, where its probability is above its threshold τ(c) (Eq. 8). Logits [n, classes]."""
    fixed = logits_weak.detach()
    confidence, labels = fixed.softmax(1).max(1)
    kept = confidence > thresholds.local.to(confidence.dtype)[labels]
    return Targets(one_hot(labels, fixed.shape[1]).to(confidence.dtype), kept.to(confidence.dtype))


def fairness(targets: Targets, logits_strong: Tensor, thresholds: Thresholds) -> Tensor:
    r"""L_f = −H(n(p̃/h̃), n(p̄/h̄)) = Σ_c n(p̃/h̃)_c log n(p̄/h̄)_c, with n(v) = v/Σv (Eqs. 9, 10 and 12).

    p̄ is the mean probability of strongly transformed samples that are kept, h̄ the histogram of their likeliest classes.
    Classes that no kept sample has are left out of n(p̄/h̄) and of the sum: there 0/0 has no derivative. Nothing kept: 0.
    Logits [n, classes]. The gradient enters through p̄ alone. Not a mean over samples.
    """
    probabilities = logits_strong.softmax(1)
    labels = one_hot(logits_strong.detach().argmax(1), logits_strong.shape[1]).to(probabilities.dtype)
    kept = targets.kept[:, None]
    total, counts = (kept * probabilities).sum(0), (kept * labels).sum(0)
    present = counts > 0
    ratio = torch.where(present, total / torch.where(present, counts, 1), 0)
    current = torch.where(present, ratio / torch.where(present.any(), ratio.sum(), 1), 1)
    # As small as it comes where nobody has been taken for a class for 100,000 steps: p̃/h̃ is finite then, too.
    histogram = thresholds.histogram.clamp(min=torch.finfo(thresholds.histogram.dtype).tiny)
    expected = (thresholds.probabilities / histogram).to(probabilities.dtype)
    return (expected / expected.sum() * current.log()).sum()


def freematch(
    logits_weak: Tensor, logits_strong: Tensor, thresholds: Thresholds, *, fairness_weight: float = 0.05
) -> Tensor:
    """FreeMatch's loss of unlabelled samples, L_u + w_f L_f (Eqs. 8, 12 and 13).

    Logits [n, classes] of the same samples, transformed weakly and strongly; no gradient enters the weak ones. The paper
    compares with thresholds to which this batch has contributed: `thresholds = holder(logits_weak)` in training mode.

    - `fairness_weight`: w_f, 0.05 in the paper, 0.01 where labels are fewest; 0 leaves L_f out.
    """
    targets = freematch_targets(logits_weak, thresholds)
    loss = matched(targets, logits_strong)
    return loss + fairness_weight * fairness(targets, logits_strong, thresholds) if fairness_weight else loss
