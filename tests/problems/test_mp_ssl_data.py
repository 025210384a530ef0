"""What MP-SSL is trained on: parts that share no image, draws as the settings say, networks with the labels they need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write
from objectives import Fixed
from torch import Tensor, nn

import mlo
from problems import generation, mp_ssl
from problems.blocks.asked_for import asked_for, labelled_in_turn
from problems.blocks.foundation import foundation_images
from problems.blocks.image_sets import Part, image_sets, in_order

CPU = torch.device("cpu")
CONTEXT = mlo.Context(seed=3, device=CPU, dtype=torch.float32)
SEED, EVERYTHING = CONTEXT.seed, 649  # a batch holds at least one pass over each part


def problem(**settings: Any) -> mlo.Problem:
    chosen = {"foundation": 0.5, "fraction": 0.2, "validation": 0.3, "batch_size": EVERYTHING, **settings}
    return mp_ssl.build(mp_ssl.Data(**chosen), CONTEXT)


def drawn(name: str, **settings: Any) -> Any:
    return problem(**settings).streams[name].draw(mlo.stream.Draw(SEED, name, 1))


def rows(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in images.flatten(1).tolist()}


def whole(part: Part) -> Tensor:
    (batch,) = in_order(part, size=len(part), device=CPU, dtype=torch.float32)
    return batch["images"]


def test_each_stream_has_its_own_images():
    """D, D_val, D_u, D_F and the test images."""
    found = image_sets("digits", seed=SEED, foundation=0.5, fraction=0.2, validation=0.3)
    parts = {
        "train": found.train,
        "validation": found.validation,
        "unlabelled": found.rest,
        "foundation_images": found.foundation,
    }
    seen = {name: rows(drawn(name)["images"]) for name in parts}
    assert seen == {name: rows(whole(part)) for name, part in parts.items()}
    for one, other in combinations([*seen.values(), rows(whole(found.test))], 2):
        assert not one & other


def test_the_foundations_labels_are_those_of_its_own_run():
    """So that a label means the same to G_F, which another graph trains, and to f_θF."""
    batch = drawn("foundation_images", foundation_labels=7)
    found = image_sets("digits", seed=SEED, foundation=0.5)
    part = foundation_images(found, labels=7, seed=SEED)
    labels = dict(zip((tuple(row) for row in whole(part).flatten(1).tolist()), part.labels.tolist(), strict=True))
    pairs = zip(batch["images"].flatten(1).tolist(), batch["labels"].tolist(), strict=True)
    assert all(labels[tuple(row)] == label for row, label in pairs)
    assert set(labels.values()) == set(range(7))
    settings = generation.Data(foundation=0.5, part="foundation", foundation_labels=7, batch_size=EVERYTHING)
    other = generation.build(settings, CONTEXT)
    learned = other.streams["train"].draw(mlo.stream.Draw(SEED, "train", 1))
    pairs = zip(learned["images"].flatten(1).tolist(), learned["labels"].tolist(), strict=True)
    assert all(labels[tuple(row)] == label for row, label in pairs)


@pytest.mark.parametrize(("shift", "largest"), [(None, 1), (3, 3), (0, 0)])
def test_draws_follow_the_settings(shift: int | None, largest: int):
    noise = drawn("noise", shift=shift, flip=shift == 3, strongest=0.25, foundation_labels=7, latent=5)
    assert noise["weak"]["shift"].abs().max() == largest
    assert 0.4 < noise["weak"]["flip"].mean() < 0.6 if shift == 3 else not noise["weak"]["flip"].any()
    assert 0.2 < noise["strong"]["magnitude"].max() <= 0.25
    assert noise["z"].shape == (EVERYTHING, 5)
    assert noise["gumbel"].shape == (EVERYTHING, 7)
    assert set(noise["labels"].tolist()) == set(range(7))


def test_an_eighth_of_the_side_is_the_shift_of_larger_images(tmp_path: Path):
    write("pets", tmp_path, train=8)
    noise = drawn("noise", source="pets", root=str(tmp_path), complete=False, size=32, foundation=0.0)
    assert noise["weak"]["shift"].abs().max() == 4


def test_networks_have_the_outputs_and_thresholds_of_their_labels():
    variables = problem(foundation_labels=7, threshold_decay=0.5).variables
    classifier, judge = variables["smooth_cnn"](width=4), variables["smooth_cnn_foundation"](width=4)
    assert classifier.thresholds.decay == 0.5
    images = torch.rand(2, 1, 8, 8)
    assert classifier(images).shape == (2, 10)
    assert judge(images).shape == (2, 7)
    latents, weights = variables["mapper_and_converter"](conditional=False)(
        torch.randn(2, 64), torch.tensor([0, 1]), torch.zeros(2, 7)
    )
    assert latents.shape == (2, 64)
    assert weights.shape == (2, 7)


def test_a_foundation_set_is_another_one_with_as_many_labels(tmp_path: Path):
    for name in ("pets", "flowers"):
        write(name, tmp_path / name, train=8)
    files = {"source": "pets", "root": str(tmp_path / "pets"), "complete": False, "size": 16, "batch_size": 4}
    files |= {"foundation": 0.0, "fraction": 1.0}
    other = {"foundation_source": "flowers", "foundation_root": str(tmp_path / "flowers")}
    batch = drawn("foundation_images", **files, **other, foundation_labels=102)
    assert batch["images"].shape == (4, 3, 16, 16)
    with pytest.raises(mlo.UserError, match="foundation_labels is 20; flowers has 102 classes"):
        drawn("foundation_images", **files, **other, foundation_labels=20)
    itself = {"foundation_source": "pets", "foundation_root": str(tmp_path / "pets"), "foundation_labels": 37}
    with pytest.raises(mlo.UserError, match=r"foundation_source is 'pets', the set itself.* `foundation: 0\.5`"):
        drawn("foundation_images", **files, **itself)


def test_what_is_recognised_of_the_foundations_images():
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images = torch.rand(9, 1, 8, 8)
    logits = judge(images)
    labels = logits.argmax(1)
    labels[:2] = (labels[:2] + 1) % 3
    values: Any = {"foundation_classifier": Fixed(judge)}
    loss, measured = mp_ssl.foundation_classification(values, {"images": images, "labels": labels})
    torch.testing.assert_close(loss, -logits.log_softmax(1)[torch.arange(9), labels].mean())
    assert measured["recognised"] == pytest.approx(7 / 9)


class Judged:
    """A level as evaluations see it: a module that can be called, and tensors by name."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, training: bool = True, **options: Any) -> Any:
        return self.module(*args, **options)

    def __getitem__(self, name: str) -> Tensor:
        return dict(self.module.named_parameters())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.module.named_parameters()))


