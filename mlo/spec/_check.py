"""What no single field shows: names of levels, methods and problems, and the structure of the graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from mlo import _reading, _structure
from mlo._errors import Mistake, nearest
from mlo.spec._faults import Fault, known, unknown
from mlo.spec._forms import faults_of, written_keys
from mlo.spec._levels import NONE, Epochs, LevelSpec
from mlo.spec._merge import is_null
from mlo.spec._models import Spec
from mlo.spec._nodes import CHOICES, KeyPath, Table, fold, locate
from mlo.spec._options import split_choice
from mlo.spec._problems import problem_named, problem_names
from mlo.spec._registry import faults_in, written_as

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_DIFFERENCES = (
    "differences of gradients drown in the rounding of dtype bfloat16 (13 % off on a network where float32 is off by 3e-5, "
    "at radius 0.01); take unroll or first_order, or dtype float32."
)
_TOO_COARSE = {  # by folded name, methods and their pieces that bfloat16 makes meaningless
    "finitedifference": _DIFFERENCES,
    "centraldifference": _DIFFERENCES,
    "conjugategradient": "its directions are not conjugate where dtype bfloat16 leaves Hessian products 3 digits.",
}
_CHOSEN = ("optimizer", "hypergradient")
_STRUCTURE = ("given", "subject_to", "against", "steps", "every", "warm_up", "lookahead", "nested")


def faults(tree: Table, data: Mapping[str, Any], imports: Sequence[str]) -> list[Fault]:
    """Everything wrong with a composed graph but for the graphs it starts from."""
    found: list[Fault] = []
    levels = _levels(data)
    try:
        Spec.model_validate(with_names(data))
    except ValidationError as error:
        found += faults_of(error, Spec, data)
    found += _problem(data.get("problem"), imports)
    for name, level in levels.items():
        found += _level(name, level, tree, levels)
        if data.get("dtype") == "bfloat16" and isinstance(level, Mapping):
            method = cast("Mapping[str, Any]", level).get("hypergradient")
            found += [fault.below(("levels", name, "hypergradient")) for fault in _too_coarse(method)]
    found += _evaluation(data.get("evaluation"), levels)
    if data.get("levels") == {}:
        found.append(Fault(("levels",), "a graph needs at least one level."))
    return found + _structural(levels)


def with_names(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """`data` as `Spec` validates it: a level's key is its name."""
    if not isinstance(data.get("levels"), Mapping):
        return data
    return {**data, "levels": {name: _named(name, level) for name, level in _levels(data).items()}}


def _named(name: str, level: object) -> object:
    return {**cast("Mapping[str, Any]", level), "name": name} if isinstance(level, Mapping) else level


def _levels(data: Mapping[str, Any]) -> Mapping[str, Any]:
    levels = data.get("levels")
    return cast("Mapping[str, Any]", levels) if isinstance(levels, Mapping) else {}


def _problem(name: object, imports: Sequence[str]) -> list[Fault]:
    if not isinstance(name, str) or problem_named(name, imports) is not None:
        return []
    return [Fault(("problem",), unknown("problem", name, problem_names(imports)) + _own(name))]


def _own(name: str) -> str:
    """How to name a problem that lies where the command was started."""
    there = name.isidentifier() and Path(f"{name}.py").is_file()
    return f"\n  For a module of your own: --import {name}" if there else ""


def _level(name: str, level: object, tree: Table, levels: Mapping[str, Any]) -> list[Fault]:
    path = ("levels", name)
    if not _NAME.fullmatch(name):
        return [
            Fault(path, f"a level's name is a word of a-z, 0-9 and _ that starts with no digit, got '{name}'.", True)
        ]
    if not isinstance(level, Mapping):
        return []
    written = cast("Mapping[str, Any]", level)
    found = [fault.below((*path, key)) for key in _CHOSEN for fault in faults_in(key, written.get(key))]
    if "name" in written:
        message = "a level's name is its key, not a key inside it."
        found.append(Fault((*path, "name"), message, on_key=True))
    optimizer, _ = split_choice(written.get("optimizer"))
    frozen = optimizer is not None and fold(optimizer) == NONE
    missing = [key for key in CHOICES[: 1 if frozen else 3] if key not in written]
    others = [each for each in levels if each != name]
    if missing and not locate(tree, path, key=True).line:
        return [Fault(path, unknown("level", name, others), on_key=True)]
    need = "a frozen level needs variables" if frozen else "a level needs variables, an objective and an optimizer"
    hint = "" if frozen or "optimizer" not in missing else " (`optimizer: none` makes it a constant)"
    return found + [Fault(path, f"'{key}' is missing; {need}{hint}.", on_key=True) for key in missing]


