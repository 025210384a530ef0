"""What is searched: the values that keys may take, as they would be written on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias, final

from mlo._errors import UserError
from mlo.spec._faults import Broken
from mlo.spec._nodes import Place, fold, plain
from mlo.spec._yaml import read_value

MOST = 10_000
"""Values of a key, and trials of a search."""
_FORMS = "0.1:1.0:0.1 (first, last and step), log:1e-4:1e-1, or a list such as sgd,adam"
_NUMBER = re.compile(r"[-+]?(\d{1,100}(\.\d{0,100})?|\.\d{1,100})([eE][-+]?\d{1,3})?")
_WHOLE = re.compile(r"[-+]?\d+")
_DIGITS = 4
"""Of a value that is drawn from a continuous range: what is shown is what is run."""


@final
@dataclass(frozen=True)
class Choices:
    """A key and a list of values for it. `ordered`: they are numbers at equal distances."""

    key: str
    texts: tuple[str, ...]
    ordered: bool = False


@final
@dataclass(frozen=True)
class Logarithmic:
    """A key and a range 0 < low < high, of which every power of ten is as likely as any other."""

    key: str
    low: float
    high: float

    def text(self, value: float) -> str:
        """`value` to four digits, inside the range."""
        return repr(min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high))


Dimension: TypeAlias = Choices | Logarithmic
Space: TypeAlias = tuple[Dimension, ...]

Point: TypeAlias = tuple[str, ...]
"""A trial's values: `key=value` for each dimension."""


def space_of(overs: Sequence[str], changes: Sequence[str] = ()) -> Space:
    """`KEY=VALUES` of every --over. Raises one `UserError` with all that is wrong with them.

    - `changes`: `key=value` that hold for all trials, which may not name the same keys.
    """
    found: list[Dimension] = []
    mistakes: list[str] = []
    taken = {fold(change.partition("=")[0].strip()): change for change in changes}
    for over in overs:
        key, sign, values = (part.strip() for part in over.partition("="))
        try:
            if not (key and sign and values):
                raise UserError(f"expected KEY=VALUES, the values as {_FORMS}")
            if fold(key) == "seed":
                raise UserError("the seeds of a search are those of --seeds")
            if fold(key) in taken:
                raise UserError(f"the same key as in {taken[fold(key)]}")
            taken[fold(key)] = f"--over {over}"
            found.append(_dimension(key, values))
        except UserError as error:
            mistakes.append(f"--over {over}: {error}")
    if not overs:
        mistakes.append(f"nothing to search: --over KEY=VALUES, the values as {_FORMS}")
    if mistakes:
        raise UserError("\n".join(mistakes))
    size = size_of(tuple(found))
    if size is not None and size > MOST and len(found) > 1:
        raise UserError(f"--over: {size:,} combinations, more than {MOST:,}")
    return tuple(found)


def size_of(space: Space) -> int | None:
    """How many points there are; None for a continuous range."""
    counts = [len(each.texts) for each in space if isinstance(each, Choices)]
    return math.prod(counts) if len(counts) == len(space) else None


def corners(space: Space) -> Iterator[Point]:
    """Points in which every value of a list, and both ends of a range, occur."""
    ends = [_shown(each) for each in space]
    for number, texts in enumerate(ends):
        for text in texts:
            chosen = [text if which == number else ends[which][0] for which in range(len(space))]
            yield tuple(f"{each.key}={value}" for each, value in zip(space, chosen, strict=True))


def heads(space: Space) -> list[str]:
    """The keys by as few of their last parts as tell them apart."""
    keys = [each.key.split(".") for each in space]

    def short(key: list[str]) -> str:
        ends = (key[-count:] for count in range(1, len(key) + 1))
        return ".".join(next(end for end in ends if sum(other[-len(end) :] == end for other in keys) == 1))

    return [short(key) for key in keys]


def _shown(dimension: Dimension) -> tuple[str, ...]:
    if isinstance(dimension, Logarithmic):
        return dimension.text(dimension.low), dimension.text(dimension.high)
    texts = dimension.texts
    return (texts[0], texts[-1]) if dimension.ordered and len(texts) > 1 else texts


def _dimension(key: str, values: str) -> Dimension:
    parts = [part.strip() for part in values.split(":")]
    if parts[0] == "log":
        return _logarithmic(key, parts[1:])
    if len(parts) > 1 and _NUMBER.fullmatch(parts[0]):
        return Choices(key, _steps(parts), ordered=True)
    texts = _items(values)
    if not all(texts):
        raise UserError("a value is missing between two commas")
    known: dict[str, str] = {}
    for text in texts:
        value = _read(text)
        if value in known:
            raise UserError(f"{known[value]} and {text} are the same value")
        known[value] = text
    return Choices(key, tuple(texts))


def _logarithmic(key: str, parts: Sequence[str]) -> Logarithmic:
    if len(parts) != 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise UserError("expected log:LOW:HIGH, such as log:1e-4:1e-1")
    low, high = map(float, parts)
    if not 0 < low < high < math.inf:
        raise UserError(f"expected 0 < LOW < HIGH, got {parts[0]} and {parts[1]}")
    return Logarithmic(key, low, high)


def _steps(parts: Sequence[str]) -> tuple[str, ...]:
    """first, first + step, … ≤ last: exact in the decimals as written, and then the nearest floating-point numbers."""
    if len(parts) != 3 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise UserError("expected FIRST:LAST:STEP, such as 0.1:1.0:0.1, or log:LOW:HIGH")
    first, last, step = map(Fraction, parts)
    if step <= 0 or last < first:
        raise UserError(f"expected FIRST ≤ LAST and STEP > 0, got {', '.join(parts)}")
    count = (last - first) // step + 1
    if count > MOST:
        raise UserError(f"{count:,} values, more than {MOST:,}")
    whole = all(_WHOLE.fullmatch(part) for part in (parts[0], parts[2]))
    try:
        texts = [
            str(value.numerator) if whole else repr(float(value))
            for value in (first + step * number for number in range(count))
        ]
    except OverflowError:
        raise UserError("too large to be computed with") from None
    if len(set(texts)) < count:
        raise UserError(f"the step {parts[2]} is too small: values that follow each other are the same number")
    return tuple(texts)


def _items(text: str) -> list[str]:
    """`text` cut at its commas, but for those inside brackets and quotes."""
    items, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            items.append("")
            continue
        items[-1] += letter
    return [item.strip() for item in items]


def _read(text: str) -> str:
    """What decides whether two values are the same; one that cannot be read is itself, and reported by who reads it."""
    try:
        return repr(plain(read_value(text, Place("<value>"))[0]))
    except Broken:
        return text
