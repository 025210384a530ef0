"""Gradients of linear layers that are kept as factors have the derivative of gradients that are multiplied out.

The oracle is plain autograd: where somebody observes all modules, a chain is called layer by layer and nothing is factored.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mlo
from mlo import _tree
from mlo._autodiff import grouped
from mlo._chain import Watched, chain_of
from mlo._engine import Iteration
from mlo._factored import Factored, _Recorded, gradients_as_factors
from mlo.hypergradient import CentralDifference as Central
from mlo.hypergradient import ConjugateGradient, Exact, Implicit, Neumann, Unroll
from mlo.optimizer import SGD, Adam

aten: Any = torch.ops.aten
X, U = normal(6, 3, seed=1), normal(6, seed=2)


def double(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def mlp(*between: nn.Module) -> nn.Module:
    layers = between or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(3, 16), *layers, nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 1))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 1))


def shared() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(8, 1))


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


def hooked(values: Any, batch: Any) -> Tensor:
    """Linear in what comes out, so that the hook does not run in second passes."""
    out = values["w"](X + 0.1 * values["u"][:, None])
    if out.requires_grad:
        out.register_hook(lambda gradient: 2 * gradient)
    return (values["u"].sigmoid() * out[:, 0]).mean()


def hooked_node(values: Any, batch: Any) -> Tensor:
    out = values["w"](X + 0.1 * values["u"][:, None])
    if out.grad_fn is not None:
        out.grad_fn.register_prehook(lambda gradients: (3 * gradients[0],))
    return (values["u"].sigmoid() * out[:, 0]).mean()


def detached_in_place(values: Any, batch: Any) -> Tensor:
    target = values["w"](X)
    target.detach_()
    return fit(values, batch) + (values["u"].exp() * (values["w"](X) - target.cos())[:, 0].square()).mean()


def empty(values: Any, batch: Any) -> Tensor:
    return fit(values, batch) + values["w"](X[X[:, 0] > 1e3]).sum() * values["u"].sum()


def sparse(values: Any, batch: Any) -> Tensor:
    return fit(values, batch) + (values["u"].exp() * values["w"](X.to_sparse())[:, 0].square()).mean()


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


def slope_in_a_transform(values: Any, batch: Any) -> Tensor:
    """What comes out of the layers has no history there, and is a plain tensor."""
    one = torch.ones((), dtype=X.dtype)
    slope = torch.func.grad(lambda scale: (scale * values["w"](X)).square().mean())(one)
    return fit(values, batch) + values["u"].exp().mean() * slope.square()


def jacobian_in_a_transform(values: Any, batch: Any) -> Tensor:
    jacobian: Any = torch.func.jacrev(lambda scale: (scale * values["w"](X)).mean(1))(torch.ones((), dtype=X.dtype))
    return fit(values, batch) + (values["u"].exp() * jacobian).mean()


def in_inference_mode(values: Any, batch: Any) -> Tensor:
    with torch.inference_mode(), torch.enable_grad():
        signs = values["w"](X)[:, 0].sign().tolist()
    return fit(values, batch) + (values["u"].exp() * (values["w"](X)[:, 0] - torch.tensor(signs)).square()).mean()


def copied(values: Any, batch: Any) -> Tensor:
    """The copy has leaves of its own, and is a constant."""
    out = values["w"](X)
    twin = deepcopy(values["w"])
    assert torch.equal(twin(X), out)
    return fit(values, batch) + (values["u"].exp() * (out - 2 * twin(X).detach())[:, 0].square()).mean()


def traced_inside(values: Any, batch: Any) -> Tensor:
    """The leaves are constants of a trace of the objective's own, which is run again later."""
    run = make_fx(lambda x: values["w"](x))(X)
    return fit(values, batch) + (values["u"].exp() * run(X)[:, 0].square()).mean()


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
        (changes_what_came_out, True),
        (hooked, True),
        (hooked_node, True),
        (detached_in_place, True),
        (empty, True),
        (sparse, False),
        (without_a_record, False),
        (in_a_transform, False),
        (derivative_in_a_transform, False),
        (slope_in_a_transform, False),
        (jacobian_in_a_transform, False),
        (in_inference_mode, False),
        (copied, True),
        (tangents, False),
        (checkpointed, False),
        (recomputed, False),
        (gradient_of_the_input, False),
        (gradient_of_the_output, True),
        (own_gradient, False),
        (traced_inside, False),
    ]
}

