"""MGR: its hypergradient and Algorithm 1 against programs written out in plain torch, and what its graphs promise."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from objectives import Fixed, Values, distance, flat, slopes_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import mlo
from mlo.hypergradient import FiniteDifference, Unroll
from problems import mgr
from problems.blocks.consistency import strong, strong_draws
from problems.blocks.finders import Residual, perceptron
from problems.blocks.networks import Divided

ROOT = Path(__file__).parent.parent.parent
Named: TypeAlias = dict[str, Tensor]
MGR = ROOT / "graphs" / "mgr.yaml"
IMAGES, LATENT, CLASSES = 12, 5, 3
RATE, MOMENTUM, WEIGHT, KL, STEP = 0.1, 0.9, 0.7, 0.05, 1e-2


@pytest.fixture(autouse=True)
def in_double_precision() -> object:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


class Painter(nn.Module):
    """A smooth generator of 8×8 images in (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Linear(LATENT, 64)
        self.labels = nn.Embedding(CLASSES, 64)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return (self.latents(latents) + self.labels(labels)).sigmoid().reshape(-1, 1, 8, 8)


def smooth_network(*, norm: bool = False, second_head: bool = False) -> Divided:
    hidden = [nn.Linear(64, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh()]
    return Divided(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(6, CLASSES)), second_head=second_head)


def smooth_finder() -> nn.Module:
    """Eq. 10 with tanh for leaky ReLU, which is not smooth."""
    return Residual(nn.Sequential(nn.Linear(LATENT, 4), nn.Tanh(), nn.Linear(4, LATENT)))


def labelled_images(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.rand(IMAGES, 1, 8, 8, generator=generator), "labels": torch.arange(IMAGES) % CLASSES}


def draw(iteration: int) -> dict[str, Any]:
    """The batches of one iteration: the same z, y_p and T for both levels."""
    generator = torch.Generator().manual_seed(100 + iteration)
    drawn = strong_draws(IMAGES, generator=generator)
    noise = {
        "z": torch.randn(IMAGES, LATENT, generator=generator),
        "labels": torch.randint(CLASSES, (IMAGES,), generator=generator),
        "strong": {name: each.double() if each.is_floating_point() else each for name, each in drawn.items()},
    }
    return {
        "classifier": {"train": labelled_images(2 * iteration), "noise": noise},
        "finder": {"validation": labelled_images(2 * iteration + 1), "noise": noise},
    }


class Scene:
    """A classifier, a finder and a frozen generator, and Algorithm 1 of them written out in plain torch."""

    def __init__(self, *, norm: bool = False) -> None:
        torch.manual_seed(0)
        self.classifier, self.finder, self.generator = smooth_network(norm=norm), smooth_finder(), Painter()
        self.generator.requires_grad_(False)

    def graph(self, method: object, *, weight: float = WEIGHT, kl: float = KL) -> mlo.Graph:
        return mlo.Graph(
            [
                mlo.Level("generator", variables=self.generator, optimizer=None),
                mlo.Level(
                    "classifier",
                    objective=partial(mgr.consistency, weight=weight),
                    variables=self.classifier,
                    given=("finder", "generator"),
                    optimizer=mlo.optimizer.SGD(learning_rate=RATE, momentum=MOMENTUM, nesterov=True),
                    hypergradient=method,
                ),
                mlo.Level(
                    "finder",
                    objective=partial(mgr.validation, kl=kl),
                    variables=self.finder,
                    given=("generator",),
                    subject_to=("classifier",),
                    lookahead=True,
                    optimizer=mlo.optimizer.Adam(learning_rate=STEP),
                ),
            ]
        )

    def run(self, module: nn.Module, tensors: Named, *args: Any, **options: Any) -> Tensor:
        return functional_call(module, tensors, args, options)

    def found(self, phi: Named, batch: dict[str, Any]) -> Tensor:
        return self.run(self.finder, phi, batch["noise"]["z"])

    def lower(self, theta: Named, phi: Named, batch: dict[str, Any], *, weight: float = WEIGHT) -> Tensor:
        """Eq. 2 with Eq. 6; features of all images from one pass."""
        train = batch["train"]
        x = self.generator(self.found(phi, batch), batch["noise"]["labels"])
        everything = torch.cat([train["images"], x, strong(x, batch["noise"]["strong"])])
        features = self.run(self.classifier, theta, everything, part="features")
        real, plain, transformed = features.split(IMAGES)
        loss = cross_entropy(self.run(self.classifier, theta, real, part="head"), train["labels"])
        return loss + weight * (transformed - plain).square().sum(1).mean()

    def stepped(
        self, theta: Named, velocity: Named, phi: Named, batch: dict[str, Any], buffers: Named | None = None
    ) -> tuple[Named, Named, Named]:
        """One step of Nesterov SGD, v ← μ v + g, θ ← θ − η (g + μ v); and the buffers after it."""
        leaves = {
            name: tensor if tensor.requires_grad else tensor.clone().requires_grad_() for name, tensor in theta.items()
        }
        after = {name: tensor.clone() for name, tensor in (buffers or {}).items()}
        loss = self.lower({**leaves, **after}, phi, batch)
        slopes = dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), create_graph=True), strict=True))
        new = {name: MOMENTUM * velocity[name] + slope for name, slope in slopes.items()}
        direction = {name: slopes[name].add(new[name], alpha=MOMENTUM) for name in new}
        return {name: leaves[name].add(direction[name], alpha=-RATE) for name in new}, new, after

    def divergence(self, phi: Named, batch: dict[str, Any]) -> Tensor:
        """Eq. 11 from torch's own distributions; and what 1e-6 under the logarithm changes."""
        found = self.found(phi, batch)
        normal = torch.distributions.Normal(found.mean(0), found.std(0, correction=0))
        prior = torch.distributions.Normal(torch.zeros(LATENT), torch.ones(LATENT))
        exact = torch.distributions.kl_divergence(normal, prior).sum()
        return exact - 0.5 * torch.log1p(1e-6 / normal.variance).sum()

    def held_out(self, theta: Named, batch: dict[str, Any]) -> Tensor:
        validation = batch["validation"]
        return cross_entropy(self.run(self.classifier, theta, validation["images"]), validation["labels"])

    def upper(self, state: mlo.State, batches: dict[str, Any]) -> tuple[Named, Named]:
        """∇_φ L_val(θ') and λ_KL ∇_φ KL at `state`, by autograd through the step (Eq. 8)."""
        theta, momentum, phi = unpacked(state)
        theta = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
        phi = {name: tensor.clone().requires_grad_() for name, tensor in phi.items()}
        response, _, _ = self.stepped(theta, momentum, phi, batches["classifier"])
        through = torch.autograd.grad(self.held_out(response, batches["finder"]), phi.values())
        direct = torch.autograd.grad(KL * self.divergence(phi, batches["finder"]), phi.values())
        return dict(zip(phi, through, strict=True)), dict(zip(phi, direct, strict=True))


