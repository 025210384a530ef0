"""How MGR judges a classifier and the images of a generator, and the pictures it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write
from torch import Tensor

import mlo
from problems import mgr
from problems.blocks.image_sets import image_sets, in_order
from problems.blocks.pictures import GREY, PALETTE, scatter, tiles
from problems.blocks.samples import embedding, samples_pictures
from problems.blocks.torchvision_door import torchvision

CONTEXT = mlo.Context(seed=0, device=torch.device("cpu"), dtype=torch.float32)
WHITE = (255, 255, 255)


class Classifier(dict[str, Tensor]):
    """Features are the pixels and logits linear in them; every call is noted."""

    def __init__(self, pixels: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(3)
        super().__init__({"head.weight": torch.randn(pixels, classes, generator=generator)})
        self.calls: list[tuple[str, Tensor]] = []

    def __call__(self, images: Tensor, *, part: str = "both", training: bool = True) -> Tensor:
        assert not training
        self.calls.append((part, images))
        features = images.flatten(1)
        return features if part == "features" else features @ self["head.weight"]


def digits() -> dict[int, Tensor]:
    """All test images of each digit."""
    (batch,) = in_order(image_sets("digits", seed=0).test, size=500, device=CONTEXT.device, dtype=CONTEXT.dtype)
    return {c: batch["images"][batch["labels"] == c] for c in range(10)}


def cheat(z: Tensor, labels: Tensor, *, training: bool) -> Tensor:
    """A real digit of the label that is asked for, chosen by the latent."""
    assert not training
    of_class = digits()
    chosen = (1000 * z[:, 0].abs()).long()
    return torch.stack(
        [of_class[c][k % len(of_class[c])] for c, k in zip(labels.tolist(), chosen.tolist(), strict=True)]
    )


def shifted(z: Tensor) -> Tensor:
    return z + 0.5 * torch.where(torch.arange(z.shape[1]) % 2 == 0, 1.0, 0.2)


def judged(
    values: dict[str, Any], split: Any, *, complete: bool = False, whole: bool = True, **settings: Any
) -> mlo.Evaluation:
    problem = mgr.build(mgr.Data(**{"fraction": 0.2, "complete": whole, **settings}), CONTEXT)
    assert problem.evaluate is not None
    torch.manual_seed(0)
    return problem.evaluate(values, split, model=("classifier",), totals={}, complete=complete)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_classifier_is_judged_on_the_images_of_the_split(split: Any) -> None:
    classifier = Classifier(64, 10)
    metrics = judged({"classifier": classifier}, split).metrics
    part = getattr(image_sets("digits", seed=0, fraction=0.2), split)
    (batch,) = in_order(part, size=500, device=CONTEXT.device, dtype=CONTEXT.dtype)
    logits = batch["images"].flatten(1) @ classifier["head.weight"]
    surprise = -logits.log_softmax(1)[torch.arange(len(logits)), batch["labels"]].mean()
    assert metrics["loss"] == pytest.approx(surprise.item(), rel=1e-6)
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == batch["labels"]).double().mean().item())


def test_images_of_found_latents_are_held_against_those_of_the_same_uniform_ones() -> None:
    classifier = Classifier(64, 10)
    values = {"classifier": classifier, "generator": cheat, "finder": shifted}
    found = judged(values, "test", complete=True, latent=6)
    (table,) = found.tables
    uniform, moved = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (uniform["latents"], moved["latents"]) == ("uniform", "found")
    for row in (uniform, moved):
        assert row["recognised (%)"] > 95  # real digits, each under its label
    assert uniform["mean |F(z) − z|"] == 0
    assert moved["mean |F(z) − z|"] == pytest.approx(0.3, rel=1e-5)  # half of the numbers by 0.5, half by 0.1
    assert moved["divergence"] - uniform["divergence"] == pytest.approx(0.5 * 3 * (0.25 + 0.01), abs=0.3)
    still = judged({**values, "finder": lambda z: z}, "test", latent=6).metrics
    assert still["uniform_feature_frechet_distance"] == still["found_feature_frechet_distance"]
    assert still["uniform_feature_frechet_distance"] == uniform["feature Fréchet distance"]
    assert set(judged({**values, "finder": None}, "test", latent=6).metrics) >= {"uniform_feature_frechet_distance"}


def test_real_test_images_are_at_no_distance() -> None:
    """As many of them as there are, each once: the generator gives them in the order in which labels ask."""
    given = dict.fromkeys(range(10), 0)
    real = digits()

    def every(z: Tensor, labels: Tensor, *, training: bool) -> Tensor:
        chosen: list[Tensor] = []
        for c in labels.tolist():
            chosen.append(real[c][given[c] % len(real[c])])
            given[c] += 1
        return torch.stack(chosen)

    distance = judged({"classifier": Classifier(64, 10), "generator": every}, "test").metrics
    far = judged(
        {"classifier": Classifier(64, 10), "generator": lambda z, y, training: torch.rand(len(z), 1, 8, 8)}, "test"
    )
    assert distance["uniform_feature_frechet_distance"] < 1e-2 * far.metrics["uniform_feature_frechet_distance"]


def test_features_are_those_of_training_images_and_of_found_ones() -> None:
    classifier = Classifier(64, 10)
    images: list[Tensor] = []

    def noted(z: Tensor, labels: Tensor, *, training: bool) -> Tensor:
        images.append(cheat(z, labels, training=training))
        return images[-1]

    values = {"classifier": classifier, "generator": noted, "finder": shifted}
    found = judged(values, "test", complete=True, latent=6)
    shown = [each for part, each in classifier.calls if part == "features"]
    assert any(torch.equal(each, images[1]) for each in shown)  # uniform ones first, then found ones
    assert not any(torch.equal(each, images[0]) for each in shown)
    part = image_sets("digits", seed=0, fraction=0.2).train
    (batch,) = in_order(part, size=500, device=CONTEXT.device, dtype=CONTEXT.dtype)
    picture, share = embedding(batch["images"].flatten(1), batch["labels"], images[1].flatten(1))
    assert torch.equal(found.pictures["features"], picture)
    assert found.metrics["features_in_plane"] == share
    assert set(found.pictures) == {"features", "synthetic_uniform", "synthetic_found"}


def test_of_more_than_ten_classes_the_first_five_count_too(tmp_path: Path) -> None:
    write("cifar100", tmp_path, train=20, test=60, patches=True)
    classifier = Classifier(3 * 32 * 32, 100)
    metrics = judged(
        {"classifier": classifier}, "test", source="cifar100", root=str(tmp_path), whole=False, fraction=1.0
    )
    found = image_sets("cifar100", root=tmp_path, seed=0, complete=False).test
    batches = list(in_order(found, size=500, device=CONTEXT.device, dtype=CONTEXT.dtype))
    logits = torch.cat([each["images"] for each in batches]).flatten(1) @ classifier["head.weight"]
    labels = torch.cat([each["labels"] for each in batches])
    better = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics.metrics["top5"] == pytest.approx(100 * (better < 5).double().mean().item())


# pictures


def colour_at(picture: Tensor, row: int, column: int) -> tuple[int, ...]:
    return tuple(picture[row, column].tolist())


def test_points_lie_where_they_are_and_have_the_colour_of_their_class() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    picture = scatter(points, torch.tensor([-1, 0, 11]), side=50, dot=3)
    assert picture.shape == (50, 50, 3)
    assert colour_at(picture, 44, 4) == GREY  # the origin is below, at the left
    assert colour_at(picture, 44, 45) == PALETTE[0]
    assert colour_at(picture, 4, 4) == PALETTE[1]  # eleven begins again
    assert colour_at(picture, 4, 45) == WHITE


def test_later_points_lie_over_earlier_ones() -> None:
    picture = scatter(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([-1, 2, 3]), side=50)
    assert colour_at(picture, 44, 4) == PALETTE[3]


def test_features_are_shown_along_the_two_directions_in_which_they_vary_most() -> None:
    """Variances 100, 9 and 1 along known directions: the share in the plane is 109/110; synthetic ones are grey."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * torch.tensor([10.0, 3.0, 1.0])
    turned = rows @ torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    labels = torch.arange(25) % 10
    picture, share = embedding(turned[15:], labels, turned[:15])
    assert share == pytest.approx(109 / 110, rel=1e-9)
    signs = [torch.tensor([one, other]) for one in (-1.0, 1.0) for other in (-1.0, 1.0)]  # of components, left open
    kinds = torch.cat([torch.full((15,), -1), labels])
    assert any(torch.equal(picture, scatter(rows[:, :2] * sign, kinds)) for sign in signs)
    alone, _ = embedding(turned[15:], labels, None)
    assert GREY not in {tuple(each) for each in alone.flatten(0, 1).unique(dim=0).tolist()}