METHODS = {
    "replayed": Unroll(replay=True),
    "checkpoints": Unroll(checkpoint="sqrt"),
    "Neumann": Neumann(terms=3, step_size=0.1),
    "CG": ConjugateGradient(iterations=3, damping=50.0),
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


def apart(values: Any, batch: Any) -> Tensor:
    """What an upper level minimises, on other samples than `fit`."""
    return (values["w"](X + 0.5)[:, 0] - values["u"].cos()).square().mean()


def graph_of(
    network: nn.Module,
    objective: Any,
    method: Any,
    optimizer: Any = SGDS["momentum"],
    *,
    upper: Any = apart,
    steps: int = 3,
) -> mlo.Graph:
    w = mlo.Level(
        "w",
        objective=objective,
        variables=double(network),
        given=["u"],
        optimizer=optimizer,
        steps=steps,
        hypergradient=method,
    )
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
def factors(monkeypatch: pytest.MonkeyPatch) -> list[_Recorded]:
    """Every gradient that is kept as factors, as it is made."""
    made = list[_Recorded]()
    begin = _Recorded.__init__

    def noting(self: _Recorded, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(_Recorded, "__init__", noting)
    return made


def check(graph: mlo.Graph, factors: list[_Recorded], *, factored: bool, tolerance: float = 1e-12) -> None:
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
@pytest.mark.parametrize(("method", "optimizer"), [("replayed", "momentum"), ("replayed", "Adam"), ("CG", "momentum")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whatever_the_objective_does(objective, method, optimizer, factors):
    function, factored = OBJECTIVES[objective]
    check(graph_of(mlp(), function, METHODS[method], SGDS[optimizer]), factors, factored=factored)


RECORDED = Unroll(replay=False)


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "dampened"])
@pytest.mark.parametrize("network", NETWORKS)
def test_of_one_step_that_is_recorded(network, optimizer, factors):
    """Neither its gradient nor the cotangent on it is multiplied out where both are factors."""
    build, factored = NETWORKS[network]
    check(graph_of(build(), fit, RECORDED, SGDS[optimizer], steps=1), factors, factored=factored)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch, in forward mode
@pytest.mark.parametrize("network", ["layers", "a layer twice", "a layer that is fixed", "without bias"])
@pytest.mark.parametrize("upper", OBJECTIVES)
def test_whatever_the_upper_objective_does(upper, network, factors):
    function, _ = OBJECTIVES[upper]
    graph = graph_of(NETWORKS[network][0](), fit, RECORDED, steps=1, upper=function)
    check(graph, factors, factored=True)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "tangents"])
def test_whatever_the_objective_of_a_recorded_step_does(objective, factors):
    function, factored = OBJECTIVES[objective]
    check(graph_of(mlp(), function, RECORDED, steps=1), factors, factored=factored)


def cotangent(graph: mlo.Graph) -> Any:
    """What arrives on the response of w."""
    inside = Iteration.of(graph._plan, graph.init(seed=3), {})
    inside.differentiate("u", inside.respond_below("u", ("u", "w")), 0)
    return inside.tally.cotangents["u", "w"]


