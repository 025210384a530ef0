"""Two processes, each with a part of the samples, against one with all of them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from engine import two_processes
from helpers import normal, relative_error

import mlo
from mlo.hypergradient import Equilibrium, Forward, Unroll, ZerothOrder
from mlo.testing._simulated import in_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What the two processes wrote."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(two_processes.process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def furthest(found: dict[str, Any], right: dict[str, Any]) -> float:
    """The largest relative error of any number but counts."""
    numbers = {name for name, value in right.items() if isinstance(value, torch.Tensor)}
    return max(relative_error(found[name].double(), right[name].double()) for name in numbers)


@pytest.mark.parametrize("method", two_processes.METHODS)
@pytest.mark.parametrize("share", two_processes.SHARES)
def test_two_processes_give_the_numbers_of_one(found, share, method):
    """Gradients, Hessian and cross products, ε and the norm that is clipped are those of the whole batch."""
    alone = two_processes.run(two_processes.METHODS[method])
    for rank in range(2):
        assert furthest(found[rank][share, method], alone) <= 1e-12


@pytest.mark.parametrize("method", two_processes.METHODS)
@pytest.mark.parametrize("share", two_processes.SHARES)
def test_processes_stay_together_bit_for_bit(found, share, method):
    one, two = (each[share, method] for each in found)
    assert one.keys() == two.keys()
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)


@pytest.mark.parametrize("method", two_processes.METHODS)
def test_two_processes_cost_what_one_does(found, method):
    """Where steps would be recorded they are replayed, which costs a gradient a step more, and is predicted."""
    counts, predicted = (found[0]["uneven", method][key] for key in ("counts", "predicted"))
    alone = two_processes.run(two_processes.METHODS[method])["counts"]
    recorded = {"unroll": 2, "unroll, last": 1}.get(method, 0)  # steps of each of two levels, in every iteration
    assert counts == [alone[0] + 2 * recorded * two_processes.ITERATIONS, *alone[1:]]
    stops_early = any(name in method for name in ("conjugate", "gmres", "auto"))
    assert all(map(operator.le if stops_early else operator.eq, counts, predicted))


def test_every_shipped_method_is_in_the_table():
    shipped = {
        each
        for each in vars(mlo.hypergradient).values()
        if isinstance(each, type)
        and issubclass(each, mlo.hypergradient.AbstractHypergradient)
        and not each.__name__.startswith("Abstract")
    }
    assert {type(method) for method in two_processes.METHODS.values()} == shipped


def test_products_that_are_not_reduced_are_seen(found):
    """The comparison above is one: it is six orders of magnitude away from passing."""
    alone = two_processes.run(two_processes.METHODS["conjugate gradients"])
    assert min(furthest(each["unreduced products"], alone) for each in found) > 1e-6


REFUSED = {
    "batch objective": "the objective of level 'w' declares `reduction: batch`",
    "nest": "level 'y' cannot be in the middle of a nest under several processes",
    "batch normalisation": "'1 (BatchNorm1d)' takes statistics of the batch",
    "synchronised batch normalisation": "'1 (SyncBatchNorm)' takes statistics of the batch",
    "wrapped": "a module wrapped in DistributedDataParallel would run with gradients that are not reduced",
    "transform": "several processes cannot reduce anything inside a torch.func transform",
    "two proportions": "level 'w': the tensors of its batch are divided among processes in different proportions, 'x' 4 + 4 "
    "and 'z' 5 + 3",
    "no samples": "level 'w': process 1 of 2 has no sample of 'x'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_processes_cannot_do_is_refused_in_each_of_them(found, name):
    for rank in range(2):
        assert REFUSED[name] in found[rank].get(("refused", name), "nothing was refused")


def test_an_objective_is_declared_through_whatever_binds_its_options():
    from functools import partial

    from mlo._reduction import reduction_of

    assert reduction_of(two_processes.worst) == reduction_of(partial(two_processes.worst)) == "batch"
    assert reduction_of(two_processes.linear) == reduction_of(None) == "mean"
    with pytest.raises(ValueError, match="reduction must be mean or batch, got 'sum'"):
        mlo.reduction("sum")


def whole_and_parts(graph: mlo.Graph, upper: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A hypergradient on 8 samples, and on 5 and 3 of them in two threads that reduce as processes do."""
    data = {name: two_processes.drawn(place, slice(None)) for place, name in enumerate(graph.levels)}

    def hypergradient(rows: slice) -> Any:
        batches = {name: {key: tensor[rows] for key, tensor in batch.items()} for name, batch in data.items()}
        return graph.hypergradient(upper, graph.init(), batches)

    parts = in_processes(2, lambda rank: hypergradient(slice(5) if rank == 0 else slice(5, None)))
    return hypergradient(slice(None)), parts


def misses(w: Any, batch: Any) -> torch.Tensor:
    return (batch["x"] @ w - batch["y"]).square().mean()


@pytest.mark.parametrize(
    "method", [Unroll(replay=False), Unroll(checkpoint="sqrt"), Forward(), ZerothOrder()], ids=repr
)
@pytest.mark.parametrize("kind", [mlo.optimizer.SGD, mlo.optimizer.Adam, mlo.optimizer.RMSprop])
def test_options_that_are_learned(method, kind):
    """The update is pulled back alike in all processes, at the gradient of the whole batch."""
    rule = kind(learning_rate=mlo.optimizer.Read("u"), weight_decay=0.1)
    below: dict[str, Any] = {"given": ["u"], "optimizer": rule, "steps": 4, "hypergradient": method}
    graph = mlo.Graph(
        [
            mlo.Level(
                "w", objective=lambda values, batch: misses(values["w"], batch), variables=normal(3, seed=1), **below
            ),
            mlo.Level(
                "u",
                objective=lambda values, batch: misses(values["w"], batch),
                variables=torch.tensor(0.05),
                constraints={"*": "softplus"},
                subject_to=["w"],
                optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            ),
        ]
    )
    right, (one, two) = whole_and_parts(graph, "u")
    assert right.abs() > 1e-3
    assert torch.equal(one, two)
    assert relative_error(one, right) <= 1e-11


def test_players_of_a_game():
    """The joint Jacobian is made of products of each player's own batch."""
    rule = mlo.optimizer.SGD(learning_rate=0.1)
    below: dict[str, Any] = {"given": ["u"], "optimizer": rule, "hypergradient": Equilibrium()}

    def chasing(own: str, other: str, sign: float) -> Any:
        def objective(values: Any, batch: Any) -> torch.Tensor:
            meeting = ((batch["x"] @ values[own]) * (batch["x"] @ values[other])).mean()
            return misses(values[own], batch) + sign * meeting + (values["u"] * values[own].square()).sum()

        return objective

    graph = mlo.Graph(
        [
            mlo.Level("g", objective=chasing("g", "d", 1.0), variables=normal(3, seed=1), against=["d"], **below),
            mlo.Level("d", objective=chasing("d", "g", -1.0), variables=normal(3, seed=2), against=["g"], **below),
            mlo.Level(
                "u",
                objective=lambda values, batch: misses(values["g"], batch) + misses(values["d"], batch),
                variables=torch.full((3,), 0.5),
                subject_to=["g", "d"],
                optimizer=rule,
            ),
        ]
    )
    right, (one, two) = whole_and_parts(graph, "u")
    assert torch.equal(one, two)
    assert relative_error(one, right) <= 1e-11
