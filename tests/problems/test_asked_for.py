"""What a foundation model is asked for in evaluations, and what is shown of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objectives import Fixed
from torch import Tensor, nn

import mlo
from problems.blocks.asked_for import asked_for, label_entropies, labelled_in_turn, likeliest_labels
from problems.blocks.image_sets import ImageSets, image_sets, in_order
from problems.blocks.samplers import mapper_and_converter

CONTEXT = mlo.Context(seed=0, device=torch.device("cpu"), dtype=torch.float32)
LATENT, LABELS, COUNT = 5, 20, 60


@pytest.fixture(scope="module")
def found() -> ImageSets:
    return image_sets("digits", seed=0, foundation=0.5, fraction=0.2, validation=0.3)


class Telling(nn.Module):
    """A foundation model whose images say what it was asked for: weights of labels, and the mean of the latent beside."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        weights = labels if labels.is_floating_point() else nn.functional.one_hot(labels, LABELS).to(latents.dtype)
        told = torch.cat([weights, latents.mean(1, keepdim=True)], 1)
        return torch.cat([told, told.new_zeros(len(told), 64 - told.shape[1])], 1).reshape(-1, 1, 8, 8)


def told(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.flatten(1)[:, :LABELS], images.flatten(1)[:, LABELS]


def values(**levels: nn.Module) -> dict[str, Any]:
    return {name: Fixed(module) for name, module in {"foundation": Telling(), **levels}.items()}


def test_labelled_images_are_taken_class_by_class_and_over_again(found: ImageSets):
    some = labelled_in_turn(found, 500, CONTEXT)
    few = labelled_in_turn(found, 500, CONTEXT, again=False)
    assert len(some["images"]) == 500
    assert len(few["images"]) == len(found.train) == 91
    assert torch.equal(some["labels"][:20], torch.arange(20) % 10)
    for batch in (some, few):
        assert torch.equal(batch["rows"], batch["labels"])  # ten classes, all of them there
    assert torch.equal(some["images"][91:182], few["images"])
    (plain,) = in_order(found.train, size=91, device=CONTEXT.device, dtype=CONTEXT.dtype)
    rows = {tuple(row) for row in plain["images"].flatten(1).tolist()}
    assert {tuple(row) for row in few["images"].flatten(1).tolist()} == rows


def test_each_way_of_asking_has_the_same_latents_and_its_own_labels(found: ImageSets):
    torch.manual_seed(0)
    sampler = mapper_and_converter(latent=LATENT, classes=10, labels=LABELS, hidden=4)
    sampler.converter.table.data.normal_()
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, LABELS))
    real = labelled_in_turn(found, COUNT, CONTEXT)
    torch.manual_seed(1)
    samples, rows = asked_for(values(sampler=sampler, foundation_classifier=judge), real, LABELS, LATENT, CONTEXT)
    torch.manual_seed(1)
    z = torch.randn(COUNT, LATENT)
    gumbel = -torch.empty(COUNT, LABELS).exponential_().log()
    assert set(samples) == {"uniform", "found", "pseudo"}

    asked, mean = told(samples["uniform"].images)
    assert torch.equal(asked.argmax(1), torch.arange(COUNT) % LABELS)
    torch.testing.assert_close(mean, z.mean(1))
    assert samples["uniform"].labels is None
    assert torch.equal(rows["uniform"], torch.arange(COUNT) % LABELS)

    asked, mean = told(samples["found"].images)
    assert torch.equal(asked.argmax(1), (sampler.converter.table[real["labels"]] + gumbel).argmax(1))
    torch.testing.assert_close(mean, sampler.mapper(z, real["labels"]).mean(1))

    asked, mean = told(samples["pseudo"].images)
    logits = judge(real["images"])
    torch.testing.assert_close(asked, logits.exp() / logits.exp().sum(1, keepdim=True))
    torch.testing.assert_close(mean, z.mean(1))
    for name in ("found", "pseudo"):
        assert torch.equal(samples[name].labels, real["labels"])
        assert torch.equal(rows[name], real["rows"])
    assert samples["found"].moved > 0 == samples["pseudo"].moved == samples["uniform"].moved


def test_of_more_labels_than_images_the_first_ten_are_asked_for(found: ImageSets):
    real = labelled_in_turn(found, 15, CONTEXT)
    samples, rows = asked_for(values(), real, LABELS, LATENT, CONTEXT)
    assert torch.equal(told(samples["uniform"].images)[0].argmax(1), torch.arange(15) % 10)
    assert torch.equal(rows["uniform"], torch.arange(15) % 10)


def test_likeliest_labels_and_entropies():
    table = torch.zeros(12, 4)
    table[1] = torch.tensor([0.0, 5.0, 2.0, 1.0])
    said = likeliest_labels(table)
    assert said.columns == ("class", "entropy", "likeliest 1", "likeliest 2", "likeliest 3")
    assert len(said.rows) == 10
    shares = table[1].exp() / table[1].exp().sum()
    assert said.rows[1][2:] == tuple(f"{label} ({100 * shares[label]:.0f} %)" for label in (1, 2, 3))
    entropy = -(shares * shares.log()).sum().item()
    named = label_entropies(table)
    assert set(named) == {"label_entropy", *(f"label_entropy.{c}" for c in range(10))}
    assert named["label_entropy.1"] == pytest.approx(entropy) == said.rows[1][1]
    assert named["label_entropy"] == pytest.approx((11 * torch.tensor(4.0).log().item() + entropy) / 12)


@pytest.mark.parametrize("conditional", [True, False])
def test_a_mapper_sees_the_class_or_does_not(conditional: bool):
    sampler = mapper_and_converter(latent=LATENT, classes=3, labels=4, conditional=conditional)
    z, gumbel = torch.randn(3, LATENT), torch.zeros(3, 4)
    one, other = (sampler(z, torch.tensor(classes), gumbel)[0] for classes in ([0, 1, 2], [1, 2, 0]))
    assert torch.equal(one, other) is not conditional
