"""The blocks that papers share: digits and their splits, networks, jitter, and the measures of generated images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from problems.blocks.digits import CLASSES, Labelled, all_digits, digits, long_tail
from problems.blocks.jitter import DRAWS, Jitter, uniform_draws
from problems.blocks.networks import Classifier, Encoder, Generator, LastTwoLayers
from problems.blocks.quality import mean_pairwise_distance, recognised_share, recogniser, sample_grid
from problems.blocks.scores import digits_judge

LONG_TAIL = (90, 58, 37, 24, 15, 10, 6, 4, 2, 1)  # n_max 90, imbalance 50, by hand
jitters = [Jitter(rotation=15.0, scale=0.1, shift=1.0), Jitter(rotation=90.0), Jitter(scale=0.5), Jitter(shift=1.0)]


@pytest.fixture(autouse=True)
def single_precision_on_one_thread() -> Iterator[None]:
    """The digits are float32, and networks as small as these run no faster on more threads."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judge() -> nn.Module:
    return recogniser(seed=0)


def identities(data: Labelled) -> set[int]:
    """Where each image stands in `all_digits`. No two digits are the same picture, as the first test verifies."""
    everything = all_digits().images.flatten(1)
    return {int((everything == image).all(dim=1).nonzero().item()) for image in data.images.flatten(1)}


def images_and_draws(count: int = 32) -> tuple[Tensor, Tensor]:
    return all_digits().images[:count], uniform_draws(count, generator=torch.Generator().manual_seed(0))


# digits


def test_all_digits_are_different_images_in_range():
    everything = all_digits()
    assert everything.images.shape == (1797, 1, 8, 8)
    assert everything.images.dtype == torch.float32
    assert everything.labels.dtype == torch.int64
    assert (everything.images.min(), everything.images.max()) == (-1.0, 1.0)
    assert len(everything.images.flatten(1).unique(dim=0)) == 1797


def test_long_tail_follows_its_formula():
    assert long_tail(largest_class=90, imbalance=50) == LONG_TAIL
    assert long_tail(largest_class=40, imbalance=1) == (40,) * CLASSES
    assert long_tail(largest_class=3, imbalance=1000)[-1] == 1  # never empty


def test_split_has_the_sizes_asked_for():
    split = digits(seed=0, imbalance=50, largest_class=90, validation_per_class=7, test_per_class=40)
    assert tuple(split.train.counts().tolist()) == LONG_TAIL
    assert split.validation.counts().tolist() == [7] * CLASSES
    assert split.test.counts().tolist() == [40] * CLASSES


def test_split_takes_as_many_as_every_class_can_give():
    assert digits(seed=0).train.counts().tolist() == [174 - 50 - 10] * CLASSES  # 174 eights


def test_labels_stay_with_their_images():
    everything, train = all_digits(), digits(seed=3).train
    for image, label in zip(train.images[::50], train.labels[::50], strict=True):
        where = (everything.images == image).flatten(1).all(dim=1)
        assert everything.labels[where].tolist() == [label]


def test_split_shares_no_image():
    split = digits(seed=1, imbalance=10, largest_class=100)
    parts = [identities(part) for part in (split.train, split.validation, split.test)]
    assert [len(part) for part in parts] == [len(split.train), len(split.validation), len(split.test)]
    assert not any(a & b for a, b in combinations(parts, 2))


def test_held_out_sets_do_not_depend_on_the_long_tail():
    balanced, tailed = digits(seed=2), digits(seed=2, imbalance=50, largest_class=90)
    assert torch.equal(balanced.test.images, tailed.test.images)
    assert torch.equal(balanced.validation.images, tailed.validation.images)
    assert identities(tailed.train) < identities(balanced.train)


