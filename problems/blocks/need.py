"""How much a class needs: from per-class losses to the probabilities that images are generated with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

EPSILON = 1e-6
"""Keeps a need positive and log(1 − p) finite."""


def class_losses(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """l_c: the mean cross-entropy over the samples of class c, [classes]; 0 for an absent class.

    Logits [n, classes], labels [n].
    """
    losses = cross_entropy(logits, labels, reduction="none")
    member = one_hot(labels, classes).to(losses.dtype)
    return (losses @ member) / member.sum(0).clamp(min=1)


def class_need(losses: Tensor) -> Tensor:
    """p(s = c) = l_c / Σ_b l_b (Gala and Xie 2024, Eq. 3), each l_c with a small ε added, [classes]."""
    raised = losses + EPSILON
    return raised / raised.sum()


def relaxed_bernoulli(p: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """b = σ((log p + g₁ − log(1 − p) − g₂)/T), the binary Gumbel-softmax of Eq. 4: near 1 with probability p.

    p [m], gumbel [m, 2]. E[b] → p as T → 0; p is clamped away from 0 and 1.
    """
    clamped = p.clamp(EPSILON, 1 - EPSILON)
    logit = clamped.log() - torch.log1p(-clamped)
    return torch.sigmoid((logit + gumbel[:, 0] - gumbel[:, 1]) / temperature)
