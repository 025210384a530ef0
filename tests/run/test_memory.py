"""A long run needs no more memory than a short one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

PROBLEM = """
import os
import torch, mlo

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def square(values, batch):
    return (values["lower"] - values["upper"] - batch).square().sum()

def distance(values, batch):
    return values["lower"].square().sum(), {"size": values["upper"].norm()}

def judge(values, split, *, model, totals, complete):
    return mlo.Evaluation(metrics={"resident": resident()})

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    return mlo.Problem(
        variables={"point": lambda: torch.ones(3)},
        objectives={"square": square, "distance": distance},
        streams={"drawn": mlo.stream.Shuffled(torch.randn(64, 3), size=8)},
        evaluate=judge,
    )
"""
GRAPH = """
problem: cheap
iterations: ITERATIONS
evaluation: {every: 500}
checkpoint: {every: 500}
levels:
  lower: {variables: point, objective: square, given: [upper], batch: drawn, optimizer: {sgd: {learning_rate: 0.1}}}
  upper: {variables: point, objective: distance, subject_to: [lower], optimizer: adam}
"""


def resident(folder: Path, iterations: int) -> dict[int, float]:
    """Megabytes that the process of a run holds, by iteration."""
    (folder / "cheap.py").write_text(PROBLEM)
    (folder / "graph.yaml").write_text(GRAPH.replace("ITERATIONS", str(iterations)))
    program = (
        "import mlo\n"
        "run = mlo.run(mlo.load('graph.yaml', imports=['cheap']), 'run', quiet=True)\n"
        "for line in run.metrics:\n"
        "    if 'evaluation' in line:\n"
        "        print(line['iteration'], line['evaluation']['validation.resident'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {int(iteration): float(size) for iteration, size in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what a process holds")
def test_a_run_of_20_000_cheap_iterations_keeps_flat_memory(tmp_path: Path) -> None:
    size = resident(tmp_path, 20_000)
    assert size[20_000] - size[2_000] < 3.0, size
