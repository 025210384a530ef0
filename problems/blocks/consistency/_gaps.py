"""How far generated samples are from real ones in a space of features: the gap of MP-SSL, in three forms.

In MP-SSL the feature extractor is held fixed here, and only the generated features move.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-12
"""Keeps the bandwidth positive where all real features are the same."""


def paired_gap(real: Tensor, generated: Tensor) -> Tensor:
    """mean_i ‖a_i − b_i‖² (MP-SSL, Eq. 8): each generated sample against the real one whose label it was made with.

    Features [n, ...].
    """
    return (real - generated).square().flatten(1).sum(1).mean()


def batch_mean_gap(real: Tensor, generated: Tensor) -> Tensor:
    """‖mean_i a_i − mean_j b_j‖² (MP-SSL, Alg. 1 line 8, which takes logits). Features [n, ...] and [m, ...].

    Not a mean over samples.
    """
    return (real.flatten(1).mean(0) - generated.flatten(1).mean(0)).square().sum()


def mmd(
    real: Tensor,
    generated: Tensor,
    *,
    bandwidth: float | None = None,
    multiples: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0),
) -> Tensor:
    """The squared maximum mean discrepancy (Gretton et al. 2012, Eq. 5, the biased estimate, never below 0):

        mean_ii' k(a_i, a_i') + mean_jj' k(b_j, b_j') − 2 mean_ij k(a_i, b_j),
        k(a, b) = mean_s exp(−‖a − b‖² / (2 s σ²)).

    Features [n, ...] and [m, ...]; memory (n + m)² times their length. Not a mean over samples. MP-SSL's Table 11 does not
    name a kernel: a sum of Gaussians is the usual choice.

    - `bandwidth`: σ; if not given, σ² is the mean squared distance of two different real features.
    - `multiples`: the s.
    """
    a, b = real.flatten(1), generated.flatten(1)
    among = _squared_distances(a, a)
    squared = bandwidth**2 if bandwidth is not None else among.sum() / max(1, len(a) * (len(a) - 1)) + EPSILON

    def mean_kernel(distances: Tensor) -> Tensor:
        return sum(((-distances / (2 * s * squared)).exp().mean() for s in multiples), distances.new_zeros(())) / len(
            multiples
        )

    return mean_kernel(among) + mean_kernel(_squared_distances(b, b)) - 2 * mean_kernel(_squared_distances(a, b))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖², [n, m]. From differences: `cdist` has no second derivative, and ‖a‖² + ‖b‖² − 2 a·b cancels."""
    return (a[:, None] - b[None]).square().sum(2)
