"""A run that is killed, at any moment and as often as it pleases, ends as one that was left alone: bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mlo._run import Run
from mlo.cli import main

ROOT = Path(__file__).parent.parent.parent

GRAPH = f"""
extends: {ROOT}/graphs/needs_aware.yaml
iterations: 44
checkpoint: {{every: 5}}
evaluation: {{every: 8}}
start:
  generator: &gan
    graph: {ROOT}/graphs/needs_aware/gan.yaml
    with: {{iterations: 60, evaluation: null, checkpoint: {{every: 7}}}}
  discriminator: *gan
  meta: *gan
"""


def new_place(folder: Path) -> Path:
    folder.mkdir()
    (folder / "graph.yaml").write_text(GRAPH)
    return folder


def begin_or_resume(begin_mlo, place: Path) -> subprocess.Popen:
    """What a user types: resume where there is something to resume."""
    begun = (place / "run" / "spec.yaml").exists()
    return begin_mlo(place, *(("resume", "run") if begun else ("run", "graph.yaml", "--out", "run")))


def numbers(folder: Path) -> tuple:
    """All that must agree: metrics and summary without clocks, and the checkpoints' tensors as they lie on the disk."""
    run = Run(folder)
    lines = [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in run.metrics]
    summary = {
        key: value
        for key, value in run.summary.items()
        if not key.startswith("seconds") and key not in ("peak_memory", "starts", "git_commit")
    }
    tensors = {path.name: path.read_bytes() for path in (folder / "checkpoint").glob("*.safetensors")}
    return lines, summary, tensors


def start_of(run: Path) -> Path:
    (folder,) = {Path(start) for start in Run(run).summary["starts"].values()}
    return folder


@pytest.fixture(scope="module")
def undisturbed(begin_mlo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that is left alone, and the seconds it took."""
    place = new_place(tmp_path_factory.mktemp("undisturbed") / "place")
    began = time.monotonic()
    process = begin_or_resume(begin_mlo, place)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return place / "run", time.monotonic() - began


def survives(begin_mlo, kills: int, place_of_all: Path, undisturbed: tuple[Path, float], seed: int) -> None:
    """Kill at `kills` random moments of a run's time; whenever a run does end, compare it and begin another."""
    reference, seconds = undisturbed
    moments = random.Random(seed)
    killed = finished = 0
    place = new_place(place_of_all / "0")
    seen: set[str] = set()
    while killed < kills or not finished:
        process = begin_or_resume(begin_mlo, place)
        if killed < kills:
            try:
                process.wait(moments.uniform(0.25, 0.95) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            if not (place / "run" / "checkpoint" / "latest.json").exists():
                seen.add("pretraining")
            else:
                seen.add("training")
        _, err = process.communicate(timeout=300)
        if process.returncode == -signal.SIGKILL:
            continue
        assert process.returncode == 0, err
        assert numbers(place / "run") == numbers(reference)
        assert numbers(start_of(place / "run")) == numbers(start_of(reference))
        finished += 1
        place = new_place(place_of_all / str(finished))
    assert seen == {"pretraining", "training"} or kills < 5


def test_a_run_killed_at_three_moments_ends_as_if_it_had_not_been(begin_mlo, tmp_path: Path, undisturbed) -> None:
    survives(begin_mlo, 3, tmp_path, undisturbed, seed=0)


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_as_if_it_had_not_been(begin_mlo, tmp_path: Path, undisturbed) -> None:
    survives(begin_mlo, 20, tmp_path, undisturbed, seed=1)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear: {process.communicate()[1]}")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_saves_the_last_finished_iteration_says_how_to_go_on_and_exits_130(
    begin_mlo, sent: signal.Signals, tmp_path: Path
) -> None:
    process = begin_mlo(tmp_path, "run", "penalty", "iterations=3000", "checkpoint.every=5", "--out", "run", "--quiet")
    wait_for(tmp_path / "run" / "checkpoint" / "latest.json", process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    (line,) = err.splitlines()
    latest = json.loads((tmp_path / "run" / "checkpoint" / "latest.json").read_text())
    assert line == f"interrupted after iteration {latest['iteration']}; go on with: python -m mlo resume run"
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.endswith("\n")
    assert json.loads(metrics.splitlines()[-1])["iteration"] == latest["iteration"]


def test_an_interrupt_of_pretraining_names_the_run_that_was_asked_for_and_both_go_on(
    begin_mlo, tmp_path: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = new_place(tmp_path / "place")
    process = begin_or_resume(begin_mlo, place)
    found = []
    while not found and process.poll() is None:
        found = list(place.glob("runs/start/.*/checkpoint/latest.json"))
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted before the first iteration; go on with: python -m mlo resume run\n"
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as exited:
        main(["resume", "run", "--quiet"])
    assert exited.value.code in (0, None)
    assert numbers(place / "run") == numbers(undisturbed[0])


def test_two_processes_that_want_the_same_start_share_one(begin_mlo, tmp_path: Path, undisturbed) -> None:
    place = new_place(tmp_path / "place")
    both = [begin_mlo(place, "run", "graph.yaml", "--out", name) for name in ("one", "two")]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum("is being run by process" in out for out, _ in printed) <= 1
    assert numbers(place / "one") == numbers(place / "two") == numbers(undisturbed[0])
    (start,) = (place / "runs" / "start").iterdir()
    assert start == start_of(place / "one") == start_of(place / "two")
