"""Two processes of one run: the numbers of one, one folder, one voice, and no way to end that leaves the other waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mlo
from mlo import _tree
from mlo._run._processes import Processes

ROOT = Path(__file__).parent.parent.parent

PROBLEM = """
import os
import time

import torch
from torch import nn

import mlo

MISHAP = os.environ.get("MISHAP")


class Data(mlo.Settings):
    rows: int = 9


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if MISHAP == "buffer":
            self.seen = x.sum()
        return x @ self.weight


def build(settings: Data, context: mlo.Context):
    generator = torch.Generator().manual_seed(context.seed)
    rows = settings.rows

    def part():
        x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        return {"x": x.to(context.dtype), "y": torch.randn(rows, generator=generator, dtype=torch.float64).to(context.dtype)}

    def evaluate(values, split, *, model, totals, complete):
        if MISHAP == "evaluation" and totals:
            raise ValueError("the judge has left")
        return mlo.Evaluation(metrics={"size": values["w"]["weight"].square().sum().item()})

    whole = part()
    noise = mlo.stream.Noise(lambda generator: torch.randn(2 * rows, generator=generator, dtype=context.dtype))
    return mlo.Problem(
        variables={"line": Line, "zero": lambda: torch.zeros(())},
        objectives={"fit": fit, "judge": judge, "worst": worst},
        streams={"train": mlo.stream.Shuffled(whole, size=rows - 2), "all": mlo.stream.Constant(part()), "noise": noise},
        evaluate=evaluate,
    )


def fit(values: mlo.Values, batch):
    if MISHAP == "one process" and os.environ.get("RANK") == "1" and values.iteration == 3:
        raise ValueError("something only here")
    if MISHAP == "slow":
        time.sleep(0.05)
    misses = (values["w"](batch["x"]) - batch["y"]).square().mean()
    return misses + 0.5 * values["u"].exp() * values["w"]["weight"].square().sum(), {"misses": misses}


def judge(values: mlo.Values, batch):
    return (values["w"](batch["all"]["x"]) - batch["all"]["y"]).square().mean() + 0.1 * batch["noise"].mean() * values["u"]


@mlo.reduction("batch")
def worst(values: mlo.Values, batch):
    return fit(values, batch)[0]
"""

BASE = """
problem: shared
iterations: 4
dtype: float64
levels:
  w: {variables: line, objective: fit, given: [u], batch: train, steps: 3, optimizer: {adam: {learning_rate: 0.05}}}
  u:
    variables: zero
    objective: judge
    subject_to: [w]
    batch: [all, noise]
    optimizer: {sgd: {learning_rate: 0.1}}
"""
GRAPH = """
extends: base.yaml
iterations: 12
start: {w: base.yaml}
checkpoint: {every: 3}
evaluation: {model: [w], every: 4, select: validation.size}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, text in (("shared.py", PROBLEM), ("base.yaml", BASE), ("graph.yaml", GRAPH)):
        (tmp_path / name).write_text(text)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def begin(folder: Path, *arguments: str, **more: str) -> list[subprocess.Popen[str]]:
    """Two processes as torchrun would start them, whose exit codes and words can be told apart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def process(rank: str) -> subprocess.Popen[str]:
        together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return subprocess.Popen(
            [sys.executable, "-m", "mlo", *arguments],
            cwd=folder,
            env=environment(folder, **together, RANK=rank, LOCAL_RANK=rank, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    return [process("0"), process("1")]


def ended(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, and what was printed on either stream; nothing hangs."""
    try:
        said = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [out for out, _ in said], [err for _, err in said]


def wait_for(path: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    while not path.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.05)


RUN = ("run", "graph.yaml", "--import", "shared")


def alone(folder: Path, *overrides: str, out: str = "one") -> None:
    command = [sys.executable, "-m", "mlo", *RUN, *overrides, "--out", out]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


def lines(run: mlo.Run) -> list[dict[str, Any]]:
    """The metrics without clocks and without what recording saves one process."""
    left_out = ("seconds", "seconds_of_step", "gradients")
    return [{key: value for key, value in line.items() if key not in left_out} for line in run.metrics]


