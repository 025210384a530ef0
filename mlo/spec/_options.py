"""Options by name, checked against what a function or a class declares. One mechanism for all of them.

The options of a function are its keyword-only parameters; those of a class, all of its constructor's. Annotations are
strict: a whole number passes for a number, true and false never do, a list passes for a tuple. A parameter annotated with
a dataclass, or with an `Abstract…` interface of which the same package exports leaves, takes `name` or
`{name: {option: value}}`: a schedule, an inverse. A dataclass beside an interface takes its options, `{option: value}`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from mlo.spec._faults import Fault, expected, unknown
from mlo.spec._forms import Form, describe, faults_of, one_of
from mlo.spec._names import is_built, leaves, spoken
from mlo.spec._nodes import fold

T = TypeVar("T")

_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
_OPEN = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)
_KEYWORDS = (inspect.Parameter.KEYWORD_ONLY,)
_ALL = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_options(
    target: Callable[..., Any], options: Mapping[str, Any], *, schedule: type | None = None
) -> tuple[dict[str, Any], list[Fault]]:
    """The keyword arguments that `options` are for `target`, and what is wrong with them (paths start at the option).

    With `schedule`, an interface such as `AbstractSchedule`, every option that is a number may be one of its leaves.
    """
    model = _model(target, schedule)
    try:
        checked = model.model_validate(dict(options))
    except ValidationError as error:
        return {}, faults_of(error, model, options, noun="option")
    given = {info.alias or "": getattr(checked, name) for name, info in model.model_fields.items()}
    return {key: value for key, value in given.items() if key in options} | (checked.model_extra or {}), []


def construct(kind: Callable[..., T], options: Mapping[str, Any]) -> tuple[T | None, list[Fault]]:
    """`kind(**options)`, or None and what is wrong, with what the constructor itself refuses (a ValueError)."""
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        try:
            return kind.model_validate(dict(options)), []
        except ValidationError as error:
            return None, faults_of(error, kind, options)
    arguments, faults = check_options(kind, options)
    if faults:
        return None, faults
    try:
        return kind(**arguments), []
    except ValueError as error:
        first = str(error).split(maxsplit=1)[0].strip("`'\":,") if str(error) else ""
        path = (first,) if first in options else ()  # "radius must be positive, …" belongs to radius
        return None, [Fault(path, f"{error}{'' if str(error).endswith('.') else '.'}")]


def choose(candidates: Mapping[str, Callable[..., T]], value: Any, what: str) -> tuple[T | None, list[Fault]]:
    """What `name` or `{name: {option: value}}` makes of the candidate with that name."""
    name, options = split_choice(value)
    if name is None:
        names = one_of(sorted(candidates))
        return None, [Fault((), f"{expected(f'{names}, as a name or {{name: {{option: value}}}}', value)}.")]
    found = {fold(known_name): kind for known_name, kind in candidates.items()}.get(fold(name))
    if found is None:
        return None, [Fault((), unknown(what, name, candidates))]
    made, faults = construct(found, options)
    return made, [fault.below((name,)) for fault in faults]


def split_choice(value: Any) -> tuple[str | None, Mapping[str, Any]]:
    """Name and options of a choice; (None, {}) where `value` is none."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(cast("Mapping[str, Any]", value)) == 1:
        name, options = next(iter(cast("Mapping[str, Any]", value).items()))
        if isinstance(options, Mapping):
            return name, cast("Mapping[str, Any]", options)
    return None, {}


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that are options, by name, with their annotations resolved."""
    kinds = _ALL if inspect.isclass(target) else _KEYWORDS
    signature = inspect.signature(target)
    hints = _hints(target, [name for name, each in signature.parameters.items() if each.kind in kinds])
    return {name: signature.parameters[name].replace(annotation=hints[name]) for name in hints}


def _hints(target: Callable[..., Any], names: Sequence[str]) -> dict[str, Any]:
    """The annotations of these parameters alone: those of `values` and `batch` may name what is never imported."""
    if inspect.isclass(target) and dataclasses.is_dataclass(target):
        found = typing.get_type_hints(target, include_extras=True)
        return {name: found.get(name, Any) for name in names}
    function: Any = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    function = getattr(function, "func", function)  # functools.partial
    written: Mapping[str, Any] = inspect.get_annotations(function)
    holder = types.SimpleNamespace(__annotations__={name: written[name] for name in names if name in written})
    found = typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}), include_extras=True)
    return {name: found.get(name, Any) for name in names}


@cache
def _model(target: Callable[..., Any], schedule: type | None) -> type[BaseModel]:
    """The options of `target` as a model; fields are numbered, for pydantic keeps names such as `copy` to itself."""
    fields: dict[str, Any] = {}
    for name, parameter in parameters(target).items():
        annotation = parameter.annotation
        if schedule is not None and is_number(annotation):
            annotation = annotation | schedule
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[f"option{len(fields)}"] = (_strictly(annotation), Field(default, alias=name))
    takes_more = any(
        each.kind is inspect.Parameter.VAR_KEYWORD for each in inspect.signature(target).parameters.values()
    )
    made: Any = create_model("Options", __config__=_OPEN if takes_more else _STRICT, **fields)
    return made


def is_number(annotation: Any) -> bool:
    """Whether a fractional number may be written: then a schedule may be, where schedules are allowed."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_number(arguments[0])
    return annotation is float or (origin in (Union, types.UnionType) and float in arguments)


