"""What `resume` takes up, cuts back, refuses and says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mlo
from mlo._run import _lock
from mlo._state import State
from mlo.cli import main

ROOT = Path(__file__).parent.parent.parent


def penalty(*overrides: str) -> mlo.Spec:
    settings = ("iterations=9", "evaluation.every=2", "checkpoint.every=3", "evaluation.select=validation.top1")
    return mlo.load(ROOT / "graphs" / "penalty.yaml", *settings, *overrides)


def numbers(run: mlo.Run) -> tuple:
    lines = [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in run.metrics]
    left_out = ("peak_memory", "git_commit")
    summary = {key: value for key, value in run.summary.items() if not key.startswith(("seconds", *left_out))}
    tensors = {path.name: path.read_bytes() for path in (run.folder / "checkpoint").glob("*.safetensors")}
    return lines, summary, tensors


@contextmanager
def broken_off(at: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """`error` strikes inside the iteration after `at`."""
    step = mlo.Graph.step

    def broken(graph: mlo.Graph, state: mlo.State, batches: object) -> object:
        if state.iteration == at:
            raise error
        return step(graph, state, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlo.Graph, "step", broken)
        yield


def break_off(spec: mlo.Spec, folder: Path, *, at: int) -> Path:
    """Run `spec` until `at` iterations are finished."""
    with broken_off(at), pytest.raises(KeyboardInterrupt):
        mlo.run(spec, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> mlo.Run:
    return mlo.run(penalty(), tmp_path_factory.mktemp("whole") / "run", quiet=True)


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_a_run_broken_off_at_any_iteration_ends_as_if_it_had_not_been(
    at: int, error: type[BaseException], tmp_path: Path, whole: mlo.Run
) -> None:
    with broken_off(at, error), pytest.raises(mlo.MachineError if error is MemoryError else error):
        mlo.run(penalty(), tmp_path / "run", quiet=True)
    assert mlo.open_run(tmp_path / "run").state("latest").iteration == at
    assert numbers(mlo.resume(tmp_path / "run", quiet=True)) == numbers(whole)
    assert not (tmp_path / "run" / "traceback.txt").exists()


@pytest.mark.parametrize(
    "method",
    ["{conjugate_gradient: {iterations: 2, damping: 0.1, warm_start: true}}", "{neumann: {terms: 3, step_size: auto}}"],
)
@pytest.mark.parametrize("at", [1, 4])
def test_what_methods_remember_outlives_an_interrupt(method: str, at: int, tmp_path: Path) -> None:
    spec = penalty(f"levels.weights.hypergradient={method}")
    whole = mlo.run(spec, tmp_path / "whole", quiet=True)
    folder = break_off(spec, tmp_path / "run", at=at)
    kept = mlo.open_run(folder).state("latest")
    assert set(kept.memory) == {("penalty", "weights"), ("penalty", "penalty")}
    assert numbers(mlo.resume(folder, quiet=True)) == numbers(whole)
    forgetful = break_off(spec, tmp_path / "forgetful", at=at)
    with pytest.MonkeyPatch.context() as patch:
        read = State.__init__
        patch.setattr(State, "__init__", lambda state, **given: read(state, **{**given, "memory": {}}))
        resumed = mlo.resume(forgetful, quiet=True)
    assert numbers(resumed) != numbers(whole)  # what is remembered is used


def test_a_run_killed_between_checkpoints_is_cut_back_half_lines_and_half_files_too(
    tmp_path: Path, whole: mlo.Run
) -> None:
    folder = break_off(penalty(), tmp_path / "run", at=6)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "losses": {}}\n{"iteration": 8, "los')
    kept = folder / "checkpoint"
    (kept / ".latest.json.part").write_text("{")
    (kept / "latest-00000008.safetensors").write_bytes(b"half")
    selected = json.loads((kept / "latest.json").read_text())["selected"]
    (kept / "selected.json").write_text("{}")  # a later one, as it were: that of the checkpoint counts
    assert [line["iteration"] for line in mlo.open_run(folder).metrics][-1] == 7  # what is whole can be read
    run = mlo.resume(folder, quiet=True)
    assert numbers(run) == numbers(whole)
    assert selected["iteration"] in (2, 4, 6)
    assert not list(folder.rglob("*.part"))


def test_without_a_checkpoint_it_starts_over(
    tmp_path: Path, whole: mlo.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = break_off(penalty(), tmp_path / "run", at=4)
    shutil.rmtree(folder / "checkpoint")
    with pytest.raises(SystemExit) as exited:
        main(["resume", str(folder)])
    assert exited.value.code in (0, None)
    assert "from the start, for there is no checkpoint" in capsys.readouterr().out
    assert numbers(mlo.open_run(folder)) == numbers(whole)


def test_a_run_goes_on_on_another_device_under_its_own_identity(tmp_path: Path, whole: mlo.Run) -> None:
    folder = break_off(penalty("device=cpu:0"), tmp_path / "run", at=4)
    identity = mlo.open_run(folder).spec.hash
    run = mlo.resume(folder, device="cpu", quiet=True)
    assert identity != whole.spec.hash
    assert run.summary["spec_hash"] == run.spec.hash == identity
    assert run.state("latest").iteration == 9  # its checkpoints are still those of the run
    (life,) = json.loads((folder / "run.json").read_text())["resumed"]
    assert (life["device"], life["exact"]) == ("cpu", False)
    assert numbers(run)[0] == numbers(whole)[0]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, whole: mlo.Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    for _ in range(2):
        with pytest.raises(SystemExit) as exited:
            main(["resume", str(whole.folder)])
        assert exited.value.code in (0, None)
        assert capsys.readouterr().out == f"finished: {whole.folder}\n"
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


def test_a_run_that_lacks_only_its_summary_is_judged_again(tmp_path: Path, whole: mlo.Run) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / "summary.json").unlink()
    assert numbers(mlo.resume(folder, quiet=True)) == numbers(whole)


def test_tensorboard_shows_every_step_once(tmp_path: Path, whole: mlo.Run) -> None:
    folder = break_off(penalty(), tmp_path / "run", at=5)
    kept = folder / "checkpoint"
    earlier = tmp_path / "earlier"
    shutil.copytree(kept, earlier)
    with broken_off(8), pytest.raises(KeyboardInterrupt):
        mlo.resume(folder, quiet=True)
    shutil.rmtree(kept)
    shutil.copytree(earlier, kept)  # as if killed at 8 with a checkpoint at 5
    (first, _) = sorted((folder / "tensorboard").iterdir())
    with first.open("ab") as file:
        file.write(b"\x20\x00\x00")  # half an event
    run = mlo.resume(folder, quiet=True)
    assert numbers(run) == numbers(whole)
    assert len(list((folder / "tensorboard").iterdir())) == 3
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("losses/weights")]
    steps = [line for line in whole.metrics if "losses" in line]
    assert [step for step, _ in found] == list(range(1, 10))
    assert [value for _, value in found] == pytest.approx([line["losses"]["weights"] for line in steps], rel=1e-6)
    scores = [event.step for event in events.Scalars("evaluation/validation.top1")]
    assert scores == [2, 4, 6, 8, 9]


def swap_tensors(kept: Path) -> None:
    latest, selected = (next(kept.glob(f"{name}-*.safetensors")) for name in ("latest", "selected"))
    latest.write_bytes(selected.read_bytes())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: swap_tensors(run / "checkpoint"), "damaged, or of another checkpoint"),
        (lambda run: truncate(next((run / "checkpoint").glob("latest-*"))), "damaged, or of another checkpoint"),
        (lambda run: truncate(next((run / "checkpoint").glob("selected-*"))), "selected-.*damaged"),
        (lambda run: next((run / "checkpoint").glob("latest-*")).unlink(), "missing, though a checkpoint points to it"),
        (lambda run: truncate(run / "checkpoint" / "latest.json"), "latest.json: damaged"),
        (lambda run: change(run / "checkpoint" / "latest.json", '"format": 3', '"format": 2'), "format 2, .* format 3"),
        (lambda run: change(run / "checkpoint" / "latest.json", '"iteration": 5', '"iteration": 6'), "changed since"),
        (lambda run: (run / "checkpoint" / "latest.json").write_text("[]"), "not the JSON of a checkpoint"),
        (lambda run: change(run / "spec.yaml", "learning_rate: 0.05", "learning_rate: 0.06"), "changed since the run"),
        (lambda run: truncate(run / "metrics.jsonl"), "not the one that the checkpoint at iteration 5"),
        (lambda run: (run / "metrics.jsonl").unlink(), "not the one that the checkpoint at iteration 5"),
        (lambda run: (run / "run.json").unlink(), "run.json is missing"),
        (lambda run: truncate(run / "run.json"), "run.json: damaged"),
        (lambda run: (run / "spec.yaml").unlink(), "not a run folder, spec.yaml is missing"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_with_its_reason(
    damage, reason: str, tmp_path: Path, whole: mlo.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = break_off(penalty(), tmp_path / "run", at=5)
    damage(folder)
    with pytest.raises(mlo.UserError, match=reason):
        mlo.resume(folder, quiet=True)
    with pytest.raises(SystemExit) as exited:
        main(["resume", str(folder), "--quiet"])
    assert exited.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_checkpoint_of_a_run_of_another_specification_is_refused(tmp_path: Path, whole: mlo.Run) -> None:
    one = break_off(penalty(), tmp_path / "one", at=5)
    other = break_off(penalty("seed=1"), tmp_path / "other", at=5)
    shutil.rmtree(one / "checkpoint")
    shutil.copytree(other / "checkpoint", one / "checkpoint")
    with pytest.raises(mlo.UserError, match="belongs to another specification"):
        mlo.resume(one, quiet=True)


def test_a_run_that_is_going_on_is_left_to_its_process(tmp_path: Path) -> None:
    folder = break_off(penalty(), tmp_path / "run", at=5)
    with (
        _lock.alone(folder / ".lock", busy=pytest.fail),
        pytest.raises(mlo.UserError, match=r"still going on, in process \d+ on"),
    ):
        mlo.resume(folder, quiet=True)
    mlo.resume(folder, quiet=True)


OWN = """
import random
import numpy, torch, mlo

