"""`mlo new`: what it writes runs as it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_written_runs_passes_its_tests_and_is_well_formed(mlo_command, tmp_path):
    code, out, err = mlo_command("new", "first_lesson", "--in", "lessons")
    assert (code, err) == (0, "")
    folder = tmp_path / "lessons"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["first_lesson.py", "first_lesson.yaml", "test_first_lesson.py"]
    assert "cd lessons && python -m mlo run first_lesson.yaml --import first_lesson" in out
    out = run("-m", "mlo", "run", "first_lesson.yaml", "--import", "first_lesson", "--out", "run", folder=folder)
    assert "through classifier" in out
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_first_lesson.py", folder=folder)
    assert "NAME" not in "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.*"))
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is not None:
        checked = subprocess.run(
            [ruff, "check", "--isolated", "--no-cache", "--line-length=120", "--select=E,F,W,B,UP,C4,PIE", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Problem", "'My-Problem': a problem's name is a word of a-z, 0-9 and _"),
        ("1st", "'1st': a problem's name is a word"),
        ("../up", "'../up': a problem's name is a word"),
        ("test_me", "'test_me': a problem's name is a word"),
        ("class", "'class' is a word of Python's"),
        ("json", "'json' is the name of a module that is installed"),
        ("torch", "'torch' is the name of a module that is installed"),
        ("mlo", "'mlo' is the name of a module that is installed"),
    ],
)
def test_a_name_that_cannot_be_a_module_is_refused(mlo_command, tmp_path, name, message):
    code, _, err = mlo_command("new", name)
    assert code == 2
    assert err.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(mlo_command, tmp_path):
    (tmp_path / "mine.yaml").write_text("all my work")
    code, _, err = mlo_command("new", "mine")
    assert code == 2
    assert "mine.yaml: there already, and nothing is overwritten" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "all my work"


def test_a_folder_that_cannot_be_made_is_the_machine(mlo_command):
    assert mlo_command("new", "mine", "--in", "/proc/mlo")[0] == 4