def _strictly(annotation: Any) -> Any:
    """`annotation` for pydantic's strict mode: containers take YAML's lists, classes are built from choices."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(_strictly(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        built = tuple(member for member in arguments if is_built(member))
        members = [_strictly(member) for member in arguments if member not in built]
        members += [_built(built, alone=not members)] if built else []
        return Annotated[Union[tuple(members)], Form(describe(annotation))]  # noqa: UP007
    if is_built(annotation):
        return Annotated[_built((annotation,), alone=True), Form(describe(annotation))]
    kind = origin or annotation
    if inspect.isclass(kind) and issubclass(kind, tuple | list | AbstractSet | Sequence | Path) and kind is not str:
        inner = tuple(each if each is Ellipsis else _strictly(each) for each in arguments)
        rebuilt: Any = cast("Any", kind)[inner] if inner else kind
        return Annotated[rebuilt, Field(strict=False), Form(describe(annotation))]
    return annotation


def _built(kinds: tuple[type, ...], *, alone: bool) -> Any:
    """An instance of one of `kinds`, or what makes one. Unless they stand `alone`, text may be meant as something else."""
    interfaces = [kind for kind in kinds if kind.__name__.startswith("Abstract")]
    plain = [kind for kind in kinds if kind not in interfaces]
    candidates = {name: leaf for kind in interfaces or kinds for name, leaf in leaves(kind).items()}

    def build(value: Any) -> Any:
        name, _ = split_choice(value)
        named = name is not None and fold(name) in map(fold, candidates)
        if isinstance(value, kinds):
            return value
        if isinstance(value, Mapping) and interfaces and _fits(value, plain):
            made, faults = construct(plain[0], cast("Mapping[str, Any]", value))
        elif isinstance(value, Mapping) and interfaces and plain and name is None:
            raise PydanticCustomError("form", "neither a choice nor options")
        elif isinstance(value, Mapping) and len(candidates) == 1 and not named:
            made, faults = construct(next(iter(candidates.values())), cast("Mapping[str, Any]", value))
        elif named or isinstance(value, Mapping) or (alone and isinstance(value, str)):
            made, faults = choose(candidates, value, spoken(kinds[0]))
        else:
            raise PydanticCustomError("form", "not a choice")
        if faults:
            raise PydanticCustomError("options", "wrong options", {"faults": faults})
        return made

    return Annotated[Any, BeforeValidator(build)]


def _fits(value: Mapping[Any, Any], kinds: Sequence[type]) -> bool:
    """Whether `value` is meant as the options of the one class that stands among interfaces: it has one of them."""
    return len(kinds) == 1 and not set(value).isdisjoint(parameters(kinds[0]))
