"""What docstrings say about each option: the bullets "- `name`: text" of our style."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_BULLET = re.compile(r"- ((?:`\w+`, )*`\w+`): (.*)")


def summary(target: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, or nothing."""
    return " ".join(_doc(target).split("\n\n")[0].split())


def about(target: Callable[..., Any]) -> dict[str, str]:
    """By name, what the docstring says of each option."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in _doc(target).splitlines():
        bullet = _BULLET.fullmatch(line)
        if bullet is not None:
            names = re.findall(r"\w+", bullet[1])
            found |= dict.fromkeys(names, bullet[2])
        elif line.startswith("  ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def _doc(target: Any) -> str:
    target = getattr(target, "func", target)  # functools.partial has a docstring of its own
    return inspect.cleandoc(target.__doc__ or "")  # not inherited: a module's would be torch's
