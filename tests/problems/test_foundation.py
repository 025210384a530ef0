"""What a foundation model is trained on: images of its own, and labels that are no classes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from image_files import write
from torch import Tensor

from mlo.stream import Draw
from problems.blocks.foundation import foundation_images, foundation_set
from problems.blocks.image_sets import Part, image_sets, in_order, stratified
from problems.blocks.image_sets._images import AbstractImages

CPU = torch.device("cpu")
SHARES = {"seed": 2, "foundation": 0.5, "fraction": 0.2, "validation": 0.3}


def whole(part: Part) -> Tensor:
    batches = in_order(part, size=100, device=CPU, dtype=torch.float64)
    return torch.cat([batch["images"] for batch in batches])


def test_its_images_are_taken_first_and_are_nobody_elses():
    found = image_sets("digits", **SHARES)
    parts = [set(part.index.tolist()) for part in (found.foundation, found.rest, found.train, found.validation)]
    assert not any(a & b for a, b in combinations(parts, 2))
    assert set().union(*parts) == set(range(1297))
    assert [len(part) for part in parts] == [649, 518, 91, 39]  # of 648 others a fifth is 129.6, three tenths of it 39
    assert not found.foundation.augmented
    counts = torch.stack([torch.bincount(part.labels) for part in (found.foundation, found.rest)])
    assert set(torch.bincount(found.foundation.labels).tolist()) <= set(range(61, 68))
    assert (counts[1] - 0.4 * (2 * counts[0])).abs().max() <= 2
    for part in (found.foundation, found.rest, found.train, found.validation):
        all_of_them = image_sets("digits", seed=2, validation=0.0).train
        assert torch.equal(part.labels, all_of_them.labels[part.index])


def test_without_it_a_split_is_the_one_it_was():
    """The two draws of a set without a foundation model, written out."""
    everything = image_sets("digits", seed=2, validation=0.0).train
    found = image_sets("digits", **{**SHARES, "foundation": 0.0})
    used, rest = stratified(everything.labels, 0.2, generator=Draw(2, "image_sets.fraction", 0).generator())
    held_out, kept = stratified(everything.labels[used], 0.3, generator=Draw(2, "image_sets.validation", 0).generator())
    assert torch.equal(found.train.index, used[kept])
    assert torch.equal(found.validation.index, used[held_out])
    assert torch.equal(found.rest.index, rest)
    assert len(found.foundation) == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range(share: float):
    with pytest.raises(ValueError, match=r"^foundation is .*; it must be at least 0 and below 1"):
        image_sets("digits", seed=0, foundation=share)


def test_clusters_are_each_images_nearest_mean_and_follow_the_seed():
    found = image_sets("digits", **SHARES)
    part = foundation_images(found, labels=20, seed=0)
    again, other = (foundation_images(found, labels=20, seed=seed) for seed in (0, 1))
    assert torch.equal(part.labels, again.labels)
    assert not torch.equal(part.labels, other.labels)
    assert torch.equal(part.index, found.foundation.index)
    assert torch.bincount(part.labels, minlength=20).min() > 0
    assert int(part.labels.max()) == 19
    pixels = whole(part).flatten(1)
    means = torch.stack([pixels[part.labels == c].mean(0) for c in range(20)])
    assert torch.equal(torch.cdist(pixels, means).argmin(1), part.labels)  # what k-means ends in
    classes = [set(found.foundation.labels[part.labels == c].tolist()) for c in range(20)]
    assert max(len(each) for each in classes) > 1  # no refinement of the ten classes


def test_clusters_of_other_numbers():
    found = image_sets("digits", **SHARES)
    assert foundation_images(found, labels=1, seed=0).labels.unique().tolist() == [0]
    for labels, message in ((0, "it must be at least 1"), (700, "of 649 different images no more clusters")):
        with pytest.raises(ValueError, match=rf"^foundation_labels is {labels}; {message}"):
            foundation_images(found, labels=labels, seed=0)
    with pytest.raises(ValueError, match=r"^foundation is 0; it leaves a foundation model no image"):
        foundation_images(image_sets("digits", seed=0), labels=20, seed=0)


class Checked(AbstractImages):
    """A checkerboard of 64 pixels a side, darker of even numbers, that every third image shifts by a pixel."""

    strongest, draws = 255, 0

    def __len__(self) -> int:
        return 12

    def take(self, index: Tensor, draws: Tensor | None) -> Tensor:
        board = torch.tensor([[0, 200], [200, 0]]).repeat(32, 32)
        boards = [board.roll(number % 3 // 2, 0) + 20 * (number % 2) for number in index.tolist()]
        return torch.stack(boards)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)


def test_photographs_are_clustered_by_what_is_left_of_them_at_32_pixels(tmp_path: Path):
    """Bright and dark ones, under a fine pattern in two positions that no average shows."""
    write("pets", tmp_path, train=8)
    found = image_sets("pets", root=tmp_path, seed=0, complete=False, size=64, foundation=0.75)
    bright = torch.arange(len(found.foundation)) % 2
    checked = Part(images=Checked(), index=torch.arange(len(bright)), labels=bright, augmented=False)
    part = foundation_images(replace(found, foundation=checked), labels=2, seed=0)
    assert part.labels.tolist() in (bright.tolist(), (1 - bright).tolist())


def test_a_set_of_its_own_has_its_official_labels(tmp_path: Path):
    written = write("imagenet", tmp_path, train=4)
    part, labels = foundation_set("imagenet", root=tmp_path, size=16, channels=3, seed=0, complete=False)
    assert labels == 1000
    assert not part.augmented
    assert part.labels.tolist() == written["train"].labels.tolist()
    images = whole(part)
    assert images.shape == (8, 3, 16, 16)
    assert (images * 255 - written["train"].images[:, :, :1, :1]).abs().max() <= 3


WRONG = [
    ({"source": "imagenet"}, r"^foundation_root is not given; imagenet is read from a folder"),
    ({"source": "imagnet"}, r"^foundation_source is 'imagnet', which is no known set.* Did you mean 'imagenet'"),
    (
        {"source": "imagenet", "channels": 1},
        r"^foundation_source is 'imagenet', whose images have 3 channels; here.* 1",
    ),
    ({"source": "cifar10", "size": 224}, r"^size is 224; images of cifar10 are 32 pixels wide"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_set_that_does_not_fit(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        foundation_set(**{"size": 16, "channels": 3, "seed": 0, **settings})  # pyright: ignore
