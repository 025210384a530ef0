"""Latent vectors of generators: how far a batch of them is from the distribution that generators were trained on."""

from __future__ import annotations

from torch import Tensor


def kl_to_standard_normal(latents: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """KL(N(μ, diag σ) ‖ N(0, I)) of a batch, −½ Σ_d (1 + log(σ_d + ε) − μ_d² − σ_d) (MGR, Eq. 11).

    μ and σ are the mean and the **variance** of each latent dimension over the batch (population). Latents [n, latent].
    ε keeps the logarithm finite where all latents are the same. Not a mean over samples: objectives that use it declare
    `@mlo.reduction("batch")`. Standard normal latents themselves have about latent/n.
    """
    mean, variance = latents.mean(0), latents.var(0, correction=0)
    return -0.5 * (1 + (variance + epsilon).log() - mean.square() - variance).sum()
