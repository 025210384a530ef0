"""MGR's objectives written out by hand, in which mode each network runs, and what one draw holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from mlo._reduction import reduction_of
from mlo.spec import Epochs
from mlo.stream import Draw
from problems import mgr
from problems.blocks.consistency import strong, strong_draws
from problems.blocks.networks import Divided
from problems.blocks.streams import Transformed

GRAPHS = Path(__file__).parents[2] / "graphs"
COUNT, LATENT, CLASSES = 8, 5, 3
CONTEXT = mlo.Context(seed=0, device=torch.device("cpu"), dtype=torch.float64)


@pytest.fixture(autouse=True)
def in_double_precision() -> object:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


class Seen:
    """A module as an objective sees it, which notes in which mode it is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.modes = module, set[bool]()

    def __call__(self, *args: Any, training: bool = True, **options: Any) -> Tensor:
        self.modes.add(training)
        return self.module(*args, **options)


class Levels(dict[str, Any]):
    """Levels as an objective sees them, with a choice that was made before."""

    def __init__(self, levels: Mapping[str, Seen], choices: dict[str, Any] | None = None) -> None:
        super().__init__(levels)
        self.choices = {} if choices is None else choices

    def once(self, name: str, choose: Any) -> Any:
        return self.choices.setdefault(name, choose())

    def shared(self, name: str, compute: Any) -> Any:
        return compute()


def levels(*, second_head: bool = False) -> Levels:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    classifier = Divided(body, second_head=second_head)
    classifier.head.weight.data *= 8  # sure of some images and not of others
    return Levels(
        {"classifier": Seen(classifier), "generator": Seen(Painter()), "finder": Seen(nn.Linear(LATENT, LATENT))}
    )


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, LATENT, 64))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return torch.einsum("nl,nlp->np", latents, self.weight[labels]).sigmoid().reshape(-1, 1, 8, 8)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(COUNT, 1, 8, 8, generator=generator) for _ in range(2)]
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1, 1])
    return {
        "train": {"images": images[0], "labels": labels},
        "validation": {"images": images[1], "labels": labels.flip(0)},
        "noise": {
            "z": torch.randn(COUNT, LATENT, generator=generator),
            "labels": torch.tensor([2, 2, 1, 0, 1, 0, 2, 0]),
            "strong": strong_draws(COUNT, generator=generator),
        },
    }


def painted(values: Levels, given: dict[str, Any]) -> Tensor:
    noise = given["noise"]
    return values["generator"].module(values["finder"].module(noise["z"]), noise["labels"])


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()


def test_uda_holds_what_is_said_of_the_plain_image_fixed_and_moves_what_is_said_of_the_transformed_one() -> None:
    values, given = levels(), batch()
    network, x = values["classifier"].module, painted(values, given)
    loss, measured = mgr.consistency(values, given, weight=0.3, loss="uda")
    said, learned = network(x).detach(), network(strong(x, given["noise"]["strong"])).log_softmax(1)
    kept = [row.softmax(0).max() > 0.8 for row in said]
    assert 0 < sum(kept) < COUNT
    by_hand = sum(-((said[n] / 0.4).softmax(0) * learned[n]).sum() for n in range(COUNT) if kept[n]) / COUNT
    torch.testing.assert_close(measured["consistency"], by_hand)
    torch.testing.assert_close(
        loss, surprise(network(given["train"]["images"]), given["train"]["labels"]) + 0.3 * by_hand
    )
    (found, right) = (
        torch.autograd.grad(each, network.head.weight, retain_graph=True)[0]
        for each in (measured["consistency"], by_hand)
    )
    torch.testing.assert_close(found, right)


def test_targets_of_uda_are_those_that_the_step_began_with() -> None:
    given, values = batch(), levels()
    before, _ = mgr.consistency(values, given, loss="uda")
    (targets,) = values.choices.values()
    moved = levels()
    moved["classifier"].module.head.weight.data.neg_()
    anew, _ = mgr.consistency(moved, given, loss="uda")
    again, _ = mgr.consistency(Levels(moved, values.choices), given, loss="uda")
    assert values.choices["targets"] is targets
    assert not torch.isclose(again, anew)
    assert not torch.isclose(again, before)