def test_split_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = digits(seed=0), digits(seed=0), digits(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"imbalance": 0.5}, r"imbalance is 0.5; it must be at least 1"),
        ({"largest_class": 0}, r"largest_class is 0; it must be at least 1"),
        ({"test_per_class": -1}, r"test_per_class -1; neither may be negative"),
        ({"largest_class": 150}, r"class 0 would need 150 training images, but 118 are left .* at most 114 fits"),
        ({"test_per_class": 170}, r"170\) \+ validation_per_class \(10\) = 180.* smallest class has 174 images"),
    ],
)
def test_impossible_splits_are_refused(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        digits(seed=0, **settings)


# networks


def test_shapes():
    images, _ = images_and_draws()
    encoder = Encoder(width=8)
    features = encoder(images)
    assert features.shape == (32, encoder.features)
    assert LastTwoLayers(features=encoder.features)(features).shape == (32, CLASSES)
    generated = Generator()(torch.randn(32, 32), torch.arange(32) % CLASSES)
    assert generated.shape == images.shape
    assert generated.abs().max() <= 1


def test_defaults_fit_together():
    assert LastTwoLayers()(Encoder()(all_digits().images[:4])).shape == (4, CLASSES)


def test_classifier_is_the_encoder_then_the_last_two_layers():
    images, _ = images_and_draws()
    model = Classifier(width=8).eval()
    assert torch.equal(model(images), model.last_two_layers(model.encoder(images)))


def test_generator_heeds_latents_and_labels():
    generator = Generator().eval()
    z, y = torch.randn(2, 32), torch.tensor([0, 0])
    assert not torch.allclose(generator(z, y)[0], generator(z, y)[1])
    assert not torch.allclose(generator(z, y), generator(z, y + 1))


# jitter


@pytest.mark.parametrize("jitter", jitters)
def test_zero_draws_are_the_identity(jitter: Jitter):
    images, _ = images_and_draws()
    assert torch.equal(jitter(images, torch.zeros(len(images), DRAWS)), images)


def test_zero_magnitude_is_the_identity():
    images, draws = images_and_draws()
    assert torch.equal(Jitter()(images, draws), images)


@pytest.mark.parametrize("jitter", jitters)
def test_jitter_stays_in_range_and_treats_each_image_by_itself(jitter: Jitter):
    images, draws = images_and_draws()
    out = jitter(images, draws)
    assert out.abs().max() <= 1 + 1e-6
    assert torch.allclose(out[5:6], jitter(images[5:6], draws[5:6]), atol=1e-6)
    assert not torch.allclose(out, images, atol=0.1)


def test_whole_pixel_shifts_and_quarter_turns_are_exact():
    images, _ = images_and_draws()
    down = torch.zeros(len(images), DRAWS)
    down[:, 3] = -1  # reads one row further up
    moved = Jitter(shift=1.0)(images, down)
    assert torch.equal(moved[:, :, 1:], images[:, :, :-1])
    assert (moved[:, :, 0] == -1).all()
    turn = torch.zeros(len(images), DRAWS)
    turn[:, 0] = 1
    assert torch.allclose(Jitter(rotation=90.0)(images, turn), images.rot90(dims=(2, 3)), atol=1e-5)


def test_jitter_agrees_with_grid_sample():
    images, draws = images_and_draws()
    jitter = Jitter(rotation=25.0, scale=0.2, shift=0.9)
    angle = torch.deg2rad(draws[:, 0] * jitter.rotation)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).reshape(-1, 2, 2)  # of (x, y)
    stretch = torch.diag_embed((1 + jitter.scale) ** draws[:, [2, 1]])
    shift = draws[:, [4, 3]] * jitter.shift / 4  # pixels to units of half the image
    theta = torch.cat((stretch @ rotation, shift[:, :, None]), dim=2)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    expected = nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1
    assert torch.allclose(jitter(images, draws), expected, atol=1e-5)


def test_jitter_is_twice_differentiable_in_the_image():
    images, draws = (x[:2].double() for x in images_and_draws())
    jitter = jitters[0]
    images.requires_grad_()

    def energy(x: Tensor) -> Tensor:
        return jitter(x, draws).square().sum()

    assert torch.autograd.gradgradcheck(energy, images)


# quality


def test_recogniser_knows_the_digits(judge: nn.Module):
    everything = all_digits()
    assert (judge(everything.images).argmax(1) == everything.labels).float().mean() >= 0.98
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_recogniser_depends_on_its_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = recogniser(seed=0, iterations=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    torch.set_default_dtype(torch.float64)
    again = recogniser(seed=0, iterations=3)
    assert torch.get_default_dtype() == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_recognised_share_counts_each_class_by_itself():
    labels = torch.tensor([0, 0, 0, 0, 7, 7])
    answers = torch.tensor([0, 0, 0, 9, 0, 7])
    share = recognised_share(lambda images: nn.functional.one_hot(answers, CLASSES), torch.zeros(6, 1, 8, 8), labels)
    assert share[[0, 7]].tolist() == [0.75, 0.5]
    assert share[[1, 2, 3, 4, 5, 6, 8, 9]].isnan().all()


def test_real_digits_are_recognised_and_wrong_labels_are_not(judge: nn.Module):
    everything = all_digits()
    assert recognised_share(judge, everything.images, everything.labels).min() >= 0.96
    assert recognised_share(judge, everything.images, (everything.labels + 1) % CLASSES).max() <= 0.04


def test_mean_pairwise_distance_matches_a_naive_loop():
    data = digits(seed=0, imbalance=50, largest_class=90).train
    distances = mean_pairwise_distance(data.images, data.labels)
    for c in range(CLASSES - 1):
        members = data.images[data.labels == c]
        pairs = [(members[i] - members[j]).norm() for i, j in combinations(range(len(members)), 2)]
        assert torch.allclose(distances[c], torch.stack(pairs).mean(), rtol=1e-5)
    assert distances[CLASSES - 1].isnan()  # one image has no pair


def test_a_collapsed_class_has_no_distance():
    labels = torch.arange(CLASSES).repeat_interleave(3)
    assert torch.equal(mean_pairwise_distance(torch.ones(30, 1, 8, 8), labels), torch.zeros(CLASSES))


def test_sample_grid_has_a_row_for_each_class():
    data = digits(seed=0, imbalance=50, largest_class=90).train
    grid = sample_grid(data.images, data.labels, columns=6)
    assert grid.dtype == torch.uint8
    assert grid.shape == (10 * 9 + 1, 6 * 9 + 1)
    row = data.images[data.labels == 2]
    assert torch.equal(grid[19:27, 10:18], ((row[1, 0] + 1) * 127.5).round().to(torch.uint8))  # class 2, second image
    assert (grid[82:90, 10:] == 128).all()  # class 9 has one image


def test_generated_digits_are_judged_by_one_recogniser_a_process(judge: nn.Module):
    """Trained once, it is the one that `recogniser` trains, whatever random numbers were drawn before."""
    torch.manual_seed(3)
    kept = digits_judge()
    assert digits_judge() is kept
    for one, other in zip(kept.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
