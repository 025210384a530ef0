"""A run that cannot go on says why, in its exit code too, and leaves the last checkpoint whole."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mlo
from mlo._errors import explained
from mlo.cli import main

GRAPH = """
problem: troubled
iterations: 40
checkpoint: {every: 7}
levels:
  lower: {variables: point, objective: square, given: [upper], steps: 3, optimizer: {sgd: {learning_rate: 0.1}}}
  upper: {variables: point, objective: {distance: OPTIONS}, subject_to: [lower], optimizer: {sgd: {learning_rate: 0.1}}}
"""
OPTIONS = "{}"
PROBLEM = """
import torch, mlo

calls = 0

def square(values, batch):
    return (values["lower"] - values["upper"]).square().sum() + 0.1 * values["lower"].square().sum()

def distance(values, batch, *, trouble: str = "", at: int = 12):
    global calls
    calls += 1
    loss = (values["lower"] - 1).square().sum()
    if calls > at and trouble == "nan":
        return loss * float("nan")
    if calls > at and trouble == "memory":
        torch.empty(10**15)
    if calls > at and trouble == "file":
        open("/no/such/data.npz")
    if calls > at and trouble == "bug":
        [][0]
    return loss

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    return mlo.Problem(variables={"point": lambda: torch.zeros(3)}, objectives={"square": square, "distance": distance})
"""
PROBE = 1  # `distance` is called once more before the first iteration


@pytest.fixture
def troubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command with some trouble after `at` calls of the upper objective: exit code, what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "troubled", raising=False)
    (tmp_path / "troubled.py").write_text(PROBLEM)

    def command(trouble: str, *arguments: str) -> tuple[int, str]:
        (tmp_path / "graph.yaml").write_text(GRAPH.replace("OPTIONS", f"{{trouble: {trouble}}}"))
        with pytest.raises(SystemExit) as exited:
            main(arguments or ("run", "graph.yaml", "--import", "troubled", "--out", "run", "--quiet"))
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(exited.value.code or 0), printed.err

    return command


def test_nan_in_one_level_exits_3_and_names_level_step_term_and_the_last_good_checkpoint(troubled) -> None:
    code, err = troubled("nan")
    assert code == 3
    assert err == (
        "iteration 12: level 'upper', step 1: the loss is not finite; often a learning rate is too large\n"
        "  The last good checkpoint is run/checkpoint/latest.json, iteration 11.\n"
    )
    state = mlo.open_run("run").state("latest")
    assert state.iteration == 11
    assert all(bool(value.isfinite().all()) for value in state.values.values())


def test_too_little_memory_exits_4_and_a_later_resume_goes_on(troubled) -> None:
    code, err = troubled("memory")
    assert code == 4
    assert err.startswith("out of memory: ")
    assert "The last checkpoint, iteration 11, is whole: python -m mlo resume run" in err
    import troubled as problem

    problem.calls = -(10**9)  # now there is enough
    assert troubled("memory", "resume", "run", "--quiet") == (0, "")
    assert mlo.open_run("run").summary["iterations"] == 40


def test_a_missing_file_of_data_is_the_users(troubled) -> None:
    code, err = troubled("file")
    assert code == 2
    assert "No such file or directory: '/no/such/data.npz'" in err
    assert mlo.open_run("run").state("latest").iteration == 11


def test_a_bug_keeps_the_last_finished_iteration_and_its_traceback(troubled) -> None:
    code, err = troubled("bug")
    assert code == 1
    assert "IndexError" in err
    assert "The traceback is in run/traceback.txt." in err
    assert "[][0]" in Path("run/traceback.txt").read_text()
    assert mlo.open_run("run").state("latest").iteration == 11


@pytest.mark.parametrize(
    ("error", "own", "code"),
    [
        (OSError(28, "No space left on device"), False, 4),
        (OSError(27, "File too large"), False, 4),
        (PermissionError(13, "Permission denied", "/run/metrics.jsonl"), True, 4),
        (FileNotFoundError(2, "No such file", "/run/checkpoint/x"), True, 4),
        (PermissionError(13, "Permission denied", "/data/images.npz"), True, 2),
        (PermissionError(13, "Permission denied", "/data/images.npz"), False, 4),
        (FileNotFoundError("images.npz: download it first"), True, 2),
        (MemoryError(), False, 4),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), False, 4),
        (RuntimeError("shapes cannot be multiplied"), False, None),
        (ConnectionResetError(104, "reset"), False, None),
    ],
)
def test_what_an_error_from_below_means(error: Exception, own: bool, code: int | None) -> None:
    found = explained(error, *([Path("/run")] if own else []))
    assert (found and found.exit_code) == code


def test_where_a_file_cannot_grow_the_last_checkpoint_stays_whole_and_resume_goes_on(tmp_path: Path, begin_mlo) -> None:
    settings = ("run", "penalty", "iterations=200", "checkpoint.every=20", "levels.weights.steps=2", "--quiet", "--out")
    assert begin_mlo(tmp_path, *settings, "whole").communicate(timeout=60) == ("", "")
    limit = 40_000  # bytes: more than a checkpoint, less than the metrics
    process = begin_mlo(
        tmp_path, *settings, "run", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "File too large" in err
    assert "is whole: python -m mlo resume run" in err
    assert "Traceback" not in err
    run, whole = mlo.open_run(tmp_path / "run"), mlo.open_run(tmp_path / "whole")
    assert run.state("latest").iteration % 20 == 0
    mlo.resume(run.folder, quiet=True)
    assert torch.equal(run.state("latest").values["penalty"], whole.state("latest").values["penalty"])
    assert [line["losses"] for line in run.metrics if "losses" in line] == [
        line["losses"] for line in whole.metrics if "losses" in line
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 160 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk takes rights that this user lacks")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_exits_4_with_the_last_checkpoint_whole(small_disk: Path, begin_mlo) -> None:
    settings = ("iterations=500", "checkpoint.every=20", "levels.weights.steps=1", "--quiet")
    process = begin_mlo(small_disk.parent, "run", "penalty", *settings, "--out", "disk/run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "No space left on device" in err
    assert "Traceback" not in err
    run = mlo.open_run(small_disk / "run")
    assert run.state("latest").iteration >= 20
    assert run.metrics
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    process = begin_mlo(small_disk.parent, "resume", "disk/run", "--quiet")
    assert process.communicate(timeout=60) == ("", "")
    assert len([line for line in run.metrics if "losses" in line]) == 500


def test_a_disk_that_is_full_from_the_first_byte_and_one_that_cannot_be_written(small_disk: Path, begin_mlo) -> None:
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    process = begin_mlo(small_disk.parent, "run", "penalty", "iterations=3", "--out", "disk/run")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "No space left on device" in err) == (4, True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = begin_mlo(small_disk.parent, "run", "penalty", "iterations=3", "--out", "disk/other")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "cannot be made: Read-only file system" in err) == (4, True)