@pytest.mark.parametrize("head", ["shared", "second"])
@pytest.mark.parametrize("transformed", [False, True])
def test_gda_is_the_cross_entropy_of_synthetic_images_for_what_they_were_asked_to_show(
    head: Any, transformed: bool
) -> None:
    values, given = levels(second_head=True), batch()
    network, x = values["classifier"].module, painted(values, given)
    x = strong(x, given["noise"]["strong"]) if transformed else x
    logits = network(x) if head == "shared" else network(network(x, part="features"), part="second_head")
    loss, measured = mgr.labelled(values, given, weight=0.3, transformed=transformed, head=head)
    real = surprise(network(given["train"]["images"]), given["train"]["labels"])
    torch.testing.assert_close(measured["real_loss"], real)
    torch.testing.assert_close(measured["synthetic_loss"], surprise(logits, given["noise"]["labels"]))
    torch.testing.assert_close(loss, real + 0.3 * surprise(logits, given["noise"]["labels"]))


def test_hard_for_cross_entropy_are_images_as_they_come_and_their_own_labels() -> None:
    values, given = levels(), batch()
    logits = values["classifier"].module(painted(values, given))
    found = values["finder"].module(given["noise"]["z"])
    variance = found.var(0, correction=0)
    divergence = 0.5 * (found.mean(0) ** 2 + variance - 1 - (variance + 1e-6).log()).sum()
    loss, measured = mgr.hardness(values, given, loss="cross_entropy", kl=0.2)
    torch.testing.assert_close(measured["hardness"], surprise(logits, given["noise"]["labels"]))
    torch.testing.assert_close(measured["divergence"], divergence)
    torch.testing.assert_close(loss, 0.2 * divergence - measured["hardness"])


OBJECTIVES: list[tuple[Any, dict[str, Any]]] = [
    (mgr.consistency, {}),
    (mgr.consistency, {"loss": "uda"}),
    (mgr.labelled, {"transformed": True}),
    (mgr.validation, {}),
    (mgr.hardness, {"loss": "pcr"}),
    (mgr.hardness, {"loss": "cross_entropy"}),
]


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_the_classifier_runs_on_batch_statistics_and_the_generator_on_running_ones(
    objective: Any, options: dict[str, Any]
) -> None:
    values = levels()
    objective(values, batch(), **options)
    assert values["classifier"].modes == {True}
    assert values["generator"].modes <= {False}
    assert values["finder"].modes == {True}


def test_the_base_model_is_the_cross_entropy_on_batch_statistics() -> None:
    values, train = levels(), batch()["train"]
    torch.testing.assert_close(
        mgr.classification(values, train), cross_entropy(values["classifier"].module(train["images"]), train["labels"])
    )
    assert values["classifier"].modes == {True}


