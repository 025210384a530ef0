"""MP-SSL: its hypergradient and Algorithm 1 against programs written out in plain torch, and what its graphs promise."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from objectives import Fixed, Values, distance, flat, slopes_of
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, leaky_relu

import mlo
from mlo.hypergradient import Unroll
from problems import mp_ssl
from problems.blocks.consistency import (
    WithThresholds,
    fairness,
    fixmatch_targets,
    freematch,
    freematch_targets,
    matched,
    strong,
    strong_draws,
    uda,
    uda_targets,
    weak,
    weak_draws,
)
from problems.blocks.networks import Divided
from problems.blocks.pictures import heat_map
from problems.blocks.samplers import ConditionalMapper, LabelConverter, MapperAndConverter, entropies, gumbel_noise

ROOT = Path(__file__).parent.parent.parent
MP_SSL = ROOT / "graphs" / "mp_ssl.yaml"
Named: TypeAlias = dict[str, Tensor]
IMAGES, LATENT, CLASSES, LABELS = 12, 5, 3, 6
RATE, MOMENTUM, WEIGHT, GAP, STEP, TEMPERATURE = 0.1, 0.9, 0.7, 2.0, 1e-2, 0.3


@pytest.fixture(autouse=True)
def in_double_precision() -> object:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


class Painter(nn.Module):
    """A smooth generator of 8×8 images in (0, 1), of labels or of weights of them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Linear(LATENT, 64)
        self.labels = nn.Parameter(torch.randn(LABELS, 64))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        painted = labels @ self.labels if labels.is_floating_point() else self.labels[labels]
        return (self.latents(latents) + painted).sigmoid().reshape(-1, 1, 8, 8)


def smooth_network() -> WithThresholds:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return WithThresholds(Divided(network), classes=CLASSES)


def small_sampler(form: Any = "hard", *, conditional: bool = True) -> MapperAndConverter:
    mapper = ConditionalMapper(latent=LATENT, classes=CLASSES if conditional else None, hidden=4, embedding=2)
    converter = LabelConverter(classes=CLASSES, labels=LABELS, temperature=TEMPERATURE, form=form)
    nn.init.normal_(converter.table)
    return MapperAndConverter(mapper, converter)


def labelled_images(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.rand(IMAGES, 1, 8, 8, generator=generator), "labels": torch.arange(IMAGES) % CLASSES}


def draw(iteration: int) -> dict[str, Any]:
    """The batches of one iteration: the same x, y, z, g and transforms for both levels."""
    generator = torch.Generator().manual_seed(100 + iteration)
    noise = {
        "z": torch.randn(IMAGES, LATENT, generator=generator),
        "labels": torch.randint(LABELS, (IMAGES,), generator=generator),
        "gumbel": gumbel_noise(IMAGES, LABELS, generator=generator),
        "weak": weak_draws(IMAGES, generator=generator),
        "strong": strong_draws(IMAGES, generator=generator),
    }
    lower = {"train": labelled_images(2 * iteration), "noise": noise}
    return {"classifier": lower, "sampler": {**lower, "validation": labelled_images(2 * iteration + 1)}}