@pytest.mark.parametrize("asking", [("sampler",), ("foundation_classifier",), ("sampler", "foundation_classifier"), ()])
def test_gaps_and_features_are_those_of_the_images_asked_for(asking: tuple[str, ...]):
    torch.manual_seed(0)
    built = problem(latent=5, foundation_labels=7)
    made = {
        "classifier": built.variables["smooth_cnn"](width=4),
        "foundation": built.variables["gan"](width=2),
        "sampler": built.variables["mapper_and_converter"](),
        "foundation_classifier": built.variables["smooth_cnn_foundation"](width=4),
    }
    values: Any = {name: Judged(made[name].eval()) for name in ("classifier", "foundation", *asking)}
    assert built.evaluate is not None
    with torch.no_grad():
        torch.manual_seed(1)
        found = built.evaluate(values, "test", model=("classifier",), totals={}, complete=True)
        torch.manual_seed(1)
        sets, context = image_sets("digits", seed=SEED, foundation=0.5, fraction=0.2, validation=0.3), CONTEXT
        real = labelled_in_turn(sets, 500, context)
        samples, _ = asked_for(values, real, 7, 5, context)
        network = partial(made["classifier"], part="features")
        gaps = {
            f"{name}_gap": (network(real["images"]) - network(each.images)).square().sum(1)
            for name, each in samples.items()
        }
        assert {name: found.metrics[name] for name in found.metrics if name.endswith("_gap")} == {
            name: pytest.approx(gap.mean().item(), rel=1e-4) for name, gap in gaps.items()
        }
        last = "found" if "sampler" in asking else "pseudo" if asking else "uniform"
        everything = torch.cat([network(samples[last].images), network(whole(sets.train))]).double()
        variances = torch.linalg.eigvalsh((everything - everything.mean(0)).T @ (everything - everything.mean(0)))
        assert found.metrics["features_in_plane"] == pytest.approx(
            (variances[-2:].sum() / variances.sum()).item(), rel=1e-5
        )
