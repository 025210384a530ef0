"""Names as they are written in YAML, from the classes they stand for."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])")


def snake(name: str) -> str:
    """`FiniteDifference` → `finite_difference`, `SGD` → `sgd`, `RMSprop` → `rmsprop`."""
    return _WORD.sub("_", name).lower()


def spoken(kind: type) -> str:
    """What a kind of thing is called in a message: `AbstractSchedule` is a schedule."""
    name = snake(kind.__name__.removeprefix("Abstract")).replace("_", " ")
    return "method" if name == "hypergradient" else name


def is_built(kind: Any) -> bool:
    """Whether values of `kind` are made from `name` or `{name: {option: value}}`."""
    return inspect.isclass(kind) and (dataclasses.is_dataclass(kind) or kind.__name__.startswith("Abstract"))


def leaves(kind: type[T]) -> dict[str, type[T]]:
    """The public classes that are a `kind` and can be made, by their names in YAML.

    They are what the package of `kind` exports: the namespace is the registry. A class that is no interface is its own
    only leaf.
    """
    if not (kind.__name__.startswith("Abstract") or inspect.isabstract(kind)):
        return {snake(kind.__name__): kind}
    module = importlib.import_module(kind.__module__)
    parent = kind.__module__.rpartition(".")[0]
    package = (
        importlib.import_module(parent) if parent and kind.__module__.rpartition(".")[2].startswith("_") else module
    )
    return {snake(name): leaf for name, leaf in _public(package).items() if issubclass(leaf, kind) and _is_leaf(leaf)}


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: each for name, each in vars(module).items() if not name.startswith("_") and inspect.isclass(each)}


def _is_leaf(kind: type) -> bool:
    return not kind.__name__.startswith("Abstract") and not inspect.isabstract(kind)