def test_images_are_laid_out_upright_in_rows_and_columns() -> None:
    images = torch.zeros(2, 3, 3, 2, 4)
    images[1, 2, 0, 0, 3] = 1.0  # red, in the upper right corner of the last image of the second row
    picture = tiles(images)
    assert picture.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    assert (picture == 128).all(2)[0].all()
    assert colour_at(picture, 4, 14) == (255, 0, 0)
    assert (picture[..., 0] == 255).sum() == 1
    assert tiles(images[:, :, :1]).shape == (7, 16)


def test_a_row_of_samples_is_of_one_class_and_both_pictures_of_the_same_latents() -> None:
    def shaded(z: Tensor, labels: Tensor) -> Tensor:
        return (labels / 10 + 0.05 * z[:, 0].tanh())[:, None, None, None].expand(-1, 1, 2, 2).clamp(0, 1)

    torch.manual_seed(1)
    found = samples_pictures(shaded, lambda z: z, latent=4, classes=4, like=torch.zeros(1))
    assert torch.equal(found["synthetic_uniform"], found["synthetic_found"])
    shades = found["synthetic_uniform"].float() / 255
    assert shades.shape == (4 * 3 + 1, 10 * 3 + 1)
    for row in range(4):
        of_row = shades[1 + 3 * row, 1::3]
        assert (of_row[:10] - row / 10).abs().max() < 0.06
        assert of_row[:10].std() > 0.005
    assert list(samples_pictures(shaded, None, latent=4, classes=4, like=torch.zeros(1))) == ["synthetic_uniform"]


