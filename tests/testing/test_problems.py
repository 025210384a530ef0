"""The problems themselves: their answers agree with each other, and they are what was asked for."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import flat, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import mlo
from mlo.testing import chains, dags, diamonds, ladders, logistic, problems, quadratics, ridge, shapes

double = {"dtypes": [torch.float64]}


@given(problems(**double))
@settings(max_examples=15)
def test_the_solution_is_stationary_and_the_hypergradient_is_its_slope(problem):
    """Central differences of the solved problem; steps without end lead there too, and so does their derivative."""
    graph = mlo.Graph(problem.levels(mlo.hypergradient.Exact(), steps=1))
    state, _ = graph.step(graph.init(values=problem.solution))
    for name in problem.reads:
        assert (flat(state.values[name]) - flat(problem.solution[name])).norm() <= 1e-12
    u = problem.start["u"]
    slopes = [
        (problem.value(problem.solved(u + step)) - problem.value(problem.solved(u - step))) / 2e-5
        for step in 1e-5 * torch.eye(len(u), dtype=torch.float64)
    ]
    exact = flat(problem.hypergradient)
    assert (torch.tensor(slopes, dtype=torch.float64) - exact).norm() <= 1e-7 * (1 + exact.norm())
    assert relative_error(problem.unrolled(700), problem.hypergradient) <= 1e-9


@pytest.mark.parametrize("family", [quadratics, ridge, logistic])
@given(data=st.data())
@settings(max_examples=8)
def test_dimension_and_condition_are_as_asked(family, data):
    problem = data.draw(family(dimension=7, condition=50, decays=[0.0], **double))
    seen = []
    problem.at_solution(lambda h, cotangent: (seen.append(torch.linalg.eigvalsh(h)), cotangent)[1])
    for eigenvalues in seen:
        assert len(eigenvalues) == 7
        assert 1 / 50 - 1e-12 <= eigenvalues[0] <= eigenvalues[-1] <= 1 + 1e-12
    assert "of condition 50 in float64" in str(problem)


@pytest.mark.parametrize("shape", [chains(), diamonds(), ladders(), dags(), shapes()], ids=repr)
@given(data=st.data())
@settings(max_examples=8)
def test_every_shape_makes_a_graph_whose_order_is_its_own(shape, data):
    problem = data.draw(problems(shape=shape))
    graph = mlo.Graph(problem.levels(mlo.hypergradient.Unroll(), steps=1))
    place = {name: index for index, name in enumerate(graph.order)}
    assert all(place[other] < place[name] for name, of in problem.reads.items() for other in of if other != "u")
    for name, tensors in problem.solution.items():
        found = tensors.values() if isinstance(tensors, dict) else [tensors]
        assert {tensor.dtype for tensor in found} == {problem.dtype}, name


@pytest.mark.parametrize("name", [name for name in vars(mlo.testing) if not name.startswith("_")])
def test_every_public_function_is_documented(name):
    found = getattr(mlo.testing, name)
    assert found.__doc__ or (not inspect.isroutine(found) and not inspect.isclass(found))
