"""What may be written about one level: a strict, frozen model and the forms its fields share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mlo.spec._forms import Form, Keyed
from mlo.spec._frozen import Frozen, freeze
from mlo.spec._options import split_choice

NONE = "none"
"""The optimizer of a level that is a constant."""

CONFIG = ConfigDict(strict=True, frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Epochs(BaseModel):
    """A duration in passes over the level's own stream: `{epochs: 25}`."""

    model_config = CONFIG

    epochs: Annotated[int, Field(ge=1), Form("a whole number of at least 1")]


class Choice(BaseModel):
    """`name` or `{name: {option: value}}`. Names are compared without case and underscores."""

    model_config = CONFIG

    name: str
    options: Annotated[Mapping[str, Any], AfterValidator(freeze)] = Frozen[Any]()

    def yaml(self) -> str | dict[str, Any]:
        """The shortest way to write it."""
        return {self.name: self.options} if self.options else self.name


def _named(value: object) -> object:
    name, options = split_choice(value)
    return value if name is None else {"name": name, "options": options}


def listed(value: object) -> object:
    """A single name is a list of one."""
    return (value,) if isinstance(value, str) else value


Chosen: TypeAlias = Annotated[
    Choice | None, BeforeValidator(_named), Form("a name or {name: {option: value}}", whole=True)
]
Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(listed), Form("a name or a list of names")]
Duration: TypeAlias = Annotated[
    Annotated[int, Field(ge=1)] | Epochs, Form("a whole number of at least 1, or {epochs: n}")
]


class LevelSpec(BaseModel):
    """One level: variables, the objective they minimise, what it reads and when it moves.

    A level that is trained has `variables`, `objective` and `optimizer`; one with `optimizer: none` is a constant and
    needs `variables` only.
    """

    model_config = CONFIG

    name: Annotated[str, Keyed()]
    variables: Chosen = None
    objective: Chosen = None
    given: Names = ()
    subject_to: Names = ()
    against: Names = ()
    batch: Annotated[str | tuple[str, ...] | None, Form("the name of a stream, or a list of names")] = None
    steps: Annotated[int, Field(ge=0), Form("a whole number of at least 0")] = 1
    every: Duration = 1
    warm_up: Annotated[Annotated[int, Field(ge=0)] | Epochs, Form("a whole number of at least 0, or {epochs: n}")] = 0
    lookahead: Annotated[bool, Form("true or false")] = False
    optimizer: Chosen = None
    hypergradient: Chosen = None
    freeze: Names = ()

    @property
    def frozen(self) -> bool:
        """Whether the level is a constant: `optimizer: none`."""
        return self.optimizer is not None and self.optimizer.name == NONE
