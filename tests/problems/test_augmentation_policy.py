"""Policies of augmentation: Eqs. 8 and 9 of Hataya et al. 2022 written out, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.augmentation import OPERATIONS, Policy, apply, draws_for

BRIGHTNESS = OPERATIONS.index("brightness")
INVERT = OPERATIONS.index("invert")
SMOOTH = [k for k, name in enumerate(OPERATIONS) if name not in ("equalize", "solarize", "posterize")]
NEVER = -1e3  # before the softmax
sized = pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 20)], ids=str)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(count: int, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.rand(count, *shape, generator=generator(7))


def mixed_policy(*, stages: int = 2, temperature: float = 0.5, seed: int = 3) -> Policy:
    """All its parameters different."""
    policy, numbers = Policy(stages=stages, temperature=temperature), generator(seed)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=numbers)
    return policy


def always(operation: int, *, temperature: float = 0.1, probability: float = 0.5) -> Policy:
    """One stage that always selects one operation."""
    policy = Policy(stages=1, temperature=temperature)
    policy.selection.data.fill_(NEVER)
    policy.selection.data[0, operation] = 0
    policy.probability.data.fill_(math.log(probability / (1 - probability)))
    return policy


# parameters and draws


def test_parameters_start_as_the_paper_says():
    policy = Policy(stages=3, initial=0.25)
    assert {name: tuple(value.shape) for name, value in policy.named_parameters()} == {
        "probability": (3, 14),
        "magnitude": (3, 14),
        "selection": (3, 14),
    }
    assert torch.allclose(policy.probabilities(), torch.tensor(0.25))
    assert torch.allclose(policy.magnitudes(), torch.tensor(0.25))
    assert torch.allclose(policy.selections(), torch.tensor(1 / 14))
    assert (Policy().magnitude == 0).all()  # 0.5, exactly


def test_draws_are_data_of_the_documented_shapes_and_distributions():
    draws = draws_for(20_000, stages=2, generator=generator())
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "application": (20_000, 2),
        "selection": (20_000, 2, 14),
        "signs": (20_000, 2),
    }
    again = draws_for(20_000, stages=2, generator=generator())
    assert all(torch.equal(draws[name], again[name]) for name in draws)
    assert 0 < draws["application"].min() <= draws["application"].max() < 1
    assert draws["application"].mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 40_000))
    assert draws["selection"].isfinite().all()
    gumbel = draws["selection"]
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=4 * math.pi / math.sqrt(6 * gumbel.numel()))
    assert set(draws["signs"].flatten().tolist()) == {-1.0, 1.0}
    assert draws["signs"].mean().item() == pytest.approx(0, abs=4 / math.sqrt(40_000))


# Eqs. 8 and 9


def written_out(policy: Policy, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Eqs. 8 and 9, image by image and stage by stage."""
    out: list[Tensor] = []
    for n, image in enumerate(images):
        x = image[None]
        for k in range(policy.stages):
            pi, p, mu = policy.selections()[k], policy.probabilities()[k], policy.magnitudes()[k]
            u = ((pi.log() + draws["selection"][n, k]) / policy.temperature).softmax(0)
            i = int(u.argmax())
            v = draws["application"][n, k]
            b = torch.sigmoid(((p[i] / (1 - p[i])).log() + (v / (1 - v)).log()) / policy.temperature)
            changed = apply(OPERATIONS[i], x, mu[i][None], draws["signs"][n, k][None])
            x = u[i] / u[i].detach() * (b * changed + (1 - b) * x)
        out.append(x)
    return torch.cat(out)


