"""Generators: what they give, their derivatives, and what the engine makes of their buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import mlo
from problems.blocks.generators import (
    AuxiliaryDiscriminator,
    BigGANGenerator,
    ConditionalBatchNorm,
    ConvolutionalDiscriminator,
    ConvolutionalGenerator,
    Diffusion,
    ProjectionDiscriminator,
    ddim,
    discriminators_for,
    generators_for,
    signal,
    spectral,
)
from problems.blocks.generators._abstract import sides, widths
from problems.blocks.image_sets import image_sets

Build = Callable[..., nn.Module]
GENERATORS: dict[str, Build] = {
    "gan": ConvolutionalGenerator,
    "unconditional_gan": partial(ConvolutionalGenerator, labels=None),
    "biggan": BigGANGenerator,
    "diffusion": partial(Diffusion, steps=2),
}
DISCRIMINATORS: dict[str, Build] = {
    "gan": ConvolutionalDiscriminator,
    "unconditional_gan": partial(ConvolutionalDiscriminator, labels=None),
    "biggan": ProjectionDiscriminator,
    "acgan": AuxiliaryDiscriminator,
}


@pytest.fixture(autouse=True)
def in_double_precision() -> object:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def shaken(module: nn.Module, scale: float = 0.2, seed: int = 0) -> nn.Module:
    """`module` away from zeros and ones that it may start from."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def tiny(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "diffusion":
        return shaken(Diffusion(labels=3, size=2, width=2, steps=2), 0.05).eval()
    return shaken(GENERATORS[name](latent=3, size=4, width=2, **({} if "un" in name else {"labels": 3}))).eval()


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 28), (3, 128)])
def test_images_have_the_shape_that_the_generator_says(name: str, channels: int, size: int):
    with torch.device("meta"):
        generator = GENERATORS[name](channels=channels, size=size, width=2)
        latents, labels = torch.empty(3, generator.latent), torch.zeros(3, dtype=torch.int64)
        assert generator(latents, labels).shape == (3, channels, size, size)
        assert (generator.channels, generator.size) == (channels, size)
        assert generator.labels == (None if name == "unconditional_gan" else 10)
        assert name != "diffusion" or generator.latent == channels * size * size


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 28), (3, 128)])
def test_a_discriminator_scores_each_image(name: str, channels: int, size: int):
    with torch.device("meta"):
        discriminator = DISCRIMINATORS[name](channels=channels, size=size, width=2)
        images, labels = torch.empty(3, channels, size, size), torch.zeros(3, dtype=torch.int64)
        found = discriminator(images, labels)
        score, logits = found if name == "acgan" else (found, torch.empty(3, 10))
        assert (score.shape, logits.shape) == ((3,), (3, 10))


def test_sides_and_widths():
    assert sides(8) == (2, 4, 8)
    assert sides(32) == (4, 8, 16, 32)
    assert sides(224) == (7, 14, 28, 56, 112, 224)
    assert sides(9) == (9,)
    assert widths(128, 8) == (128, 128, 64, 32, 16, 8)


def test_paper_sized_biggan_is_the_papers():
    """128×128, ch = 96 (Brock et al. 2019, Tab. 4): six maps from 4×4, of 16, 16, 8, 4, 2 and 1 times 96 channels."""
    with torch.device("meta"):
        generator = BigGANGenerator(latent=120, labels=1000, channels=3, size=128, width=96, embedding=128)
    assert generator.pieces == (20,) * 6
    assert [block.convolution2.out_channels // 96 for block in generator.blocks] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("name", GENERATORS)
def test_images_lie_in_the_unit_interval(name: str):
    generator = shaken(GENERATORS[name](width=4), 1.0)
    images = generator(torch.randn(20, 64), torch.arange(20) % 10)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "unconditional_gan"])
