"""Means and paired differences, against closed forms and scipy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlo._table._statistics import Paired, Spread, paired, spread

SAMPLES = st.lists(
    st.tuples(st.floats(-1e3, 1e3).map(lambda x: round(x, 6)), st.floats(-1e3, 1e3).map(lambda x: round(x, 6))),
    min_size=2,
    max_size=12,
)


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_of_an_arithmetic_sequence_mean_deviation_error_and_t_are_known() -> None:
    # 1 … n: mean (n + 1) / 2, variance n (n + 1) / 12
    n = 9
    found = spread(by_seed(*range(1, n + 1)))
    assert found is not None
    assert (found.n, found.mean) == (n, 5.0)
    assert found.deviation == pytest.approx(math.sqrt(n * (n + 1) / 12), rel=1e-15)
    difference = paired(by_seed(*(10.0 + s for s in range(1, n + 1))), by_seed(*[10.0] * n))
    assert difference is not None
    assert (difference.n, difference.mean) == (n, 5.0)
    assert difference.error == pytest.approx(math.sqrt((n + 1) / 12), rel=1e-15)
    assert difference.t == pytest.approx(5 / math.sqrt((n + 1) / 12), rel=1e-15)


def test_differences_are_those_of_common_seeds_only() -> None:
    own, control = {0: 88.0, 1: 92.0, 2: 91.0, 7: 0.0}, {2: 94.0, 1: 92.0, 0: 90.0, 5: 1e6}
    found = paired(own, control)  # −2, 0, −3
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(-5 / 3, rel=1e-15)
    assert found.error == pytest.approx(math.sqrt(7) / 3, rel=1e-15)  # Σ (d − d̄)² = 14/3, / (3 · 2) = 7/9
    assert found.t == pytest.approx(-5 / math.sqrt(7), rel=1e-15)


@given(SAMPLES)
def test_t_and_errors_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    own, control = by_seed(*(a for a, _ in pairs)), by_seed(*(b for _, b in pairs))
    found, alone = paired(own, control), spread(own)
    assert found is not None
    assert alone is not None
    if alone.deviation is not None and alone.deviation > 1e-3:  # below, scipy warns that it loses digits
        assert alone.deviation == pytest.approx(stats.tstd(list(own.values())), rel=1e-9)
    if found.error is not None and found.error > 1e-3:
        reference = stats.ttest_rel(list(own.values()), list(control.values()))
        assert found.error == pytest.approx(stats.sem([a - b for a, b in pairs]), rel=1e-9)
        assert found.t == pytest.approx(reference.statistic, rel=1e-9)


def test_where_there_is_too_little_nothing_is_invented() -> None:
    assert spread({}) is None
    assert spread({3: 2.0}) == Spread(1, 2.0, None)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 3.0}, {0: 1.0}) == Paired(1, 2.0, None, None)


def test_equal_differences_have_no_error_and_an_infinite_t_unless_they_are_zero() -> None:
    assert paired(by_seed(3, 4), by_seed(1, 2)) == Paired(2, 2.0, 0.0, math.inf)
    assert paired(by_seed(1, 2), by_seed(3, 4)) == Paired(2, -2.0, 0.0, -math.inf)
    assert paired(by_seed(1, 2), by_seed(1, 2)) == Paired(2, 0.0, 0.0, None)
