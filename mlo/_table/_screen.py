"""A table on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich.box
from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text

from mlo._run._progress import progress_line
from mlo._table._forms import LEFT, cells, columns, remarks

if TYPE_CHECKING:
    from mlo._table._result import Table

_SEEDS = 24
"""Characters to which the column of seeds, which may say why some failed, is narrowed at most."""

_WIDEST = 500


def print_table(table: Table, console: Console) -> None:
    """A table for each metric, then the remarks."""
    for metric in table.metrics or ("",):
        rows = [columns(metric), *cells(table, metric)]
        shown = Shown(box=rich.box.SIMPLE_HEAD)
        for number, (head, *below) in enumerate(zip(*rows, strict=True)):
            widest = max(map(len, (head, *below)))
            least = min(widest, _SEEDS) if number == 1 else widest
            shown.add_column(Text(head), justify="left" if number < LEFT else "right", min_width=least)
        for row in rows[1:]:
            shown.add_row(*map(Text, row))
        print_whole(shown, console)
    for line in remarks(table):
        progress_line(console)(line)


def print_whole(shown: Shown, console: Console) -> None:
    """Numbers that are cut off say nothing: where the screen is narrower than `shown`, its lines wrap."""
    wide = console.measure(shown, options=console.options.update(width=_WIDEST)).minimum
    whole = Console(file=console.file, width=max(wide, console.width), force_terminal=console.is_terminal)
    whole.print(shown)