def unpacked(state: mlo.State) -> tuple[Named, Named, Named]:
    """θ, its velocity and φ."""
    velocity = state.optimizers["classifier"].moments["momentum"]
    return dict(state.values["classifier"]), dict(velocity), dict(state.values["finder"])


def trained(graph: mlo.Graph, iterations: int = 3) -> mlo.State:
    """A state in which the classifier has a velocity."""
    state = graph.init()
    for iteration in range(iterations):
        state, _ = graph.step(state, draw(iteration))
    return state


def test_the_hypergradient_is_autograd_through_the_written_out_nesterov_step_eq_8() -> None:
    scene = Scene()
    graph = scene.graph(Unroll())
    state = trained(graph)
    through, direct = scene.upper(state, draw(3))
    expected = {name: through[name] + direct[name] for name in through}
    assert distance(graph.hypergradient("finder", state, draw(3)), expected) < 1e-10
    assert distance(direct, through) > 0.1  # neither hides the other
    assert distance(through, direct) > 0.1


def test_finite_differences_converge_to_it_with_the_radius_eq_9() -> None:
    scene = Scene()
    state = trained(scene.graph(Unroll()))
    through, _ = scene.upper(state, draw(3))
    errors = [
        distance(scene.graph(FiniteDifference(radius=radius), kl=0.0).hypergradient("finder", state, draw(3)), through)
        for radius in (1.0, 0.1, 0.01)
    ]
    assert errors[2] < 1e-3
    assert errors[0] > 30 * errors[1] > 900 * errors[2]  # second order in the radius


def test_both_norms_are_measured_apart() -> None:
    scene = Scene()
    graph = scene.graph(Unroll())
    state = trained(graph)
    through, direct = scene.upper(state, draw(3))
    _, metrics = graph.step(state, draw(3))
    torch.testing.assert_close(metrics.norms["finder"].direct, flat(direct).norm())
    torch.testing.assert_close(metrics.norms["finder"].indirect, flat(through).norm())
    measured = metrics.measured["finder"]
    torch.testing.assert_close(metrics.losses["finder"], measured["validation_loss"] + KL * measured["divergence"])


