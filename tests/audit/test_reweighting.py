"""The problem of 910 numbers: an audit of its trained state against the program written out, and its Hessian."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mlo
from mlo._audit import Audit
from mlo.hypergradient import Neumann, Unroll

DECAY = 1e-3
PUBLISHED = "neumann {terms: 5, step_size: 0.001}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> mlo.Run:
    """The network solved, the weights as they start."""
    folder: Path = tmp_path_factory.mktemp("reweighting") / "run"
    return mlo.run(mlo.load("reweighting", "iterations=100", "evaluation=null"), folder, quiet=True)


@pytest.fixture(scope="module")
def audited(trained: mlo.Run) -> Audit:
    methods = [Neumann(terms=5, step_size=1e-3), Neumann(terms=5, step_size=3.0)]
    return mlo.audit(mlo.load("reweighting"), at=trained.folder, which="latest", methods=methods, repeats=1)


@pytest.fixture(scope="module")
def dense(trained: mlo.Run) -> SimpleNamespace:
    """H, λ and the cross derivative in the weights' preimages, from the program written out on one vector."""
    state, problem = trained.state("latest"), trained.spec.build()[1]
    train, validation = (problem.streams[name].draw(None) for name in ("train", "validation"))  # pyright: ignore
    order = ("0.weight", "0.bias", "2.weight", "2.bias")
    w = torch.cat([state.values["network"][name].reshape(-1) for name in order])
    u = state.values["weights"]

    def logits(w: Tensor, images: Tensor) -> Tensor:
        first, shift, second, bias = w.split([768, 12, 120, 10])
        return torch.tanh(images @ first.view(12, 64).T + shift) @ second.view(10, 12).T + bias

    def f(w: Tensor, u: Tensor) -> Tensor:
        losses = cross_entropy(logits(w, train["images"]), train["labels"], reduction="none")
        return (torch.sigmoid(u) * losses).mean() + 0.5 * DECAY * w.square().sum()

    def upper(w: Tensor) -> Tensor:
        return cross_entropy(logits(w, validation["images"]), validation["labels"])

    def cross(q: Tensor) -> Tensor:
        leaves = w.clone().requires_grad_(), u.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(*leaves), leaves[0], create_graph=True)
        return -torch.autograd.grad(gradient, leaves[1], q)[0]

    hessian = torch.autograd.functional.hessian(lambda w: f(w, u), w)
    assert isinstance(hessian, Tensor)
    leaf = w.clone().requires_grad_()
    (cotangent,) = torch.autograd.grad(upper(leaf), leaf)
    (gradient,) = torch.autograd.grad(f(leaf, u), leaf)
    return SimpleNamespace(w=w, u=u, h=hessian, cotangent=cotangent, cross=cross, gradient=gradient)


def cosine(one: Tensor, two: Tensor) -> float:
    return (one @ two / (one.norm() * two.norm())).item()


def series(h: Tensor, v: Tensor, terms: int, alpha: float) -> Tensor:
    term = total = v
    for _ in range(terms):
        term = term - alpha * (h @ term)
        total = total + term
    return alpha * total


def test_the_network_has_910_numbers_and_stands_at_a_minimum(audited, dense):
    (level,) = audited.levels
    assert level.size == len(dense.w) == 910
    assert dense.gradient.norm().item() < 1e-10
    assert level.gradient_norm < 1e-10
    ends = torch.linalg.eigvalsh(dense.h)
    assert level.spectrum.sign == 1
    assert level.spectrum.lambda_min == pytest.approx(ends[0].item(), rel=1e-6)
    assert level.spectrum.lambda_max == pytest.approx(ends[-1].item(), rel=1e-9)
    assert level.cotangent_norm == pytest.approx(dense.cotangent.norm().item(), rel=1e-8)