class Scene:
    """A classifier, a sampler and a frozen foundation model, and Algorithm 1 of them written out in plain torch."""

    def __init__(self, form: str = "hard", *, conditional: bool = True) -> None:
        torch.manual_seed(0)
        self.form = form
        self.classifier, self.sampler = smooth_network(), small_sampler(form, conditional=conditional)
        self.foundation = Painter().requires_grad_(False)

    def graph(self, *, loss: str = "scr", weight: float = WEIGHT, **options: Any) -> mlo.Graph:
        return mlo.Graph(
            [
                mlo.Level("foundation", variables=self.foundation, optimizer=None),
                mlo.Level(
                    "classifier",
                    objective=partial(mp_ssl.semi_supervised, weight=weight, loss=loss),
                    variables=self.classifier,
                    given=("sampler", "foundation"),
                    optimizer=mlo.optimizer.SGD(learning_rate=RATE, momentum=MOMENTUM, nesterov=True),
                    hypergradient=Unroll(),
                ),
                mlo.Level(
                    "sampler",
                    objective=partial(mp_ssl.validation, **{"gap_weight": GAP, **options}),
                    variables=self.sampler,
                    given=("foundation",),
                    subject_to=("classifier",),
                    lookahead=True,
                    optimizer=mlo.optimizer.Adam(learning_rate=STEP),
                ),
            ]
        )

    def mapped(self, phi: Named, batch: dict[str, Any]) -> Tensor:
        """Eq. 10 with three layers and a slope of 0.01."""
        z, y = batch["noise"]["z"], batch["train"]["labels"]
        embedding = phi.get("mapper.embedding.weight")
        hidden = z if embedding is None else torch.cat([z, embedding[y]], 1)
        for number in (0, 2, 4):
            hidden = hidden @ phi[f"mapper.network.{number}.weight"].T + phi[f"mapper.network.{number}.bias"]
            hidden = leaky_relu(hidden, 0.01) if number < 4 else hidden
        return hidden

    def weights(self, table: Tensor, batch: dict[str, Any]) -> Tensor:
        """Eq. 12, and with Eq. 11 its argmax: the value, whose derivative is put in by `jacobian`."""
        y, noise = batch["train"]["labels"], batch["noise"]["gumbel"]
        if self.form == "soft":
            return table[y].exp() / table[y].exp().sum(1, keepdim=True)
        powers = ((table[y] + noise) / TEMPERATURE).exp()
        soft = powers / powers.sum(1, keepdim=True)
        if self.form == "soft_gumbel":
            return soft
        return torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1.0)

    def pulled(self, table: Tensor, batch: dict[str, Any], cotangent: Tensor) -> Tensor:
        """(∂soft/∂table)ᵀ cotangent with ∂soft_i/∂table_y(i) = (diag s − s sᵀ)/τ, by hand."""
        y, tau = batch["train"]["labels"], 1.0 if self.form == "soft" else TEMPERATURE
        noise = 0.0 if self.form == "soft" else batch["noise"]["gumbel"]
        s = ((table[y] + noise) / tau).softmax(1)
        rows = (torch.diag_embed(s) - s[:, :, None] * s[:, None, :]) @ cotangent[:, :, None] / tau
        return torch.zeros_like(table).index_add(0, y, rows[:, :, 0])

    def lower(self, theta: Named, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """Eq. 1 with Eqs. 2 and 13."""
        train, noise = batch["train"], batch["noise"]
        views = torch.cat([train["images"], weak(images, noise["weak"]), strong(images, noise["strong"])])
        real, one, other = self.features(theta, views).split(IMAGES)
        return (
            cross_entropy(self.head(theta, real), train["labels"]) + WEIGHT * (1 - cosine_similarity(one, other)).mean()
        )

    def features(self, theta: Named, images: Tensor) -> Tensor:
        weight, bias = (theta[f"network.features.1.{name}"] for name in ("weight", "bias"))
        return (images.flatten(1) @ weight.T + bias).tanh()

    def head(self, theta: Named, features: Tensor) -> Tensor:
        return features @ theta["network.head.weight"].T + theta["network.head.bias"]

    def stepped(self, theta: Named, velocity: Named, images: Tensor, batch: dict[str, Any]) -> tuple[Named, Named]:
        """One step of Nesterov SGD, v ← μ v + g, θ ← θ − η (g + μ v)."""
        leaves = {
            name: tensor if tensor.requires_grad else tensor.clone().requires_grad_() for name, tensor in theta.items()
        }
        loss = self.lower(leaves, images, batch)
        slopes = dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), create_graph=True), strict=True))
        new = {name: MOMENTUM * velocity[name] + slope for name, slope in slopes.items()}
        return {name: leaves[name] - RATE * (slopes[name] + MOMENTUM * new[name]) for name in new}, new

    def held_out(self, theta: Named, batch: dict[str, Any]) -> Tensor:
        """Eq. 7."""
        return cross_entropy(
            self.head(theta, self.features(theta, batch["validation"]["images"])), batch["validation"]["labels"]
        )

    def gap(self, theta: Named, images: Tensor, batch: dict[str, Any], kind: str = "paired") -> Tensor:
        """Eq. 8; l.8 of Algorithm 1, of logits; and the MMD with Gaussians, by loops."""
        theta = {name: tensor.detach() for name, tensor in theta.items()}
        a, b = self.features(theta, batch["train"]["images"]), self.features(theta, images)
        if kind == "paired":
            return sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)) / IMAGES
        if kind == "batch_mean":
            return ((self.head(theta, a).mean(0) - self.head(theta, b).mean(0)) ** 2).sum()
        width = sum(((x - y) ** 2).sum() for x in a for y in a) / (IMAGES * (IMAGES - 1))

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            return sum(torch.exp(-((x - y) ** 2).sum() / (2 * s * width)) for s in (0.25, 0.5, 1, 2, 4)) / 5

        def mean(one: Tensor, other: Tensor) -> Tensor:
            return sum(kernel(x, y) for x in one for y in other) / IMAGES**2

        return mean(a, a) + mean(b, b) - 2 * mean(a, b)

    def upper(self, state: mlo.State, batches: dict[str, Any], kind: str = "paired") -> tuple[Named, Named]:
        """∇L_val(θ') and λ_gap ∇L_gap at `state`, in φ and ξ: by autograd through the step down to latents and weights."""
        theta, momentum, phi = unpacked(state)
        theta = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
        phi = {name: tensor.clone().requires_grad_() for name, tensor in phi.items()}
        table, batch = phi["converter.table"], batches["sampler"]
        weights = self.weights(table, batch).detach().requires_grad_()
        latents = self.mapped(phi, batch)
        images = self.foundation(latents, weights)
        response, _ = self.stepped(theta, momentum, images, batch)
        losses = self.held_out(response, batch), GAP * self.gap(response, images, batch, kind)
        mapper = {name: tensor for name, tensor in phi.items() if name.startswith("mapper.")}
        parts = []
        for loss in losses:
            *found, cotangent = torch.autograd.grad(loss, [*mapper.values(), weights], retain_graph=True)
            parts.append(
                {
                    **dict(zip(mapper, found, strict=True)),
                    "converter.table": self.pulled(table, batch, cotangent).detach(),
                }
            )
        return parts[0], parts[1]


