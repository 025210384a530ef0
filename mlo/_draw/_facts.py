"""What every picture says of a level, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, final

from mlo import _structure
from mlo.optimizer import options_read
from mlo.spec import Choice, Epochs, LevelSpec, Spec, optimizer_of

Kind: TypeAlias = Literal["given", "subject_to", "against"]
MEANING: Mapping[Kind, str] = {
    "given": "reads, held fixed",
    "subject_to": "differentiates through",
    "against": "game: read as the iteration began",
}


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """One level: what it owns and minimises, when and how it steps, how it is pulled back; None where it does not.

    - `middle`, `nested`: of a level that others are subject to and that is subject to others, what it follows, and how that
      is differentiated.
    """

    name: str
    owns: str
    minimises: str | None
    batch: str | None
    timing: str | None
    optimizer: str | None
    reads: str | None
    method: str | None
    middle: str | None
    nested: str | None
    start: str | None
    holds: tuple[str, ...]

    @property
    def frozen(self) -> bool:
        """Whether it is a constant."""
        return self.optimizer is None


@final
@dataclass(frozen=True)
class Arrow:
    """`reader` reads `read`; players of a game are one arrow, in the order of their names."""

    read: str
    reader: str
    kind: Kind


def facts(spec: Spec) -> list[Facts]:
    """All levels, in run order."""
    return [_facts(spec.levels[name], spec) for name in _structure.run_order(declared(spec).values())]


def arrows(spec: Spec) -> list[Arrow]:
    """All reads, in the order of the levels that read."""
    found: list[Arrow] = []
    for name in _structure.run_order(declared(spec).values()):
        level = spec.levels[name]
        found += [Arrow(read, name, "given") for read in level.given]
        found += [Arrow(read, name, "subject_to") for read in level.subject_to]
        players = [read for read in level.against if name < read or name not in spec.levels[read].against]
        found += [Arrow(name, read, "against") for read in players]
    return found


def declared(spec: Spec) -> Mapping[str, _structure.Declared]:
    """The levels as `_structure` sees them. A duration in epochs is no number yet, and order and arrows ask for none."""
    return cast("Mapping[str, _structure.Declared]", spec.levels)


def choice(value: Choice | None) -> str:
    """`sgd {learning_rate: 0.05, momentum: 0.9}`."""
    if value is None:
        return ""
    return f"{value.name} {_flow(value.options)}" if value.options else value.name


def duration(value: int | Epochs) -> str:
    """`1,000 iterations`, `25 epochs`, `30 epochs of train`."""
    number, unit = (value.epochs, "epoch") if isinstance(value, Epochs) else (value, "iteration")
    of = f" of {value.of}" if isinstance(value, Epochs) and value.of else ""
    return f"{number:,} {unit}{'' if number == 1 else 's'}{of}"


def method(level: LevelSpec) -> str:
    """How the level is pulled back: `finite_difference {radius: 0.01}`."""
    return choice(level.hypergradient) or "unroll"


def middle(spec: Spec, name: str) -> str | None:
    """What a level in the middle of a nest follows, and how that is differentiated; None of other levels."""
    known = declared(spec)
    if name not in _structure.nested(known):
        return None
    below = ", ".join(
        f"{lower} ({method(spec.levels[lower])})" for lower in _structure.response_order(known[name], known)
    )
    return f"follows its total gradient through {below}; differentiated: {spec.levels[name].nested}"


def _facts(level: LevelSpec, spec: Spec) -> Facts:
    pulled = any(level.name in upper.subject_to and not upper.frozen for upper in spec.levels.values())
    batch = (level.batch,) if isinstance(level.batch, str) else level.batch
    start = spec.starts.get(level.name)
    known = declared(spec)
    upper = bool(_structure.differentiated(known[level.name], known))
    paths = _structure.held_fixed(known[level.name], known) if upper else ()
    return Facts(
        name=level.name,
        owns=choice(level.variables),
        minimises=choice(level.objective) or None,
        batch=", ".join(batch) if batch else None,
        timing=None if level.frozen else _timing(level),
        optimizer=None if level.frozen else choice(level.optimizer),
        reads=", ".join(_reads(level)) or None,
        method=None if level.frozen or not pulled else method(level),
        middle=middle(spec, level.name),
        nested=level.nested if level.name in _structure.nested(known) else None,
        start=start.name if start is not None else None,
        holds=tuple(" → ".join(path) for path in paths),
    )


def _reads(level: LevelSpec) -> list[str]:
    """`learning_rate ← rates.learning_rate`: what its optimizer reads from other levels."""
    made = optimizer_of(level.optimizer)
    return list(dict.fromkeys(f"{path[-1]} ← {read}" for path, read in options_read(made))) if made else []


def _timing(level: LevelSpec) -> str:
    every = "every iteration" if level.every == 1 else f"every {duration(level.every)}"
    steps = "1 step" if level.steps == 1 else f"{level.steps} steps"
    late = [] if level.warm_up == 0 else [f"after {duration(level.warm_up)}"]
    ahead = ["with lookahead"] if level.lookahead else []
    return ", ".join([every, *late, steps, *ahead])


def _flow(value: Any) -> str:
    match value:
        case Mapping():
            pairs = cast("Mapping[str, Any]", value)
            return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in pairs.items()) + "}"
        case tuple() | list():
            return "[" + ", ".join(map(_flow, cast("Sequence[Any]", value))) + "]"
        case bool():
            return str(value).lower()
        case _:
            return str(value)
