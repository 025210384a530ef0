"""A run folder holds what it should, twice the same, and survives what goes wrong."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mlo
from mlo import _run
from mlo._run import _checkpoint

ROOT = Path(__file__).parent.parent.parent


def penalty(*overrides: str) -> mlo.Spec:
    return mlo.load(ROOT / "graphs" / "penalty.yaml", "iterations=6", "evaluation.every=2", *overrides)


def without_clocks(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def test_the_folder_holds_spec_metrics_summary_checkpoints_and_events(tmp_path: Path) -> None:
    run = mlo.run(penalty(), tmp_path / "run", quiet=True)
    folder = run.folder
    assert {path.name for path in folder.iterdir()} == {
        "run.json",
        "spec.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint",
        "tensorboard",
    }
    assert mlo.load(folder / "spec.yaml") == penalty()
    steps = [line for line in run.metrics if "losses" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]["losses"]) == {"weights", "penalty"}
    assert [line["iteration"] for line in run.metrics if "evaluation" in line] == [2, 4, 6]
    assert all("seconds" in line for line in run.metrics)
    summary = run.summary
    assert summary["seconds_per_iteration"] == statistics.median(line["seconds_of_step"] for line in steps)
    assert 0 < sum(line["seconds_of_step"] for line in steps) < summary["seconds"]
    assert all("seconds_of_step" not in line for line in run.metrics if "evaluation" in line)
    assert summary["seed"] == 0
    assert summary["spec_hash"] == penalty().hash
    assert summary["counts"] == summary["predicted_counts"] == {"gradients": 126, "products": 120, "pullbacks": 6}
    assert summary["versions"]["torch"] == torch.__version__
    assert {"validation.balanced_accuracy", "test.balanced_accuracy"} <= set(summary["metrics"])
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("losses/weights")]
    assert losses == pytest.approx([line["losses"]["weights"] for line in steps], rel=1e-6)


def test_what_a_method_reports_is_in_the_metrics(tmp_path: Path) -> None:
    method = "levels.weights.hypergradient={conjugate_gradient: {iterations: 3, damping: 0.1}}"
    run = mlo.run(penalty(method), tmp_path / "run", quiet=True)
    for line in run.metrics:
        if "losses" in line:
            report = line["reports"]["penalty"]["weights"]
            assert report["iterations"] == 3
            assert 0 < report["residual"] < 1
            assert report["negative_curvature"] == 0
    assert run.summary["counts"] == run.summary["predicted_counts"]


def test_the_same_seed_gives_the_same_numbers_bit_for_bit_and_another_seed_others(tmp_path: Path) -> None:
    runs = [mlo.run(penalty(), tmp_path / name, quiet=True) for name in ("one", "two")]
    other = mlo.run(penalty("seed=1"), tmp_path / "three", quiet=True)
    first, second = (without_clocks(run.metrics) for run in runs)
    assert first == second
    tensors = [
        load_file(
            run.folder / "checkpoint" / json.loads((run.folder / "checkpoint/latest.json").read_text())["tensors"]
        )
        for run in runs
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert without_clocks(other.metrics) != first


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(mlo.UserError, match="must be new or empty"):
        mlo.run(penalty(), tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_opened_run_gives_a_plain_module_with_the_trained_numbers(tmp_path: Path) -> None:
    run = mlo.run(penalty(), tmp_path / "run", quiet=True)
    module = mlo.open_run(run.folder).module("weights", "latest")
    assert type(module) is torch.nn.Linear
    assert not module.training
    state = run.state("latest")
    assert torch.equal(module.weight, state.values["weights"]["weight"])
    with pytest.raises(mlo.UserError, match="holds tensors and no module"):
        run.module("penalty")
    with pytest.raises(mlo.UserError, match="not a run folder"):
        mlo.open_run(tmp_path)


def test_a_checkpoint_restores_the_state_bit_for_bit_and_the_run_goes_on_the_same(tmp_path: Path) -> None:
    graph, problem = penalty().build()
    batches = {
        name: problem.streams[stream].draw(None) for name, stream in (("weights", "train"), ("penalty", "validation"))
    }
    state = graph.init(seed=3)
    for _ in range(3):
        state, _ = graph.step(state, batches)
    _checkpoint.save(tmp_path, "latest", _checkpoint.Checkpoint(state=state, totals={}), spec_hash="x")
    restored = _checkpoint.load(tmp_path, "latest", spec_hash="x").state
    assert (restored.iteration, restored.seed) == (3, 3)
    ahead, again = graph.step(state, batches)[0], graph.step(restored, batches)[0]
    assert torch.equal(ahead.values["penalty"], again.values["penalty"])
    assert torch.equal(ahead.values["weights"]["weight"], again.values["weights"]["weight"])
    for level, memory in ahead.optimizers.items():
        assert memory.count == again.optimizers[level].count


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "latest.json").unlink(), "no such checkpoint"),
        (lambda folder: (folder / "latest.json").write_text('{"format": 3'), "damaged"),
        (
            lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"short"),
            "damaged, or of another checkpoint",
        ),
        (
            lambda folder: (folder / "latest.json").write_text(
                (folder / "latest.json").read_text().replace('"format": 3', '"format": 7')
            ),
            "format 7",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_its_reason(tmp_path: Path, damage, message: str) -> None:
    graph, _ = penalty().build()
    _checkpoint.save(tmp_path, "latest", _checkpoint.Checkpoint(state=graph.init(), totals={}), spec_hash="x")
    damage(tmp_path)
    with pytest.raises(mlo.UserError, match=message):
        _checkpoint.load(tmp_path, "latest", spec_hash="x")


def test_a_checkpoint_of_another_specification_is_refused(tmp_path: Path) -> None:
    graph, _ = penalty().build()
    _checkpoint.save(tmp_path, "latest", _checkpoint.Checkpoint(state=graph.init(), totals={}), spec_hash="x")
    with pytest.raises(mlo.UserError, match="another specification"):
        _checkpoint.load(tmp_path, "latest", spec_hash="y")


def test_an_interrupt_leaves_the_last_finished_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = mlo.Graph.step

    def interrupted(graph: mlo.Graph, state: mlo.State, batches: object) -> object:
        if state.iteration == 4:
            raise KeyboardInterrupt
        return step(graph, state, batches)

    monkeypatch.setattr(mlo.Graph, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mlo.run(penalty(), tmp_path / "run", quiet=True)
    assert mlo.open_run(tmp_path / "run").state("latest").iteration == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_number_that_is_not_finite_stops_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(mlo.NumericalError) as raised:
        mlo.run(penalty("levels.weights.optimizer.sgd.learning_rate=1e30"), tmp_path / "run", quiet=True)
    assert raised.value.level == "weights"
    state = mlo.open_run(tmp_path / "run").state("latest")
    assert state.iteration == raised.value.iteration - 1
    assert all(bool(tensor.isfinite().all()) for tensor in state.values["weights"].values())


def test_threads_are_set_for_the_run_and_restored(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    mlo.run(penalty("threads=2"), tmp_path / "run", quiet=True)
    assert torch.get_num_threads() == before


GAME = """
problem: penalty
iterations: 3
start: {penalty: {graph: below.yaml, with: {iterations: 2}}}
levels:
  weights: {variables: linear, objective: penalised, given: [penalty], batch: train, optimizer: {sgd: {learning_rate: 0.1}}}
  penalty: {variables: log_penalty, objective: classification, subject_to: [weights], batch: validation, optimizer: adam}