def unpacked(state: mlo.State) -> tuple[Named, Named, Named]:
    """θ, its velocity, and φ with ξ."""
    velocity = state.optimizers["classifier"].moments["momentum"]
    return dict(state.values["classifier"]), dict(velocity), dict(state.values["sampler"])


def added(one: Named, other: Named) -> Named:
    return {name: one[name] + other[name] for name in one}


def trained(graph: mlo.Graph, iterations: int = 3) -> mlo.State:
    """A state in which the classifier has a velocity."""
    state = graph.init()
    for iteration in range(iterations):
        state, _ = graph.step(state, draw(iteration))
    return state


@pytest.mark.parametrize("conditional", [True, False], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("form", ["hard", "soft_gumbel", "soft"])
def test_the_hypergradient_in_both_is_that_of_the_written_out_step_eqs_6_to_13(form: str, conditional: bool) -> None:
    scene = Scene(form, conditional=conditional)
    graph = scene.graph()
    state = trained(graph)
    through, direct = scene.upper(state, draw(3))
    found = graph.hypergradient("sampler", state, draw(3))
    assert set(found) == set(through)
    assert distance(found, added(through, direct)) < 1e-10
    alone = scene.graph(gap_weight=0.0).hypergradient("sampler", state, draw(3))
    for name in alone:  # a hundredth of the whole, and yet exact; so are the labels, a tenth of it
        assert distance({name: alone[name]}, {name: through[name]}) < 1e-10


@pytest.mark.parametrize("gap", ["paired", "batch_mean", "mmd"])
def test_the_gap_is_taken_at_the_response_and_reaches_the_sampler_alone_eq_8(gap: str) -> None:
    scene = Scene()
    state = trained(scene.graph())
    _, direct = scene.upper(state, draw(3), gap)
    with_gap, without = (
        scene.graph(gap=gap, gap_weight=weight).hypergradient("sampler", state, draw(3)) for weight in (GAP, 0.0)
    )
    assert distance({name: with_gap[name] - without[name] for name in without}, direct) < 1e-9


def test_the_part_through_the_response_does_not_know_of_the_gap() -> None:
    scene = Scene()
    state = trained(scene.graph())
    norms = []
    for weight in (0.0, 0.5, 10.0):
        _, metrics = scene.graph(gap_weight=weight).step(state, draw(3))
        norms.append(metrics.norms["sampler"])
    assert norms[0].direct == 0
    assert norms[0].indirect == norms[1].indirect == norms[2].indirect > 0
    torch.testing.assert_close(norms[2].direct, 20 * norms[1].direct)


def test_both_terms_and_their_norms_are_measured_apart() -> None:
    scene = Scene()
    graph = scene.graph()
    state = trained(graph)
    through, direct = scene.upper(state, draw(3))
    _, metrics = graph.step(state, draw(3))
    torch.testing.assert_close(metrics.norms["sampler"].direct, flat(direct).norm())
    torch.testing.assert_close(metrics.norms["sampler"].indirect, flat(through).norm())
    measured = metrics.measured["sampler"]
    torch.testing.assert_close(metrics.losses["sampler"], measured["validation_loss"] + GAP * measured["gap"])


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_several_iterations_are_algorithm_1_written_out(form: str) -> None:
    """l.10 is read as l.6: the retaken step has the same x, y, z and g, and the images of the new φ and ξ."""
    scene = Scene(form)
    graph = scene.graph()
    state = graph.init()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.values["sampler"].items()}
    adam = torch.optim.Adam(leaves.values(), lr=STEP)
    for iteration in range(4):
        batches = draw(iteration)
        theta, velocity, _ = unpacked(state)
        through, direct = scene.upper(state, batches)  # l.7
        for name, leaf in leaves.items():
            leaf.grad = added(through, direct)[name]
        adam.step()  # l.8
        phi = {name: leaf.detach() for name, leaf in leaves.items()}
        batch = batches["classifier"]
        images = scene.foundation(scene.mapped(phi, batch), scene.weights(phi["converter.table"], batch))
        moved, kept = scene.stepped(theta, velocity, images, batch)  # l.11
        state, _ = graph.step(state, batches)
        assert distance(state.values["sampler"], phi) < 1e-9
        assert distance(state.values["classifier"], moved) < 1e-9
        assert distance(state.optimizers["classifier"].moments["momentum"], kept) < 1e-9


