"""Gradients of linear layers that are kept as factors have the derivative of gradients that are multiplied out.

The oracle is plain autograd: where somebody observes all modules, a chain is called layer by layer and nothing is factored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mlo
from mlo._engine import Iteration
from mlo._factored import _Factors
from mlo.hypergradient import CentralDifference as Central
from mlo.hypergradient import ConjugateGradient, Exact, Implicit, Neumann, Unroll
from mlo.optimizer import SGD, Adam

aten: Any = torch.ops.aten
X, U = normal(6, 3, seed=1), normal(6, seed=2)


def double(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6)
    return module.double()


def mlp(*between: nn.Module) -> nn.Module:
    layers = between or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2), nn.Softplus(), nn.Linear(2, 1))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 1))


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 1))


def tied() -> nn.Module:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), two, nn.Linear(3, 1))


def frozen(*names: str) -> nn.Module:
    module = mlp()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    return module


def fit(values: Any, batch: Any) -> Tensor:
    """A weight for each sample, and a shift of it."""
    out = values["w"](X + 0.1 * values["u"][:, None])[..., 0]
    return (values["u"].sigmoid() * (out - X.sum(1)).square()).mean()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # whether it is kept as factors
    "layers": (mlp, True),
    "one layer": (lambda: nn.Linear(3, 1), True),
    "without bias": (without_bias, True),
    "a layer twice": (shared, True),
    "a layer that is fixed": (lambda: frozen("0.weight", "0.bias"), True),
    "in place between": (lambda: mlp(nn.ELU(inplace=True)), False),
    "a weight that is fixed": (lambda: frozen("0.weight"), False),
    "tied": (tied, False),
}


def plain_call(values: Any, batch: Any) -> Tensor:
    return fit(values, batch)


def two_calls(values: Any, batch: Any) -> Tensor:
    return fit(values, batch) + 0.3 * values["w"](values["w"](X) * X).square().mean()


def one_sample(values: Any, batch: Any) -> Tensor:
    return fit(values, batch) + values["u"][0].exp() * values["w"](X[0]).square().sum()


def further_dimensions(values: Any, batch: Any) -> Tensor:
    return fit(values, batch) + (values["u"].exp() * values["w"](X.view(2, 3, 3)).square().view(6)).mean()


def no_call_counts(values: Any, batch: Any) -> Tensor:
    values["w"](X)
    return fit(values, batch)


def held_fixed(values: Any, batch: Any) -> Tensor:
    return fit(values, batch) * (1 + values["w"].fixed()(X).square().mean())


def linear_in_the_output(values: Any, batch: Any) -> Tensor:
    return (values["u"] * values["w"](X)[:, 0]).mean() + 0.1 * values["u"].square().sum()


def reads_a_tensor(values: Any, batch: Any) -> Tensor:
    weights = [tensor for name, tensor in values["w"].items() if name.endswith("weight")]
    return fit(values, batch) + values["u"].exp().mean() * sum(tensor.square().sum() for tensor in weights)


def changes_what_came_out(values: Any, batch: Any) -> Tensor:
    out = values["w"](X)
    out.mul_(values["u"][:, None])
    return (out - 1).square().mean()


def without_a_record(values: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        out = values["w"](X)[:, 0]
    return fit(values, batch) + (values["u"] * out).square().mean()


def in_a_transform(values: Any, batch: Any) -> Tensor:
    out = torch.func.vmap(lambda x: values["w"](x))(X)[:, 0]
    return fit(values, batch) + (values["u"].exp() * out.square()).mean()


def derivative_in_a_transform(values: Any, batch: Any) -> Tensor:
    value, pull = torch.func.vjp(lambda x: values["w"](x).square().sum(), X)
    return fit(values, batch) + (values["u"].exp() * pull(torch.ones_like(value))[0].sum(1)).mean()


def tangents(values: Any, batch: Any) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(values["w"](forward_ad.make_dual(X, X.cos()))).tangent
    return fit(values, batch) + (values["u"].exp() * out[:, 0].square()).mean()


def checkpointed(values: Any, batch: Any) -> Tensor:
    out: Any = checkpoint(lambda x: values["w"](x), X, use_reentrant=False)
    return fit(values, batch) + (values["u"].exp() * out[:, 0].square()).mean()


def recomputed(values: Any, batch: Any) -> Tensor:
    out: Any = checkpoint(lambda x: values["w"](x), X.clone().requires_grad_(), use_reentrant=True)
    return fit(values, batch) + (values["u"].exp() * out[:, 0].square()).mean()


def gradient_of_the_output(values: Any, batch: Any) -> Tensor:
    """None of its layers is differentiated inside."""
    out = values["w"](X)[:, 0]
    (slope,) = torch.autograd.grad(out.sin().sum(), out, create_graph=True)
    return fit(values, batch) + (values["u"].exp() * slope.square()).mean()


def own_gradient(values: Any, batch: Any) -> Tensor:
    """Of its own variables, inside."""
    loss = values["w"](X).square().mean()
    first = torch.autograd.grad(loss, next(iter(values["w"].values())), create_graph=True)[0]
    return fit(values, batch) + values["u"].exp().mean() * first.square().sum()


def gradient_of_the_input(values: Any, batch: Any) -> Tensor:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(values["w"](x).sum(), x, create_graph=True)
    return fit(values, batch) + (values["u"].exp() * (slope.norm(dim=1) - 1).square()).mean()


OBJECTIVES: dict[str, tuple[Callable[[Any, Any], Tensor], bool]] = {
    each.__name__: (each, factored)
    for each, factored in [
        (plain_call, True),
        (two_calls, True),
        (one_sample, True),
        (further_dimensions, True),
        (no_call_counts, True),
        (held_fixed, True),
        (linear_in_the_output, True),
        (reads_a_tensor, False),
        (changes_what_came_out, False),
        (without_a_record, False),
        (in_a_transform, False),
        (derivative_in_a_transform, False),
        (tangents, False),
        (checkpointed, False),
        (recomputed, False),
        (gradient_of_the_input, False),
        (gradient_of_the_output, True),
        (own_gradient, False),
    ]
}

METHODS = {
    "replayed": Unroll(replay=True),
    "checkpoints": Unroll(checkpoint="sqrt"),
    "Neumann": Neumann(terms=3, step_size=0.1),
    "CG": ConjugateGradient(iterations=3, damping=5.0),
    "exact": Exact(damping=5.0),
    "differences": Implicit(inverse=Neumann(terms=2, step_size=0.1), cross=Central(radius=1e-4)),
}
SGDS = {
    "momentum": SGD(learning_rate=0.1, momentum=0.9),
    "nesterov": SGD(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampened": SGD(learning_rate=0.1, momentum=0.9, dampening=0.5),
    "Adam": Adam(learning_rate=0.05),
    "clipped": SGD(learning_rate=0.1, clip_norm=0.3),
}


def graph_of(network: nn.Module, objective: Any, method: Any, optimizer: Any = SGDS["momentum"]) -> mlo.Graph:
    w = mlo.Level(
        "w",
        objective=objective,
        variables=double(network),
        given=["u"],
        optimizer=optimizer,
        steps=3,
        hypergradient=method,
    )
    upper = lambda values, batch: (values["w"](X + 0.5)[:, 0] - values["u"].cos()).square().mean()  # noqa: E731
    return mlo.Graph(
        [w, mlo.Level("u", objective=upper, variables=U, subject_to=["w"], optimizer=SGD(learning_rate=0.1))]
    )


@contextmanager
def observed() -> Iterator[None]:
    """Somebody looks at all modules."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[_Factors]:
    """Every gradient that is kept as factors, as it is made."""
    made = list[_Factors]()
    begin = _Factors.__init__

    def noting(self: _Factors, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(_Factors, "__init__", noting)
    return made


def check(graph: mlo.Graph, factors: list[_Factors], *, factored: bool, tolerance: float = 1e-12) -> None:
    state = graph.init(seed=3)
    found = graph.parts("u", state).indirect
    assert bool(factors) == factored
    factors.clear()
    with observed():
        right = graph.parts("u", state).indirect
    assert not factors
    assert right.norm() > 0
    assert relative_error(found, right) <= tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_has_the_derivative_of_the_gradient(network, method, factors):
    build, factored = NETWORKS[network]
    tolerance = 1e-7 if method == "differences" else 1e-12
    check(graph_of(build(), fit, METHODS[method]), factors, factored=factored, tolerance=tolerance)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch, in forward mode
@pytest.mark.parametrize("method", ["replayed", "CG"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whatever_the_objective_does(objective, method, factors):
    function, factored = OBJECTIVES[objective]
    check(graph_of(mlp(), function, METHODS[method]), factors, factored=factored)


@pytest.mark.parametrize("method", ["replayed", "checkpoints", "Neumann"])
@pytest.mark.parametrize("optimizer", SGDS)
def test_under_every_optimizer(optimizer, method, factors):
    check(graph_of(mlp(), fit, METHODS[method], SGDS[optimizer]), factors, factored=True)


def test_under_autocast_it_is_multiplied_out(factors):
    def half(values: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = values["w"](X.float())[:, 0]
        return (values["u"].sigmoid() * (out.float() - 1).square()).mean()

    w = mlo.Level("w", objective=half, variables=mlp().float(), given=["u"], optimizer=SGDS["momentum"], steps=3,
                  hypergradient=METHODS["replayed"])  # fmt: skip
    upper = lambda values, batch: values["w"](X.float()).square().mean()  # noqa: E731
    u = mlo.Level("u", objective=upper, variables=U.float(), subject_to=["w"], optimizer=SGD(learning_rate=0.1))
    check(mlo.Graph([w, u]), factors, factored=False)


@pytest.mark.parametrize("network", [name for name, (_, factored) in NETWORKS.items() if factored])
def test_the_factors_multiply_to_the_gradient(network, factors):
    graph = graph_of(NETWORKS[network][0](), fit, METHODS["Neumann"])
    inside = Iteration.of(graph._plan, graph.init(), {})
    response = inside.retake("w", ("u", "w"))
    found: Any = response.linearise()
    assert factors
    with observed():
        right: Any = response.linearise()
    one, two = found.gradient, right.gradient
    assert one.keys() == two.keys()
    assert not any(tensor.requires_grad for tensor in one.values())
    assert relative_error(one, two) <= 1e-14


class Counting(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function in (aten.mm.default, aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "times"), [("replayed", 3), ("Neumann", 1)])
def test_a_product_a_layer_is_not_made(method, times):
    """Once for each step that is replayed, and once for a linearisation, however many products it gives."""
    graph = graph_of(mlp(), fit, METHODS[method])
    state, counted = graph.init(), list[int]()
    with Counting() as factored:
        graph.parts("u", state)
    with observed(), Counting() as multiplied:
        graph.parts("u", state)
    counted = [factored.products, multiplied.products]
    assert counted[1] - counted[0] == 3 * times


def test_a_level_that_is_not_there_is_an_error_as_before():
    graph = graph_of(
        mlp(), lambda values, batch: values["u"].square().sum() * values["w"].fixed()(X).sum(), METHODS["CG"]
    )
    with pytest.raises(mlo.GraphError, match="does not depend on the level's own variables"):
        graph.parts("u", graph.init())


def test_state_and_random_numbers_stay_as_they_were(factors):
    network = mlp(nn.Tanh(), nn.Dropout(0.4))
    graph = graph_of(network, fit, METHODS["replayed"])
    state = graph.init(seed=5)
    before = {name: tensor.clone() for name, tensor in state.values["w"].items()}
    generator = torch.get_rng_state()
    found = [graph.parts("u", state).indirect for _ in range(2)]
    assert factors
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state.values["w"][name], tensor) for name, tensor in before.items())
