"""Problems whose hypergradients are known, against methods and the answer their theory promises."""

from __future__ import annotations

from operator import attrgetter

import pytest
from helpers import closed_form_problems, methods, relative_error

import mlo


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize(("method", "answer", "tolerance"), methods, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("problem", closed_form_problems, ids=attrgetter("name"))
def test_matches_closed_form(problem, method, answer, tolerance, steps):
    graph = mlo.Graph(problem.levels(method, steps))
    found = graph.hypergradient("u", graph.init())
    assert relative_error(found, getattr(problem, answer)(steps)) <= tolerance


@pytest.mark.parametrize(("method", "answer", "tolerance"), methods, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("problem", closed_form_problems, ids=attrgetter("name"))
def test_a_state_that_counts_as_the_solution_contributes_nothing(problem, method, answer, tolerance):
    graph = mlo.Graph(problem.levels(method, 0))
    parts = graph.parts("u", graph.init())
    assert not parts.through
    assert (parts.total == parts.direct).all()
