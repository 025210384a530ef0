"""Options of optimizers that are read from levels: against plain autograd through the written-out steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from helpers import named, normal, relative_error, same_bits
from torch import Tensor
from torch.nn.functional import softplus

import mlo
from mlo.hypergradient import (
    AbstractHypergradient,
    AbstractResponse,
    ConjugateGradient,
    Cost,
    Exact,
    FiniteDifference,
    FirstOrder,
    Implicit,
    Neumann,
    Tape,
    Unroll,
)
from mlo.optimizer import SGD, Adam, AdamW, Read, RMSprop, l2_decays

STEPS = 4
Tensors = Mapping[str, Tensor]
Option = Callable[[str, str], Any]  # of an option and a parameter
Memory = dict[str, Tensors]


def sgd(option: Option, w: Tensors, g: Tensors, memory: Memory, count: int, *, nesterov: bool = False):
    d = {key: g[key] + option("weight_decay", key) * w[key] for key in w}
    momentum = {key: option("momentum", key) for key in w}
    damped = {key: d[key] * (1 - option("dampening", key) if count > 1 else 1) for key in w}
    b = {key: momentum[key] * memory["momentum"][key] + damped[key] for key in w}
    move = {key: d[key] + momentum[key] * b[key] if nesterov else b[key] for key in w}
    return {key: w[key] - option("learning_rate", key) * move[key] for key in w}, {"momentum": b}


def nesterov(*arguments: Any):
    return sgd(*arguments, nesterov=True)


def adam(option: Option, w: Tensors, g: Tensors, memory: Memory, count: int, *, decoupled: bool = False):
    decay = {key: option("weight_decay", key) * w[key] for key in w}
    beta1, beta2 = ({key: option(name, key) for key in w} for name in ("beta1", "beta2"))
    g = g if decoupled else {key: g[key] + decay[key] for key in w}
    m = {key: beta1[key] * memory["first"][key] + (1 - beta1[key]) * g[key] for key in w}
    v = {key: beta2[key] * memory["second"][key] + (1 - beta2[key]) * g[key] ** 2 for key in w}
    m_hat = {key: m[key] / (1 - beta1[key] ** count) for key in w}
    v_hat = {key: v[key] / (1 - beta2[key] ** count) for key in w}
    move = {key: m_hat[key] / (v_hat[key].sqrt() + option("epsilon", key)) for key in w}
    move = {key: move[key] + decay[key] for key in w} if decoupled else move
    return {key: w[key] - option("learning_rate", key) * move[key] for key in w}, {"first": m, "second": v}


def adamw(*arguments: Any):
    return adam(*arguments, decoupled=True)


def rmsprop(option: Option, w: Tensors, g: Tensors, memory: Memory, count: int):
    g = {key: g[key] + option("weight_decay", key) * w[key] for key in w}
    alpha = {key: option("alpha", key) for key in w}
    v = {key: alpha[key] * memory["square"][key] + (1 - alpha[key]) * g[key] ** 2 for key in w}
    mean = {key: alpha[key] * memory["mean"][key] + (1 - alpha[key]) * g[key] for key in w}
    spread = {key: (v[key] - mean[key] ** 2).sqrt() + option("epsilon", key) for key in w}
    b = {key: option("momentum", key) * memory["momentum"][key] + g[key] / spread[key] for key in w}
    new = {key: w[key] - option("learning_rate", key) * b[key] for key in w}
    return new, {"square": v, "mean": mean, "momentum": b}


START = {"first": 0.7 * normal(2, 4, seed=1), "bias": 0.1 * normal(4, seed=2), "second": 0.7 * normal(4, seed=3)}
X, Y, SEEN = normal(6, 2, seed=4), normal(6, seed=5), normal(5, 2, seed=6)


def network(w: Tensors, at: Tensor) -> Tensor:
    return torch.tanh(at @ w["first"] + w["bias"]) @ w["second"]


def training(w: Tensors) -> Tensor:
    return (network(w, X) - Y).square().mean()


def validation(w: Tensors) -> Tensor:
    return (network(w, SEEN) - 0.3).square().mean()


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def each(prefix: str, value: float) -> dict[str, Tensor]:
    """A number for each parameter, all different."""
    return {f"{prefix}{key}": number(value * (1 + 0.3 * n)) for n, key in enumerate(START)}


def entries(prefix: str, value: float) -> dict[str, Tensor]:
    """A number for each entry of each parameter."""
    return {
        f"{prefix}{key}": value * (1 + 0.1 * normal(*t.shape, seed=20 + n).tanh())
        for n, (key, t) in enumerate(START.items())
    }


RATES = {"learning_rate": number(0.3), "momentum": number(0.6), "weight_decay": number(0.2)}
READ = {name: Read("rates", name) for name in RATES}


@dataclass(frozen=True, eq=False)
class Case:
    """An optimizer that reads, what it reads, whether that is kept in its range, the step by hand, and other options."""

    optimizer: Any
    values: dict[str, Tensor]
    ranged: bool
    by_hand: Any
    fixed: dict[str, float]
    clip: Callable[[Tensors, Tensors], Tensors] = lambda g, values: dict(g)

    def option(self, values: Tensors) -> Option:
        def of(name: str, parameter: str) -> Any:
            keys = (f"{name}.{parameter}", name, parameter if name == "learning_rate" else "")
            found = next((values[key] for key in keys if key in values), None)
            return self.fixed.get(name, 0.0) if found is None else found

        return of


def shortened(g: Tensors, values: Tensors) -> Tensors:
    cut = {key: torch.minimum(torch.maximum(t, -values["clip_value"]), values["clip_value"]) for key, t in g.items()}
    norm = torch.stack([t.square().sum() for t in cut.values()]).sum().sqrt()
    factor = torch.minimum(values["clip_norm"] / (norm + 1e-6), torch.ones_like(norm))
    return {key: t * factor for key, t in cut.items()}


CLIPS = {"clip_norm": Read("rates", "clip_norm"), "clip_value": Read("rates", "clip_value")}
ADAPTIVE = {"learning_rate": number(0.05), "weight_decay": number(0.2), "epsilon": number(1e-2)}
BETAS = {"beta1": number(0.7), "beta2": number(0.9)}


def read(*names: str) -> dict[str, Any]:
    return {name: Read("rates", name) for name in names}


cases = {
    "sgd, one rate": Case(
        SGD(learning_rate=Read("rates", "learning_rate")), {"learning_rate": number(0.3)}, False, sgd, {}
    ),
    "sgd, all options": Case(
        SGD(**READ, dampening=Read("rates", "dampening")), RATES | {"dampening": number(0.3)}, True, sgd, {}
    ),
    "sgd, a decay of 0": Case(SGD(**READ), RATES | {"weight_decay": number(0.0)}, False, sgd, {}),
    "sgd, per tensor": Case(
        SGD(**READ),
        each("learning_rate.", 0.3) | each("momentum.", 0.4) | each("weight_decay.", 0.2),
        True,
        sgd,
        {},
    ),
    "sgd, the whole level": Case(
        SGD(learning_rate=Read("rates"), momentum=0.5), each("", 0.3), True, sgd, {"momentum": 0.5}
    ),
    "sgd, per parameter": Case(
        SGD(**READ),
        entries("learning_rate.", 0.3) | entries("weight_decay.", 0.2) | {"momentum": number(0.6)},
        True,
        sgd,
        {},
    ),
    "nesterov": Case(SGD(**READ, nesterov=True), RATES, True, nesterov, {}),
    "nesterov, per parameter": Case(
        SGD(**READ, nesterov=True),
        entries("learning_rate.", 0.3) | each("momentum.", 0.4) | {"weight_decay": number(0.1)},
        True,
        nesterov,
        {},
    ),
    "clipping": Case(
        SGD(**READ, **CLIPS), RATES | {"clip_norm": number(0.3), "clip_value": number(0.2)}, True, sgd, {}, shortened
    ),
    "clipping, per tensor": Case(
        SGD(learning_rate=Read("rates", "learning_rate"), **CLIPS),
        each("learning_rate.", 0.3) | {"clip_norm": number(0.3), "clip_value": number(0.2)},
        True,
        sgd,
        {},
        shortened,
    ),
    "groups": Case(
        SGD(
            learning_rate=0.1,
            momentum=0.5,
            groups={"bias": read("learning_rate"), "f*": read("weight_decay", "learning_rate")},
        ),
        {"learning_rate.bias": number(0.3), "learning_rate.first": number(0.2), "weight_decay.first": number(0.4)},
        True,
        sgd,
        {"learning_rate": 0.1, "momentum": 0.5},
    ),
    "adam": Case(
        Adam(**read("learning_rate", "weight_decay", "epsilon", "beta1", "beta2")), ADAPTIVE | BETAS, True, adam, {}
    ),
    "adam, per parameter": Case(
        Adam(**read("learning_rate", "beta1"), weight_decay=0.1),
        entries("learning_rate.", 0.05) | each("beta1.", 0.5),
        True,
        adam,
        {"weight_decay": 0.1, "beta2": 0.999, "epsilon": 1e-8},
    ),
    "adamw": Case(
        AdamW(**read("learning_rate", "weight_decay", "epsilon", "beta1", "beta2")), ADAPTIVE | BETAS, True, adamw, {}
    ),
    "adamw, per tensor": Case(
        AdamW(**read("learning_rate", "weight_decay"), beta2=0.9),
        each("learning_rate.", 0.05) | entries("weight_decay.", 0.3),
        True,
        adamw,
        {"beta1": 0.9, "beta2": 0.9, "epsilon": 1e-8},
    ),
    "rmsprop": Case(
        RMSprop(**read("learning_rate", "weight_decay", "epsilon", "alpha", "momentum"), centered=True),
        ADAPTIVE | {"alpha": number(0.8), "momentum": number(0.4)},
        True,
        rmsprop,
        {},
    ),
    "rmsprop, per parameter": Case(
        RMSprop(**read("learning_rate"), alpha=0.8, centered=True, momentum=0.3, epsilon=1e-2),
        entries("learning_rate.", 0.05),
        True,
        rmsprop,
        {"alpha": 0.8, "momentum": 0.3, "epsilon": 1e-2},
    ),
}


def levels_of(case: Case, method: AbstractHypergradient, **changes: Any) -> list[mlo.Level]:
    """Two levels that meet in the optimizer of the lower one, and nowhere else."""
    lower = {"optimizer": case.optimizer, "steps": STEPS, "hypergradient": method, "given": ("rates",)} | changes
    return [
        mlo.Level("net", objective=lambda values, batch: training(values["net"]), variables=START, **lower),
        mlo.Level(
            "rates",
            objective=lambda values, batch: validation(values["net"]),
            variables=case.values,
            constraints=constraints(case),
            subject_to=("net",),
            optimizer=SGD(learning_rate=0.1),
        ),
    ]


FRACTIONS = ("momentum", "beta", "alpha", "dampening")


def constraints(case: Case) -> dict[str, Any]:
    return {key: "sigmoid" if key.startswith(FRACTIONS) else "softplus" for key in case.values} if case.ranged else {}


def constrained(case: Case, free: Tensors) -> dict[str, Tensor]:
    if not case.ranged:
        return dict(free)
    return {key: t.sigmoid() if key.startswith(FRACTIONS) else softplus(t, threshold=100) for key, t in free.items()}


def response_by_hand(case: Case, values: Tensors, *, fixed_until: int = 0, steps: int = STEPS) -> dict[str, Tensor]:
    w = {key: tensor.clone().requires_grad_() for key, tensor in START.items()}
    zero = {key: torch.zeros_like(tensor) for key, tensor in START.items()}
    memory: Memory = dict.fromkeys(("momentum", "first", "second", "square", "mean"), zero)
    for count in range(1, steps + 1):
        found = torch.autograd.grad(training(w), list(w.values()), create_graph=True)
        g = case.clip(dict(zip(w, found, strict=True)), values)
        w, memory = case.by_hand(case.option(values), w, g, memory, count)
        if count <= fixed_until:
            w = {key: tensor.detach().requires_grad_() for key, tensor in w.items()}
            memory = {key: {k: t.detach() for k, t in moment.items()} for key, moment in memory.items()}
    return w


def by_hand(case: Case, free: Tensors, *, fixed_until: int = 0) -> dict[str, Tensor]:
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in free.items()}
    loss = validation(response_by_hand(case, constrained(case, leaves), fixed_until=fixed_until))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("method", [Unroll(replay=False), Unroll(replay=True)], ids=["direct", "replayed"])
@pytest.mark.parametrize("case", cases.values(), ids=cases)
def test_the_derivative_in_what_is_read_is_that_of_the_steps(case, method):
    graph = mlo.Graph(levels_of(case, method))
    state = graph.init()
    right = by_hand(case, state.values["rates"])
    assert all(bool((tensor != 0).any()) for tensor in right.values())
    assert relative_error(graph.hypergradient("rates", state), right) < 1e-10
    graph.probe(state)  # although the objectives do not meet


@pytest.mark.parametrize("case", cases.values(), ids=cases)
def test_a_step_sees_what_is_read(case):
    graph = mlo.Graph(levels_of(case, Unroll(), steps=2))
    state = graph.init()
    values = constrained(case, state.values["rates"])
    state, _ = graph.step(state)
    assert relative_error(state.values["net"], response_by_hand(case, values, steps=2)) < 1e-10


@pytest.mark.parametrize("replay", [False, True])
def test_truncated_unrolling_sees_the_last_steps(replay):
    case = cases["nesterov"]
    graph = mlo.Graph(levels_of(case, Unroll(last=2, replay=replay)))
    state = graph.init()
    right = by_hand(case, state.values["rates"], fixed_until=STEPS - 2)
    assert relative_error(graph.hypergradient("rates", state), right) < 1e-10


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_level_of_one_tensor_reads_one_of_one(shape):
    hessian, target = normal(3, 3, seed=30), normal(3, seed=31)
    hessian = hessian @ hessian.T / 3 + 0.5 * torch.eye(3, dtype=torch.float64)
    rate = 0.2 + 0.05 * normal(*shape, seed=32).tanh()

    def loss(w: Tensor) -> Tensor:
        return 0.5 * w @ hessian @ w - w @ target

    levels = [
        mlo.Level(
            "w",
            objective=lambda values, batch: loss(values["w"]),
            variables=normal(3, seed=33),
            given=("rate",),
            optimizer=SGD(learning_rate=Read("rate")),
            steps=3,
        ),
        mlo.Level(
            "rate",
            objective=lambda values, batch: values["w"].square().sum(),
            variables=rate,
            subject_to=("w",),
            optimizer=Adam(),
        ),
    ]
    graph = mlo.Graph(levels)
    found = graph.hypergradient("rate", graph.init())

    # w₃ by hand: w ← w − η(Hw − t), the derivative by central differences of the closed form.
    def end(rate: Tensor) -> Tensor:
        w = normal(3, seed=33)
        for _ in range(3):
            w = w - rate * (hessian @ w - target)
        return w.square().sum()

    directions = torch.eye(max(1, rate.numel()), dtype=torch.float64).reshape(-1, *shape)
    differences = [(end(rate + 1e-6 * d) - end(rate - 1e-6 * d)) / 2e-6 for d in directions]
    assert relative_error(found, torch.stack(differences).reshape(shape)) < 1e-8


def test_what_reaches_the_response_both_ways_is_added():
    def objective(values: Any, batch: Any) -> Tensor:
        return training(values["net"]) + values["rates"]["learning_rate"] * values["net"]["first"].square().sum()

    case = cases["sgd, one rate"]
    graph = mlo.Graph(
        [
            mlo.Level("net", objective=objective, variables=START, given=("rates",), optimizer=case.optimizer, steps=2),
            levels_of(case, Unroll())[1],
        ]
    )
    rate = case.values["learning_rate"].clone().requires_grad_()
    w = {key: tensor.clone().requires_grad_() for key, tensor in START.items()}
    for _ in range(2):
        found = torch.autograd.grad(
            objective({"net": w, "rates": {"learning_rate": rate}}, None), list(w.values()), create_graph=True
        )
        w = {key: tensor - rate * g for (key, tensor), g in zip(w.items(), found, strict=True)}
    right = torch.autograd.grad(validation(w), rate)[0]
    assert relative_error(graph.hypergradient("rates", graph.init())["learning_rate"], right) < 1e-10


def test_a_response_may_be_what_is_read():
    """u → rate* → net: the cotangent on the rate arrives through the optimizer, and goes on."""
    start = number(0.1)
    levels = [
        mlo.Level(
            "rate",
            objective=lambda values, batch: 0.5 * (values["rate"] - values["u"].sigmoid()).square(),
            variables=start,
            given=("u",),
            optimizer=SGD(learning_rate=0.5),
            steps=2,
        ),
        mlo.Level(
            "net",
            objective=lambda values, batch: training(values["net"]),
            variables=START,
            given=("rate",),
            optimizer=SGD(learning_rate=Read("rate"), momentum=0.5),
            steps=3,
        ),
        mlo.Level(
            "u",
            objective=lambda values, batch: validation(values["net"]),
            variables=number(0.3),
            subject_to=("net", "rate"),
            optimizer=Adam(),
        ),
    ]
    graph = mlo.Graph(levels)
    assert graph.order == ("rate", "net", "u")
    u = number(0.3).requires_grad_()
    rate = start
    for _ in range(2):
        rate = rate - 0.5 * (rate - u.sigmoid())
    case = Case(None, {}, False, sgd, {"momentum": 0.5})
    w = response_by_hand(case, {"learning_rate": rate}, steps=3)
    right = torch.autograd.grad(validation(w), u)[0]
    assert relative_error(graph.hypergradient("u", graph.init()), right) < 1e-10
    graph.probe(graph.init())


def test_under_vmap_over_rates():
    case = cases["sgd, per tensor"]
    graph = mlo.Graph(levels_of(case, Unroll()))
    state = graph.init()
    several = {key: tensor + 0.1 * normal(3, seed=40) for key, tensor in state.values["rates"].items()}

    def at(rates: Any) -> Any:
        moved = mlo.State(values={**state.values, "rates": rates}, buffers={}, optimizers=state.optimizers)
        return graph.hypergradient("rates", moved)

    together = torch.func.vmap(at)(several)
    for n in range(3):
        alone = at({key: tensor[n] for key, tensor in several.items()})
        assert relative_error({key: tensor[n] for key, tensor in together.items()}, alone) < 1e-12


# What is read and not differentiated


def constant(values: Any, optimizer: Any, method: Any, weight: Tensor) -> mlo.Graph:
    """A ridge penalty under `u`, whose optimizer reads from a constant level, or has the numbers themselves."""
    return mlo.Graph(
        [
            mlo.Level("rates", variables=values),
            mlo.Level(
                "w",
                objective=lambda v, batch: (
                    0.5 * (v["w"]["a"] - v["u"]).square().sum() + v["w"]["b"].square().sum() * v["u"].sum()
                ),
                variables={"a": normal(3, seed=50), "b": normal(2, seed=51)},
                given=("u", "rates"),
                optimizer=optimizer,
                steps=2,
                hypergradient=method,
            ),
            mlo.Level(
                "u",
                objective=lambda v, batch: (v["w"]["a"] * weight).sum() + v["w"]["b"].square().sum(),
                variables=1 + normal(3, seed=52).square(),
                subject_to=("w",),
                optimizer=SGD(learning_rate=0.1),
            ),
        ]
    )


methods = [
    Exact(),
    ConjugateGradient(iterations=10),
    Neumann(terms=3, step_size=0.1),
    FirstOrder(),
    FiniteDifference(radius=1e-4),
]


@pytest.mark.parametrize("method", methods, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_every_method_takes_options_read_from_a_constant(method, kind):
    values = {
        "learning_rate": number(0.1),
        "weight_decay.a": number(0.2),
        "weight_decay.b": torch.tensor([0.3, 0.3]).double(),
    }
    numbers = kind(learning_rate=0.1, weight_decay=0.2, groups={"b": {"weight_decay": 0.3}})
    weight = normal(3, seed=53)
    reading = constant(values, kind(**read("learning_rate", "weight_decay")), method, weight)
    written = constant(values, numbers, method, weight)
    found, right = (graph.hypergradient("u", graph.init()) for graph in (reading, written))
    assert relative_error(found, right) < (1e-6 if isinstance(method, FiniteDifference) else 1e-12)
    moved, straight = (graph.step(graph.init())[0].values["w"] for graph in (reading, written))
    assert relative_error(moved, straight) < 1e-12


def test_the_decays_of_a_level_that_reads():
    w = {"a": torch.ones(2), "b": torch.ones(3)}
    values = {"rates": {"d.a": torch.tensor(0.1), "d.b": torch.full((3,), 0.2)}}
    found = l2_decays(SGD(learning_rate=0.1, weight_decay=Read("rates", "d")), 1, w, values)
    assert same_bits(found, {"a": torch.tensor(0.1), "b": torch.full((3,), 0.2)})


def test_an_upper_level_may_read_its_own_options():
    def graph(optimizer: Any) -> mlo.Graph:
        lower, upper = levels_of(cases["sgd, one rate"], Unroll())
        rates = mlo.Level("pace", variables=number(0.3), constraints={"*": "softplus"})
        upper = mlo.Level(
            "rates",
            objective=upper.objective,
            variables=upper.variables,
            subject_to=("net",),
            given=("pace",),
            optimizer=optimizer,
        )
        return mlo.Graph([lower, upper, rates])

    reading, written = graph(SGD(learning_rate=Read("pace"))), graph(SGD(learning_rate=0.3))
    found, right = (each.step(each.init())[0].values["rates"] for each in (reading, written))
    assert relative_error(found, right) < 1e-14


# What is refused


@final
@dataclass(frozen=True)
class Mine(AbstractHypergradient):
    """A method that knows nothing of options that are read."""

    def tape(self, steps: int, size: int) -> Tape:
        return Tape(recorded=0, kept=1)

    def cost(self, steps: int, size: int) -> Cost:
        return Cost(0, 0)

    def objection(self, optimizer: Any) -> None:
        return None

    def pullback(self, response: AbstractResponse, cotangent: Any) -> Any:
        return {}


@pytest.mark.parametrize(
    "method", [*methods, Implicit(inverse=Exact()), Mine()], ids=lambda method: type(method).__name__
)
def test_methods_that_do_not_follow_the_steps_are_refused(method):
    kind = type(method).__name__
    reason = f"level 'net', hypergradient: {kind} does not follow the optimizer's steps: how the response depends on "
    with pytest.raises(mlo.GraphError, match=f"{reason}learning_rate, read from 'rates'"):
        mlo.Graph(levels_of(cases["sgd, one rate"], method))


def test_such_a_method_is_refused_only_where_it_would_leave_something_out():
    """`rates` moves, and is held fixed by the only level that differentiates through the response."""
    lower, rates = levels_of(cases["sgd, one rate"], Exact())
    alone = mlo.Level(
        "rates",
        objective=lambda v, b: v["rates"]["learning_rate"].square(),
        variables=rates.variables,
        optimizer=Adam(),
    )
    lower = mlo.Level(
        "net",
        objective=lambda values, batch: training(values["net"]) + values["net"]["first"].square().sum() * values["u"],
        variables=START,
        given=("rates", "u"),
        optimizer=lower.optimizer,
        hypergradient=FiniteDifference(),
    )
    upper = mlo.Level("u", objective=rates.objective, variables=number(1.0), subject_to=("net",), optimizer=Adam())
    graph = mlo.Graph([lower, alone, upper])
    assert graph.parts("u", graph.init()).through["net"] != 0


NAMED = "'rates' has no tensor 'rate', nor a 'rate.first' for each parameter.\n  Known: learning_rate, momentum, w"
wrong = [
    (Read("rate", "learning_rate"), {}, "level", "no level named 'rate'. Did you mean 'rates'?"),
    (Read("net"), {}, "level", "an optimizer cannot read the level that it moves"),
    (
        Read("rates"),
        {"given": ()},
        "level",
        "'rates' is not listed; add it to `given`: an optimizer reads what is given",
    ),
    (Read("rates", "rate"), {}, "", NAMED),
    (Read("rates"), {}, "", "'rates' holds several tensors: name one, or call one like each parameter."),
]


@pytest.mark.parametrize(("option", "changes", "key", "message"), wrong)
def test_what_cannot_be_read_is_said(option, changes, key, message):
    case = Case(SGD(learning_rate=option), RATES, False, sgd, {})
    with pytest.raises(mlo.GraphError) as caught:
        mlo.Graph(levels_of(case, Unroll(), **changes))
    where = f"level 'net', optimizer.learning_rate{key and f'.{key}'}"
    assert f"{where}: {message}" in str(caught.value)


FITS = "expected one number or the shape of what it is for: parameter"
R = Read("rates", "r")
shapes = [
    (
        SGD(learning_rate=R),
        {"r": torch.ones(3)},
        "learning_rate",
        f"'rates.r' has shape (3,); {FITS} 'first' has (2, 4)",
    ),
    (SGD(learning_rate=R), torch.ones(()), "learning_rate", "'rates' is a single tensor: leave out the name 'r'"),
    (SGD(learning_rate=R), {"r.first": torch.ones(())}, "learning_rate", "'rates' has no tensor 'r.bias'"),
    (
        SGD(learning_rate=Read("rates")),
        {"first": torch.ones(()), "second": torch.ones(())},
        "learning_rate",
        "'rates' has no tensor 'bias'",
    ),
    (
        SGD(learning_rate=0.1, clip_norm=R),
        {"r": torch.ones(2)},
        "clip_norm",
        "'rates.r' has shape (2,); expected one number",
    ),
    (
        SGD(learning_rate=0.1, groups={"bias": {"momentum": R}}),
        {"r": torch.ones(3)},
        "groups.bias.momentum",
        f"'rates.r' has shape (3,); {FITS} 'bias' has (4,)",
    ),
]


@pytest.mark.parametrize(("optimizer", "variables", "key", "message"), shapes)
def test_shapes_that_do_not_fit_are_said(optimizer, variables, key, message):
    values = {key: tensor.double() for key, tensor in named(variables).items()}
    case = Case(optimizer, values if isinstance(variables, dict) else values[""], False, sgd, {})
    with pytest.raises(mlo.GraphError) as caught:
        mlo.Graph(levels_of(case, Unroll()))
    assert f"level 'net', optimizer.{key}: {message}" in str(caught.value)


def test_an_option_of_all_but_a_group_need_not_fit_the_group():
    optimizer = SGD(learning_rate=Read("rates"), groups={"second": {"learning_rate": 0.1}})
    values = {"first": number(0.1), "bias": number(0.1)}
    graph = mlo.Graph(levels_of(Case(optimizer, values, False, sgd, {}), Unroll()))
    assert all(part != 0 for part in graph.hypergradient("rates", graph.init()).values())


def test_an_optimizer_that_reads_is_not_updated_by_itself():
    optimizer, w = SGD(learning_rate=Read("rates")), torch.ones(3)
    with pytest.raises(TypeError, match=r"takes steps through mlo\.optimizer\.updated"):
        optimizer.update(w, optimizer.init(w), w)
    with pytest.raises(
        TypeError, match=r"reads from 'rates' takes steps through mlo\.optimizer\.updated, with its values"
    ):
        mlo.optimizer.updated(optimizer, 1, w, optimizer.init(w), w)
