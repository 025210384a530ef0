"""What the README says is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_is_the_quickstart_and_prints_what_the_readme_says() -> None:
    (example,) = blocks("python")
    assert example == (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert len(example.splitlines()) < 20
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in README


def test_the_smallest_graph_is_under_twenty_lines() -> None:
    assert len((ROOT / "graphs" / "penalty.yaml").read_text(encoding="utf-8").splitlines()) < 20


def test_the_commands_exist_and_the_gate_runs_the_readmes_test_command() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert {"make run", "make test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_what_check_and_a_mistake_say_is_what_the_readme_says() -> None:
    check, mistake = (block for block in blocks("text") if "levels, 1,000 iterations" in block or "unrol'" in block)
    command, *said = mistake.splitlines()
    for arguments, expected in (
        (["check", "graphs/needs_aware.yaml"], check.splitlines()),
        (command.split()[4:], said),
    ):
        done = subprocess.run([sys.executable, "-m", "mlo", *arguments], capture_output=True, text=True, cwd=ROOT)
        assert [line.rstrip() for line in (done.stdout + done.stderr).splitlines()] == expected
