"""A small network with batch statistics and dropout, for what closed forms cannot show: buffers and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from mlo._level import Level
from mlo._random import Preserved, reseed
from mlo.optimizer import SGD
from mlo.testing._closed_form import UPPER
from mlo.testing._families import normal

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Objective
    from mlo.hypergradient import AbstractHypergradient
    from mlo.optimizer import AbstractOptimizer

WORDS = "a network of 35 numbers with BatchNorm and dropout on 6 weighted samples"


@final
class Network(nn.Module):
    """Linear, BatchNorm, tanh, dropout, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Two numbers a sample."""
        return self.layers(x)


def network(seed: int) -> Network:
    """A network of float64, the same for the same seed."""
    with Preserved():
        reseed(seed)
        return Network().double()


def weighted(
    module: Network, method: AbstractHypergradient, steps: int, seed: int, *, frozen: bool = False
) -> list[Level]:
    """`module` fits samples weighted by `u`, which is judged on other targets; `frozen` makes u a constant."""
    x, y = normal(6, 3, key=(seed, "x")), normal(6, 2, key=(seed, "y"))

    def inner(values: Any, batch: Any) -> Tensor:
        fit = ((values["w"](x) - y).square().sum(1) * values[UPPER].sigmoid()).mean()
        return 0.02 * fit + 0.25 * sum(tensor.square().sum() for tensor in values["w"].values())  # eigenvalues near ½

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"](x) - 2 * y).square().mean()

    rule = SGD(learning_rate=0.1, momentum=0.5)
    lower = Level(
        "w", objective=inner, variables=module, given=(UPPER,), optimizer=rule, steps=steps, hypergradient=method
    )
    weights = normal(6, key=(seed, "weights"))
    if frozen:
        return [lower, Level(UPPER, variables=weights)]
    return [lower, Level(UPPER, objective=outer, variables=weights, subject_to=("w",), optimizer=rule)]


SAMPLED = "two regressions in a chain, of 3 numbers each, on 8 samples that 3 numbers weigh"


def sampled(method: AbstractHypergradient, optimizer: AbstractOptimizer, steps: int, seed: int) -> list[Level]:
    """`b` imitates `a`, both on samples weighted by `u`; every objective is a mean over samples of its batch.

    The Hessians have their eigenvalues between 0.2 and 2 or so: features have the norm 1.
    """

    def misses(w: Tensor, batch: Any, target: Tensor, u: Tensor) -> Tensor:
        weights = (batch["x"] @ u).sigmoid()
        return (weights * (batch["x"] @ w - target).square()).mean() + 0.1 * w.square().sum()

    def fit(values: Any, batch: Any) -> Tensor:
        return misses(values["a"], batch, batch["y"], values[UPPER])

    def imitate(values: Any, batch: Any) -> Tensor:
        return misses(values["b"], batch, (batch["x"] @ values["a"]).tanh(), values[UPPER])

    def judge(values: Any, batch: Any) -> Tensor:
        one, two = ((batch["x"] @ values[name] - batch["y"]).square().mean() for name in ("a", "b"))
        return one + two

    def lower(name: str, objective: Objective, *given: str) -> Level:
        start = normal(3, key=(seed, name))
        rest: dict[str, Any] = {"optimizer": optimizer, "steps": steps, "hypergradient": method}
        return Level(name, objective=objective, variables=start, given=(*given, UPPER), **rest)

    upper = Level(
        UPPER,
        objective=judge,
        variables=normal(3, key=(seed, UPPER)),
        subject_to=("a", "b"),
        optimizer=SGD(learning_rate=0.1),
    )
    return [lower("a", fit), lower("b", imitate, "a"), upper]


def samples(seed: int, rows: slice) -> dict[str, dict[str, Tensor]]:
    """The `rows` of the 8 samples of every level's batch."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("a", "b", UPPER):
        x = normal(8, 3, key=(seed, name, "x"))
        found[name] = {"x": (x / x.norm(dim=1, keepdim=True))[rows], "y": normal(8, key=(seed, name, "y"))[rows]}
    return found


@final
class Noisy:
    """f = Σ cosh(mask · w − (1 + z)·u) + a choice's part, with noise that is drawn inside or given as data.

    `seen` holds, by step, the noise of every evaluation.
    """

    WORDS = "4 numbers under a dropout mask, normal noise and a discrete choice made from their values"

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[Tensor, ...]]] = {}

    def drawn(self, values: Any, batch: int) -> Tensor:
        """The objective with noise of its own; `batch` is the number of the step."""
        w = values["w"]
        mask = (torch.rand(4, dtype=w.dtype) > 0.3).to(w.dtype)
        z = torch.randn(4, dtype=w.dtype)
        choice = values.once("choice", lambda: (torch.rand(4, dtype=w.dtype) < w.sigmoid()).to(w.dtype))
        self.seen.setdefault(batch, []).append((mask, z, choice))
        return self.given(values, (mask, z, choice))

    def given(self, values: Any, batch: tuple[Tensor, ...]) -> Tensor:
        """The objective with the noise as its batch."""
        mask, z, choice = batch
        w, u = values["w"], values[UPPER]
        fit = (mask * w - (1 + z) * u).cosh().sum()
        return 0.2 * (fit + 0.5 * ((1 + choice * u.sigmoid()) * w.square()).sum())  # eigenvalues between 0.2 and 2

    def levels(self, method: AbstractHypergradient, steps: int, seed: int, *, drawn: bool) -> list[Level]:
        """`w` under `u`."""

        def outer(values: Any, batch: Any) -> Tensor:
            return (values["w"] - 1).square().sum()

        return [
            Level(
                "w",
                objective=self.drawn if drawn else self.given,
                variables=0.3 * normal(4, key=(seed, "w")),
                given=(UPPER,),
                optimizer=SGD(learning_rate=0.05, momentum=0.5),
                steps=steps,
                hypergradient=method,
            ),
            Level(
                UPPER,
                objective=outer,
                variables=0.3 * normal(4, key=(seed, "u")),
                subject_to=("w",),
                optimizer=SGD(learning_rate=0.1),
            ),
        ]
