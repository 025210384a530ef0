"""Products summed over chunks of a batch are those of the whole, and what cannot be divided is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import normal
from torch import Tensor, nn
from torch.nn.functional import batch_norm

import mlo
from mlo._audit._memory import peak_of
from mlo._chunks import divided
from mlo._run._warnings import CHUNKS, warnings
from mlo.hypergradient import (
    GMRES,
    CentralDifference,
    ConjugateGradient,
    Equilibrium,
    Exact,
    FirstOrder,
    Implicit,
    Neumann,
    Nystrom,
    Preconditioned,
)
from mlo.optimizer import SGD, Adam
from mlo.testing._network import Noisy, sampled, samples
from mlo.testing._simulated import in_processes

METHODS: Mapping[str, Any] = {
    "neumann": Neumann(terms=5, step_size=0.5),
    "neumann, auto": Neumann(terms=5, step_size="auto", damping=0.1),
    "neumann, measured": Neumann(terms=2, step_size=0.5, measure_curvature=True, compare="first_order"),
    "conjugate gradients": ConjugateGradient(iterations=3),
    "conjugate gradients, warm": ConjugateGradient(iterations=2, warm_start=True),
    "gmres": GMRES(iterations=3),
    "nystrom": Nystrom(rank=2, damping=0.1),
    "exact": Exact(damping=0.1),
    "first order": FirstOrder(scale=0.3),
    "preconditioned": Preconditioned(),
    "central differences": Implicit(inverse=Neumann(terms=2, step_size=0.5), cross=CentralDifference()),
}
OPTIMIZERS = {"sgd": SGD(learning_rate=0.1, momentum=0.5, weight_decay=0.1), "adam": Adam(learning_rate=0.1)}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def in_chunks(method: Any, chunks: int) -> Any:
    if isinstance(method, Implicit):
        return replace(method, inverse=replace(method.inverse, chunks=chunks))
    return replace(method, chunks=chunks)


def distance(found: Any, right: Any) -> float:
    return ((found - right).norm() / right.norm()).item()


@methods
@pytest.mark.parametrize(("chunks", "kind"), [(2, "adam"), (3, "sgd"), (11, "sgd")])
def test_chunks_of_any_size_give_the_products_of_the_whole_batch(method: Any, chunks: int, kind: str) -> None:
    """Of 8 samples: 4 + 4, 3 + 3 + 2, and one each, which is as many chunks as there can be; at a second iteration too."""
    optimizer = OPTIMIZERS[kind]
    batches = samples(3, slice(None))
    whole, parts = (mlo.Graph(sampled(in_chunks(method, count), optimizer, 2, 3)) for count in (1, chunks))
    state = whole.init()
    for _ in range(2):
        right, found = (graph.hypergradient("u", state, batches) for graph in (whole, parts))
        allowed = 1e-11 if isinstance(method, Implicit) else 1e-12  # a difference, divided by its radius
        assert distance(found, right) <= allowed
        state, metrics = parts.step(state, batches)
        for report in metrics.reports.values():
            assert report["chunk_difference"] <= 1e-15


@methods
def test_a_product_over_chunks_is_counted_as_one_and_its_gradient(method: Any) -> None:
    batches = samples(0, slice(None))
    costs = {}
    for chunks in (1, 2, 4):
        graph = mlo.Graph(sampled(in_chunks(method, chunks), OPTIMIZERS["sgd"], 2, 0))
        _, metrics = graph.step(graph.init(), batches)
        costs[chunks] = metrics.gradients, metrics.products
        predicted = tuple(graph.cost(1)[:2])
        assert predicted == costs[chunks] or (method.may_stop and predicted >= costs[chunks])
    (gradients, products), divided_costs = costs[1], costs[2]
    assert divided_costs == (gradients + products, products)
    assert costs[4] == divided_costs


def test_chunks_against_the_dense_implicit_gradient() -> None:
    """Ridge regression with a penalty for each number: everything is written out."""
    x, y, w, u = normal(7, 4, seed=0), normal(7, seed=1), normal(4, seed=2), normal(4, seed=3)

    def inner(values: Any, batch: Any) -> Tensor:
        fit = (batch["x"] @ values["w"] - batch["y"]).square().mean()
        return 0.5 * fit + 0.5 * (values["u"].exp() * values["w"].square()).sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"] - 1).square().sum()

    lower = mlo.Level("w", objective=inner, variables=w, given=("u",), optimizer=SGD(learning_rate=0.1), steps=0,
                      hypergradient=Exact(chunks=3))  # fmt: skip
    upper = mlo.Level("u", objective=outer, variables=u, subject_to=("w",), optimizer=SGD(learning_rate=0.1))
    graph = mlo.Graph([lower, upper])
    found = graph.hypergradient("u", graph.init(), {"w": {"x": x, "y": y}})
    hessian = x.T @ x / 7 + u.exp().diag()
    right = -u.exp() * w * torch.linalg.solve(hessian, 2 * (w - 1))
    assert distance(found, right) <= 1e-13


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(x)).tanh())


def normalised(method: Any, *, training: bool = True) -> tuple[mlo.Graph, dict[str, Any]]:
    torch.manual_seed(0)
    network = Normalised().double()

    def inner(values: Any, batch: Any) -> Tensor:
        x = batch["x"] * values["u"].exp()
        return (values["w"](x, training=training)[:, 0] - batch["y"]).square().mean()

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"](batch["x"])[:, 0] - batch["y"]).square().mean()

    lower = mlo.Level("w", objective=inner, variables=network, given=("u",), optimizer=SGD(learning_rate=0.1),
                      hypergradient=method)  # fmt: skip
    upper = mlo.Level("u", objective=outer, variables=normal(3, seed=4), subject_to=("w",),
                      optimizer=SGD(learning_rate=0.1))  # fmt: skip
    batches = {
        name: {"x": normal(8, 3, seed=seed), "y": normal(8, seed=seed + 1)} for name, seed in (("w", 5), ("u", 7))
    }
    return mlo.Graph([lower, upper]), batches


def test_batch_statistics_are_those_of_a_chunk_and_the_difference_is_reported() -> None:
    """By hand: the same double reverse pass over 5 of 8 samples, and over 3."""
    graph, batches = normalised(FirstOrder(chunks=2))
    state = graph.init()
    after, metrics = graph.step(state, batches)
    w = {name: tensor.requires_grad_() for name, tensor in after.values["w"].items()}
    u = state.values["u"].clone().requires_grad_()

    def network(x: Tensor) -> Tensor:
        x = x @ w["inner.weight"].T + w["inner.bias"]
        x = batch_norm(
            x, torch.zeros(4).double(), torch.ones(4).double(), w["norm.weight"], w["norm.bias"], training=True
        )
        return (x.tanh() @ w["outer.weight"].T + w["outer.bias"])[:, 0]

    def loss(rows: slice) -> Tensor:
        x, y = batches["w"]["x"][rows], batches["w"]["y"][rows]
        return (network(x * u.exp()) - y).square().mean()

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(value, list(w.values()), create_graph=True)])

    cotangent = gradient((network(batches["u"]["x"]) - batches["u"]["y"]).square().mean()).detach()
    whole, one, two = (gradient(loss(rows)) for rows in (slice(None), slice(4), slice(4, None)))
    (right,) = torch.autograd.grad((one + two) / 2 @ cotangent, u)
    found = graph.parts("u", state, batches).indirect
    assert distance(found, -right) <= 1e-12
    difference = ((one + two) / 2 - whole).norm() / ((one.norm() + two.norm()) / 2)
    reported = metrics.reports["u", "w"]["chunk_difference"]
    assert difference > 0.01
    assert reported.item() == pytest.approx(difference.item(), rel=1e-10)
    ((_, kind, text),) = warnings({"reports": {"u": {"w": {"chunk_difference": reported.item()}}}}, 1)
    assert kind == "chunks"
    assert f"differs from that of the whole by {reported.item():.2g} of its size" in text
    assert not list(warnings({"reports": {"u": {"w": {"chunk_difference": CHUNKS}}}}, 1))


def test_buffers_are_updated_once_and_the_level_moves_as_it_does_without_chunks() -> None:
    left = []
    for chunks in (1, 3):
        graph, batches = normalised(Neumann(terms=2, step_size=0.1, chunks=chunks))
        state, _ = graph.step(graph.init(), batches)
        left.append({**state.values["w"], **state.buffers["w"]})
    assert left[0]["norm.num_batches_tracked"] == 1
    assert all(torch.equal(tensor, left[1][name]) for name, tensor in left[0].items())


def test_a_network_in_evaluation_mode_is_divided_exactly() -> None:
    graphs = [normalised(Neumann(terms=3, step_size=0.1, chunks=chunks), training=False) for chunks in (1, 3)]
    right, found = (graph.hypergradient("u", graph.init(), batches) for graph, batches in graphs)
    assert distance(found, right) <= 1e-12


def test_choices_are_divided_with_the_batch() -> None:
    """A mask chosen from values, a sample each: made once by the whole batch, on the way and at the response."""

    def inner(values: Any, batch: Any) -> Tensor:
        kept = values.once("kept", lambda: torch.rand(8).double() < (batch @ values["u"]).sigmoid())
        return (kept * (batch @ values["w"] - 1).square()).mean() + (values["w"] * values["u"]).square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"] - 1).square().sum()

    for steps in (0, 2):
        found = []
        for chunks in (1, 3):
            lower = mlo.Level("w", objective=inner, variables=normal(3, seed=1), given=("u",), steps=steps,
                              optimizer=SGD(learning_rate=0.1), hypergradient=Exact(chunks=chunks))  # fmt: skip
            upper = mlo.Level("u", objective=outer, variables=normal(3, seed=2), subject_to=("w",),
                              optimizer=SGD(learning_rate=0.1))  # fmt: skip
            graph = mlo.Graph([lower, upper])
            found.append(graph.hypergradient("u", graph.init(), {"w": normal(8, 3, seed=3)}))
        assert distance(found[1], found[0]) <= 1e-12


def test_noise_drawn_inside_is_drawn_for_each_chunk_and_is_the_same_in_every_product() -> None:
    seen: dict[int, set[float]] = {}

    def inner(values: Any, batch: Any) -> Tensor:
        mask = torch.rand(len(batch), dtype=torch.float64)
        seen.setdefault(int(batch[0, 0]), set()).add(mask.sum().item())
        return (mask * (batch @ values["w"] - values["u"]).square()).mean()

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"].square().sum()

    method = Neumann(terms=3, step_size=0.01, chunks=2)
    lower = mlo.Level("w", objective=inner, variables=normal(2, seed=1), given=("u",), steps=0,
                      optimizer=SGD(learning_rate=0.1), hypergradient=method)  # fmt: skip
    upper = mlo.Level("u", objective=outer, variables=torch.tensor(0.5), subject_to=("w",),
                      optimizer=SGD(learning_rate=0.1))  # fmt: skip
    graph = mlo.Graph([lower, upper])
    graph.hypergradient("u", graph.init(), {"w": torch.arange(16).double().view(8, 2)})
    whole_and_first, second = seen[0], seen[8]
    assert len(whole_and_first) == 2
    assert len(second) == 1
    assert not whole_and_first & second


def test_chunks_under_vmap() -> None:
    batches = samples(1, slice(None))
    graphs = [mlo.Graph(sampled(Neumann(terms=3, step_size=0.5, chunks=k), OPTIMIZERS["sgd"], 1, 1)) for k in (1, 3)]
    state, many = graphs[0].init(), normal(3, 3, seed=9)

    def hypergradient(graph: mlo.Graph, u: Tensor) -> Any:
        return graph.hypergradient("u", replace(state, values={**state.values, "u": u}), batches)

    together: Any = torch.func.vmap(lambda u: hypergradient(graphs[1], u))(many)
    for row, u in zip(together, many, strict=True):
        assert distance(row, hypergradient(graphs[0], u)) <= 1e-12


def test_each_of_two_processes_divides_its_own_part() -> None:
    graph = mlo.Graph(sampled(ConjugateGradient(iterations=3, chunks=2), OPTIMIZERS["adam"], 2, 2))
    whole = mlo.Graph(sampled(ConjugateGradient(iterations=3), OPTIMIZERS["adam"], 2, 2))
    right = whole.hypergradient("u", whole.init(), samples(2, slice(None)))

    def run(rank: int) -> Any:
        rows = slice(5) if rank == 0 else slice(5, None)
        _, metrics = graph.step(graph.init(), samples(2, rows))
        return graph.hypergradient("u", graph.init(), samples(2, rows)), metrics

    (one, metrics), (two, _) = in_processes(2, run)
    assert torch.equal(one, two)
    assert distance(one, right) <= 1e-10
    assert metrics.reports["u", "a"]["chunk_difference"] <= 1e-15


def test_memory_falls_to_that_of_a_plain_gradient() -> None:
    """A wide network on many samples: activations are all that counts, and a second derivative keeps twice as many."""
    torch.manual_seed(0)
    layers = [each for _ in range(6) for each in (nn.Linear(64, 64), nn.Tanh())]
    network = nn.Sequential(nn.Linear(4, 64), *layers, nn.Linear(64, 1)).float()

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["u"].exp() * values["w"](batch).square()).mean()

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"](torch.ones(1, 4, dtype=torch.float32)).square().mean()

    def peak(chunks: int) -> int:
        method = Neumann(terms=3, step_size=0.1, chunks=chunks or 1)
        lower = mlo.Level("w", objective=inner, variables=network, given=("u",), optimizer=SGD(learning_rate=0.1),
                          hypergradient=method)  # fmt: skip
        upper = mlo.Level("u", objective=outer, variables=torch.zeros((), dtype=torch.float32), subject_to=("w",),
                          optimizer=SGD(learning_rate=0.1), warm_up=0 if chunks else 1)  # fmt: skip
        graph = mlo.Graph([lower, upper])
        state, batches = graph.init(), {"w": torch.ones(2048, 4, dtype=torch.float32)}
        return peak_of(lambda: graph.step(state, batches), torch.device("cpu"))[1]

    plain, whole, halves, eighths = (peak(chunks) for chunks in (0, 1, 2, 8))
    assert whole > 1.7 * plain
    assert halves < 0.75 * whole
    assert eighths < 1.1 * plain


def test_tensors_of_different_length_are_divided_in_one_proportion() -> None:
    batch = {"x": torch.arange(8), "noise": torch.arange(16), "rate": torch.tensor(0.5), "name": "a", "rest": (None, 3)}
    found = divided(batch, {"kept": torch.arange(8)}, 3, "w")
    assert [share for *_, share in found] == [3 / 8, 3 / 8, 2 / 8]
    parts = [part for part, *_ in found]
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [len(part["noise"]) for part in parts] == [6, 6, 4]
    assert [choices["kept"].tolist() for _, choices, _ in found] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all(part["rate"] == 0.5 and part["name"] == "a" and part["rest"] == (None, 3) for part in parts)


MISTAKES = {
    "nothing to divide": (None, {}, "level 'w': its batch holds no samples that 3 chunks could be made of"),
    "no samples": ({"x": torch.zeros(0, 2)}, {}, "its batch holds no samples that 3 chunks"),
    "no proportion": (
        {"x": torch.zeros(8, 2), "classes": torch.zeros(10)},
        {},
        "cannot be divided into 3 chunks with the same share of every tensor, whose leading dimensions are x 8, classes 10",
    ),
    "what is no tensor": (
        {"x": torch.zeros(8), "graph": [SimpleNamespace()]},
        {},
        "level 'w': its batch, 'graph[0]', is a SimpleNamespace, which cannot be divided into chunks",
    ),
    "a choice for all": (torch.zeros(8), {"kept": torch.zeros(3)}, "its choice 'kept', made by `values.once`, has the"),
}


@pytest.mark.parametrize(("batch", "choices", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_divided_is_refused_by_name(batch: Any, choices: Any, message: str) -> None:
    with pytest.raises(mlo.UserError) as error:
        divided(batch, choices, 3, "w")
    assert message in str(error.value)


def test_a_batch_that_cannot_be_divided_is_found_before_the_first_step() -> None:
    levels = Noisy().levels(Neumann(terms=1, step_size=0.1, chunks=2), 1, 0, drawn=False)
    graph = mlo.Graph(levels)
    with pytest.raises(mlo.UserError, match="holds no samples"):
        graph.probe(graph.init(), {"w": (torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0))})


@mlo.reduction("batch")
def ratio(values: Any, batch: Any) -> Tensor:
    return (batch @ values["w"]).square().mean() / batch.square().mean() * values["u"].square().sum()


def quadratic(*names: str) -> Any:
    return lambda values, batch: sum((values[names[0]] * values[name]).square().sum() for name in names)


CHUNKED, PLAIN = Neumann(terms=1, step_size=0.1, chunks=2), Neumann(terms=1, step_size=0.1)


def refused(*levels: mlo.Level, **options: Any) -> str:
    with pytest.raises(mlo.GraphError) as error:
        mlo.Graph(levels, **options)
    return str(error.value)


def level(name: str, objective: Any, **options: Any) -> mlo.Level:
    start = {"optimizer": SGD(learning_rate=0.1), "variables": torch.ones(2)}
    return mlo.Level(name, objective=objective, **{**start, **options})


def test_an_objective_that_is_no_mean_is_refused_by_name() -> None:
    upper = level("u", quadratic("u", "w"), subject_to=("w",))
    message = refused(level("w", ratio, given=("u",), hypergradient=CHUNKED), upper)
    assert "chunks: its objective declares `reduction: batch`" in message
    mlo.Graph([level("w", ratio, given=("u",), hypergradient=PLAIN), upper])
    mlo.Graph([level("w", ratio, given=("u",), hypergradient=CHUNKED), level("u", None, optimizer=None)])  # not asked


def test_compiled_steps_are_refused() -> None:
    lower = level("w", quadratic("w", "u"), given=("u",), hypergradient=CHUNKED)
    upper = level("u", quadratic("u", "w"), subject_to=("w",))
    assert "chunks: compiled steps keep what chunks would free" in refused(lower, upper, compile="eager")


def nest(low: Any, middle: Any, nested: Any) -> list[mlo.Level]:
    return [
        level("low", quadratic("low", "middle", "u"), given=("middle", "u"), hypergradient=low),
        level("middle", quadratic("middle", "low", "u"), given=("u",), subject_to=("low",), hypergradient=middle,
              nested=nested),
        level("u", quadratic("u", "middle"), subject_to=("middle",)),
    ]  # fmt: skip


def test_neither_the_middle_of_a_nest_nor_what_is_below_it_is_divided() -> None:
    assert "chunks: it follows a total gradient" in refused(*nest(PLAIN, CHUNKED, "reduced"))
    assert "chunks: it follows a total gradient" in refused(*nest(PLAIN, CHUNKED, "direct"))
    assert "products over chunks are not differentiated again" in refused(*nest(CHUNKED, PLAIN, "reduced"))


def test_below_a_nest_whose_responses_are_held_fixed_products_are_divided() -> None:
    def low(values: Any, batch: Any) -> Tensor:
        return (batch @ values["low"] - values["middle"].sum() * values["u"].sum()).square().mean()

    found = []
    for chunks in (1, 3):
        levels = nest(replace(PLAIN, chunks=chunks), PLAIN, "direct")
        graph = mlo.Graph([replace(levels[0], objective=low), *levels[1:]])
        found.append(graph.hypergradient("u", graph.init(), {"low": normal(8, 2, seed=0)}))
    assert distance(found[1], found[0]) <= 1e-12


def test_an_equilibrium_is_not_divided() -> None:
    with pytest.raises(ValueError, match="several players are not divided into chunks"):
        Equilibrium(inverse=GMRES(iterations=2, chunks=2))


@pytest.mark.parametrize("make", [
    lambda chunks: Neumann(terms=1, step_size=0.1, chunks=chunks),
    lambda chunks: ConjugateGradient(iterations=1, chunks=chunks),
    lambda chunks: GMRES(iterations=1, chunks=chunks),
    lambda chunks: Nystrom(rank=1, damping=0.1, chunks=chunks),
    lambda chunks: Exact(chunks=chunks),
    lambda chunks: FirstOrder(chunks=chunks),
    lambda chunks: Preconditioned(chunks=chunks),
])  # fmt: skip
def test_chunks_below_one_mean_nothing(make: Any) -> None:
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        make(0)