def test_labels_decide_and_may_be_weights(name: str):
    generator = shaken(GENERATORS[name](width=4)).eval()
    latents, labels = torch.randn(1, 64).expand(10, -1), torch.arange(10)
    images = generator(latents, labels)
    assert torch.pdist(images.flatten(1)).min() > 1e-3
    weights = torch.eye(10, requires_grad=True)
    weighed = generator(latents, weights)
    torch.testing.assert_close(weighed, images)
    (gradient,) = torch.autograd.grad(weighed.square().sum(), weights)
    assert (gradient.norm(dim=1) > 0).all()
    with pytest.raises(mlo.UserError, match="needs labels, and none are given"):
        generator(latents)
    with pytest.raises(mlo.UserError, match=r"labels of shape \[9\] for 10 latents"):
        generator(latents, labels[1:])


WITH_LABELS = {"gan": "embedding", "biggan": "embedding", "diffusion": "network.embedding"}
"""Where a family keeps the embeddings of its labels; `acgan` has the generator of `gan`."""


@pytest.mark.parametrize("name", WITH_LABELS)
def test_weights_of_labels_mix_their_embeddings(name: str):
    """Images under weights are those of a generator with one label more, whose embedding is that mixture."""
    torch.manual_seed(2)
    generator, larger = (shaken(GENERATORS[name](width=2, labels=labels)).eval() for labels in (3, 4))
    weights = torch.tensor([0.5, -0.2, 0.7])
    known = generator.state_dict()
    table = known[f"{WITH_LABELS[name]}.weight"]
    larger.load_state_dict({**known, f"{WITH_LABELS[name]}.weight": torch.cat((table, (weights @ table)[None]))})
    latents = torch.randn(4, generator.latent)
    images = generator(latents, weights.expand(4, 3))
    torch.testing.assert_close(images, larger(latents, torch.full((4,), 3)))
    assert (images - generator(latents, torch.zeros(4, dtype=torch.int64))).abs().max() > 1e-3


@pytest.mark.parametrize("name", WITH_LABELS)
def test_first_and_second_derivatives_in_latents_and_weights_together(name: str):
    generator = tiny(name)
    draws = torch.Generator().manual_seed(3)
    latents = torch.randn(2, generator.latent, generator=draws).mul(0.5).requires_grad_()
    weights = torch.rand(2, 3, generator=draws).requires_grad_()
    shown = generator(latents, weights)
    assert ((shown > 0) & (shown < 1)).all()
    assert torch.autograd.gradcheck(generator, (latents, weights))
    assert torch.autograd.gradgradcheck(generator, (latents, weights))
    gradients = torch.autograd.grad(shown.square().sum(), (latents, weights), create_graph=True)
    mixed = torch.autograd.grad(gradients[0].square().sum(), weights)[0]  # ∂²/∂z∂y
    assert mixed.norm() > 1e-6


def test_an_unconditional_generator_does_not_look_at_labels():
    generator, latents = GENERATORS["unconditional_gan"](width=4).eval(), torch.randn(5, 64)
    assert torch.equal(generator(latents), generator(latents, torch.arange(5)))


@pytest.mark.parametrize("name", GENERATORS)
def test_other_latents_are_refused(name: str):
    with pytest.raises(mlo.UserError, match=r"latents of shape \[5, 63\] for a generator whose latent has 64 numbers"):
        GENERATORS[name](width=2)(torch.randn(5, 63), torch.arange(5))


WRONG = [
    (partial(BigGANGenerator, latent=2), "latent is 2; each of 3 pieces of it needs a number"),
    (partial(BigGANGenerator, size=9), "size is 9; the residual blocks double"),
    (partial(Diffusion, latent=63), "latent is 63; it is the first noise, of 1 · 8 · 8 = 64 numbers"),
    (partial(Diffusion, steps=0), "steps is 0"),
    (partial(ConvolutionalGenerator, latent=0), "latent is 0"),
]


