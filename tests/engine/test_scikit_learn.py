"""The derivative of ridge and logistic solutions in the penalty: central differences of scikit-learn's own solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import normal, relative_error
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

import mlo
from mlo.hypergradient import ConjugateGradient, Exact, Neumann, Unroll

SAMPLES, SIZE = 30, 4
X, SEEN = normal(SAMPLES, SIZE, seed=1), normal(20, SIZE, seed=2)
Y = X @ normal(SIZE, seed=3) + 0.5 * normal(SAMPLES, seed=4)
SEEN_Y = normal(20, seed=5)
LABELS = (Y > 0.3).double()
START = 0.4  # the logarithm of the penalty

Values = dict[str, Tensor]


def predict(w: Values, x: Tensor) -> Tensor:
    """Without an intercept there is none to add."""
    line = x @ w["coefficients"].to(x)
    return line + w["intercept"] if "intercept" in w else line


@dataclass(frozen=True)
class Regression:
    """A regression with the penalty eᵘ: scikit-learn's solution as a function of u, our objective, and the one above it."""

    fit: Callable[[float], Values]
    objective: Callable[[Values, Tensor, Tensor, Tensor], Tensor]
    """Of w, u, the samples and what they are fitted to: what scikit-learn minimises, over the number of samples."""
    targets: Tensor


def ridge(*, intercept: bool) -> Regression:
    """‖y − Xw − b‖² + eᵘ‖w‖²."""

    def fit(u: float) -> Values:
        return solution(Ridge(alpha=np.exp(u), fit_intercept=intercept, solver="cholesky").fit(X.numpy(), Y.numpy()))

    def objective(w: Values, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return ((predict(w, x) - y).square().sum() + u.exp() * w["coefficients"].square().sum()) / SAMPLES

    return Regression(fit, objective, Y)


def logistic(*, intercept: bool) -> Regression:
    """Σ log(1 + exp(−y(xw + b))) + ½eᵘ‖w‖²: scikit-learn's C is e⁻ᵘ."""

    def fit(u: float) -> Values:
        solver = LogisticRegression(
            C=np.exp(-u), fit_intercept=intercept, solver="newton-cholesky", tol=1e-14, max_iter=200
        )
        return solution(solver.fit(X.numpy(), LABELS.numpy()))

    def objective(w: Values, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(predict(w, x), y, reduction="sum")
        return (fit + 0.5 * u.exp() * w["coefficients"].square().sum()) / SAMPLES

    return Regression(fit, objective, LABELS)


def solution(fitted: Any) -> Values:
    found = {"coefficients": torch.tensor(fitted.coef_).reshape(-1)}
    if fitted.fit_intercept:
        found["intercept"] = torch.tensor(fitted.intercept_).reshape(())
    return found


def validation(w: Values, x: Tensor, y: Tensor) -> Tensor:
    return (predict(w, x) - y).square().mean()


def slope(regression: Regression) -> Tensor:
    """d validation(w*(u)) / du from four solutions: (8(F(u+h) − F(u−h)) − F(u+2h) + F(u−2h)) / 12h, off by O(h⁴)."""

    def value(u: float) -> Tensor:
        return validation(regression.fit(u), SEEN, SEEN_Y)

    h = 2e-3
    return (8 * (value(START + h) - value(START - h)) - value(START + 2 * h) + value(START - 2 * h)) / (12 * h)


def graph_of(regression: Regression, method: Any, steps: int, dtype: torch.dtype) -> mlo.Graph:
    """The penalty above the regression, both in `dtype`."""
    x, y, seen, seen_y = (tensor.to(dtype) for tensor in (X, regression.targets, SEEN, SEEN_Y))

    def inner(values: Any, batch: Any) -> Tensor:
        return regression.objective(values["w"], values["u"], x, y)

    def outer(values: Any, batch: Any) -> Tensor:
        return validation(values["w"], seen, seen_y)

    rule = mlo.optimizer.SGD(learning_rate=0.2, momentum=0.8)
    start = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in regression.fit(START).items()}
    return mlo.Graph(
        [
            mlo.Level(
                "w", objective=inner, variables=start, given=("u",), optimizer=rule, steps=steps, hypergradient=method
            ),
            mlo.Level(
                "u",
                objective=outer,
                variables=torch.tensor(START, dtype=dtype),
                subject_to=("w",),
                optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            ),
        ]
    )


regressions = pytest.mark.parametrize(
    "regression",
    [make(intercept=intercept) for make in (ridge, logistic) for intercept in (False, True)],
    ids=["ridge", "ridge with intercept", "logistic", "logistic with intercept"],
)
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str)


@precisions
@pytest.mark.parametrize(
    "method",
    [Exact(), ConjugateGradient(iterations=20), Neumann(terms=600, step_size=0.4)],
    ids=lambda method: type(method).__name__,
)
@regressions
def test_at_its_solution(regression, method, dtype, tolerance):
    graph = graph_of(regression, method, 0, dtype)
    w = {name: tensor.to(dtype) for name, tensor in regression.fit(START).items()}
    found = graph.hypergradient("u", graph.init(values={"w": w}))
    assert relative_error(found.double(), slope(regression)) <= tolerance


@precisions
@pytest.mark.parametrize(
    "method",
    [Unroll(), Unroll(replay=True), Exact(), ConjugateGradient(iterations=20)],
    ids=["unroll", "replayed", "exact", "conjugate gradient"],
)
@regressions
def test_where_our_own_steps_have_converged(regression, method, dtype, tolerance):
    graph = graph_of(regression, method, 400, dtype)
    state = graph.init()
    assert relative_error(graph.hypergradient("u", state).double(), slope(regression)) <= tolerance
    reached = graph.step(state)[0].values["w"]
    assert (
        relative_error({name: tensor.double() for name, tensor in reached.items()}, regression.fit(START)) <= tolerance
    )
