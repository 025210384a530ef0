"""The optimizers and hypergradient methods there are, by their names in YAML; imported without torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlo._errors import SpecError
from mlo.spec._faults import Fault, unknown
from mlo.spec._levels import NONE, Choice
from mlo.spec._names import leaves
from mlo.spec._nodes import fold
from mlo.spec._options import choose, split_choice

if TYPE_CHECKING:
    from mlo.hypergradient import AbstractHypergradient
    from mlo.optimizer import AbstractOptimizer

_INTERFACES = {
    "optimizer": ("mlo.optimizer", "AbstractOptimizer", "optimizer"),
    "hypergradient": ("mlo.hypergradient", "AbstractHypergradient", "method"),
}


def optimizer_of(choice: Choice | None) -> AbstractOptimizer | None:
    """The optimizer that `choice` names; None for `none`, a constant. Raises `SpecError` for what `load` would refuse."""
    return _made("optimizer", choice)


def hypergradient_of(choice: Choice | None) -> AbstractHypergradient | None:
    """The method that `choice` names, or None where a level names none. Raises `SpecError` as `optimizer_of` does."""
    return _made("hypergradient", choice)


def canonical(key: str, name: str) -> str:
    """The published spelling of a name, or the name itself where nothing has it."""
    return {fold(known): known for known in _names(key)}.get(fold(name), name)


def faults_in(key: str, value: Any) -> list[Fault]:
    """What is wrong with the `optimizer` or `hypergradient` of a level as written; paths start at the choice."""
    name, options = split_choice(value)
    if name is None:
        return []  # the level's model says so
    if key == "optimizer" and fold(name) == NONE:
        return [Fault((name,), "a level without an optimizer has no options for it.", on_key=True)] if options else []
    if fold(name) not in map(fold, _names(key)):
        return [Fault((), unknown(_INTERFACES[key][2], name, _names(key)))]
    return choose(_classes(key), value, _INTERFACES[key][2])[1]


def _classes(key: str) -> Mapping[str, type[Any]]:
    module, interface, _ = _INTERFACES[key]
    return leaves(getattr(importlib.import_module(module), interface))


def _names(key: str) -> list[str]:
    return [*_classes(key), *([NONE] if key == "optimizer" else [])]


def _made(key: str, choice: Choice | None) -> Any:
    if choice is None or (key == "optimizer" and choice.name == NONE):
        return None
    made, faults = choose(_classes(key), {choice.name: choice.options}, _INTERFACES[key][2])
    if faults:
        raise SpecError("\n".join(f"{key}: {fault.message}" for fault in faults))
    return made