@pytest.mark.parametrize(("build", "message"), WRONG, ids=[message.split(";")[0] for _, message in WRONG])
def test_options_that_are_refused(build: Build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", GENERATORS)
def test_first_and_second_derivatives_in_the_latents(name: str):
    generator = tiny(name)
    latents = torch.randn(2, generator.latent, generator=torch.Generator().manual_seed(3)).mul(0.5).requires_grad_()
    images = partial(generator, labels=torch.tensor([2, 0]))
    shown = images(latents)
    assert ((shown > 0) & (shown < 1)).all()  # a clamped pixel has no derivative, and nothing would be tested
    assert torch.autograd.gradcheck(images, latents)
    assert torch.autograd.gradgradcheck(images, latents)


def test_second_derivatives_are_not_zero():
    for name in GENERATORS:
        generator = tiny(name)
        latents = (0.5 * torch.randn(2, generator.latent)).requires_grad_()
        total = generator(latents, torch.tensor([0, 1])).square().sum()
        (first,) = torch.autograd.grad(total, latents, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), latents)
        assert second.norm() > 1e-6


@pytest.mark.parametrize(
    "layer", [nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Embedding(6, 5)], ids=["linear", "conv", "rows"]
)
def test_the_largest_singular_value_is_one(layer: nn.Module):
    layer = spectral(layer.double())
    for _ in range(300):
        weight = layer.weight
    assert torch.linalg.svdvals(weight.detach().flatten(1))[0].item() == pytest.approx(1, abs=1e-9)


def test_spectral_norm_converges_as_its_docstring_says():
    """u starts at an angle θ to the leading vector: 1 − σ̂/σ ≤ tan²θ (σ₂/σ₁)^(2k), for the Rayleigh quotient σ̂² of WWᵀ."""
    torch.manual_seed(0)
    layer = spectral(nn.Linear(6, 4, bias=False))
    part = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original.detach()
    vectors, values, _ = torch.linalg.svd(weight)
    start = part.u = nn.functional.normalize(torch.randn(4), dim=0)
    tangent = math.sqrt(1 - (along := (start @ vectors[:, 0]).item()) ** 2) / abs(along)
    for k in range(1, 12):
        normalised = layer.weight.detach()
        estimate = (weight.norm() / normalised.norm()).item()
        gap = 1 - estimate / values[0].item()
        assert -1e-12 <= gap <= tangent**2 * (values[1] / values[0]).item() ** (2 * k) + 1e-12


def test_the_derivative_of_spectral_norm_is_that_of_the_singular_value():
    torch.manual_seed(0)
    layer = spectral(nn.Linear(6, 4, bias=False))
    for _ in range(500):
        _ = layer.weight
    original = layer.parametrizations.weight.original
    direction = torch.randn(4, 6)
    (found,) = torch.autograd.grad((direction * layer.weight).sum(), original)
    (right,) = torch.autograd.grad((direction * original / torch.linalg.matrix_norm(original, 2)).sum(), original)
    torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)


def test_spectral_norm_moves_its_vector_in_training_mode_only():
    layer = spectral(nn.Linear(6, 4))
    part = layer.parametrizations.weight[0]
    before = part.u
    kept = before.clone()
    layer.eval()(torch.randn(2, 6))
    assert part.u is before
    layer.train()(torch.randn(2, 6))
    assert not torch.equal(part.u, kept)
    assert torch.equal(before, kept)  # a new tensor, not written into