@pytest.mark.parametrize("name", ["mgr.yaml", "mgr/hard_pcr.yaml"])
def test_objectives_of_a_finder_are_no_means_over_samples(name: str) -> None:
    """The divergence of two half batches is not that of the whole."""
    graph, _ = mlo.load(GRAPHS / name).build()
    values, whole = levels(), batch()
    parts = [{**whole, "noise": {**whole["noise"], "z": part}} for part in whole["noise"]["z"].split(COUNT // 2)]
    mean = sum(mgr.validation(values, part)[1]["divergence"] for part in parts) / 2
    assert not torch.isclose(mean, mgr.validation(values, whole)[1]["divergence"], rtol=1e-2)
    assert {level: reduction_of(graph.levels[level].objective) for level in ("classifier", "finder")} == {
        "classifier": "mean",
        "finder": "batch",
    }


def built(**settings: Any) -> mlo.Problem:
    return mgr.build(mgr.Data(**settings), CONTEXT)


def drawn(problem: mlo.Problem, stream: str, iteration: int = 1) -> Any:
    source: Any = problem.streams[stream]
    return source.draw(Draw(0, stream, iteration))


def test_one_draw_of_noise() -> None:
    problem = built(batch_size=6000, latent=7, strongest=0.3)
    noise, again = drawn(problem, "noise"), drawn(problem, "noise")
    assert all(torch.equal(noise[name], again[name]) for name in ("z", "labels"))
    assert not torch.equal(noise["z"], drawn(problem, "noise", 2)["z"])
    assert (noise["z"].shape, noise["z"].dtype) == ((6000, 7), torch.float64)
    torch.testing.assert_close(noise["z"].mean(0), torch.zeros(7), rtol=0, atol=0.07)  # five standard deviations
    torch.testing.assert_close(noise["z"].T.cov(), torch.eye(7), rtol=0, atol=0.1)
    assert (noise["labels"].bincount(minlength=10) - 600).abs().max() < 5 * 600**0.5
    magnitude = noise["strong"]["magnitude"]
    assert 0.29 < magnitude.max() <= 0.3


def as_numbers(images: Tensor) -> set[tuple[int, ...]]:
    return {tuple(image) for image in (16 * images).round().long().flatten(1).tolist()}


def test_streams_are_of_the_parts_that_their_names_say() -> None:
    problem = built(fraction=0.3, validation=0.3, batch_size=2000)
    train, real, validation = (as_numbers(drawn(problem, name)["images"]) for name in ("train", "real", "validation"))
    assert train == real
    assert not train & validation
    assert len(train) == 272
    assert len(validation) == 117


@pytest.mark.parametrize("augmentation", ["augmix", "rand_augment", "trivial_augment"])
def test_augmentation_is_of_what_is_trained_on_alone(augmentation: str) -> None:
    plain, augmented = built(), built(augmentation=augmentation)
    for name, same in (("train", False), ("real", True), ("validation", True)):
        one, other = (drawn(problem, name) for problem in (plain, augmented))
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(one["images"], other["images"]) == same
    transform, draws = mgr.AUGMENTATIONS[augmentation]
    generator = Draw(0, "train.transform", 1).generator()
    right = transform(drawn(plain, "train")["images"], draws(64, generator=generator))
    torch.testing.assert_close(drawn(augmented, "train")["images"], right)


def test_a_transformed_stream_draws_anew_for_each_batch_and_apart_from_its_images() -> None:
    still = mlo.stream.Constant({"images": torch.rand(4, 1, 8, 8)})
    seen: list[Tensor] = []

    def draws(count: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        return {"shift": torch.rand(count, generator=generator)}

    def moved(images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        seen.append(given["shift"])
        return images + given["shift"][:, None, None, None]

    stream = Transformed(still, moved, draws)
    for iteration, step in ((1, 0), (2, 0), (1, 1), (1, 0)):
        stream.draw(Draw(0, "train", iteration, step))
    assert torch.equal(seen[0], seen[3])
    assert len({tuple(each.tolist()) for each in seen}) == 3
    own = torch.rand(4, generator=Draw(0, "train", 1).generator())
    assert not torch.equal(seen[0], own)  # what orders the images would say, too, how they are changed


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("mlp", ["Linear", "LeakyReLU", "Linear"]),
        ("linear", ["Linear"]),
        ("residual_mlp", ["Linear", "LeakyReLU", "Linear"]),
    ],
)
def test_finders_of_table_5_written_out(name: str, kinds: list[str]) -> None:
    make = mgr.finders_for(LATENT)[name]
    finder = make() if name == "linear" else make(layers=2, hidden=4)
    layers = [part for part in finder.modules() if isinstance(part, nn.Linear | nn.LeakyReLU)]
    assert [type(part).__name__ for part in layers] == kinds
    z = torch.randn(6, LATENT)
    inner = z
    for layer in layers:
        inner = layer(inner)
    torch.testing.assert_close(finder(z), z + inner.tanh() if name == "residual_mlp" else inner)


def written(name: str, *keys: str) -> Any:
    """What graph `name` says at `keys` of a level, as it is written."""
    spec = mlo.load(GRAPHS / "mgr" / f"{name}.yaml")
    level = spec.levels[keys[0]]
    found = getattr(level, keys[1])
    return found.yaml() if hasattr(found, "yaml") else found


PCR, GIVEN = {"consistency": {"weight": 0.4, "loss": "pcr"}}, ("generator",)
SAYS = [
    ("second_order", ("classifier", "hypergradient"), "unroll"),
    ("pcr", ("classifier", "objective"), PCR),
    ("gda", ("classifier", "objective"), {"labelled": {"weight": 0.4}}),
    ("gda_mh", ("classifier", "objective"), {"labelled": {"weight": 0.4, "head": "second"}}),
    ("gda_mh", ("classifier", "variables"), {"smooth_cnn_two_heads": {"width": 16, "pooled": True}}),
    ("gda_ssl", ("classifier", "objective"), {"consistency": {"weight": 0.4, "loss": "uda"}}),
    ("gda_mps", ("classifier", "objective"), {"labelled": {"weight": 0.4}}),
    ("gda_mps", ("classifier", "given"), ("finder", "generator")),
    ("gda_transformed", ("classifier", "objective"), {"labelled": {"weight": 0.4, "transformed": True}}),
    ("real_consistency", ("classifier", "objective"), PCR),
    ("real_consistency", ("classifier", "given"), ()),
    ("without_kl", ("finder", "objective"), {"validation": {"kl": 0.0}}),
    ("finder_shallow", ("finder", "variables"), {"residual_mlp": {"layers": 1}}),
    ("finder_linear", ("finder", "variables"), "linear"),
    ("finder_mlp", ("finder", "variables"), {"mlp": {"layers": 3}}),
    ("finder_generator", ("generator", "objective"), "validation"),
    ("hard_pcr", ("finder", "objective"), {"hardness": {"loss": "pcr", "kl": 0.01}}),
    ("hard_cross_entropy", ("finder", "objective"), {"hardness": {"loss": "cross_entropy", "kl": 0.01}}),
    ("hard_cross_entropy", ("classifier", "objective"), PCR),
    ("cars", ("finder", "optimizer"), {"adam": {"learning_rate": 1e-4}}),
    ("cars", ("finder", "objective"), {"validation": {"kl": 0.01}}),
]


@pytest.mark.parametrize(("name", "keys", "says"), SAYS, ids=[f"{name}.{keys[1]}" for name, keys, _ in SAYS])
def test_a_baseline_or_an_ablation_is_what_its_name_says(name: str, keys: tuple[str, ...], says: Any) -> None:
    assert written(name, *keys) == says


@pytest.mark.parametrize("percent", [25, 50, 75, 100])
def test_fractions(percent: int) -> None:
    assert mlo.load(GRAPHS / "mgr" / f"fraction_{percent}.yaml").data["fraction"] == percent / 100


@pytest.mark.parametrize("name", ["cars", "aircraft", "birds", "dtd", "flowers", "pets"])
def test_at_paper_scale_the_schedule_is_the_papers(name: str) -> None:
    spec = mlo.load(GRAPHS / "mgr" / f"{name}.yaml")
    optimizer = written(name, "classifier", "optimizer")["sgd"]
    assert optimizer["learning_rate"] == {
        "multi_step": {"start": 0.01, "factor": 0.1, "at": {"epochs": (60, 120, 160)}}
    }
    assert (optimizer["momentum"], optimizer["nesterov"]) == (0.9, True)
    assert spec.iterations == Epochs(epochs=200)
    assert (spec.data["source"], spec.data["fraction"], spec.data["validation"]) == (name, 1.0, 0.1)
    assert spec.data.get("batch_size", mgr.Data().batch_size) == 64
    assert spec.evaluation is not None
    assert (spec.evaluation.every, spec.evaluation.select) == (Epochs(epochs=1, of="train"), "validation.top1")


def test_a_generator_is_trained_on_images_as_they_are() -> None:
    start = mlo.load(GRAPHS / "mgr.yaml").starts["generator"]
    assert [start.data[name] for name in ("rotation", "scale", "shift")] == [0.0] * 3
