"""What `mlo table` runs, prints, writes, refuses and exits with; in this process."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import mlo
from mlo._run._lock import alone
from mlo.cli import main
from mlo.cli._table import seeds_of

BOTH = ("plain.yaml", "slower.yaml", "--seeds")
HEAD = "| {} | seeds | mean ± deviation | difference ± error | t | pairs | gradients | products | seconds |"


def metric(graph: str, seed: int, name: str = "test.distance", out: str = "runs/table") -> float:
    return mlo.open_run(Path(out, graph, f"seed-{seed}")).summary["metrics"][name]


def test_it_runs_every_cell_in_a_folder_of_its_own_and_prints_markdown_where_there_is_no_terminal(table) -> None:
    code, out, err = table(*BOTH, "3")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == HEAD.format("test.distance")
    plain = [metric("plain", seed) for seed in range(3)]
    slower = [metric("slower", seed) for seed in range(3)]
    differences = [a - b for a, b in zip(slower, plain, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(3)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    decimals = len(cells[2].split(" ± ")[0].partition(".")[2])
    assert cells[:6] == [
        "slower",
        "3",
        f"{statistics.mean(slower):.{decimals}f} ± {statistics.stdev(slower):.{decimals}f}",
        f"{statistics.mean(differences):+.{decimals}f} ± {error:.{decimals}f}".replace("-", "−"),
        f"{statistics.mean(differences) / error:+.1f}".replace("-", "−"),
        "3",
    ]
    assert decimals >= 2
    assert cells[6:8] == ["120", "80"]  # 40 × (2 + 1) gradients, 40 × 2 products
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][3:6] == ["", "", ""]  # the control
    assert lines[5].startswith("Seeds 0–2. Mean ± standard deviation over seeds; paired difference from plain ±")
    assert Path("runs/table/table.md").read_text() == out
    assert err.splitlines()[0] == "2 graphs × 3 seeds in runs/table: 0 of 6 are done"
    assert err.splitlines()[-1].startswith("slower, seed 2: finished in ")
    assert err.splitlines()[-1].endswith("(6 of 6)")


def test_finished_cells_are_not_run_again_and_another_metric_and_control_can_be_asked_for(table) -> None:
    table(*BOTH, "2", "--quiet")
    files = {path: path.stat().st_mtime_ns for path in Path("runs/table").rglob("seed-*/*") if path.is_file()}
    code, out, err = table(*BOTH, "2", "--metric", "test.gap", "--metric", "validation.gap", "--against", "slower")
    assert (code, err) == (0, "2 graphs × 2 seeds in runs/table: 4 of 4 are done\n")
    assert HEAD.format("test.gap") in out
    assert HEAD.format("validation.gap") in out
    assert "paired difference from slower" in out
    assert files == {path: path.stat().st_mtime_ns for path in Path("runs/table").rglob("seed-*/*") if path.is_file()}
    assert table(*BOTH, "0,1", "--quiet")[:2] == (0, "")
    assert table("plain.yaml", "--seeds", "3", "--out", "runs/table")[2].splitlines()[0].endswith("2 of 3 are done")


def test_the_time_of_an_iteration_can_be_compared_without_evaluations(table) -> None:
    slow = ("data.pause=0.004", "iterations=5", "evaluation.every=1", "--metric", "seconds_per_iteration")
    code, out, _ = table(*BOTH, "2", *slow)
    assert code == 0
    assert HEAD.format("seconds_per_iteration") in out
    graphs = {each["name"]: each for each in json.loads(Path("runs/table/table.json").read_text())["graphs"]}
    plain, slower = (graphs[name]["metrics"]["seconds_per_iteration"] for name in ("plain", "slower"))
    assert plain["mean"] >= 3 * 0.004  # three steps of the lower level; the other graph takes two
    assert slower["mean"] >= 2 * 0.004
    assert slower["difference"]["n"] == 2
    summary = mlo.open_run(Path("runs/table/plain/seed-0")).summary
    assert summary["seconds_per_iteration"] * 5 < summary["seconds"]


def test_csv_and_json_hold_the_same_numbers_and_json_those_of_every_cell(table) -> None:
    code, out, _ = table(*BOTH, "2", "--format", "json")
    assert code == 0
    assert out == Path("runs/table/table.json").read_text()
    found = json.loads(out)
    assert (found["seeds"], found["against"], found["metrics"]) == ([0, 1], "plain", ["test.distance"])
    slower = found["graphs"][1]
    assert slower["cells"][1]["metrics"]["validation.gap"] == metric("slower", 1, "validation.gap")
    assert slower["metrics"]["test.distance"]["mean"] == statistics.mean(metric("slower", s) for s in (0, 1))
    code, out, _ = table(*BOTH, "2", "--format", "csv")
    assert out == Path("runs/table/table.csv").read_text()
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["graph"] for row in rows] == ["plain", "slower"]
    assert float(rows[1]["mean"]) == slower["metrics"]["test.distance"]["mean"]
    assert float(rows[1]["error"]) == slower["metrics"]["test.distance"]["difference"]["error"]
    assert rows[0]["difference"] == ""
    code, text, _ = table(*BOTH, "2", "--format", "text")
    assert "difference ± error" in text
    assert "|" not in text


def test_numbers_that_went_wrong_are_a_failed_cell_with_level_step_and_term_and_no_part_of_the_mean(table) -> None:
    wrong = ("data.seed=1", "data.trouble=nan")
    code, out, _ = table(*BOTH, "3", *wrong)
    assert code == 3
    row = out.splitlines()[2]
    assert row.startswith("| plain | 2 of 3; seed 1 failed: iteration ")
    assert "level 'upper', step 1: the loss is not finite | " in row
    left = [metric("plain", seed) for seed in (0, 2)]
    found = json.loads(Path("runs/table/table.json").read_text())
    assert found["graphs"][0]["metrics"]["test.distance"]["mean"] == statistics.mean(left)
    assert found["graphs"][1]["metrics"]["test.distance"]["difference"]["n"] == 2
    (failed,) = found["graphs"][0]["failed"]
    assert (failed["seed"], failed["code"], failed["level"], failed["step"]) == (1, 3, "upper", 1)
    assert failed["term"] == "the loss"
    assert "- plain, seed 1, failed (exit code 3): iteration" in out
    again = table(*BOTH, "3", *wrong)
    assert again[:2] == (3, out)  # it would go wrong again
    assert again[2] == "2 graphs × 3 seeds in runs/table: 6 of 6 are done, 2 of them failed\n"


@pytest.mark.parametrize(
    ("trouble", "code", "reason"),
    [("bug", 1, "IndexError: list index out of range"), ("memory", 4, "out of memory: ")],
)
def test_what_may_be_mended_is_tried_again_by_the_next_command_and_goes_on(table, trouble, code, reason) -> None:
    wrong = ("data.seed=1", f"data.trouble={trouble}")
    found, out, err = table("plain.yaml", "--seeds", "2", *wrong)
    assert found == code
    assert f"| plain | 1 of 2; seed 1 failed: {reason}" in out
    assert f"- plain, seed 1, failed (exit code {code}): {reason}" in out
    assert "(2 of 2): " in err
    assert (Path("runs/table/plain/seed-1/traceback.txt").exists()) == (trouble == "bug")
    Path("mended").touch()
    found, out, _ = table("plain.yaml", "--seeds", "2", *wrong)
    assert (found, "failed" in out) == (0, False)
    assert out.splitlines()[2].startswith("| plain | 2 |")


def test_a_mistake_that_only_a_run_can_find_is_a_failed_cell(table) -> None:
    code, out, _ = table("plain.yaml", "--seeds", "1", "evaluation.select=validation.distanc")
    assert code == 2
    assert "plain, seed 0, failed (exit code 2): <override evaluation.select=validation.distanc>: evaluation.sel" in out
    assert "Did you mean 'validation.distance'?" in out


def test_a_metric_that_is_not_a_number_is_a_failure_of_that_metric_alone(table) -> None:
    wrong = ("plain.yaml", "--seeds", "2", "data.seed=0", "data.trouble=metric")
    assert table(*wrong)[0] == 0
    code, out, _ = table(*wrong, "--metric", "test.odd", "--metric", "test.gap")
    assert code == 3
    assert "| plain | 1 of 2; seed 0 failed: test.odd is not finite | 1.000 |" in out
    assert [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| plain")][1] == "2"


def test_folders_of_another_specification_are_refused_with_the_difference(table) -> None:
    table(*BOTH, "2", "--quiet")
    before = Path("runs/table/plain/seed-0/summary.json").read_bytes()
    code, out, err = table(*BOTH, "2", "iterations=50", "levels.lower.optimizer.sgd.momentum=0.5")
    assert (code, out) == (2, "")
    assert err.startswith(
        "runs/table/plain/seed-0: holds another run than is asked for:\n"
        "  iterations: 40 there, 50 here\n"
        "  levels.lower.optimizer.sgd.momentum: nothing there, 0.5 here\n"
        "  Choose another folder with --out, or remove this one.\n"
        "runs/table/slower/seed-0: holds"
    )
    assert err.endswith("2 more folders hold other runs.\n")
    assert Path("runs/table/plain/seed-0/summary.json").read_bytes() == before
    assert table(*BOTH, "2", "checkpoint.every=9", "--quiet") == (0, "", "")  # that decides no number


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("summary.json", "", "damaged: Expecting value"),
        ("summary.json", "[]", "damaged: expected a mapping"),
        ("summary.json", "{}", "damaged: 'selected' is missing"),
        ("failed.json", '{"code": 1}', "damaged: 'reason' is missing"),
    ],
)
def test_a_damaged_file_of_a_cell_is_named(table, file, text, said) -> None:
    table("plain.yaml", "--seeds", "1")
    cell = Path("runs/table/plain/seed-0")
    (cell / "summary.json").unlink()
    if text == "{}":
        text = json.dumps({"spec_hash": json.loads((cell / "run.json").read_text())["spec_hash"]})
    (cell / file).write_text(text)
    code, _, err = table("plain.yaml", "--seeds", "1")
    assert code == 2
    assert f"{cell / file}: {said}" in err


def test_a_failure_told_by_another_version_is_one(table) -> None:
    table("plain.yaml", "--seeds", "1")
    cell = Path("runs/table/plain/seed-0")
    (cell / "summary.json").unlink()
    (cell / "failed.json").write_text('{"code": 3, "reason": "too large", "moon": "full"}')
    code, out, _ = table("plain.yaml", "--seeds", "1")
    assert (code, "plain, seed 0, failed (exit code 3): too large" in out) == (3, True)


def test_a_cell_whose_process_died_before_it_began_is_begun_and_a_strange_folder_is_left_alone(table) -> None:
    half, strange = Path("runs/table/plain/seed-0"), Path("runs/table/plain/seed-1")
    table("plain.yaml", "--seeds", "1", "--quiet", "--out", "other")
    half.mkdir(parents=True)
    (half / "run.json").write_bytes(Path("other/plain/seed-0/run.json").read_bytes())
    (half / ".spec.yaml.part").write_text("name: pl")
    strange.mkdir()
    (strange / "thesis.tex").write_text("dear")
    code, out, _ = table("plain.yaml", "--seeds", "2")
    assert code == 2
    assert "seed 1 failed: runs/table/plain/seed-1: no run folder, and not empty: thesis.tex" in out
    assert metric("plain", 0) == metric("plain", 0, out="other")
    assert (strange / "thesis.tex").read_text() == "dear"


def test_a_cell_that_another_process_holds_is_not_waited_for_if_so_asked_and_said_to_be_so(table, tmp_path) -> None:
    lock = tmp_path / "runs" / "table" / "plain" / ".seed-1.lock"
    lock.parent.mkdir(parents=True)
    with alone(lock, busy=print):
        code, out, err = table("plain.yaml", "--seeds", "2", "--no-wait")
    assert code == 0
    assert "| plain | 1 of 2; seed 1 not finished |" in out
    assert "- plain, seed 1: not finished, in process " in out
    assert "plain, seed 1: is being run by process " in err
    assert table("plain.yaml", "--seeds", "2")[1].splitlines()[2].startswith("| plain | 2 |")


def test_a_run_that_was_begun_by_hand_is_a_cell_and_one_that_goes_on_by_hand_is_another_processes(table) -> None:
    for seed in ("0", "1"):
        folder = f"runs/table/plain/seed-{seed}"
        with pytest.raises(SystemExit) as exited:
            main(["run", "plain.yaml", "--import", "six_numbers", "--seed", seed, "--out", folder, "--quiet"])
        assert not exited.value.code
    Path("runs/table/plain/seed-1/summary.json").unlink()
    with alone(Path("runs/table/plain/seed-1/.lock"), busy=print):
        code, out, _ = table("plain.yaml", "--seeds", "2", "--no-wait")
    assert code == 0
    assert "| plain | 1 of 2; seed 1 not finished |" in out
    assert table("plain.yaml", "--seeds", "2")[1].splitlines()[2].startswith("| plain | 2 |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "2"), "Missing argument"),
        (("plain.yaml",), "Missing option '--seeds'"),
        (("iterations=3", "--seeds", "2"), "a table needs a graph"),
        (("plan.yaml", "--seeds", "2"), "Did you mean 'plain.yaml'?"),
        ((*BOTH, "x"), "--seeds x: expected how many, such as 5 for 0 to 4, or a list, such as 0,3,5-7"),
        ((*BOTH, "0"), "--seeds 0: expected how many"),
        ((*BOTH, "7-5"), "--seeds 7-5: expected how many"),
        ((*BOTH, "100000000"), "--seeds 100000000: more than 10,000"),
        ((*BOTH, "2", "Seed=3"), "Seed=3: the seeds of a table are those of --seeds"),
        ((*BOTH, "2", "--against", "slow"), "--against slow: none of the graphs. Did you mean 'slower'?"),
        ((*BOTH, "2", "--jobs", "0"), "Invalid value for '--jobs'"),
        (("plain.yaml", "plain.yaml", "--seeds", "2"), "plain.yaml: given twice"),
        (("plain.yaml", "./plain.yaml", "--seeds", "2"), "./plain.yaml: named 'plain', as plain.yaml is"),
        ((*BOTH, "2", "name=same"), "slower.yaml: named 'same', as plain.yaml is"),
        ((*BOTH, "2", "evaluation=null"), "plain.yaml: has no `evaluation`, so there is nothing to compare"),
        ((*BOTH, "2", "levels.lower.optimizer=sdg"), "Did you mean 'sgd'?"),
        ((*BOTH, "2", "--out", "plain.yaml"), "plain.yaml: not a folder; choose another with --out"),
        ((*BOTH, "2", "levels.lower.objective=squar"), "Did you mean 'square'?"),
        ((*BOTH, "2", "data.scal=1"), "Did you mean 'scale'?"),
    ],
)
def test_a_mistake_is_answered_with_2_before_anything_is_run(table, tmp_path, arguments, message) -> None:
    code, out, err = table(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.glob("runs/table/*/*/checkpoint"))


def test_a_change_that_does_not_fit_one_of_the_graphs_says_which(table) -> None:
    code, _, err = table("plain.yaml", "first.yaml", "--seeds", "1", "start.upper.with.iterations=2")
    assert code == 2
    assert err.startswith("plain.yaml: <override start.upper.with.iterations=2>: start.upper: 'graph' is missing")
    code, _, err = table("plain.yaml", "slower.yaml", "--seeds", "1", "start.upper.with.iterations=2")
    assert code == 2
    assert err.startswith("<override start.upper.with.iterations=2>: start.upper: 'graph' is missing")
    assert err.count("'graph' is missing") == 1


def test_a_metric_that_is_not_there_is_refused_and_what_was_run_stays(table) -> None:
    assert table(*BOTH, "1", "--quiet")[0] == 0
    code, out, err = table(*BOTH, "2", "--metric", "test.distanc")
    assert (code, out) == (2, "")
    assert err.startswith(
        "plain: no metric named 'test.distanc'. Did you mean 'test.distance'?\n  Known: seconds_per_i"
    )
    assert not Path("runs/table/plain/seed-1").exists()


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("1", (0,)), ("3", (0, 1, 2)), ("3,", (3,)), ("0,3,5-7", (0, 3, 5, 6, 7)), ("4-4", (4,)), ("2,0-2", (0, 1, 2))],
)
def test_seeds_are_a_number_or_a_list(text, seeds) -> None:
    assert seeds_of(text) == seeds


def test_graphs_without_a_metric_that_selects_are_compared_by_their_first_test_metric(table) -> None:
    code, out, _ = table("plain.yaml", "--seeds", "1", "evaluation.select=null")
    assert code == 0
    assert out.startswith(HEAD.format("test.gap"))


def test_cells_that_were_made_with_other_versions_are_said_to_be_so(table) -> None:
    table("plain.yaml", "--seeds", "1", "--quiet")
    path = Path("runs/table/plain/seed-0/summary.json")
    summary = json.loads(path.read_text())
    summary["versions"]["torch"], summary["git_commit"] = "1.0.0", "0123456789abcdef"
    path.write_text(json.dumps(summary))
    out = table("plain.yaml", "--seeds", "2")[1]
    assert f"- made with different versions: torch 1.0.0 and {torch.__version__}, commit 0123456789ab and " in out


def test_a_name_with_anything_in_it_is_one_folder(table) -> None:
    code, out, _ = table("plain.yaml", "--seeds", "1", "name=../a|b")
    assert code == 0
    assert "| ../a\\|b | 1 |" in out
    assert Path("runs/table/%2E.%2Fa%7Cb/seed-0/summary.json").is_file()