@pytest.mark.parametrize("normalise", [spectral, spectral_norm], ids=["ours", "torch's"])
def test_power_iterations_are_kept_on_real_steps_of_their_own_level_only(normalise: Callable[[nn.Linear], nn.Module]):
    torch.manual_seed(0)
    critic = nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), normalise(nn.Linear(4, 1)))
    untouched = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    data = torch.randn(5, 3)

    def judged(values: mlo.Values, batch: object) -> Tensor:
        return values["critic"](data + values["player"]).square().mean() + values["critic"](data).mean()

    def played(values: mlo.Values, batch: object) -> Tensor:
        return values["critic"](data + values["player"]).mean()

    def level(name: str, objective: object, variables: object, other: str, *, moves: bool) -> mlo.Level:
        optimizer = mlo.optimizer.SGD(learning_rate=0.1) if moves else None
        return mlo.Level(
            name, objective=objective, variables=variables, against=(other,) if moves else (), optimizer=optimizer
        )

    def graph(*, critic_moves: bool, player_moves: bool) -> mlo.Graph:
        return mlo.Graph(
            [
                level("critic", judged, critic, "player", moves=critic_moves),
                level("player", played, torch.zeros(3), "critic", moves=player_moves),
            ]
        )

    both = graph(critic_moves=True, player_moves=True)
    state = both.init(seed=0)
    after, _ = both.step(state, {})

    # By hand: two calls, one power iteration each, on copies.
    copy = nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), normalise(nn.Linear(4, 1)))
    copy.load_state_dict(untouched)
    loss = copy(data).square().mean() + copy(data).mean()
    gradients = torch.autograd.grad(loss, list(copy.parameters()))
    for (name, _), gradient in zip(copy.named_parameters(), gradients, strict=True):
        moved = untouched[name] - 0.1 * gradient
        torch.testing.assert_close(after.values["critic"][name], moved, rtol=1e-12, atol=1e-14)
    for name, buffer in copy.named_buffers():
        torch.testing.assert_close(after.buffers["critic"][name], buffer, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in critic.state_dict().items())

    still = graph(critic_moves=False, player_moves=True)
    state = still.init(seed=0)
    after, _ = still.step(state, {})
    assert not torch.equal(after.values["player"], state.values["player"])
    for name, buffer in state.buffers["critic"].items():
        assert torch.equal(after.buffers["critic"][name], buffer)


def test_conditional_batch_norm_by_hand():
    torch.manual_seed(0)
    norm = ConditionalBatchNorm(3, condition=4)
    x, c = torch.randn(6, 3, 2, 2), torch.randn(6, 4)
    found = norm(x, c)
    gain, bias = (
        norm.gain.weight.detach(),
        norm.bias.weight.detach(),
    )  # one power iteration on, and orthogonal: 1 already
    mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    for n in range(6):
        for channel in range(3):
            plain = (x[n, channel] - mean[channel]) / (variance[channel] + 1e-5).sqrt()
            right = (1 + gain[channel] @ c[n]) * plain + bias[channel] @ c[n]
            torch.testing.assert_close(found[n, channel], right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.norm.running_mean, 0.1 * mean)
    running = 0.9 + 0.1 * x.var(dim=(0, 2, 3))
    plain = (x[0, 1] - 0.1 * mean[1]) / (running[1] + 1e-5).sqrt()
    right = (1 + gain[1] @ c[0]) * plain + bias[1] @ c[0]
    torch.testing.assert_close(norm.eval()(x, c)[0, 1], right, rtol=1e-9, atol=1e-9)


MEAN, DEVIATION = 0.4, 0.3


