"""Text that a command makes: to a file or to the screen, as it is."""

from __future__ import annotations

from pathlib import Path

import typer

from mlo._errors import UserError


def put(text: str, out: Path | None) -> None:
    """Write `text` to `out`, or print it. Raises `UserError` where `out` is a folder or lies in none."""
    if out is None:
        typer.echo(text)
        return
    try:
        out.write_text(f"{text.rstrip()}\n", encoding="utf-8")
    except (IsADirectoryError, NotADirectoryError, FileNotFoundError) as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
