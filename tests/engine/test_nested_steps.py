"""Iterations of a nest: the program that runs is the program that is differentiated, and it is counted."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Memory, adam_by_hand, flat, named, normal, relative_error, rmsprop_by_hand, same_bits, sgd_by_hand
from nests import Nested, Steps, program, responses, solved
from torch import Tensor, nn

import mlo
from mlo.hypergradient import (
    CentralDifference,
    ConjugateGradient,
    Exact,
    FiniteDifference,
    FirstOrder,
    Implicit,
    Neumann,
    Unroll,
)
from mlo.optimizer import SGD, Adam, RMSprop

PROBLEM = Nested(coupling=1.0, bend=0.3)
RULES = {  # of x, y and z, by the engine and by hand
    "sgd": (
        (SGD(learning_rate=0.5), SGD(learning_rate=0.2), SGD(learning_rate=0.3)),
        (sgd_by_hand(0.5), sgd_by_hand(0.2), sgd_by_hand(0.3)),
    ),
    "momentum, adam, rmsprop": (
        (SGD(learning_rate=0.3, momentum=0.8), Adam(learning_rate=0.1), RMSprop(learning_rate=0.1)),
        (sgd_by_hand(0.3, 0.8), adam_by_hand(0.1), rmsprop_by_hand(0.1)),
    ),
    "rmsprop, momentum, adam": (
        (RMSprop(learning_rate=0.1), SGD(learning_rate=0.1, momentum=0.9), Adam(learning_rate=0.1)),
        (rmsprop_by_hand(0.1), sgd_by_hand(0.1, 0.9), adam_by_hand(0.1)),
    ),
}


def iterations_by_hand(rules: Any, counts: tuple[int, int, int], iterations: int, *, lookahead: bool) -> dict[str, Any]:
    """The values after some iterations of z > y > x, unrolled."""
    of_x, of_y = Steps(counts[0], rules[0]), Steps(counts[1], rules[1])
    now, memories, memory = dict(PROBLEM.start), dict[str, Memory](), None
    for _ in range(iterations):
        respond = partial(responses, PROBLEM, of_x=of_x, of_y=of_y, start=now, memories=memories)
        kept = respond(now["z"].clone().requires_grad_())

        def gradient(z: Tensor, _: int, respond: Any = respond) -> Tensor:
            y, x, _ = respond(z)
            return torch.autograd.grad(PROBLEM.z(z, y, x), z)[0].detach()

        z, memory = Steps(counts[2], rules[2]).taken(gradient, now["z"], memory)
        z = z.detach()
        y, x, left = respond(z.clone().requires_grad_()) if lookahead else kept
        memories = {key: (m[0], {n: {"": t[""].detach()} for n, t in m[1].items()}) for key, m in left.items()}
        now = {"x": x.detach(), "y": y.detach(), "z": z.detach()}
    return now


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 3, 1), (2, 2, 3)])
@pytest.mark.parametrize("rules", RULES)
def test_iterations_are_the_program_written_by_hand(rules, counts, lookahead):
    """Every iteration, x is taken from its start at each step of y and once more where y ends."""
    ours, by_hand = RULES[rules]
    top = {"optimizer": ours[2], "steps": counts[2], "lookahead": lookahead}
    graph = mlo.Graph(PROBLEM.levels(Unroll(), Unroll(), counts[:2], rules=ours[:2], top=top))
    state = graph.init()
    for _ in range(3):
        state, _ = graph.step(state)
    expected = iterations_by_hand(by_hand, counts, 3, lookahead=lookahead)
    for name, right in expected.items():
        assert relative_error(state.values[name], right) < 1e-12


ABOVE = {
    "unroll": Unroll(),
    "replayed": Unroll(replay=True),
    "last": Unroll(last=1),
    "differences": FiniteDifference(),
    "exact": Exact(),
    "neumann": Neumann(terms=3, step_size=0.3),
}


@pytest.mark.parametrize("nested", ["reduced", "direct"])
@pytest.mark.parametrize("above", ABOVE)
def test_being_differentiated_changes_nothing_of_the_lower_levels(above, nested):
    """Bit for bit: differentiated by any method, or not at all because z is not due."""
    left = []
    for method, warm_up in [(ABOVE[above], 0), (Unroll(), 1)]:
        rules = RULES["momentum, adam, rmsprop"][0][:2]
        levels = PROBLEM.levels(Unroll(), method, (2, 3), rules=rules, nested=nested, top={"warm_up": warm_up})
        graph = mlo.Graph(levels)
        state, metrics = graph.step(graph.init())
        assert ("z" in metrics.norms) != bool(warm_up)
        left.append((state, metrics))
    (one, seen_one), (two, seen_two) = left
    for name in "xy":
        assert same_bits(one.values[name], two.values[name])
        assert all(map(same_bits, one.optimizers[name].moments.values(), two.optimizers[name].moments.values()))
        assert torch.equal(seen_one.losses[name], seen_two.losses[name])
    assert torch.equal(seen_one.norms["y"].total, seen_two.norms["y"].total)


@pytest.mark.parametrize("method", [Unroll(), Exact(), Neumann(terms=3, step_size=0.3)], ids=repr)
def test_the_order_of_declaration_changes_nothing(method):
    levels = PROBLEM.levels(method, method, (2, 2), top={"steps": 2, "lookahead": True})
    turned = [replace(each, given=each.given[::-1], subject_to=each.subject_to[::-1]) for each in levels[::-1]]
    states = []
    for declared in (levels, turned):
        graph = mlo.Graph(declared)
        state, _ = graph.step(graph.init())
        states.append((state, graph.hypergradient("z", state)))
    (one, first), (two, second) = states
    assert same_bits(first, second)
    assert all(same_bits(one.values[name], two.values[name]) for name in "xyz")


# Direct: the cheap form.


@pytest.mark.parametrize("coupling", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("listed", [("y", "x"), ("y",)], ids=["z lists y and x", "z lists y"])
def test_direct_takes_the_partial_hessian_of_the_middle_level(coupling, listed):
    problem = Nested(coupling=coupling, bend=0.3)
    at = solved(problem)
    right = at.hypergradient(listed="x" in listed, direct=True)
    assert relative_error(right, at.hypergradient(listed="x" in listed)) > 0.02, "it is not the derivative"
    for x, y in itertools.product((Exact(), ConjugateGradient(iterations=9)), repeat=2):
        graph = mlo.Graph(problem.levels(x, y, listed=listed, nested="direct"))
        assert relative_error(graph.hypergradient("z", graph.init(values=at.values)), right) < 1e-9


@pytest.mark.parametrize("counts", [(1, 1), (3, 2), (2, 4)])
def test_direct_unrolls_what_comes_through_as_a_constant(counts):
    of_x, of_y = Steps(counts[0]), Steps(counts[1], sgd_by_hand(PROBLEM.rate))
    right = program(PROBLEM, of_x, of_y, direct=True)
    assert relative_error(right, program(PROBLEM, of_x, of_y)) > 0.01
    for x, y in itertools.product((Unroll(), Unroll(replay=True)), repeat=2):
        graph = mlo.Graph(PROBLEM.levels(x, y, counts, nested="direct"))
        assert relative_error(graph.hypergradient("z", graph.init()), right) < 1e-12
    right = program(PROBLEM, of_x, replace(of_y, last=1), direct=True)
    errors = []
    for radius in (1e-1, 1e-2):
        graph = mlo.Graph(PROBLEM.levels(Unroll(), FiniteDifference(radius=radius), counts, nested="direct"))
        errors.append(relative_error(graph.hypergradient("z", graph.init()), right))
    assert errors[1] < 1e-4
    assert errors[0] < 1e-10 or 80 < errors[0] / errors[1] < 125


def test_either_way_the_middle_level_follows_its_total_gradient():
    """Bit for bit the same new values of x and y."""
    states = []
    for nested in ("reduced", "direct"):
        graph = mlo.Graph(PROBLEM.levels(Unroll(), Unroll(), (2, 3), nested=nested))
        states.append(graph.step(graph.init())[0])
    one, two = states
    assert all(same_bits(one.values[name], two.values[name]) for name in "xy")
    assert not same_bits(one.values["z"], two.values["z"])


# What it costs.

METHODS = {
    "exact": Exact(),
    "neumann": Neumann(terms=5, step_size=0.5),
    "first order": FirstOrder(),
    "unroll": Unroll(),
    "replayed": Unroll(replay=True),
    "last": Unroll(last=1),
    "differences": FiniteDifference(),
    "crossed": Implicit(inverse=FirstOrder(), cross=CentralDifference()),
}
REFUSED = set(itertools.product(("exact", "neumann", "first order", "crossed"), ("differences", "crossed")))
"""Below and above: differences of gradients above a response that is not the derivative of its steps."""


def counts(levels: list[mlo.Level]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    graph = mlo.Graph(levels)
    _, metrics = graph.step(graph.init())
    predicted = graph.cost(1)
    return tuple(predicted), (metrics.gradients, metrics.products, len(metrics.pullbacks))


@pytest.mark.parametrize("nested", ["reduced", "direct"])
@pytest.mark.parametrize("below", METHODS)
def test_the_cost_of_a_nest_is_known(below, nested):
    for above in METHODS:
        if nested == "reduced" and (below, above) in REFUSED:
            with pytest.raises(mlo.GraphError, match="compares gradients of 'y' at two places"):
                mlo.Graph(PROBLEM.levels(METHODS[below], METHODS[above]))
            continue
        variants = [
            ((1, 1), ("y", "x"), {}),
            ((3, 2) if (below, above) not in AT_MOST_ONE else (1, 2), ("y",), {}),
            ((1, 2), ("y", "x"), {"steps": 2, "lookahead": True}),
        ]
        for steps, listed, top in variants:
            levels = PROBLEM.levels(METHODS[below], METHODS[above], steps, listed=listed, nested=nested, top=top)
            predicted, counted = counts(levels)
            assert predicted == counted, (above, steps, listed, top)


AT_MOST_ONE = set(itertools.product(("last", "differences"), ("differences", "crossed")))
"""Below and above: allowed where the last step is the only one."""


@pytest.mark.parametrize("other", [Unroll(), Exact(), ConjugateGradient(iterations=3)], ids=repr)
def test_conjugate_gradients_cost_at_most_what_is_predicted(other):
    """They stop at a tolerance: here after one iteration where they are allowed thirty."""
    cg = ConjugateGradient(iterations=30, tolerance=0.9)
    for x, y in ((cg, other), (other, cg), (cg, cg)):
        predicted, counted = counts(PROBLEM.levels(x, y, (1, 2)))
        assert predicted[1] > counted[1]
        assert predicted[0] >= counted[0]
        assert predicted[2] == counted[2]


def test_the_cost_over_iterations_knows_who_is_due():
    levels = PROBLEM.levels(Unroll(), Exact(), (2, 2), top={"every": 3, "warm_up": 1})
    graph, total = mlo.Graph(levels), torch.zeros(3, dtype=torch.int64)
    state = graph.init()
    for _ in range(5):
        state, metrics = graph.step(state)
        total += torch.tensor([metrics.gradients, metrics.products, len(metrics.pullbacks)])
    assert tuple(graph.cost(5)) == tuple(total.tolist())


@pytest.mark.parametrize(("below", "above"), [(1, 1), (5, 10), (10, 5), (20, 10)])
def test_what_a_pullback_in_the_middle_costs_has_a_formula(below, above):
    """As the documents print it: one Hessian product of y contains one more inverse of x."""
    x, y = Neumann(terms=below, step_size=0.3), Neumann(terms=above, step_size=0.3)
    reduced, direct = (mlo.Graph(PROBLEM.levels(x, y, nested=nested)) for nested in ("reduced", "direct"))
    cost = reduced.cost_of_pullback("z", "y")
    assert cost.gradients + cost.products == above * (2 * below + 7) + 3 * below + 11
    cost = direct.cost_of_pullback("z", "y")
    assert cost.gradients + cost.products == above + below + 5


# What is refused.


def message(levels: list[mlo.Level]) -> str:
    with pytest.raises(mlo.GraphError) as caught:
        mlo.Graph(levels)
    return str(caught.value)


def test_differences_above_a_response_that_is_not_its_derivative_are_refused():
    for y in (FiniteDifference(), Implicit(inverse=Exact(), cross=CentralDifference())):
        assert message(PROBLEM.levels(Exact(), y)) == (
            "level 'y', hypergradient: it compares gradients of 'y' at two places, where 'x' takes its steps anew; but the "
            "method of 'x' is not the derivative of these steps. Take a method with second derivatives here, unroll all "
            "steps of 'x', or say nested: direct"
        )
        mlo.Graph(PROBLEM.levels(Exact(), y, nested="direct"))
        mlo.Graph(PROBLEM.levels(Unroll(), y, (3, 2)))


def test_conjugate_gradients_above_some_that_have_not_converged_are_refused():
    cg = ConjugateGradient(iterations=2)
    assert message(PROBLEM.levels(cg, ConjugateGradient(iterations=9))) == (
        "level 'y', hypergradient: conjugate gradients need a symmetric Jacobian, and the total gradient of 'y' has none: "
        "those of 'x' may stop before they have converged (fewer iterations than numbers). Take neumann, exact or gmres "
        "here, another method for 'x', or say nested: direct"
    )
    mlo.Graph(PROBLEM.levels(cg, Exact()))
    mlo.Graph(PROBLEM.levels(cg, cg, nested="direct"))
    mlo.Graph(PROBLEM.levels(ConjugateGradient(iterations=3), cg))


def test_two_levels_in_the_middle_above_one_are_refused():
    x, y, z = PROBLEM.levels(Unroll(), Unroll())
    both = [replace(x, given=("y", "v", "z")), y, replace(y, name="v"), replace(z, subject_to=("y", "v", "x"))]
    assert message(both) == (
        "level 'y', subject_to: 'v' and 'y' are both subject to 'x', and others are subject to them: each one's response "
        "would depend on the other's; make them one level, or one of them subject to the other"
    )


def test_a_word_that_nested_does_not_know_is_refused():
    said = "level 'y', nested: expected reduced or direct, got 'whole'"
    assert message(PROBLEM.levels(Unroll(), Unroll(), nested="whole")) == said
    x, _, _ = PROBLEM.levels(Unroll(), Unroll())
    said = "level 'x', nested: only a level that is subject to others has a total gradient"
    alone = replace(x, given=("z",), nested="direct")
    assert message([alone, mlo.Level("z", variables=torch.zeros(2))]) == said


@pytest.mark.parametrize("y", [Unroll(), FiniteDifference(), Exact()], ids=repr)
def test_a_nest_under_a_transform_is_refused(y):
    graph = mlo.Graph(PROBLEM.levels(Unroll(), y))
    state = graph.init()

    def hypergradient(z: Tensor) -> Any:
        return graph.hypergradient("z", replace(state, values={**state.values, "z": z}))

    said = "level 'y' is in the middle of a nest, which cannot be differentiated inside a torch.func transform"
    with pytest.raises(mlo.UserError, match=f"^{re.escape(said)}$"):
        torch.func.vmap(hypergradient)(normal(3, 2, seed=1))


# Noise, choices and buffers.


def noisy(drawn: bool, x: Any, y: Any, steps: int, batches: dict[str, dict[int, Any]]) -> list[mlo.Level]:
    """A nest whose objectives draw dropout masks, noise and choices, or are given those of `batches` by step."""

    def noise(values: Any, name: str, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not drawn:
            return batch
        w = values[name]
        mask = nn.functional.dropout(torch.ones(3), 0.4)
        z = torch.randn(3)
        choice = values.once("choice", lambda: (torch.rand(3) < w.sigmoid()).to(w.dtype))
        seen = batches.setdefault(name, {}).setdefault(batch, (mask, z, choice))
        assert all(map(torch.equal, seen, (mask, z, choice))), "every evaluation of a step sees the same"
        return mask, z, choice

    def f_x(values: Any, batch: Any) -> Tensor:
        mask, z, choice = noise(values, "x", batch)
        x, y = values["x"], values["y"]
        bent = 0.1 * (1 + choice) * x.square() * (2 + values["z"].tanh())
        return 0.5 * (x - (mask * y).tanh() - 0.3 * z * values["z"]).square().sum() + bent.sum()

    def f_y(values: Any, batch: Any) -> Tensor:
        mask, z, choice = noise(values, "y", batch)
        x, y = values["x"], values["y"]
        own = 0.5 * (y - 0.5 * values["z"] * (1 + 0.3 * z)).square().sum() + 0.1 * (choice * y.pow(4)).sum()
        return own + 0.4 * (mask * x + y - 1).square().sum()

    def f_z(values: Any, batch: Any) -> Tensor:
        return (values["y"] - 1).square().sum() + values["x"].sum() + 0.1 * values["z"].square().sum()

    rule = SGD(learning_rate=0.2, momentum=0.5)
    start = {name: 0.3 * normal(3, seed=seed) for seed, name in enumerate("xyz")}
    return [
        mlo.Level(
            "x", objective=f_x, variables=start["x"], given=("y", "z"), optimizer=rule, steps=steps, hypergradient=x
        ),
        mlo.Level(
            "y",
            objective=f_y,
            variables=start["y"],
            given=("z",),
            subject_to=("x",),
            optimizer=rule,
            steps=steps,
            hypergradient=y,
        ),
        mlo.Level("z", objective=f_z, variables=start["z"], subject_to=("y", "x"), optimizer=rule),
    ]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (Unroll(), Unroll()),
        (Unroll(replay=True), Unroll(replay=True)),
        (Unroll(), FiniteDifference()),
        (FiniteDifference(), Unroll()),
        (Exact(), Exact()),
        (Neumann(terms=4, step_size=0.5), ConjugateGradient(iterations=3)),
        (Implicit(inverse=Exact(), cross=CentralDifference()), Unroll(last=1)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_noise_drawn_inside_a_nest_is_the_same_as_noise_given_as_data(x, y):
    steps, batches = 2, dict[str, dict[int, Any]]()
    drawn = mlo.Graph(noisy(True, x, y, steps, batches))
    numbered = {name: mlo.Batches(range(steps)) for name in "xy"}
    found = drawn.hypergradient("z", drawn.init(seed=3), numbered)
    assert same_bits(found, drawn.hypergradient("z", drawn.init(seed=3), numbered))
    state, _ = drawn.step(drawn.init(seed=3), numbered)
    data = {name: mlo.Batches([batches[name][step] for step in range(steps)]) for name in "xy"}
    given = mlo.Graph(noisy(False, x, y, steps, {}))
    assert relative_error(found, given.hypergradient("z", given.init(), data)) < 1e-9
    expected, _ = given.step(given.init(), data)
    for name in "xyz":
        assert relative_error(state.values[name], expected.values[name]) < 1e-9


class Normed(nn.Module):
    """Linear, BatchNorm, tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())

    def forward(self, data: Tensor) -> Tensor:
        """Three numbers a sample."""
        return self.layers(data)


