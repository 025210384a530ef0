"""Graph files as JSON Schema (draft 2020-12), for editors: what may be written, not what it becomes.

Generated from the models of a specification and from the signatures of what it names, with their docstrings. It knows
names in their published spelling only (`mlo` itself compares them without case and underscores), and it judges one file
at a time: what is missing in a file that extends another is not missed, and `null`, which removes, may stand anywhere.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, final, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mlo.spec._docs import about, summary
from mlo.spec._forms import Also, Form, Keyed
from mlo.spec._frozen import thaw
from mlo.spec._levels import NONE, Choice, LevelSpec
from mlo.spec._models import Spec
from mlo.spec._names import is_built, leaves, snake
from mlo.spec._nodes import CHOICES
from mlo.spec._options import is_number, parameters
from mlo.spec._problems import problem_names
from mlo.spec._registry import candidates

Schema: TypeAlias = dict[str, Any]
Table: TypeAlias = Mapping[str, Callable[..., Any]]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_NOTHING = {"const": NONE, "description": "A constant: the level is not trained."}
_NULL = {"type": "null"}
_BOUNDS = {Ge: ("ge", "minimum"), Gt: ("gt", "exclusiveMinimum"), Le: ("le", "maximum"), Lt: ("lt", "exclusiveMaximum")}


@final
@dataclass(frozen=True, kw_only=True)
class Tables:
    """The names that one problem gives to graphs, and the model of its `data`."""

    problem: str
    settings: Any
    variables: Table
    objectives: Table
    streams: Sequence[str]


def schema(tables: Tables | None = None, imports: Sequence[str] = ()) -> Schema:
    """The schema of graph files; with `tables`, of graphs of that problem."""
    named: dict[str, Table | None] = {
        "optimizer": candidates("optimizer"),
        "hypergradient": candidates("hypergradient"),
    }
    named |= {"variables": tables and tables.variables, "objective": tables and tables.objectives}
    writer = _Writer(named)
    graph = writer.model(Spec)
    keys = graph["properties"]
    keys |= {"extends": {"type": "string", "description": about(Spec)["extends"]}}
    problems = [tables.problem] if tables else problem_names(imports)
    known = {"enum": problems}
    keys["problem"] |= known if tables else {"anyOf": [known, {"type": "string"}]}
    keys["problem"].pop("type", None)
    keys["levels"]["propertyNames"] = {"pattern": "^[a-z_][a-z0-9_]*$"}
    if tables is not None:
        data = writer.settings(tables.settings)
        keys["data"] = {"description": keys["data"]["description"], **data}
        one = {"enum": sorted(tables.streams)}
        batch = writer.defs[LevelSpec.__name__]["properties"]["batch"]
        batch["anyOf"] = [one, {"type": "array", "items": one}, _NULL]
    return {
        "$schema": DRAFT,
        "title": f"A graph of problem {tables.problem}" if tables else "A graph of mlo",
        **graph,
        "if": {"not": {"required": ["extends"]}},
        "then": _complete(named),
        "$defs": writer.defs,
    }


def _complete(named: Mapping[str, Table | None]) -> Schema:
    """What a graph that extends no other must hold besides."""
    # A graph is named after its file unless it says otherwise.
    needed = [key for key, info in Spec.model_fields.items() if info.is_required() and key != "name"]
    frozen = {"properties": {"optimizer": {"const": NONE}}, "required": ["optimizer"]}
    level: Schema = {
        "if": frozen,
        "then": {"required": list(CHOICES[:1])},
        "else": {"required": list(CHOICES[:3])},
        "properties": {key: _with_options(table) for key, table in named.items() if table},
    }
    return {"required": needed, "properties": {"levels": {"additionalProperties": level}}}


def _with_options(table: Table) -> Schema:
    needed = {name: _required(target) for name, target in table.items()}
    needed = {name: keys for name, keys in needed.items() if keys}
    return {
        "not": {"enum": sorted(needed)},
        "properties": {name: {"type": "object", "required": keys} for name, keys in sorted(needed.items())},
    }


def _required(target: Callable[..., Any]) -> list[str]:
    return [name for name, each in parameters(target).items() if each.default is inspect.Parameter.empty]


@final
@dataclass(frozen=True)
class _Writer:
    """Annotations to schemas. What refers to itself, or is long, stands once under `$defs`.

    - `named`: by the keys of a level that are choices, what can be chosen; None where only a problem knows.
    """

    named: Mapping[str, Table | None]
    defs: dict[str, Schema] = field(default_factory=dict[str, Schema])

    def model(self, kind: type[BaseModel]) -> Schema:
        """The mapping that becomes a `kind`."""
        texts, properties = about(kind), dict[str, Schema]()
        for name, info in kind.model_fields.items():
            if any(isinstance(item, Keyed) for item in info.metadata):
                continue
            key = info.alias or name
            if kind is LevelSpec and key in CHOICES:
                written = self.choice(self.named.get(key), scheduled=key == "objective")
                written["anyOf"] += [_NOTHING] if key == "optimizer" else []
            else:
                written = self.annotated(info.annotation, info.metadata)
            required = info.is_required() and kind is not Spec
            default = None if info.is_required() else info.default
            properties[key] = _described(written if required else _nullable(written), texts.get(name, ""), default)
        needed = [info.alias or name for name, info in kind.model_fields.items() if info.is_required()]
        whole = kind in (Spec, LevelSpec)  # whose missing keys may stand in the file they extend
        kinds = "object" if kind is Spec else ["object", "null"]
        found: Schema = {"type": kinds, "properties": properties, "additionalProperties": False}
        return _described(found | ({"required": needed} if needed and not whole else {}), summary(kind))

    def settings(self, kind: Any) -> Schema:
        """`data`: a problem's own model, or whatever else can be made of keywords."""
        if not (inspect.isclass(kind) and issubclass(kind, BaseModel)):
            return self.options(kind)
        found = self.model(kind)
        found.pop("required", None)  # may stand in a file that is extended
        return found | ({"additionalProperties": True} if kind.model_config.get("extra") == "allow" else {})

    def options(self, target: Callable[..., Any], *, scheduled: bool = False) -> Schema:
        """The mapping of options of a function or class; `scheduled`: a number may change with time."""
        texts, properties = about(target), dict[str, Schema]()
        for name, parameter in parameters(target).items():
            written = self.of(parameter.annotation)
            if scheduled and is_number(parameter.annotation):
                written = _any_of([written, self.of(self.schedule)])
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            properties[name] = _described(_nullable(written), texts.get(name, ""), default)
        more = inspect.signature(target).parameters.values()
        takes_more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in more)
        return {"type": ["object", "null"], "properties": properties, "additionalProperties": takes_more}

    @property
    def schedule(self) -> Any:
        """The interface of schedules, which may stand for any number of an objective; optimizers say so themselves."""
        return importlib.import_module("mlo.schedule").AbstractSchedule

    def choice(self, table: Table | None, *, scheduled: bool = False) -> Schema:
        """`name` or `{name: {option: value}}`."""
        one: Schema = {"type": "object", "minProperties": 1, "maxProperties": 1}
        if table is None:
            return {"anyOf": [{"type": "string"}, one | {"additionalProperties": {"type": ["object", "null"]}}]}
        names: list[Schema] = [_described({"const": name}, summary(table[name])) for name in sorted(table)]
        options = {
            name: _described(self.options(target, scheduled=scheduled), summary(target))
            for name, target in sorted(table.items())
        }
        return {"anyOf": [*names, one | {"properties": options, "additionalProperties": False}]}

    def of(self, annotation: Any) -> Schema:
        """What may be written for a value of this annotation."""
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return self.annotated(arguments[0], arguments[1:])
        if annotation in _SCALARS:
            return {"type": _SCALARS[annotation]}
        if annotation in (None, type(None)):
            return _NULL
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, types.UnionType):
            beside = any(inspect.isclass(member) and member.__name__.startswith("Abstract") for member in arguments)
            return _any_of([self.beside(member) if beside else self.of(member) for member in arguments])
        kind = origin or annotation
        if annotation is Choice:
            return self.choice(None)
        if is_built(kind):
            return self.built(kind)
        if inspect.isclass(kind):
            return self.container(kind, arguments)
        return {}

    def annotated(self, annotation: Any, metadata: Sequence[Any]) -> Schema:
        """With the bounds that stand in `Annotated[…]`, and the other form a value may be written in."""
        written = self.of(annotation)
        for item in metadata:
            match item:
                case FieldInfo():
                    written = {**written, **self.annotated(Any, item.metadata)}
                case Also():
                    written = _any_of([self.of(item.annotation), written])
                case Ge() | Gt() | Le() | Lt():
                    attribute, keyword = _BOUNDS[type(item)]
                    written = {**written, keyword: getattr(item, attribute)}
                case MinLen():
                    written = {**written, "minLength" if annotation is str else "minItems": item.min_length}
                case Form():
                    written = {**written, "title": item.words}
                case _:
                    pattern = getattr(item, "pattern", None)
                    written = {**written, "pattern": pattern} if pattern else written
        return written

    def built(self, kind: type[Any]) -> Schema:
        """What is made from `name` or `{name: {option: value}}`; a class that stands alone, from its options too."""
        name = snake(kind.__name__.removeprefix("Abstract"))
        if name not in self.defs:
            self.defs[name] = {}  # a schedule may hold schedules
            table = leaves(kind)
            written = self.choice(table)
            alone = [self.options(target) for target in table.values()] if len(table) == 1 else []
            self.defs[name] |= _nullable(_any_of([written, *alone]))
        return {"$ref": f"#/$defs/{name}"}

    def beside(self, kind: Any) -> Schema:
        """A member of a union with an interface: a class that is none is written by its options there."""
        if not is_built(kind) or kind.__name__.startswith("Abstract"):
            return self.of(kind)
        name = snake(kind.__name__)
        if name not in self.defs:
            self.defs[name] = _described(self.options(kind) | {"required": _required(kind)}, summary(kind))
        return {"$ref": f"#/$defs/{name}"}

    def container(self, kind: type, arguments: Sequence[Any]) -> Schema:
        """Models, mappings, lists."""
        if issubclass(kind, BaseModel):
            if kind.__name__ not in self.defs:
                self.defs[kind.__name__] = self.model(kind)
            return {"$ref": f"#/$defs/{kind.__name__}"}
        if issubclass(kind, Mapping):
            values = _nullable(self.of(arguments[1])) if len(arguments) == 2 else {}
            return {"type": "object", **({"additionalProperties": values} if values else {})}
        if issubclass(kind, tuple) and arguments and arguments[-1] is not Ellipsis:
            members, size = [self.of(each) for each in arguments], len(arguments)
            return {"type": "array", "prefixItems": members, "minItems": size, "maxItems": size}
        if issubclass(kind, tuple | list | AbstractSet | Sequence):
            return {"type": "array", **({"items": self.of(arguments[0])} if arguments else {})}
        return {}


def _any_of(members: Sequence[Schema]) -> Schema:
    flat = [inner for each in members for inner in (each["anyOf"] if list(each) == ["anyOf"] else [each])]
    if any("$ref" in each for each in flat) and len(flat) == 2 and _NULL in flat:
        flat.remove(_NULL)  # all that is referred to may be null
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _nullable(written: Schema) -> Schema:
    """`null` removes what a graph that is extended says. A type of its own, where possible, keeps messages short."""
    kinds, members = written.get("type"), written.get("anyOf")
    if not written or "$ref" in written or (isinstance(kinds, list) and "null" in kinds):
        return written
    if members is not None:
        return written if _NULL in members else {**written, "anyOf": [*members, _NULL]}
    wider: Schema = {} if kinds is None else {"type": [kinds, "null"]}
    return {**written, **wider, **({"enum": [*written["enum"], None]} if "enum" in written else {})}


def _described(written: Schema, text: str, default: Any = None) -> Schema:
    described = {**written, **({"description": text} if text else {})}
    plain = thaw(default)
    simple = isinstance(plain, bool | int | float | str) or (isinstance(plain, list) and plain)
    return {**described, "default": plain} if simple else described
