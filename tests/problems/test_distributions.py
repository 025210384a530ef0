"""Distances of distributions: the Fréchet distance of features and the KL divergence of latents, in closed form."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Independent, Normal, kl_divergence

import mlo
from problems.blocks.latents import kl_to_standard_normal
from problems.blocks.quality import feature_frechet_distance


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: Tensor, deviation: Tensor, *, count: int = 64) -> Tensor:
    """Samples with exactly this mean, and a covariance (n − 1) of exactly diag deviation²."""
    rows = normal(count, len(mean))
    q = torch.linalg.qr(rows - rows.mean(0)).Q
    return mean + q * (count - 1) ** 0.5 * deviation


# Fréchet


def test_frechet_distance_of_diagonal_gaussians_is_its_closed_form():
    """‖μ_a − μ_b‖² + Σ_d (s_a − s_b)²."""
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 0.0]])
    deviations = torch.tensor([[1.0, 2.0, 0.3], [0.7, 0.5, 3.0]])
    a, b = (with_moments(means[k], deviations[k]) for k in range(2))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert feature_frechet_distance(a, b).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("n", "m", "width"), [(50, 40, 6), (30, 90, 12)])
def test_frechet_distance_is_that_of_matrix_roots(n, m, width):
    root = importlib.import_module("scipy.linalg").sqrtm
    a, b = (
        normal(n, width) @ normal(width, width, seed=1),
        normal(m, width, seed=2) @ normal(width, width, seed=3) + 0.3,
    )
    covariances = a.T.cov(), b.T.cov()
    trace = torch.as_tensor(root((covariances[0] @ covariances[1]).numpy()).real).trace()
    expected = (a.mean(0) - b.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * trace
    assert feature_frechet_distance(a, b).item() == pytest.approx(expected.item(), rel=1e-9)
    assert feature_frechet_distance(b, a).item() == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_needs_no_full_rank():
    """Fewer samples than features; of a batch to itself 0, to itself moved by v ‖v‖²."""
    a = normal(5, 4, 2, 2)
    assert feature_frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    assert feature_frechet_distance(a, a + 0.5).item() == pytest.approx(16 * 0.25, rel=1e-12)
    assert feature_frechet_distance(a, torch.zeros(2, 16)).item() == pytest.approx(
        (a.flatten(1).mean(0).square().sum() + a.flatten(1).var(0).sum()).item(), rel=1e-12
    )


def test_one_feature_has_no_covariance():
    with pytest.raises(mlo.UserError, match="1 features"):
        feature_frechet_distance(normal(1, 3), normal(5, 3))


# KL


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_kl_is_that_of_two_gaussians(epsilon):
    latents = normal(40, 5) * torch.tensor([0.2, 1.0, 3.0, 0.9, 1.1]) + torch.tensor([0.0, 1.0, -1.0, 2.0, 0.1])
    fitted = Independent(Normal(latents.mean(0), latents.std(0, correction=0)), 1)
    standard = Independent(Normal(torch.zeros(5), torch.ones(5)), 1)
    expected = kl_divergence(fitted, standard).item()
    assert kl_to_standard_normal(latents, epsilon=epsilon).item() == pytest.approx(expected, rel=1e-10 + 20 * epsilon)


def test_kl_by_hand():
    """One dimension, mean 1, variance 4, and another, mean 0, variance 1: ½(1 + 4 − 1 − log 4)."""
    latents = torch.tensor([[-1.0, 1.0], [3.0, -1.0]])
    assert kl_to_standard_normal(latents, epsilon=0.0).item() == pytest.approx(2 - 0.5 * torch.tensor(4.0).log().item())


def test_kl_is_differentiated_to_second_order_and_finite_where_all_latents_are_the_same():
    assert gradcheck(kl_to_standard_normal, normal(4, 3).requires_grad_())
    assert gradgradcheck(kl_to_standard_normal, normal(4, 3).requires_grad_())
    same = torch.ones(4, 3, requires_grad=True)
    found = kl_to_standard_normal(same)
    (slope,) = torch.autograd.grad(found, same)
    assert found.isfinite()
    assert slope.isfinite().all()


def test_kl_of_standard_normal_latents_is_about_latent_over_n():
    found = torch.stack([kl_to_standard_normal(normal(64, 32, seed=seed)) for seed in range(100)]).mean()
    assert found.item() == pytest.approx(32 / 64, rel=0.05)