def close(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    return one == two or abs(one - two) <= 1e-12 * max(1.0, abs(one))


def tensors(run: mlo.Run, which: str = "latest") -> list[torch.Tensor]:
    state = run.state(which)
    trees = [*state.values.values(), *(tree for each in state.optimizers.values() for tree in each.moments.values())]
    return [tensor for tree in trees for tensor in _tree.leaves(tree)]


def same_run(one: mlo.Run, two: mlo.Run) -> None:
    """The same to 1e-12: metrics, latest and selected state, and what was selected."""
    assert len(lines(one)) == len(lines(two))
    assert all(close(first, second) for first, second in zip(lines(one), lines(two), strict=True))
    for which in ("latest", "selected"):
        for first, second in zip(tensors(one, which), tensors(two, which), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    assert close(dict(one.summary["metrics"]), dict(two.summary["metrics"]))
    assert one.summary["selected"] == two.summary["selected"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_are_the_whole_in_one_proportion(size):
    """Of 5 units, tensors of 5, 10 and 5 samples; what has no samples is the same for all."""
    rows, scale = torch.arange(5), torch.tensor(0.5)
    batch = {"a": {"x": rows[:, None].double(), "y": rows}, "z": (torch.arange(10.0), "name", scale)}
    parts = [Processes(rank, size).part(batch, "w") for rank in range(size)]
    assert torch.equal(torch.cat([part["a"]["y"] for part in parts]), rows)
    assert torch.equal(torch.cat([part["z"][0] for part in parts]), batch["z"][0])
    counts = [len(part["a"]["x"]) for part in parts]
    assert [len(part["z"][0]) for part in parts] == [2 * count for count in counts]
    assert max(counts) - min(counts) <= 1
    assert all(part["z"][1:] == ("name", scale) for part in parts)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(mlo.UserError, match="level 'w': a batch of 2 cannot be divided among 3 processes"):
        Processes(0, 3).part(torch.ones(2, 4), "w")
    with pytest.raises(mlo.UserError, match="draws of 4 and 6 samples cannot be divided among 3 processes in one prop"):
        Processes(2, 3).part((torch.ones(4), torch.ones(6)), "w")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_gives_the_shipped_graph_s_numbers(tmp_path, processes):
    """100 and 200 images; among 3 processes, 33, 33 and 34 of them, and 66, 67 and 67."""
    options = (str(ROOT / "graphs/penalty.yaml"), "iterations=6", "dtype=float64", "evaluation.every=2")
    command = [sys.executable, "-m", "mlo", "run", *options, "--out", "one"]
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=True, timeout=180)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "mlo", "run", *options, "--out", "several"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Selected: iteration 6 of 6") == 1
    one, several = mlo.open_run(tmp_path / "one"), mlo.open_run(tmp_path / "several")
    same_run(one, several)
    assert several.summary["processes"] == processes


PARTING = """
import atexit
import os
from pathlib import Path


def note():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    Path(f"threads-{os.environ['RANK']}").write_text("".join(names))


atexit.register(note)  # before all others, so that it runs after them
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not listed here")
def test_the_threads_of_collectives_have_ended_when_python_ends(place):
    """One that lets go of a tensor afterwards ends the process by a signal, when the run has been made."""
    (place / "sitecustomize.py").write_text(PARTING)
    (place / "shared.py").write_text(f"{PROBLEM}\nimport torch.distributed.nn.functional\n")  # as torchvision does
    codes, _, err = ended(begin(place, *RUN, "--out", "two"))
    assert codes == [0, 0], err
    for rank in range(2):
        names = (place / f"threads-{rank}").read_text()
        assert "python" in names
        assert "gloo" not in names


def test_two_processes_make_the_run_of_one_and_its_start(place):
    """7 and 9 samples, and 18 of noise beside the 9: parts of 3 and 4, of 4 and 5, of 8 and 10."""
    alone(place)
    one = mlo.open_run(place / "one")
    (start,) = {Path(folder) for folder in one.summary["starts"].values()}
    (place / start).rename(place / "start-of-one")
    codes, out, err = ended(begin(place, *RUN, "--out", "two"))
    assert codes == [0, 0], err
    assert "start: w from base" in out[0]
    assert out[1] == err[1] == ""
    two = mlo.open_run(place / "two")
    same_run(one, two)
    same_run(mlo.open_run(place / "start-of-one"), mlo.open_run(place / start))
    summary = two.summary
    assert summary["processes"] == 2
    assert summary["counts"] == summary["predicted_counts"]
    assert one.summary["processes"] == 1
    assert one.summary["counts"]["products"] == summary["counts"]["products"]
    assert not list(place.glob("two*/*.txt"))


@pytest.mark.slow
def test_an_interrupt_of_either_stops_both_and_resume_goes_on_bit_for_bit(place):
    options = (*RUN, "start=null", "iterations=40", "evaluation.every=20")
    codes, _, err = ended(begin(place, *options, "--out", "whole"))
    assert codes == [0, 0], err
    processes = begin(place, *options, "--out", "broken", MISHAP="slow")
    file = place / "broken" / "metrics.jsonl"
    wait_for(place / "broken" / "checkpoint" / "latest.json", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, err = ended(processes)
    assert codes == [130, 130], err
    assert "go on with: python -m mlo resume broken" in err[0]
    assert err[1] == ""
    before = len(file.read_text().splitlines())
    assert 0 < before < 40
    codes, out, err = ended(begin(place, "resume", "broken"))
    assert codes == [0, 0], err
    assert "resumed from iteration" in out[0]
    assert out[1] == ""
    whole, broken = mlo.open_run(place / "whole"), mlo.open_run(place / "broken")
    assert lines(whole) == lines(broken)
    assert all(map(torch.equal, tensors(whole), tensors(broken)))
    assert json.loads((place / "broken" / "run.json").read_text())["resumed"][0]["exact"] is True
    codes, out, _ = ended(begin(place, "resume", "broken"))
    assert codes == [0, 0]
    assert "finished" in out[0]
    assert out[1] == ""


@pytest.mark.slow
def test_another_number_of_processes_is_noted_on_resume(place):
    codes, _, err = ended(begin(place, *RUN, "start=null", "--out", "run", MISHAP="one process"))
    assert codes != [0, 0], err
    command = [sys.executable, "-m", "mlo", "resume", "run"]
    done = subprocess.run(command, cwd=place, env=environment(place), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "begun in 2 processes, goes on in 1: the last bits may differ" in done.stdout


MISHAPS = [
    # what goes wrong, overrides, exit codes, what the first process says, what the second says
    ("", "levels.w.optimizer.adam.learning_rate=1e300", [3, 3], "is not finite", ""),
    ("", "levels.w.objective=worst", [2, 2], "declares `reduction: batch`", ""),
    ("", "data.rows=3", [2, 2], "level 'w': a batch of 1 cannot be divided among 2 processes", ""),
    ("", "levels.w.variables=lien", [2, 2], "no variable named 'lien'", ""),
    ("", "device=cuda:1", [2, 2], "device", ""),
    ("buffer", "seed=0", [2, 2], "the buffers of level 'w' are no longer the same in all processes", ""),
    ("evaluation", "seed=0", [1, 1], "ValueError: the judge has left", ""),
    ("one process", "seed=0", [4, 1], "The last good checkpoint is", "ValueError: something only here"),
]


@pytest.mark.parametrize(
    ("mishap", "override", "codes", "first", "second"),
    [MISHAPS[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in MISHAPS[1:])],
    ids=[f"{row[0]} {row[1]}" for row in MISHAPS],
)
def test_both_stop_together_and_one_says_why(place, mishap, override, codes, first, second):
    found, out, err = ended(begin(place, *RUN, "start=null", override, "--out", "run", "--quiet", MISHAP=mishap))
    assert found == codes, err
    assert first in err[0]
    assert second in err[1]
    assert second or not err[1]
    assert out == ["", ""]


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_refused_once(place):
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    codes, out, err = ended(begin(place, *RUN, "--out", "full"))
    assert codes == [2, 2]
    assert "must be new or empty" in err[0]
    assert err[1] == "" == out[1]


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nobody_waiting(place):
    processes = begin(place, *RUN, "start=null", "iterations=400", "--out", "run", MISHAP="slow")
    wait_for(place / "run" / "checkpoint" / "latest.json", processes)
    processes[1].kill()
    codes, _, err = ended(processes)
    assert codes == [4, -signal.SIGKILL], err
    assert "another process of this run has stopped" in err[0]
    assert "The last good checkpoint is" in err[0]
