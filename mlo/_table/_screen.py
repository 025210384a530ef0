"""A table on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich.box
from rich.table import Table as Shown
from rich.text import Text

from mlo._run._progress import progress_line
from mlo._table._forms import LEFT, cells, columns, remarks

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._table._result import Table


def print_table(table: Table, console: Console) -> None:
    """A table for each metric, then the remarks; where the screen is narrow, words wrap and numbers do not."""
    for metric in table.metrics or ("",):
        heads = columns(metric)
        shown = Shown(box=rich.box.SIMPLE_HEAD)
        for number, head in enumerate(heads):
            shown.add_column(
                Text(head), justify="left" if number < LEFT else "right", no_wrap=number != 1, overflow="fold"
            )
        for row in cells(table, metric):
            shown.add_row(*map(Text, row))
        console.print(shown)
    for line in remarks(table):
        progress_line(console)(line)