@pytest.mark.parametrize("network", ["layers", "one layer", "a layer twice", "a layer that is fixed", "without bias"])
def test_a_cotangent_of_factors_is_multiplied_out_for_whoever_looks(network):
    graph = graph_of(NETWORKS[network][0](), fit, RECORDED, steps=1)
    found = cotangent(graph)
    with observed():
        right = cotangent(graph)
    assert type(found) is Factored
    assert type(right) is dict
    assert list(found) == list(right)
    assert len(found) == len(right)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert relative_error(dict(found), right) <= 1e-14


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(1, 9), st.integers(1, 9), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_the_image_is_the_same_either_way(sizes, here, there, has_bias, looked):
    """aVᵀ + v by inner products of samples, and by V itself, whatever is cheaper."""
    layers: list[nn.Module] = [nn.Linear(one, two, bias=has_bias) for one, two in pairwise(sizes)]
    network = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()
    chain = chain_of(network)
    assert chain is not None
    start = {name: parameter.detach() for name, parameter in network.named_parameters()}
    x, y = normal(there, sizes[0], seed=1), normal(there, sizes[-1], seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlo._chain.IMAGES", 100)
        found, _, _ = gradients_as_factors(lambda at: ((chain(at["w"], x, at["w"]) * y).sum(), None), {"w": start}, "w")
    with observed():
        right = torch.autograd.grad((network(x) * y).sum(), list(network.parameters()))
    given = dict(zip(start, right, strict=True))
    images: Any = found["w"]
    for number, size in enumerate(sizes[:-1]):
        a = normal(here, size, seed=10 + number)
        weight, bias = f"{2 * number}.weight", f"{2 * number}.bias"
        if looked:
            assert relative_error(images[weight], given[weight]) <= 1e-12
        image = images.image(a, weight, bias if has_bias else None)
        expected = a @ given[weight].mT + (given[bias] if has_bias else 0)
        torch.testing.assert_close(image, expected, rtol=1e-10, atol=1e-12)


def test_a_wide_layer_is_multiplied_out_in_neither_of_two_steps(monkeypatch: pytest.MonkeyPatch):
    """Of the cotangent on 16 x 16 weights with 6 samples on both sides there are inner products of samples, and no V."""
    shapes = list[tuple[int, ...]]()
    whole = torch.Tensor.mm
    monkeypatch.setattr(torch.Tensor, "mm", lambda one, two: shapes.append(whole(one, two).shape) or whole(one, two))
    cotangent(graph_of(mlp(), fit, RECORDED, steps=1))
    assert shapes.count(torch.Size([16, 16])) == 1  # the gradient that the step follows
    assert torch.Size([16, 3]) in shapes[3:]  # a narrow one


def test_what_went_into_a_layer_must_stay_until_it_is_looked_at():
    x = X.clone()
    upper = lambda values, batch: values["w"](x).square().mean()  # noqa: E731
    found = cotangent(graph_of(mlp(), fit, RECORDED, steps=1, upper=upper))
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        dict(found)


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


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_numbers_are_left_alone(factors):
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.complex128)

    def absolute(values: Any, batch: Any) -> Tensor:
        return (values["u"].sigmoid() * values["w"](X.to(torch.complex128))[:, 0].abs().square()).mean()

    w = mlo.Level("w", objective=absolute, variables=network, given=["u"], optimizer=SGDS["momentum"], steps=3,
                  hypergradient=METHODS["replayed"])  # fmt: skip
    upper = lambda values, batch: (values["w"](X.to(torch.complex128)).abs() - 1).square().mean()  # noqa: E731
    u = mlo.Level("u", objective=upper, variables=U, subject_to=["w"], optimizer=SGD(learning_rate=0.1))
    check(mlo.Graph([w, u]), factors, factored=False)


def test_a_batch_that_would_take_more_memory_than_the_variables_is_not_factored(factors):
    x = normal(400, 3, seed=8)

    def many(values: Any, batch: Any) -> Tensor:
        return fit(values, batch) + values["u"].exp().mean() * values["w"](x).square().mean()

    check(graph_of(mlp(), many, METHODS["replayed"]), factors, factored=False)