@sized
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_equations(shape, stages):
    policy, images = mixed_policy(stages=stages), images_of(40, shape).requires_grad_()
    draws = draws_for(40, stages=stages, generator=generator())
    assert len(policy.choices(draws).unique()) > 8
    weights = torch.randn(images.shape, generator=generator(5))
    wanted = [*policy.parameters(), images]
    ours, theirs = policy(images, draws), written_out(policy, images, draws)
    assert torch.allclose(ours, theirs, atol=1e-12)
    by_policy = torch.autograd.grad((weights * ours.square()).sum(), wanted)
    by_equations = torch.autograd.grad((weights * theirs.square()).sum(), wanted)
    for one, other in zip(by_policy, by_equations, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_application_is_the_relaxed_bernoulli_variable():
    """b read off a constant image that is made brighter: x + b · 0.9 μ s x."""
    policy = always(BRIGHTNESS, temperature=0.3, probability=0.7)
    draws = draws_for(500, stages=1, generator=generator())
    out = policy(torch.full((500, 1, 2, 2), 0.25), draws)[:, 0, 0, 0]
    b = (out - 0.25) / (0.25 * 0.9 * 0.5 * draws["signs"][:, 0])
    v = draws["application"][:, 0].double()
    assert torch.allclose(b, torch.sigmoid(((0.7 / 0.3 * v / (1 - v)).log()) / 0.3), atol=1e-9)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_in_the_limit_of_temperature_zero_an_operation_is_applied_with_probability_p(probability):
    count = 20_000
    policy = always(INVERT, temperature=1e-6, probability=probability)
    out = policy(torch.full((count, 1, 1, 1), 0.25), draws_for(count, stages=1, generator=generator()))
    applied = ((out - 0.25) / 0.5).flatten()
    assert ((applied < 1e-9) | (applied > 1 - 1e-9)).double().mean() > 0.999
    deviation = math.sqrt(probability * (1 - probability) / count)
    assert applied.mean().item() == pytest.approx(probability, abs=4 * deviation)


def test_operations_are_selected_with_probability_pi():
    policy, count = mixed_policy(stages=2), 20_000
    chosen = policy.choices(draws_for(count, stages=2, generator=generator()))
    for stage, pi in enumerate(policy.selections()):
        frequency = chosen[:, stage].bincount(minlength=14) / count
        assert ((frequency - pi).abs() <= 4 * (pi * (1 - pi) / count).sqrt() + 1e-9).all()


def test_the_gradient_in_the_selection_is_the_papers_estimate():
    """∂/∂s_j of Σ_n L_n is Σ_n ⟨∂L/∂x_n, x_n⟩ (δ_ij − u_j)/τ for π = softmax(s), x_n what comes out."""
    policy, images = mixed_policy(stages=1, temperature=0.4), images_of(50)
    draws = draws_for(50, stages=1, generator=generator())
    weights = torch.randn(images.shape, generator=generator(5))
    out = policy(images, draws)
    (gradient,) = torch.autograd.grad((weights * out.square()).sum(), policy.selection)
    along = (2 * weights * out * out).sum((1, 2, 3)).detach()
    u = ((policy.selections().log() + draws["selection"][:, 0]) / 0.4).softmax(1)
    chosen = torch.nn.functional.one_hot(u.argmax(1), 14)
    assert torch.allclose(gradient[0], (along[:, None] * (chosen - u)).sum(0) / 0.4)


def test_its_expectation_over_selections_is_an_integral():
    """Two operations in the race: log u₁ − log u₂ = (s₁ − s₂ + ℓ)/τ with ℓ logistic, integrated over its quantiles."""
    temperature, count = 0.5, 40_000
    policy = Policy(stages=1, temperature=temperature)
    policy.selection.data.fill_(NEVER)
    policy.selection.data[0, INVERT], policy.selection.data[0, BRIGHTNESS] = 0.3, -0.2
    policy.probability.data.fill_(1e3)  # b = 1
    draws = draws_for(count, stages=1, generator=generator())
    draws["signs"].fill_(1)
    image, loss = torch.full((count, 1, 1, 1), 0.3), lambda x: x.square().sum()
    per_image = torch.autograd.functional.jacobian(
        lambda s: functional_call(policy, {"selection": s}, (image, draws)).square().flatten().mean(), policy.selection
    )[0]
    quantiles = (torch.arange(100_000) + 0.5) / 100_000
    difference = 0.5 + (quantiles / (1 - quantiles)).log()
    u1 = torch.sigmoid(difference / temperature)
    inverted, brighter = 0.7, 0.3 * 1.45
    along = torch.where(difference > 0, 2 * inverted**2, 2 * brighter**2)
    samples = along * torch.where(difference > 0, 1 - u1, -u1) / temperature
    deviation = samples.std().item() / math.sqrt(count)
    assert per_image[INVERT].item() == pytest.approx(samples.mean().item(), abs=4 * deviation)
    assert per_image[BRIGHTNESS].item() == pytest.approx(-samples.mean().item(), abs=4 * deviation)
    # Not the derivative of the expected loss in s₁, π₁ π₂ (L₁ − L₂): it says in which direction, not how steep.
    pi = policy.selections()[0]
    expected = pi[INVERT] * pi[BRIGHTNESS] * (loss(torch.tensor(inverted)) - loss(torch.tensor(brighter)))
    assert abs(samples.mean() - expected) > 10 * deviation


def test_stages_act_one_after_the_other():
    policy, images = mixed_policy(stages=2), images_of(30)
    draws = draws_for(30, stages=2, generator=generator())
    by_stage = images
    for stage in range(2):
        single = Policy(stages=1, temperature=0.5)
        for name, parameter in single.named_parameters():
            parameter.data = policy.get_parameter(name).data[stage : stage + 1]
        by_stage = single(by_stage, {name: draw[:, stage : stage + 1] for name, draw in draws.items()})
    assert torch.equal(policy(images, draws), by_stage)


# what follows


@sized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images_keep_range_shape_and_dtype(shape, dtype):
    images = images_of(300, shape).round(decimals=1).to(dtype)  # black and white pixels among them
    for policy in (mixed_policy(temperature=0.1), mixed_policy(temperature=1.0).to(dtype)):
        out = policy(images, draws_for(300, stages=2, generator=generator()))
        assert (out.shape, out.dtype) == (images.shape, dtype)
        assert out.min() >= 0
        assert out.max() <= 1


@sized
def test_a_policy_is_a_pure_function_of_images_parameters_and_draws(shape):
    policy, images = mixed_policy(), images_of(30, shape)
    draws = draws_for(30, stages=2, generator=generator())
    before = {name: value.clone() for name, value in (policy.state_dict() | draws | {"images": images}).items()}
    first = policy(images, draws)
    torch.rand(1)  # the global generator has no say
    assert torch.equal(policy(images, draws), first)
    assert torch.equal(functional_call(policy, dict(policy.named_parameters()), (images, draws)), first)
    assert not torch.equal(policy(images, draws_for(30, stages=2, generator=generator(1))), first)
    after = policy.state_dict() | draws | {"images": images}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@sized
def test_an_image_does_not_depend_on_the_others(shape):
    policy, images = mixed_policy(), images_of(30, shape)
    draws = draws_for(30, stages=2, generator=generator())
    together = policy(images, draws)
    for n in range(30):
        alone = policy(images[n : n + 1], {name: draw[n : n + 1] for name, draw in draws.items()})
        assert torch.equal(alone, together[n : n + 1])


@pytest.mark.parametrize("parameter", ["probability", "magnitude"])
def test_probability_or_magnitude_zero_is_the_identity_bit_for_bit(parameter):
    policy, images = mixed_policy(temperature=0.1), images_of(100, (3, 17, 20))
    policy.get_parameter(parameter).data.fill_(NEVER)
    assert torch.equal(policy(images, draws_for(100, stages=2, generator=generator())), images)


def test_probability_one_is_the_operation_itself():
    policy, images = always(INVERT), images_of(20)
    policy.probability.data.fill_(-NEVER)
    assert torch.allclose(policy(images, draws_for(20, stages=1, generator=generator())), 1 - images)


def test_no_images_are_no_images():
    empty = torch.rand(0, 1, 8, 8)
    assert Policy()(empty, draws_for(0, stages=2, generator=generator())).shape == empty.shape


# derivatives that a hypergradient needs


def test_cross_products_are_those_of_central_differences():
    """(∂²L/∂θ∂φ)ᵀ q by double backward, in p of all operations and in μ of the smooth ones, on a tanh classifier."""
    policy, images = mixed_policy(temperature=0.5), images_of(60)
    draws, labels = draws_for(60, stages=2, generator=generator()), torch.arange(60) % 10
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))
    theta = tuple(classifier.parameters())
    numbers = generator(2)
    for value in theta:
        value.data = torch.randn(value.shape, generator=numbers) / 3
    q = [torch.randn(value.shape, generator=numbers) for value in theta]

    def along_q() -> Tensor:
        loss = cross_entropy(classifier(policy(images, draws)), labels)
        gradients = torch.autograd.grad(loss, theta, create_graph=True)
        return torch.stack([(g * v).sum() for g, v in zip(gradients, q, strict=True)]).sum()

    exact = torch.autograd.grad(along_q(), (policy.probability, policy.magnitude))
    # A magnitude in the first stage also acts through what the second makes of the image, in steps for some.
    entries = [(policy.probability, exact[0], 1, k) for k in range(14)] + [
        (policy.magnitude, exact[1], 1, k) for k in SMOOTH
    ]
    for parameter, gradient, stage, k in entries:
        start = parameter.data[stage, k].item()
        sides: list[float] = []
        for side in (1e-6, -1e-6):
            parameter.data[stage, k] = start + side
            sides.append(along_q().item())
        parameter.data[stage, k] = start
        assert gradient[stage, k].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-8)


# mistakes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stages": 0}, "stages=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"initial": 1.0}, "initial=1.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(mlo.UserError, match=message):
        Policy(**setting)


def test_draws_for_something_else_are_refused():
    with pytest.raises(mlo.UserError, match=r"\[4, 2, 14\].*\[4, 1, 14\]"):
        Policy(stages=2)(images_of(4), draws_for(4, stages=1, generator=generator()))
