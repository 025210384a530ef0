"""A level in the middle is audited through its total gradient, and as an upper level itself."""

from __future__ import annotations

import pytest
import torch
from helpers import normal

import mlo
from mlo.hypergradient import Exact
from mlo.optimizer import SGD


def test_the_middle_of_a_nest_against_dense_linear_algebra():
    """x: ½xᵀHx − xᵀ(By + Cu); y: ½yᵀGy + ½‖x − a‖²; F = ½‖y − t‖². The gradient of y is Gy + BᵀH⁻¹(x − a)."""
    h, g = (torch.diag(torch.linspace(low, 1.0, 3, dtype=torch.float64)) for low in (0.5, 0.8))
    b, c, a, t = (normal(*shape, seed=seed) for seed, shape in enumerate([(3, 3), (3, 2), (3,), (3,)]))

    def f_x(values, batch):
        x = values["x"]
        return 0.5 * x @ h @ x - x @ (b @ values["y"] + c @ values["u"])

    def f_y(values, batch):
        return 0.5 * values["y"] @ g @ values["y"] + 0.5 * (values["x"] - a).square().sum()

    def top(values, batch):
        return 0.5 * (values["y"] - t).square().sum()

    fast, slow = SGD(learning_rate=1.0), SGD(learning_rate=0.1)
    common = {"hypergradient": Exact()}
    graph = mlo.Graph(
        [
            mlo.Level(
                "x", objective=f_x, variables=normal(3, seed=5), given=("y", "u"), steps=40, optimizer=fast, **common
            ),
            mlo.Level(
                "y",
                objective=f_y,
                variables=normal(3, seed=6),
                given=("u",),
                subject_to=("x",),
                steps=2,
                optimizer=slow,
                **common,
            ),
            mlo.Level("u", objective=top, variables=normal(2, seed=7), subject_to=("y",), optimizer=slow),
        ]
    )
    found = mlo.audit(graph, dense=0, repeats=1)
    assert {(level.upper, level.level) for level in found.levels} == {("u", "y"), ("y", "x")}

    inverse = torch.linalg.inv(h)
    u, y = normal(2, seed=7), normal(3, seed=6)
    gradients = []
    for _ in range(3):
        x = inverse @ (b @ y + c @ u)  # 40 steps are enough
        gradients.append(g @ y + b.T @ inverse @ (x - a))
        y = y - 0.1 * gradients[-1] if len(gradients) < 3 else y
    jacobian = g + b.T @ inverse @ inverse @ b
    mixed = b.T @ inverse @ inverse @ c
    level = found.level("y")
    assert level.cotangent_norm == pytest.approx((y - t).norm().item(), rel=1e-6)
    assert level.start_gradient_norm == pytest.approx(gradients[0].norm().item(), rel=1e-6)
    assert level.gradient_norm == pytest.approx(gradients[2].norm().item(), rel=1e-6)
    ends = torch.linalg.eigvalsh(jacobian)
    assert level.spectrum is not None
    assert level.spectrum.lambda_min == pytest.approx(ends[0].item(), rel=1e-6)
    assert level.spectrum.lambda_max == pytest.approx(ends[-1].item(), rel=1e-6)
    exact = mixed.T @ torch.linalg.solve(jacobian, y - t)
    first = mixed.T @ (y - t)
    cosine = (exact @ first / (exact.norm() * first.norm())).item()
    assert level.row("first_order").cosine_implicit == pytest.approx(cosine, abs=1e-6)
    assert level.own.error_implicit == pytest.approx(0.0, abs=1e-8)

    lower = found.level("x")  # where y stands before its steps
    x = inverse @ (b @ normal(3, seed=6) + c @ u)
    assert lower.cotangent_norm == pytest.approx((x - a).norm().item(), rel=1e-6)
    assert lower.reads == {"y": 3}