def test_a_method_may_map_its_directions(factors):
    inside = Iteration.of(graph_of(mlp(), fit, METHODS["CG"])._plan, graph_of(mlp(), fit, METHODS["CG"]).init(), {})
    at: Any = inside.retake("w", ("u", "w")).linearise()
    assert factors
    directions = {name: normal(4, *tensor.shape, seed=9) for name, tensor in at.variables.items()}
    mapped = torch.vmap(at.hessian)(directions)
    for number in range(4):
        one = at.hessian({name: tensor[number] for name, tensor in directions.items()})
        assert relative_error({name: tensor[number] for name, tensor in mapped.items()}, one) <= 1e-12


@pytest.mark.parametrize("late", [False, True])
def test_nothing_is_left_behind(late, factors):
    """After an objective that fails, and after a module that is called once its value is there."""
    alive = list[weakref.ref[Tensor]]()
    failing = [False]

    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, call: Any) -> Tensor:
            ctx.call = call
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            with torch.enable_grad():
                alive.append(weakref.ref(ctx.call(X)))
            return gradient, None

    def objective(values: Any, batch: Any) -> Tensor:
        out = values["w"](X)
        alive.append(weakref.ref(out))
        if failing[0]:
            raise RuntimeError("it fails")
        loss = (values["u"].sigmoid() * out[:, 0].square()).mean()
        return Calls.apply(loss, values["w"]) if late else loss

    graph = graph_of(mlp(), objective, METHODS["CG"])
    inside = Iteration.of(graph._plan, graph.init(), {})
    response = inside.retake("w", ("u", "w"))
    failing[0] = not late
    with suppress(RuntimeError):
        response.linearise()
    factors.clear()
    gc.collect()
    assert alive
    assert not any(reference() is not None for reference in alive)


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


@pytest.mark.parametrize("way", ["held fixed", "without a record"])
def test_layers_that_do_not_count_hold_nothing(way):
    """Three activations stand while the objective goes on, and none of them is needed."""
    network = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 1)).double()
    for parameter in (network if way == "held fixed" else nn.Sequential()).parameters():
        parameter.requires_grad_(False)
    watched = Watched({f"leaf.{name}": tensor for name, tensor in network.named_parameters()})
    if way == "without a record":
        watched = Watched({name: tensor.detach().requires_grad_() for name, tensor in network.named_parameters()})
    chain = chain_of(network)
    assert chain is not None
    with torch.set_grad_enabled(way == "held fixed"):
        out = chain({**dict(network.named_parameters()), **watched}, X, watched)
    assert out.shape == (6, 1)
    assert not watched._layers
    assert watched.elsewhere == (way == "without a record")


