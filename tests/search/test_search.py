"""What `mlo search` runs, finds, prints, writes, refuses and exits with."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlo
from mlo._search import Asked, Sampler, space_of
from mlo._search._trials import proposed
from mlo.spec import load

GRID = ("bowl.yaml", "--over", "data.x=0.1:1.0:0.1")


def result(out: str = "runs/search/bowl") -> dict:
    return json.loads(Path(out, "search.json").read_text())


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if not key.startswith("seconds")}
    return [without_clocks(each) for each in value] if isinstance(value, list) else value


def times(out: str = "runs/search/bowl") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(out).rglob("seed-*/*") if path.is_file()}


def test_a_grid_finds_the_best_value_says_how_close_the_second_is_and_gives_the_line_to_copy(search) -> None:
    code, out, err = search(*GRID, "--seeds", "3", "data.tilt=0.1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].strip() == "bowl: validation.distance, smaller is better"
    found = result()
    assert [trial["overrides"][0] for trial in found["trials"][:2]] == ["data.x=0.3", "data.x=0.4"]
    assert sorted(trial["overrides"][0] for trial in found["trials"]) == [f"data.x={x}" for x in texts()]
    assert found["best"] == ["data.x=0.3"]

    def metric(x: float, seed: int) -> float:
        return (x - 0.37) ** 2 + 9 + seed + 0.1 * seed * x

    for trial in found["trials"]:
        x = float(trial["overrides"][0].removeprefix("data.x="))
        assert trial["mean"] == pytest.approx(statistics.mean(metric(x, seed) for seed in range(3)), rel=1e-12)
    differences = [metric(0.4, seed) - metric(0.3, seed) for seed in range(3)]
    error = statistics.stdev(differences) / math.sqrt(3)
    second = next(line for line in lines if line.startswith("second: "))
    assert second == (
        f"second: data.x=0.4: {statistics.mean(differences):+.4g} ± {error:.2g} from the best over 3 pairs "
        f"(t = {statistics.mean(differences) / error:+.1f})"
    )
    close = [trial["difference"]["t"] for trial in found["trials"][1:]]
    assert f"{sum(abs(t) < 2 for t in close)} of 9 others are no further from the best than |t| < 2" in out
    assert [line.split()[0] for line in lines if line.endswith("← best  ")] == ["0.3"]
    assert lines[-1] == "data.x=0.3"
    assert (
        load("bowl.yaml", "data.tilt=0.1", lines[-1], "seed=2", imports=["bowl"]).hash
        == (mlo.open_run(Path("runs/search/bowl/data.x=0.3/seed-2")).summary["spec_hash"])
    )
    assert err.splitlines()[0] == "10 trials × 3 seeds in runs/search/bowl: 0 of 30 are done"
    assert err.splitlines()[-1].startswith("data.x=1.0, seed 2: finished in ")


def texts() -> list[str]:
    return [f"0.{digit}" for digit in range(1, 10)] + ["1.0"]


def test_what_is_done_is_not_run_again_and_another_metric_and_more_seeds_can_be_asked_for(search) -> None:
    search(*GRID, "--quiet")
    before = times()
    code, out, err = search(*GRID, "--metric", "validation.score")
    assert (code, err) == (0, "10 trials × 1 seed in runs/search/bowl: 10 of 10 are done\n")
    assert "bowl: validation.score, larger is better" in out
    assert "on one seed, which says nothing of other seeds" in out
    assert out.splitlines()[-1] == "data.x=0.4"
    assert result()["close"] is None
    assert times() == before
    assert search(*GRID, "--metric", "validation.score", "--minimise")[1].splitlines()[-1] == "data.x=1.0"
    assert search("bowl.yaml", "--over", "data.x=0.2:0.6:0.2", "--seeds", "2")[2].startswith(
        "3 trials × 2 seeds in runs/search/bowl: 3 of 6 are done"
    )
    assert search("bowl.yaml", "--over", "data.x=0.4", "data.y=1", "--quiet")[0] == 2


def test_of_equal_trials_the_first_in_the_order_of_the_grid_is_taken_and_the_ties_are_told(search) -> None:
    over = ("--over", "data.y=3,1,2", "--over", "data.x=0.9:1.0:0.1")
    code, out, _ = search("bowl.yaml", *over, "--metric", "validation.flat", "--seeds", "2")
    assert code == 0
    pairs = [f"data.y={y} data.x={x}" for y in (3, 1, 2) for x in (0.9, 1.0)]
    assert [" ".join(trial["overrides"]) for trial in result()["trials"]] == pairs
    assert "second: data.y=3, data.x=1.0: the same as the best on every one of 2 seeds" in out
    assert "5 of 5 others are no further from the best than |t| < 2; 5 with exactly its mean" in out
    assert out.splitlines()[-1] == "data.y=3 data.x=0.9"


def test_lists_hold_any_values_and_the_line_is_quoted_as_a_shell_needs_it(search) -> None:
    optimizers = "adam,{sgd: {learning_rate: 0.2}}"
    code, out, _ = search(
        "bowl.yaml", "--over", f"levels.point.optimizer={optimizers}", "--over", "data.kind=square, round"
    )
    assert code == 0
    assert shlex.split(out.splitlines()[-1]) == ["levels.point.optimizer=adam", "data.kind=round"]
    code, out, _ = search("bowl.yaml", "--over", "levels.point.optimizer={sgd: {learning_rate: 0.2}}", "--out", "one")
    (change,) = shlex.split(out.splitlines()[-1])
    assert load("bowl.yaml", change, imports=["bowl"]).levels["point"].optimizer.options == {"learning_rate": 0.2}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_goes_on_where_it_was_and_gives_the_trials_of_one_that_was_left_alone(search, sampler) -> None:
    asked = ("bowl.yaml", "--over", "data.rate=log:1e-3:1e3", "--over", "data.y=0:5:1", "--sampler", sampler)
    assert search(*asked, "--trials", "5", "--quiet")[0] == 0
    before, five = times(), {tuple(trial["overrides"]) for trial in result()["trials"]}
    assert search(*asked, "--trials", "14", "--quiet")[0] == 0
    assert before.items() <= times().items()
    found = result()
    assert len(found["trials"]) == 14
    assert five < {tuple(trial["overrides"]) for trial in found["trials"]}
    search(*asked, "--trials", "14", "--quiet", "--out", "alone")
    assert without_clocks(found) == without_clocks(result("alone"))
    for trial in found["trials"]:
        rate, y = (change.partition("=")[2] for change in trial["overrides"])
        assert 1e-3 <= float(rate) <= 1e3
        right = math.log10(float(rate)) ** 2 + (int(y) - 3) ** 2 + 0.37**2
        assert trial["mean"] == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("maximise", [False, True])
def test_the_parzen_estimator_is_told_which_way_is_better(maximise) -> None:
    asked = Asked(
        graph="bowl.yaml",
        name="bowl",
        changes=(),
        imports=(),
        space=space_of(["rate=log:1e-3:1e3"]),
        seeds=(0,),
        metric="validation.x",
        maximise=maximise,
        sampler=Sampler.TPE,
        trials=30,
        out=Path("nowhere"),
    )

    def powers(point: tuple[str, ...]) -> float:
        return abs(math.log10(float(point[0].removeprefix("rate="))))

    found = list(map(powers, proposed(asked, powers)))
    later = statistics.median(found[10:])  # the first ten are random
    assert later > 1.5 if maximise else later < 1.5  # of uniform powers in [−3, 3] the median is 1.5


def test_random_trials_are_different_and_as_many_as_there_can_be(search) -> None:
    asked = ("bowl.yaml", "--over", "data.y=0:3:1", "--sampler", "random")
    assert search(*asked, "--trials", "4", "--quiet")[0] == 0
    assert sorted(trial["overrides"] for trial in result()["trials"]) == [[f"data.y={y}"] for y in range(4)]


def test_a_failed_cell_is_told_and_its_trial_is_never_the_best(search) -> None:
    code, out, _ = search(*GRID, "--seeds", "2", "data.wrong=0.4")
    assert code == 3
    assert out.splitlines()[-1] == "data.x=0.3"
    last = result()["trials"][-1]
    assert last["overrides"] == ["data.x=0.4"]
    assert list(last["values"]) == ["0"]
    assert last["mean"] < result()["trials"][0]["mean"]
    assert "the loss is not finite" in last["failed"]["1"]
    assert "data.x=0.4, seed 1, failed (exit code 3): iteration 1: level 'point', step 1: the loss is not finite" in out
    again = search(*GRID, "--seeds", "2", "data.wrong=0.4")
    assert again[0] == 3
    assert again[2] == "10 trials × 2 seeds in runs/search/bowl: 20 of 20 are done, 1 of them failed\n"


def test_where_every_trial_has_failed_there_is_no_best(search) -> None:
    code, out, _ = search("bowl.yaml", "--over", "data.x=0.4", "--seeds", "0-1", "data.wrong=0.4")
    assert code == 3
    assert "no trial has a number for every seed: there is no best one" in out
    assert "to put on" not in out
    assert "difference" not in out
    assert result()["best"] is None
    asked = (
        "bowl.yaml",
        "--over",
        "levels.point.optimizer.sgd.learning_rate=log:1e30:1e35",
        "iterations=9",
        "--seeds",
        "2",
    )
    code, _, _ = search(
        *asked, "--trials", "3", "--out", "wild", "--quiet"
    )  # nothing to tell the estimator but failures
    assert code == 3
    assert len(result("wild")["trials"]) == 3


def test_an_interrupt_prints_what_is_there_exits_130_and_the_same_command_goes_on(search, monkeypatch) -> None:
    step, taken = mlo.Graph.step, 0

    def interrupted(*arguments):
        nonlocal taken
        taken += 1
        if taken == 4:  # in the second trial of two iterations each
            raise KeyboardInterrupt
        return step(*arguments)

    asked = ("bowl.yaml", "--over", "data.x=0.3:0.5:0.1")
    with monkeypatch.context() as patched:
        patched.setattr(mlo.Graph, "step", interrupted)
        code, out, err = search(*asked)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; the same command goes on"
    assert out.splitlines()[-1] == "data.x=0.3"
    assert "data.x=0.4, seed 0: not finished" in out
    assert [trial["unfinished"] for trial in result()["trials"]] == [[], [0], [0]]
    code, out, err = search(*asked)
    assert (code, out.splitlines()[-1]) == (0, "data.x=0.4")
    assert "data.x=0.4, seed 0: goes on from iteration 1" in err


def test_what_trials_start_from_is_run_once(search) -> None:
    assert search("first.yaml", "--over", "levels.lower.steps=1:3:1", "--quiet")[0] == 0
    (start,) = Path("runs/start").iterdir()
    ran = mlo.open_run(start).summary
    assert ran["iterations"] <= Path("noted").stat().st_size < 2 * ran["iterations"]
    assert Path("runs/search/first/levels.lower.steps=2/seed-0/summary.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bowl.yaml",), "nothing to search: --over KEY=VALUES"),
        (("bowl.yml", "--over", "data.x=1"), "Did you mean 'bowl.yaml'?"),
        ((*GRID, "--metric", "test.distance"), "--metric test.distance: a search looks at validation metrics only"),
        ((*GRID, "--metric", "test.distance"), "Did you mean 'validation.distance'?"),
        ((*GRID, "--metric", "validaton.distance"), "expected a metric of the validation split, validation.NAME."),
        (
            (*GRID, "--metric", "validation.distanc"),
            "no metric named 'validation.distanc'. Did you mean 'validation.dist",
        ),
        ((*GRID, "evaluation.select=null"), "bowl.yaml: selects by no metric: say with --metric"),
        ((*GRID, "evaluation=null"), "bowl.yaml: has no `evaluation`, so there is nothing to search by"),
        ((*GRID, "seed=3"), "seed=3: the seeds of a search are those of --seeds"),
        ((*GRID, "--trials", "4", "--sampler", "grid"), "--trials 4: a grid takes all 10; leave it out"),
        ((*GRID, "--trials", "11"), "--trials 11: there are 10 combinations; --sampler grid takes all"),
        ((*GRID, "--sampler", "random"), "--trials is missing: how many the sampler random takes"),
        (("bowl.yaml", "--over", "data.rate=log:1:2"), "--trials is missing: how many the sampler tpe takes"),
        (
            ("bowl.yaml", "--over", "data.rate=log:1:2", "--sampler", "grid"),
            "log:LOW:HIGH is continuous and has no grid",
        ),
        ((*GRID, "--sampler", "gird"), "Invalid value for '--sampler'"),
        ((*GRID, "--seeds", "x"), "--seeds x: expected how many"),
        ((*GRID, "--out", "bowl.yaml"), "bowl.yaml: not a folder; choose another with --out"),
    ],
)
def test_a_mistake_is_answered_with_2_before_anything_is_run(search, tmp_path, arguments, message) -> None:
    code, out, err = search(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.glob("runs/search/**/checkpoint"))


def test_unknown_keys_and_wrong_values_are_those_of_run_each_said_once_and_all_at_once(search) -> None:
    over = ("--over", "levels.point.optimizer.sgd.learnin_rate=0.1:1.0:0.1", "--over", "levels.pont.steps=1,2")
    code, out, err = search("bowl.yaml", *over, "--over", "iterations=5,many,7")
    assert (code, out) == (2, "")
    places = [line for line in err.splitlines() if line.startswith("<override ")]
    assert [line.partition(">")[0] for line in places] == [
        "<override levels.point.optimizer.sgd.learnin_rate=0.1",
        "<override levels.pont.steps=1",
        "<override iterations=many",
    ]
    assert "unknown option. Did you mean 'learning_rate'?" in places[0]
    assert "Did you mean 'point'?" in places[1]
    code, _, err = search("bowl.yaml", "--over", "data.xx=0.1:0.5:0.1", "--over", "data.y=1,2.5")
    assert code == 2
    assert err.count("Did you mean 'x'?") == 1
    assert "<override data.y=2.5>: data.y: " in err


def test_help_and_mistakes_are_answered_without_torch_or_optuna(tmp_path) -> None:
    program = (
        "import sys\nfrom mlo.cli import main\ntry:\n    main({arguments})\n"
        "except SystemExit as exited:\n    print(exited.code, sorted({{'torch', 'optuna', 'numpy'}} & set(sys.modules)))\n"
    )
    wrong = [
        "search",
        "penalty",
        "--over",
        "levels.weights.optimizer.sgd.learnin_rate=0.1:1.0:0.1",
        "--metric",
        "validation.top1",
    ]
    for arguments, answer in ((["search", "--help"], "0 []"), (wrong, "2 []")):
        done = subprocess.run(
            [sys.executable, "-c", program.format(arguments=arguments)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == answer


def test_a_search_that_is_killed_goes_on_and_ends_as_one_that_was_left_alone(search, begin, tmp_path) -> None:
    asked = ("bowl.yaml", "--over", "data.x=0.1:0.6:0.1", "--seeds", "2", "iterations=20", "data.pause=0.005")
    process = begin(*asked, "--jobs", "2")
    for _ in range(2400):
        if list(tmp_path.glob("runs/search/bowl/*/seed-0/summary.json")) or process.poll() is not None:
            break
        time.sleep(0.025)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    done = times()
    finished = {path.parent for path in done if path.name == "summary.json"}
    assert 0 < len(finished) < 12
    code, _, err = search(*asked)
    assert code == 0
    assert err.startswith(f"6 trials × 2 seeds in runs/search/bowl: {len(finished)} of 12 are done")
    assert {path: when for path, when in times().items() if path.parent in finished} == {
        path: when for path, when in done.items() if path.parent in finished
    }
    search(*asked, "--out", "alone", "--quiet")
    assert without_clocks(result()) == without_clocks(result("alone"))
