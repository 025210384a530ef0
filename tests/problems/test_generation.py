"""Training of generators: each objective against the formula written out, and what the graphs promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_files import write
from torch import Tensor

import mlo
from mlo.stream import Draw
from problems import generation
from problems.blocks.foundation import foundation_images
from problems.blocks.generators import signal
from problems.blocks.image_sets import Part, image_sets

ROOT = Path(__file__).parents[2]
GRAPHS = ROOT / "graphs" / "mgr" / "generators"
LEVELS = {
    "acgan": {"generator": "acgan", "discriminator": "acgan_discriminator"},
    "biggan": {"generator": "biggan", "discriminator": "biggan_discriminator"},
    "diffusion": {"generator": "diffusion"},
}
CONTEXT = mlo.Context(seed=0, device=torch.device("cpu"), dtype=torch.float64)


@pytest.fixture(autouse=True)
def in_double_precision() -> object:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def images(seed: int) -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(z: Tensor, labels: Tensor) -> Tensor:
    return (images(7) * (1 + labels[:, None, None, None]) + z.mean(1)[:, None, None, None]).sigmoid()


def discriminator(shown: Tensor, labels: Tensor | None = None, *, classes: int = 0) -> Any:
    """Scores around 0, so that both sides of every hinge are met; with `classes` logits too."""
    total = 3 * (200 * shown.flatten(1).mean(1)).sin() + (0 if labels is None else 0.3 * labels)
    return (total, shown.flatten(1)[:, :classes] * 3) if classes else total


BATCH = {
    "train": {"images": images(1) + 0.15, "labels": torch.tensor([0, 1, 2, 0, 1, 2])},
    "noise": {
        "z": torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
        "labels": torch.tensor([2, 2, 1, 0, 1, 0]),
        "offsets": torch.tensor([1, 2, 1, 2, 1, 2]),
    },
}
REAL, NOISE = BATCH["train"], BATCH["noise"]
FAKE = generator(NOISE["z"], NOISE["labels"])
VALUES: Any = {"generator": generator, "discriminator": discriminator}


def test_both_sides_of_the_hinge():
    true = discriminator(REAL["images"], REAL["labels"])
    fake = discriminator(FAKE, NOISE["labels"])
    wrong = discriminator(REAL["images"], torch.tensor([1, 0, 0, 2, 2, 1]))
    hinge = [max(0.0, 1 - s) for s in true.tolist()], [max(0.0, 1 + s) for s in fake.tolist()]
    assert all(0 in side and max(side) > 0 for side in hinge)
    right = sum(hinge[0]) / 6 + sum(hinge[1]) / 6
    found, measured = generation.discrimination(3)(VALUES, BATCH)
    assert found.item() == pytest.approx(right, rel=1e-12)
    assert measured["real_score"].item() == pytest.approx(true.mean().item(), rel=1e-12)
    found, _ = generation.discrimination(3)(VALUES, BATCH, mismatch=0.7)
    right += 0.7 * sum(max(0.0, 1 + s) for s in wrong.tolist()) / 6
    assert found.item() == pytest.approx(right, rel=1e-12)
    assert generation.generation(VALUES, BATCH).item() == pytest.approx(-fake.mean().item(), rel=1e-12)


def test_both_sides_of_the_logistic_loss():
    true = discriminator(REAL["images"], REAL["labels"])
    fake = discriminator(FAKE, NOISE["labels"])
    right = -(true.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    found, _ = generation.discrimination(3)(VALUES, BATCH, loss="logistic")
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(generation.generation(VALUES, BATCH, loss="logistic"), -fake.sigmoid().log().mean())


def test_the_classification_terms_of_an_auxiliary_classifier():
    values: Any = {"generator": generator, "discriminator": partial(discriminator, classes=3)}
    (true, of_real), (fake, of_fake) = (discriminator(shown, classes=3) for shown in (REAL["images"], FAKE))
    recognition = -of_real.log_softmax(1)[torch.arange(6), REAL["labels"]].mean()
    of_generated = -of_fake.log_softmax(1)[torch.arange(6), NOISE["labels"]].mean()
    hinge = (1 - true).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    found, _ = generation.auxiliary_discrimination(values, BATCH)
    torch.testing.assert_close(found, hinge + recognition)
    found, _ = generation.auxiliary_discrimination(values, BATCH, weight=0.5, generated_weight=2.0)
    torch.testing.assert_close(found, hinge + 0.5 * recognition + 2 * of_generated)
    found = generation.auxiliary_generation(values, BATCH, weight=0.5)
    torch.testing.assert_close(found, -fake.mean() + 0.5 * of_generated)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_denoising_in_noise_is_that_in_velocity_weighed_by_the_signal(schedule: generation.Schedule):
    """By hand, image by image; ‖ε − ε̂‖² = ᾱ ‖v − v̂‖²."""
    times = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = {"train": REAL, "diffusion_noise": {"times": times, "noise": noise}}
    seen = SimpleNamespace()

    def network(x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        seen.x, seen.labels, seen.t = x, labels, t
        return 0.3 * x

    in_noise = generation.denoising({"generator": network}, batch, schedule=schedule)
    in_velocity = generation.denoising({"generator": network}, batch, schedule=schedule, weighting="velocity")
    assert torch.equal(seen.labels, REAL["labels"])
    assert torch.equal(seen.t, times)
    errors, velocities = [], []
    for n in range(6):
        a = signal(times[n], schedule).sqrt()
        b = (1 - a**2).sqrt()
        image = 2 * REAL["images"][n] - 1
        x = a * image + b * noise[n]
        torch.testing.assert_close(seen.x[n], x)
        velocities.append((a * noise[n] - b * image - 0.3 * x).square().mean())
        errors.append((noise[n] - (b * x + a * 0.3 * x)).square().mean())
        torch.testing.assert_close(errors[-1], a**2 * velocities[-1])
    torch.testing.assert_close(in_noise, torch.stack(errors).mean())
    torch.testing.assert_close(in_velocity, torch.stack(velocities).mean())


def test_times_are_spread_over_the_whole_interval():
    problem = generation.build(generation.Data(), CONTEXT)
    drawn = problem.streams["diffusion_noise"].draw(Draw(0, "diffusion_noise", 1))  # pyright: ignore[reportAttributeAccessIssue]
    times = drawn["times"].sort().values
    assert ((times * 64).long() == torch.arange(64)).all()
    assert drawn["noise"].shape == (64, 1, 8, 8)


@pytest.mark.parametrize("part", ["train", "rest"])
def test_only_the_part_that_is_asked_for_is_learned(part: Any):
    """Images on which classifiers are validated are never among them."""
    settings = generation.Data(fraction=0.3, validation=0.2, part=part, batch_size=500)
    problem = generation.build(settings, CONTEXT)
    found = image_sets("digits", seed=0, fraction=0.3, validation=0.2)
    batch = problem.streams["train"].draw(Draw(0, "train", 1))  # pyright: ignore[reportAttributeAccessIssue]
    shown = {tuple(image) for image in (16 * batch["images"]).round().long().flatten(1).tolist()}

    def known(each: Any) -> set[tuple[int, ...]]:
        return {tuple(image) for image in each.images.take(each.index, None).long().flatten(1).tolist()}

    assert shown <= known(getattr(found, part))
    assert not shown & (known(found.validation) | known(found.train if part == "rest" else found.rest))


def test_all_of_a_set_leaves_no_rest():
    with pytest.raises(ValueError, match=r"part is 'rest', and a fraction of 1\.0 leaves no image out"):
        generation.build(generation.Data(part="rest"), CONTEXT)


def test_a_foundation_model_learns_its_own_images_under_its_own_labels():
    shares = {"foundation": 0.5, "fraction": 0.3}
    settings = generation.Data(**shares, part="foundation", foundation_labels=20, batch_size=649)
    problem = generation.build(settings, CONTEXT)
    part = foundation_images(image_sets("digits", seed=0, **shares), labels=20, seed=0)
    batch = problem.streams["train"].draw(Draw(0, "train", 1))  # pyright: ignore[reportAttributeAccessIssue]
    right = sorted((label, *image.flatten().tolist()) for image, label in zip(*pixels_and_labels(part), strict=True))
    drawn = zip((16 * batch["images"]).round().long(), batch["labels"].tolist(), strict=True)
    assert sorted((label, *image.flatten().tolist()) for image, label in drawn) == right  # one pass: each image once
    noise = problem.streams["noise"].draw(Draw(0, "noise", 1))  # pyright: ignore[reportAttributeAccessIssue]
    assert noise["labels"].unique().tolist() == list(range(20))
    assert int(noise["offsets"].max()) == 19
    assert problem.variables["gan"]().labels == 20
    scores = problem.variables["biggan_discriminator"]()(batch["images"], batch["labels"])
    assert scores.shape == (649,)


def pixels_and_labels(part: Part) -> tuple[Tensor, list[int]]:
    return part.images.take(part.index, None).long(), part.labels.tolist()


NO_PART = [
    ({"part": "foundation"}, r"^part is 'foundation', and foundation is 0"),
    (
        {"foundation": 0.5, "foundation_labels": 20},
        r"^foundation_labels is 20, and part is 'train': clusters are made of",
    ),
    ({"part": "foundation", "foundation_labels": 20}, r"^foundation is 0; it leaves a foundation model no image"),
]


@pytest.mark.parametrize(("settings", "message"), NO_PART)
def test_a_foundation_model_without_images(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        generation.build(generation.Data(**settings), CONTEXT)


def test_objectives_read_a_generator_by_another_name():
    other: Any = {"foundation": generator, "discriminator": discriminator}
    auxiliary: Any = {"foundation": generator, "discriminator": partial(discriminator, classes=3)}
    for objective, values in (
        (generation.discrimination(3), other),
        (generation.generation, other),
        (generation.auxiliary_discrimination, auxiliary),
        (generation.auxiliary_generation, auxiliary),
    ):
        named = {**values, "generator": values["foundation"]}
        found, right = objective(values, BATCH, generator="foundation"), objective(named, BATCH)
        torch.testing.assert_close(found, right, rtol=0, atol=0)


def test_the_judge_holds_images_to_their_clusters():
    """Real images of a cluster lie nearest to its mean; under the next label none of them does."""
    settings = generation.Data(foundation=0.5, part="foundation", foundation_labels=20)
    problem = generation.build(settings, CONTEXT)
    part = foundation_images(image_sets("digits", seed=0, foundation=0.5), labels=20, seed=0)
    of_cluster = [part.index[part.labels == c] for c in range(20)]

    def cheat(z: Tensor, labels: Tensor, *, training: bool, turn: int = 0) -> Tensor:
        drawn = zip(((labels + turn) % 20).tolist(), z[:, 0].abs().tolist(), strict=True)
        index = torch.stack([of_cluster[c][int(n * 50) % len(of_cluster[c])] for c, n in drawn])
        return part.images.take(index, None).to(z.dtype) / 16

    def judged(model: Any) -> dict[str, float]:
        assert problem.evaluate is not None
        torch.manual_seed(0)
        return dict(problem.evaluate({"g": model}, "validation", model=("g",), totals={}, complete=False).metrics)

    good, turned = judged(cheat), judged(partial(cheat, turn=1))
    assert good.keys() == {"variety", "nearest", "mean_nearest", "sure", "rarest"}
    assert good["nearest"] == 100
    assert good["variety"] > 0.85
    assert good["sure"] > 95
    assert turned["mean_nearest"] == 0


def test_the_judge_knows_real_digits_from_noise():
    """Real digits: nearly all are recognised. Noise: not. One image a class: no variety."""
    problem = generation.build(generation.Data(), CONTEXT)
    real = image_sets("digits", seed=0).train
    of_class = [real.index[real.labels == c] for c in range(10)]

    def cheat(z: Tensor, labels: Tensor, *, training: bool) -> Tensor:
        index = torch.stack(
            [of_class[c][int(n * 50) % len(of_class[c])] for c, n in zip(labels, z[:, 0].abs(), strict=True)]
        )
        return real.images.take(index, None).to(z.dtype) / 16

    def judged(model: Any) -> dict[str, float]:
        assert problem.evaluate is not None
        torch.manual_seed(0)
        return dict(problem.evaluate({"g": model}, "validation", model=("g",), totals={}, complete=False).metrics)

    good = judged(cheat)
    assert good["recognised"] > 95
    assert good["rarest"] > 95
    assert good["variety"] > 0.9
    noise = judged(lambda z, labels, training: torch.rand(len(z), 1, 8, 8))
    assert noise["recognised"] < 30
    same = judged(lambda z, labels, training: cheat(0 * z, labels, training=training))
    assert same["variety"] < 1e-6


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_graph_of_another_problem_passes_on_how_images_are_split(path: Path, tmp_path: Path):
    """What a classifier is validated on, its generator has never seen: source and shares are the classifier's."""
    graph = tmp_path / "graph.yaml"
    graph.write_text(
        "problem: madao\niterations: 2\nseed: 4\n"
        "data: {source: digits, fraction: 0.2, validation: 0.3, batch_size: 16}\n"
        f"start: {{generator: {path}}}\n"
        "levels: {generator: {variables: small_cnn, optimizer: none}}\n"
    )
    started = mlo.load(graph).starts["generator"]
    assert started.seed == 4
    assert {key: started.data[key] for key in ("source", "fraction", "validation")} == {
        "source": "digits",
        "fraction": 0.2,
        "validation": 0.3,
    }
    assert started.data.get("batch_size") == mlo.load(path).data.get("batch_size")