def test_what_goes_through_layers_that_are_held_fixed_is_not_held():
    network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)], nn.Linear(3, 1)).double()
    trained = dict(network[-1].named_parameters(prefix="4"))
    watched = Watched(trained)
    alive = list[Any]()
    chain = chain_of(network)
    assert chain is not None

    class Seen(TorchDispatchMode):
        """How many outputs of the layers are alive whenever another operation runs."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function in (aten.addmm.default, aten.linear.default):
                alive.append(weakref.ref(out))
                counts.append(sum(each() is not None for each in alive))
            return out

    counts = list[int]()
    with Seen(), torch.no_grad():
        chain({**dict(network.named_parameters()), **watched}, X)
    right, counts[:] = list(counts), []
    fixed = {name: tensor.detach() for name, tensor in network.named_parameters() if name not in trained}
    with Seen():
        chain({**fixed, **watched}, X, watched)
    assert counts == right
    assert len(right) == 5


def test_an_objective_that_differentiates_and_fails_leaves_nothing_behind():
    seen = list[Any]()

    def failing(values: Any, batch: Any) -> Tensor:
        x = X.clone().requires_grad_()
        seen.append(weakref.ref(x.untyped_storage()))
        (slope,) = torch.autograd.grad(values["w"](x).sum(), x, create_graph=True)
        if len(seen) > 3:  # three steps, and then where it is linearised
            raise ValueError("by accident")
        return fit(values, batch) + slope.square().mean()

    graph = graph_of(mlp(), failing, METHODS["CG"])
    with pytest.raises(ValueError, match="by accident"):
        graph.parts("u", graph.init(seed=3))
    gc.collect()
    assert len(seen) == 4
    assert not [reference for reference in seen if reference() is not None]


def test_a_layer_that_adds_its_bias_in_place_is_factored(factors):
    """As torch does for an input of three dimensions that is not contiguous."""

    def objective(values: Any, batch: Any) -> Tensor:
        x = X.reshape(2, 3, 3).transpose(0, 1)
        return (values["u"].exp() * (values["w"](x).reshape(-1) - 1).square()).mean()

    check(graph_of(mlp(), objective, METHODS["CG"]), factors, factored=True)


def test_a_tree_without_tensors_is_not_there():
    w = {"w": torch.ones(2)}
    assert grouped({"empty": {}, "w": w}, [None]) == {}
    assert grouped({"empty": {}, "w": w}, [w["w"]]) == {"w": w}


@pytest.mark.parametrize("names", [("w", "z"), ("w", "a")])
@pytest.mark.parametrize("method", [Unroll(replay=True), Neumann(terms=2, step_size=0.1), RECORDED])
def test_memory_that_is_read_into_again(method, names):
    """By NumPy, say, which counts no versions: another level is pulled back, with evaluations, before or after this one."""
    memory = X.clone()
    numbers = memory.numpy()
    name = names[1]

    def read(x: Tensor) -> Tensor:
        numbers[:] = x.numpy()
        return torch.from_numpy(numbers)

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["u"].sigmoid() * values[name](read(2 * X))[:, 0].square()).mean()

    def upper(values: Any, batch: Any) -> Tensor:
        return (values["w"](read(X + 0.5))[:, 0] - values["u"].cos()).square().mean() + values[name](X).sin().mean()

    levels = [
        mlo.Level("w", objective=fit, variables=double(mlp()), given=["u"], optimizer=SGDS["momentum"],
                  hypergradient=RECORDED),
        mlo.Level(name, objective=inner, variables=double(mlp()), given=["u"], optimizer=SGDS["momentum"],
                  hypergradient=method),
        mlo.Level("u", objective=upper, variables=U, subject_to=["w", name], optimizer=SGD(learning_rate=0.1)),
    ]  # fmt: skip
    graph = mlo.Graph(levels)
    found = graph.parts("u", graph.init(seed=3)).total
    with observed():
        right = graph.parts("u", graph.init(seed=3)).total
    assert relative_error(found, right) <= 1e-12


def test_half_precision_does_not_overflow_in_between():
    """Samples of length 480 have inner products above 65504, the largest number there is."""
    x, u = (normal(6, 64, seed=1) * 60).half(), normal(6, seed=2).half()
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).half()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e-2)
    inner = lambda values, batch: (values["u"].sigmoid() * values["w"](x)[:, 0]).square().mean()  # noqa: E731
    upper = lambda values, batch: (values["w"](x + 0.5)[:, 0] - 1).square().mean()  # noqa: E731
    graph = mlo.Graph([
        mlo.Level("w", objective=inner, variables=network, given=["u"], optimizer=SGDS["momentum"], hypergradient=RECORDED),
        mlo.Level("u", objective=upper, variables=u, subject_to=["w"], optimizer=SGD(learning_rate=0.1)),
    ])  # fmt: skip
    found = graph.hypergradient("u", graph.init())
    with observed():
        right = graph.hypergradient("u", graph.init())
    torch.testing.assert_close(found, right, rtol=2e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_that_nothing_goes_into():
    network = nn.Sequential(nn.Linear(0, 5), nn.Tanh(), nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.zeros(6, 0, dtype=torch.float64)
    inner = lambda values, batch: (values["u"].sigmoid() * (values["w"](x)[:, 0] - 1).square()).mean()  # noqa: E731
    upper = lambda values, batch: (values["w"](x)[:, 0] - 2).square().mean()  # noqa: E731
    graph = graph_of(network, inner, RECORDED, steps=1, upper=upper)
    found = graph.hypergradient("u", graph.init())
    with observed():
        right = graph.hypergradient("u", graph.init())
    assert relative_error(found, right) <= 1e-12


def test_a_method_of_the_users_own_gets_a_tree_of_tensors():
    class Own(Unroll):
        def pullback(self, response: Any, cotangent: Any) -> Any:
            assert type(cotangent) is dict
            return response.pull_recorded(cotangent)

    graph = graph_of(mlp(), fit, Own(replay=False), steps=1)
    with observed():
        right = graph.hypergradient("u", graph.init())
    assert relative_error(graph.hypergradient("u", graph.init()), right) <= 1e-12


def test_the_graph_of_the_upper_objective_is_not_held():
    found = cotangent(graph_of(mlp(), fit, RECORDED, steps=1))
    assert all(pair.before.grad_fn is None and not pair.delta.requires_grad for pair in found._pairs)


class Doubled(TorchFunctionMode):
    """Somebody stands between functions and what they do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is nn.functional.linear else out


