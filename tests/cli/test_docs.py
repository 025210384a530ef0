"""docs/command-line.md names every command, and no other command or option."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from mlo.cli._app import app

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
EXAMPLES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if "COMMAND" not in line
]


def test_every_command_has_a_section():
    assert set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_can_be_parsed(line):
    python, flag, package, command, *arguments = shlex.split(line)
    assert (python, flag, package) == ("python", "-m", "mlo")
    COMMANDS[command].make_context(command, arguments)
