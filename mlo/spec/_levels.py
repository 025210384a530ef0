"""What may be written about one level: a strict, frozen model and the forms its fields share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mlo._types import Constraint
from mlo.spec._forms import Also, Form, Keyed
from mlo.spec._frozen import Frozen, freeze
from mlo.spec._nodes import fold
from mlo.spec._options import split_choice

NONE = "none"
"""The optimizer of a level that is a constant."""

CONFIG = ConfigDict(strict=True, frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Epochs(BaseModel):
    """A duration in passes over the level's own stream, or over another: `{epochs: 25}`, `{epochs: 30, of: train}`.

    - `epochs`: how many passes; for a whole run, over the longest stream of any level.
    - `of`: the stream that passes are counted over.
    """

    model_config = CONFIG

    epochs: Annotated[int, Field(ge=1), Form("a whole number of at least 1")]
    of: Annotated[str | None, Form("the name of a stream")] = None


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


def _everywhere(value: object) -> object:
    """One constraint is that of all variables; names are compared without case and underscores."""
    if isinstance(value, Mapping):
        table: Mapping[Any, Any] = value
        return {name: fold(each) if isinstance(each, str) else each for name, each in table.items()}
    return {"*": fold(value)} if isinstance(value, str) else value


def listed(value: object) -> object:
    """A single name is a list of one."""
    return (value,) if isinstance(value, str) else value


def several(value: object) -> object:
    """A single duration is a list of one."""
    return value if isinstance(value, (list, tuple)) else (value,)


Chosen: TypeAlias = Annotated[
    Choice | None, BeforeValidator(_named), Form("a name or {name: {option: value}}", whole=True)
]
Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(listed), Also(str), Form("a name or a list of names")]
Constrained: TypeAlias = Annotated[
    Mapping[str, Constraint],
    BeforeValidator(_everywhere),
    AfterValidator(freeze),
    Also(Constraint),
    Form("softplus, sigmoid or softmax, or a mapping from names to these"),
]
Duration: TypeAlias = Annotated[
    Annotated[int, Field(ge=1)] | Epochs, Form("a whole number of at least 1, or {epochs: n}")
]
Durations: TypeAlias = Annotated[
    tuple[Duration, ...],
    BeforeValidator(several),
    Also(Duration),
    Form("a whole number of at least 1, {epochs: n}, or a list of these", whole=True),
]


class LevelSpec(BaseModel):
    """One level: variables, the objective they minimise, what it reads and when it moves.

    A level that is trained has `variables`, `objective` and `optimizer`; one with `optimizer: none` is a constant and
    needs `variables` only.

    - `variables`: what the level owns, by the problem's name for it.
    - `objective`: what they minimise, by the problem's name for it.
    - `given`: levels whose variables the objective, or the optimizer for its options, reads and holds fixed.
    - `subject_to`: levels whose responses it differentiates through (the papers' "s.t."); it reads them too.
    - `against`: the other players of a simultaneous game: read as they stood when the iteration began.
    - `batch`: the stream its batches come from; a list gives a mapping by stream name.
    - `steps`: how many optimizer steps it takes when it is due; these are what an upper level differentiates.
    - `every`: it is due at every so many iterations, counted from the end of its warm-up.
    - `warm_up`: until then it keeps the values it starts from, and is still read.
    - `lookahead`: of an upper level: those it is subject to step back after its update and take their steps again.
    - `optimizer`: how it steps; `none` makes it a constant.
    - `hypergradient`: how its response is pulled back to the levels above; default, `unroll`.
    - `nested`: of a level that is subject to others and that others are subject to: `reduced` differentiates the total
      gradient it follows, `direct` only the partial one, with the responses below it held fixed.
    - `constraints`: where variables stay, by a pattern of their names: `softplus` (above 0), `sigmoid` (between 0 and 1) or
      `softmax` (a distribution along the last dimension).
    - `freeze`: parts of its module, by name, that are not trained.
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
    nested: Annotated[Literal["reduced", "direct"], Form("reduced or direct")] = "reduced"
    constraints: Constrained = Frozen[Constraint]()
    freeze: Names = ()

    @property
    def is_joint(self) -> bool:
        """Whether it is differentiated together with the levels it plays against."""
        return self.hypergradient is not None and fold(self.hypergradient.name) == "equilibrium"

    @property
    def frozen(self) -> bool:
        """Whether the level is a constant: `optimizer: none`."""
        return self.optimizer is not None and self.optimizer.name == NONE
