"""Options checked against functions and classes."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from mlo.spec import check_options, construct
from mlo.spec._forms import describe

if TYPE_CHECKING:
    from somewhere_else import Tensor  # never imported: only keyword-only parameters count


class AbstractCurve(ABC):  # noqa: B024
    """An interface whose leaves are what its module exports."""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    epochs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MultiStep(AbstractCurve):
    start: float
    at: tuple[int, ...] | Epochs = ()
    then: AbstractCurve | None = None

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start must be at least 0, got {self.start}")


@dataclass(frozen=True, kw_only=True)
class Flat(AbstractCurve):
    pass


@dataclass(frozen=True, kw_only=True)
class Rule:
    rate: float | AbstractCurve
    curve: AbstractCurve = Flat()


def objective(
    values: Tensor,
    batch: Tensor,
    *,
    weight: float = 1.0,
    count: int = 1,
    loss: Literal["ce", "pcr"] = "ce",
    fast: bool = False,
    name: str | None = None,
    sizes: tuple[int, ...] = (),
    pair: tuple[float, float] = (0.0, 1.0),
    names: list[str] | None = None,
    table: Mapping[str, float] | None = None,
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,
    copy: int = 0,
    path: Path = Path(),
    anything: Any = None,
    untyped=None,
    needed: int,
) -> Tensor: ...


@pytest.mark.parametrize(
    ("options", "result"),
    [
        ({"weight": 2}, {"weight": 2.0}),
        ({"weight": 2.5, "count": 3}, {"weight": 2.5, "count": 3}),
        ({"loss": "pcr", "fast": True, "name": "x"}, {"loss": "pcr", "fast": True, "name": "x"}),
        ({"name": None}, {"name": None}),
        ({"sizes": (1, 2), "pair": (1, 2.5)}, {"sizes": (1, 2), "pair": (1.0, 2.5)}),
        ({"names": ("a", "b")}, {"names": ["a", "b"]}),
        ({"table": {"a": 1}}, {"table": {"a": 1.0}}),
        ({"share": 1, "copy": 4, "path": "a/b"}, {"share": 1.0, "copy": 4, "path": Path("a/b")}),
        ({"anything": (1, {"a": 2}), "untyped": "x"}, {"anything": (1, {"a": 2}), "untyped": "x"}),
    ],
)
def test_options_become_keyword_arguments(options, result):
    assert check_options(objective, {"needed": 0} | options) == ({"needed": 0} | result, [])


WRONG = [
    ({"wieght": 1}, ("wieght",), "unknown option. Did you mean 'weight'?"),
    ({"values": 1}, ("values",), "unknown option."),
    ({"weight": True}, ("weight",), "expected a number, got true."),
    ({"weight": "1"}, ("weight",), "expected a number, got '1'."),
    ({"weight": None}, ("weight",), "expected a number, got null."),
    ({"weight": (1,)}, ("weight",), "expected a number, got [1]."),
    ({"count": 1.0}, ("count",), "expected a whole number, got 1.0."),
    ({"count": True}, ("count",), "expected a whole number, got true."),
    ({"loss": "prc"}, ("loss",), "expected ce or pcr, got 'prc'. Did you mean 'pcr'?"),
    ({"fast": 1}, ("fast",), "expected true or false, got 1."),
    ({"fast": "yes"}, ("fast",), "expected true or false, got 'yes'."),
    ({"name": 1}, ("name",), "expected text or null, got 1."),
    ({"sizes": (1, "x")}, ("sizes",), "expected a list of whole numbers, got [1, 'x']."),
    ({"sizes": (1, True)}, ("sizes",), "expected a list of whole numbers, got [1, true]."),
    ({"sizes": 1}, ("sizes",), "expected a list of whole numbers, got 1."),
    ({"sizes": "ab"}, ("sizes",), "expected a list of whole numbers, got 'ab'."),
    ({"pair": (1.0,)}, ("pair",), "expected a list of 2: a number, a number, got [1.0]."),
    ({"names": "ab"}, ("names",), "expected a list of texts or null, got 'ab'."),
    ({"table": {"a": "x"}}, ("table",), "expected a mapping from names to numbers or null, got {a: 'x'}."),
    ({"share": 2}, ("share",), "expected a number of at least 0 and at most 1, got 2."),
]


@pytest.mark.parametrize(("options", "path", "message"), WRONG)
def test_wrong_options_of_a_function(options, path, message):
    arguments, faults = check_options(objective, {"needed": 0} | options)
    assert arguments == {}
    assert [(fault.path, fault.message.split("\n")[0]) for fault in faults] == [(path, message)]


def test_a_missing_option_is_named():
    assert [fault[:2] for fault in check_options(objective, {})[1]] == [((), "'needed' is missing: a whole number.")]


def test_every_wrong_option_is_named():
    assert len(check_options(objective, {"weight": "x", "count": "y", "z": 1})[1]) == 4


def test_functions_without_options_and_with_any():
    def none(values, batch): ...
    def more(values, *, a: int, **others): ...

    assert check_options(none, {"a": 1})[1][0].message == "unknown option; there are none."
    assert check_options(more, {"a": 1, "b": "x"}) == ({"a": 1, "b": "x"}, [])
    assert check_options(functools.partial(more, 1), {"a": 1})[0] == {"a": 1}


def test_any_number_may_be_a_schedule_where_one_is_asked_for():
    given = {"needed": 0, "weight": {"multi_step": {"start": 1}}}
    assert check_options(objective, given, schedule=AbstractCurve)[0]["weight"] == MultiStep(start=1.0)
    assert check_options(objective, {"needed": 0, "weight": 1}, schedule=AbstractCurve)[0]["weight"] == 1.0
    (fault,) = check_options(objective, given)[1]
    assert fault.message == "expected a number, got {multi_step: {start: 1}}."
    (fault,) = check_options(objective, {"needed": 0, "weight": "x"}, schedule=AbstractCurve)[1]
    assert fault.message == "expected a number or a curve (flat, multi_step), got 'x'."


def test_nested_values_are_constructed():
    rate = {"multi_step": {"start": 1, "at": {"epochs": (6, 12)}, "then": {"multi_step": {"start": 2, "at": (3,)}}}}
    made, faults = construct(Rule, {"rate": rate, "curve": "flat"})
    assert not faults
    inner = MultiStep(start=2.0, at=(3,))
    assert made == Rule(rate=MultiStep(start=1.0, at=Epochs(epochs=(6, 12)), then=inner), curve=Flat())


NESTED = [
    ({"rate": {"multistop": {}}}, ("rate",), "no curve named 'multistop'. Did you mean 'multi_step'?"),
    ({"rate": {"multi_step": {"strat": 1}}}, ("rate", "multi_step", "strat"), "unknown option. Did you mean 'start'?"),
    ({"rate": {"multi_step": {"start": "x"}}}, ("rate", "multi_step", "start"), "expected a number, got 'x'."),
    ({"rate": {"multi_step": {"start": -1}}}, ("rate", "multi_step", "start"), "start must be at least 0, got -1.0."),
    ({"rate": {"multi_step": {"start": 1, "at": 3}}}, ("rate", "multi_step", "at"), "expected a list of whole numbers or {epochs: …}, got 3."),
    ({"rate": {"multi_step": {"start": 1, "at": {"epochs": 3}}}}, ("rate", "multi_step", "at", "epochs"), "expected a list of whole numbers, got 3."),
    ({"rate": "fast"}, ("rate",), "expected a number or a curve (flat, multi_step), got 'fast'."),
    ({"rate": 1, "curve": "fast"}, ("curve",), "no curve named 'fast'. Did you mean 'flat'?"),
    ({"rate": 1, "curve": 3}, ("curve",), "expected a curve (flat, multi_step), got 3."),
]  # fmt: skip


@pytest.mark.parametrize(("options", "path", "message"), NESTED)
def test_mistakes_of_nested_values_have_their_path(options, path, message):
    faults = [fault for fault in construct(Rule, options)[1] if "is missing" not in fault.message]
    assert [(fault.path, fault.message.split("\n")[0]) for fault in faults] == [(path, message)]


def test_pydantic_settings_are_checked_the_same_way():
    class Settings(BaseModel):
        size: int = 3
        kind: Literal["a", "b"] = "a"

    assert construct(Settings, {"size": 4})[0] == Settings(size=4)
    faults = construct(Settings, {"size": "x", "kind": "c"})[1]
    assert [fault.message for fault in faults] == ["expected a whole number, got 'x'.", "expected a or b, got 'c'."]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number or null"),
        (int | float, "a number"),
        (None | str | bool, "text, true or false or null"),
        (Annotated[int, Field(gt=0)], "a whole number above 0"),
        (Annotated[float, Field(ge=0, lt=1)], "a number of at least 0 and below 1"),
        (Sequence[tuple[int, int]], "a list of values, each a list of 2: a whole number, a whole number"),
        (dict[str, Any], "a mapping from names to values"),
        (Literal[1, "b", None], "1, b or null"),
        (Any, "a value"),
    ],
)
def test_annotations_in_words(annotation, words):
    assert describe(annotation) == words
