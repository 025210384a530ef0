"""What may be searched: exact ranges, lists of YAML values, continuous ranges."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlo._errors import UserError
from mlo._search._space import Choices, Logarithmic, corners, heads, size_of, space_of


def texts(values: str) -> tuple[str, ...]:
    (found,) = space_of([f"key={values}"])
    assert isinstance(found, Choices)
    return found.texts


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ("0.1:1.0:0.1", ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0")),
        ("1:10:3", ("1", "4", "7", "10")),
        ("-1:1:0.5", ("-1.0", "-0.5", "0.0", "0.5", "1.0")),
        ("1e-4:3e-4:1e-4", ("0.0001", "0.0002", "0.0003")),
        ("0:1:0.4", ("0.0", "0.4", "0.8")),
        (" 2 : 2 : 1 ", ("2",)),
        ("sgd, adam", ("sgd", "adam")),
        ("1e-3,null,true", ("1e-3", "null", "true")),
        (
            "[1, 2],{sgd: {momentum: 0.9, nesterov: true}},'a,b'",
            ("[1, 2]", "{sgd: {momentum: 0.9, nesterov: true}}", "'a,b'"),
        ),
        ("a:b", ("a:b",)),
        ("5", ("5",)),
    ],
)
def test_values_are_those_that_are_written(values, found) -> None:
    assert texts(values) == found


@given(
    first=st.decimals(min_value=-1000, max_value=1000, places=4),
    step=st.decimals(min_value=Decimal("0.0001"), max_value=100, places=4),
    count=st.integers(1, 60),
    beyond=st.decimals(min_value=0, max_value=Decimal("0.99"), places=2),
)
def test_a_range_has_every_multiple_of_its_step_once_exactly_and_ends_inside(first, step, count, beyond) -> None:
    last = first + (count - 1 + beyond) * step
    found = texts(f"{first:f}:{last:f}:{step:f}")
    assert len(found) == count
    exact = [Fraction(first) + number * Fraction(step) for number in range(count)]
    assert [float(text) for text in found] == [float(value) for value in exact]
    assert all(
        Decimal(text) == Decimal(value.numerator) / value.denominator for text, value in zip(found, exact, strict=True)
    )


@given(st.integers(-50, 50), st.integers(1, 9), st.integers(1, 30))
def test_a_range_of_whole_numbers_holds_whole_numbers(first, step, count) -> None:
    found = texts(f"{first}:{first + (count - 1) * step}:{step}")
    assert found == tuple(str(value) for value in range(first, first + count * step, step))


@given(st.floats(1e-8, 1e8), st.floats(1e-8, 1e8), st.floats(0, 1))
def test_a_value_of_a_continuous_range_is_the_one_that_is_shown_and_lies_in_it(one, other, part) -> None:
    low, high = min(one, other), max(one, other)
    if not low < high:
        return
    (found,) = space_of([f"key=log:{low}:{high}"])
    assert isinstance(found, Logarithmic)
    shown = float(found.text(low ** (1 - part) * high**part))
    assert low <= shown <= high
    assert shown == pytest.approx(min(max(low ** (1 - part) * high**part, low), high), rel=1e-3)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("weight", "--over weight: expected KEY=VALUES, the values as 0.1:1.0:0.1 (first, last and step)"),
        ("weight=", "expected KEY=VALUES"),
        ("weight=0.1:1.0", "expected FIRST:LAST:STEP, such as 0.1:1.0:0.1, or log:LOW:HIGH"),
        ("weight=0.1:one:0.1", "expected FIRST:LAST:STEP"),
        ("weight=1.0:0.1:0.1", "expected FIRST ≤ LAST and STEP > 0, got 1.0, 0.1, 0.1"),
        ("weight=0:1:0", "expected FIRST ≤ LAST and STEP > 0"),
        ("weight=0:1:1e-9", "1,000,000,001 values, more than 10,000"),
        ("weight=1.0:1.0000000000000000001:0.0000000000000000001", "is too small"),
        ("weight=1e400:2e400:1e400", "too large to be computed with"),
        ("weight=log:0:1", "expected 0 < LOW < HIGH, got 0 and 1"),
        ("weight=log:1e-4", "expected log:LOW:HIGH, such as log:1e-4:1e-1"),
        ("weight=0.1,,0.2", "a value is missing between two commas"),
        ("weight=0.1,0.2,0.10", "0.1 and 0.10 are the same value"),
        ("Seed=1,2", "the seeds of a search are those of --seeds"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(over, message) -> None:
    with pytest.raises(UserError) as error:
        space_of([over])
    assert message in str(error.value)


def test_all_mistakes_are_told_at_once_and_a_key_is_searched_once() -> None:
    with pytest.raises(UserError) as error:
        space_of(["a=1:2", "b=1,1", "c.d_e=1", "c.de=2", "f=3"], ["f=1"])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        "--over a=1:2",
        "--over b=1,1",
        "--over c.de=2",
        "--over f=3",
    ]
    assert "the same key as in --over c.d_e=1" in str(error.value)
    assert "the same key as in f=1" in str(error.value)
    with pytest.raises(UserError, match="nothing to search"):
        space_of([])
    with pytest.raises(UserError, match="1,000,000 combinations, more than 10,000"):
        space_of(["a=1:1000:1", "b=1:1000:1"])


def test_corners_hold_every_value_of_a_list_and_the_ends_of_ranges() -> None:
    space = space_of(["a=0:10:1", "b=x,y,z", "c=log:1e-3:1e-1"])
    assert set(corners(space)) == {
        ("a=0", "b=x", "c=0.001"),
        ("a=10", "b=x", "c=0.001"),
        ("a=0", "b=y", "c=0.001"),
        ("a=0", "b=z", "c=0.001"),
        ("a=0", "b=x", "c=0.1"),
    }
    assert size_of(space) is None
    assert size_of(space[:2]) == 33
    assert heads(space_of(["levels.a.weight=1", "levels.b.weight=1", "levels.a.rate=1"])) == [
        "a.weight",
        "b.weight",
        "rate",
    ]
