"""A graph in words, for a terminal."""

from __future__ import annotations

from mlo._draw._facts import Facts, duration, facts
from mlo.spec import Spec


def text(spec: Spec) -> str:
    """Levels in run order: what each reads and how, what it minimises, when and how it steps, what it holds fixed."""
    levels = facts(spec)
    count = "1 level" if len(levels) == 1 else f"{len(levels)} levels"
    lines = [
        f"{spec.name}: {count} of problem {spec.problem}, {duration(spec.iterations)}",
        f"run order: {' → '.join(level.name for level in levels)}",
    ]
    for level in levels:
        lines += ["", level.name, *(f"  {key:<22}  {value}" for key, value in _rows(level, spec))]
    return "\n".join(lines)


def _rows(level: Facts, spec: Spec) -> list[tuple[str, str]]:
    written = spec.levels[level.name]
    rows = [
        ("variables", level.owns),
        ("starts from", level.start),
        ("minimises", None if level.minimises is None else f"{level.minimises}{_on(level.batch)}"),
        ("← given", ", ".join(written.given)),
        ("⇐ subject to", ", ".join(written.subject_to)),
        ("↔ against", ", ".join(written.against)),
        ("moves", "never: a constant" if level.frozen else f"{level.timing} of {level.optimizer}"),
        ("its optimizer reads", level.reads),
        ("pulled back by", level.method),
        ("in the middle", level.middle),
        ("holds fixed", "; ".join(level.holds)),
        ("constraints", ", ".join(f"{name}: {kind}" for name, kind in written.constraints.items())),
        ("frozen parts", ", ".join(written.freeze)),
    ]
    return [(key, value) for key, value in rows if value]


def _on(batch: str | None) -> str:
    return "" if batch is None else f" on {batch}"
