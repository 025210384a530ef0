"""What each of two processes runs; a module of its own, since a started process must be able to import it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from helpers import normal
from torch import Tensor, nn

import mlo
from mlo import _linearisation
from mlo.hypergradient import (
    GMRES,
    AbstractHypergradient,
    CentralDifference,
    ConjugateGradient,
    Equilibrium,
    Exact,
    FiniteDifference,
    FirstOrder,
    Forward,
    Implicit,
    Neumann,
    Nystrom,
    Preconditioned,
    Unroll,
    ZerothOrder,
)

SAMPLES, ITERATIONS = 8, 3
SHARES = {"even": (4, 4), "uneven": (5, 3)}
METHODS: Mapping[str, AbstractHypergradient] = {
    "unroll": Unroll(replay=False),
    "unroll, replayed": Unroll(replay=True),
    "unroll, last": Unroll(last=1),
    "unroll, checkpoints": Unroll(checkpoint="sqrt"),
    "forward": Forward(),
    "zeroth order": ZerothOrder(samples=3, radius=1e-1),
    "neumann, auto": Neumann(terms=4, step_size="auto", tolerance=0.1, damping=2.0),
    "conjugate gradients, warm": ConjugateGradient(iterations=4, damping=0.5, warm_start=True),
    "gmres": GMRES(iterations=4, damping=0.5),
    "equilibrium": Equilibrium(inverse=Exact(damping=0.5)),
    "nystrom": Nystrom(rank=3, damping=0.5),
    "preconditioned": Preconditioned(scale=2.0),
    "finite differences": FiniteDifference(),
    "neumann": Neumann(terms=4, step_size=0.1),
    "conjugate gradients": ConjugateGradient(iterations=4, damping=0.5),
    "exact": Exact(damping=0.5),
    "first order": FirstOrder(scale=0.3),
    "implicit, central differences": Implicit(
        inverse=Neumann(terms=2, step_size=0.1), cross=CentralDifference(radius=1e-2)
    ),
}


def network(w: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["first"]) @ w["second"]


def graph(method: AbstractHypergradient) -> mlo.Graph:
    """A chain whose objectives are means over samples: a teacher, a student of it, and a penalty above both."""

    def fit(values: Any, batch: Any) -> Any:
        misses = (network(values["a"], batch["x"]) - batch["y"]).square()
        loss = misses.mean() + values["u"].exp() @ values["a"]["second"] ** 2
        return loss, {"miss": misses.mean(), "misses": misses}

    def imitate(values: Any, batch: Any) -> Tensor:
        b, a = values["b"], values["a"]
        noise = 0.1 * torch.randn(3)  # the same in every process
        right = values.shared("right", lambda: network(a, batch["x"]))
        return (network(b, batch["x"] + noise) - right).square().mean() + 0.1 * values["u"].sum() * b["second"][0]

    def validate(values: Any, batch: Any) -> Tensor:
        misses = [(network(values[name], batch["x"]) - batch["y"]).square().mean() for name in ("a", "b")]
        return sum(misses) + 1e-2 * values["u"].square().sum()

    def weights(seed: int) -> dict[str, Tensor]:
        return {"first": normal(3, 4, seed=seed), "second": normal(4, seed=seed + 1)}

    clipped = mlo.optimizer.SGD(learning_rate=0.05, momentum=0.9, clip_norm=1.0)  # of the whole gradient
    below: dict[str, Any] = {"steps": 2, "hypergradient": method}
    return mlo.Graph(
        [
            mlo.Level("a", objective=fit, variables=weights(1), given=["u"], optimizer=clipped, **below),
            mlo.Level(
                "b",
                objective=imitate,
                variables=weights(3),
                given=["a", "u"],
                optimizer=mlo.optimizer.Adam(learning_rate=0.02),
                **below,
            ),
            mlo.Level(
                "u",
                objective=validate,
                variables=normal(4, seed=5),
                subject_to=["a", "b"],
                optimizer=mlo.optimizer.SGD(learning_rate=0.05),
                lookahead=True,
            ),
        ]
    )


def drawn(seed: int, rows: slice) -> dict[str, Tensor]:
    return {"x": normal(SAMPLES, 3, seed=seed)[rows], "y": normal(SAMPLES, seed=seed + 50)[rows]}


def run(method: AbstractHypergradient, rows: slice = slice(None)) -> dict[str, Any]:
    """A few iterations on these samples: where it stands, and every hypergradient, loss, norm, measurement and count."""
    solved = graph(method)
    state, found, counts = solved.init(seed=0), {}, [0, 0, 0]
    for iteration in range(ITERATIONS):
        batches = {name: drawn(100 * iteration + place, rows) for place, name in enumerate(("a", "b", "u"))}
        found[f"gradient {iteration}"] = solved.hypergradient("u", state, batches)
        state, metrics = solved.step(state, batches)
        found |= {f"loss of {name} {iteration}": loss for name, loss in metrics.losses.items()}
        found[f"norm {iteration}"] = metrics.norms["u"].total
        found[f"miss {iteration}"] = metrics.measured["a"]["miss"]
        done = (metrics.gradients, metrics.products, len(metrics.pullbacks))
        counts = [before + now for before, now in zip(counts, done, strict=True)]
    found |= {f"{name}.{key}": tensor for name in ("a", "b") for key, tensor in state.values[name].items()}
    return found | {"u": state.values["u"], "counts": counts, "predicted": list(solved.cost(ITERATIONS))}


# What is refused, each with a level that would do so.


def linear(values: Any, batch: Any) -> Tensor:
    return (values["w"](batch["x"]).squeeze(1) - batch["y"]).square().mean()


def alone(objective: Any = linear, variables: Any = None) -> mlo.Graph:
    variables = nn.Linear(3, 1) if variables is None else variables
    return mlo.Graph(
        [mlo.Level("w", objective=objective, variables=variables, optimizer=mlo.optimizer.SGD(learning_rate=0.1))]
    )


@mlo.reduction("batch")
def worst(values: Any, batch: Any) -> Tensor:
    return (values["w"](batch["x"]).squeeze(1) - batch["y"]).square().max()


def nest() -> mlo.Graph:
    rule = mlo.optimizer.SGD(learning_rate=0.1)

    def near(own: str, *others: str) -> Callable[..., Tensor]:
        return lambda values, batch: sum((values[own] - values[other]).square().sum() for other in others)

    return mlo.Graph(
        [
            mlo.Level("x", objective=near("x", "y", "z"), variables=torch.ones(2), given=["y", "z"], optimizer=rule),
            mlo.Level(
                "y",
                objective=near("y", "x", "z"),
                variables=torch.ones(2),
                given=["z"],
                subject_to=["x"],
                optimizer=rule,
            ),
            mlo.Level("z", objective=near("z", "y"), variables=torch.zeros(2), subject_to=["y"], optimizer=rule),
        ]
    )


def stepped(made: Callable[[], mlo.Graph], batch: Any = None) -> None:
    solved = made()
    solved.step(solved.init(), None if batch is None else {"w": batch})


def mapped(batch: Any) -> None:
    def objective(values: Any, batch: Any) -> Tensor:
        return (batch["x"] @ values["w"] - batch["y"]).square().mean()

    solved = alone(objective, torch.zeros(3))
    state = solved.init()
    torch.func.vmap(lambda y: solved.hypergradient("w", state, {"w": {**batch, "y": y}}))(
        torch.ones(2, len(batch["x"]))
    )


def refusals(rank: int) -> dict[str, Callable[[], object]]:
    rows = slice(0, 4) if rank == 0 else slice(4, 8)
    batch = drawn(7, rows)
    z = torch.ones(5 if rank == 0 else 3, 1)
    nothing = slice(None) if rank == 0 else slice(0)
    flat = nn.Flatten(0)
    return {
        "batch objective": lambda: stepped(lambda: alone(worst), batch),
        "nest": lambda: stepped(nest),
        "batch normalisation": lambda: stepped(
            lambda: alone(variables=nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))), batch
        ),
        "synchronised batch normalisation": lambda: stepped(
            lambda: alone(
                variables=nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)))
            ),
            batch,
        ),
        "wrapped": lambda: stepped(
            lambda: alone(variables=nn.parallel.DistributedDataParallel(nn.Linear(3, 1))), batch
        ),
        "transform": lambda: mapped(batch),
        "two proportions": lambda: stepped(alone, {**batch, "z": z}),
        "no samples": lambda: stepped(
            lambda: alone(variables=nn.Sequential(nn.Linear(3, 1), flat, nn.Unflatten(0, (-1, 1)))), drawn(7, nothing)
        ),
    }


def process(rank: int, folder: str) -> None:
    """One of two processes: its results, and what is refused, in a file of its own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(rank)  # torch's generator of a process does not matter
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found: dict[Any, Any] = {}
        for share, (first, _) in SHARES.items():
            rows = slice(0, first) if rank == 0 else slice(first, None)
            found |= {(share, name): run(method, rows) for name, method in METHODS.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_linearisation, "reduced_trees", lambda trees, *_: (trees, []))
            found["unreduced products"] = run(METHODS["conjugate gradients"], rows)
        for name, attempt in refusals(rank).items():
            try:
                attempt()
            except mlo.UserError as error:
                found["refused", name] = str(error)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