def test_a_graph_passes_on_what_a_foundation_model_may_see(tmp_path: Path):
    """Neither fraction nor validation decide it: graphs with other labelled images share one foundation model."""
    hashes = set[str]()
    for fraction in (0.2, 0.5):
        graph = tmp_path / "graph.yaml"
        graph.write_text(
            "problem: madao\niterations: 2\nseed: 4\n"
            f"data: {{foundation: 0.25, fraction: {fraction}}}\n"
            f"start: {{foundation: {ROOT / 'graphs' / 'mp_ssl' / 'foundation.yaml'}}}\n"
            "levels: {foundation: {variables: small_cnn, optimizer: none}}\n"
        )
        started = mlo.load(graph).starts["foundation"]
        assert (started.seed, started.data["foundation"], started.data["foundation_labels"]) == (4, 0.25, 20)
        hashes.add(started.hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["acgan", "biggan", "diffusion"])
def test_colour_images_of_32_pixels_from_files(name: str, tmp_path: Path):
    write("cifar10", tmp_path, train=10, patches=True)
    spec = mlo.load(
        GRAPHS / f"{name}.yaml",
        "data.source=cifar10",
        f"data.root={tmp_path}",
        "data.complete=false",
        "data.batch_size=4",
        f"data.latent={3 * 32 * 32 if name == 'diffusion' else 20}",
        "iterations=2",
        *(f"levels.{level}.variables={{{kind}: {{width: 4}}}}" for level, kind in LEVELS[name].items()),
    )
    run = mlo.run(spec, tmp_path / "run", quiet=True)
    assert run.module("generator").size == 32
    assert run.summary["metrics"].keys() == {"validation.variety", "test.variety"}


def test_wrong_labels_are_wrong():
    problem = generation.build(generation.Data(batch_size=500), CONTEXT)
    offsets = problem.streams["noise"].draw(Draw(0, "noise", 1))["offsets"]  # pyright: ignore[reportAttributeAccessIssue]
    assert offsets.unique().tolist() == list(range(1, 10))


@pytest.mark.parametrize("option", ["rotation", "scale", "shift"])
def test_a_jitter_is_of_what_the_discriminator_sees_of_real_images(option: str):
    plain, moved = (
        generation.build(settings, CONTEXT).streams["train"].draw(Draw(0, "train", 1))  # pyright: ignore[reportAttributeAccessIssue]
        for settings in (generation.Data(), generation.Data(**{option: 0.3}))
    )
    assert torch.equal(plain["labels"], moved["labels"])
    assert 1e-4 < (plain["images"] - moved["images"]).abs().mean() < 0.2
