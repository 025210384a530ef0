"""Several processes at one table, some of them killed: the table of one that was left alone, byte for byte but clocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tables import new_place

import mlo

ROOT = Path(__file__).parent.parent.parent
GRAPHS = ("plain.yaml", "slower.yaml", "data.pause=0.002", "checkpoint.every=2", "--import", "six_numbers")


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if not key.startswith("seconds")}
    return [without_clocks(each) for each in value] if isinstance(value, list) else value


def contents(out: Path) -> tuple:
    """The three files without their last columns and clock fields, and the weights of every cell."""
    markdown = [line.rsplit("|", 2)[0] for line in (out / "table.md").read_text().splitlines()]
    lines = [line.rsplit(",", 1)[0] for line in (out / "table.csv").read_text().splitlines()]
    tensors = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}
    return markdown, lines, without_clocks(json.loads((out / "table.json").read_text())), tensors


def ended(process: subprocess.Popen[str], code: int = 0, timeout: float = 120) -> tuple[str, str]:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return out, err


def wait_until(found, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if found():
            return
        if process.poll() is not None:
            break
        time.sleep(0.025)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """What one process makes that is left alone."""
    place = new_place(tmp_path_factory.mktemp("alone") / "place")
    command = [sys.executable, "-m", "mlo", "table", *GRAPHS, "--seeds", "3", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{place}", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, env=environment, check=True)
    return contents(place / "runs" / "table")


def test_of_two_processes_one_is_killed_and_the_other_takes_over_what_it_left(begin, tmp_path, alone) -> None:
    place = new_place(tmp_path / "place")
    both = [begin(place, *GRAPHS, "--seeds", "3") for _ in range(2)]
    cell = place / "runs" / "table" / "plain" / "seed-0"
    wait_until((cell / "checkpoint" / "latest.json").exists, both[0])
    holder = int(cell.with_name(".seed-0.lock").read_text().split()[1])
    os.kill(holder, signal.SIGKILL)
    killed, other = sorted(both, key=lambda process: process.pid != holder)
    ended(killed, -signal.SIGKILL)
    out, err = ended(other)
    assert "plain, seed 0: goes on from iteration" in err
    assert out == (place / "runs" / "table" / "table.md").read_text()
    assert contents(place / "runs" / "table") == alone


def test_two_jobs_make_the_same_table_even_if_a_worker_is_killed(begin, tmp_path, alone) -> None:
    place = new_place(tmp_path / "place")
    process = begin(place, *GRAPHS, "--seeds", "3", "--jobs", "2")
    cell = place / "runs" / "table" / "plain" / "seed-0"
    wait_until((cell / "checkpoint" / "latest.json").exists, process)
    os.kill(int(cell.with_name(".seed-0.lock").read_text().split()[1]), signal.SIGKILL)
    _, err = ended(process)
    assert "a worker has died (killed by signal 9); others took over what it left" in err
    assert contents(place / "runs" / "table") == alone


def test_an_interrupt_stops_the_workers_with_checkpoints_prints_what_is_there_and_the_command_goes_on(
    begin, tmp_path, alone
) -> None:
    place = new_place(tmp_path / "place")
    process = begin(place, *GRAPHS, "--seeds", "3", "--jobs", "2")
    wait_until((place / "runs" / "table" / "plain" / "seed-0" / "checkpoint" / "latest.json").exists, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all of them
    out, err = ended(process, 130)
    assert err.splitlines()[-1] == "interrupted; the same command goes on"
    assert "Traceback" not in err
    assert "not finished" in out
    assert not list(place.glob("runs/table/*/.seed-*.lock"))
    _, err = ended(begin(place, *GRAPHS, "--seeds", "3"))
    assert "goes on from iteration" in err
    assert contents(place / "runs" / "table") == alone


def test_what_cells_of_one_seed_start_from_is_run_once(begin, tmp_path) -> None:
    place = new_place(tmp_path / "place")
    graphs = ("first.yaml", "second.yaml", "data.pause=0.002", "--import", "six_numbers", "--seeds", "1")
    for process in [begin(place, *graphs) for _ in range(2)]:
        ended(process)
    (start,) = (place / "runs" / "start").iterdir()
    assert start.name.startswith("base-")
    ran = mlo.open_run(start).summary
    # each iteration evaluates the objective once; a probe before the first may, and the other graphs never do
    assert ran["iterations"] <= (place / "noted").stat().st_size < 2 * ran["iterations"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_shipped_graphs_killed_at_several_moments_end_in_the_same_table(begin, tmp_path, moment) -> None:
    graphs = ("learned_rates", "nested", "penalty", "iterations=40", "--seeds", "2")
    began = time.monotonic()
    place = new_place(tmp_path / "one")
    ended(begin(place, *graphs, "--quiet"), timeout=600)
    seconds = time.monotonic() - began
    other = new_place(tmp_path / "two")
    both = [begin(other, *graphs, "--quiet") for _ in range(2)]
    time.sleep(moment * seconds)
    both[0].kill()
    both[0].communicate()
    ended(both[1], timeout=600)
    assert contents(other / "runs" / "table") == contents(place / "runs" / "table")
