"""What a user types and sees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PENALTY = str(ROOT / "graphs" / "penalty.yaml")


def test_run_trains_prints_progress_and_the_results_and_exits_0(mlo_command, tmp_path: Path) -> None:
    code, out, err = mlo_command("run", PENALTY, "iterations=40", "--out", "run", "--seed", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(r"penalty 2/40  \S+/s  \d:\d\d left  loss weights \S+, penalty \S+  ‖d penalty‖ \S+", lines[0])
    assert "balanced_accuracy" in out
    assert "840 gradients, 800 products, 40 pullbacks (as predicted)" in out
    assert (tmp_path / "run" / "summary.json").exists()
    assert "seed: 3" in (tmp_path / "run" / "spec.yaml").read_text()


def test_quiet_prints_nothing_and_the_default_folder_is_named_after_the_run(mlo_command, tmp_path: Path) -> None:
    assert mlo_command("run", "penalty", "iterations=2", "--quiet") == (0, "", "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("penalty-0-")


def test_a_dry_run_prints_the_resolved_graph_order_and_cost_and_takes_no_step(mlo_command, tmp_path: Path) -> None:
    code, out, _ = mlo_command("run", PENALTY, "iterations=7", "--dry-run")
    assert code == 0
    assert "iterations: 7" in out
    assert "run order: weights → penalty" in out
    assert "cost: 147 gradients, 140 products, 7 pullbacks" in out
    assert list(tmp_path.iterdir()) == []


def test_check_says_what_needs_aware_differentiates_and_holds_fixed(mlo_command) -> None:
    code, out, _ = mlo_command("check", "needs_aware")
    assert code == 0
    assert "run order: classifier → discriminator → generator → refined → meta" in out
    assert "meta differentiates through: refined (finite_difference {radius: 0.01}), generator" in out
    assert "meta holds fixed: meta → discriminator → generator" in out
    assert "cost: 4,000 gradients, 0 products, 375 pullbacks" in out


def test_check_says_what_an_optimizer_reads_and_refuses_methods_that_do_not_follow_it(mlo_command) -> None:
    code, out, _ = mlo_command("check", "learned_rates")
    assert code == 0
    reads = "classifier's optimizer reads: learning_rate ← rates.learning_rate, weight_decay ← rates.weight_decay"
    assert reads in out.splitlines()
    code, _, err = mlo_command("check", "learned_rates", "levels.classifier.hypergradient=exact")
    assert code == 2
    assert "levels.classifier.hypergradient: Exact does not follow the optimizer's steps" in err


@pytest.mark.parametrize(
    ("method", "shown", "products"),
    [
        ("unroll", "unroll", "20 products"),
        ("null", "unroll", "20 products"),
        ("{conjugate_gradient: {iterations: 6}}", "conjugate_gradient {iterations: 6}", "at most 7 products"),
        (
            "{implicit: {inverse: {conjugate_gradient: {iterations: 6}}}}",
            "implicit {inverse: {conjugate_gradient: {iterations: 6}}}",
            "at most 7 products",
        ),
        ("{neumann: {terms: 6, step_size: 0.1}}", "neumann {terms: 6, step_size: 0.1}", ", 7 products"),
    ],
)
def test_check_names_methods_as_show_does_and_says_which_cost_is_a_bound(mlo_command, method, shown, products) -> None:
    setting = f"levels.weights.hypergradient={method}"
    code, out, err = mlo_command("check", PENALTY, "iterations=1", setting)
    assert (code, err) == (0, "")
    assert f"penalty differentiates through: weights ({shown})" in out
    assert products in out.splitlines()[-1]
    pulled = [line for line in mlo_command("show", PENALTY, setting)[1].splitlines() if "pulled back by" in line]
    assert pulled[0].endswith(f" {shown}")


def test_check_finds_a_disconnected_level_before_the_first_step(mlo_command) -> None:
    code, _, err = mlo_command("check", PENALTY, "levels.weights.objective=classification")
    assert code == 2
    assert "the response of 'weights' does not reach back to 'penalty'" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "missing.yaml"), 2, "missing.yaml"),
        (("run", PENALTY, "levels.weights.optimizer=sdg"), 2, "Did you mean 'sgd'?"),
        (("run", PENALTY, "data.train_per_clas=3"), 2, "Did you mean 'train_per_class'?"),
        (("run", PENALTY, "data.train_per_class=500"), 2, "<override data.train_per_class=500>: data"),
        (("run", PENALTY, "levels.penalty.variables.log_penalty.inital=1"), 2, "Did you mean 'initial'?"),
        (("run", PENALTY, "levels.weights.batch=trian"), 2, "Did you mean 'train'?"),
        (("run", PENALTY, "levels.weights.freeze=[wieght]"), 2, "Did you mean 'weight'?"),
        (("run", PENALTY, "evaluation.model=[wights]"), 2, "Did you mean 'weights'?"),
        (
            ("run", PENALTY, "evaluation.select=validation.top"),
            2,
            "<override evaluation.select=validation.top>: evaluation.select: no metric named 'validation.top'. "
            "Did you mean 'validation.top1'?\n  Known: validation.balanced_accuracy, ",
        ),
        (("run", PENALTY, "--device", "cuda:7"), 2, "device: there is no cuda:7 on this machine. Available: cpu"),
        (("check", PENALTY, "device=cuda:7"), 2, "<override device=cuda:7>: device: there is no cuda:7"),
        (("check", PENALTY, "--import", "noisyy"), 2, "--import noisyy: there is no such module"),
        (("check", PENALTY, "--import", "noisy.py"), 2, "--import noisy.py: write --import noisy\n"),
        (("run", PENALTY, "levels.weights.optimizer.sgd.learning_rate=1e30"), 3, "level 'weights', step"),
        (("run", PENALTY, "--out", "/proc/mlo/run"), 4, "cannot be made"),
        (("run", PENALTY, "--no-such-option"), 2, "No such option"),
        (("walk",), 2, "No such command"),
    ],
)
def test_a_users_mistake_has_its_message_and_its_exit_code_and_no_traceback(
    mlo_command, arguments, code, message
) -> None:
    found, _, err = mlo_command(*arguments)
    assert found == code, err
    assert message in err
    assert "Traceback" not in err


def test_a_bug_is_said_in_a_line_and_its_traceback_saved(mlo_command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mlo._run._run.summarise", lambda *_, **__: 1 / 0)
    code, _, err = mlo_command("run", PENALTY, "iterations=1", "--out", "run")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "summarise" in (tmp_path / "run" / "traceback.txt").read_text()


def test_help_and_a_wrong_spec_are_answered_without_torch() -> None:
    program = (
        "import sys\n"
        "from mlo.cli import main\n"
        "try:\n    main({arguments})\n"
        "except SystemExit as exited:\n    print(exited.code, 'torch' in sys.modules)\n"
    )
    for arguments, answer in ((["--help"], "0 False"), (["run", PENALTY, "levels.weights.optimizer=sdg"], "2 False")):
        done = subprocess.run(
            [sys.executable, "-c", program.format(arguments=arguments)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == answer


def test_a_problem_of_ones_own_is_given_by_import(mlo_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_problem.py").write_text(
        "import torch, mlo\n"
        "def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:\n"
        "    return mlo.Problem(variables={'point': lambda: torch.ones(3)},\n"
        "        objectives={'square': lambda values, batch: values['point'].square().sum()},\n"
        "        streams={'numbers': [1.0, 2.0]})\n"
    )
    (tmp_path / "own.yaml").write_text(
        "problem: own_problem\niterations: 5\nlevels:\n"
        "  point: {variables: point, objective: square, batch: numbers, optimizer: {sgd: {learning_rate: 0.1}}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = mlo_command("run", "own.yaml", "--import", "own_problem", "--out", "run")
    assert (code, err) == (0, "")
    assert "notice: stream 'numbers' is a plain iterable" in out
