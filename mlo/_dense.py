"""Small dense linear algebra on flat vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def nystrom_solve(basis: Tensor, images: Tensor, vector: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """(H̃ + damping · I)⁻¹ `vector` with H̃ = Y (ΩᵀY)⁺ Yᵀ, the largest eigenvalue of H̃, and 1 where ΩᵀY has a negative one.

    `basis` is Ω, orthonormal, and `images` is Y = HΩ, both n × r. With ΩᵀY = V diag(m) Vᵀ and a QR factorisation of
    Y V |m|^{−1/2}, H̃ = Q S Qᵀ for a small symmetric S, and then

        (H̃ + δI)⁻¹ λ = Q (S + δI)⁻¹ Qᵀ λ + (λ − Q Qᵀ λ)/δ

    which, unlike the Woodbury identity as it is printed, subtracts nothing of size 1/δ. Eigenvalues m below r · eps · max|m|
    count as zero. O(n r²) time.
    """
    core = basis.mT @ images
    eigenvalues, vectors = torch.linalg.eigh((core + core.mT) / 2)
    sizes = eigenvalues.abs()
    least = sizes.amax() * (len(eigenvalues) * torch.finfo(vector.dtype).eps)
    kept = sizes > least
    weights = torch.where(kept, torch.where(kept, sizes, 1.0).rsqrt(), 0.0)
    q, r = torch.linalg.qr(images @ (vectors * weights))
    small = (r * eigenvalues.sign()) @ r.mT
    spectrum, rotation = torch.linalg.eigh((small + small.mT) / 2)
    inside = q.mT @ vector
    solved = q @ (rotation @ ((rotation.mT @ inside) / (spectrum + damping)))
    if len(basis) > basis.shape[1]:  # otherwise nothing but rounding is left
        solved = solved + (vector - q @ inside) / damping
    return solved, spectrum.amax(), (eigenvalues < -least).any().to(vector.dtype)
