"""The optimizers and hypergradient methods there are, by their names in YAML; imported without torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from mlo._errors import SpecError
from mlo.spec._faults import Broken, Fault, Line, expected, fail, unknown
from mlo.spec._levels import NONE, Choice
from mlo.spec._names import leaves
from mlo.spec._nodes import Place, fold, plain
from mlo.spec._options import choose, split_choice
from mlo.spec._yaml import read_value

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


def written_as(key: str, value: Any) -> Any:
    """The optimizer or method that a level writes, or None: there is none, or something is wrong with it."""
    name, _ = split_choice(value)
    return None if name is None or fold(name) not in map(fold, candidates(key)) else _chosen(key, value)[0]


def method_from(text: str, option: str) -> AbstractHypergradient:
    """The method that `text` is in YAML: `unroll`, `{neumann: {terms: 5, step_size: 1e-3}}`.

    Raises `SpecError` whose lines begin with `option`, the option of the command line it was given by.
    """
    place = Place(f"<{option} {text}>")
    try:
        node, lines = read_value(text, place)
    except Broken as broken:
        fail([broken.line])
    made, faults = choose(candidates("hypergradient"), plain(node), _INTERFACES["hypergradient"][2])
    lines = [*lines, *(Line(place, fault.message, fault.path) for fault in faults)]
    if lines or made is None:
        fail(lines)
    return made


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
    return _chosen(key, value)[1]


def candidates(key: str) -> Mapping[str, type[Any]]:
    """What the `optimizer` or `hypergradient` of a level can be, by name; `none` is no class."""
    module, interface, _ = _INTERFACES[key]
    return leaves(getattr(importlib.import_module(module), interface))


def _chosen(key: str, value: Any) -> tuple[Any, list[Fault]]:
    """What the choice makes; options of parameter groups are checked as those of the optimizer, where they were written."""
    name, options = split_choice(value)
    groups = options.get("groups") if key == "optimizer" else None
    if name is None or not isinstance(groups, Mapping):
        return choose(candidates(key), value, _INTERFACES[key][2])
    common = {option: each for option, each in options.items() if option not in ("clip_norm", "clip_value", "groups")}
    rest = {option: each for option, each in options.items() if option != "groups"}
    made, faults = choose(candidates(key), {name: rest}, _INTERFACES[key][2])
    found: dict[str, dict[str, Any]] = {}
    for pattern, changes in cast("Mapping[str, Any]", groups).items():
        here = (name, "groups", pattern)
        if not isinstance(changes, Mapping):
            faults.append(Fault(here, f"{expected('a mapping of options', changes)}."))
            continue
        changed = cast("Mapping[str, Any]", changes)
        member, wrong = choose(candidates(key), {name: {**common, **changed}}, _INTERFACES[key][2])
        own = [fault for fault in wrong if len(fault.path) > 1 and fault.path[1] in changed]
        faults += [fault._replace(path=(*here, *fault.path[1:])) for fault in own]
        if wrong and not own and not faults:
            faults += [fault._replace(path=here) for fault in wrong]  # of several options together
        for option in set(changed) & {"clip_norm", "clip_value", "groups"}:
            faults.append(Fault((*here, option), "the gradient is clipped as a whole, not by group.", on_key=True))
        found[pattern] = {option: getattr(member, option, None) for option in changed}
    return (None, faults) if made is None or faults else (replace(made, groups=found), [])


def _names(key: str) -> list[str]:
    return [*candidates(key), *([NONE] if key == "optimizer" else [])]


def _made(key: str, choice: Choice | None) -> Any:
    if choice is None or (key == "optimizer" and choice.name == NONE):
        return None
    made, faults = _chosen(key, {choice.name: choice.options})
    if faults:
        raise SpecError("\n".join(f"{key}: {fault.message}" for fault in faults))
    return made