def exact_velocity(schedule: str) -> Callable[[Tensor, Tensor], Tensor]:
    """E[v | x_t] where images are N(MEAN, DEVIATION²): of a Gaussian the conditional means are linear in x_t."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        share = signal(t, schedule)
        off = (x - share.sqrt() * MEAN) / (share * DEVIATION**2 + 1 - share)
        image, noise = MEAN + share.sqrt() * DEVIATION**2 * off, (1 - share).sqrt() * off
        return share.sqrt() * noise - (1 - share).sqrt() * image

    return velocity


def flowed(x: Tensor, schedule: str) -> Tensor:
    """Where the probability flow takes x from t = 1: (x_t − √ᾱ_t μ)/√(ᾱ_t s² + 1 − ᾱ_t) is the same at all times."""
    share = signal(torch.ones(1), schedule)
    return MEAN + DEVIATION * (x - share.sqrt() * MEAN) / (share * DEVIATION**2 + 1 - share).sqrt()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddim_follows_the_probability_flow_of_a_gaussian(schedule: str):
    x = torch.linspace(-2, 2, 9)
    errors = [
        (ddim(exact_velocity(schedule), x, schedule=schedule, steps=steps) - flowed(x, schedule)).abs().max().item()
        for steps in (100, 200, 400)
    ]
    assert errors[2] < 0.01
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.15)  # first order


def test_ddim_gives_the_moments_of_a_gaussian():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = ddim(exact_velocity("cosine"), x, schedule="cosine", steps=400)
    assert found.mean().item() == pytest.approx(MEAN + DEVIATION * x.mean().item(), abs=5e-3)
    assert found.std().item() == pytest.approx(DEVIATION * x.std().item(), rel=0.02)


def test_ddim_knows_a_single_image_in_one_step():
    """All images alike: x̂₀ is right at any noise, so that one step arrives and its derivative in the noise is zero."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        share = signal(t, "cosine")
        noise = (x - share.sqrt() * MEAN) / (1 - share).sqrt()
        return share.sqrt() * noise - (1 - share).sqrt() * MEAN

    x = torch.linspace(-2, 2, 9, requires_grad=True)
    found = ddim(velocity, x, schedule="cosine", steps=1)
    torch.testing.assert_close(found.detach(), torch.full((9,), MEAN))
    assert torch.autograd.grad(found.sum(), x)[0].abs().max() < 1e-12


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_signal_falls_from_one_to_nothing(schedule: str):
    share = signal(torch.linspace(0, 1, 101), schedule)
    assert share[0] == 1
    assert (share.diff() < 0).all()
    assert 0 <= share[-1] < 1e-4


@pytest.mark.parametrize("name", GENERATORS)
def test_a_level_leaves_the_module_as_it_was(name: str):
    torch.manual_seed(0)
    generator = GENERATORS[name](width=2)
    before = {key: tensor.clone() for key, tensor in generator.state_dict().items()}
    latents, labels = torch.randn(4, 64), torch.arange(4)

    def objective(values: mlo.Values, batch: object) -> Tensor:
        return (values["generator"](latents, labels) - 0.3).square().mean()

    optimizer = mlo.optimizer.SGD(learning_rate=0.1)
    graph = mlo.Graph([mlo.Level("generator", objective=objective, variables=generator, optimizer=optimizer)])
    state = graph.init(seed=0)
    kept = {key: tensor.clone() for key, tensor in {**state.values["generator"], **state.buffers["generator"]}.items()}
    after, _ = graph.step(state, {})
    assert all(torch.equal(tensor, before[key]) for key, tensor in generator.state_dict().items())
    now = {**state.values["generator"], **state.buffers["generator"]}
    assert all(torch.equal(tensor, kept[key]) for key, tensor in now.items())
    new = {**after.values["generator"], **after.buffers["generator"]}
    assert any(not torch.equal(tensor, kept[key]) for key, tensor in new.items())


def test_every_name_builds_on_digits():
    found = image_sets("digits", seed=0)
    own = {
        name: make
        for name, make in generators_for(found).items()
        if name not in ("torchscript", "exported", "imported")
    }
    assert set(own) == {"gan", "acgan", "biggan", "unconditional_gan", "diffusion"}
    for make in own.values():
        assert make()(torch.randn(2, 64), torch.arange(2)).shape == (2, 1, 8, 8)
    for name, make in discriminators_for(found).items():
        assert name.removesuffix("_discriminator") in own
        make()(torch.rand(2, 1, 8, 8), torch.arange(2))
    assert generators_for(found, latent=12)["gan"]().latent == 12
    assert generators_for(found, labels=20)["gan"]().labels == 20
    with pytest.raises(ValueError, match="latent is 12"):
        generators_for(found, latent=12)["diffusion"]()