def judge(values, split, *, model, totals, complete):
    drawn = {"numpy": numpy.random.normal(), "python": random.gauss(0, 1), "threads": float(torch.get_num_threads())}
    return mlo.Evaluation(metrics={**drawn, "size": values["point"].square().sum().item()})

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    return mlo.Problem(
        variables={"point": lambda: torch.ones(3)},
        objectives={"square": lambda values, batch: (values["point"].square().sum(), {"seen": values["point"].sum()})},
        streams={"numbers": [1.0, 2.0]},
        evaluate=judge,
    )
"""
GRAPH = """
problem: own_start_problem
iterations: 6
levels: {point: {variables: point, objective: square, BATCH optimizer: {sgd: {learning_rate: 0.1}}}}
evaluation: {every: 1}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own_start_problem.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(GRAPH.replace("BATCH ", ""))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "own_start_problem", raising=False)
    return tmp_path


def test_global_generators_are_seeded_kept_and_left_as_they_were(own: Path) -> None:
    import random

    import numpy

    spec = mlo.load(own / "own.yaml", imports=["own_start_problem"])

    def states() -> tuple:
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    whole = mlo.run(spec, own / "whole", quiet=True)
    folder = break_off(spec, own / "broken", at=3)
    assert states() == before
    _ = random.random(), numpy.random.normal(), torch.rand(1)
    assert numbers(mlo.resume(folder, quiet=True)) == numbers(whole)


