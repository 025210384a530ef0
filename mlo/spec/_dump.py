"""A spec written out again: as a file that loads to the same spec, and as the hash of what it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from mlo.spec._frozen import thaw
from mlo.spec._levels import Choice, LevelSpec
from mlo.spec._nodes import fold
from mlo.spec._yaml import Dumper

if TYPE_CHECKING:
    from mlo.spec._models import Spec

_NOT_NUMBERS = ("name", "checkpoint", "inherits", "start")


def to_yaml(spec: Spec) -> str:
    """See `Spec.to_yaml`. Values left at their default are written too, so that a later default changes nothing."""
    data = thaw(_written(spec))
    text: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return text


def spec_hash(spec: Spec) -> str:
    """See `Spec.hash`."""
    content = {key: value for key, value in _written(spec).items() if key not in _NOT_NUMBERS}
    if "evaluation" in content:
        content["evaluation"] = {key: value for key, value in content["evaluation"].items() if key != "pictures_at"}
    if not content["compile"]:
        del content["compile"]  # as before there was such a key
    content["levels"] = {
        name: {key: _folded(getattr(spec.levels[name], key), value) for key, value in level.items()}
        for name, level in content["levels"].items()
    }
    content["start"] = {level: start.hash for level, start in spec.starts.items()}
    text = json.dumps(_canonical(thaw(content)), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _written(value: Any) -> Any:
    """Models as the mappings a user writes, without what is empty."""
    match value:
        case Choice():
            return value.yaml()
        case BaseModel():
            fields = {info.alias or name: getattr(value, name) for name, info in type(value).model_fields.items()}
            if isinstance(value, LevelSpec):
                del fields["name"]  # a level's key says it
            kept = {key: _written(each) for key, each in fields.items() if each not in (None, (), {})}
            return kept["graph"] if list(kept) == ["graph"] else kept  # `start: {level: path}`
        case Mapping():
            items: Mapping[str, Any] = value
            return {key: _written(each) for key, each in items.items()}
        case tuple():
            members: tuple[Any, ...] = value
            return tuple(_written(each) for each in members)
        case _:
            return value


def _folded(choice: object, written: Any) -> Any:
    """Choices by their folded names: `Neumann` and `neumann` are the same."""
    return {fold(choice.name): choice.options} if isinstance(choice, Choice) else written


def _canonical(value: Any) -> Any:
    """1.0 as 1: YAML users write either."""
    match value:
        case dict():
            items: dict[str, Any] = value
            return {key: _canonical(each) for key, each in items.items()}
        case list():
            members: list[Any] = value
            return [_canonical(each) for each in members]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
