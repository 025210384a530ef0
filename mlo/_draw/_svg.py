"""A graph as an SVG picture: boxes in layers, upper levels on top, arrows by kind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TypeAlias, final

from mlo._draw._facts import MEANING, Arrow, Facts, Kind, arrows, declared, duration, facts
from mlo._draw._layout import Layout, layout
from mlo._draw._layout import Place as Slot
from mlo.spec import Spec

Point: TypeAlias = tuple[float, float]

BOX, LANE, GAP = 264.0, 30.0, 40.0
_BETWEEN, _MARGIN, _TOP, _LEGEND = 74.0, 28.0, 64.0, 86.0
_LINE, _PADDING = 16.0, 10.0
_LEAST = 560.0  # what the legend takes
_LETTERS = 38  # of 11 pixels that fit a box in a wide font
_STYLES: dict[Kind, tuple[str, str]] = {  # colour; the rest of the stroke
    "given": ("#64748b", 'stroke-width="1.5"'),
    "subject_to": ("#c2410c", 'stroke-width="2.6"'),
    "against": ("#7c3aed", 'stroke-width="1.8" stroke-dasharray="6 4"'),
}
_HEAD = """<style>
text {{ font-family: Helvetica, Arial, sans-serif; font-size: 11px; fill: #334155 }}
.title {{ font-size: 16px; font-weight: bold; fill: #0f172a }} .name {{ font-size: 13px; font-weight: bold; fill: #0f172a }}
</style>
<defs>{markers}</defs>
<rect width="100%" height="100%" fill="#ffffff"/>"""


def svg(spec: Spec) -> str:
    """The whole picture, a file of its own."""
    levels, found = facts(spec), arrows(spec)
    plan = layout(declared(spec), box=BOX, lane=LANE, gap=GAP)
    frame = _Frame.of(plan, levels)
    width = max(plan.width, _LEAST) + 2 * _MARGIN
    height = frame.bottom + _LEGEND
    title = f"{spec.name}: {len(levels)} levels of problem {spec.problem}, {duration(spec.iterations)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{escape(title)}</title>",
        _HEAD.format(markers="".join(_marker(kind) for kind in _STYLES)),
        f'<text class="title" x="{_MARGIN}" y="34">{escape(title)}</text>',
        *frame.arrows(found),
        *(frame.level(level) for level in levels),
        *_legend(frame.bottom + 34, found),
        "</svg>",
    ]
    return "\n".join(parts)


@final
@dataclass(frozen=True)
class _Frame:
    """The layout in pixels: `tops` and `heights` of the layers, first to run first."""

    plan: Layout
    facts: Mapping[str, Facts]
    tops: Sequence[float]
    heights: Sequence[float]

    @classmethod
    def of(cls, plan: Layout, levels: Sequence[Facts]) -> _Frame:
        """Layers as high as their highest box, the last to run on top."""
        table = {level.name: level for level in levels}
        heights = [max([_height(table[one]) for one in row if isinstance(one, str)] or [40.0]) for row in plan.layers]
        tops, here = [0.0] * len(heights), _TOP
        for number in reversed(range(len(heights))):
            tops[number] = here
            here += heights[number] + _BETWEEN
        return cls(plan, table, tops, heights)

    @property
    def bottom(self) -> float:
        """Below the lowest box."""
        return self.tops[0] + self.heights[0]

    def box(self, name: str) -> tuple[float, float, float]:
        """Left, top and height of a level's box, in the middle of its layer."""
        number = self.layer(name)
        height = _height(self.facts[name])
        return self.x(name) - BOX / 2, self.tops[number] + (self.heights[number] - height) / 2, height

    def x(self, slot: Slot) -> float:
        """The middle of a slot."""
        return self.plan.x[slot] + _MARGIN + max(0.0, _LEAST - self.plan.width) / 2

    def layer(self, slot: Slot) -> int:
        """Which layer a slot is in."""
        return next(number for number, row in enumerate(self.plan.layers) if slot in row)

    def level(self, level: Facts) -> str:
        """One box."""
        left, top, height = self.box(level.name)
        dash = ' stroke-dasharray="5 4"' if level.frozen else ""
        lines = [
            f"<g><title>{escape(' · '.join([level.name, *_details(level)]))}</title>"
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{BOX}" height="{height}" rx="8" fill="#f8fafc" '
            f'stroke="#0f172a" stroke-width="1.2"{dash}/>',
            f'<text class="name" x="{left + 12:.1f}" y="{top + 21:.1f}">{escape(level.name)}</text>',
        ]
        for number, (line, indent) in enumerate(_lines(level)):
            y = top + 38 + number * _LINE
            lines.append(f'<text x="{left + 12 + indent:.1f}" y="{y:.1f}">{escape(line)}</text>')
        return "\n".join([*lines, "</g>"])

    def arrows(self, found: Sequence[Arrow]) -> list[str]:
        """All arrows; those of a pair of levels run beside each other."""
        ports = self._ports(found)
        return [self._arrow(arrow, ports) for arrow in found]

    def _arrow(self, arrow: Arrow, ports: Mapping[tuple[Arrow, str], float]) -> str:
        pair = (arrow.read, arrow.reader) if arrow.read < arrow.reader else (arrow.reader, arrow.read)
        path = list(self.plan.paths[pair])
        path = path if path[0] == arrow.read else path[::-1]
        same = self.layer(arrow.read) == self.layer(arrow.reader)
        curve = self._sideways(arrow) if same else self._upright(arrow, path, ports)
        colour, stroke = _STYLES[arrow.kind]
        ends = f' marker-start="url(#{arrow.kind})"' if arrow.kind == "against" else ""
        what = f"{arrow.reader} {arrow.kind.replace('_', ' ')} {arrow.read}"
        return (
            f'<path d="{curve}" fill="none" stroke="{colour}" {stroke} marker-end="url(#{arrow.kind})"{ends}>'
            f"<title>{escape(what)}</title></path>"
        )

    def _upright(self, arrow: Arrow, path: Sequence[Slot], ports: Mapping[tuple[Arrow, str], float]) -> str:
        """From box to box, upright where it leaves, passes a layer and arrives."""
        up = self.layer(path[-1]) > self.layer(path[0])
        beside = ports[arrow, "beside"]
        points: list[Point] = []
        for slot in path:
            if isinstance(slot, str):
                _, top, height = self.box(slot)
                leaves = slot == path[0]
                y = top if up == leaves else top + height
                tip = 0 if leaves and arrow.kind != "against" else 3  # it ends at the box
                y += tip if up != leaves else -tip
                points.append((self.x(slot) + ports[arrow, slot], y))
            else:
                number = self.layer(slot)
                edges = [(self.x(slot) + beside, self.tops[number] + part) for part in (0.0, self.heights[number])]
                points += edges[::-1] if up else edges
        curve = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (x, y), (to_x, to_y) in pairwise(points):
            bend = (to_y - y) * 0.5
            curve += f" C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}"
        return curve

    def _sideways(self, arrow: Arrow) -> str:
        """Between two boxes of a layer: straight if they are neighbours, below what stands between them otherwise."""
        left, right = sorted((arrow.read, arrow.reader), key=self.x)
        row = self.plan.layers[self.layer(left)]
        start, end = self.x(left) + BOX / 2 + 3, self.x(right) - BOX / 2 - 3
        y = self.tops[self.layer(left)] + self.heights[self.layer(left)] / 2
        if abs(row.index(left) - row.index(right)) == 1:
            curve = (start, end) if arrow.read == left else (end, start)
            return f"M{curve[0]:.1f} {y:.1f} L{curve[1]:.1f} {y:.1f}"
        low = self.tops[self.layer(left)] + self.heights[self.layer(left)] + 30
        one, two = (self.x(left), self.x(right)) if arrow.read == left else (self.x(right), self.x(left))
        edge = [sum(self.box(name)[1:]) + 3 for name in (arrow.read, arrow.reader)]
        return f"M{one:.1f} {edge[0]:.1f} C{one:.1f} {low:.1f} {two:.1f} {low:.1f} {two:.1f} {edge[1]:.1f}"

    def _ports(self, found: Sequence[Arrow]) -> dict[tuple[Arrow, str], float]:
        """How far from the middle of a box each arrow leaves or arrives, sorted by where it goes."""
        sides: dict[tuple[str, bool], list[tuple[float, Arrow]]] = {}
        ports: dict[tuple[Arrow, str], float] = {}
        pairs: dict[frozenset[str], int] = {}
        for arrow in found:
            ends = (arrow.read, arrow.reader)
            number = pairs[frozenset(ends)] = pairs.get(frozenset(ends), -1) + 1
            ports[arrow, "beside"] = -6.0 if number == 0 else 6.0
            if self.layer(arrow.read) == self.layer(arrow.reader):
                continue
            pair = (arrow.read, arrow.reader) if arrow.read < arrow.reader else (arrow.reader, arrow.read)
            path = list(self.plan.paths[pair])
            for name in ends:
                near = path[1] if path[0] == name else path[-2]
                above = self.layer(near) > self.layer(name)
                toward = self.x(near) + ports[arrow, "beside"] * 0.1
                sides.setdefault((name, above), []).append((toward, arrow))
        for (name, _), members in sides.items():
            members.sort(key=lambda member: member[0])
            distance = min(26.0, (BOX - 40) / len(members))
            for number, (_, arrow) in enumerate(members):
                ports[arrow, name] = (number - (len(members) - 1) / 2) * distance
        return ports


def _details(level: Facts) -> list[str]:
    lines = [f"variables {level.owns}"]
    lines += [] if level.start is None else [f"starts from {level.start}"]
    lines += [] if level.minimises is None else [f"min {level.minimises}"]
    lines += [] if level.batch is None else [f"on {level.batch}"]
    lines += ["constant"] if level.frozen else [f"{level.optimizer}", f"{level.timing}"]
    lines += [] if level.method is None else [f"pulled back by {level.method}"]
    lines += [] if level.nested is None else [f"total gradient, differentiated: {level.nested}"]
    return lines + [f"holds fixed {path}" for path in level.holds]


def _height(level: Facts) -> float:
    return 28 + len(_lines(level)) * _LINE + _PADDING


def _lines(level: Facts) -> list[tuple[str, float]]:
    """What stands in a box, each line with its indent."""
    together = [detail.replace(": ", ":\u00a0") for detail in _details(level)]  # a line breaks between options
    wrapped = (textwrap.wrap(detail, _LETTERS) for detail in together)
    return [(line, 14.0 if number else 0.0) for lines in wrapped for number, line in enumerate(lines)]


def _marker(kind: Kind) -> str:
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="9" markerHeight="9" '
        f'markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" '
        f'fill="{_STYLES[kind][0]}"/></marker>'
    )


def _legend(y: float, found: Sequence[Arrow]) -> list[str]:
    """The kinds of arrows there are, and what they mean."""
    used: list[Kind] = [kind for kind in _STYLES if any(arrow.kind == kind for arrow in found)]
    lines: list[str] = []
    for number, kind in enumerate(used):
        here = y + number * 18
        colour, stroke = _STYLES[kind]
        start = ' marker-start="url(#against)"' if kind == "against" else ""
        lines += [
            f'<path d="M{_MARGIN} {here - 4} L{_MARGIN + 44} {here - 4}" stroke="{colour}" {stroke} '
            f'marker-end="url(#{kind})"{start}/>',
            f'<text x="{_MARGIN + 56}" y="{here}">{kind.replace("_", " ")}: {escape(MEANING[kind])}'
            f"{'' if kind == 'against' else '; the arrow leads from what is read to its reader'}</text>",
        ]
    return lines