def test_every_inverse_is_as_far_off_as_dense_linear_algebra_says(audited, dense):
    (level,) = audited.levels
    exact = dense.cross(torch.linalg.solve(dense.h, dense.cotangent))
    assert level.row("exact").error_implicit < 1e-6
    assert level.row("first_order").cosine_implicit == pytest.approx(
        cosine(dense.cross(dense.cotangent), exact), abs=1e-6
    )
    told = [row for row in level.rows if row.method.startswith("neumann") and "auto" not in row.method]
    assert len(told) == 6
    for row in told:
        terms, alpha = (float(part.split(": ")[1]) for part in row.method.rstrip("}").split(", "))
        right = dense.cross(series(dense.h, dense.cotangent, int(terms), alpha))
        assert row.cosine_implicit == pytest.approx(cosine(right, exact), abs=1e-6), row.method
        assert row.error_implicit == pytest.approx(((right - exact).norm() / exact.norm()).item(), rel=1e-5)


def test_methods_come_in_the_order_of_their_quality(audited):
    (level,) = audited.levels
    alpha = f"{1 / level.spectrum.lambda_max:.3g}"
    names = [
        "first_order",
        f"neumann {{terms: 5, step_size: {alpha}}}",
        f"neumann {{terms: 20, step_size: {alpha}}}",
        f"neumann {{terms: 100, step_size: {alpha}}}",
        f"neumann {{terms: 1000, step_size: {alpha}}}",
        "conjugate_gradient {iterations: 100}",
    ]
    cosines = [level.row(name).cosine_implicit for name in names]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.6 < cosines[1] < 0.9 < cosines[4] < 0.99 < cosines[5]


def test_the_published_setting_is_first_order_and_a_large_step_diverges(audited):
    (level,) = audited.levels
    row = level.row(PUBLISHED)
    assert row.cosine_first_order > 0.99999
    assert row.cosine_implicit == pytest.approx(level.row("first_order").cosine_implicit, abs=1e-3)
    most = level.spectrum.lambda_max
    said = (
        f"{PUBLISHED} is first order (cosine to first_order: {row.cosine_first_order:.6f}): α(J+1)λ_max = 0.001 · 6 · "
    )
    assert any(finding.startswith(f"{said}{most:.3g} = {6e-3 * most:.2g} ≪ 1") for finding in level.findings)
    diverging = f"neumann {{terms: 5, step_size: 3}} diverges: α·λ_max = 3 · {most:.3g} = {3 * most:.3g} > 2"
    assert any(finding.startswith(diverging) for finding in level.findings)
    assert level.advice.startswith("The response is a solution")
    assert "the cheapest above 0.99 is gmres {iterations: 50} (cosine 0.99" in level.advice


def test_unrolling_plain_descent_from_the_solution_is_a_series_of_as_many_terms(trained, dense):
    """At a fixed point, T steps of w − η∇f give η Σ_{k<T} (I − ηH)ᵏ λ."""
    rate = 0.9 / torch.linalg.eigvalsh(dense.h)[-1].item()
    plain = f"levels.network.optimizer={{sgd: {{learning_rate: {rate}, momentum: null, weight_decay: {DECAY}}}}}"
    spec = mlo.load("reweighting", plain, "levels.network.steps=21")
    graph, problem = spec.build()
    solved = trained.state("latest")
    state = graph.init(
        values={"network": solved.values["network"] | {}, "weights": torch.sigmoid(solved.values["weights"])}
    )
    batches = {
        "network": problem.streams["train"].draw(None),  # pyright: ignore
        "weights": problem.streams["validation"].draw(None),  # pyright: ignore
    }
    levels = mlo.audit(
        graph, state=state, batches=batches, methods=[Neumann(terms=20, step_size=rate)], dense=0, repeats=1
    )
    (level,) = levels.levels
    row = next(row for row in level.rows if row.method == f"neumann {{terms: 20, step_size: {rate!r}}}")
    assert level.own.method == "unroll"
    assert isinstance(graph.levels["network"].hypergradient, Unroll)
    assert row.error_unrolled == pytest.approx(0.0, abs=1e-8)