def test_thresholds_of_freematch_take_one_step_an_iteration_from_the_images_that_are_kept() -> None:
    scene = Scene()
    graph = scene.graph(loss="freematch")
    state = trained(graph)
    new, _ = graph.step(state, draw(3))
    phi, batch = dict(new.values["sampler"]), draw(3)["classifier"]
    images = scene.foundation(scene.mapped(phi, batch), scene.weights(phi["converter.table"], batch))
    theta = dict(state.values["classifier"])
    said = scene.head(theta, scene.features(theta, weak(images, batch["noise"]["weak"]))).softmax(1)
    before, after = (each.buffers["classifier"]["thresholds.probabilities"] for each in (state, new))
    torch.testing.assert_close(after, 0.999 * before + 0.001 * said.mean(0))
    assert not torch.equal(after, before)


def test_without_weight_it_is_the_base_model() -> None:
    scene = Scene()
    optimizer = mlo.optimizer.SGD(learning_rate=RATE, momentum=MOMENTUM, nesterov=True)
    base = mlo.Graph(
        [mlo.Level("classifier", objective=mp_ssl.classification, variables=scene.classifier, optimizer=optimizer)]
    )
    mixed = scene.graph(weight=0.0)
    one, other = base.init(), mixed.init()
    for iteration in range(3):
        one, _ = base.step(one, {"classifier": draw(iteration)["classifier"]["train"]})
        other, _ = mixed.step(other, draw(iteration))
    assert distance(other.values["classifier"], one.values["classifier"]) < 1e-12


def values_of(scene: Scene, *names: str, **others: nn.Module) -> Values:
    levels = {name: getattr(scene, name) for name in names}
    return Values({name: Fixed(module) for name, module in {**levels, **others}.items()})


@pytest.mark.parametrize("loss", ["scr", "l1", "l2", "smooth_l1"])
def test_losses_of_features_give_the_head_no_gradient(loss: Any) -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    values = values_of(scene, "classifier", "sampler", "foundation")
    total, measured = mp_ssl.semi_supervised(values, batch, weight=3.0, loss=loss)
    slopes = slopes_of(measured["unsupervised_loss"], scene.classifier)
    assert slopes["network.head.weight"] is None
    assert slopes["network.head.bias"] is None
    assert slopes["network.features.1.weight"].norm() > 1e-6
    assert total == measured["real_loss"] + 3.0 * measured["unsupervised_loss"]
    whole, real = (slopes_of(each, scene.classifier)["network.head.weight"] for each in (total, measured["real_loss"]))
    assert torch.equal(whole, real)


def test_pseudo_labels_reach_the_head_and_their_targets_are_fixed() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    scene.classifier.network.head.weight.data *= 100  # sure of everything
    values = values_of(scene, "classifier", "sampler", "foundation")
    images = mp_ssl.unlabelled(values, batch).detach()
    logits = [
        scene.classifier(view)
        for view in (weak(images, batch["noise"]["weak"]), strong(images, batch["noise"]["strong"]))
    ]
    expected = slopes_of(uda(logits[0].detach(), logits[1]), scene.classifier)
    _, measured = mp_ssl.semi_supervised(values, batch, loss="uda")
    found = slopes_of(measured["unsupervised_loss"], scene.classifier)
    assert distance(found, expected) < 1e-12
    assert found["network.head.weight"].norm() > 1e-6
    assert measured["kept"] > 0.5


@pytest.mark.parametrize("fairness_weight", [0.0, 0.05])
def test_freematch_is_that_of_the_block_with_thresholds_of_this_batch(fairness_weight: float) -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    values = values_of(scene, "classifier", "sampler", "foundation")
    images, noise = mp_ssl.unlabelled(values, batch), batch["noise"]
    logits = [scene.classifier(view) for view in (weak(images, noise["weak"]), strong(images, noise["strong"]))]
    thresholds = smooth_network()(thresholds_of=logits[0])
    expected = freematch(*logits, thresholds, fairness_weight=fairness_weight)
    _, measured = mp_ssl.semi_supervised(values, batch, loss="freematch", fairness_weight=fairness_weight)
    torch.testing.assert_close(measured["unsupervised_loss"], expected)
    assert expected != 0


