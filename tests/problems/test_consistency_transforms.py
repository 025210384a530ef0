"""Weak and strong transforms: the identity at draws of zero, images by themselves, the draws, and the derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlo
from problems.blocks.augmentation import OPERATIONS, apply
from problems.blocks.consistency import (
    augmix,
    augmix_draws,
    rand_augment_draws,
    strong,
    strong_draws,
    trivial_augment_draws,
    weak,
    weak_draws,
)

Draws = Mapping[str, Tensor]
Transform = Callable[[Tensor, Draws], Tensor]
WITHOUT_INVERT = [place for place, name in enumerate(OPERATIONS) if name != "invert"]

transforms: list[tuple[str, Transform, Callable[..., dict[str, Tensor]]]] = [
    ("weak", weak, partial(weak_draws, shift=2, flip=True)),
    ("strong", strong, partial(strong_draws, cutout=0.5)),
    ("three", strong, partial(strong_draws, operations=3, weakest=0.2, strongest=0.6)),
    ("rand_augment", strong, rand_augment_draws),
    ("trivial_augment", strong, trivial_augment_draws),
    ("augmix", augmix, augmix_draws),
]
each = pytest.mark.parametrize(
    ("transform", "draw"), [row[1:] for row in transforms], ids=[row[0] for row in transforms]
)
shaped = pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 17, 20)], ids=str)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(count: int, shape: tuple[int, ...] = (1, 8, 8), *, seed: int = 0) -> Tensor:
    """Images in (0.2, 0.8) without two equal pixels."""
    return 0.2 + 0.6 * torch.rand(count, *shape, generator=seeded(seed))


# every transform


@each
@shaped
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_of_zero_are_the_identity_bit_for_bit(transform, draw, shape, dtype):
    images = images_of(6, shape).to(dtype)
    zero = {name: torch.zeros_like(tensor) for name, tensor in draw(6, generator=seeded()).items()}
    assert torch.equal(transform(images, zero), images)


@each
@shaped
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_equals_its_images_one_by_one_in_range_shape_and_dtype(transform, draw, shape, dtype):
    images, draws = images_of(24, shape).to(dtype), draw(24, generator=seeded(1))
    together = transform(images, draws)
    assert (together.shape, together.dtype) == (images.shape, dtype)
    assert together.min() >= 0
    assert together.max() <= 1
    assert not torch.equal(together, images)
    for k in range(24):
        alone = transform(images[k : k + 1], {name: tensor[k : k + 1] for name, tensor in draws.items()})
        assert torch.equal(together[k : k + 1], alone)


@each
def test_transforms_are_pure_and_draws_come_from_the_generator_alone(transform, draw):
    images, draws = images_of(8), draw(8, generator=seeded(2))
    kept, state = {name: tensor.clone() for name, tensor in draws.items()}, torch.get_rng_state()
    before = images.clone()
    first = transform(images, draws)
    assert torch.equal(transform(images, draws), first)
    assert torch.equal(images, before)
    again = draw(8, generator=seeded(2))
    assert all(torch.equal(draws[name], kept[name]) and torch.equal(again[name], kept[name]) for name in kept)
    assert torch.equal(torch.get_rng_state(), state)
    other = draw(8, generator=seeded(3))
    assert any(not torch.equal(other[name], kept[name]) for name in kept)


@each
def test_draws_of_another_dtype_say_the_same(transform, draw):
    """A stream may convert all it draws."""
    images, draws = images_of(12).float(), draw(12, generator=seeded(4))
    single = {name: tensor.float() for name, tensor in draws.items()}
    assert torch.allclose(transform(images, single), transform(images, draws), atol=1e-6)


def exact(draws: Draws) -> dict[str, Tensor]:
    """The draws with the identity in place of what passes derivatives straight through steps."""
    steps = [place for place, name in enumerate(OPERATIONS) if name in ("posterize", "equalize")]
    if "operation" not in draws:
        return dict(draws)
    stepwise = torch.isin(draws["operation"].long(), torch.tensor(steps))
    return {**draws, "magnitude": torch.where(stepwise, 0, draws["magnitude"])}


@each
def test_images_are_differentiated_to_second_order(transform, draw):
    images, draws = images_of(12, (3, 5, 4), seed=5).requires_grad_(), exact(draw(12, generator=seeded(5)))

    def moved(images: Tensor) -> Tensor:
        return transform(images, draws)

    # In random directions: entry by entry takes half a minute, for the same derivatives.
    assert gradcheck(moved, images, fast_mode=True)
    assert gradgradcheck(lambda images: moved(images).pow(3).mean(0), images, fast_mode=True)


@each
def test_the_second_derivative_passes_through_every_operation(transform, draw):
    """Of Σ w out³ in all draws, the stepwise ones too: finite, and not zero."""
    images, draws = images_of(32, (3, 8, 8), seed=6).requires_grad_(), draw(32, generator=seeded(6))
    (slope,) = torch.autograd.grad(transform(images, draws).pow(3).sum(), images, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), images)
    assert curvature.isfinite().all()
    assert (curvature.flatten(1).abs().sum(1) > 0).all()


# weak


def test_weak_shifts_by_whole_pixels_after_mirroring():
    image = torch.arange(1.0, 13.0).view(1, 1, 3, 4)

    def moved(y: float, x: float, flip: float) -> list[list[float]]:
        return weak(image, {"shift": torch.tensor([[y, x]]), "flip": torch.tensor([flip])})[0, 0].tolist()

    assert moved(0, 0, 1) == [[4, 3, 2, 1], [8, 7, 6, 5], [12, 11, 10, 9]]
    assert moved(1, 0, 0) == [[5, 6, 7, 8], [9, 10, 11, 12], [0, 0, 0, 0]]
    assert moved(0, -2, 0) == [[0, 0, 1, 2], [0, 0, 5, 6], [0, 0, 9, 10]]
    assert moved(-1, 1, 1) == [[0, 0, 0, 0], [3, 2, 1, 0], [7, 6, 5, 0]]
    assert moved(3, 0, 0) == [[0, 0, 0, 0]] * 3
    assert moved(0, 4, 1) == [[0, 0, 0, 0]] * 3


def test_weak_draws_are_uniform_and_flips_an_option():
    draws = weak_draws(3000, shift=1, flip=True, generator=seeded())
    for axis in range(2):
        values, counts = draws["shift"][:, axis].unique(return_counts=True)
        assert values.tolist() == [-1, 0, 1]
        assert (counts - 1000).abs().max() < 130  # five standard deviations
    assert abs(draws["flip"].sum() - 1500) < 140
    assert weak_draws(3000, generator=seeded())["flip"].count_nonzero() == 0
    assert weak_draws(5, shift=0, generator=seeded())["shift"].count_nonzero() == 0


# strong


def test_strong_is_its_operations_one_after_the_other():
    images, draws = images_of(40, (3, 12, 12)), strong_draws(40, operations=2, generator=seeded(7))
    expected = images
    for stage in range(2):
        one_by_one = [
            apply(OPERATIONS[int(place)], expected[k : k + 1], magnitude[None], sign[None])
            for k, (place, magnitude, sign) in enumerate(
                zip(*(draws[name][:, stage] for name in ("operation", "magnitude", "sign")), strict=True)
            )
        ]
        expected = torch.cat(one_by_one)
    assert torch.equal(strong(images, draws), expected)


def test_strong_draws_are_uniform_over_thirteen_operations_and_the_identity():
    draws = strong_draws(7000, operations=2, weakest=0.2, strongest=0.6, generator=seeded())
    magnitude, operation = draws["magnitude"], draws["operation"].long()
    idle = magnitude == 0
    counts = operation[~idle].bincount(minlength=len(OPERATIONS))
    assert counts.nonzero().flatten().tolist() == WITHOUT_INVERT
    assert (counts[WITHOUT_INVERT] - 1000).abs().max() < 155  # of 14,000: five standard deviations
    assert abs(int(idle.sum()) - 1000) < 155
    assert magnitude[~idle].min() >= 0.2
    assert magnitude[~idle].max() <= 0.6
    assert abs(magnitude[~idle].mean() - 0.4) < 0.01
    assert abs(draws["sign"].mean()) < 0.05
    assert draws["sign"].unique().tolist() == [-1, 1]
    assert draws["cutout"][:, 2].count_nonzero() == 0


def test_randaugment_has_one_magnitude_and_trivialaugment_one_operation():
    fixed = rand_augment_draws(500, operations=3, magnitude=0.7, generator=seeded())
    assert fixed["operation"].shape == (500, 3)
    assert fixed["magnitude"].unique().tolist() == [0, 0.7]
    trivial = trivial_augment_draws(5000, generator=seeded())
    assert trivial["operation"].shape == (5000, 1)
    steps = (30 * trivial["magnitude"].unique()).round(decimals=9)
    assert torch.equal(steps, torch.arange(31.0))


def test_cutout_is_a_square_of_its_share_about_its_middle():
    image = torch.ones(1, 3, 8, 8)
    draws = {name: torch.zeros(1, 1) for name in ("operation", "magnitude", "sign")}

    def hole(y: float, x: float, side: float) -> Tensor:
        out = strong(image, {**draws, "cutout": torch.tensor([[y, x, side]])}, fill=0.25)
        assert torch.equal(out[0, 0], out[0, 2])
        assert set(out.unique().tolist()) <= {0.25, 1.0}
        return (out[0, 0] == 0.25).nonzero()

    middle = hole(0.5, 0.5, 0.5)
    assert middle.min(0).values.tolist() == [2, 2]
    assert middle.max(0).values.tolist() == [5, 5]
    assert len(middle) == 16
    assert hole(0.0, 0.5, 0.5).tolist() == [[y, x] for y in range(2) for x in range(2, 6)]  # cut by the border
    assert len(hole(0.3, 0.9, 0.0)) == len(hole(0.5 / 8, 0.5 / 8, 0.0)) == 0  # even at the middle of a pixel
    assert len(hole(0.5, 0.5, 2.0)) == 64


# AugMix


def test_augmix_is_its_mixture_written_out():
    images, draws = images_of(10, (3, 12, 12)), augmix_draws(10, strongest=0.8, generator=seeded(8))
    for k in range(10):
        mixture = torch.zeros(1, 3, 12, 12)
        for chain in range(3):
            x = images[k : k + 1]
            for step in range(3):
                place, m, s = (draws[name][k, chain, step] for name in ("operation", "magnitude", "sign"))
                x = apply(OPERATIONS[int(place)], x, m[None], s[None])
            mixture = mixture + draws["weight"][k, chain] * x
        m = draws["mixing"][k]
        expected = (1 - m) * images[k : k + 1] + m * mixture
        assert torch.allclose(augmix(images, draws)[k : k + 1], expected, rtol=0, atol=1e-14)


def test_augmix_draws_have_the_published_distributions():
    """Chains of one to three operations alike, Dirichlet(1, 1, 1): mean 1/3, variance 1/18; Beta(1, 1): 1/2 and 1/12."""
    draws = augmix_draws(4000, generator=seeded())
    lengths = (draws["magnitude"] > 0).sum(2).flatten().bincount().tolist()
    assert lengths[0] == 0
    assert all(abs(count - 4000) < 260 for count in lengths[1:])
    weights = draws["weight"]
    assert torch.allclose(weights.sum(1), torch.ones(4000))
    assert torch.allclose(weights.mean(0), torch.full((3,), 1 / 3), atol=0.02)
    assert torch.allclose(weights.var(0), torch.full((3,), 1 / 18), atol=0.005)
    assert abs(draws["mixing"].mean() - 1 / 2) < 0.025
    assert abs(draws["mixing"].var() - 1 / 12) < 0.006
    used = {OPERATIONS[place] for place in draws["operation"].long().unique().tolist()}
    assert used == set(OPERATIONS) - {"invert", "color", "contrast", "brightness", "sharpness"}


# mistakes


@pytest.mark.parametrize(
    ("draw", "word"),
    [
        (partial(weak_draws, shift=-1), "shift=-1"),
        (partial(strong_draws, operations=-1), "operations=-1"),
        (partial(strong_draws, weakest=0.5, strongest=0.4), "weakest=0.5"),
        (partial(strong_draws, strongest=1.1), "strongest=1.1"),
        (partial(strong_draws, cutout=-0.1), "cutout=-0.1"),
        (partial(rand_augment_draws, magnitude=9), "strongest=9"),
        (partial(trivial_augment_draws, levels=1), "levels=1"),
        (partial(augmix_draws, chains=0), "chains=0"),
        (partial(augmix_draws, strongest=3), "strongest=3"),
    ],
)
def test_settings_out_of_range_are_refused(draw, word):
    with pytest.raises(mlo.UserError, match=word):
        draw(4, generator=seeded())


# the documented example


def test_the_documented_example_runs():
    page = (Path(__file__).parents[2] / "docs" / "consistency.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Tensor] = {}
    exec(example, names)
    assert names["loss"].shape == ()
    assert names["loss"] > 0
