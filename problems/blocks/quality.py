"""How good generated images are: recognised by a classifier of real ones, as varied as real ones, and how far from them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.digits import CLASSES, all_digits
from problems.blocks.jitter import Jitter, uniform_draws
from problems.blocks.networks import Classifier


@torch.enable_grad()
def recogniser(*, seed: int = 0, iterations: int = 1000, batch: int = 64, learning_rate: float = 0.05) -> Classifier:
    """A classifier of all 1,797 digits, in evaluation mode, with its parameters frozen: the judge of generated ones.

    SGD with momentum 0.9 and a learning rate that falls linearly to zero, on mildly jittered images, so that it judges
    the digit and not its exact place. It has seen the test images: use it to judge generators, never classifiers.
    The same seed gives the same recogniser, whatever torch's default dtype, and the caller's random numbers are left as they
    were.
    """
    everything = all_digits()
    jitter = Jitter(rotation=15.0, scale=0.1, shift=0.85)
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), _drawing(everything.images.dtype):
        torch.manual_seed(seed)
        model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=iterations)
    for _ in range(iterations):
        chosen = torch.randint(len(everything), (batch,), generator=draws)
        images = everything.images[chosen]
        with _drawing(images.dtype):
            images = jitter(images, uniform_draws(batch, generator=draws))
        optimizer.zero_grad()
        cross_entropy(model(images), everything.labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@contextmanager
def _drawing(dtype: torch.dtype) -> Generator[None]:
    """Random numbers of this type, which decides how they are drawn, where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def recognised_share(judge: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Share of each class's images whose largest logit is their label's.

    Images [n, 1, 8, 8] and labels [n] to [10]; NaN for an absent class.
    """
    with torch.no_grad():
        right = (judge(images).argmax(dim=1) == labels).to(images.dtype)
    return torch.stack([right[labels == c].mean() for c in range(CLASSES)])


def mean_pairwise_distance(images: Tensor, labels: Tensor) -> Tensor:
    """Mean L2 distance between two different images of a class, Σ_{i≠j} ‖x_i − x_j‖ / (n_c (n_c − 1)), for each class.

    Images [n, ...] and labels [n] to [10]; NaN for a class of fewer than two images. Low means that a generator
    collapsed: compare with the distances of `all_digits()`, which lie between 3.4 (the zeros) and 5.2 (the ones).
    """
    return torch.stack([torch.pdist(images[labels == c].flatten(1)).mean() for c in range(CLASSES)])


@torch.no_grad()
def feature_frechet_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    r"""The squared Fréchet distance of two Gaussians with the features' means and covariances (Heusel et al. 2017, Eq. 6):

        ‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    With the features of InceptionNet it is called FID, and MGR's §4.5 prints the formula; features of another network give
    numbers that compare with none but their own. Features [n, ...] and [m, ...], at least two of each; covariances with
    n − 1. Computed in float64, from singular values: with centred features A = Q_a R_a and B = Q_b R_b, the trace of
    (Σ_a Σ_b)^½ is the sum of those of R_a R_bᵀ/√((n − 1)(m − 1)), which needs no root of a matrix and no full rank.
    It falls as n and m grow: compare equal numbers.
    """
    means, factors, total = [], [], 0.0
    for features in (features_a, features_b):
        rows = features.flatten(1).double()
        if len(rows) < 2:
            raise mlo.UserError(f"{len(rows)} features: a covariance takes at least two")
        means.append(rows.mean(0))
        centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
        factors.append(torch.linalg.qr(centred, mode="r").R)
        total = total + centred.square().sum()
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return ((means[0] - means[1]).square().sum() + total - 2 * root).clamp(min=0)


def sample_grid(images: Tensor, labels: Tensor, *, columns: int = 10) -> Tensor:
    """The first `columns` images of each class side by side, one row a class: uint8 [10·(h+1)+1, columns·(w+1)+1].

    Images [n, 1, h, w] in [−1, 1]; black is −1, white 1, the lines between tiles and missing images mid-grey.
    """
    height, width = images.shape[-2:]
    grid = torch.full((CLASSES * (height + 1) + 1, columns * (width + 1) + 1), 128, dtype=torch.uint8)
    shades = ((images[:, 0].detach() + 1) * 127.5).round().clamp(0, 255).to(device="cpu", dtype=torch.uint8)
    for c in range(CLASSES):
        for column, tile in enumerate(shades[(labels == c).to("cpu")][:columns]):
            top, left = 1 + c * (height + 1), 1 + column * (width + 1)
            grid[top : top + height, left : left + width] = tile
    return grid