def test_where_unlabelled_images_come_from() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    noise, train = batch["noise"], batch["train"]
    images = mp_ssl.unlabelled(values_of(scene, "foundation"), batch)  # naïve gSSL
    assert torch.equal(images, scene.foundation(noise["z"], noise["labels"]))
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, LABELS))
    images = mp_ssl.unlabelled(values_of(scene, "foundation", foundation_classifier=judge), batch)  # P-SSL, Eq. 5
    logits = judge(train["images"])
    torch.testing.assert_close(images, scene.foundation(noise["z"], logits.exp() / logits.exp().sum(1, keepdim=True)))
    real, foundation = labelled_images(7), labelled_images(8)
    assert mp_ssl.unlabelled(Values(), {**batch, "unlabelled": real}) is real["images"]
    assert mp_ssl.unlabelled(Values(), {**batch, "foundation_images": foundation}) is foundation["images"]


@pytest.mark.parametrize("asking", ["sampler", "foundation_classifier"])
@pytest.mark.parametrize("stream", ["unlabelled", "foundation_images", None])
def test_who_asks_for_images_without_a_foundation_model_is_told_so(asking: str, stream: str | None) -> None:
    """And is not given real ones."""
    batch = draw(0)["classifier"] | ({stream: labelled_images(7)} if stream else {})
    with pytest.raises(mlo.UserError, match=rf"lists '{asking}', and no 'foundation' that makes its images"):
        mp_ssl.unlabelled(values_of(Scene(), **{asking: nn.Identity()}), batch)


class Switched(Fixed):
    """A level whose module has a mode."""

    def forward(self, *args: Any, training: bool = True, **options: Any) -> Any:
        self.module.train(training)
        return self.module(*args, **options)


def test_what_is_frozen_runs_on_running_statistics() -> None:
    scene, batch = Scene(), draw(0)["classifier"]
    foundation = Painter()
    foundation.latents = nn.Sequential(foundation.latents, nn.BatchNorm1d(64))
    judge = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, LABELS))
    levels = {"foundation": foundation, "foundation_classifier": judge}
    ways = (levels, {"foundation": foundation}, {"foundation": foundation, "sampler": scene.sampler})
    for way in ways:
        found = mp_ssl.unlabelled(Values({name: Switched(module) for name, module in way.items()}), batch)
        fixed = {name: Fixed(module.eval()) for name, module in way.items()}
        assert torch.equal(found, mp_ssl.unlabelled(Values(fixed), batch))
        assert (foundation.train()(batch["noise"]["z"], batch["noise"]["labels"]) - found).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["uda", "fixmatch", "freematch"])
def test_what_was_chosen_stays_where_a_step_is_evaluated_again(loss: Any) -> None:
    """Pseudo labels, which of them count, and thresholds: of another classifier the first one's."""
    choices: dict[str, Any] = {}

    class Kept(Values):
        def once(self, name: str, choose: Any) -> Any:
            if name not in choices:
                choices[name] = super().once(name, choose)
            return choices[name]

    scene, batch = Scene(), draw(0)["classifier"]
    scene.classifier.network.head.weight.data *= 100  # sure of everything
    values = values_of(scene, "classifier", "sampler", "foundation")
    mp_ssl.semi_supervised(Kept(values), batch, loss=loss)
    images = mp_ssl.unlabelled(values, batch)
    one, other = (view(images, batch["noise"][name]) for view, name in ((weak, "weak"), (strong, "strong")))
    first = scene.classifier(one).detach()
    thresholds = smooth_network()(thresholds_of=first)
    choose = {
        "uda": uda_targets,
        "fixmatch": fixmatch_targets,
        "freematch": partial(freematch_targets, thresholds=thresholds),
    }
    targets = choose[loss](first)
    scene.classifier.network.head.weight.data = scene.classifier.network.head.weight.data.flip(0) * 0.01
    expected = matched(targets, scene.classifier(other))
    if loss == "freematch":
        expected = expected + 0.05 * fairness(targets, scene.classifier(other), thresholds)
    _, measured = mp_ssl.semi_supervised(Kept(values), batch, loss=loss)
    torch.testing.assert_close(measured["unsupervised_loss"], expected)
    assert expected.abs() > 1e-3