def _too_coarse(method: object) -> list[Fault]:
    """What of a method, or of the inverse and cross product it is made of, does not survive bfloat16."""
    name, options = split_choice(method)
    if name is None:
        return []
    reason = _TOO_COARSE.get(fold(name))
    inner = [fault.below((name, key)) for key, option in options.items() for fault in _too_coarse(option)]
    return inner + ([Fault((), reason)] if reason else [])


def _evaluation(evaluation: object, levels: Mapping[str, Any]) -> list[Fault]:
    model: Any = cast("Mapping[str, Any]", evaluation).get("model") if isinstance(evaluation, Mapping) else None
    names: Sequence[Any] = (model,) if isinstance(model, str) else model if isinstance(model, tuple) else ()
    path = ("evaluation", "model")
    return [
        Fault(path if isinstance(model, str) else (*path, position), unknown("level", name, levels))
        for position, name in enumerate(names)
        if isinstance(name, str) and levels and name not in levels
    ]


def _structural(levels: Mapping[str, Any]) -> list[Fault]:
    """The mistakes that `mlo.Graph` would find, if what they depend on could be read."""
    specs: list[LevelSpec] = []
    for name, level in levels.items():
        if not isinstance(level, Mapping):
            return []
        written = {key: value for key, value in cast("Mapping[str, Any]", level).items() if key in _STRUCTURE}
        optimizer, _ = split_choice(cast("Mapping[str, Any]", level).get("optimizer"))
        try:
            spec = LevelSpec.model_validate(
                {"name": name, **written, "optimizer": fold(optimizer or "unknown"), **_method(level)}
            )
        except ValidationError:
            return []  # already reported, field by field
        specs.append(spec)
    if any(isinstance(time, Epochs) for spec in specs for time in (spec.every, spec.warm_up)):
        # How many iterations an epoch has is known once the problem is built; the arrows can be judged now.
        specs = [spec.model_copy(update={"every": 1, "warm_up": 0}) for spec in specs]
    declared = cast("Sequence[_structure.Declared]", specs)
    found = [_placed(mistake, levels) for mistake in _structure.mistakes(declared)]
    return [*found, *_reading_faults({level.name: level for level in declared}, levels, complete=not found)]


def _reading_faults(
    declared: Mapping[str, _structure.Declared], levels: Mapping[str, Any], *, complete: bool
) -> Iterator[Fault]:
    """What is wrong with options that optimizers read from levels; if `complete`, arrows can be followed."""
    chosen = {key: {name: written_as(key, level.get(key)) for name, level in levels.items()} for key in _CHOSEN}
    optimizers, methods = ({name: each for name, each in chosen[key].items() if each} for key in _CHOSEN)
    for name, optimizer in optimizers.items():
        kind, _ = split_choice(levels[name]["optimizer"])
        for path, message in _reading.unlisted(declared[name], optimizer, levels):
            yield Fault(("levels", name, "optimizer", kind or "", *path), f"{message}.")
    if complete:
        for name, reason in _reading.left_out(declared, optimizers, methods).items():
            yield Fault(("levels", name, "hypergradient"), f"{reason}.")


def _method(level: Any) -> dict[str, str]:
    """The name of a level's method, which may decide what may depend on what."""
    name, _ = split_choice(cast("Mapping[str, Any]", level).get("hypergradient"))
    return {} if name is None else {"hypergradient": name}


def _placed(mistake: Mistake, levels: Mapping[str, Any]) -> Fault:
    """A mistake of structure at the listed name it speaks of, or else at its key."""
    path: KeyPath = ("levels", mistake.level, mistake.key)
    listed: Any = levels[mistake.level].get(mistake.key)
    spoken_of = re.search(r"'([^']+)'", mistake.message)
    if spoken_of is not None and isinstance(listed, tuple) and spoken_of[1] in listed:
        path = (*path, cast("tuple[str, ...]", listed).index(spoken_of[1]))
    return Fault(path, mistake.message if mistake.message.endswith(".") else f"{mistake.message}.")


def stray_nulls(tree: Table) -> list[Fault]:
    """Keys that are `null` and that nothing could have been removed from: a misspelt removal."""
    found = _stray(tree, written_keys(Spec), ())
    levels = tree.get("levels")
    for name, entry in levels.entries.items() if isinstance(levels, Table) else ():
        others = [other for other in levels.entries if other != name] if isinstance(levels, Table) else []
        if isinstance(entry.node, Table):
            found += _stray(entry.node, written_keys(LevelSpec), ("levels", name))
        elif is_null(entry.node):
            found.append(Fault(("levels", name), f"nothing to remove: {unknown('level', name, others)}", on_key=True))
    return found


def _stray(table: Table, names: Sequence[str], path: KeyPath) -> list[Fault]:
    strays = [key for key, entry in table.entries.items() if is_null(entry.node) and key not in names]
    return [Fault((*path, key), f"unknown key.{nearest(key, names)}{known(names)}", on_key=True) for key in strays]
