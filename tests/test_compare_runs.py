"""The table of paired differences, against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_means_paired_differences_errors_and_t(tmp_path: Path) -> None:
    scores = {"full": {0: 90.0, 1: 92.0, 2: 94.0}, "control": {0: 88.0, 1: 92.0, 2: 91.0}}
    for name, by_seed in scores.items():
        for seed, score in by_seed.items():
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            (folder / "spec.yaml").touch()
            (folder / "summary.json").write_text(
                json.dumps({"seed": seed, "metrics": {"test.balanced_accuracy": score}})
            )
    (tmp_path / "unfinished-0").mkdir()
    command = [sys.executable, ROOT / "examples" / "compare_runs.py", tmp_path, "--against", "full"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # differences −2, 0, −3: mean −5/3, deviation 1.53, standard error 0.88
    assert lines[2:] == ["| full | 3 | 92.0 ± 2.0 | | |", "| control | 3 | 90.3 ± 2.1 | -1.7 ± 0.9 | -1.9 |"]