def test_imports_and_threads_are_restored_in_a_new_process(own: Path, begin_mlo) -> None:
    spec = mlo.load(own / "own.yaml", imports=["own_start_problem"])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        folder = break_off(spec, own / "broken", at=3)
    finally:
        torch.set_num_threads(before)
    elsewhere = own / "elsewhere"
    elsewhere.mkdir()
    process = begin_mlo(elsewhere, "resume", str(folder), "--quiet")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    threads = [
        line["evaluation"]["validation.threads"] for line in mlo.open_run(folder).metrics if "evaluation" in line
    ]
    assert threads == [2.0] * 6
    assert mlo.open_run(folder).spec.imports == ("own_start_problem",)


def test_a_plain_iterable_is_said_not_to_be_exact(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "own.yaml").write_text(GRAPH.replace("BATCH", "batch: numbers,"))
    spec = mlo.load(own / "own.yaml", imports=["own_start_problem"])
    folder = break_off(spec, own / "broken", at=3)
    mlo.resume(folder)
    out = capsys.readouterr().out
    assert "resumed from iteration 3" in out
    assert "notice: stream 'numbers' is a plain iterable" in out
    (life,) = json.loads((folder / "run.json").read_text())["resumed"]
    assert life["iteration"] == 3
    assert life["exact"] is False


def test_a_changed_problem_is_refused(own: Path) -> None:
    spec = mlo.load(own / "own.yaml", imports=["own_start_problem"])
    folder = break_off(spec, own / "broken", at=3)
    import own_start_problem

    build = own_start_problem.build
    wider = lambda settings, context: mlo.Problem(  # noqa: E731
        variables={"point": lambda: torch.ones(4)},
        objectives=build(settings, context).objectives,
        evaluate=own_start_problem.judge,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_start_problem, "build", wider)
        with pytest.raises(
            mlo.UserError, match=r"has float32 \[3\] for 'values.point' where the graph has float32 \[4\]"
        ):
            mlo.resume(folder, quiet=True)