"""


def test_a_level_starts_where_another_graph_ended_and_the_second_time_from_the_cache(tmp_path: Path) -> None:
    below = GAME.replace("start: {penalty: {graph: below.yaml, with: {iterations: 2}}}\n", "").replace(
        "adam", "{adam: {learning_rate: 0.5}}"
    )
    (tmp_path / "below.yaml").write_text(below)
    (tmp_path / "above.yaml").write_text(GAME)
    spec, cache = mlo.load(tmp_path / "above.yaml"), tmp_path / "cache"
    first = mlo.run(spec, tmp_path / "first", cache=cache, quiet=True)
    (folder,) = set(first.summary["starts"].values())
    written = (Path(folder) / "metrics.jsonl").read_text()
    second = mlo.run(spec, tmp_path / "second", cache=cache, quiet=True)
    assert (Path(folder) / "metrics.jsonl").read_text() == written  # it did not run again
    assert without_clocks(first.metrics) == without_clocks(second.metrics)
    fresh = mlo.run(spec, tmp_path / "third", cache=tmp_path / "other", quiet=True)
    assert without_clocks(first.metrics) == without_clocks(fresh.metrics)  # cached and fresh go on bit for bit alike
    started = mlo.open_run(folder).state().values["penalty"]
    assert started != -4.0
    moved = first.state("latest").values["penalty"]
    assert abs((moved - started).item()) < 0.01  # three Adam steps of 1e-3


def test_an_unfinished_start_is_not_mistaken_for_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below.yaml").write_text(
        GAME.replace("start: {penalty: {graph: below.yaml, with: {iterations: 2}}}\n", "")
    )
    (tmp_path / "above.yaml").write_text(GAME)
    spec, cache = mlo.load(tmp_path / "above.yaml"), tmp_path / "cache"
    step = mlo.Graph.step
    monkeypatch.setattr(mlo.Graph, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mlo.run(spec, tmp_path / "first", cache=cache, quiet=True)
    (left,) = cache.iterdir()
    assert left.name.startswith(".")  # the next run goes on there; it is not yet a start
    assert not (left / "summary.json").exists()
    monkeypatch.setattr(mlo.Graph, "step", step)
    mlo.run(spec, tmp_path / "second", cache=cache, quiet=True)


def test_a_selected_state_is_the_best_by_its_metric_and_the_later_on_a_tie() -> None:
    selection = _run._evaluate.Selection("validation.accuracy")
    seen = [(1, 50.0), (2, 70.0), (3, 70.0), (4, 60.0)]
    assert [selection.takes({"validation.accuracy": value}, at) for at, value in seen] == [True, True, True, False]
    assert (selection.iteration, selection.best) == (3, 70.0)
    smaller = _run._evaluate.Selection("validation.loss")
    assert [smaller.takes({"validation.loss": value}, at) for at, value in ((1, 0.5), (2, 0.7))] == [True, False]
    with pytest.raises(
        mlo.UserError, match=r"no metric named 'validation.acuracy'. Did you mean 'validation.accuracy'"
    ):
        _run._evaluate.Selection("validation.acuracy").takes({"validation.accuracy": 1.0}, 1)
