"""Every number of an audit against dense linear algebra on quadratics."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import pytest
import torch
from helpers import normal
from hypothesis import given, settings
from torch import Tensor

import mlo
from mlo.hypergradient import ConjugateGradient, Exact, FirstOrder, Neumann, Unroll
from mlo.testing import ClosedForm, quadratics, two_levels

Inverse = Callable[[Tensor, Tensor], Tensor]


def series(terms: int, alpha: float, damping: float = 0.0) -> Inverse:
    def inverse(h: Tensor, v: Tensor) -> Tensor:
        damped = h + damping * torch.eye(len(h), dtype=h.dtype)
        powers = [
            torch.linalg.matrix_power(torch.eye(len(h), dtype=h.dtype) - alpha * damped, k) for k in range(terms + 1)
        ]
        return alpha * sum(power @ v for power in powers)

    return inverse


def cosine(one: Tensor, two: Tensor) -> float:
    return (one @ two / (one.norm() * two.norm())).item()


def error(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


@settings(max_examples=8, deadline=None)
@given(quadratics(dimension=4, shape=two_levels(), dtypes=[torch.float64]))
def test_rows_are_those_of_dense_linear_algebra(problem: ClosedForm):
    own = Neumann(terms=3, step_size=0.4)
    graph = mlo.Graph(problem.levels(own, steps=3))
    found = mlo.audit(graph, methods=[Neumann(terms=2, step_size=0.3, damping=0.5), Exact(damping=0.2)], repeats=1)
    (level,) = found.levels
    values, _ = problem.run(3)
    exact = problem.implicit(values, torch.linalg.solve)
    unrolled = problem.swept(3, None)
    assert level.spectrum is not None
    alpha = 1 / level.spectrum.lambda_max
    answers: dict[str, Inverse] = {
        "neumann {terms: 3, step_size: 0.4}": series(3, 0.4),
        "neumann {terms: 2, step_size: 0.3, damping: 0.5}": series(2, 0.3, 0.5),
        "exact {damping: 0.2}": lambda h, v: torch.linalg.solve(h + 0.2 * torch.eye(len(h), dtype=h.dtype), v),
        "first_order": lambda h, v: v,
        "exact": torch.linalg.solve,
        "conjugate_gradient {iterations: 10}": torch.linalg.solve,
    }
    for row in level.rows:
        if row.method.startswith("neumann {terms: 20,") and "auto" not in row.method:
            step = float(row.method.split("step_size: ")[1].rstrip("}"))
            assert step == pytest.approx(alpha, rel=5e-3)
            answers[row.method] = series(20, step)
    assert len(answers) == 7
    for method, inverse in answers.items():
        row, right = level.row(method), problem.implicit(values, inverse)
        assert row.failure is None
        assert row.cosine_implicit == pytest.approx(cosine(right, exact), abs=1e-9)
        assert row.error_implicit == pytest.approx(error(right, exact), rel=1e-6, abs=1e-9)
        assert row.cosine_unrolled == pytest.approx(cosine(right, unrolled), abs=1e-9)
        assert row.error_unrolled == pytest.approx(error(right, unrolled), rel=1e-6, abs=1e-9)
        assert row.cosine_first_order == pytest.approx(
            cosine(right, problem.implicit(values, lambda h, v: v)), abs=1e-9
        )
    last = problem.swept(3, 1)
    assert level.row("unroll {last: 1}").cosine_implicit == pytest.approx(cosine(last, exact), abs=1e-9)
    assert level.row("finite_difference").error_unrolled == pytest.approx(error(last, unrolled), rel=1e-4, abs=1e-7)
    assert level.row("unroll").error_unrolled == pytest.approx(0.0, abs=1e-12)
    assert level.agreement == pytest.approx(cosine(unrolled, exact), abs=1e-9)
    assert level.agreement_error == pytest.approx(error(unrolled, exact), rel=1e-6)
    assert level.own.method == "neumann {terms: 3, step_size: 0.4}"
    assert (level.own.gradients, level.own.products) == (1, 4)


def chain(
    method: mlo.hypergradient.AbstractHypergradient, *, curvature: list[float] | None = None
) -> tuple[mlo.Graph, dict]:
    """y above x above u: f_x = ½xᵀHx − xᵀBu, f_y = ½yᵀGy − yᵀCx, F = ½‖y − t‖², with weight decay on x."""
    n = 6
    basis, _ = torch.linalg.qr(normal(n, n, seed=1))
    h = basis @ torch.diag(torch.tensor(curvature or [0.2, 0.4, 0.6, 0.8, 1.0, 1.2], dtype=torch.float64)) @ basis.T
    g = torch.diag(torch.linspace(0.5, 1.5, n, dtype=torch.float64))
    b, c, t, u = (normal(*shape, seed=seed) for seed, shape in enumerate([(n, 3), (n, n), (n,), (3,)], 2))
    step = {"optimizer": mlo.optimizer.SGD(learning_rate=0.5), "steps": 4}

    def f_x(values, batch):
        x = values["x"]
        return 0.5 * x @ h @ x - x @ b @ values["u"] - (0 if batch is None else (batch * x).sum())

    def f_y(values, batch):
        y = values["y"]
        return 0.5 * y @ g @ y - y @ c @ values["x"]

    graph = mlo.Graph(
        [
            mlo.Level(
                "x",
                objective=f_x,
                variables=normal(n, seed=9),
                given=("u",),
                hypergradient=method,
                optimizer=mlo.optimizer.SGD(learning_rate=0.5, weight_decay=0.1),
                steps=4,
            ),
            mlo.Level("y", objective=f_y, variables=normal(n, seed=8), given=("x",), hypergradient=Exact(), **step),
            mlo.Level(
                "u",
                objective=lambda values, batch: 0.5 * (values["y"] - t).square().sum(),
                variables=u,
                subject_to=("x", "y"),
                optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            ),
        ]
    )
    return graph, {"h": h + 0.1 * torch.eye(n, dtype=torch.float64), "g": g, "b": b, "c": c, "t": t, "u": u}


def responses(m: dict, extra: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    x, y = normal(6, seed=9), normal(6, seed=8)
    for _ in range(4):
        x = x - 0.5 * (m["h"] @ x - m["b"] @ m["u"] - extra)
    for _ in range(4):
        y = y - 0.5 * (m["g"] @ y - m["c"] @ x)
    return x, y


def test_the_cotangent_is_the_one_that_arrives_by_the_methods_as_they_are_set():
    graph, m = chain(FirstOrder())
    found = mlo.audit(graph, repeats=1)
    assert [(level.upper, level.level) for level in found.levels] == [("u", "y"), ("u", "x")]
    x, y = responses(m)
    on_y = y - m["t"]
    on_x = m["c"].T @ torch.linalg.solve(m["g"], on_y)
    for name, size, reads, cotangent in (("y", 6, {"x": 6}, on_y), ("x", 6, {"u": 3}, on_x)):
        level = found.level(name)
        assert (level.size, level.reads) == (size, reads)
        assert level.cotangent_norm == pytest.approx(cotangent.norm().item(), rel=1e-10)
    level = found.level("x")
    gradient = m["h"] @ x - m["b"] @ m["u"]
    start = m["h"] @ normal(6, seed=9) - m["b"] @ m["u"]
    assert level.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-10)
    assert level.start_gradient_norm == pytest.approx(start.norm().item(), rel=1e-10)
    assert level.upper_loss == pytest.approx(0.5 * on_y.square().sum().item(), rel=1e-12)
    assert level.direct_norm == 0.0
    assert level.total_norm == pytest.approx((m["b"].T @ on_x).norm().item(), rel=1e-10)
    right = m["b"].T @ torch.linalg.solve(m["h"], on_x)
    assert level.row("first_order").cosine_implicit == pytest.approx(cosine(m["b"].T @ on_x, right), abs=1e-10)
    residual = (on_x - m["h"] @ on_x).norm() / on_x.norm()
    assert level.row("first_order").residual == pytest.approx(residual.item(), rel=1e-9)
    assert level.reference is not None
    gap = abs((torch.linalg.solve(m["h"], on_x) @ gradient).item())
    assert level.reference.gap == pytest.approx(gap, rel=1e-8)


@pytest.mark.parametrize("dense", [0, 2000])
@pytest.mark.parametrize("curvature", [[0.2, 0.4, 0.6, 0.8, 1.0, 1.2], [-0.5, 0.4, 0.6, 0.8, 1.0, 2.0]])
def test_both_ways_to_a_spectrum_and_a_reference_agree_with_dense_linear_algebra(dense, curvature):
    graph, m = chain(ConjugateGradient(iterations=3), curvature=curvature)
    level = mlo.audit(graph, dense=dense, repeats=1).level("x")
    assert level.spectrum is not None
    assert level.reference is not None
    right = torch.linalg.eigvalsh(m["h"])
    assert (level.spectrum.how, level.reference.how) == (("dense", "dense") if dense else ("lanczos", "minres"))
    assert level.spectrum.converged
    assert level.spectrum.lambda_min == pytest.approx(right[0].item(), abs=1e-8)
    assert level.spectrum.lambda_max == pytest.approx(right[-1].item(), abs=1e-8)
    assert level.spectrum.sign == (1 if right[0] > 0 else -1)
    assert level.reference.converged
    _, y = responses(m)
    on_x = m["c"].T @ torch.linalg.solve(m["g"], y - m["t"])
    exact = m["b"].T @ torch.linalg.solve(m["h"], on_x)
    assert level.row("first_order").cosine_implicit == pytest.approx(cosine(m["b"].T @ on_x, exact), abs=1e-7)
    assert level.row("exact").failure == (None if dense else "6 numbers are more than 0")


def test_an_indefinite_hessian_is_said_with_the_damping_that_makes_it_definite():
    graph, m = chain(Neumann(terms=40, step_size=0.4), curvature=[-0.5, 0.4, 0.6, 0.8, 1.0, 2.0])
    level = mlo.audit(graph, repeats=1).level("x")
    (said,) = [finding for finding in level.findings if "indefinite" in finding]
    assert "λ_min = -0.4:" in said
    damping = float(said.split("`damping: ")[1].split("`")[0])
    shifted = torch.linalg.eigvalsh(m["h"] + damping * torch.eye(6, dtype=torch.float64))
    assert 0 < shifted[0].item() < 0.1
    assert level.row(f"conjugate_gradient {{iterations: 100, damping: {damping:g}}}").failure is None
    assert any(f"last term {1.16**40:.3g} times its first" in finding for finding in level.findings)


def test_a_series_that_diverges_and_one_that_is_first_order_are_said_with_numbers():
    graph, _ = chain(Neumann(terms=5, step_size=1e-3))
    level = mlo.audit(graph, methods=[Neumann(terms=5, step_size=2.0)], repeats=1).level("x")
    assert any(
        "neumann {terms: 5, step_size: 0.001} is first order (cosine to first_order: 1.0000" in finding
        and "0.001 · 6 · 1.3 = 0.0078 ≪ 1" in finding
        for finding in level.findings
    )
    assert any(
        "neumann {terms: 5, step_size: 2} diverges: α·λ_max = 2 · 1.3 = 2.6 > 2" in finding and "1.6^5" in finding
        for finding in level.findings
    )
    assert level.own.cosine_first_order == pytest.approx(1.0, abs=1e-4)


def test_draws_give_means_and_standard_deviations():
    graph, _ = chain(FirstOrder())
    batches = [{"x": normal(6, seed=seed)} for seed in (30, 31, 32)]
    together = mlo.audit(graph, batches=batches, repeats=1).level("x")
    single = [mlo.audit(graph, batches=each, repeats=1).level("x") for each in batches]
    for method in ("first_order", "unroll {last: 1}", "conjugate_gradient {iterations: 10}"):
        rows = [level.row(method) for level in single]
        row = together.row(method)
        for name in ("cosine_unrolled", "error_implicit"):
            numbers = [getattr(each, name) for each in rows]
            assert getattr(row, name) == pytest.approx(statistics.fmean(numbers), rel=1e-9, abs=1e-12)
            assert (row.spread or {})[name] == pytest.approx(statistics.stdev(numbers), rel=1e-6, abs=1e-9)
        assert rows[0].spread is None
    assert len(together.iterations) == 3


def test_a_solution_and_a_response_short_of_it_are_told_apart():
    graph, m = chain(Unroll(), curvature=[-0.095, -0.09, -0.08, 0.3, 1.0, 1.2])
    x = torch.linalg.solve(m["h"], m["b"] @ m["u"])
    y = torch.linalg.solve(m["g"], m["c"] @ x)
    solved = mlo.audit(graph, state=graph.init(values={"x": x, "y": y}), repeats=1).level("x")
    assert solved.advice.startswith("The response is a solution")
    short = mlo.audit(graph, repeats=1).level("x")
    assert short.advice.startswith("The response is not a solution")
    assert "your unroll has cosine 1.000 to the unrolled derivative" in short.advice
    assert "to follow the 4 steps taken, yours is the cheapest above 0.99" in short.advice


def test_a_graph_and_its_state_stay_as_they_are_and_json_holds_the_report():
    graph, _ = chain(FirstOrder())
    state = graph.init()
    before = {name: value.clone() for name, value in state.values.items()}
    seed = torch.random.get_rng_state()
    found = mlo.audit(graph, state=state, repeats=1)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(before[name], value) for name, value in state.values.items())
    told = json.loads(found.to_json())
    assert [level["level"] for level in told["levels"]] == ["y", "x"]
    for level, shown in zip(found.levels, told["levels"], strict=True):
        for row, line in zip(level.rows, shown["rows"], strict=True):
            assert line["method"] == row.method
            assert line["cosine_implicit"] == row.cosine_implicit
            assert line["own"] == row.own