# photographs


@pytest.fixture(scope="module")
def cars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cars")
    write("cars", root, classes=3, train=10, test=4, patches=True)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-18 as torchvision saves it, of numbers drawn at random."""
    torch.manual_seed(4)
    network = torchvision("models").resnet18(num_classes=5)
    path = tmp_path_factory.mktemp("judge") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return path


def painted(z: Tensor, labels: Tensor, *, training: bool) -> Tensor:
    assert not training
    return (z[:, :3, None, None] + labels[:, None, None, None] / 100).sigmoid().expand(-1, 3, 64, 64)


def test_photographs_are_held_against_real_ones_in_the_features_of_a_network_from_a_file(
    cars: Path, weights: Path
) -> None:
    """By hand: torchvision's network without its last layer, ImageNet's normalisation, eigenvalues for the root."""
    settings: dict[str, Any] = {
        "source": "cars",
        "root": str(cars),
        "size": 64,
        "whole": False,
        "latent": 8,
        "fraction": 1.0,
    }
    values = {"classifier": Classifier(3 * 64 * 64, 196), "generator": painted, "finder": shifted}
    metrics = judged(values, "validation", judge=str(weights), **settings).metrics
    network = torchvision("models").resnet18(num_classes=5)
    network.load_state_dict(torch.load(weights))
    network.fc = torch.nn.Identity()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network.eval()((images - mean[:, None, None]) / deviation[:, None, None]).double()

    found = image_sets("cars", root=cars, seed=0, complete=False, size=64).test
    assert len(found) == 12
    batches = list(in_order(found, size=500, device=CONTEXT.device, dtype=CONTEXT.dtype))
    real = features(torch.cat([each["images"] for each in batches]))
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    for name, latents in (("uniform", z), ("found", shifted(z))):
        made = features(painted(latents, torch.arange(12), training=False))
        trace = torch.linalg.eigvals(real.T.cov() @ made.T.cov()).real.clamp(min=0).sqrt().sum()
        distance = (
            (real.mean(0) - made.mean(0)).square().sum() + real.T.cov().trace() + made.T.cov().trace() - 2 * trace
        )
        assert metrics[f"{name}_feature_frechet_distance"] == pytest.approx(distance.item(), rel=1e-3)
    complete = judged(values, "validation", complete=True, judge=str(weights), **settings)
    assert {name: complete.metrics[name] for name in metrics} == metrics
    without = judged(values, "validation", complete=True, **settings)
    assert not any("frechet" in name for name in without.metrics)
    assert all(torch.equal(picture, without.pictures[name]) for name, picture in complete.pictures.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.judge=nowhere.pth", r"data\.judge: judge is 'nowhere\.pth'; there is no such file"),
        ("data.judge_depth=34", r"data\.judge: judge is '.*', which does not hold a ResNet-34 of torchvision"),
        ("data.judge_depth=19", r"data\.judge_depth: expected 18, 34, 50 or 101, got 19"),
        ("data.source=digits", r"data\.judge: judge is '.*'; images of digits are grey"),
    ],
)
def test_judges_that_are_refused(change: str, message: str, cars: Path, weights: Path) -> None:
    graph = Path(__file__).parents[2] / "graphs" / "mgr.yaml"
    spec = mlo.load(
        graph,
        "data.source=cars",
        f"data.root={cars}",
        "data.complete=false",
        "data.fraction=1.0",
        f"data.judge={weights}",
        change,
    )
    with pytest.raises(mlo.SpecError, match=message):
        spec.build()