def test_terms_of_weight_zero_are_not_computed() -> None:
    scene, batch = Scene(), draw(0)["sampler"]
    values = values_of(scene, "classifier")  # no foundation and no sampler to be read
    loss, measured = mp_ssl.validation(values, {"validation": batch["validation"]}, gap_weight=0.0)
    assert set(measured) == {"validation_loss"}
    assert loss == measured["validation_loss"]
    with pytest.raises(mlo.UserError, match="both 0"):
        mp_ssl.validation(values, batch, gap_weight=0.0, validation_weight=0.0)


def test_gumbel_numbers_have_the_moments_of_their_distribution() -> None:
    count = 200_000
    numbers = gumbel_noise(count, generator=torch.Generator().manual_seed(0))
    assert numbers.isfinite().all()
    deviation = math.pi / math.sqrt(6)
    assert abs(numbers.mean() - 0.5772156649) < 5 * deviation / math.sqrt(count)
    assert abs(numbers.std() - deviation) < 5 * deviation * 0.0026  # kurtosis 5.4: √(4.4/4n)
    below = (numbers <= 0).double().mean()
    assert abs(below - math.exp(-1)) < 5 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
def test_hard_labels_are_drawn_with_the_probabilities_of_the_table_whatever_the_temperature(temperature: float) -> None:
    count = 20_000
    converter = LabelConverter(classes=2, labels=LABELS, temperature=temperature)
    converter.table.data[1] = torch.linspace(-1.5, 1.5, LABELS)
    gumbel = gumbel_noise(count, LABELS, generator=torch.Generator().manual_seed(1))
    drawn = converter(torch.ones(count, dtype=torch.int64), gumbel)
    assert torch.equal(drawn, nn.functional.one_hot(drawn.argmax(1), LABELS).to(drawn.dtype))  # one-hot, bit for bit
    expected = count * converter.table[1].detach().softmax(0)
    statistic = ((drawn.detach().sum(0) - expected).square() / expected).sum()
    assert statistic < 20.5  # χ² with 5 degrees of freedom: one in a thousand is above


def test_the_derivative_of_a_hard_label_is_that_of_the_soft_one() -> None:
    table, found = torch.randn(CLASSES, LABELS), []
    y, gumbel = torch.arange(IMAGES) % CLASSES, draw(0)["classifier"]["noise"]["gumbel"]
    for form in ("hard", "soft_gumbel"):
        converter = LabelConverter(classes=CLASSES, labels=LABELS, temperature=0.5, form=form)
        converter.table.data = table.clone()
        loss = (converter(y, gumbel) * torch.linspace(-1, 1, IMAGES * LABELS).reshape(IMAGES, LABELS)).sum()
        found.append(torch.autograd.grad(loss, converter.table)[0])
    assert torch.equal(*found)
    assert found[0].norm() > 0.1


def test_a_soft_label_is_the_table_itself_and_sees_no_noise() -> None:
    converter = LabelConverter(classes=CLASSES, labels=LABELS, form="soft")
    converter.table.data = torch.randn(CLASSES, LABELS)
    y, gumbel = torch.arange(IMAGES) % CLASSES, draw(0)["classifier"]["noise"]["gumbel"]
    assert torch.equal(converter(y, gumbel), converter(y, -gumbel))
    torch.testing.assert_close(
        converter(y, gumbel).log() - converter.table[y], -converter.table[y].logsumexp(1, True).expand(-1, LABELS)
    )


@pytest.mark.parametrize("temperature", [1e-1, 1e-3, 1e-5])
def test_between_two_labels_that_are_as_likely_the_derivative_is_a_fourth_of_the_inverse_temperature(
    temperature: float,
) -> None:
    converter = LabelConverter(classes=1, labels=2, temperature=temperature)
    weight = converter(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2))[0, 0]
    slope = torch.autograd.grad(weight, converter.table)[0][0, 0]
    torch.testing.assert_close(slope, torch.tensor(0.25 / temperature))


