"""What each of two processes runs; a module of its own, since a started process must be able to import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from helpers import normal
from torch import Tensor

import mlo

SAMPLES, ITERATIONS = 8, 3


def network(w: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["first"]) @ w["second"]


def graph(method: mlo.hypergradient.AbstractHypergradient) -> mlo.Graph:
    """A chain whose objectives are means over samples: a teacher, a student of it, and a penalty above both."""

    def fit(values: Any, batch: Any) -> Tensor:
        return (network(values["a"], batch[0]) - batch[1]).square().mean() + values["u"].exp() @ values["a"][
            "second"
        ] ** 2

    def imitate(values: Any, batch: Any) -> Tensor:
        b, a = values["b"], values["a"]
        noise = 0.1 * torch.randn(3)  # the same in every process
        return (network(b, batch[0] + noise) - network(a, batch[0])).square().mean() + 0.1 * values["u"].sum() * b[
            "second"
        ][0]

    def validate(values: Any, batch: Any) -> Tensor:
        misses = [(network(values[name], batch[0]) - batch[1]).square().mean() for name in ("a", "b")]
        return sum(misses) + 1e-2 * values["u"].square().sum()

    def weights(seed: int) -> dict[str, Tensor]:
        return {"first": normal(3, 4, seed=seed), "second": normal(4, seed=seed + 1)}

    momentum = mlo.optimizer.SGD(learning_rate=0.05, momentum=0.9)
    return mlo.Graph(
        [
            mlo.Level(
                "a", objective=fit, variables=weights(1), given=["u"], optimizer=momentum, steps=2, hypergradient=method
            ),
            mlo.Level(
                "b",
                objective=imitate,
                variables=weights(3),
                given=["a", "u"],
                optimizer=mlo.optimizer.Adam(learning_rate=0.02),
                hypergradient=method,
            ),
            mlo.Level(
                "u",
                objective=validate,
                variables=normal(4, seed=5),
                subject_to=["a", "b"],
                optimizer=momentum,
                lookahead=True,
            ),
        ]
    )


def run(rank: int, processes: int) -> dict[str, Any]:
    """A few iterations on this process's share of the samples: where it stands, and the last hypergradient and norms."""
    solved = graph(mlo.hypergradient.FiniteDifference())
    state, share = solved.init(seed=0), SAMPLES // processes
    rows = slice(rank * share, (rank + 1) * share)
    gradients = []
    for iteration in range(ITERATIONS):
        batches = {}
        for place, name in enumerate(("a", "b", "u")):
            x, y = normal(SAMPLES, 3, seed=100 * iteration + place), normal(SAMPLES, seed=100 * iteration + place + 50)
            batches[name] = x[rows], y[rows]
        gradients.append(solved.hypergradient("u", state, batches))
        state, metrics = solved.step(state, batches)
    values = {f"{name}.{key}": tensor for name in ("a", "b") for key, tensor in state.values[name].items()}
    values |= {f"gradient {count}": gradient for count, gradient in enumerate(gradients)}
    return values | {
        "u": state.values["u"],
        "norm": metrics.norms["u"].total,
        "counts": torch.tensor(metrics.gradients),
    }


def process(rank: int, folder: str) -> None:
    """One of two processes: its results, and what it says to `Unroll`, in a file of its own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(rank)  # torch's generator of a process does not matter
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found: dict[str, Any] = run(rank, 2)
        unrolled = graph(mlo.hypergradient.Unroll())
        batch = {name: (normal(4, 3, seed=1), normal(4, seed=2)) for name in ("a", "b", "u")}
        for way in ("step", "hypergradient"):
            try:
                unrolled.step(unrolled.init(), batch) if way == "step" else unrolled.hypergradient(
                    "u", unrolled.init(), batch
                )
            except mlo.UserError as error:
                found[way] = str(error)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