def networks(steps: int, of_y: int | None = None, **fields: Any) -> mlo.Graph:
    """x is trained on what y makes of the data, y on what becomes of x, both with BatchNorm; z weighs samples for both."""
    data, wanted = normal(6, 2, seed=1), normal(6, 3, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = {"x": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "y": Normed()}

    def fit(values: Any, of: str, target: Tensor) -> Tensor:
        error = (values["x"](values["y"](data)) - target).square().sum(1) * values["z"].sigmoid()
        decay = sum(tensor.square().sum() for tensor in values[of].values())
        return 0.1 * error.mean() + 0.1 * decay

    def f_x(values: Any, batch: Any) -> Any:
        return fit(values, "x", wanted), {"seen": values["y"]["layers.0.weight"].sum()}

    def f_y(values: Any, batch: Any) -> Any:
        return fit(values, "y", 2 * wanted), {"decay": values["y"]["layers.0.weight"].square().sum()}

    def f_z(values: Any, batch: Any) -> Tensor:
        return (values["x"](values["y"](data)) - wanted.flip(0)).square().mean() + values["z"].square().mean()

    rule, method = SGD(learning_rate=0.3, momentum=0.5), fields.pop("method", Unroll())
    rest: dict[str, Any] = {"optimizer": rule, "steps": steps}
    return mlo.Graph(
        [
            mlo.Level("x", objective=f_x, variables=modules["x"], given=("y", "z"), hypergradient=method, **rest),
            mlo.Level(
                "y",
                objective=f_y,
                variables=modules["y"],
                given=("z",),
                subject_to=("x",),
                hypergradient=method,
                **{**rest, "steps": of_y or steps},
            ),
            mlo.Level("z", objective=f_z, variables=normal(6, seed=3), subject_to=("y", "x"), optimizer=rule, **fields),
        ]
    )


@pytest.mark.parametrize("method", [Unroll(), Unroll(replay=True), Exact(damping=0.1)], ids=repr)
def test_a_hypergradient_through_networks_leaves_everything_as_it_was(method):
    graph = networks(2, method=method)
    state = graph.init(seed=1)
    state, _ = graph.step(state)
    trees = [
        *state.values.values(),
        *state.buffers.values(),
        *(m for o in state.optimizers.values() for m in o.moments.values()),
    ]
    before, random = [{k: t.clone() for k, t in named(tree).items()} for tree in trees], torch.random.get_rng_state()
    graph.hypergradient("z", state)
    graph.step(state)
    assert all(map(same_bits, trees, before))
    assert torch.equal(random, torch.random.get_rng_state())


def test_buffers_below_are_those_of_the_response_that_is_kept():
    """x is retaken from its own start at each step of y; its buffers move by the steps it takes where y ends."""
    steps = 2
    graph = networks(steps)
    state = graph.init()
    new, _ = graph.step(state)
    assert [int(new.buffers["x"]["1.num_batches_tracked"]), int(new.buffers["y"]["layers.1.num_batches_tracked"])] == [
        steps,
        steps,
    ]
    fixed = {name: replace(graph.levels[name], optimizer=None, subject_to=(), given=()) for name in "yz"}
    alone = mlo.Graph([graph.levels["x"], *fixed.values()])
    expected, _ = alone.step(alone.init(values={"x": graph.module("x", state), "y": graph.module("y", new)}))
    assert same_bits(new.values["x"], expected.values["x"])
    assert same_bits(new.buffers["x"], expected.buffers["x"])


def test_the_middle_level_tells_its_losses_and_its_gradient_by_parts():
    graph = networks(2)
    state = graph.init()
    _, metrics = graph.step(state)
    assert set(metrics.losses) == set(metrics.measured) | {"z"} == {"x", "y", "z"}
    norms = metrics.norms["y"]
    assert set(norms.through) == {"x"}
    assert norms.direct > 0
    assert norms.through["x"] > 0
    # the last of two steps of y: its hypergradient from where one step leads
    one = networks(2, of_y=1)
    after = one.step(one.init())[0]
    there = {**state.values, "y": after.values["y"]}
    parts = graph.parts("y", replace(state, values=there, buffers={**state.buffers, "y": after.buffers["y"]}))
    assert torch.isclose(norms.direct, flat(parts.direct).norm(), rtol=1e-12)
    assert torch.isclose(norms.through["x"], flat(parts.through["x"]).norm(), rtol=1e-12)
    assert torch.isclose(norms.total, flat(parts.total).norm(), rtol=1e-12)
