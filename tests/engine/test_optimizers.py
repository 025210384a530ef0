"""The optimizers against `torch.optim`, step for step, and what it means to differentiate through them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    adam_by_hand,
    adamw_by_hand,
    normal,
    relative_error,
    respond_by_hand,
    rmsprop_by_hand,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st

import mlo
from mlo.optimizer import SGD, Adam, AdamW, RMSprop

torch_twins = [  # ours, and torch's with the same settings
    (SGD(learning_rate=0.1), torch.optim.SGD, {"lr": 0.1}),
    (SGD(learning_rate=0.1, weight_decay=0.03), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.03}),
    (SGD(learning_rate=0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (
        SGD(learning_rate=0.1, momentum=0.9, dampening=0.4),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
    ),
    (
        SGD(learning_rate=0.05, momentum=0.8, dampening=0.2, weight_decay=0.01),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.01},
    ),
    (
        SGD(learning_rate=0.1, momentum=0.9, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    (
        SGD(learning_rate=0.01, momentum=0.7, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
    ),
    (Adam(), torch.optim.Adam, {}),
    (Adam(learning_rate=0.05, weight_decay=0.02), torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.02}),
    (
        Adam(learning_rate=0.01, beta1=0.5, beta2=0.9, epsilon=1e-4),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4},
    ),
    (Adam(learning_rate=0.01, beta1=0.0, beta2=0.99), torch.optim.Adam, {"lr": 0.01, "betas": (0.0, 0.99)}),
    (AdamW(), torch.optim.AdamW, {}),
    (AdamW(learning_rate=0.1, weight_decay=0.2), torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}),
    (AdamW(weight_decay=0.0), torch.optim.AdamW, {"weight_decay": 0.0}),
    (
        AdamW(learning_rate=0.01, beta1=0.5, beta2=0.9, epsilon=1e-4),
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4},
    ),
    (RMSprop(), torch.optim.RMSprop, {}),
    (RMSprop(learning_rate=0.1, alpha=0.9, epsilon=1e-3), torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.9, "eps": 1e-3}),
    (RMSprop(momentum=0.8), torch.optim.RMSprop, {"momentum": 0.8}),
    (RMSprop(weight_decay=0.1), torch.optim.RMSprop, {"weight_decay": 0.1}),
    (RMSprop(centered=True), torch.optim.RMSprop, {"centered": True}),
    (
        RMSprop(learning_rate=0.02, alpha=0.8, momentum=0.9, weight_decay=0.05, centered=True, epsilon=1e-6),
        torch.optim.RMSprop,
        {"lr": 0.02, "alpha": 0.8, "momentum": 0.9, "weight_decay": 0.05, "centered": True, "eps": 1e-6},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("ours", "theirs", "options"), torch_twins)
def test_equals_torch_bit_for_bit_over_100_steps(ours, theirs, options, dtype):
    """On a tree with a matrix, a vector, an empty and a zero-dimensional tensor; some gradients are exactly zero."""
    shapes = {"matrix": (7, 5), "vector": (40,), "number": (), "nothing": (0, 3)}
    parameters = {name: normal(*shape, seed=place).to(dtype) for place, (name, shape) in enumerate(shapes.items())}
    twins = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    twin = theirs(twins.values(), **options)
    state = ours.init(parameters)
    for step in range(100):
        scale = 10.0 ** (step % 7 - 3)
        gradient = {
            name: (scale * normal(*shape, seed=1000 + 10 * step + place)).to(dtype)
            for place, (name, shape) in enumerate(shapes.items())
        }
        gradient["vector"][:3] = 0.0
        before = {name: tensor.clone() for name, tensor in parameters.items()}
        updated, later = ours.update(gradient, state, parameters)
        assert same_bits(parameters, before), "the arguments are left as they are"
        parameters, state = updated, later
        for name, tensor in twins.items():
            tensor.grad = gradient[name].clone()
        twin.step()
        assert same_bits(parameters, {name: tensor.detach() for name, tensor in twins.items()}), f"step {step}"
    assert state.count == 100


def test_a_level_takes_the_steps_that_torch_takes():
    """A whole run of a graph with one level, a network on batches of its own, against a training loop."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    twin = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    twin.load_state_dict(network.state_dict())

    def loss(run: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(run(batch), torch.arange(6) % 3)

    level = mlo.Level(
        "w",
        objective=lambda values, batch: loss(values["w"], batch),
        variables=network,
        optimizer=SGD(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        steps=2,
    )
    graph = mlo.Graph([level])
    state = graph.init()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for iteration in range(20):
        draws = normal(2, 6, 4, seed=iteration)
        state, metrics = graph.step(state, {"w": mlo.Batches(list(draws))})
        for draw in draws:
            optimizer.zero_grad()
            last = loss(twin, draw)
            last.backward()
            optimizer.step()
        assert metrics.losses["w"] == last.detach()
    assert same_bits(state.values["w"], {name: tensor.detach() for name, tensor in twin.named_parameters()})
    assert same_bits(dict(graph.module("w", state).state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("method", [mlo.hypergradient.Unroll(), mlo.hypergradient.FiniteDifference(radius=1e-4)])
def test_adam_where_a_gradient_is_exactly_zero(method, steps):
    """Entries that no gradient ever reaches pass nothing back, and no NaN; the others are as if they were alone."""

    def inner(values: Any, batch: Any) -> torch.Tensor:
        w, u = values["w"], values["u"]
        dead = torch.relu(-1.0 - w["all"][:2].square())  # a ReLU that is off: a gradient of exactly zero
        return (w["all"][2:] * u).exp().sum() + (dead * u[:2]).sum() + 0.0 * w["unused"].sum()

    live = normal(3, seed=1)
    w = mlo.Level(
        "w",
        objective=inner,
        variables={"all": torch.cat([torch.zeros(2), live]), "unused": torch.ones(2)},
        given=["u"],
        optimizer=Adam(learning_rate=0.05, epsilon=1e-2),
        steps=steps,
        hypergradient=method,
    )
    upper = mlo.Level(
        "u",
        objective=lambda values, batch: values["w"]["all"].square().sum() + values["w"]["unused"].sum(),
        variables=normal(3, seed=2),
        subject_to=["w"],
        optimizer=SGD(learning_rate=0.1),
    )
    graph = mlo.Graph([w, upper])
    state = graph.init()
    found = graph.hypergradient("u", state)
    u = normal(3, seed=2).requires_grad_()
    update, start, memory = adam_by_hand(0.05, epsilon=1e-2), live, None
    if isinstance(method, mlo.hypergradient.FiniteDifference):  # the last step alone; earlier ones at a constant u
        start, memory, steps = _after(live, u.detach(), steps - 1), _memory_after(live, u.detach(), steps - 1), 1
    end = respond_by_hand(lambda own, _: (own * u).exp().sum(), start, update, steps, memory)
    (right,) = torch.autograd.grad(end.square().sum(), u)
    assert relative_error(found, right) <= (1e-12 if isinstance(method, mlo.hypergradient.Unroll) else 1e-6)
    after, _ = graph.step(state)
    assert torch.equal(after.values["w"]["all"][:2], torch.zeros(2))
    assert torch.equal(after.values["w"]["unused"], torch.ones(2))


through_zero = [  # the engine's, by hand
    (AdamW(learning_rate=0.05, weight_decay=0.1, epsilon=1e-2), adamw_by_hand(0.05, 0.1, epsilon=1e-2)),
    (AdamW(learning_rate=0.05), adamw_by_hand(0.05, 0.01)),
    (RMSprop(learning_rate=0.05, epsilon=1e-2), rmsprop_by_hand(0.05, epsilon=1e-2)),
    (RMSprop(learning_rate=0.01), rmsprop_by_hand(0.01)),
    (
        RMSprop(learning_rate=0.01, alpha=0.9, momentum=0.9, centered=True),
        rmsprop_by_hand(0.01, 0.9, momentum=0.9, centered=True),
    ),
]


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(("ours", "by_hand"), through_zero)
def test_unrolling_equals_autograd_and_zero_gradients_pass_nothing_on(ours, by_hand, steps):
    """The entries that always have a zero gradient are left out of the computation by hand: autograd has NaN there."""

    def inner(values: Any, batch: Any) -> torch.Tensor:
        w, u = values["w"], values["u"]
        return (w[2:] * u).exp().sum() + w[2:].square().sum() + (torch.relu(-1.0 - w[:2].square()) * u[:2]).sum()

    live = normal(3, seed=1)
    w = mlo.Level(
        "w",
        objective=inner,
        variables=torch.cat([torch.zeros(2), live]),
        given=["u"],
        optimizer=ours,
        steps=steps,
    )
    upper = mlo.Level(
        "u",
        objective=lambda values, batch: values["w"].square().sum() + values["w"].sum(),
        variables=normal(3, seed=2),
        subject_to=["w"],
        optimizer=SGD(learning_rate=0.1),
    )
    graph = mlo.Graph([w, upper])
    u = normal(3, seed=2).requires_grad_()
    end = respond_by_hand(lambda own, _: (own * u).exp().sum() + own.square().sum(), live, by_hand, steps)
    (right,) = torch.autograd.grad(end.square().sum() + end.sum(), u)
    assert relative_error(graph.hypergradient("u", graph.init()), right) <= 1e-8


def test_centered_rmsprop_stays_finite_where_rounding_makes_the_variance_negative():
    """A constant gradient: v − ḡ² comes down to rounding error, of either sign."""
    ours, w, g = RMSprop(alpha=0.5, centered=True), torch.zeros(50), torch.linspace(0.1, 7.3, 50)
    state = ours.init(w)
    for _ in range(200):
        w, state = ours.update(g, state, w)
    assert (state.moments["square"] - state.moments["mean"].square()).min() < 0
    assert torch.isfinite(w).all()


def _after(live: torch.Tensor, u: torch.Tensor, steps: int) -> torch.Tensor:
    return respond_by_hand(lambda own, _: (own * u).exp().sum(), live, adam_by_hand(0.05, epsilon=1e-2), steps).detach()


def _memory_after(live: torch.Tensor, u: torch.Tensor, steps: int) -> Any:
    """By torch's own Adam."""
    twin = live.clone().requires_grad_()
    optimizer = torch.optim.Adam([twin], lr=0.05, eps=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (twin * u).exp().sum().backward()
        optimizer.step()
    kept = optimizer.state[twin] if steps else {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    return steps, {"first": {"": kept["exp_avg"]}, "second": {"": kept["exp_avg_sq"]}}


def test_settings_are_values():
    assert SGD(learning_rate=0.1, momentum=0.9) == SGD(learning_rate=0.1, momentum=0.9)
    assert Adam() != Adam(beta1=0.8)
    assert hash(Adam()) == hash(Adam(learning_rate=1e-3))
    with pytest.raises(AttributeError):
        Adam().learning_rate = 1.0
    with pytest.raises(TypeError):
        SGD(0.1)


out_of_range = st.floats(max_value=-1e-12) | st.just(float("nan"))
not_a_fraction = st.floats(min_value=1.0) | st.floats(max_value=-1e-12) | st.just(float("nan"))


@given(value=out_of_range | st.just(0.0))
def test_learning_rates_must_be_positive(value):
    for make in (SGD, Adam, AdamW, RMSprop):
        with pytest.raises(ValueError, match="learning_rate must be positive"):
            make(learning_rate=value)
    with pytest.raises(ValueError, match="radius must be positive"):
        mlo.hypergradient.FiniteDifference(radius=value)


@given(value=out_of_range)
def test_decays_must_not_be_negative(value):
    for optimizer in (SGD(learning_rate=0.1), Adam(), AdamW(), RMSprop()):
        with pytest.raises(ValueError, match="weight_decay must be at least 0"):
            replace(optimizer, weight_decay=value)
    for make in (Adam, AdamW, RMSprop):
        with pytest.raises(ValueError, match="epsilon must be at least 0"):
            make(epsilon=value)


@given(value=not_a_fraction)
def test_momenta_must_be_below_one(value):
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        SGD(learning_rate=0.1, momentum=value)
    for make in (Adam, AdamW):
        for beta in ("beta1", "beta2"):
            with pytest.raises(ValueError, match=f"{beta} must be"):
                make(**{beta: value})
    for option in ("alpha", "momentum"):
        with pytest.raises(ValueError, match=f"{option} must be"):
            RMSprop(**{option: value})


@pytest.mark.parametrize("options", [{}, {"dampening": 0.1, "momentum": 0.9}])
def test_nesterov_needs_momentum_and_no_dampening(options):
    with pytest.raises(ValueError, match="nesterov needs momentum above 0 and dampening 0"):
        SGD(learning_rate=0.1, nesterov=True, **options)