@pytest.mark.parametrize("norm", [False, True], ids=["", "batch statistics"])
def test_lookahead_leaves_the_classifier_where_algorithm_1_leaves_it_bit_for_bit(norm: bool) -> None:
    """l.11: θ takes its step again from where it was, with the same x, y, z and y_p, under the new φ."""
    scene = Scene(norm=norm)
    graph = scene.graph(Unroll())
    state = trained(graph)
    theta, velocity, _ = unpacked(state)
    new, _ = graph.step(state, draw(3))
    assert distance(new.values["finder"], state.values["finder"]) > 1e-4
    phi = dict(new.values["finder"])
    before = dict(state.buffers["classifier"])
    moved, kept, buffers = scene.stepped(theta, velocity, phi, draw(3)["classifier"], before)
    for name in theta:
        assert torch.equal(new.values["classifier"][name], moved[name])
        assert torch.equal(new.optimizers["classifier"].moments["momentum"][name], kept[name])
    assert set(new.buffers["classifier"]) == set(buffers) == set(before)
    assert all(torch.equal(new.buffers["classifier"][name], tensor) for name, tensor in buffers.items())
    stale, _, _ = scene.stepped(theta, velocity, dict(state.values["finder"]), draw(3)["classifier"], before)
    assert distance(stale, moved) > 1e-6


def test_several_iterations_are_algorithm_1_written_out() -> None:
    scene = Scene()
    graph = scene.graph(Unroll())
    state = graph.init()
    theta, velocity, phi = unpacked(state)
    leaves = [tensor.clone().requires_grad_() for tensor in phi.values()]
    adam = torch.optim.Adam(leaves, lr=STEP)
    for iteration in range(4):
        batch = draw(iteration)
        phi = dict(zip(phi, leaves, strict=True))
        response, _, _ = scene.stepped(theta, velocity, phi, batch["classifier"])  # l.7
        upper = scene.held_out(response, batch["finder"]) + KL * scene.divergence(phi, batch["finder"])
        for leaf, slope in zip(leaves, torch.autograd.grad(upper, leaves), strict=True):
            leaf.grad = slope
        adam.step()  # l.8
        theta, velocity, _ = scene.stepped(theta, velocity, phi, batch["classifier"])  # l.11
        theta, velocity = ({name: each.detach() for name, each in tree.items()} for tree in (theta, velocity))
        state, _ = graph.step(state, batch)
    assert distance(state.values["classifier"], theta) < 1e-9
    assert distance(state.values["finder"], dict(zip(phi, leaves, strict=True))) < 1e-9


def test_without_weight_it_is_the_base_model() -> None:
    scene = Scene()
    optimizer = mlo.optimizer.SGD(learning_rate=RATE, momentum=MOMENTUM, nesterov=True)
    base = mlo.Graph(
        [mlo.Level("classifier", objective=mgr.classification, variables=scene.classifier, optimizer=optimizer)]
    )
    for objective in (mgr.consistency, mgr.labelled):
        mixed = mlo.Graph(
            [
                mlo.Level("generator", variables=scene.generator, optimizer=None),
                mlo.Level(
                    "classifier",
                    objective=partial(objective, weight=0.0),
                    variables=scene.classifier,
                    given=("generator",),
                    optimizer=optimizer,
                ),
            ]
        )
        one, other = base.init(), mixed.init()
        for iteration in range(4):
            batch = draw(iteration)["classifier"]
            one, _ = base.step(one, {"classifier": batch["train"]})
            other, _ = mixed.step(other, {"classifier": batch})
        assert distance(other.values["classifier"], one.values["classifier"]) < 1e-12


def values_of(scene: Scene, classifier: nn.Module, **others: nn.Module) -> Values:
    levels = {"classifier": classifier, "generator": scene.generator, "finder": scene.finder, **others}
    return Values({name: Fixed(module) for name, module in levels.items()})


