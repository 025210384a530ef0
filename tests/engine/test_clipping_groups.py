"""Clipping against `torch.nn.utils`, parameter groups against torch's, and derivatives through both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st

import mlo
from mlo.hypergradient import FiniteDifference, Unroll
from mlo.optimizer import SGD, Adam, AdamW, RMSprop, initial, is_decoupled, l2_decays, updated
from mlo.schedule import Constant

torch_twins = [
    (SGD, {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (Adam, {"learning_rate": 0.1, "weight_decay": 0.1}, torch.optim.Adam, {"lr": 0.1}),
    (AdamW, {"learning_rate": 0.1, "weight_decay": 0.1}, torch.optim.AdamW, {"lr": 0.1}),
    (RMSprop, {"learning_rate": 0.1, "weight_decay": 0.1}, torch.optim.RMSprop, {"lr": 0.1}),
]
SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (2, 7), "1.bias": (2,)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: scale * normal(*shape, seed=seed + place) for place, (name, shape) in enumerate(SHAPES.items())}


@pytest.mark.parametrize(("clip_norm", "clip_value"), [(0.5, None), (None, 0.1), (0.5, 0.1)])
@pytest.mark.parametrize(("kind", "options", "theirs", "torch_options"), torch_twins)
def test_clipping_equals_torch_over_100_steps(kind, options, theirs, torch_options, clip_norm, clip_value):
    """Before the decay is added, over all tensors together; some gradients are short, some long, one is zero."""
    ours = kind(**options, clip_norm=clip_norm, clip_value=clip_value)
    parameters = tensors(0)
    twins = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    twin = theirs(twins.values(), **torch_options, weight_decay=0.1)
    state = initial(ours, parameters)
    for step in range(100):
        gradient = tensors(100 + 10 * step, scale=0.0 if step == 3 else 10.0 ** (step % 5 - 4))
        parameters, state = updated(ours, step + 1, gradient, state, parameters)
        for name, tensor in twins.items():
            tensor.grad = gradient[name].clone()
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(twins.values(), clip_value)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(twins.values(), clip_norm)
        twin.step()
        right = {name: tensor.detach() for name, tensor in twins.items()}
        assert relative_error(parameters, right) <= (1e-13 if clip_norm else 0.0)


@given(
    scale=st.floats(1e-6, 1e6),
    clip_norm=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_a_clipped_gradient_is_no_longer_than_asked(scale, clip_norm, seed):
    gradient = {"a": scale * normal(4, seed=seed), "b": scale * normal(2, 2, seed=seed + 1)}
    zero = {name: torch.zeros_like(tensor) for name, tensor in gradient.items()}
    moved, _ = updated(
        SGD(learning_rate=1.0, clip_norm=clip_norm), 1, gradient, initial(SGD(learning_rate=1.0), zero), zero
    )
    found = torch.cat([-moved["a"], -moved["b"].reshape(-1)])
    right = torch.cat([gradient["a"], gradient["b"].reshape(-1)])
    assert found.norm() <= clip_norm * (1 + 1e-12)
    assert torch.allclose(found / found.norm(), right / right.norm(), rtol=1e-9)  # its direction stays
    if right.norm() + 1e-6 < clip_norm:
        assert torch.equal(found, right)


def graph_with(optimizer: Any, method: Any, steps: int, start: torch.Tensor) -> mlo.Graph:
    def inner(values: Any, batch: Any) -> torch.Tensor:
        return (values["w"] * values["u"]).exp().sum() - values["w"].sum()

    lower = mlo.Level(
        "w", objective=inner, variables=start, given=["u"], optimizer=optimizer, steps=steps, hypergradient=method
    )
    upper = mlo.Level(
        "u",
        objective=lambda values, batch: values["w"].square().sum() + values["w"].sum(),
        variables=torch.ones(3, dtype=torch.float64),
        subject_to=["w"],
        optimizer=SGD(learning_rate=0.1),
    )
    return mlo.Graph([lower, upper])


def clipped_by_hand(start: torch.Tensor, u: torch.Tensor, steps: int) -> torch.Tensor:
    w = start
    for _ in range(steps):
        g = u * (w * u).exp() - 1.0
        g = g.clamp(-0.9, 0.9)
        g = g * (0.3 / (g.norm() + 1e-6)).clamp(max=1.0)
        w = w - 0.1 * (g + 0.05 * w)
    return w


def test_unrolling_differentiates_the_clipping():
    start = normal(3, seed=4)
    optimizer = SGD(learning_rate=0.1, weight_decay=0.05, clip_norm=0.3, clip_value=0.9)
    graph = graph_with(optimizer, Unroll(), 5, start)
    u = torch.ones(3, dtype=torch.float64, requires_grad=True)
    end = clipped_by_hand(start, u, 5)
    (right,) = torch.autograd.grad(end.square().sum() + end.sum(), u)
    assert relative_error(graph.hypergradient("u", graph.init()), right) <= 1e-12


def test_finite_differences_see_the_clipping_of_the_last_step():
    start = normal(3, seed=4)
    optimizer = SGD(learning_rate=0.1, clip_norm=0.3)
    found, right = (
        (graph := graph_with(optimizer, method, 1, start)).hypergradient("u", graph.init())
        for method in (FiniteDifference(radius=1e-3), Unroll())
    )
    assert relative_error(found, right) <= 1e-5


@pytest.mark.parametrize("method", [Unroll(), FiniteDifference()])
def test_a_gradient_of_exactly_zero_is_clipped_without_nan(method):
    """At w = 0 with u = 1 the gradient u·exp(wu) − 1 is exactly zero: the derivative is that of a step unclipped."""
    start = torch.zeros(3, dtype=torch.float64)
    found, right = (
        (graph := graph_with(optimizer, method, 1, start)).hypergradient("u", graph.init())
        for optimizer in (SGD(learning_rate=0.1, clip_norm=0.3, clip_value=0.2), SGD(learning_rate=0.1))
    )
    assert torch.isfinite(found).all()
    assert relative_error(found, right) <= 1e-12


@pytest.mark.parametrize(("kind", "options", "theirs", "torch_options"), torch_twins)
def test_groups_equal_those_of_torch(kind, options, theirs, torch_options):
    ours = kind(
        **options, groups={"*.bias": {"weight_decay": 0.0}, "0.*": {"learning_rate": 0.01, "weight_decay": 0.0}}
    )
    parameters = tensors(0)
    twins = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    biases = [tensor for name, tensor in twins.items() if "bias" in name]
    twin = theirs(
        [
            {"params": biases, "weight_decay": 0.0},
            {"params": [twins["0.weight"]], "lr": 0.01, "weight_decay": 0.0},
            {"params": [twins["1.weight"]], "weight_decay": 0.1},
        ],
        **torch_options,
    )
    state = initial(ours, parameters)
    for step in range(30):
        gradient = tensors(100 + 10 * step)
        before = {name: tensor.clone() for name, tensor in parameters.items()}
        moved, state = updated(ours, step + 1, gradient, state, parameters)
        assert same_bits(parameters, before)
        parameters = moved
        for name, tensor in twins.items():
            tensor.grad = gradient[name].clone()
        twin.step()
        assert same_bits(parameters, {name: tensor.detach() for name, tensor in twins.items()})
    assert list(parameters) == list(SHAPES)
    assert state.count == 30


def test_a_group_may_remember_less_or_more():
    """A moment then holds only the parameters of the groups that have it."""
    for momentum, other, remembered in ((0.9, 0.0, {"a"}), (0.0, 0.9, {"b"})):
        ours = SGD(learning_rate=0.1, momentum=momentum, groups={"b": {"momentum": other}})
        w = {"a": normal(3, seed=1), "b": normal(3, seed=2)}
        state = initial(ours, w)
        assert set(state.moments["momentum"]) == remembered
        alone = {
            name: (tensor, SGD(learning_rate=0.1, momentum=m))
            for (name, tensor), m in zip(w.items(), (momentum, other), strict=True)
        }
        memories = {name: one.init(tensor) for name, (tensor, one) in alone.items()}
        for step in range(4):
            g = {"a": normal(3, seed=10 + step), "b": normal(3, seed=20 + step)}
            w, state = updated(ours, 1, g, state, w)
            for name, (tensor, one) in alone.items():
                moved, memories[name] = one.update(g[name], memories[name], tensor)
                alone[name] = (moved, one)
            assert same_bits(w, {name: tensor for name, (tensor, _) in alone.items()})
            assert set(state.moments["momentum"]) == remembered


def test_a_run_with_groups_and_a_module():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = SGD(learning_rate=0.1, groups={"*.bias": {"learning_rate": Constant(value=1e-9)}})
    level = mlo.Level(
        "w",
        objective=lambda values, batch: values["w"](batch).square().mean(),
        variables=network,
        optimizer=optimizer,
    )
    graph = mlo.Graph([level])
    before = graph.init()
    after, _ = graph.step(before, {"w": torch.ones(2, 3)})
    for name, tensor in before.values["w"].items():
        assert torch.allclose(tensor, after.values["w"][name], atol=1e-7) == name.endswith("bias")


def test_decays_are_told_by_parameter():
    w = tensors(0)
    groups = {"*.bias": {"weight_decay": 0.0}}
    assert l2_decays(SGD(learning_rate=0.1, weight_decay=0.2, groups=groups), 1, w) == {
        "0.weight": 0.2, "0.bias": 0.0, "1.weight": 0.2, "1.bias": 0.0,
    }  # fmt: skip
    assert l2_decays(RMSprop(weight_decay=Constant(value=0.3)), 7, w["0.bias"]) == {"": 0.3}
    assert l2_decays(AdamW(groups=groups), 1, w)["0.bias"] == 0.0
    assert l2_decays(AdamW(groups=groups), 1, w)["0.weight"] is None
    assert is_decoupled(AdamW(groups=groups))
    assert is_decoupled(AdamW(weight_decay=0.0, groups={"a": {"weight_decay": 0.1}}))
    assert not is_decoupled(AdamW(weight_decay=0.0))
    assert not is_decoupled(Adam(weight_decay=0.1))


def level_with(optimizer: Any, variables: Any) -> mlo.Level:
    return mlo.Level("w", objective=lambda values, batch: values["w"], variables=variables, optimizer=optimizer)


def test_a_pattern_that_matches_nothing_names_the_parameters():
    optimizer = SGD(learning_rate=0.1, groups={"*.bais": {"weight_decay": 0.0}})
    with pytest.raises(
        mlo.GraphError, match=r"level 'w', optimizer: no parameter matches '\*.bais'.\n  Known: 0.bias, 0.weight"
    ):
        mlo.Graph([level_with(optimizer, tensors(0))])
    with pytest.raises(mlo.GraphError, match=r"Known: none: the level is a single tensor, which only '\*' matches."):
        mlo.Graph([level_with(optimizer, torch.ones(3))])


def test_wrong_options_of_a_group():
    with pytest.raises(
        ValueError, match=r"groups, 'b': a group has no option 'momentun'; known: learning_rate, momentum"
    ):
        SGD(learning_rate=0.1, groups={"b": {"momentun": 0.0}})
    with pytest.raises(ValueError, match="groups, 'b': a group has no option 'clip_norm'"):
        SGD(learning_rate=0.1, groups={"b": {"clip_norm": 1.0}})
    with pytest.raises(ValueError, match=r"groups, 'b': momentum must be at least 0 and below 1, got 2\.0"):
        SGD(learning_rate=0.1, groups={"b": {"momentum": 2.0}})
    for name in ("clip_norm", "clip_value"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            Adam(**{name: 0.0})


remembering = [  # groups that remember other things than the rest, clipped
    SGD(learning_rate=0.05, momentum=0.9, groups={"b": {"momentum": 0.0}}, clip_norm=0.7, clip_value=0.6),
    SGD(learning_rate=0.05, groups={"b": {"momentum": 0.9}}),
    RMSprop(groups={"b": {"centered": True, "learning_rate": 0.1}}),
    AdamW(clip_norm=1.0, groups={"a": {"weight_decay": 0.0}}),
]


@pytest.mark.parametrize("optimizer", remembering)
def test_replaying_equals_recording_whatever_a_group_remembers(optimizer):
    def inner(values: Any, batch: Any) -> torch.Tensor:
        a, b, u = values["w"]["a"], values["w"]["b"], values["u"]
        return (a * u).exp().sum() + (b - u.sum()).square().sum() + a.sum() * b.sum()

    def graph(method: Any) -> mlo.Graph:
        lower = mlo.Level(
            "w",
            objective=inner,
            variables={"a": normal(3, seed=1), "b": normal(2, seed=2)},
            given=["u"],
            optimizer=optimizer,
            steps=6,
            hypergradient=method,
        )
        upper = mlo.Level(
            "u",
            objective=lambda values, batch: values["w"]["a"].square().sum() + values["w"]["b"].sum(),
            variables=normal(3, seed=3),
            subject_to=["w"],
            optimizer=SGD(learning_rate=0.1),
        )
        return mlo.Graph([lower, upper])

    recorded, replayed = graph(Unroll(replay=False)), graph(Unroll(replay=True))
    state, _ = recorded.step(recorded.init())
    found, right = (one.hypergradient("u", state) for one in (replayed, recorded))
    assert relative_error(found, right) <= 1e-12
