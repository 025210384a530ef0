"""A graph as a Mermaid flowchart, which Markdown viewers draw."""

from __future__ import annotations

from mlo._draw._facts import Facts, Kind, arrows, facts
from mlo.spec import Spec

_LINES: dict[Kind, str] = {"given": "-->", "subject_to": "==>", "against": "<-.->"}
_COLOURS: dict[Kind, str] = {
    "given": "stroke:#64748b",
    "subject_to": "stroke:#c2410c,stroke-width:3px",
    "against": "stroke:#7c3aed",
}


def mermaid(spec: Spec) -> str:
    """Upper levels on top. An arrow leads from the level that is read to its reader, thick where it is differentiated."""
    lines = ["flowchart BT"]
    for level in facts(spec):
        lines.append(f'  level_{level.name}["{_label(level)}"]{":::constant" if level.frozen else ""}')
    found = arrows(spec)
    for arrow in found:
        label = arrow.kind.replace("_", " ")
        lines.append(f"  level_{arrow.read} {_LINES[arrow.kind]}|{label}| level_{arrow.reader}")
    for kind, style in _COLOURS.items():
        numbers = [str(number) for number, arrow in enumerate(found) if arrow.kind == kind]
        lines += [f"  linkStyle {','.join(numbers)} {style}"] if numbers else []
    return "\n".join([*lines, "  classDef constant stroke-dasharray: 4 3"])


def _label(level: Facts) -> str:
    parts = [f"<b>{level.name}</b>", _escaped(level.owns)]
    parts += [] if level.minimises is None else [f"min {_escaped(level.minimises)}"]
    parts += ["constant"] if level.frozen else [_escaped(f"{level.timing} of {level.optimizer}")]
    parts += [] if level.method is None else [f"pulled back by {_escaped(level.method)}"]
    parts += [] if level.nested is None else [f"total gradient, differentiated: {level.nested}"]
    return "<br/>".join(parts)


def _escaped(text: str) -> str:
    for character in '#&"<>`':  # the first one is what the codes themselves are written with
        text = text.replace(character, f"#{ord(character)};")
    return text