def test_pcr_reaches_the_features_from_both_sides_and_the_head_not_at_all_eq_5() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    network = scene.classifier
    _, measured = mgr.consistency(values_of(scene, network), batch)
    slopes = slopes_of(measured["consistency"], network)
    assert slopes.pop("head.weight") is None
    assert slopes.pop("head.bias") is None
    x = scene.generator(scene.finder(batch["noise"]["z"]), batch["noise"]["labels"])
    sides = [network(images, part="features") for images in (strong(x, batch["noise"]["strong"]), x)]
    one, other = (
        slopes_of((first - second).square().sum(1).mean(), network.features)
        for first, second in ((sides[0], sides[1].detach()), (sides[0].detach(), sides[1]))
    )
    expected = {f"features.{name}": one[name] + other[name] for name in one}
    assert distance(slopes, expected) < 1e-12
    assert min(flat(one).norm(), flat(other).norm()) > 1e-3
    _, measured = mgr.consistency(values_of(scene, network), batch, loss="uda")
    network.head.weight.data *= 100  # sure of everything
    _, measured = mgr.consistency(values_of(scene, network), batch, loss="uda")
    assert slopes_of(measured["consistency"], network)["head.weight"].norm() > 0


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 0.7), (0.3, -0.2), (2.0, 1.5)])
def test_the_divergence_of_scaled_and_shifted_latents_in_closed_form_eq_11(scale: float, shift: float) -> None:
    class Affine(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return scale * z + shift

    scene, batch = Scene(), draw(0)["finder"]
    z = batch["noise"]["z"]
    batch["noise"]["z"] = (z - z.mean(0)) / z.std(0, correction=0)
    values = values_of(scene, scene.classifier, finder=Affine())
    loss, measured = mgr.validation(values, batch, kl=2.0)
    expected = LATENT * 0.5 * (scale**2 + shift**2 - 1 - math.log(scale**2))
    assert abs(measured["divergence"].item() - expected) < 1e-4 * max(1.0, expected)  # an epsilon under the logarithm
    torch.testing.assert_close(loss - 2.0 * measured["divergence"], measured["validation_loss"])


def test_a_second_head_learns_from_synthetic_labels_alone_and_is_not_judged() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    network = smooth_network(second_head=True)
    _, measured = mgr.labelled(values_of(scene, network), batch, head="second")
    real, synthetic = (slopes_of(measured[name], network) for name in ("real_loss", "synthetic_loss"))
    assert real["second_head.weight"] is None
    assert synthetic["head.weight"] is None
    assert synthetic["second_head.weight"].norm() > 0
    assert synthetic["features.1.weight"].norm() > 0
    images = batch["train"]["images"]
    assert torch.equal(network(images), network.head(network.features(images)))


def test_hard_examples_are_found_by_ascent() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    values = values_of(scene, scene.classifier)
    for loss in ("cross_entropy", "pcr"):
        value, measured = mgr.hardness(values, batch, loss=loss, kl=0.5)
        torch.testing.assert_close(value, 0.5 * measured["divergence"] - measured["hardness"])
    _, lower = mgr.consistency(values, batch)
    torch.testing.assert_close(measured["hardness"], lower["consistency"])


def test_where_no_generator_is_listed_real_images_take_its_place() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    values = Values(classifier=Fixed(scene.classifier))
    real = labelled_images(9)
    _, measured = mgr.consistency(values, {**batch, "real": real})
    features = [
        scene.classifier(x, part="features") for x in (strong(real["images"], batch["noise"]["strong"]), real["images"])
    ]
    torch.testing.assert_close(measured["consistency"], (features[0] - features[1]).square().sum(1).mean())


def test_the_finder_of_the_paper_moves_each_number_by_less_than_one_eq_10() -> None:
    finder = Residual(perceptron(LATENT, LATENT, layers=3, hidden=7))
    z = 100 * torch.randn(50, LATENT)
    inner = finder.network
    assert [type(part).__name__ for part in inner] == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]
    torch.testing.assert_close(finder(z), z + torch.tanh(inner(z)))
    assert (finder(z) - z).abs().max() <= 1


def test_the_graph_holds_what_the_paper_states() -> None:
    spec = mlo.load(MGR)
    classifier, finder = spec.levels["classifier"], spec.levels["finder"]
    assert finder.objective.yaml() == {"validation": {"kl": 0.01}}
    assert finder.lookahead
    assert finder.variables.yaml() == {"residual_mlp": {"layers": 3}}
    assert dict(classifier.optimizer.options)["momentum"] == 0.9
    assert dict(classifier.optimizer.options)["nesterov"] is True
    assert classifier.hypergradient.yaml() == {"finite_difference": {"radius": 0.01}}
    assert spec.levels["generator"].frozen


def test_a_run_keeps_samples_features_and_distances(tmp_path: Path) -> None:
    spec = mlo.load(
        MGR, "iterations=2", "start.generator.with.iterations=2", "evaluation.every=1", "evaluation.pictures_at=1"
    )
    run = mlo.run(spec, tmp_path / "run", cache=tmp_path / "start", quiet=True)
    names = {str(path.relative_to(run.folder / "pictures")) for path in (run.folder / "pictures").rglob("*.png")}
    at_the_end = {"features.png", "synthetic_uniform.png", "synthetic_found.png"}
    assert names == at_the_end | {f"at_1/{name}" for name in at_the_end}
    evaluations = [line["evaluation"] for line in run.metrics if "evaluation" in line]
    assert len(evaluations) == 2
    for each in evaluations:
        one, other = (each[f"validation.{name}_feature_frechet_distance"] for name in ("uniform", "found"))
        assert one != other
        assert min(one, other) > 0
    (table,) = run.summary["tables"]
    assert [row[0] for row in table["rows"]] == ["uniform", "found"]
    assert table["rows"][0][-1] == 0 < table["rows"][1][-1]
