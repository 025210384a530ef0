"""Type annotations in words a researcher understands, and pydantic's complaints turned into them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, final, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mlo._errors import nearest
from mlo.spec._faults import Fault, expected, known
from mlo.spec._names import is_built, leaves, spoken
from mlo.spec._nodes import KeyPath

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
    None: "null",
    Any: "a value",
}
_ELSEWHERE = {
    "lr": ("learning_rate",),
    "wd": ("weight_decay",),
    "eps": ("epsilon",),
    "betas": ("beta1", "beta2"),
}
"""Options as other libraries name them: for a hint alone."""
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "true or false": "true or false"}


@final
@dataclass(frozen=True)
class Form:
    """What a field expects, in words; stands in `Annotated[…]` and wins over what the annotation itself would say.

    With `whole`, what is wrong inside the value is said of the value: it is written in another form than its model has.
    """

    words: str
    whole: bool = False


@final
@dataclass(frozen=True)
class Keyed:
    """Marks a field that is the key a value stands under, and is not written inside it."""


@final
@dataclass(frozen=True)
class Also:
    """Marks a value that may be written in another form too, which a validator turns into the one annotated."""

    annotation: Any


def written_keys(model: type[BaseModel]) -> list[str]:
    """The keys that may be written in the mapping that becomes a `model`."""
    fields = model.model_fields.items()
    return [info.alias or name for name, info in fields if not any(isinstance(item, Keyed) for item in info.metadata)]


def describe(annotation: Any) -> str:
    """What values `annotation` allows: `int | None` is "a whole number or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:])
    if origin is Literal:
        return one_of(arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if is_built(annotation):
        return _built(annotation)
    if inspect.isclass(origin or annotation):
        return _container(origin or annotation, arguments)
    return str(annotation)


def one_of(values: Iterable[object]) -> str:
    """`a, b or c`."""
    words = [value if isinstance(value, str) else _WORDS.get(value, str(value)) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _built(kind: type) -> str:
    if kind.__name__.startswith("Abstract"):
        return f"a {spoken(kind)} ({', '.join(sorted(leaves(kind)))})"
    return "{" + ", ".join(f"{name}: …" for name in inspect.signature(kind).parameters) + "}"


def _annotated(base: Any, metadata: Sequence[Any]) -> str:
    words, bounds = describe(base), list[str]()
    for item in metadata:
        match item:
            case Form():
                return item.words
            case FieldInfo():
                return _annotated(base, item.metadata) if item.metadata else words
            case Ge():
                bounds.append(f"at least {item.ge}")
            case Gt():
                bounds.append(f"above {item.gt}")
            case Le():
                bounds.append(f"at most {item.le}")
            case Lt():
                bounds.append(f"below {item.lt}")
            case _:
                continue
    return (
        f"{words} {'of ' if bounds and bounds[0].startswith('at') else ''}{' and '.join(bounds)}" if bounds else words
    )


def _union(arguments: Sequence[Any]) -> str:
    members = sorted(arguments, key=lambda member: member in (None, type(None)))
    words = list(dict.fromkeys(describe(member) for member in members))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    return one_of(words)


def _container(kind: type, arguments: Sequence[Any]) -> str:
    if issubclass(kind, tuple) and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: {', '.join(map(describe, arguments))}"
    if issubclass(kind, Mapping):
        return f"a mapping from names to {_plural(arguments[1:])}"
    if issubclass(kind, Sequence | AbstractSet):
        return f"a list of {_plural(arguments[:1])}"
    return kind.__name__


def _plural(arguments: Sequence[Any]) -> str:
    words = describe(arguments[0]) if arguments else "a value"
    return _PLURALS.get(words, "values" if words == "a value" else f"values, each {words}")


def _meant(name: str, names: Sequence[str]) -> str:
    """` Did you mean …?`: what other libraries call `name`, or what it is spelled like."""
    ours = [f"'{each}'" for each in _ELSEWHERE.get(name, ()) if each in names]
    return f" Did you mean {' and '.join(ours)}?" if ours else nearest(name, names)


def faults_of(error: ValidationError, model: type[BaseModel], data: Any, *, noun: str = "key") -> list[Fault]:
    """What pydantic found, in our words: one fault for each field that is wrong, at the field."""
    nested: dict[KeyPath, Sequence[Fault]] = {}
    plain: dict[KeyPath, Fault] = {}
    for detail in error.errors(include_url=False, include_input=False):
        context: Mapping[str, Any] = detail.get("ctx", {})
        path, owner, field = _field(model, detail["loc"])
        if "faults" in context:
            nested[path] = [fault.below(path) for fault in context["faults"]]
        elif field is None:
            names = written_keys(owner)
            message = f"unknown {noun}; there are none."
            if names:
                message = f"unknown {noun}.{_meant(str(path[-1]), names)}{known(names)}"
            plain[path] = Fault(path, message, on_key=True)
        elif detail["type"] == "missing" and detail["loc"] == path:
            plain[path] = Fault(path[:-1], f"'{path[-1]}' is missing: {field.words}.", on_key=True)
        elif detail["type"] == "value_error":
            plain[path] = Fault(path, f"{context.get('error')}.")
        else:
            value = _value(data, path)
            plain[path] = Fault(path, f"{expected(field.words, value)}.{field.close(value)}")
    inner = [fault for faults in nested.values() for fault in faults]
    return [*inner, *(fault for path, fault in plain.items() if path not in nested)]


@final
@dataclass(frozen=True)
class _Field:
    """A field of a model, as far as messages need it."""

    info: FieldInfo
    member: bool = False  # a value of a mapping from names to models, not the mapping itself

    @property
    def words(self) -> str:
        if not self.member:
            return _annotated(self.info.annotation, self.info.metadata)
        values = get_args(self.info.annotation)[1]
        return describe(values) if get_origin(values) is Annotated else "a mapping of keys"

    def close(self, value: object) -> str:
        """` Did you mean …?` where one of a few words is expected."""
        members = (self.info.annotation, *get_args(self.info.annotation))
        words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
        return nearest(value, map(str, words)) if isinstance(value, str) else ""


def _field(model: type[BaseModel], loc: KeyPath) -> tuple[KeyPath, type[BaseModel], _Field | None]:
    """Follow `loc` through models to the first field that is no model: its path, the model that has it, the field.

    What comes after it in `loc` are pydantic's names for members of unions, or positions in a list.
    """
    owner, depth = model, 0
    while True:
        fields = {info.alias or name: info for name, info in owner.model_fields.items()}
        info = fields.get(str(loc[depth])) if depth < len(loc) else None
        if info is None:
            return loc[: depth + 1], owner, None
        inner, keyed = _model_of(info.annotation)
        whole = any(isinstance(item, Form) and item.whole for item in info.metadata)
        if inner is None or whole or len(loc) == depth + 1:
            return loc[: depth + 1], owner, _Field(info)
        if keyed and len(loc) == depth + 2:
            return loc, owner, _Field(info, member=True)
        owner, depth = inner, depth + (2 if keyed else 1)


def _model_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model inside `Model | None` (False) or `Mapping[str, Model]` (True); None where there is none."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation, False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _model_of(arguments[0])
    if origin in (Union, types.UnionType):
        models = [_model_of(member)[0] for member in arguments if member is not type(None)]
        return (models[0], False) if len(models) == 1 else (None, False)
    if inspect.isclass(origin) and issubclass(origin, Mapping) and len(arguments) == 2:
        return _model_of(arguments[1])[0], True
    return None, False


def _value(data: Any, path: KeyPath) -> Any:
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data
