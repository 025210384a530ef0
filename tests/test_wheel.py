"""The wheel, installed in a fresh environment, works in an empty folder: graphs and problems are inside."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command that sees nothing of this checkout."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys\nfrom hatchling.build import build_wheel\nprint(build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", build, folder, folder=ROOT)
    (made,) = folder.glob("mlo-*.whl")
    return made


def test_it_holds_what_it_should_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mlo", "problems", next(top for top in tops if top.endswith(".dist-info"))}
    shipped = {f"mlo/graphs/{path.relative_to(ROOT / 'graphs')}" for path in (ROOT / "graphs").rglob("*.yaml")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "mlo" / "_new" / "templates").iterdir()}
    assert shipped | templates <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "runs"))]


def test_installed_elsewhere_it_runs_checks_and_writes_from_an_empty_folder(wheel, tmp_path):
    """The packages it needs are those of this environment; `mlo` itself is the wheel's alone."""
    fresh, here = tmp_path / "environment", tmp_path / "empty"
    here.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", fresh, folder=here)
    (site,) = fresh.glob("lib/python*/site-packages")
    python, mlo = fresh / "bin" / "python", fresh / "bin" / "mlo"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheel, folder=here)
    # A line in a `.pth` file adds a folder, but not what the `.pth` files in that folder add: no checkout comes along.
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    where = run(python, "-c", "import mlo, problems; print(mlo.__file__, problems.__file__)", folder=here).split()
    assert all(Path(each).is_relative_to(site) for each in where)
    assert "iteration 3 of 3" in run(mlo, "run", "penalty", "iterations=3", folder=here)
    assert "run order: classifier → discriminator" in run(mlo, "check", "needs_aware", folder=here)
    short = [f"start.{level}.with.iterations=2" for level in ("generator", "discriminator", "meta")]
    assert "iteration 8 of 8" in run(mlo, "run", "needs_aware", "iterations=8", *short, folder=here)
    told = run(mlo, "doctor", folder=here)
    assert str(site) in told
    assert told.endswith("all is well\n")
    run(mlo, "new", "lesson", folder=here)
    assert "iteration 2 of 2" in run(mlo, "run", "lesson.yaml", "iterations=2", "--import", "lesson", folder=here)