def test_what_the_refusal_of_small_temperatures_says_is_so() -> None:
    """Batches of 64 draws among 20 labels, float32: those without any gradient at 1e-5, and the live share, about 20 τ."""
    batches, labels = 400, 20
    gumbel = gumbel_noise(64 * batches, labels, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    coefficients = torch.randn(64 * batches, labels, dtype=torch.float32)

    def norms(temperature: float) -> Tensor:
        rows = torch.zeros(64 * batches, labels, requires_grad=True, dtype=torch.float32)
        weights = ((rows + gumbel) / temperature).softmax(1)
        return torch.autograd.grad((weights * coefficients).sum(), rows)[0].norm(dim=1)

    dead = (norms(1e-5).reshape(batches, 64).amax(1) == 0).double().mean()
    assert 0.9 < dead < 0.98
    for temperature in (1e-2, 1e-3):
        live = (norms(temperature) > 1e-6).double().mean()
        assert 15 * temperature < live < 25 * temperature
    with pytest.raises(ValueError, match=r"temperature is 1e-05; .* 94 of 100 batches"):
        mp_ssl.mapper_and_converter(latent=4, classes=2, labels=3, temperature=1e-5)
    assert mp_ssl.mapper_and_converter(latent=4, classes=2, labels=3, temperature=1e-7, degenerate=True)
    with pytest.raises(ValueError, match="temperature is 0"):
        mp_ssl.mapper_and_converter(latent=4, classes=2, labels=3, temperature=0.0)


def test_mapped_latents_start_at_the_size_of_latents() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(2000, 64), torch.arange(2000) % 10
    sizes = [ConditionalMapper(latent=64, classes=10)(z, y).square().mean().item() for _ in range(5)]
    assert 0.6 < min(sizes) < max(sizes) < 1.5
    mapper = ConditionalMapper(latent=64, classes=None)
    assert torch.equal(mapper(z, y), mapper(z, 9 - y))
    assert not any(part.bias.any() for part in mapper.network if isinstance(part, nn.Linear))
    kinds = [type(part).__name__ for part in mapper.network]
    assert kinds == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]


def test_entropies_of_labels_and_their_picture() -> None:
    table = torch.tensor([[0.0, 0.0, 0.0, 0.0], [800.0, 0.0, 0.0, 0.0], [math.log(2), math.log(2), 0.0, -1e3]])
    expected = torch.tensor([math.log(4), 0.0, math.log(5) - 0.8 * math.log(2)])
    torch.testing.assert_close(entropies(table), expected)
    picture = heat_map(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), side=4)
    shades = torch.tensor([[0, 0, 64, 64], [0, 0, 64, 64], [128, 128, 255, 255], [128, 128, 255, 255]])
    assert torch.equal(picture, shades.to(torch.uint8))


def test_a_fixed_level_is_the_same_without_derivatives() -> None:
    seen: dict[str, Any] = {}

    def objective(values: mlo.Values, batch: Tensor) -> Tensor:
        free = values["net"](batch)
        held = values["net"].fixed()(batch)
        assert torch.equal(held, free)
        (seen["slope"],) = torch.autograd.grad(held.sum(), batch, retain_graph=True)
        seen["reaches"] = held.requires_grad and any(
            each is not None
            for each in torch.autograd.grad(held.sum(), [values["net"]["weight"]], allow_unused=True, retain_graph=True)
        )
        return free.square().sum() + held.sum()

    net = nn.Linear(3, 2)
    level = mlo.Level("net", objective=objective, variables=net, optimizer=mlo.optimizer.SGD(learning_rate=0.1))
    graph = mlo.Graph([level])
    x = torch.randn(4, 3).requires_grad_()
    state, _ = graph.step(graph.init(), {"net": x})
    torch.testing.assert_close(seen["slope"], net.weight.detach().sum(0).expand(4, 3))
    assert not seen["reaches"]
    slopes = slopes_of(net(x).square().sum(), net)
    torch.testing.assert_close(state.values["net"]["weight"], net.weight - 0.1 * slopes["weight"])


def test_buffers_that_a_fixed_level_updates_are_not_kept() -> None:
    def objective(values: mlo.Values, batch: Tensor) -> Tensor:
        held = values["net"].fixed()
        one, other = held(batch), held(batch, training=False)
        assert not torch.allclose(one, other)
        return values["net"](batch).square().sum() + one.sum() + other.sum()

    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    level = mlo.Level("net", objective=objective, variables=net, optimizer=mlo.optimizer.SGD(learning_rate=0.1))
    graph = mlo.Graph([level])
    x = torch.randn(6, 3)
    state, _ = graph.step(graph.init(), {"net": x})
    torch.testing.assert_close(state.buffers["net"]["1.running_mean"], 0.1 * net[0](x).mean(0).detach())
    assert state.buffers["net"]["1.num_batches_tracked"] == 1


def test_the_graph_holds_what_the_paper_states() -> None:
    spec = mlo.load(MP_SSL)
    classifier, sampler = spec.levels["classifier"], spec.levels["sampler"]
    assert sampler.objective.yaml() == {"validation": {"gap": "paired", "gap_weight": 10.0}}
    assert sampler.variables.yaml() == {"mapper_and_converter": {"temperature": 0.1}}
    assert sampler.lookahead
    assert dict(classifier.objective.options)["loss"] == "scr"
    assert dict(classifier.optimizer.options)["momentum"] == 0.9
    assert dict(classifier.optimizer.options)["nesterov"] is True
    assert classifier.hypergradient.yaml() == "unroll"
    assert spec.levels["foundation"].frozen


