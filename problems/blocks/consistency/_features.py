"""How far apart the features of two views of the same images are: means over the batch.

No gradient is stopped: both views move the feature extractor, and the images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss


def pcr(features_of_transformed: Tensor, features: Tensor) -> Tensor:
    """Pseudo consistency regularization, mean_i ‖g(T(x_i)) − g(x_i)‖² (Yamaguchi et al. 2023, MGR, Eqs. 4 and 5).

    Features [n, ...], of which all but the first dimension are summed over. They come from the feature extractor, so
    that the head has no part in it and gets no gradient.
    """
    return l2(features_of_transformed, features)


def scr(features_weak: Tensor, features_strong: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Synthetic consistency regularization, 1 − mean_i cos(a_i, b_i) (MP-SSL, Eq. 13), in [0, 2].

        cos(a, b) = a·b / (√(‖a‖² + ε²) √(‖b‖² + ε²)),

    so that features of zero have finite derivatives of every order. Features [n, ...]. Changes the cosine of features of
    norm r by a share of ε²/r².
    """
    a, b = features_weak.flatten(1), features_strong.flatten(1)
    norms = (a.square().sum(1) + epsilon**2).sqrt() * (b.square().sum(1) + epsilon**2).sqrt()
    return (1 - (a * b).sum(1) / norms).mean()


def l1(features_weak: Tensor, features_strong: Tensor) -> Tensor:
    """mean_i ‖a_i − b_i‖₁ (MP-SSL, Table 6). Features [n, ...]."""
    return (features_weak - features_strong).abs().flatten(1).sum(1).mean()


def l2(features_weak: Tensor, features_strong: Tensor) -> Tensor:
    """mean_i ‖a_i − b_i‖₂², squared as in Table 6 of MP-SSL. Features [n, ...]."""
    return (features_weak - features_strong).square().flatten(1).sum(1).mean()


def smooth_l1(features_weak: Tensor, features_strong: Tensor, *, beta: float = 1.0) -> Tensor:
    """mean_i Σ_k h(a_ik − b_ik) with h(d) = d²/(2β) for |d| < β and |d| − β/2 elsewhere (Girshick 2015, Eq. 3, β = 1).

    Features [n, ...] (MP-SSL, Table 6).
    """
    a, b = torch.broadcast_tensors(features_weak, features_strong)
    return smooth_l1_loss(a, b, reduction="none", beta=beta).flatten(1).sum(1).mean()