def doubled(values: Any, batch: Any) -> Tensor:
    with Doubled():
        return fit(values, batch)


def batched(values: Any, batch: Any) -> Tensor:
    return (values["u"].exp() * values["w"](batch)[:, 0].square()).mean()


@pytest.mark.parametrize(
    ("objective", "factored"),
    [(fit, True), (batched, True), (doubled, False), (own_gradient, False), (traced_inside, False)],
)
def test_of_a_step_that_is_traced(objective, factored, factors):
    """The tensors and modes of the tracer are no obstacle; those of others are."""
    levels = graph_of(mlp(nn.ReLU()), objective, RECORDED, steps=1).levels.values()
    graph, plain = mlo.Graph(levels, compile="eager"), mlo.Graph(levels)
    state, batches = graph.init(seed=3), {"w": X + 0.1}
    state, _ = graph.step(state, batches)  # as it is, and then traced for those to come
    assert len(factors) == (2 if factored else 0)
    found, _ = graph.step(state, batches)
    with observed():
        right, _ = plain.step(state, batches)
    for level in ("w", "u"):
        for one, two in zip(_tree.leaves(found.values[level]), _tree.leaves(right.values[level]), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("compiled", [False, "eager"])
def test_calls_of_modules_that_somebody_has_replaced(compiled, monkeypatch, factors):
    """By a function that hides behind the one it replaces, as a tracer's does."""
    call = nn.Module.__call__

    @functools.wraps(call)
    def doubling(module: nn.Module, *arguments: Any) -> Any:
        out = call(module, *arguments)
        return 2 * out if type(module) is nn.Linear else out

    levels = graph_of(mlp(nn.ReLU()), batched, RECORDED, steps=1).levels.values()
    graph, plain = mlo.Graph(levels, compile=compiled), mlo.Graph(levels)
    state, _ = graph.step(graph.init(seed=3), {"w": X + 0.1})
    _, usual = plain.step(state, {"w": X + 0.1})
    factors.clear()
    monkeypatch.setattr(nn.Module, "__call__", doubling)
    graph = mlo.Graph(levels, compile=compiled)
    _, found = graph.step(state, {"w": X + 0.1})
    assert not factors
    with observed():
        _, right = plain.step(state, {"w": X + 0.1})
    assert not torch.isclose(right.losses["w"], usual.losses["w"], rtol=0.1)
    torch.testing.assert_close(found.losses["w"], right.losses["w"], rtol=1e-12, atol=1e-14)
    assert nn.Module.__call__ is doubling