def test_an_oracle_without_unlabelled_images_is_told_so() -> None:
    oracle = ROOT / "graphs" / "mp_ssl" / "oracle_scr.yaml"
    _, problem = mlo.load(oracle, "data.fraction=1.0").build()
    with pytest.raises(mlo.UserError, match=r"fraction is 1\.0, which leaves no image unlabelled"):
        problem.streams["unlabelled"].draw(mlo.stream.Draw(0, "unlabelled", 1))
    _, problem = mlo.load(oracle, "data.foundation=0.0").build()
    with pytest.raises(mlo.UserError, match="foundation is 0; it leaves a foundation model no image"):
        problem.streams["foundation_images"].draw(mlo.stream.Draw(0, "foundation_images", 1))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.foundation_labels=1", "foundation_labels is 1; a label converter chooses among at least 2"),
        ("data.strongest=1.5", "strongest is 1.5; magnitudes lie in"),
        ("data.threshold_decay=1.0", "threshold_decay is 1.0; it must be at least 0 and below 1"),
        ("data.shift=-1", "shift is -1; it is a number of pixels"),
        ("data.validation=0.0", "validation is 0.0; it leaves no image"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str, said: str) -> None:
    with pytest.raises(mlo.UserError, match=said):
        mlo.load(MP_SSL, setting).build()


def test_a_run_keeps_samples_labels_and_distances(tmp_path: Path) -> None:
    p_ssl = ROOT / "graphs" / "mp_ssl" / "p_ssl.yaml"
    short = ["iterations=2", "start.foundation.with.iterations=2", "evaluation.every=1"]
    for path, way, more in (
        (MP_SSL, "found", ["levels.sampler.optimizer.adam.learning_rate=1.0"]),  # so that entropies tell
        (p_ssl, "pseudo", ["start.foundation_classifier.with.iterations=2"]),
    ):
        run = mlo.run(mlo.load(path, *short, *more), tmp_path / way, cache=tmp_path / "start", quiet=True)
        names = {each.name for each in (run.folder / "pictures").iterdir()}
        labels = {"labels.png"} if way == "found" else set()
        assert names == {"features.png", "real.png", "synthetic_uniform.png", f"synthetic_{way}.png"} | labels
        evaluations = [line["evaluation"] for line in run.metrics if "evaluation" in line]
        assert len(evaluations) == 2
        for each in evaluations:
            one, other = (each[f"validation.{name}_feature_frechet_distance"] for name in ("uniform", way))
            assert one != other
            assert min(one, other) > 0
            assert 0 < each["validation.uniform_gap"] != each[f"validation.{way}_gap"] > 0
        if way == "found":
            entropies = [each["validation.label_entropy.3"] for each in evaluations]
            assert math.log(20) - 0.1 > max(entropies)
            assert abs(entropies[0] - entropies[1]) > 1e-3
            measured = [line["measured"]["sampler"] for line in run.metrics if "losses" in line]
            assert all(set(each) == {"validation_loss", "gap"} for each in measured)
            assert [table["title"] for table in run.summary["tables"]] == [
                "500 synthetic images",
                "Foundation labels of each class",
            ]


def test_both_ways_of_asking_beside_each_other_change_no_number(tmp_path: Path) -> None:
    short = ["iterations=2", "start.foundation.with.iterations=2", "evaluation.every=1"]
    more = ["start.foundation_classifier.with.iterations=2", "evaluation.pictures_at=1"]
    graphs = {"alone": (MP_SSL, short), "beside": (ROOT / "graphs" / "mp_ssl" / "samples.yaml", [*short, *more])}
    runs = {
        name: mlo.run(mlo.load(path, *changes), tmp_path / name, cache=tmp_path / "start", quiet=True)
        for name, (path, changes) in graphs.items()
    }
    one, other = (runs[name].summary["metrics"] for name in graphs)
    assert {name.removeprefix("test.").removeprefix("validation.") for name in other.keys() - one.keys()} == {
        "pseudo_gap",
        "pseudo_feature_frechet_distance",
    }
    assert {name: other[name] for name in one} == one
    pictures = runs["beside"].folder / "pictures"
    for folder in (pictures, pictures / "at_1"):
        names = {each.name for each in folder.iterdir()} - {"at_1"}
        assert names == {"features.png", "real.png", "labels.png"} | {
            f"synthetic_{way}.png" for way in ("uniform", "found", "pseudo")
        }
    for name in ("real", "labels", "synthetic_found", "synthetic_uniform"):
        assert (pictures / f"{name}.png").read_bytes() == (
            runs["alone"].folder / "pictures" / f"{name}.png"
        ).read_bytes()
